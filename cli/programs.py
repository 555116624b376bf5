"""rlhf: the list of programs. `python -m rlhf` is the same."""

import sys
from collections.abc import Sequence

import rlhf

_PROGRAMS = {
    "rlhf-example": "align a small model on made-up data, in two minutes",
    "rlhf-train": "train on your data: sft, reward, ppo, dpo, or a pipeline of them",
    "rlhf-evaluate": "judge models on data that they have not seen",
    "rlhf-generate": "complete prompts with a model, or two side by side",
    "rlhf-monitor": "follow, check, plot and compare runs",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the programs, or the version; any other word is an error."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words == ["--version"]:
        print(f"rlhf {rlhf.__version__}")
        return 0
    print("usage: rlhf [--version]\n")
    print(f"rlhf {rlhf.__version__}: reinforcement learning from human feedback. Each program has --help:\n")
    for name, text in _PROGRAMS.items():
        print(f"  {name:<15}{text}")
    print("\nTo begin: rlhf-example --create-dummy-data")
    if words and words not in (["-h"], ["--help"]):
        print(f"error: rlhf has no command {words[0]!r}; use the programs above", file=sys.stderr)
        return 2
    return 0
