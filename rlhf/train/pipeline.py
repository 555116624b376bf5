"""The three stages in order, each one's model feeding the next."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from rlhf.config import PipelineRun, PPORun, RewardRun, RunConfig
from rlhf.data.dataset import check_file
from rlhf.data.demo_data import PROMPT_COLUMNS
from rlhf.data.schema import DEMONSTRATIONS, PREFERENCES, PROMPTS, Schema
from rlhf.distributed import connected
from rlhf.distributed.compute_context import check_workers
from rlhf.io.output_folder import check_output_folder
from rlhf.io.progress import console
from rlhf.io.reward_sources import check_columns
from rlhf.setting_rules import check_settings
from rlhf.train import ppo, reward, sft
from rlhf.train.run import StageResult

_RUNS: dict[str, Callable[[PipelineRun], StageResult]] = {
    "sft": sft.run_sft,
    "reward": reward.run_reward,
    "ppo": ppo.run_ppo,
}


def run_pipeline(config: PipelineRun) -> dict[str, StageResult]:
    """Run SFT, reward model and PPO from `config.start_at` on; each reads the model that the one before left behind.

    What a later stage would refuse is refused before anything is trained. With `config.resume`, finished stages are
    passed over and the interrupted one continues from its last checkpoint.

    Raises:
        UserError, NonFiniteError, Interrupted: see `rlhf.train.run`.
    """
    stages = list(_RUNS)[list(_RUNS).index(config.start_at) :]
    _check(config, stages)
    with connected(config.dist):
        return {stage: _RUNS[stage](config) for stage in stages}


def run_reward_alone(config: RewardRun, base: PipelineRun) -> StageResult:
    """The reward stage; on the embedded example, with a new SFT model where there is none.

    As soon as a data file or a model is named, nothing is trained that was not asked for.

    Args:
        config: of the stage.
        base: settings of the stages before it.
    """
    if config.preference_data is None:
        _train_missing(config, base, "reward", () if config.reward.model_path else ("sft",))
    return reward.run_reward(config)


def run_ppo_alone(config: PPORun, base: PipelineRun) -> StageResult:
    """The PPO stage; on the embedded example, with new SFT and reward models where there are none.

    So `rlhf-train ppo` works as typed. Arguments and limits as `run_reward_alone`.
    """
    if config.prompt_data is None:
        needed = ("sft", "reward") if ppo.scores_with_own_model(config) else ("sft",)
        _train_missing(config, base, "ppo", () if config.ppo.model_path else needed)
    return ppo.run_ppo(config)


def _train_missing(config: RunConfig, base: PipelineRun, stage: str, needed: Sequence[str]) -> None:
    """Train those of the `needed` stages whose models are not there, unless one of them, or `stage`, would refuse."""
    settings = {spec.name: getattr(config, spec.name) for spec in dataclasses.fields(config)}
    whole = dataclasses.replace(base, **settings)
    missing = [name for name in needed if not (config.output_dir / name).is_dir()]
    _check(whole, [*missing, stage])
    for name in missing:
        text = f"{config.output_dir / name}: not there yet; training it on the embedded example first"
        console.print(text, markup=False, soft_wrap=True)
        _RUNS[name](whole)


def _check(config: PipelineRun, stages: Sequence[str]) -> None:
    """Raise UserError for what one of `stages`, which are run in order, would refuse; reads all data files through."""
    check_workers(config.dist)
    for stage in stages:
        check_settings(config, stage)
        check_output_folder(config, stage)
    sft_model = reward_model = None
    if "sft" in stages:
        sft_model = sft.check(config)
        _read(DEMONSTRATIONS, config.sft_data, config.sft_val_data)
    if "reward" in stages:
        reward_model = reward.check(config, sft_model)
        reward.check_margin(config, _read(PREFERENCES, config.preference_data, config.preference_val_data))
        reward.check_pairs(config, reward_model)
    if "ppo" in stages:
        start = ppo.check(config, sft_model, reward_model)
        check_columns(start.sources, _read(PROMPTS, config.prompt_data))


def _read(schema: Schema, path: Path | None, validation: Path | None = None) -> set[str]:
    """Read data files through; the keys of the records to learn from, which may be the embedded example's."""
    if validation is not None:
        check_file(validation, schema)
    if path is not None:
        return check_file(path, schema)
    return set(PROMPT_COLUMNS if schema is PROMPTS else schema.keys)
