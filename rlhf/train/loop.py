"""The training loop, which makes steps, calls observers, saves checkpoints, and stops on request or failure."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from rlhf.distributed.compute_context import compute_threads
from rlhf.errors import Interrupted, NonFiniteError, UserError, WorkersLostError
from rlhf.execution.executor import Executor
from rlhf.io.checkpoint import last_step, save_refused
from rlhf.io.files import check_free_space
from rlhf.io.output_folder import write_config
from rlhf.io.provenance import describe_provenance, provenance_of
from rlhf.train.context import Run
from rlhf.train.early_stop import KEPT_FIRST, KEPT_NEWEST, find_failure
from rlhf.train.observers import LogWriter, LoopState, Observers, StageStart
from rlhf.train.resume import CheckpointWriter, restore, settings_of
from rlhf.tree import all_finite

Advance = Callable[[int, LoopState, Observers], tuple[dict[str, float], LoopState]]
"""Function that makes one step: (step, state, observers) -> (metrics, state)."""


class _Loop(NamedTuple):
    """Arguments that all steps share."""

    run: Run
    executor: Executor
    observers: Observers
    advance: Advance
    first: int
    """Number of steps made by the run that is continued."""
    total: int
    kl_budget: float
    """KL budget in nats per completion; inf if there is none."""
    loss: str | None
    """Name of the training loss that should fall; None if there is none."""
    history: list[dict[str, float]]
    """Metrics of the first and of the newest steps since the start."""

    def describe(self, step: int) -> str:
        """Return the number of a step with its unit, such as `iteration 3`."""
        return f"{self.run.stage.unit} {step}"


def train(
    run: Run,
    executor: Executor,
    *,
    total: int,
    state: LoopState,
    identity: dict[str, Any],
    advance: Advance,
    kl_budget: float = math.inf,
    loss: str | None = None,
) -> LoopState:
    """Make the steps 0..total-1, or the remaining steps of a resumed run, with logs and checkpoints.

    Args:
        run: run of the stage.
        executor: executor that holds the trained models.
        total: number of steps.
        state: state at the first step.
        identity: values besides settings that a continuation must share, such as the digest of the data.
        advance: function that makes one step.
        kl_budget: nats per completion; a KL far above it ends the run. inf if there is no budget.
        loss: name of the training loss, whose rise ends the run. None if no loss has to fall.

    Returns:
        The last state.

    Raises:
        UserError: the checkpoint belongs to another configuration, data or shape, or saving fails.
        NonFiniteError: a step was refused. The batch is in nonfinite/, and the state is saved if it is finite.
        Interrupted: the run was asked to stop. The step is finished and the state is saved.
        WorkersLostError: more processes were lost than may be replaced. The step is finished and the state is saved.
    """
    config = run.config
    digests, settings = identity, settings_of(config, run.stage)
    identity = identity | settings | {"compiled": executor.compiled}
    first, state = restore(run, executor, state, identity, total)
    state_bytes = sum(tensor.numel() * tensor.element_size() for tensor in executor.snapshot().values())
    check_free_space(config.output_dir, state_bytes * (config.checkpoint.keep + 1))
    run.provenance = provenance_of(
        run.compute.device,
        precision=config.precision,
        threads=compute_threads(config),
        compiled=executor.compiled,
        digests=digests,
    )
    run.note(describe_provenance(run.provenance))
    write_config(config, run.stage, run.provenance)
    observers = Observers([LogWriter(), CheckpointWriter(run, executor, identity), *run.observers])
    loop = _Loop(run, executor, observers, advance, first, total, kl_budget, loss, [])
    run.stop.training = True
    notes = tuple(run.compute.notes)
    with observers.observe(StageStart(run.stage, config, first, total, notes, settings, run.provenance, run.units)):
        for step in range(first, total):
            state = _step(loop, step, state)
        peak = executor.peak_bytes()
        observers.event("end", step=total, peak_bytes=peak)
    largest = " in the largest worker" if config.dist.num_workers else ""
    run.note(f"peak memory {peak / 1e9:.2f} GB{largest}")
    return state


def _step(loop: _Loop, step: int, state: LoopState) -> LoopState:
    """Make one step, with its metrics, faults and checkpoint, and decide whether to stop."""
    run, observers, done = loop.run, loop.observers, step + 1
    version, start = loop.executor.version, time.perf_counter()
    try:
        metrics, state = loop.advance(step, state, observers)
    except NonFiniteError as error:
        where = _save_nonfinite(loop, step, state, error, is_whole=loop.executor.version == version)
        observers.event("nonfinite", step=step, message=str(error))
        message = f"{run.stage.name} {loop.describe(done)}: {error}; the update was refused. {where}"
        raise NonFiniteError(message) from error
    except UserError as error:  # for example of a reward function
        observers.event("failed", step=step, message=str(error))
        if loop.executor.version != version or step == loop.first:
            raise
        _save(loop, step, state)
        where = f"{run.stage.name} {loop.describe(step)} is saved; continue with --resume"
        raise UserError(f"{error}. {where}") from error
    seconds, faults = time.perf_counter() - start, loop.executor.faults()
    for fault in faults:
        observers.event("fault", step=done, **fault._asdict())
    metrics |= {"timing_s/step": seconds}
    if faults:
        metrics |= {"fault/restarts": len(faults), "fault/recovery_s": sum(fault.recovery_s for fault in faults)}
    if observers.step(done, metrics):
        run.stop.requested = True
    _check_progress(loop, step, state, metrics)
    stops = run.stop.requested or any(fault.final for fault in faults)
    every = run.config.checkpoint.every or run.stage.checkpoint_every
    if stops or done == loop.total or done % every == 0:
        _save(loop, done, state)
    if stops and done < loop.total:
        observers.event("interrupted", step=done)
        where = f"{run.stage.name}: stopped after {loop.describe(done)} of {loop.total} and saved"
        if run.stop.requested:
            raise Interrupted(f"{where}; continue with --resume", run.stop.signal)
        raise WorkersLostError(f"{where}; continue with --resume. The cause: lost {faults[-1].what}")
    return state


def _check_progress(loop: _Loop, step: int, state: LoopState, metrics: dict[str, float]) -> None:
    """Save and raise UserError if the stage has gone wrong."""
    run = loop.run
    loop.history.append(metrics)
    del loop.history[KEPT_FIRST:-KEPT_NEWEST]
    reason = find_failure(loop.history, kl_budget=loop.kl_budget, loss=loop.loss)
    if reason and run.config.stop_early and step + 1 < loop.total:
        loop.observers.event("failed", step=step + 1, message=reason)
        _save(loop, step + 1, state)
        raise UserError(
            f"{run.stage.name}: stopped after {loop.describe(step + 1)} of {loop.total} and saved, because {reason}. "
            "To go on all the same: --resume --no-stop-early"
        )


def _save(loop: _Loop, step: int, state: LoopState) -> None:
    """Save the state. Log and raise NonFiniteError if it is not finite."""
    try:
        loop.observers.save(step, state)
    except NonFiniteError as error:
        loop.observers.event("nonfinite", step=step, message=str(error))
        raise NonFiniteError(f"{loop.run.stage.name}, step {step}: {error}") from None


def _save_nonfinite(loop: _Loop, step: int, state: LoopState, error: NonFiniteError, *, is_whole: bool) -> str:
    """Write the offending batch, and the state if no part of the step was applied. Return a text with the files."""
    run = loop.run
    folder = run.config.output_dir / "nonfinite" / f"{run.stage.name}-step-{step + 1:06d}"
    tensors = loop.executor.snapshot()
    saved = is_whole and all_finite(tensors)
    manifest = {"stage": run.stage.name, "step": step, "message": str(error)}
    where = "The batch is" if saved else "Batch and state are"
    try:
        save_refused(folder, error.batch, None if saved else tensors, manifest)
        where += f" in {folder}"
    except UserError as problem:  # must not hide the error that is being reported
        where += f" not saved ({problem})"
    if not saved:
        return f"{where}; --resume continues from step {last_step(run.checkpoints) or 0}"
    _save(loop, step, state)
    return f"{where}, the state in {run.checkpoints}"
