"""Loading the model of a folder, whichever kind it is."""

from pathlib import Path

from rlhf.io.model_config import is_reward_model
from rlhf.io.model_folder import LanguageModel, RewardModel, load_language_model, load_reward_model


def load_model(folder: str | Path) -> LanguageModel | RewardModel:
    """Return the language or reward model in a folder, with its `params`, `config` and `tokenizer`.

    Args:
        folder: a model folder in Hugging Face form, saved by rlhf or by `transformers`.

    Returns:
        A `RewardModel` if the folder holds a model with a scalar head, otherwise a `LanguageModel`.

    Raises:
        UserError: a file is missing, truncated, altered or holds another kind of model, or a weight is not finite.

    Example:
        >>> from rlhf.io.model_folder import save_language_model
        >>> from rlhf.io.tokenizer import Tokenizer
        >>> tokenizer = Tokenizer.train(["hello hello"], vocab_size=260)
        >>> config = rlhf.GPT2Config(vocab_size=tokenizer.vocab_size, n_positions=8, n_embd=4, n_layer=1, n_head=1)
        >>> model = LanguageModel(rlhf.gpt2.init(config, key=rlhf.random.key(0)), config, tokenizer)
        >>> save_language_model("a_model", model, facts={})
        >>> load_model("a_model").config == config
        True
    """
    return load_reward_model(folder) if is_reward_model(Path(folder)) else load_language_model(folder)
