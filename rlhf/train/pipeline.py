"""Training by a configuration, from Python: one stage or the pipeline, a walk over the table of stages."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from rlhf.config import PipelineRun, RunConfig
from rlhf.distributed import connected
from rlhf.distributed.compute_context import check_workers
from rlhf.errors import Interrupted
from rlhf.io.output_folder import check_output_folder
from rlhf.io.user_log import log_user
from rlhf.stages import STAGES, Stage, StageResult, check_settings, load_program, pipeline_type, stages_of
from rlhf.train.observers import CallbackObserver, Observer
from rlhf.train.signals import StopRequest

Callback = Callable[[str, int, dict[str, float]], Any]
"""Gets (stage, step, metrics) after every step; a true result stops the run."""


def run(
    config: RunConfig,
    *,
    callback: Callback | None = None,
    observers: Sequence[Observer] = (),
    base: PipelineRun | None = None,
) -> StageResult:
    """Train as a configuration says: one stage, or the pipeline.

    The process stays as it is: no signal handler is installed, nothing is printed (messages go to the logger `rlhf`),
    and no report is written. torch's number of threads is set while the run lasts. It may be called in any thread.

        import rlhf
        from rlhf.config import SFTConfig, SFTRun
        config = SFTRun(output_dir="outputs/short", sft=SFTConfig(max_steps=20))
        result = rlhf.train.run(config, callback=lambda stage, step, metrics: metrics["loss/sft"] < 1.0)
        result.finished, result.metrics["eval/perplexity"]

    Args:
        config: `SFTRun`, `RewardRun`, `PPORun`, `PipelineRun`, or that of a registered stage.
        callback: called with (stage, step, metrics) after every step. What it returns that is true stops the run after
            its state is saved, so that `resume` goes on from there to the bits of the run that never stopped. An
            exception does the same and then reaches the caller.
        observers: learn more: see `rlhf.train.observers.Observer`.
        base: settings of earlier stages, where a stage that is run alone on the embedded example needs their models.

    Returns:
        Of the last stage that ran. `finished` is False where the callback stopped it.

    Raises:
        UserError, NonFiniteError, WorkersLostError: see `rlhf.train.loop.train`.
    """
    watcher = CallbackObserver(callback or (lambda stage, step, metrics: False))
    results: dict[str, StageResult] = {}
    with contextlib.suppress(Interrupted):  # by the observers: there are no signals here
        results = run_stages(config, observers=(*observers, watcher), base=base)
    if watcher.error is not None:
        raise watcher.error
    if results:
        return list(results.values())[-1]
    assert watcher.stage is not None
    return StageResult(config.output_dir / watcher.stage.folder, watcher.metrics, finished=False)


def run_stages(
    config: RunConfig,
    *,
    observers: Sequence[Observer] = (),
    stop: StopRequest | None = None,
    base: PipelineRun | None = None,
) -> dict[str, StageResult]:
    """Run the stages that a configuration asks for, in order; each reads the models that those before left behind.

    What a later stage of the pipeline would refuse is refused before anything is trained. With `config.resume`,
    finished stages are passed over and the interrupted one continues from its last checkpoint. A stage that is run
    alone on the embedded example trains the models that it needs and that are not there. As soon as a data file or a
    model is named, nothing is trained that was not asked for.

    Args:
        config: of the run.
        observers: of all stages.
        stop: asks the run to stop.
        base: as of `run`.

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
    return results


def _train_missing(
    config: RunConfig, stage: Stage, base: PipelineRun, observers: Sequence[Observer], stop: StopRequest
) -> None:
    """Train those models a stage needs that are not there, unless one of their stages, or it, would refuse."""
    settings = {spec.name: getattr(config, spec.name) for spec in dataclasses.fields(config)}
    whole = dataclasses.replace(base, **settings)
    needed = [STAGES[name] for name in load_program(stage).needs(config)]
    missing = [other for other in needed if not (config.output_dir / other.folder).is_dir()]
    _check(whole, [*missing, stage])
    for other in missing:
        if not stop.requested:
            log_user(f"{config.output_dir / other.folder}: not there yet; training it on the embedded example first")
            load_program(other).run(whole, observers, stop)


def _check(config: PipelineRun, stages: Sequence[Stage]) -> None:
    """Raise UserError for what one of `stages`, which are run in order, would refuse; reads all data files through."""
    check_workers(config.dist)
    for stage in stages:
        check_settings(config, stage)
        check_output_folder(config, stage)
    models: dict[str, Any] = {}
    for stage in stages:
        models[stage.name] = load_program(stage).check(config, models)
