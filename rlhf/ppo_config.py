"""Settings of PPO: the section ppo of `rlhf.config`."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Gt, Interval, Lt

from rlhf.ranges import (
    BatchSize,
    HalfOpenUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveFloatOrInf,
    PositiveInt,
    UnitInterval,
)
from rlhf.stage_config import OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class PPOConfig(OptimizerConfig):
    """PPO with a KL penalty to a reference model."""

    model_path: Path | None = None
    """Model folder that initialises the policy and the reference. If None, OUTPUT_DIR/sft is used."""
    reward: tuple[str, ...] = ()
    """Reward sources, whose weighted scores are summed. Each is a reward-model folder, where * matches any name, or a
    Python function, `module:function` or `file.py:function`, with an optional weight in front:
    `0.5*my_rewards:brevity`. A source of weight 0 is logged as gold/<name> and never optimised. If empty,
    OUTPUT_DIR/reward."""

    combine: Literal["sum", "mean", "min", "uncertainty"] = "sum"
    """Combination of reward sources: their weighted sum; or the reward models as an ensemble, each normalised, by mean,
    min, or mean minus uncertainty_coef times the variance, added to the weighted functions."""
    uncertainty_coef: NonNegativeFloat = 0.1
    """Weight of the ensemble's variance with combine uncertainty."""

    num_iterations: PositiveInt = 100
    """Number of iterations; each generates completions and updates the policy on them."""
    batch_size: BatchSize = 64
    """Number of prompts per iteration."""
    samples_per_prompt: BatchSize = 1
    """Number of completions per prompt."""
    num_epochs: PositiveInt = 4
    """Number of passes over each iteration's completions."""
    minibatch_size: BatchSize | None = None
    """Number of completions per optimiser step. If None, 16, or all completions of an iteration if they are fewer."""
    rollout_batch_size: BatchSize = 64
    """Number of completions per rollout micro-batch, the unit of work of one worker."""
    rollout_slots: BatchSize = 64
    """Number of completions of a micro-batch generated concurrently; when one ends, the next takes its slot."""

    max_new_tokens: BatchSize | None = None
    """Maximum number of tokens per completion. If None, 95% of the SFT model's demonstrations fit; 32 if they are not
    known."""
    min_new_tokens: NonNegativeInt = 0
    """Minimum number of tokens per completion; no stop token is sampled before them."""
    temperature: PositiveFloat = 1.0
    """Softmax temperature of the policy and the reference: in sampling, in all log-probs and in the update."""
    top_k: NonNegativeInt = 0
    """Sample from the top_k most likely tokens; 0 disables it. Affects sampling only, not the log-probs."""
    top_p: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """Sample from the smallest set of tokens whose probabilities sum to top_p; 1 disables it."""
    stop_at_eos: bool = True
    """End a completion at an end-of-text token. Otherwise every completion has max_new_tokens tokens."""

    normalize_reward: bool = True
    """Normalise a reward model's scores by the mean and std stored with it."""
    reward_clip: PositiveFloatOrInf = 10.0
    """Clip scores to [-reward_clip, reward_clip]; inf disables clipping."""
    missing_eos_penalty: NonNegativeFloat | None = None
    """Penalty subtracted from the score of a completion without an end-of-text token. If None, 1 if at least
    half of the SFT model's demonstrations keep their end and 95% of them have at most 2 * max_new_tokens tokens,
    otherwise 0."""
    whiten_rewards: bool = False
    """Scale per-token rewards to unit variance over the batch without shifting their mean."""

    kl_coef: NonNegativeFloat = 0.2
    """Coefficient of the KL to the reference: the lowest one with kl_budget, the initial one with kl_adaptive."""
    kl_budget: PositiveFloatOrInf = 10.0
    """KL to the reference, in nats per completion, above which kl_coef is raised until the KL is below it again. inf
    keeps kl_coef fixed. Has no effect with kl_adaptive."""
    kl_estimator: Literal["k1", "k2", "k3", "exact"] = "k1"
    """Per-token KL estimator. In the reward: k1, whose optimum is the Gibbs policy, or k2 or k3, whose optima are not.
    In the loss: k2, k3, or exact, which sums over the vocabulary."""
    kl_in_loss: bool = False
    """Add the KL to the loss instead of subtracting it from the reward."""
    kl_adaptive: bool = False
    """Adapt kl_coef so that the KL approaches kl_target."""
    kl_target: PositiveFloat = 6.0
    """Target of the adaptive kl_coef: KL to the reference in nats per completion. For early stopping, see target_kl."""
    kl_horizon: PositiveFloat | None = None
    """Number of completions over which the adaptive coefficient changes by at most about 20%. Must be at least the
    number of completions per iteration. If None, a twentieth of the run's completions, if that is not less."""
    ref_ema: UnitInterval | None = None
    """Update the reference after each iteration: reference = ref_ema * reference + (1 - ref_ema) * policy. If None, the
    reference is fixed."""

    kl_importance_weighting: bool = False
    """Weigh the KL in the loss by the probability ratio: its gradient is then that of KL(policy || reference), with k1
    and k3, also in the later updates of an iteration."""

    estimator: str = "gae"
    """Advantage estimator: gae (generalised advantage estimation, with a critic), rloo, grpo, dr-grpo, reinforce++,
    online-dpo, one registered in `rlhf.estimators`, or a Python function `module:function` or `file.py:function`."""
    drop_equal_groups: bool = False
    """Leave out of the updates the completions of prompts whose scores are all equal."""
    gamma: UnitInterval = 1.0
    """Discount factor per token."""
    lam: UnitInterval = 0.95
    """Lambda parameter of generalised advantage estimation."""
    bootstrap_truncated: bool = False
    """Bootstrap from the critic's value if a completion was cut at max_new_tokens. Otherwise it is treated as ended."""
    whiten_advantages: bool | None = None
    """Whiten advantages to zero mean and unit variance over the whole batch. If None, as the estimator does: gae and
    reinforce++ whiten, the others do not."""

    loss: str = "ppo"
    """Policy loss: ppo (clipped surrogate), cispo (clipped weights), gspo (ratios of whole completions, which need a
    clip_eps of about 3e-4), or a Python function `module:function` or `file.py:function` like them."""
    loss_per: Literal["token", "sequence", "constant"] = "token"
    """Mean of the policy's loss over an update: over all tokens; over completions of the mean over their tokens; or
    over completions of the sum over their tokens divided by max_new_tokens."""
    clip_eps: Annotated[float, Interval(gt=0, lt=1)] = 0.2
    """Clip the probability ratio to [1 - clip_eps, 1 + clip_eps]."""
    clip_eps_high: PositiveFloatOrInf | None = None
    """Clip the probability ratio to [1 - clip_eps, 1 + clip_eps_high]. If None, clip_eps."""
    dual_clip: Annotated[float, Gt(1), Lt(math.inf)] | None = None
    """Upper bound of the loss of tokens with negative advantage, in units of the advantage. If None, there is no
    bound."""
    value_clip_eps: PositiveFloatOrInf = 0.2
    """Clip values to within value_clip_eps of those at sampling time; inf disables clipping."""
    value_coef: NonNegativeFloat = 0.1
    """Coefficient of the value loss."""
    entropy_coef: NonNegativeFloat = 0.0
    """Coefficient of the entropy bonus."""
    target_kl: PositiveFloat | None = None
    """Approximate KL of a minibatch, in nats per token, above which updates stop early; kl_target adapts kl_coef."""

    critic: Literal["none", "shared", "separate"] | None = None
    """Value function: none, a head on the policy (shared), or a separate model, initialised from the reward model if
    there is one. If None, separate for estimators that read values, and none for the others."""
    critic_learning_rate: PositiveFloat | None = None
    """Peak learning rate of the value function, with the schedule of learning_rate. If None, learning_rate."""
    critic_max_grad_norm: PositiveFloatOrInf | None = None
    """Maximum norm of a separate critic's gradient, which is then clipped apart from the policy's, whose maximum is
    max_grad_norm. If None, both are clipped together by their common norm."""
    critic_warmup: NonNegativeInt = 0
    """Number of initial iterations that train only the value function; less than num_iterations."""
    recompute_log_probs: bool | None = None
    """Recompute the sampled tokens' log-probs in a forward pass before the updates. If None, only in bf16, where cached
    decoding rounds differently."""

    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Shape of the learning-rate schedule after warm-up; linear and cosine decay to 0."""
    warmup_fraction: HalfOpenUnitInterval = 0.05
    """Fraction of all updates over which the learning rate increases linearly."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay, applied to matrices and embeddings."""
    adam_eps: PositiveFloat = 1e-5
    """Adam's epsilon: term added to the denominator, the root of the second moment, for numerical stability."""

    def __post_init__(self) -> None:
        super().__post_init__()
        total = self.iteration_size
        for name, value, expression, maximum, higher in (
            ("minibatch_size", self.update_size, "batch_size * samples_per_prompt", total, "batch-size"),
            ("min_new_tokens", self.min_new_tokens, "max_new_tokens", self.completion_tokens, "max-new-tokens"),
            ("critic_warmup", self.critic_warmup, "num_iterations - 1", self.num_iterations - 1, "num-iterations"),
        ):
            if value > maximum:
                raise ValueError(
                    f"{name} must be at most {expression} = {maximum}, got {value}; "
                    f"lower --ppo.{name.replace('_', '-')} or raise --ppo.{higher}"
                )
        if self.kl_adaptive and self.horizon < total:
            raise ValueError(
                f"kl_horizon must be at least an iteration's {total} completions, got {self.horizon:g}; "
                "raise --ppo.kl-horizon"
            )
        if self.kl_in_loss and self.kl_estimator == "k1" and not self.kl_importance_weighting:
            raise ValueError(
                "kl_estimator must be k2, k3 or exact with kl_in_loss, got k1: its gradient is 0 on average; "
                "add --ppo.kl-estimator k3"
            )
        if self.critic_learning_rate is not None and self.learning_rate == 0:
            raise ValueError(
                "critic_learning_rate must be None with a learning_rate of 0, of which it is a multiple; "
                "drop --ppo.critic-learning-rate"
            )
        if not self.kl_in_loss and self.kl_estimator == "exact":
            raise ValueError(
                "kl_estimator must be k1, k2 or k3 without kl_in_loss, got exact, which does not depend on the token "
                "drawn: as a reward it would not hold the policy back; add --ppo.kl-in-loss"
            )

    def default_rates(self) -> tuple[float, float]:
        """Return the default learning rates of a model from scratch and of a pre-trained one."""
        return 1e-4, 1e-5

    @property
    def iteration_size(self) -> int:
        """The number of completions per iteration."""
        return self.batch_size * self.samples_per_prompt

    @property
    def update_size(self) -> int:
        """The number of completions per optimiser step, by rule if none is set."""
        return min(16, self.iteration_size) if self.minibatch_size is None else self.minibatch_size

    @property
    def completion_tokens(self) -> int:
        """The maximum number of tokens per completion; 32, or min_new_tokens if more, if none is set."""
        return max(32, self.min_new_tokens) if self.max_new_tokens is None else self.max_new_tokens

    @property
    def active_kl_budget(self) -> float:
        """The KL budget that applies, in nats per completion; inf if the coefficient adapts to a target instead."""
        return math.inf if self.kl_adaptive else self.kl_budget

    @property
    def horizon(self) -> float:
        """The horizon of the adaptive coefficient, by rule if none is set."""
        return max(1.0, self.num_iterations / 20) * self.iteration_size if self.kl_horizon is None else self.kl_horizon
