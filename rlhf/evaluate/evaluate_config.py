"""Settings of rlhf-evaluate, as a typed dataclass. Importing it imports no torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rlhf.config import ComputeConfig, DataConfig
from rlhf.ranges import BatchSize, PositiveFloat, PositiveInt, Section, Seed
from rlhf.setting_rules import DATA_RULES, Rule

MODEL_DIR = "give a run's output folder or a model folder as --model-dir"
"""Remedy where a path is no folder."""

Decoding = Literal["sampled", "greedy"]


@dataclass(frozen=True, kw_only=True)
class JudgementConfig(Section):
    """Settings of an evaluation: models, data, decoding and output."""

    model_dir: Path = Path("outputs")
    """Output folder of a run with sft/, reward/ and policy/, or a single model folder in Hugging Face form."""
    eval_type: Literal["all", "sft", "reward", "policy"] = "all"
    """Kind of evaluation; all runs every kind that models and data allow, and reports what it leaves out."""
    test_data: tuple[Path, ...] = ()
    """Files of demonstrations, preference pairs or prompts. If empty, the records held out by MODEL_DIR's run."""
    train_data: Path | None = None
    """Preference pairs on which the bag-of-words baseline is trained. If None, the run's training pairs if its held-out
    pairs are evaluated, otherwise cross-validation on the test pairs."""
    data: DataConfig = field(default_factory=DataConfig)
    limit: PositiveInt | None = None
    """Number of records read from the beginning of each file. If None, all."""

    against: Path | None = None
    """Model folder to compare the policy with. If None, MODEL_DIR/sft. The KL is measured from MODEL_DIR/sft, or from
    this model if there is no such folder."""
    reward_model: Path | None = None
    """Reward model that scores completions. If None, MODEL_DIR/reward."""
    judge: tuple[str, ...] = ()
    """Python functions, `module:function` or `file.py:function`, that score or compare completions. Scorers have the
    signature of a reward function, and pairwise judges the arguments `first` and `second`."""
    decoding: tuple[Decoding, ...] = ("sampled", "greedy")
    """Decoding methods of the completions."""
    samples: BatchSize = 1
    """Number of sampled completions per prompt."""
    best_of: tuple[PositiveInt, ...] = ()
    """Numbers n of which best-of-n is estimated: every score of the best of n sampled completions by the reward model.
    As many completions are sampled per prompt as the largest n, or more with --samples."""
    temperature: PositiveFloat | None = None
    """Sampling temperature of the policy and of the model it is compared with. If None, that of the run, or 1."""
    max_new_tokens: BatchSize | None = None
    """Maximum number of tokens per completion. If None, that of the run, or 64, or half of a shorter context."""
    seed: Seed = 0
    """Seed of sampling, bootstrap and cross-validation."""

    output: Path | None = None
    """Folder for evaluation.json, completions.jsonl and pairs.jsonl. If None, MODEL_DIR/report."""
    overwrite: bool = False
    """Replace existing files even if rlhf did not write them, or if they were changed since."""
    micro_batch_size: BatchSize = 8
    """Number of packed rows per forward pass. Limits memory; changes results only by rounding."""
    rollout_batch_size: BatchSize = 64
    """Number of completions generated together. Limits memory; changes results only by rounding."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ComputeConfig, JudgementConfig):  # the last base's flags come first
    """Settings of rlhf-evaluate."""


_NO_POLICY = "completions are made only in the policy evaluation, and there is none here"

COLUMN_RULES = (
    *DATA_RULES,
    Rule(
        ("data.columns",),
        lambda config: not config.test_data and config.train_data is None,
        "has no effect without --test-data or --train-data: the run's own data have the columns that it named",
    ),
)
"""Rules for the columns of data files."""

NO_POLICY_RULES = (
    Rule(("judge", "against"), lambda config: True, _NO_POLICY, refused=True),
    Rule(
        ("reward_model", "decoding", "samples", "best_of", "temperature", "max_new_tokens", "rollout_batch_size"),
        lambda config: True,
        _NO_POLICY,
    ),
)
"""Settings that have no effect if no policy is evaluated."""

POLICY_RULES = (
    Rule(
        ("samples", "temperature"),
        lambda config: "sampled" not in config.decoding,
        "has no effect with --decoding greedy, which draws nothing at random",
    ),
    Rule(
        ("best_of",),
        lambda config: "sampled" not in config.decoding,
        "needs sampled completions, and --decoding greedy draws nothing at random; drop one of the two",
        refused=True,
    ),
)
"""Settings that have no effect beside others if a policy is evaluated."""
