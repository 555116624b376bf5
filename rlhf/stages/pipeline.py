"""The three stages in order, each one's model feeding the next."""

import dataclasses
from collections.abc import Callable
from typing import Literal

from rlhf.config import PipelineRun, PPORun, RewardRun, RunConfig
from rlhf.data.dataset import texts
from rlhf.data.schema import DEMONSTRATIONS, PREFERENCES, PROMPTS
from rlhf.io.progress import console
from rlhf.stages.ppo import run_ppo
from rlhf.stages.reward import run_reward
from rlhf.stages.rewards import check_source
from rlhf.stages.run import StageResult
from rlhf.stages.sft import run_sft

_RUNS: dict[str, Callable[[PipelineRun], StageResult]] = {"sft": run_sft, "reward": run_reward, "ppo": run_ppo}


def run_pipeline(config: PipelineRun) -> dict[str, StageResult]:
    """Run SFT, reward model and PPO from `config.start_at` on; each reads the model that the one before left behind.

    All data files are read through and all reward functions imported before anything is trained. With
    `config.resume`, finished stages are passed over and the interrupted one continues from its last checkpoint.

    Raises:
        UserError, NonFiniteError, Interrupted: see `rlhf.stages.run`.
    """
    files = (
        (config.sft_data, DEMONSTRATIONS),
        (config.sft_val_data, DEMONSTRATIONS),
        (config.preference_data, PREFERENCES),
        (config.preference_val_data, PREFERENCES),
        (config.prompt_data, PROMPTS),
    )
    for path, schema in files:
        if path is not None:
            for _ in texts(path, schema):
                pass
    for spec in config.ppo.reward:
        check_source(spec)
    stages = list(_RUNS)
    return {stage: _RUNS[stage](config) for stage in stages[stages.index(config.start_at) :]}


def run_reward_alone(config: RewardRun) -> StageResult:
    """The reward stage; on the embedded example, with a new SFT model where there is none.

    As soon as a data file or a model is named, nothing is trained that was not asked for.
    """
    if config.preference_data is None and config.reward.model_path is None:
        _train_missing(config, "sft")
    return run_reward(config)


def run_ppo_alone(config: PPORun) -> StageResult:
    """The PPO stage; on the embedded example, with new SFT and reward models where there are none.

    So `rlhf-train ppo` works as typed. As soon as a data file, a model or a reward is named, nothing is trained that
    was not asked for.
    """
    if config.prompt_data is None and config.ppo.model_path is None:
        _train_missing(config, "sft")
        if not config.ppo.reward:
            _train_missing(config, "reward")
    return run_ppo(config)


def _train_missing(config: RunConfig, stage: Literal["sft", "reward"]) -> None:
    """Train a stage on the embedded example unless its model is there."""
    folder = config.output_dir / stage
    if not folder.is_dir():
        console.print(
            f"{folder}: not there yet; training it on the embedded example first", markup=False, soft_wrap=True
        )
        settings = {spec.name: getattr(config, spec.name) for spec in dataclasses.fields(config)}
        _RUNS[stage](PipelineRun(**settings))
