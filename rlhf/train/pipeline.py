"""Training from Python by a configuration: one stage, or the pipeline."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from rlhf.config import PipelineRun, RunConfig
from rlhf.distributed import connected
from rlhf.distributed.compute_context import check_workers
from rlhf.errors import Interrupted, UserError
from rlhf.io.output_folder import check_output_folder
from rlhf.io.user_log import log_user
from rlhf.stages import STAGES, Stage, StageResult, check_settings, load_program, pipeline_type, stages_of
from rlhf.train.observers import CallbackObserver, Observer
from rlhf.train.signals import StopRequest

Callback = Callable[[str, int, dict[str, float]], Any]
"""Called with (stage, step, metrics) after every step; a true result stops the run."""


def run(
    config: RunConfig,
    *,
    callback: Callback | None = None,
    observers: Sequence[Observer] = (),
    base: PipelineRun | None = None,
) -> StageResult:
    """Train one stage or the pipeline, as the configuration says.

    No signal handler is installed, nothing is printed (messages go to the logger `rlhf`), and no report is written.
    torch's number of threads is set while the run lasts. The function may be called in any thread.

    Args:
        config: `SFTRun`, `RewardRun`, `PPORun`, `PipelineRun`, or that of a registered stage.
        callback: called with (stage, step, metrics) after every step. A true result stops the run after its state is
            saved; `resume` continues to the same bits as a run without a stop. An exception stops the run in the
            same way and is then raised to the caller.
        observers: see `rlhf.train.observers.Observer`.
        base: settings of earlier stages, for a stage that is run alone on the embedded example and needs their models.

    Returns:
        The result of the last stage that ran. `finished` is False if the callback stopped it.

    Raises:
        UserError, NonFiniteError, WorkersLostError: see `rlhf.train.loop.train`.

    Example:
        >>> from rlhf.config import ModelConfig, SFTConfig, SFTRun
        >>> sft = SFTConfig(max_steps=20, max_length=16)
        >>> config = SFTRun(output_dir="outputs/short", model=ModelConfig(preset="tiny"), sft=sft)
        >>> result = run(config, callback=lambda stage, step, metrics: step == 2)
        >>> result.finished, result.metrics["loss/sft"] > 0
        (False, True)
    """
    callback_observer = CallbackObserver(callback or (lambda stage, step, metrics: False))
    results: dict[str, StageResult] = {}
    with contextlib.suppress(Interrupted):  # by an observer
        results = run_stages(config, observers=(*observers, callback_observer), base=base)
    if callback_observer.error is not None:
        raise callback_observer.error
    if results:
        return list(results.values())[-1]
    stage = callback_observer.stage
    assert stage is not None
    return StageResult(config.output_dir / stage.folder, callback_observer.metrics, finished=False)


def run_stages(
    config: RunConfig,
    *,
    observers: Sequence[Observer] = (),
    stop: StopRequest | None = None,
    base: PipelineRun | None = None,
) -> dict[str, StageResult]:
    """Run the stages of a configuration in order; each reads the models that earlier ones wrote.

    What a later stage of the pipeline would refuse is refused before training begins. With `config.resume`, finished
    stages are skipped and the interrupted one continues from its last checkpoint. A stage that is run alone on the
    embedded example first trains the models that it needs and that are missing; with a data file or a model named,
    only the stage itself is trained.

    Args:
        config: of the run.
        observers: of all stages.
        stop: request to stop the run.
        base: as in `run`.

    Raises:
        UserError, NonFiniteError, Interrupted, WorkersLostError: see `rlhf.train.loop.train`.
    """
    stop = stop or StopRequest()
    stages = stages_of(config)
    if not isinstance(config, PipelineRun):
        (stage,) = stages
        if stage.data and getattr(config, stage.data) is None:
            _train_missing(config, stage, base or pipeline_type()(), observers, stop)
        return {} if stop.requested else {stage.name: load_program(stage).run(config, observers, stop)}
    _check(config, stages)
    results: dict[str, StageResult] = {}
    with connected(config.dist):
        for stage in stages:
            results[stage.name] = load_program(stage).run(config, observers, stop)
            if stop.requested:
                break
            _check_verdict(config, stage, results[stage.name])
    return results


def _check_verdict(config: PipelineRun, stage: Stage, result: StageResult) -> None:
    """Raise UserError if a strict pipeline would build on a model that is not good enough."""
    if config.strict and result.verdict is not None and not result.verdict.sound:
        raise UserError(
            f"--strict: stopped after {stage.name}, whose model is saved in {result.model}. {result.verdict.text} "
            "To go on all the same, leave out --strict and add --resume"
        )


def _train_missing(
    config: RunConfig, stage: Stage, base: PipelineRun, observers: Sequence[Observer], stop: StopRequest
) -> None:
    """Train the missing models that a stage needs, after checking their stages and the stage itself."""
    settings = {spec.name: getattr(config, spec.name) for spec in dataclasses.fields(config)}
    pipeline = dataclasses.replace(base, **settings)
    needed = [STAGES[name] for name in load_program(stage).needs(config)]
    missing = [source for source in needed if not (config.output_dir / source.folder).is_dir()]
    _check(pipeline, [*missing, stage])
    for source in missing:
        if not stop.requested:
            log_user(f"{config.output_dir / source.folder}: not there yet; training it on the embedded example first")
            load_program(source).run(pipeline, observers, stop)


def _check(config: PipelineRun, stages: Sequence[Stage]) -> None:
    """Raise UserError if one of `stages`, run in order, would refuse its settings or files; reads all data files."""
    check_workers(config.dist)
    for stage in stages:
        check_settings(config, stage)
        check_output_folder(config, stage)
    models: dict[str, Any] = {}
    for stage in stages:
        models[stage.name] = load_program(stage).check(config, models)
