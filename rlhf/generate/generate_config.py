"""Settings of rlhf-generate, as a typed dataclass. Importing it imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Interval

from rlhf.ranges import BatchSize, NonNegativeInt, PositiveFloat, Section, Seed, ThreadCount
from rlhf.setting_rules import Rule


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Section):
    """Complete prompts that are given as flags, in a file, or typed."""

    model_dir: Path = Path("outputs/policy")
    """Model folder in Hugging Face form, or a run's output folder, whose policy/ or else sft/ is taken."""
    against: Path | None = None
    """Second model folder, whose completions are shown side by side with the first's."""
    prompt: tuple[str, ...] = ()
    """Prompts to complete.
    Without this and --prompt-file they are read from the terminal, or line by line from a pipe."""
    prompt_file: Path | None = None
    """File of prompts: JSON list or JSON Lines with the key `prompt`, or one prompt per line in a .txt file."""
    template: str = "{prompt}"
    """Text around each prompt, such as 'Customer: {prompt}\\nAgent:'; \\n is a line break."""
    output: Path | None = None
    """JSON Lines file to write instead of showing completions."""
    overwrite: bool = False
    """Replace the file even if it was not written by rlhf, or has been changed since."""

    max_new_tokens: BatchSize | None = None
    """Longest completion in tokens; none is 64, or half of a shorter context."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; below 1 likely tokens become likelier."""
    top_k: NonNegativeInt = 0
    """Sample from the k most likely tokens; 0 is all."""
    top_p: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """Sample from the nucleus of this mass."""
    greedy: bool = False
    """Always take the most likely token."""
    samples: BatchSize = 1
    """Completions per prompt."""
    best_of: BatchSize = 1
    """Draw as many completions for each that is shown, and keep the best by the reward model."""
    reward_model: Path | None = None
    """Reward model that chooses with --best-of; none is reward/ beside the model's folder."""
    seed: Seed = 0
    """Seed of the sampling: the same seed, prompts and options give the same completions."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU where there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the forward pass."""
    threads: ThreadCount | None = None
    """CPU threads; none takes all cores."""


GENERATE_RULES = (
    Rule(
        ("temperature", "top_k", "top_p", "samples", "seed"),
        lambda config: config.greedy,
        "has no effect with --greedy, which draws nothing at random",
    ),
    Rule(
        ("best_of",),
        lambda config: config.greedy,
        "needs different completions, and --greedy draws the same one; drop one of the two",
        refused=True,
    ),
    Rule(("reward_model",), lambda config: config.best_of == 1, "has no effect without --best-of"),
    Rule(("overwrite",), lambda config: config.output is None, "has no effect without --output", refused=True),
    Rule(("top_p",), lambda config: config.top_k == 1, "has no effect with --top-k 1"),
)
"""Settings that have no effect beside others."""
