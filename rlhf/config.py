"""Settings of every training program, as typed frozen dataclasses. Importing this module imports no torch.

The same dataclass defines the YAML file, the command line and the Python API: `rlhf.io.presets` reads YAML into it,
tyro derives the flags from it, and the stages take it as an argument. The types hold the ranges, which are checked when
an object is created.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Interval, Le

from rlhf.ppo_config import PPOConfig
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
from rlhf.stage_config import DPOConfig, OptimizerConfig, RewardConfig, SFTConfig, SupervisedConfig

__all__ = [
    "CheckpointConfig",
    "ComputeConfig",
    "DPOConfig",
    "DPORun",
    "DataConfig",
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
    """Shape of a model trained from scratch. A model folder has its own, with which settings here must agree."""

    family: str | None = None
    """Architecture, by Hugging Face's `model_type`: gpt2, llama, qwen2, qwen3 or gpt_neox. If None, that of the preset;
    tiny and small are presets of every family, and stand for gpt2's."""
    preset: Literal[
        "tiny",
        "small",
        "gpt2",
        "gpt2-medium",
        "gpt2-large",
        "gpt2-xl",
        "smollm2-135m",
        "smollm2-360m",
        "qwen2.5-0.5b",
        "qwen3-0.6b",
        "pythia-70m",
        "pythia-160m",
        "pythia-410m",
    ] = "small"
    """Named shape; the other model settings override parts of it."""
    n_layer: Annotated[int, Ge(1), Le(1024)] | None = None
    """Number of transformer blocks."""
    n_head: Annotated[int, Ge(1), Le(1024)] | None = None
    """Number of attention heads per block."""
    n_kv_head: Annotated[int, Ge(1), Le(1024)] | None = None
    """Number of key-value heads per block, which attention heads share; n_head must be a multiple of it."""
    n_embd: Annotated[int, Ge(1), Le(2**16)] | None = None
    """Hidden size; must be a multiple of n_head."""
    n_inner: Annotated[int, Ge(1), Le(2**18)] | None = None
    """Width of the MLP."""
    n_positions: BatchSize | None = None
    """Context length in tokens."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(Section):
    """Tokenizer of a model trained from scratch. A model folder has its own tokenizer."""

    path: Path | None = None
    """Folder with tokenizer.json, or vocab.json and merges.txt. If None, a byte-level BPE is trained on the data."""
    vocab_size: Annotated[int, Interval(ge=258, le=1_000_000)] = 1024
    """Vocabulary size of the trained BPE: 256 bytes, two special tokens, and merges."""


DataPaths = Path | tuple[Path, ...] | None
"""A file or folder of shards, several of them, or None."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Columns and chat template of data files."""

    columns: tuple[str, ...] = ()
    """Names of columns in the files, each as name=column: prompt=question completion=answer. Each applies to the files
    that have the column; one that no file has is refused. A column of chat messages is messages."""
    template: str | None = None
    """Chat template of conversations: chatml, plain, or a file with a Jinja template. Training saves it with the model.
    If None, the tokenizer's own."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """Checkpoints written during training, in addition to the model folder at the end of each stage."""

    every: PositiveInt | None = None
    """Steps between checkpoints. If None, 100 steps, or 10 iterations for PPO. A run also writes a checkpoint when it
    ends or is stopped."""
    keep: PositiveInt = 2
    """Number of checkpoints to keep per stage; older ones are deleted."""


@dataclass(frozen=True, kw_only=True)
class LogConfig(Section):
    """Metrics and samples written to logs/."""

    every: PositiveInt = 1
    """Steps, or iterations for PPO, between lines of metrics.jsonl. The first and last step, and those with an
    evaluation, are always logged."""
    samples: NonNegativeInt = 64
    """Number of completions per PPO iteration written to samples.jsonl."""
    token_samples: NonNegativeInt = 16
    """Number of those completions written with per-token log-probs, values and advantages (40 bytes per token)."""
    tensorboard: bool = True
    """Write TensorBoard event files in addition to metrics.jsonl."""
    sink: str | None = None
    """Function `module:function` or `file.py:function` that is called with (stage, step, metrics) for every line of
    metrics.jsonl, for example to feed Weights & Biases. If it raises, the error is reported once and the run
    continues."""


@dataclass(frozen=True, kw_only=True)
class DistConfig(Section):
    """Workers, parameter servers and fault tolerance. The preset distributed.yaml is an example."""

    num_workers: ProcessCount = 0
    """Number of Ray workers; 0 runs everything in this process, without Ray."""
    num_servers: ProcessCount = 0
    """Number of dedicated parameter servers; 0 keeps the parameter shards in the workers."""
    address: str | None = None
    """Ray cluster to use: auto, or HOST:PORT. If None, a cluster is started on this machine and stopped at the end."""
    threads_per_worker: ThreadCount = 1
    """Number of CPU threads per worker."""
    oversubscribe: bool = False
    """Allow more threads of workers and servers than this machine has cores."""
    gpus_per_worker: UnitInterval = 0.0
    """Number of GPUs per worker, which may be a fraction."""
    placement: Literal["pack", "spread"] = "pack"
    """Placement of the workers: on few nodes (pack) or on different nodes (spread)."""
    backend: Literal["auto", "shared", "gloo", "nccl"] = "auto"
    """Backend of the collectives. shared is gloo, with shared memory between the workers of one machine. auto selects
    nccl if each worker has a GPU of its own, otherwise shared."""
    reduce: Literal["tree", "ring"] = "tree"
    """Method of gradient reduction. tree adds along a fixed tree and gives the same bits for any number of workers;
    ring uses the backend's allreduce."""
    timeout_s: Seconds = 60.0
    """Timeout of a collective in seconds. Members that exceed it are considered lost."""
    heartbeat_s: Seconds = 5.0
    """Seconds without an answer after which a process is considered lost."""
    max_restarts: NonNegativeInt = 10
    """Maximum number of faults to recover from. After one more, the run finishes its step in one process, saves and
    ends."""
    on_failure: Literal["replace", "shrink"] = "replace"
    """Reaction to a lost worker: replace it with a new one, or shrink to fewer workers."""
    snapshot_every: PositiveInt = 10
    """Steps between snapshots of the server's state in this process's memory (12 bytes per parameter)."""


@dataclass(frozen=True, kw_only=True)
class ComputeConfig(Section):
    """Device, precision and workers of every program that computes."""

    dist_config: str | None = None
    """YAML file with a dist section, or `distributed` for the one that ships with rlhf. Flags override it, and it
    overrides a configuration file."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to compute on; auto selects a GPU if one is available."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of forward and backward passes. Master weights, optimiser and losses are always fp32."""
    threads: ThreadCount | None = None
    """Number of CPU threads. If None, all cores are used. The bits of a result depend on it."""
    cache_dir: Path | None = None
    """Folder for tokenised data and compiled code. If None, $XDG_CACHE_HOME/rlhf or ~/.cache/rlhf is used, or a
    temporary folder if the home folder is not writable."""
    dist: DistConfig = field(default_factory=DistConfig)


@dataclass(frozen=True, kw_only=True)
class OutputConfig(Section):
    """Configuration file, output folder, seed and resumption of a training run."""

    config: str | None = None
    """YAML file, or the name of a preset that ships with rlhf (demo, gpt2, …). Flags override it."""
    output_dir: Path = Path("outputs")
    """Output folder for models, checkpoints, logs and the resolved configuration."""
    seed: Seed = 0
    """Seed of all random numbers."""
    resume: bool = False
    """Resume the run in output_dir from its last checkpoint. The result has the same bits as an uninterrupted run."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(ComputeConfig, OutputConfig):  # whose flags come first, because it is named last
    """Settings common to all training runs."""

    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the training step with torch.compile. Compilation takes half a minute or more the first time and makes
    steps faster; auto compiles if the run is long enough to make up for it. The bits of a result depend on it."""
    stop_early: bool = True
    """Save and stop a stage that has gone wrong: its KL is far above ppo.kl_budget, or its training loss rises."""
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)


@dataclass(frozen=True, kw_only=True)
class SFTRun(RunConfig):
    """Settings of rlhf-train sft."""

    sft_data: DataPaths = None
    """Files, or folders of them, with prompt and completion, or messages: JSON, JSON Lines, CSV, Parquet or Arrow, also
    .gz. If None, the embedded example is used."""
    sft_val_data: DataPaths = None
    """Validation files. If None, sft.val_fraction of the records is held out."""
    sft: SFTConfig = field(default_factory=SFTConfig)


@dataclass(frozen=True, kw_only=True)
class RewardRun(RunConfig):
    """Settings of rlhf-train reward."""

    preference_data: DataPaths = None
    """Files, or folders of them, with prompt, chosen and rejected; of the same formats. If None, the embedded example
    is used."""
    preference_val_data: DataPaths = None
    """Validation files. If None, reward.val_fraction of the records is held out."""
    reward: RewardConfig = field(default_factory=RewardConfig)


@dataclass(frozen=True, kw_only=True)
class DPORun(RunConfig):
    """Settings of rlhf-train dpo."""

    preference_data: DataPaths = None
    """Files, or folders of them, with prompt, chosen and rejected; of the same formats. If None, the embedded example
    is used."""
    preference_val_data: DataPaths = None
    """Validation files. If None, dpo.val_fraction of the records is held out."""
    dpo: DPOConfig = field(default_factory=DPOConfig)


@dataclass(frozen=True, kw_only=True)
class PPORun(RunConfig):
    """Settings of rlhf-train ppo."""

    prompt_data: DataPaths = None
    """Files, or folders of them, with prompt; reward functions get the other columns. If None, the embedded example is
    used."""
    ppo: PPOConfig = field(default_factory=PPOConfig)


@dataclass(frozen=True, kw_only=True)
class PipelineRun(SFTRun, RewardRun, DPORun, PPORun):
    """Settings of rlhf-train pipeline, which runs the three stages in order."""

    start_at: Literal["sft", "reward", "ppo"] = "sft"
    """First stage to run. The models of earlier stages must be in output_dir."""
    strict: bool = False
    """Stop after a stage whose model is not good enough for the next one to build on."""
