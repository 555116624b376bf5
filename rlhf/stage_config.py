"""Settings of the supervised stages: the sections sft, reward and dpo of `rlhf.config`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval, Le

from rlhf.ranges import (
    BatchSize,
    HalfOpenUnitInterval,
    NonNegativeFloat,
    PositiveFloat,
    PositiveFloatOrInf,
    PositiveInt,
    Section,
)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """AdamW and its learning-rate schedule; the base class of every stage's section."""

    learning_rate: NonNegativeFloat | None = None
    """Peak learning rate, reached after warm-up. If None, it is lower for a pre-trained model than for one trained
    from scratch: SFT 5e-5 or 1e-3, reward model 1e-5 or 1e-3, DPO 1e-6 or 1e-4, PPO 1e-5 or 1e-4."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the learning-rate schedule after warm-up; linear and cosine decay to 0."""
    warmup_fraction: HalfOpenUnitInterval = 0.05
    """Fraction of all updates over which the learning rate increases linearly."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay, applied to matrices and embeddings."""
    adam_b1: HalfOpenUnitInterval = 0.9
    """Adam's beta1: decay rate of the running mean of the gradient."""
    adam_b2: HalfOpenUnitInterval = 0.999
    """Adam's beta2: decay rate of the running mean of the squared gradient."""
    adam_eps: PositiveFloat = 1e-8
    """Adam's epsilon: term added to the denominator, the root of the second moment, for numerical stability."""
    max_grad_norm: PositiveFloatOrInf = 1.0
    """Maximum global norm of the gradient. Larger gradients are scaled down to it; inf disables clipping."""
    micro_batch_size: BatchSize = 8
    """Number of packed rows per forward and backward pass. Limits memory; changes results only by rounding."""
    gradient_checkpointing: bool = False
    """Recompute the activations inside each block in the backward pass to save memory. Results have the same bits."""

    def default_rates(self) -> tuple[float, float]:
        """Return the default learning rates of a model from scratch and of a pre-trained one."""
        return 1e-3, 5e-5

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate; that of a model from scratch if none is set."""
        return self.default_rates()[0] if self.learning_rate is None else self.learning_rate


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig(OptimizerConfig):
    """Settings common to SFT and reward-model training."""

    epochs: Annotated[float, Gt(0), Le(1_000_000)] = 3.0
    """Number of passes over the training split; may be fractional."""
    max_steps: PositiveInt | None = None
    """Maximum number of optimiser steps; training ends there or after epochs, whichever is first. If None, only epochs
    counts."""
    batch_size: BatchSize = 32
    """Number of records per optimiser step."""
    max_length: Annotated[int, Ge(2), Le(2**20)] | None = None
    """Maximum number of tokens per record; longer records are truncated. If None, the model's context length is
    used."""
    val_fraction: HalfOpenUnitInterval = 0.05
    """Fraction of the records held out for validation if there is no validation file."""
    eval_every: PositiveInt = 100
    """Steps between evaluations on the validation split. There is always one at the end."""


@dataclass(frozen=True, kw_only=True)
class SFTConfig(SupervisedConfig):
    """Supervised fine-tuning on demonstrations."""

    loss_on: Literal["completion", "all"] = "completion"
    """Tokens that contribute to the training loss: those of the completion, or all, including the prompt. Evaluations
    are of completions."""
    dropout: HalfOpenUnitInterval = 0.0
    """Dropout probability after the embedding, attention and MLP; GPT-2 was trained with 0.1."""
    model_path: Path | None = None
    """Model folder to start from. If None, weights are initialised randomly."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig(SupervisedConfig):
    """Reward-model training on preference pairs."""

    epochs: Annotated[float, Gt(0), Le(1_000_000)] = 2.0
    """Number of passes over the training split. More are rarely better, because reward models overfit quickly."""
    centre_coef: NonNegativeFloat = 0.01
    """Weight of the penalty (chosen + rejected)^2, which keeps rewards centred at 0; 0 disables it."""
    members: Annotated[int, Ge(1), Le(64)] = 1
    """Number of reward models to train, one after the other; several are an ensemble in reward/0, reward/1, …, whose
    members differ in the head's initial weights and in the order of the data."""
    use_margin: bool = False
    """Use the records' `margin` column as the margin of the loss."""
    model_path: Path | None = None
    """Model folder whose trunk initialises the reward model. If None, OUTPUT_DIR/sft is used."""

    def default_rates(self) -> tuple[float, float]:
        """Return the default learning rates of a model from scratch and of a pre-trained one."""
        return 1e-3, 1e-5


@dataclass(frozen=True, kw_only=True)
class DPOConfig(SupervisedConfig):
    """Direct preference optimisation on preference pairs."""

    epochs: Annotated[float, Gt(0), Le(1_000_000)] = 1.0
    """Number of passes over the training split; may be fractional."""
    beta: PositiveFloat = 0.1
    """Coefficient of the KL to the reference, in reward units per nat; the tau of IPO."""
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """Loss: sigmoid (DPO) or ipo."""
    label_smoothing: Annotated[float, Interval(ge=0, lt=0.5)] = 0.0
    """Probability that a label is wrong, in the sigmoid loss."""
    model_path: Path | None = None
    """Model folder that initialises the policy, and is the reference. If None, OUTPUT_DIR/sft is used."""

    def default_rates(self) -> tuple[float, float]:
        """Return the default learning rates of a model from scratch and of a pre-trained one."""
        return 1e-4, 1e-6
