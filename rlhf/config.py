"""Every setting of every program, as typed frozen dataclasses. Importing it imports no torch.

One dataclass is the YAML file, the command line and the code at once: `rlhf.io.presets` reads YAML into it, tyro makes
flags of it, and the stages take it as it is. Ranges stand in the types and are checked when an object is made.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Interval, Le

from rlhf.ranges import (
    BatchSize,
    NonNegativeInt,
    PositiveInt,
    ProcessCount,
    Seconds,
    Section,
    Seed,
    ThreadCount,
    UnitInterval,
)
from rlhf.stage_config import OptimizerConfig, PPOConfig, RewardConfig, SFTConfig, SupervisedConfig

__all__ = [
    "CheckpointConfig",
    "ComputeConfig",
    "DistConfig",
    "LogConfig",
    "ModelConfig",
    "OptimizerConfig",
    "OutputConfig",
    "PPOConfig",
    "PPORun",
    "PipelineRun",
    "RewardConfig",
    "RewardRun",
    "RunConfig",
    "SFTConfig",
    "SFTRun",
    "SupervisedConfig",
    "TokenizerConfig",
]


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
