"""The table of training stages, in order. Importing it does not import torch.

Each stage has its own module, which is imported when the stage runs. To add a stage, write the module and add an entry
to the table, or register the stage in the file that defines it:

    register(Stage(name="distil", config=DistilRun, program=StageProgram(check_distil, run_distil), ...))
"""

import dataclasses
import functools
import importlib
from dataclasses import field
from typing import Any, Literal

from rlhf.config import DPORun, PipelineRun, PPORun, RewardRun, RunConfig, SFTRun
from rlhf.setting_rules import COMPUTE_RULES, DATA_RULES, check_rules
from rlhf.stage_record import Stage, StageProgram, StageResult
from rlhf.stage_rules import DPO_RULES, PPO_RULES, REWARD_RULES, SFT_RULES

__all__ = [
    "STAGES",
    "Stage",
    "StageProgram",
    "StageResult",
    "check_settings",
    "load_program",
    "pipeline_names",
    "pipeline_type",
    "register",
    "stages_of",
]

STAGES: dict[str, Stage] = {}
"""All stages by name, in the order of the pipeline."""


def register(stage: Stage) -> None:
    """Add a stage to the end of the table. Two stages may write one folder, unless the pipeline runs both.

    Args:
        stage: the stage.

    Raises:
        ValueError: the name or folder belongs to another stage, or the configuration has no section of that name.

    Example:
        >>> from rlhf.config import SFTConfig
        >>> @dataclasses.dataclass(frozen=True, kw_only=True)
        ... class DistilRun(RunConfig):
        ...     distil: SFTConfig = SFTConfig()
        >>> register(dataclasses.replace(STAGES["sft"], name="distil", folder="distil", config=DistilRun))
        >>> list(STAGES)[-1]
        'distil'
    """
    rivals = [other for other in STAGES.values() if other.in_pipeline and stage.in_pipeline]
    if stage.name in STAGES or stage.folder in [other.folder for other in rivals]:
        raise ValueError(f"register: the name {stage.name!r} or the folder {stage.folder!r} is taken by another stage")
    if stage.name not in {spec.name for spec in dataclasses.fields(stage.config)}:
        raise ValueError(f"register: {stage.config.__name__} has no section {stage.name!r}, the name of the stage")
    STAGES[stage.name] = stage


register(
    Stage(
        name="sft",
        title="SFT",
        help="Supervised fine-tuning on demonstrations.",
        config=SFTRun,
        program="rlhf.train.sft:PROGRAM",
        folder="sft",
        data="sft_data",
        schema="demonstrations",
        files={
            "sft_data": "data",
            "sft_val_data": "validation",
            "tokenizer.path": "tokenizer",
            "data.template": "template",
            "sft.model_path": "model",
        },
        own_settings=("model.", "tokenizer."),
        rules=SFT_RULES,
        shown=("loss/sft", "eval/perplexity"),
    )
)
register(
    Stage(
        name="reward",
        title="reward model",
        help="Reward model on preference pairs, from the SFT model.",
        config=RewardRun,
        program="rlhf.train.reward:PROGRAM",
        folder="reward",
        data="preference_data",
        schema="preference pairs",
        files={
            "preference_data": "data",
            "preference_val_data": "validation",
            "data.template": "template",
            "reward.model_path": "model",
        },
        sources={"sft": "reward.model_path"},
        rules=REWARD_RULES,
        shown=("loss/reward", "eval/reward/accuracy"),
    )
)
register(
    Stage(
        name="ppo",
        title="PPO",
        help="PPO with a KL penalty, from the SFT model, on the scores of reward models or functions.",
        config=PPORun,
        program="rlhf.train.ppo:PROGRAM",
        folder="policy",
        data="prompt_data",
        schema="prompts",
        files={
            "prompt_data": "data",
            "data.template": "template",
            "ppo.model_path": "model",
            "ppo.reward": "sources",
            "ppo.estimator": "estimator",
            "ppo.loss": "loss",
        },
        sources={"sft": "ppo.model_path", "reward": "ppo.reward"},
        rules=PPO_RULES,
        unit="iteration",
        checkpoint_every=10,
        shown=("objective/scores", "objective/kl", "response_length/mean"),
    )
)
register(
    Stage(
        name="dpo",
        title="DPO",
        help="Direct preference optimisation on preference pairs, from the SFT model.",
        config=DPORun,
        program="rlhf.train.dpo:PROGRAM",
        folder="policy",
        data="preference_data",
        schema="preference pairs",
        files={
            "preference_data": "data",
            "preference_val_data": "validation",
            "data.template": "template",
            "dpo.model_path": "model",
        },
        sources={"sft": "dpo.model_path"},
        rules=DPO_RULES,
        shown=("rewards/accuracies", "eval/rewards/accuracies"),
        in_pipeline=False,
    )
)


def load_program(stage: Stage) -> StageProgram:
    """Return the functions of a stage. Its module is imported if necessary.

    Example:
        >>> load_program(STAGES["sft"]).run.__name__
        'run_sft'
    """
    if isinstance(stage.program, StageProgram):
        return stage.program
    module, _, name = stage.program.partition(":")
    program: StageProgram = getattr(importlib.import_module(module), name)
    return program


def stages_of(config: RunConfig) -> list[Stage]:
    """Return the stages that a configuration runs: a single stage, or those of the pipeline from `start_at` on.

    Args:
        config: the configuration of a run.

    Raises:
        TypeError: no stage has a configuration of this type.

    Example:
        >>> [stage.name for stage in stages_of(PipelineRun(start_at="reward"))][:2]
        ['reward', 'ppo']
    """
    if isinstance(config, PipelineRun):
        names = pipeline_names()
        return [STAGES[name] for name in names[names.index(config.start_at) :]]
    for stage in STAGES.values():
        if type(config) is stage.config:
            return [stage]
    kinds = ", ".join(stage.config.__name__ for stage in STAGES.values())
    raise TypeError(f"{type(config).__name__} is not the configuration of a stage; expected {kinds} or PipelineRun")


def pipeline_names() -> tuple[str, ...]:
    """Return the names of the stages that the pipeline runs, in order.

    Example:
        >>> pipeline_names()[:3]
        ('sft', 'reward', 'ppo')
    """
    return tuple(stage.name for stage in STAGES.values() if stage.in_pipeline)


def pipeline_type() -> type[PipelineRun]:
    """Return `PipelineRun`, extended by the settings of registered stages.

    Example:
        >>> issubclass(pipeline_type(), PipelineRun)
        True
    """
    configs = tuple(stage.config for stage in STAGES.values() if not issubclass(PipelineRun, stage.config))
    return _pipeline_type(configs, pipeline_names()) if configs else PipelineRun


@functools.cache
def _pipeline_type(configs: tuple[type[RunConfig], ...], names: tuple[str, ...]) -> type[PipelineRun]:
    start_at: Any = Literal[names]
    fields = [("start_at", start_at, field(default=names[0]))]
    bases: tuple[type, ...] = (PipelineRun, *configs)
    extended = dataclasses.make_dataclass("PipelineRun", fields, bases=bases, frozen=True, kw_only=True)
    extended.__doc__ = PipelineRun.__doc__
    return extended


def check_settings(config: RunConfig, stage: Stage) -> list[str]:
    """Return a line for each setting that is set but has no effect on a stage.

    Lines about settings that stages share are returned for the first stage only.

    Args:
        config: the configuration of a run.
        stage: a stage of the run.

    Raises:
        UserError: a setting is refused.

    Example:
        >>> from rlhf.config import ComputeConfig, DistConfig
        >>> check_settings(SFTRun(dist=DistConfig(max_restarts=3)), STAGES["sft"])
        ['--dist.max-restarts 3: has no effect without --dist.num-workers']
    """
    is_first = not isinstance(config, PipelineRun) or config.start_at == stage.name
    shared = [rule for rule in (*COMPUTE_RULES, *DATA_RULES) if is_first or rule.refused]
    return check_rules(config, (*shared, *stage.rules))
