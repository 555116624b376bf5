"""What every stage shares: the run's folder, device and keys, and the loop that logs, saves, resumes and stops."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.config import RunConfig
from rlhf.distributed import open_executor
from rlhf.distributed.compute_context import (
    check_workers,
    compile_obstacle,
    compute_threads,
    describe_workers,
    find_device,
    limit_threads,
)
from rlhf.errors import Interrupted, NonFiniteError, UserError, WorkersLostError
from rlhf.execution.executor import Executor, Fault
from rlhf.execution.program import ModelState, Program
from rlhf.io.cache import default_cache_dir
from rlhf.io.checkpoint import Checkpoint, last_step, save_checkpoint, save_refused
from rlhf.io.files import check_free_space, check_writable, lock_folder
from rlhf.io.output_folder import MODEL_FOLDERS, check_output_folder, checkpoint_folder, write_config
from rlhf.io.progress import StageProgress, console
from rlhf.io.run_log import FORMAT, RunLog
from rlhf.io.terminal import visible
from rlhf.monitor.health import findings
from rlhf.monitor.report import write_report
from rlhf.random import Purpose, fold_in, key
from rlhf.setting_rules import check_settings
from rlhf.train.resume import Facts, restore, settings_of
from rlhf.train.signals import StopRequest, stop_on_signal
from rlhf.train.sink import open_sink
from rlhf.tree import all_finite, leaves
from rlhf.types import Params

_CHECKPOINT_EVERY = {"sft": 100, "reward": 100, "ppo": 10}
"""Where the configuration does not say; a PPO iteration is as much work as many steps."""

_COMPILED_GAIN, _FLOPS, _COMPILE_S, _COMPILE_FORWARD_S = 0.25, 1e11, 0.45, 0.25
"""Measured on two cores: what compilation takes off a step, floating-point operations per second of an eager one, and
seconds of compilation per parameter tensor of gradients, and of what is only evaluated."""


class StageResult(NamedTuple):
    """What a stage leaves behind."""

    model: Path
    """The model folder."""
    metrics: dict[str, float]
    """Its last evaluation."""


@dataclass
class Run(StopRequest):
    """One stage of one run."""

    config: RunConfig
    device: torch.device
    dtype: torch.dtype
    notes: list[str] = field(default_factory=list)
    """What was said to the user before training, for the log."""
    resources: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    """What is to be closed when the stage ends."""
    is_saved: bool = False
    """Whether the stage was finished before: its model is then left as it is."""

    def key(self, purpose: Purpose) -> Tensor:
        """The run's key for one purpose."""
        return fold_in(key(self.config.seed), int(purpose))

    def note(self, text: str) -> None:
        """Tell the user something and keep it for the log."""
        self.notes.append(text)
        _say(self.stage, text)

    @property
    def model_folder(self) -> Path:
        """Where this stage's model goes."""
        return self.config.output_dir / MODEL_FOLDERS[self.stage]

    def trained(self, executor: Executor, *figures: float) -> Params:
        """The parameters to be saved as the stage's model.

        Args:
            executor: has them.
            figures: what was measured of them.

        Raises:
            NonFiniteError: a parameter or figure is not finite, after the last update was.
        """
        params = executor.params()
        if not (all_finite(params) and all(map(math.isfinite, figures))):
            raise NonFiniteError(
                f"{self.stage}: the trained model, or what it gives, is not finite; {self.model_folder} was not "
                f"written. The last state is in {self.checkpoints}; lower --{self.stage}.learning-rate"
            )
        return params

    def open_executor(self, make_program: Callable[[], Program], models: ModelState) -> Executor:
        """The executor that the configuration asks for; it is closed when the stage ends.

        Args:
            make_program: an importable function, or a partial of one.
            models: what the program starts from.
        """
        dist = self.config.dist
        if dist.num_workers:
            self.note(describe_workers(dist))
        executor = self.resources.enter_context(
            open_executor(make_program, models, dist, device=self.device, tell=self.note)
        )
        self.resources.callback(self._log_faults, executor)
        return executor

    def _log_faults(self, executor: Executor) -> None:
        """What went wrong after the last step, as in a last evaluation, of which no step's metrics tell."""
        if faults := executor.faults():
            with contextlib.closing(RunLog(self.config.output_dir / "logs", self.stage, tensorboard=False)) as log:
                for fault in faults:
                    log.event("fault", **fault._asdict())

    def compile_to(self, models: ModelState, tokens: float, *, evaluated: Sequence[Params] = ()) -> Path | None:
        """Where compiled code is kept; None where the stage is not to be compiled, or not worth it.

        Args:
            models: what is trained.
            evaluated: models that compiled code also runs without gradients.
            tokens: that gradients are taken of in the whole run; never what a resumed run has left, nor anything that
                depends on workers or threads, because the choice is part of the result's bits.

        Raises:
            UserError: as `compile_obstacle`.
        """
        config = self.config
        sizes = [leaf.numel() for leaf in leaves(models.params)]
        saved_s = _COMPILED_GAIN * 6 * sum(sizes) * tokens / _FLOPS
        cost_s = _COMPILE_S * len(sizes) + _COMPILE_FORWARD_S * len(leaves(evaluated))
        if config.compile == "off" or (config.compile == "auto" and saved_s < 2 * cost_s):
            return None
        if obstacle := compile_obstacle(config, self.stage, getattr(config, self.stage)):
            self.note(f"not compiled, though it would be faster: {obstacle}")
            return None
        folder = (config.cache_dir or default_cache_dir()) / "compiled"
        self.note(f"compiling: about {cost_s:.0f} s the first time; the code is kept in {folder}")
        return folder

    @property
    def checkpoints(self) -> Path:
        """Where this stage's checkpoints are."""
        return checkpoint_folder(self.config, self.stage)


@contextlib.contextmanager
def open_run(config: RunConfig, stage: str) -> Iterator[Run]:
    """Take hold of the output folder and set up device, threads and signals for one stage.

    Raises:
        UserError: settings contradict each other; the folder is in use or holds this stage's checkpoints although
            `resume` is off, or what is none of its models; or no GPU is there though one was asked for.
        Interrupted: a signal came before the first step, or after the last: the stage is then finished.
    """
    check_workers(config.dist)
    idle = check_settings(config, stage)
    run = Run(
        stage, config, find_device(config.device), torch.bfloat16 if config.precision == "bf16" else torch.float32
    )
    with lock_folder(config.output_dir), stop_on_signal(run), limit_threads(compute_threads(config)), run.resources:
        check_output_folder(config, stage)
        run.is_saved = run.model_folder.exists()
        check_writable(config.output_dir, "--output-dir")
        for line in idle:
            run.note(line)
        check_writable(config.cache_dir or default_cache_dir(), "--cache-dir")
        if config.resume and all(last_step(checkpoint_folder(config, name)) is None for name in MODEL_FOLDERS):
            run.note(f"nothing to resume in {config.output_dir}: starting anew")
        yield run
        if run.stop_signal:
            raise Interrupted(f"{stage}: stopped; this stage is finished and saved", run.stop_signal)


def train(
    run: Run,
    executor: Executor,
    *,
    total: int,
    unit: str,
    shown: tuple[str, ...],
    facts: Facts,
    identity: Facts,
    advance: Callable[[int, Facts, RunLog], tuple[dict[str, float], Facts]],
) -> Facts:
    """Run steps 0..total-1, logging each, saving every few, resuming where a checkpoint stands.

    Args:
        run: the stage.
        executor: holds everything trained.
        total: steps.
        unit: what a step is called.
        shown: metrics on the progress display.
        facts: start values of what `advance` carries along.
        identity: what else must not change between a run and its continuation, such as the data's digest.
        advance: (step, facts, log) -> (metrics, facts): makes one step.

    Returns:
        The last facts.

    Raises:
        UserError: the checkpoint belongs to another configuration, data or shape, or saving fails.
        NonFiniteError: a step was refused; the state, where it is finite, is saved, and the batch goes to nonfinite/.
        Interrupted: SIGINT or SIGTERM came; the step was finished and the state saved.
        WorkersLostError: more processes were lost than may be replaced; the same.
    """
    config = run.config
    identity = identity | settings_of(config, run.stage) | {"compiled": executor.compiled}
    start, facts = restore(config, run.stage, run.checkpoints, executor, facts, identity, tell=run.note)
    every = config.checkpoint.every or _CHECKPOINT_EVERY[run.stage]
    state_bytes = sum(tensor.numel() * tensor.element_size() for tensor in executor.snapshot().values())
    check_free_space(config.output_dir, state_bytes * (config.checkpoint.keep + 1))
    write_config(config)

    def save(step: int) -> None:
        plain: Facts = {"carried": facts, "identity": identity}
        plain |= {"threads": compute_threads(config), "workers": config.dist.num_workers}
        _save_state(run, executor, log, step, plain)

    log = RunLog(
        config.output_dir / "logs",
        run.stage,
        after_step=start if config.resume else None,
        tensorboard=config.log.tensorboard,
        sink=open_sink(config.log.sink),
    )
    run.training = True
    with _report_at_end(run), contextlib.closing(log), StageProgress(run.stage, total, unit, shown) as progress:
        log.event("resume" if start else "start", format=FORMAT, step=start, total=total, unit=unit, notes=run.notes)
        progress.update(start, {})
        for step in range(start, total):
            version, begun = executor.version, time.perf_counter()
            try:
                metrics, facts = advance(step, facts, log)
            except NonFiniteError as error:
                where = _save_nonfinite(run, executor, step, error, save if executor.version == version else None)
                log.event("nonfinite", step=step, message=str(error))
                raise NonFiniteError(
                    f"{run.stage} {unit} {step + 1}: {error}; the update was refused. {where}"
                ) from error
            except UserError as error:  # as of a reward function
                log.event("failed", step=step, message=str(error))
                if executor.version != version or step == start:
                    raise
                save(step)
                raise UserError(f"{error}. {run.stage} {unit} {step} is saved; continue with --resume") from error
            seconds, faults = time.perf_counter() - begun, executor.faults()
            metrics |= {"timing_s/step": seconds} | _fault_metrics(faults, step + 1, log)
            ends_early = bool(run.stop_signal) or any(fault.final for fault in faults)
            if (step + 1) % config.log.every == 0 or step + 1 == total:
                log.metrics(step + 1, metrics)
            progress.update(step + 1, metrics)
            if ends_early or step + 1 == total or (step + 1) % every == 0:
                save(step + 1)
            if ends_early and step + 1 < total:
                log.event("interrupted", step=step + 1)
                where = f"{run.stage}: stopped after {unit} {step + 1} of {total} and saved; continue with --resume"
                if run.stop_signal:
                    raise Interrupted(where, run.stop_signal)
                raise WorkersLostError(f"{where}. The cause: lost {faults[-1].what}")
        peak = executor.peak_bytes()
        log.event("end", step=total, peak_bytes=peak)
    largest = " in the largest worker" if config.dist.num_workers else ""
    run.note(f"at most {peak / 1e9:.2f} GB of memory{largest}")
    return facts


def _fault_metrics(faults: Sequence[Fault], step: int, log: RunLog) -> dict[str, float]:
    """Metrics of what went wrong in a step, and a line in the log for each."""
    for fault in faults:
        log.event("fault", step=step, **fault._asdict())
    recovery_s = sum(fault.recovery_s for fault in faults)
    return {"fault/restarts": len(faults), "fault/recovery_s": recovery_s} if faults else {}


@contextlib.contextmanager
def _report_at_end(run: Run) -> Iterator[None]:
    """Write report/report.html and say what is wrong, however the stage ends, but for Ctrl-C twice.

    A run never fails for its report.
    """
    logs, path = run.config.output_dir / "logs", run.config.output_dir / "report" / "report.html"
    try:
        yield
    finally:
        if not isinstance(sys.exception(), KeyboardInterrupt):
            try:
                (reader,) = write_report([logs], path)
                found = [finding for finding in findings(reader) if finding.stage == run.stage]
                bad = [finding for finding in found if finding.level == "problem"]
                told = [f"PROBLEM {finding.check}: {finding.summary}; {finding.advice}" for finding in bad]
                said = [f"report in {path}", *told]
            except Exception as error:  # whatever it is, the models are worth more
                said = [f"{path}: not written ({error})"]
            for line in said:
                _say(run.stage, visible(line))


def _say(stage: str, text: str) -> None:
    console.print(f"[bold]{stage}[/]: ", end="")
    console.print(text, markup=False, soft_wrap=True)


def _save_state(run: Run, executor: Executor, log: RunLog, step: int, facts: Facts) -> None:
    """Write a checkpoint; raise NonFiniteError for a state that is not finite, which would replace a good one."""
    state = executor.snapshot()
    if bad := [name for name, tensor in state.items() if not all_finite(tensor)]:
        message = (
            f"{bad[0]} is not finite after the last update, though its gradient was; no checkpoint was written, and "
            f"those before stay. Raise --{run.stage}.adam-eps, or lower --{run.stage}.learning-rate"
        )
        log.event("nonfinite", step=step, message=message)
        raise NonFiniteError(f"{run.stage}, step {step}: {message}")
    checkpoint = Checkpoint(step, state, facts | {"version": executor.version})
    save_checkpoint(run.checkpoints, checkpoint, keep=run.config.checkpoint.keep)


def _save_nonfinite(
    run: Run, executor: Executor, step: int, error: NonFiniteError, save: Callable[[int], None] | None
) -> str:
    """Write the offending batch, and the state: as a checkpoint where nothing of the step was applied yet."""
    folder = run.config.output_dir / "nonfinite" / f"{run.stage}-step-{step + 1:06d}"
    state = executor.snapshot()
    saved = save is not None and all_finite(state)
    facts = {"stage": run.stage, "step": step, "message": str(error)}
    where = "The batch is" if saved else "Batch and state are"
    try:
        save_refused(folder, error.batch, None if saved else state, facts)
        where += f" in {folder}"
    except UserError as problem:  # which does not hide the error that is being reported
        where += f" not saved ({problem})"
    if save is None or not saved:
        return f"{where}; --resume goes on from step {last_step(run.checkpoints) or 0}"
    save(step)
    return f"{where}, the state in {run.checkpoints}"
