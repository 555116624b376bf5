"""Best-of-n completions of prompts: several are drawn, and a reward model chooses one."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rlhf.data.collate import join_completions, pack_completions, unpack_sequences
from rlhf.data.conversations import Message
from rlhf.errors import UserError
from rlhf.execution.executor import LocalExecutor
from rlhf.execution.program import ModelState, Program
from rlhf.generate.complete import complete, decode_completions
from rlhf.generate.completer import ROWS, Completer, TextChunk
from rlhf.generate.generate_config import GenerateConfig
from rlhf.io.model_folder import load_reward_model
from rlhf.io.reward_sources import check_vocabulary
from rlhf.models.scoring import reward_scores
from rlhf.random import fold_in

_SCORED_ROWS = 8


class BestOfCompleter(Completer):
    """A model whose completion of a prompt is the best of `best_of` by a reward model."""

    def __init__(self, folder: Path, config: GenerateConfig, device: torch.device) -> None:
        """Load the model and the reward model: `reward_model`, or `reward` beside the model's folder.

        Raises:
            UserError: a model cannot be read, or the two do not fit together.
        """
        super().__init__(folder, config, device)
        reward_folder = config.reward_model or folder.parent / "reward"
        if not reward_folder.is_dir():
            raise UserError(f"--best-of: there is no reward model in {reward_folder}; name one: --reward-model FOLDER")
        self._reward = load_reward_model(reward_folder)
        check_vocabulary(reward_folder, self._reward.tokenizer, self.model.tokenizer)
        self._context = min(self._context, self._reward.config.n_positions)
        self.configure(config)

    def stream(self, prompt: str | list[Message], key: Tensor) -> Iterator[TextChunk]:
        """Yield the best completion of one prompt, as a whole."""
        yield from self.complete([prompt], key.unsqueeze(0))

    def complete(self, prompts: Sequence[str | list[Message]], keys: Tensor) -> list[TextChunk]:
        """Return the best completion of each prompt; completion i of a prompt is drawn with its key and i."""
        count = self._config.best_of
        encoded = [tokens for prompt in prompts for tokens in [self.encode(prompt)] * count]
        own_keys = fold_in(keys.repeat_interleave(count, dim=0), torch.arange(count).repeat(len(prompts)))
        reward, dtype = self._reward, self._dtype
        program = Program(
            {},
            {
                "rollout": self._rollout(),
                "score": lambda params, frozen, batch: reward_scores(frozen, batch, (reward.config,), dtype),
            },
            {},
        )
        models = ModelState({"policy": self.model.params}, {"reward_model_0": reward.params})
        executor = LocalExecutor(program, models, self._device)
        completions = complete(executor, encoded, own_keys, rows=ROWS)
        joined = join_completions(encoded, completions.tokens, completions.mask.sum(dim=1))
        row_length = max(map(len, joined.sequences))
        packs = pack_completions(joined, range(len(encoded)), rows=_SCORED_ROWS, row_length=row_length)
        scores = unpack_sequences(packs, executor.map("score", [pack.batch for pack in packs]))
        best = (scores.view(-1, count).argmax(dim=1) + count * torch.arange(len(prompts))).tolist()
        texts = decode_completions(self.model.tokenizer, completions)
        return [TextChunk(texts[number], bool(completions.ended[number])) for number in best]


def open_completer(folder: Path, config: GenerateConfig, device: torch.device) -> Completer:
    """Return the completer for the settings.

    Args:
        folder: folder of the language model.
        config: settings; with `best_of` above 1, a reward model is loaded too.
        device: device to compute on.

    Raises:
        UserError: a model cannot be read, or they do not fit together.
    """
    return (BestOfCompleter if config.best_of > 1 else Completer)(folder, config, device)
