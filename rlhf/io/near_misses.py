"""Remedies for folders and files that are easily mistaken for a model, each in one line."""

import json
from pathlib import Path
from typing import Any

MODEL_FOLDER = "it should be a model folder with config.json and model.safetensors on this machine"
"""Remedy where a path is no folder."""

_POINTER = b"version https://git-lfs.github.com/spec/"


def folder_remedy(folder: Path) -> str:
    """Return what a folder without a model holds instead, and the remedy; empty if unknown."""
    if (folder / "adapter_config.json").is_file():
        return (
            "holds a LoRA (PEFT) adapter and no model; merge it first, with peft's merge_and_unload() and "
            "save_pretrained()"
        )
    models = _models_below(folder)
    states = ("", "step-*/", "*/step-*/", "checkpoints/*/step-*/")
    if not models and any(list(folder.glob(f"{state}state.safetensors")) for state in states):
        return (
            "holds checkpoints of a run and no model; continue the run with --resume, or name its model (sft/, "
            "reward/ or policy/ in the run's output folder)"
        )
    if snapshots := sorted(folder.glob("snapshots/*/")) or sorted(folder.glob("models--*/snapshots/*/")):
        return f"is a cache of the Hugging Face hub; name the snapshot in it: {_current(snapshots)}"
    if models:
        return f"holds no model itself; name one of the models in it: {', '.join(map(str, models[:4]))}"
    if list(folder.glob("*.gguf")):
        return (
            "holds a GGUF file, which is not read; take the model's safetensors folder, or convert it with "
            "transformers: from_pretrained(folder, gguf_file=...) and save_pretrained()"
        )
    if (folder / "trainer_state.json").is_file():
        return "is a checkpoint of transformers' Trainer without its model; name a folder that save_model() wrote"
    return ""


def weights_remedy(folder: Path) -> str:
    """Return why a folder with config.json has no readable safetensors, and the remedy; empty if unknown."""
    pickled = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in sorted(folder.glob(pattern))]
    pickled = [name for name in pickled if name != "training_args.bin"]
    if not pickled:
        return folder_remedy(folder)
    architecture = next(iter(_settings(folder / "config.json").get("architectures") or ["GPT2LMHeadModel"]))
    return (
        f'holds {pickled[0]}, and pickles are not read; convert it once: python -c "from transformers import '
        f"{architecture} as M; M.from_pretrained('{folder}').save_pretrained('{folder}')\""
    )


def tokenizer_remedy(folder: Path, kind: Any) -> str:
    """Return why a folder without tokenizer.json has no tokenizer that can be read, and the remedy; empty if unknown.

    Args:
        folder: the folder.
        kind: `tokenizer_class` in its settings, or None.
    """
    names = [path.name for pattern in ("*.model", "*.tiktoken") for path in sorted(folder.glob(pattern))]
    is_gpt2 = kind is None or str(kind).startswith(("GPT2Tokenizer", "PreTrainedTokenizer"))
    if not names and (is_gpt2 or not (folder / "vocab.json").is_file()):
        return ""
    found = names[0] if names else f"the vocab.json of a {kind}"
    return (
        f"has {found} and no tokenizer.json; convert it once, with transformers and sentencepiece installed: "
        f'python -c "from transformers import AutoTokenizer as T; '
        f"T.from_pretrained('{folder}').save_pretrained('{folder}')\""
    )


def pointer_remedy(path: Path) -> str:
    """Return the remedy if a file is a pointer of Git LFS; empty if it is not."""
    try:
        with path.open("rb") as stream:
            is_pointer = stream.read(len(_POINTER)) == _POINTER
    except OSError:
        return ""
    return "is a pointer of Git LFS and not the file itself; run `git lfs pull` in its folder" if is_pointer else ""


def _models_below(folder: Path) -> list[Path]:
    """Return the subfolders that hold models, ordered from the last stage of a pipeline and the newest checkpoint."""
    order = {"policy": 0, "sft": 1, "reward": 2}
    models = [path.parent for path in folder.glob("*/config.json") if _settings(path).get("model_type")]

    def rank(model: Path) -> tuple[int, int, str]:
        number = model.name.rpartition("-")[2]
        return (order.get(model.name, 3), -int(number) if number.isdecimal() else 0, model.name)

    return sorted(models, key=rank)


def _settings(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; empty if there is none."""
    try:
        settings = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _current(snapshots: list[Path]) -> Path:
    """Return the snapshot that the branch `main` points to, or else the last."""
    reference = snapshots[-1].parent.parent / "refs" / "main"
    if reference.is_file():
        snapshot = snapshots[-1].parent / reference.read_text(encoding="utf-8").strip()
        if snapshot in snapshots:
            return snapshot
    return snapshots[-1]
