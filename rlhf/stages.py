"""The table of training stages, in order. Importing it imports no torch.

What a stage computes is in a module of its own, which is imported when the stage runs. To add a stage, write that
module and add one entry to the table; a stage of your own is registered from the file that defines it:

    register(Stage(name="distil", config=DistilRun, program=StageProgram(check_distil, run_distil), ...))
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rlhf.config import PipelineRun, PPORun, RewardRun, RunConfig, SFTRun
from rlhf.setting_rules import COMPUTE_RULES, Rule, check_rules
from rlhf.stage_rules import PPO_RULES, REWARD_RULES, SFT_RULES


class StageResult(NamedTuple):
    """What a stage leaves behind."""

    model: Path
    """The model folder."""
    metrics: dict[str, float]
    """Its last evaluation."""
    finished: bool = True
    """False where a callback stopped the stage: its state is saved, and its model is not written yet."""


class StageProgram(NamedTuple):
    """What a stage does."""

    check: Callable[[Any, Mapping[str, Any]], Any]
    """(config, models) -> the model that the stage will leave behind, as later stages' checks need it. `models` has
    what earlier stages of the same pipeline will leave behind, by stage. Reads the data files through, and raises
    UserError for what the run would refuse."""
    run: Callable[..., StageResult]
    """(config, observers, stop) -> result."""
    needs: Callable[[Any], Sequence[str]] = lambda config: ()
    """config -> earlier stages whose models the stage reads from the output folder."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What is known of a stage before it runs."""

    name: str
    """In the log and on the command line; also the name of its section of settings."""
    title: str
    """In plots."""
    help: str
    """One line."""
    config: type[RunConfig]
    """Settings of a run of this stage alone."""
    program: StageProgram | str
    """What it does, or where that is: `module:name`, imported when it is needed."""
    folder: str
    """In the output folder: the model that it writes."""
    data: str
    """Setting that names the file to learn from, without which the stage runs on the embedded example; empty where
    there is neither."""
    schema: str
    """Name of that file's `rlhf.data.schema.Schema`."""
    files: Mapping[str, str]
    """Settings that name files, and what their content is called where a run and its continuation are compared: data,
    validation, tokenizer, model or sources."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Earlier stages whose models it starts from, and the setting that names another model instead."""
    own_settings: tuple[str, ...] = ()
    """Prefixes of settings outside its section that this stage alone reads."""
    rules: tuple[Rule, ...] = ()
    """Settings that are idle or refused."""
    unit: str = "step"
    """What a step is called."""
    checkpoint_every: int = 100
    """Steps between checkpoints where the configuration does not say."""
    shown: tuple[str, ...] = ()
    """Metrics on the progress display."""
    in_pipeline: bool = True
    """Whether the pipeline runs it."""

    def section_of(self, config: RunConfig) -> Any:
        """The stage's section of a configuration."""
        return getattr(config, self.name)


STAGES: dict[str, Stage] = {}
"""By name, in the order in which the pipeline runs them."""


def register(stage: Stage) -> None:
    """Add a stage to the end of the table.

    Raises:
        ValueError: the name or folder is taken, or the configuration has no section of that name.
    """
    if stage.name in STAGES or stage.folder in [other.folder for other in STAGES.values()]:
        raise ValueError(f"register: the name {stage.name!r} or the folder {stage.folder!r} is taken by another stage")
    if stage.name not in {spec.name for spec in dataclasses.fields(stage.config)}:
        raise ValueError(
            f"register: {stage.config.__name__} has no section {stage.name!r}, which the stage is named by"
        )
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
        files={"preference_data": "data", "preference_val_data": "validation", "reward.model_path": "model"},
        sources={"sft": "reward.model_path"},
        rules=REWARD_RULES,
        shown=("loss/reward", "eval/reward/accuracy"),
    )
)
register(
    Stage(
        name="ppo",
        title="PPO",
        help="PPO with a KL penalty, from the SFT model, against the reward model or any function.",
        config=PPORun,
        program="rlhf.train.ppo:PROGRAM",
        folder="policy",
        data="prompt_data",
        schema="prompts",
        files={"prompt_data": "data", "ppo.model_path": "model", "ppo.reward": "sources"},
        sources={"sft": "ppo.model_path", "reward": "ppo.reward"},
        rules=PPO_RULES,
        unit="iteration",
        checkpoint_every=10,
        shown=("objective/scores", "objective/kl", "response_length/mean"),
    )
)


def load_program(stage: Stage) -> StageProgram:
    """Return what a stage does, importing its module where that is still to be done."""
    if isinstance(stage.program, StageProgram):
        return stage.program
    module, _, name = stage.program.partition(":")
    program: StageProgram = getattr(importlib.import_module(module), name)
    return program


def stages_of(config: RunConfig) -> list[Stage]:
    """Return the stages that a configuration asks for: one, or those of the pipeline from `start_at` on.

    Raises:
        TypeError: no stage has such a configuration.
    """
    if isinstance(config, PipelineRun):
        names = pipeline_names()
        return [STAGES[name] for name in names[names.index(config.start_at) :]]
    for stage in STAGES.values():
        if type(config) is stage.config:
            return [stage]
    kinds = ", ".join(stage.config.__name__ for stage in STAGES.values())
    raise TypeError(f"{type(config).__name__} is the configuration of no stage; expected {kinds} or PipelineRun")


def pipeline_names() -> tuple[str, ...]:
    """Return the names of the stages that the pipeline runs, in order."""
    return tuple(stage.name for stage in STAGES.values() if stage.in_pipeline)


def pipeline_type() -> type[PipelineRun]:
    """Return `PipelineRun` with the settings of every stage that is registered beside its own."""
    others = tuple(stage.config for stage in STAGES.values() if not issubclass(PipelineRun, stage.config))
    return _pipeline_type(others, pipeline_names()) if others else PipelineRun


@functools.cache
def _pipeline_type(others: tuple[type[RunConfig], ...], names: tuple[str, ...]) -> type[PipelineRun]:
    start_at: Any = Literal[names]
    fields = [("start_at", start_at, field(default=names[0]))]
    made = dataclasses.make_dataclass("PipelineRun", fields, bases=(PipelineRun, *others), frozen=True, kw_only=True)
    made.__doc__ = PipelineRun.__doc__
    return made


def check_settings(config: RunConfig, stage: Stage) -> list[str]:
    """Return a line for each setting of a stage that is set and has no effect; the first stage tells what all share.

    Raises:
        UserError: something that is set is refused.
    """
    is_first = not isinstance(config, PipelineRun) or config.start_at == stage.name
    shared = [rule for rule in COMPUTE_RULES if is_first or rule.refused]
    return check_rules(config, (*shared, *stage.rules))
