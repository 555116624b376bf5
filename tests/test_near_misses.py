"""What is taken for a model folder and is none gets its remedy in one line, from everything that takes one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf import random
from rlhf.errors import UserError
from rlhf.evaluate.evaluate_config import EvaluateConfig
from rlhf.evaluate.evaluation_inputs import find_folders
from rlhf.io.checkpoint import Checkpoint, save_checkpoint
from rlhf.io.model_config import check_model_folder, is_reward_model
from rlhf.io.model_folder import (
    LanguageModel,
    load_language_model,
    load_reward_model,
    load_shape,
    save_language_model,
)
from rlhf.models import gpt2
from rlhf.models.gpt2_config import GPT2Config


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer) -> Path:
    """A good model folder, not to be changed."""
    config = GPT2Config(vocab_size=tokenizer.vocab_size, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    folder = tmp_path_factory.mktemp("good") / "model"
    save_language_model(folder, LanguageModel(gpt2.init(config, key=random.key(0)), config, tokenizer), facts={})
    return folder


def adapter(model: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "gpt2"}')
    (folder / "adapter_model.safetensors").write_bytes(b"")


def adapter_beside_a_model(model: Path, folder: Path) -> None:
    shutil.copytree(model, folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def run_folder(model: Path, folder: Path) -> None:
    shutil.copytree(model, folder / "sft")
    shutil.copytree(model, folder / "policy")
    checkpoint(model, folder / "checkpoints" / "sft")


def checkpoint(model: Path, folder: Path) -> None:
    save_checkpoint(folder, Checkpoint(3, {"a": random.uniform(random.key(0), (2,))}, {}), keep=1)


def unfinished_run(model: Path, folder: Path) -> None:
    checkpoint(model, folder / "checkpoints" / "sft")


def trainer_output(model: Path, folder: Path) -> None:
    for step in (500, 1000):
        shutil.copytree(model, folder / f"checkpoint-{step}")


def trainer_checkpoint(model: Path, folder: Path) -> None:
    folder.mkdir()
    for name in ("trainer_state.json", "optimizer.pt"):
        (folder / name).write_text("{}")


def hub_cache(model: Path, folder: Path) -> None:
    for revision in ("aaa", "bbb"):
        shutil.copytree(model, folder / "snapshots" / revision)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("aaa")


def hub_cache_of_many(model: Path, folder: Path) -> None:
    hub_cache(model, folder / "models--org--name")


def gguf(model: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "model.Q4_K_M.gguf").write_bytes(b"GGUF")


def pickled(model: Path, folder: Path) -> None:
    shutil.copytree(model, folder)
    (folder / "manifest.json").unlink()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def safetensors_file(model: Path, folder: Path) -> None:
    folder.mkdir()
    shutil.copy(model / "model.safetensors", folder / "model.safetensors")


NEAR_MISSES: dict[str, tuple[Callable[[Path, Path], None], str, str]] = {
    # how it comes about, what of it is named, and the remedy
    "LoRA adapter": (adapter, "", "LoRA (PEFT) adapter and no model; merge it first, with peft's merge_and_unload()"),
    "LoRA adapter beside a model": (adapter_beside_a_model, "", "merge_and_unload()"),
    "run": (run_folder, "", "name one of the models in it: {folder}/policy, {folder}/sft"),
    "checkpoint": (
        checkpoint,
        "step-000003",
        "holds checkpoints of a run and no model; continue the run with --resume",
    ),
    "checkpoints": (unfinished_run, "checkpoints", "holds checkpoints of a run and no model"),
    "unfinished run": (unfinished_run, "", "holds checkpoints of a run and no model"),
    "output of transformers' Trainer": (trainer_output, "", "name one of the models in it: {folder}/checkpoint-1000"),
    "checkpoint of transformers' Trainer": (
        trainer_checkpoint,
        "",
        "without its model; name a folder that save_model()",
    ),
    "cache of the hub": (hub_cache, "", "name the snapshot in it: {folder}/snapshots/aaa"),
    "cache of many models": (hub_cache_of_many, "", "{folder}/models--org--name/snapshots/aaa"),
    "GGUF": (gguf, "", "holds a GGUF file, which is not read"),
    "GGUF file": (gguf, "model.Q4_K_M.gguf", "is a file and no folder; "),
    "safetensors file": (safetensors_file, "model.safetensors", "is a file and no folder; "),
    "pickles": (pickled, "", "GPT2LMHeadModel as M; M.from_pretrained('{folder}').save_pretrained('{folder}')"),
}


@pytest.mark.parametrize("kind", NEAR_MISSES)
def test_a_near_miss_gets_its_remedy(tmp_path, model, kind):
    make, name, piece = NEAR_MISSES[kind]
    folder = tmp_path / "m"
    make(model, folder)
    target = folder / name
    loaders = {"language model": load_language_model, "reward model": load_reward_model}
    if kind != "pickles":  # whose config.json is fine
        loaders |= {"shape": load_shape, "kind": is_reward_model}
        loaders |= {"settings": lambda path: check_model_folder(path, "GPT2LMHeadModel")}
    if kind not in ("run", "pickles"):  # of a run all models are evaluated
        loaders |= {"evaluation": lambda path: find_folders(EvaluateConfig(model_dir=path))}
    if kind == "pickles":
        del loaders["reward model"]
    for loader, load in loaders.items():
        with pytest.raises(UserError) as caught:
            load(target)
        assert str(caught.value).startswith(str(target)), loader
        assert piece.format(folder=folder) in str(caught.value), loader
        assert "\n" not in str(caught.value)


def test_a_folder_of_anything_else_is_no_model_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "config.json").write_text(json.dumps({"port": 80}))
    with pytest.raises(UserError, match=r"config\.json: no such file; .* is not a model folder"):
        load_language_model(tmp_path)
