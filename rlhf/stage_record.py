"""The record of a training stage: its names, configuration, data, functions and rules."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.config import RunConfig
from rlhf.field_docs import documented
from rlhf.setting_rules import Rule


@documented
class StageResult(NamedTuple):
    """Result of a stage."""

    model: Path
    """Folder of the trained model."""
    metrics: dict[str, float]
    """Metrics of the last evaluation."""
    finished: bool = True
    """False if a callback stopped the stage, in which case its state is saved but its model is not written."""
    verdict: Any = None
    """`rlhf.verdicts.Verdict` on the model; None if there is too little to judge it by."""


@documented
class StageProgram(NamedTuple):
    """Functions of a stage."""

    check: Callable[[Any, Mapping[str, Any]], Any]
    """(config, models) -> spec of the model that the stage will write, for the checks of later stages. `models` has the
    specs of earlier stages of the same pipeline, by stage. The function reads all data files, and raises UserError for
    everything that the run would refuse."""
    run: Callable[..., StageResult]
    """(config, observers, stop) -> result."""
    needs: Callable[[Any], Sequence[str]] = lambda config: ()
    """config -> names of the earlier stages whose models the stage reads from the output folder."""


@documented
@dataclass(frozen=True, kw_only=True)
class Stage:
    """Entry of the table: names, settings and files of a stage."""

    name: str
    """Name of the stage in the log, on the command line and in the settings."""
    title: str
    """Title in plots."""
    help: str
    """Description in --help, in one line."""
    config: type[RunConfig]
    """Configuration type of a run of this stage alone."""
    program: StageProgram | str
    """Functions of the stage, or `module:name`, which is imported when needed."""
    folder: str
    """Name of the model folder in the output folder."""
    data: str
    """Setting that names the training data. Without it the stage uses the embedded example. Empty if there is
    neither."""
    schema: str
    """Name of the data's `rlhf.data.schema.Schema`."""
    files: Mapping[str, str]
    """Settings that name files, each with the kind of its content: data, validation, tokenizer, template, model or
    sources. The content is compared when a run is continued."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Earlier stages whose models the stage reads, each with the setting that replaces the model by another."""
    own_settings: tuple[str, ...] = ()
    """Prefixes of settings outside the stage's section that only this stage reads."""
    rules: tuple[Rule, ...] = ()
    """Rules for settings that have no effect or are refused."""
    unit: str = "step"
    """Name of a step, such as `iteration`."""
    checkpoint_every: int = 100
    """Default of the setting `checkpoint.every`."""
    shown: tuple[str, ...] = ()
    """Metrics that the progress display shows."""
    in_pipeline: bool = True
    """True if the pipeline runs the stage."""
    member: int | None = None
    """Number of the model, where the stage trains several; its name is then `reward/0`, its folder likewise."""

    @property
    def section(self) -> str:
        """Return the name of the stage's section of settings."""
        return self.name.partition("/")[0]

    def section_of(self, config: RunConfig) -> Any:
        """Return the stage's section of a configuration."""
        return getattr(config, self.section)

    def with_member(self, number: int) -> "Stage":
        """Return the stage that trains one of several models, into a subfolder."""
        return dataclasses.replace(self, name=f"{self.name}/{number}", folder=f"{self.folder}/{number}", member=number)
