"""The three stages in order, each one's model feeding the next."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from rlhf.config import PipelineRun, PPORun, RewardRun, RunConfig
from rlhf.data.dataset import check_file
from rlhf.data.schema import DEMONSTRATIONS, PREFERENCES, PROMPTS
from rlhf.distributed import connected
from rlhf.io.model_folder import load_shape
from rlhf.io.progress import console
from rlhf.stages.inputs import new_config
from rlhf.stages.ppo import check_room, run_ppo
from rlhf.stages.reward import run_reward
from rlhf.stages.rewards import check_source
from rlhf.stages.run import StageResult, check_output
from rlhf.stages.sft import run_sft

_RUNS: dict[str, Callable[[PipelineRun], StageResult]] = {"sft": run_sft, "reward": run_reward, "ppo": run_ppo}


def run_pipeline(config: PipelineRun) -> dict[str, StageResult]:
    """Run SFT, reward model and PPO from `config.start_at` on; each reads the model that the one before left behind.

    What a later stage would refuse is refused before anything is trained: all data files are read through and all
    reward functions imported. With `config.resume`, finished stages are passed over and the interrupted one continues
    from its last checkpoint.

    Raises:
        UserError, NonFiniteError, Interrupted: see `rlhf.stages.run`.
    """
    stages = list(_RUNS)[list(_RUNS).index(config.start_at) :]
    files = (
        (config.sft_data, DEMONSTRATIONS),
        (config.sft_val_data, DEMONSTRATIONS),
        (config.preference_data, PREFERENCES),
        (config.preference_val_data, PREFERENCES),
        (config.prompt_data, PROMPTS),
    )
    for path, schema in files:
        if path is not None:
            check_file(path, schema)
    for stage in stages:
        check_output(config, stage)
    for folder in (config.sft.model_path, config.reward.model_path, config.ppo.model_path):
        if folder is not None:
            load_shape(folder)
    _check_ppo(config, config.sft.model_path if config.start_at == "sft" else config.output_dir / "sft")
    with connected(config.dist):
        return {stage: _RUNS[stage](config) for stage in stages}


def run_reward_alone(config: RewardRun, base: PipelineRun) -> StageResult:
    """The reward stage; on the embedded example, with a new SFT model where there is none.

    As soon as a data file or a model is named, nothing is trained that was not asked for.

    Args:
        config: of the stage.
        base: settings of the stages before it.
    """
    if config.preference_data is None and config.reward.model_path is None:
        _train_missing(config, base, "sft")
    return run_reward(config)


def run_ppo_alone(config: PPORun, base: PipelineRun) -> StageResult:
    """The PPO stage; on the embedded example, with new SFT and reward models where there are none.

    So `rlhf-train ppo` works as typed. Arguments and limits as `run_reward_alone`.
    """
    if config.prompt_data is None and config.ppo.model_path is None:
        _check_ppo(config, config.output_dir / "sft")
        _train_missing(config, base, "sft")
        if not config.ppo.reward:
            _train_missing(config, base, "reward")
    return run_ppo(config)


def _check_ppo(config: PPORun, start: Path | None) -> None:
    """Refuse what PPO would refuse: its reward sources, and completions longer than the context of its start."""
    for spec in config.ppo.reward:
        check_source(spec)
    folder = config.ppo.model_path or start
    shape = load_shape(folder) if folder is not None and folder.is_dir() else new_config(config.model, vocab_size=1)
    check_room(config.ppo, shape.n_positions)


def _train_missing(config: RunConfig, base: PipelineRun, stage: Literal["sft", "reward"]) -> None:
    """Train a stage on the embedded example unless its model is there."""
    folder = config.output_dir / stage
    if not folder.is_dir():
        console.print(
            f"{folder}: not there yet; training it on the embedded example first", markup=False, soft_wrap=True
        )
        settings = {spec.name: getattr(config, spec.name) for spec in dataclasses.fields(config)}
        _RUNS[stage](dataclasses.replace(base, **settings))
