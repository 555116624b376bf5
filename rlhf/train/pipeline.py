"""Training from Python: one stage, or the pipeline, as a configuration says."""

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
from rlhf.train.stage_inputs import check_named_columns

Callback = Callable[[str, int, dict[str, float]], Any]
"""Function that is called with (stage, step, metrics) after every step. A true result stops the run."""


def run(
    config: RunConfig,
    *,
    callback: Callback | None = None,
    observers: Sequence[Observer] = (),
    base: PipelineRun | None = None,
) -> StageResult:
    """Train one stage or the pipeline, as the configuration says.

    No signal handler is installed, nothing is printed, and no report is written. Messages go to the logger `rlhf`. The
    number of torch's threads is set during the run. The function may be called in any thread.

    Args:
        config: an `SFTRun`, `RewardRun`, `PPORun` or `PipelineRun`, or the configuration of a registered stage.
        callback: function that is called with (stage, step, metrics) after every step. If the result is true, the run
            saves its state and stops; `resume` continues to the same bits as a run without a stop. An exception stops
            the run in the same way and is then raised to the caller.
        observers: observers of the training (`rlhf.train.Observer`).
        base: settings of earlier stages, for a stage that runs alone on the embedded example and needs their models.

    Returns:
        The result of the last stage that ran. `finished` is False if the callback stopped it.

    Raises:
        UserError: a setting or a file is refused, or saving fails.
        NonFiniteError: a loss, gradient, reward or value is not finite.
        WorkersLostError: more processes were lost than may be replaced. The state is saved.

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
    """Run the stages of a configuration in order. Each reads the models that earlier stages wrote.

    The checks of all stages are made before training begins. With `config.resume`, finished stages are skipped and the
    interrupted stage continues from its last checkpoint. A stage that runs alone on the embedded example first trains
    the missing models that it needs. If the user names a data file or a model, only the stage itself is trained.

    Args:
        config: configuration of the run.
        observers: observers of all stages.
        stop: request to stop the run.
        base: settings of earlier stages, for a stage that runs alone on the embedded example and needs their models.

    Raises:
        UserError: a setting or a file is refused, or saving fails.
        NonFiniteError: a loss, gradient, reward or value is not finite.
        Interrupted: the run was asked to stop. The step is finished and the state is saved.
        WorkersLostError: more processes were lost than may be replaced. The state is saved.
    """
    stop = stop or StopRequest()
    stages = stages_of(config)
    check_named_columns(config)
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
            log_user(f"{config.output_dir / source.folder}: does not exist; training it on the embedded example first")
            load_program(source).run(pipeline, observers, stop)


def _check(config: PipelineRun, stages: Sequence[Stage]) -> None:
    """Raise UserError if one of the stages, run in order, would refuse its settings or files. Reads all data files."""
    check_workers(config.dist)
    for stage in stages:
        check_settings(config, stage)
        check_output_folder(config, stage)
    models: dict[str, Any] = {}
    for stage in stages:
        models[stage.name] = load_program(stage).check(config, models)
