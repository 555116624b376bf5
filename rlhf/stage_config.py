"""The settings of each stage, as `rlhf.config` has them: the sections sft, reward and ppo."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval, Le, Lt

from rlhf.ranges import (
    BatchSize,
    HalfOpenUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveFloatOrInf,
    PositiveInt,
    Section,
    UnitInterval,
)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """AdamW with a learning-rate schedule; the base of every stage's section."""

    learning_rate: NonNegativeFloat = 1e-3
    """Peak, after the warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Course after the warm-up; linear and cosine end at 0."""
    warmup_fraction: HalfOpenUnitInterval = 0.05
    """Share of all updates over which the rate rises linearly."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled, on matrices and embeddings."""
    adam_b1: HalfOpenUnitInterval = 0.9
    """Decay of the gradient's running mean."""
    adam_b2: HalfOpenUnitInterval = 0.999
    """Decay of its square's."""
    adam_eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: PositiveFloatOrInf = 1.0
    """Global-norm clipping; inf is off."""
    micro_batch_size: BatchSize = 8
    """Packed rows computed at once. Bounds memory; changes results only by rounding."""
    gradient_checkpointing: bool = False
    """Compute what lies within a block again in the backward pass: fewer activations are kept; the same bits."""


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig(OptimizerConfig):
    """What SFT and reward-model training share."""

    epochs: Annotated[float, Gt(0), Le(1_000_000)] = 3.0
    """Passes over the training split; may be fractional."""
    max_steps: PositiveInt | None = None
    """Upper bound on optimiser steps."""
    batch_size: BatchSize = 32
    """Records per optimiser step."""
    max_length: Annotated[int, Ge(2), Le(2**20)] | None = None
    """Tokens kept of one record; none is the model's context. The rule for longer ones: `rlhf.data.truncate`."""
    val_fraction: HalfOpenUnitInterval = 0.05
    """Share of the records held out when no validation file is given."""
    eval_every: PositiveInt = 100
    """Steps between evaluations on the validation split; one is always made at the end."""


@dataclass(frozen=True, kw_only=True)
class SFTConfig(SupervisedConfig):
    """Supervised fine-tuning on demonstrations."""

    loss_on: Literal["completion", "all"] = "completion"
    """Tokens that count: the completion's, or the prompt's too."""
    dropout: HalfOpenUnitInterval = 0.0
    """Share dropped after the embedding, attention and MLP (GPT-2 was trained with 0.1)."""
    model_path: Path | None = None
    """Model folder to start from; none starts from random weights."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig(SupervisedConfig):
    """Reward model on preference pairs."""

    epochs: Annotated[float, Gt(0), Le(1_000_000)] = 1.0
    """Passes over the training split; one is customary, since reward models overfit quickly."""
    learning_rate: NonNegativeFloat = 3e-4
    """Peak, after the warm-up."""
    centre_coef: NonNegativeFloat = 0.01
    """Weight of (chosen + rejected)^2, which keeps rewards centred; 0 is off."""
    use_margin: bool = False
    """Take the margin of the loss from the records' `margin` column."""
    model_path: Path | None = None
    """Model folder whose trunk it starts from; none is OUTPUT_DIR/sft."""


@dataclass(frozen=True, kw_only=True)
class PPOConfig(OptimizerConfig):
    """PPO with a KL penalty to a reference model."""

    model_path: Path | None = None
    """Model folder of the policy and reference; none is OUTPUT_DIR/sft."""
    reward: tuple[str, ...] = ()
    """Sources of reward, summed: each a reward-model folder, a Python function `module:function` or
    `file.py:function`, with an optional weight in front: `0.5*my_rewards:brevity`; with weight 0 it is logged as
    gold/<name> and never optimised. None is OUTPUT_DIR/reward."""

    num_iterations: PositiveInt = 100
    """Rounds of generating and updating."""
    batch_size: BatchSize = 64
    """Prompts per iteration."""
    samples_per_prompt: BatchSize = 1
    """Completions per prompt."""
    num_epochs: PositiveInt = 4
    """Passes over each iteration's completions."""
    minibatch_size: BatchSize = 16
    """Completions per optimiser step."""
    rollout_batch_size: BatchSize = 64
    """Completions per rollout micro-batch: what one worker takes on at a time."""
    rollout_slots: BatchSize = 64
    """Completions of a micro-batch that are generated together; when one ends, the next takes its place."""

    max_new_tokens: BatchSize = 32
    """Longest completion."""
    min_new_tokens: NonNegativeInt = 0
    """Tokens before which no stop token is drawn."""
    temperature: PositiveFloat = 1.0
    """Of the policy and the reference alike: in sampling, in every log-prob and in the update."""
    top_k: NonNegativeInt = 0
    """Sample from the k most likely tokens; 0 is all. Shapes what is drawn, not the log-probs."""
    top_p: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """Sample from the nucleus of this mass."""
    stop_at_eos: bool = True
    """End a completion at an end-of-text token; otherwise it always runs to max_new_tokens."""

    normalize_reward: bool = True
    """Shift and scale a reward model's scores by the mean and std stored with it."""
    reward_clip: PositiveFloatOrInf = 10.0
    """Scores are clipped to [-reward_clip, reward_clip]; inf is off."""
    missing_eos_penalty: NonNegativeFloat = 0.0
    """Taken off the score of a completion that did not end by itself."""
    whiten_rewards: bool = False
    """Scale token rewards to unit variance over the batch, keeping their mean."""

    kl_coef: NonNegativeFloat = 0.05
    """Weight of the KL to the reference; where adaptive, its start."""
    kl_estimator: Literal["k1", "k2", "k3", "exact"] = "k1"
    """Per-token KL. In the reward k1, whose optimum is the Gibbs policy, or k2 or k3, whose optima are not; in the loss
    k2, k3, or exact over the vocabulary."""
    kl_in_loss: bool = False
    """Put the KL into the loss instead of the reward."""
    kl_adaptive: bool = False
    """Steer kl_coef towards kl_target."""
    kl_target: PositiveFloat = 6.0
    """KL to the reference, in nats per completion, to which kl_coef is steered; target_kl stops updates early."""
    kl_horizon: PositiveFloat = 10_000.0
    """Completions over which the adaptive coefficient moves by about 20% at most; no fewer than an iteration has."""
    ref_ema: UnitInterval | None = None
    """Move the reference towards the policy after each iteration: reference = ref_ema reference + (1 - ref_ema) policy.
    None keeps it fixed."""

    estimator: str = "gae"
    """Advantages: gae (generalised advantage estimation), or another that is registered (`rlhf.estimators`)."""
    gamma: UnitInterval = 1.0
    """Discount per token."""
    lam: UnitInterval = 0.95
    """Lambda of generalised advantage estimation."""
    bootstrap_truncated: bool = False
    """Go on from the critic's value where a completion was cut at max_new_tokens; otherwise it counts as ended."""
    whiten_advantages: bool = True
    """Zero mean and unit variance over the whole batch."""

    clip_eps: Annotated[float, Interval(gt=0, lt=1)] = 0.2
    """Policy ratio is clipped to [1 - clip_eps, 1 + clip_eps]."""
    dual_clip: Annotated[float, Gt(1), Lt(math.inf)] | None = None
    """Bound, in units of the advantage, on the loss of tokens with negative advantage."""
    value_clip_eps: PositiveFloatOrInf = 0.2
    """Values are clipped to within this of those at sampling time; inf is off."""
    value_coef: NonNegativeFloat = 0.1
    """Weight of the value loss."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""
    target_kl: PositiveFloat | None = None
    """A minibatch's approximate KL, in nats per token, above which updates stop early; kl_target steers kl_coef."""

    critic: Literal["none", "shared", "separate"] = "separate"
    """Value function: none; a head on the policy; or a model of its own, from the reward model where there is one."""
    critic_warmup: NonNegativeInt = 0
    """Iterations at the start in which only the value function learns; fewer than num_iterations."""
    recompute_log_probs: bool | None = None
    """Recompute the sampled tokens' log-probs in one forward pass before updating; none does so in bf16, where
    cached decoding rounds differently."""

    learning_rate: NonNegativeFloat = 1e-4
    """Peak, after the warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Course after the warm-up; linear and cosine end at 0."""
    warmup_fraction: HalfOpenUnitInterval = 0.0
    """Share of all updates over which the rate rises linearly."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled, on matrices and embeddings."""
    adam_eps: PositiveFloat = 1e-5
    """Added to the root of the second moment."""

    def __post_init__(self) -> None:
        super().__post_init__()
        total = self.batch_size * self.samples_per_prompt
        for name, got, bound, most in (
            ("minibatch_size", self.minibatch_size, "batch_size * samples_per_prompt", total),
            ("min_new_tokens", self.min_new_tokens, "max_new_tokens", self.max_new_tokens),
            ("critic_warmup", self.critic_warmup, "num_iterations - 1", self.num_iterations - 1),
        ):
            if got > most:
                raise ValueError(f"{name} must be at most {bound} = {most}, got {got}")
        if self.kl_adaptive and self.kl_horizon < total:
            raise ValueError(f"kl_horizon must be at least an iteration's {total} completions, got {self.kl_horizon:g}")
        if self.kl_in_loss and self.kl_estimator == "k1":
            raise ValueError(
                "kl_estimator must be k2, k3 or exact with kl_in_loss, got k1: its gradient is 0 on average"
            )
        if not self.kl_in_loss and self.kl_estimator == "exact":
            raise ValueError(
                "kl_estimator must be k1, k2 or k3 without kl_in_loss, got exact, which does not depend on the token "
                "drawn: as a reward it would not hold the policy back"
            )
