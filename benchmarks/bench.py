"""What a run of the programs has been asked for, and how both sides are set up for it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.peers.environment import TRL_WITH_PPO, python_of
from benchmarks.sides import Setting


class Made(NamedTuple):
    """What both sides load, written once for a run."""

    model: Path
    """Folder of a language model."""
    reward: Path
    """Folder of a reward model."""
    prompts: Path
    """PPO's prompts, each as text and as ids."""
    demonstrations: Path
    """A file for SFT."""


@dataclass(frozen=True)
class Bench:
    """One run."""

    size: str
    """Of `material.SIZES`."""
    device: str
    rounds: int
    threads: int
    only: str
    """Part of the names of the rows to measure."""
    peers: Path
    """The peers' environment."""
    output: Path
    made: Made

    @property
    def logs(self) -> Path:
        """What the sides print."""
        return self.output / "logs"

    def ours(self, function: str, variants: tuple[dict[str, Any], ...], **settings: Any) -> tuple[Setting, ...]:
        """Our settings for a function of `benchmarks.ours`."""
        return tuple(
            Setting(_label(variant), f"benchmarks.ours:{function}", self._common() | settings | variant)
            for variant in variants
        )

    def theirs(self, target: str, variants: tuple[dict[str, Any], ...], **settings: Any) -> tuple[Setting, ...]:
        """A peer's settings for MODULE:FUNCTION of `benchmarks.peers`; PPO's come with the TRL that has it."""
        where = {"python": python_of(self.peers)}
        where |= {"path": str(self.peers / TRL_WITH_PPO)} if target.startswith("trl_ppo") else {}
        return tuple(
            Setting(_label(variant), f"benchmarks.peers.{target}", self._common() | settings | variant, **where)
            for variant in variants
        )

    def _common(self) -> dict[str, Any]:
        return {"size": self.size, "device": self.device, "threads": self.threads}


def _label(variant: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in variant.items()) or "fp32, eager"
