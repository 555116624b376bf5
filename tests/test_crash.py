"""kill -9 at any moment costs time and nothing else: the resumed pipeline ends with the bits of the undisturbed one."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf import random
from rlhf.data.demo_data import write_embedded

PROGRAM = Path(sys.executable).with_name("rlhf-train")
SETTINGS = """
threads: 1
model: {preset: tiny, n_layer: 1, n_embd: 32}
tokenizer: {vocab_size: 400}
sft: {epochs: 8, batch_size: 8}
reward: {epochs: 8, batch_size: 8}
ppo: {num_iterations: 60, batch_size: 8, minibatch_size: 4, max_new_tokens: 8}
checkpoint: {every: 3}
log: {tensorboard: false}
"""


def command(folder: Path, output: str) -> list[str]:
    data = folder / "data"
    return [
        str(PROGRAM), "pipeline", "--config", str(folder / "settings.yaml"), "--output-dir", str(folder / output),
        "--cache-dir", str(folder / "cache"), "--sft-data", str(data / "demonstrations.json"), "--preference-data",
        str(data / "preferences.json"), "--prompt-data", str(data / "prompts.json"), "--resume",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_killed_pipeline_resumes_to_the_same_bits(tmp_path):
    write_embedded(tmp_path / "data", size=200)
    (tmp_path / "settings.yaml").write_text(SETTINGS)
    subprocess.run(command(tmp_path, "whole"), check=True, capture_output=True)
    kills, moments = 0, random.uniform(random.key(17), (60,)).tolist()
    while True:
        process = subprocess.Popen(command(tmp_path, "killed"), stderr=subprocess.PIPE, text=True)
        try:
            _, errors = process.communicate(timeout=3.0 + 2.0 * moments[kills])
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0, errors
        break
    assert kills >= 3, "the pipeline was too quick to be killed"
    for model in ("sft", "reward", "policy"):
        whole, killed = ((tmp_path / run / model / "model.safetensors").read_bytes() for run in ("whole", "killed"))
        assert whole == killed, model
    leftovers = list((tmp_path / "killed").rglob(".*.tmp"))
    assert not leftovers, "what a killed process left half-written is removed"
