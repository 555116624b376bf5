"""Settings of rlhf-generate, as a typed dataclass. Importing it imports no torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Interval

from rlhf.config import DataConfig
from rlhf.ranges import BatchSize, NonNegativeInt, PositiveFloat, Section, Seed, ThreadCount
from rlhf.setting_rules import DATA_RULES, Rule


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Section):
    """Settings of rlhf-generate."""

    model_dir: Path = Path("outputs/policy")
    """Model folder in Hugging Face form, or the output folder of a run, in which policy/ or otherwise sft/ is read."""
    against: Path | None = None
    """Second model folder. Its completions are shown beside those of the first."""
    prompt: tuple[str, ...] = ()
    """Prompts to complete. Without prompts and without a prompt file, they are read from the terminal, or line by line
    from a pipe."""
    prompt_file: Path | None = None
    """File or folder of prompts with the column `prompt`, in any form that rlhf-train reads, or a .txt file with one
    prompt per line."""
    data: DataConfig = field(default_factory=DataConfig)
    chat: bool = False
    """Treat each prompt as the user's turn of a conversation, which the model's chat template renders."""
    template: str | None = None
    """Text around each prompt, such as 'Customer: {prompt}\\nAgent:'; \\n is a line break. If None, typed prompts get
    the text that the model's training prompts share, and others nothing."""
    output: Path | None = None
    """JSON Lines file to which completions are written. If None, they are shown in the terminal."""
    overwrite: bool = False
    """Replace an existing file even if rlhf did not write it, or if it was changed since."""

    max_new_tokens: BatchSize | None = None
    """Maximum number of tokens per completion. If None, 64, or half of a shorter context."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; values below 1 make likely tokens likelier."""
    top_k: NonNegativeInt = 0
    """Sample from the top_k most likely tokens; 0 disables it."""
    top_p: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """Sample from the smallest set of tokens whose probabilities sum to top_p; 1 disables it."""
    greedy: bool = False
    """Select the most likely token at every step instead of sampling."""
    samples: BatchSize = 1
    """Number of completions per prompt."""
    best_of: BatchSize = 1
    """Number of completions generated for each one that is shown, which is the best by the reward model."""
    reward_model: Path | None = None
    """Reward model of --best-of. If None, reward/ beside the model folder."""
    seed: Seed = 0
    """Seed of the sampling. The same seed, prompts and settings give the same completions."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to compute on; auto selects a GPU if one is available."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the forward pass."""
    threads: ThreadCount | None = None
    """Number of CPU threads. If None, all cores are used."""


GENERATE_RULES = (
    *DATA_RULES,
    Rule(("data.columns",), lambda config: config.prompt_file is None, "has no effect without --prompt-file"),
    Rule(
        ("temperature", "top_k", "top_p", "samples", "seed"),
        lambda config: config.greedy,
        "has no effect with --greedy, which draws nothing at random",
    ),
    Rule(
        ("chat",),
        lambda config: config.template is not None,
        "writes the prompt by the chat template; drop one of --chat and --template",
        refused=True,
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
