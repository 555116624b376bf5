"""Fixtures shared by all tests: a tiny GPT-2, a tiny tokenizer, a global RNG that must not move, and the real data."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import laws  # noqa: F401  (its profile of hypothesis has no deadline)
import pytest
import torch

from rlhf import random
from rlhf.config import LogConfig, ModelConfig, PipelineRun, PPOConfig, RewardConfig, SFTConfig, TokenizerConfig
from rlhf.distributed import compute_context, ray_session
from rlhf.io.tokenizer import Tokenizer
from rlhf.models import gpt2
from rlhf.models.gpt2_config import GPT2Config
from rlhf.tree import named_leaves, tree_map_named
from rlhf.types import Params

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.update(ray_session._QUIET)  # Ray reads them when it is imported, which a test may do before rlhf does
compute_context._CROWD = 4  # tests have more workers than this machine has cores
torch.set_num_threads(1)  # tiny tensors: more threads only get in each other's way

TINY = GPT2Config(vocab_size=48, n_positions=32, n_embd=16, n_layer=2, n_head=2)


@pytest.fixture(autouse=True)
def _global_rng_is_untouched() -> Iterator[None]:
    """Invariant 16, in every test: nothing in rlhf reads or sets the global generator."""
    torch.manual_seed(20230913)
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state()), "the global random state has moved"


@pytest.fixture
def key() -> torch.Tensor:
    return random.key(7)


@pytest.fixture
def config() -> GPT2Config:
    return TINY


@pytest.fixture
def params(config: GPT2Config) -> Params:
    """Random parameters with biases and norms away from 0 and 1, so that a dropped one shows."""
    blank = gpt2.init(config, key=random.key(1))
    names = {name: number for number, name in enumerate(named_leaves(blank))}

    def disturb(name: str, leaf: torch.Tensor) -> torch.Tensor:
        return leaf + 0.2 * random.normal(random.fold_in(random.key(2), names[name]), tuple(leaf.shape))

    return tree_map_named(disturb, blank)


@pytest.fixture
def tokens(config: GPT2Config) -> torch.Tensor:
    """[3, 12] int64."""
    draws = random.uniform(random.key(3), (3, 12))
    return (draws * config.vocab_size).long()


@pytest.fixture(scope="session")
def hugging_face() -> Callable[[Params, GPT2Config], torch.nn.Module]:
    """Builds the same model in transformers."""
    import transformers  # here, because it takes seconds that most tests need not wait

    def build(params: Params, config: GPT2Config) -> torch.nn.Module:
        shape = {name: getattr(config, name) for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
        with torch.random.fork_rng():  # a new transformers model draws random weights
            model = transformers.GPT2LMHeadModel(
                transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0)
            ).eval()
        state = gpt2.to_hugging_face(params)
        model.load_state_dict(state | {"lm_head.weight": state["transformer.wte.weight"]})
        return model

    return build


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    texts = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs"] * 3
    return Tokenizer.train(texts, 300)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data, which is not part of the repository; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("RLHF_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data absent: {folder} (set RLHF_SHARED_DATA)")
    return folder


@pytest.fixture(scope="session")
def short_pipeline(tmp_path_factory) -> PipelineRun:
    """A short pipeline on a few records; its output folder is named by the test."""
    folder = tmp_path_factory.mktemp("facade")

    def write(name: str, records: list[dict[str, str]]) -> Path:
        (folder / name).write_text(json.dumps(records))
        return folder / name

    numbers = range(24)
    return PipelineRun(
        cache_dir=folder / "cache",
        threads=1,
        sft_data=write("sft.json", [{"prompt": f"say {n}", "completion": f" the word {n}"} for n in numbers]),
        preference_data=write(
            "pairs.json", [{"prompt": f"say {n}", "chosen": " yes", "rejected": f" no {n}"} for n in numbers]
        ),
        prompt_data=write("prompts.json", [{"prompt": f"say {n}"} for n in numbers]),
        model=ModelConfig(preset="tiny", n_layer=1, n_embd=16, n_head=2, n_positions=64),
        tokenizer=TokenizerConfig(vocab_size=300),
        sft=SFTConfig(max_steps=5, batch_size=4, eval_every=2),
        reward=RewardConfig(max_steps=4, batch_size=4),
        ppo=PPOConfig(num_iterations=4, batch_size=4, minibatch_size=4, num_epochs=1, max_new_tokens=6),
        log=LogConfig(tensorboard=False),
    )
