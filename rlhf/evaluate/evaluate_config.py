"""Settings of rlhf-evaluate, as a typed dataclass. Importing it imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlhf.config import ComputeConfig
from rlhf.ranges import BatchSize, PositiveFloat, PositiveInt, Section, Seed
from rlhf.setting_rules import Rule

Decoding = Literal["sampled", "greedy"]


@dataclass(frozen=True, kw_only=True)
class JudgementConfig(Section):
    """Settings of an evaluation: models, data, decoding and output."""

    model_dir: Path = Path("outputs")
    """Output folder of a run, with sft/, reward/ and policy/; or one model folder in Hugging Face form."""
    eval_type: Literal["all", "sft", "reward", "policy"] = "all"
    """What to evaluate; all does what models and data allow and says what it leaves out."""
    test_data: tuple[Path, ...] = ()
    """Files of demonstrations, preference pairs or prompts; none takes the records held out by MODEL_DIR's run."""
    train_data: Path | None = None
    """Preference pairs that the bag-of-words baseline learns from.
    None takes the run's training pairs if its held-out pairs are judged, or else cross-validation on the test pairs."""
    limit: PositiveInt | None = None
    """Records read of each file, from its beginning; none is all."""

    against: Path | None = None
    """Model folder that the policy is compared with; none is MODEL_DIR/sft.
    The KL is measured from MODEL_DIR/sft, or from this model if there is none."""
    reward_model: Path | None = None
    """Reward model that scores completions; none is MODEL_DIR/reward."""
    judge: tuple[str, ...] = ()
    """Python functions that score or compare completions: `module:function` or `file.py:function`; see the README.
    Scorers have the signature of a reward function, pairwise judges the arguments `first` and `second`."""
    decoding: tuple[Decoding, ...] = ("sampled", "greedy")
    """Decoding methods of the completions."""
    samples: BatchSize = 1
    """Sampled completions per prompt."""
    best_of: tuple[PositiveInt, ...] = ()
    """Numbers n of which best-of-n is estimated: every score of the best of n sampled completions by the reward model.
    As many completions are sampled per prompt as the largest n, or more with --samples."""
    temperature: PositiveFloat | None = None
    """Sampling temperature of both the policy and the model it is compared with; none is the run's, or else 1."""
    max_new_tokens: BatchSize | None = None
    """Longest completion in tokens; none is the run's, or else 64, or half of a shorter context."""
    seed: Seed = 0
    """Seed of sampling, resampling and cross-validation."""

    output: Path | None = None
    """Folder for evaluation.json, completions.jsonl and pairs.jsonl; none is MODEL_DIR/report."""
    overwrite: bool = False
    """Replace such files there even if they were not written by rlhf, or have been changed since."""
    micro_batch_size: BatchSize = 8
    """Packed rows computed at once. Bounds memory; changes results only by rounding."""
    rollout_batch_size: BatchSize = 64
    """Completions generated together. Bounds memory; changes results only by rounding."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ComputeConfig, JudgementConfig):  # the last base's flags come first
    """Judge models on data they were not trained on: each figure with its samples and a 95% interval."""


_NO_POLICY = "completions are made only in the policy evaluation, and there is none here"

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
