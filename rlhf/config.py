"""Every setting of every program, as typed frozen dataclasses. Importing it imports no torch.

One dataclass is the YAML file, the command line and the code at once: `rlhf.io.presets` reads YAML into it, tyro makes
flags of it, and the stages take it as it is. Ranges stand in the types and are checked when an object is made.
"""

import math
from dataclasses import dataclass, field
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
    ProcessCount,
    Seconds,
    Section,
    Seed,
    ThreadCount,
    UnitInterval,
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """Shape of a model trained from scratch. A model folder brings its own, which a field set here must agree with."""

    family: str = "gpt2"
    """Architecture, by Hugging Face's `model_type`."""
    preset: Literal["tiny", "small", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "small"
    """Named shape that the fields below change."""
    n_layer: Annotated[int, Ge(1), Le(1024)] | None = None
    """Blocks."""
    n_head: Annotated[int, Ge(1), Le(1024)] | None = None
    """Attention heads per block."""
    n_embd: Annotated[int, Ge(1), Le(2**16)] | None = None
    """Width; a multiple of n_head."""
    n_positions: BatchSize | None = None
    """Context in tokens."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(Section):
    """Tokenizer of a model trained from scratch. A model folder brings its own."""

    path: Path | None = None
    """Folder with tokenizer.json, or with vocab.json and merges.txt; none trains a byte-level BPE on the data."""
    vocab_size: Annotated[int, Interval(ge=258, le=1_000_000)] = 1024
    """Entries of the trained BPE: 256 bytes, two special tokens, and merges."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """What is saved while training, beside the model folder at the end of each stage."""

    every: PositiveInt | None = None
    """Steps between checkpoints; none is 100, and 10 iterations of PPO. One is written at the end and when stopped."""
    keep: PositiveInt = 2
    """Checkpoints kept per stage: the newest."""


@dataclass(frozen=True, kw_only=True)
class LogConfig(Section):
    """What is written to logs/ and shown."""

    every: PositiveInt = 1
    """Steps (PPO: iterations) between lines of metrics.jsonl."""
    samples: NonNegativeInt = 64
    """Completions of each PPO iteration written to samples.jsonl."""
    token_samples: NonNegativeInt = 16
    """Of those, completions with log-probs, values and advantages of every token (40 bytes a token)."""
    tensorboard: bool = True
    """Write TensorBoard event files too."""
    sink: str | None = None
    """Function `module:function` or `file.py:function` that is called with (stage, step, metrics) of every line of
    metrics.jsonl, such as one that feeds Weights & Biases. What it raises is told once and does not end the run."""


@dataclass(frozen=True, kw_only=True)
class DistConfig(Section):
    """Workers, parameter servers and what happens when one dies; see distributed.yaml."""

    num_workers: ProcessCount = 0
    """Ray workers; 0 runs everything in this process, without Ray."""
    num_servers: ProcessCount = 0
    """Dedicated parameter servers; 0 keeps the shards in the workers."""
    address: str | None = None
    """Ray cluster to use, auto or HOST:PORT; none starts one on this machine and stops it at the end."""
    threads_per_worker: ThreadCount = 1
    """CPU threads of each worker."""
    gpus_per_worker: UnitInterval = 0.0
    """GPUs of each worker."""
    placement: Literal["pack", "spread"] = "pack"
    """Whether workers share nodes or are put on different ones."""
    backend: Literal["auto", "shared", "gloo", "nccl"] = "auto"
    """Collectives; auto is nccl where each worker has a GPU of its own, else shared: gloo, and one machine's memory."""
    reduce: Literal["tree", "ring"] = "tree"
    """Gradient sums along one fixed tree, with the same bits for any number of workers; or the backend's allreduce."""
    timeout_s: Seconds = 60.0
    """Seconds that a collective may take before its members are taken to be lost."""
    heartbeat_s: Seconds = 5.0
    """Seconds of silence after which a process that should answer is taken to be lost."""
    max_restarts: NonNegativeInt = 10
    """Faults made good before the run finishes its step in one process, saves and ends."""
    on_failure: Literal["replace", "shrink"] = "replace"
    """Start a new worker for a lost one, or go on with fewer."""
    snapshot_every: PositiveInt = 10
    """Steps between copies of the server's state in this process's memory (12 bytes for each parameter)."""


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


@dataclass(frozen=True, kw_only=True)
class ComputeConfig(Section):
    """Where every program computes, and how."""

    dist_config: str | None = None
    """YAML file with a dist section, or `distributed` for the one that ships with rlhf, read after --config."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU where there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the forward and backward pass; master weights, optimiser and losses are fp32 either way."""
    threads: ThreadCount | None = None
    """CPU threads; none takes all cores. The bits of a result depend on it."""
    cache_dir: Path | None = None
    """Folder for tokenised data and compiled code; none is $XDG_CACHE_HOME/rlhf or ~/.cache/rlhf, or a temporary one if
    the home folder cannot be written."""
    dist: DistConfig = field(default_factory=DistConfig)


@dataclass(frozen=True, kw_only=True)
class OutputConfig(Section):
    """Where a training run begins and what it leaves behind."""

    config: str | None = None
    """YAML file, or the name of a preset that ships with rlhf (demo, gpt2, …), read before the flags."""
    output_dir: Path = Path("outputs")
    """Folder for models, checkpoints, logs and the resolved configuration."""
    seed: Seed = 0
    """Source of all randomness."""
    resume: bool = False
    """Continue the run in output_dir from its last checkpoint, to the same bits as if it had never stopped."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(ComputeConfig, OutputConfig):  # whose flags come first, because it is named last
    """What every training run has."""

    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the training step with torch.compile: faster steps after half a minute or more of compilation, the first
    time; auto does it where the run is long enough to pay it back. The bits of a result depend on it."""
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)


@dataclass(frozen=True, kw_only=True)
class SFTRun(RunConfig):
    """rlhf-train sft."""

    sft_data: Path | None = None
    """JSON list or JSON Lines of {"prompt", "completion"}; none uses the embedded example."""
    sft_val_data: Path | None = None
    """Validation file; none holds out sft.val_fraction."""
    sft: SFTConfig = field(default_factory=SFTConfig)


@dataclass(frozen=True, kw_only=True)
class RewardRun(RunConfig):
    """rlhf-train reward."""

    preference_data: Path | None = None
    """JSON list or JSON Lines of {"prompt", "chosen", "rejected"}; none uses the embedded example."""
    preference_val_data: Path | None = None
    """Validation file; none holds out reward.val_fraction."""
    reward: RewardConfig = field(default_factory=RewardConfig)


@dataclass(frozen=True, kw_only=True)
class PPORun(RunConfig):
    """rlhf-train ppo."""

    prompt_data: Path | None = None
    """JSON list or JSON Lines of {"prompt"}, other columns go to reward functions; none uses the embedded example."""
    ppo: PPOConfig = field(default_factory=PPOConfig)


@dataclass(frozen=True, kw_only=True)
class PipelineRun(SFTRun, RewardRun, PPORun):
    """rlhf-train pipeline: the three stages in order."""

    start_at: Literal["sft", "reward", "ppo"] = "sft"
    """First stage to run; earlier ones must have left their models in output_dir."""
