"""The decision whether to compile: it follows the time that compilation was measured to save and to take."""

from types import SimpleNamespace

import pytest
import torch

from rlhf.config import SFTRun
from rlhf.stages import STAGES
from rlhf.train.compile_policy import compile_folder

SMALL = {"layers": 4, "width": 128, "vocab": 1024}
SMOLLM2 = {"layers": 30, "width": 576, "vocab": 49152}


def weights(layers, width, vocab):
    """Tensors of a transformer's shapes, without memory."""
    shapes = {"norm": (width,), "attention": (width, 3 * width), "output": (width, width)}
    shapes |= {"up": (width, 4 * width), "down": (4 * width, width)}
    block = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return {"embedding": torch.empty(vocab, width, device="meta"), "blocks": {str(n): block for n in range(layers)}}


def compiles(tmp_path, size, tokens, *, dtype=torch.float32, setting="auto", evaluated=0):
    notes = []
    config = SFTRun(cache_dir=tmp_path, compile=setting, device="cpu")
    run = SimpleNamespace(config=config, dtype=dtype, stage=STAGES["sft"], note=notes.append)
    params = weights(**size)
    folder = compile_folder(run, params, tokens, evaluated=[params] * evaluated)
    assert (folder is not None) == any("compiling" in note for note in notes)
    return folder is not None


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    monkeypatch.setattr("rlhf.train.compile_policy.has_compiler", lambda: True)


def test_compilation_has_to_save_more_than_it_takes(tmp_path):
    """SmolLM2 is compiled in two minutes and then saves a third of a millisecond per token (benchmarks/README.md)."""
    assert not compiles(tmp_path, SMOLLM2, 145_000)  # three epochs of 1,612 sentences: it would save 50 seconds
    assert compiles(tmp_path, SMOLLM2, 1_000_000)
    assert not compiles(tmp_path, SMALL, 500_000)
    assert compiles(tmp_path, SMALL, 5_000_000)


def test_bf16_saves_more(tmp_path):
    tokens = 1_000_000
    assert not compiles(tmp_path, SMALL, tokens)
    assert compiles(tmp_path, SMALL, tokens, dtype=torch.bfloat16)


def test_models_without_gradients_take_time_too(tmp_path):
    tokens = 2_000_000
    assert compiles(tmp_path, SMALL, tokens)
    assert not compiles(tmp_path, SMALL, tokens, evaluated=8)


def test_a_setting_overrides_the_rule(tmp_path):
    assert compiles(tmp_path, SMALL, 1, setting="on")
    assert not compiles(tmp_path, SMALL, 10**9, setting="off")
