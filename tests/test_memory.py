"""Memory: what one stage has freed is returned to the system before the next, and nothing is kept twice."""

import dataclasses
import gc
import subprocess
import sys
import weakref

import pytest

from rlhf.config import ModelConfig, TokenizerConfig
from rlhf.train import dpo, reward, sft
from rlhf.train.observers import Observer
from rlhf.tree import leaves

PROGRAM = """
import torch
from rlhf.execution.memory import keep_freed_memory, peak_bytes, reset_peak

keep_freed_memory()
device = torch.device("cpu")
blocks = [torch.ones(2**20) for _ in range(64)]
kept = torch.ones(1)  # above them, so that the heap cannot simply shrink
with_blocks = peak_bytes(device)
del blocks
reset_peak(device)
print(with_blocks - peak_bytes(device))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator of glibc, and the peak of /proc")
def test_a_stage_does_not_occupy_what_the_stage_before_has_freed():
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert int(result.stdout) > 60 * 2**22


@pytest.mark.parametrize(
    ("module", "load"), [(sft, "load_language_model"), (reward, "load_trunk"), (dpo, "load_language_model")]
)
def test_training_does_not_keep_the_parameters_that_it_starts_from(short_pipeline, tmp_path, monkeypatch, module, load):
    """The executor holds a copy of them, so they would take as much memory again."""
    stage = module.__name__.rpartition(".")[2]
    first = dataclasses.replace(short_pipeline, output_dir=tmp_path / "first")
    sft.run_sft(first)
    settings = dataclasses.replace(getattr(first, stage), model_path=first.output_dir / "sft", max_steps=2)
    references = []
    load_model = getattr(module, load)

    def load_and_watch(folder):
        model = load_model(folder)
        references.extend(map(weakref.ref, leaves(model.params)))
        return model

    class Watcher(Observer):
        steps = 0

        def on_step(self, step, metrics):
            gc.collect()
            assert not [reference for reference in references if reference() is not None]
            self.steps = step
            return False

    monkeypatch.setattr(module, load, load_and_watch)
    watcher = Watcher()
    changes = {stage: settings, "model": ModelConfig(), "tokenizer": TokenizerConfig()}
    run = dataclasses.replace(first, output_dir=tmp_path / "second", **changes)
    getattr(module, f"run_{stage}")(run, [watcher])
    assert watcher.steps
    assert references
