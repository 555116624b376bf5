"""The context of the run of a stage: output folder, device, threads, keys and notes for the log."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.config import RunConfig
from rlhf.distributed.compute_context import (
    ComputeContext,
    check_workers,
    compute_threads,
    describe_workers,
    find_device,
    limit_threads,
    precision_warnings,
)
from rlhf.errors import Interrupted, NonFiniteError
from rlhf.execution.executor import Executor
from rlhf.execution.program import ModelState, Program
from rlhf.io.cache import default_cache_dir
from rlhf.io.files import check_writable, lock_folder
from rlhf.io.output_folder import check_output_folder, checkpoint_folder, has_checkpoints
from rlhf.io.provenance import Provenance
from rlhf.io.run_log import RunLog
from rlhf.random import Purpose, fold_in, key
from rlhf.stages import Stage, check_settings
from rlhf.train.observers import Observer
from rlhf.train.signals import StopRequest
from rlhf.tree import all_finite
from rlhf.types import Params
from rlhf.verdicts import Verdict


@dataclass
class Run:
    """Run of one stage."""

    stage: Stage
    config: RunConfig
    compute: ComputeContext
    observers: Sequence[Observer] = ()
    """Observers of the training, in addition to its log and checkpoints."""
    stop: StopRequest = field(default_factory=StopRequest)
    resources: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    """Resources that are closed when the stage ends."""
    is_saved: bool = False
    """True if an earlier run finished the stage, whose model folder is then left unchanged."""
    provenance: Provenance = field(default_factory=dict)
    """Provenance of the run, set when the training begins."""
    units: dict[str, str] = field(default_factory=dict)
    """Units of metrics for which this run differs from `rlhf.metrics`."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of forward and backward passes."""
        return self.compute.dtype

    @property
    def model_folder(self) -> Path:
        """Folder of this stage's model."""
        return self.config.output_dir / self.stage.folder

    @property
    def checkpoints(self) -> Path:
        """Folder of this stage's checkpoints."""
        return checkpoint_folder(self.config, self.stage)

    def key(self, purpose: Purpose) -> Tensor:
        """Return the key of the run for a purpose. Members of an ensemble share the key of the split alone."""
        shared = fold_in(key(self.config.seed), int(purpose))
        if self.stage.member is None or purpose is Purpose.SPLIT:
            return shared
        return fold_in(shared, self.stage.member)

    def note(self, text: str) -> None:
        """Show a line to the user and keep it for the log."""
        self.compute.note(text)

    def manifest(self, digests: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
        """Return the facts that the manifest of the stage's model holds.

        Args:
            digests: digests of the run's files, of which those of the data are kept.
            **facts: further facts about the model.
        """
        files = {name: digests[name] for name in ("data", "validation")}
        run = {"stage": self.stage.name, "seed": self.config.seed, "provenance": self.provenance}
        return run | files | facts

    def trained_params(self, executor: Executor, *values: float) -> Params:
        """Return the parameters to save as the stage's model.

        Args:
            executor: executor that holds the parameters.
            *values: measurements of the parameters.

        Raises:
            NonFiniteError: a parameter or value is not finite, although the last update was.
        """
        params = executor.params()
        if not (all_finite(params) and all(map(math.isfinite, values))):
            name = self.stage.name
            raise NonFiniteError(
                f"{name}: the trained model or its results are not finite; {self.model_folder} was not written. "
                f"The last state is in {self.checkpoints}; lower --{self.stage.section}.learning-rate"
            )
        return params

    def open_executor(self, make_program: Callable[[], Program], models: ModelState) -> Executor:
        """Open the executor of the configuration, which is closed when the stage ends.

        Args:
            make_program: importable function that returns the program, or a partial of one.
            models: initial state of the program.
        """
        if self.config.dist.num_workers:
            self.note(describe_workers(self.config.dist))
        executor = self.resources.enter_context(self.compute.open_executor(make_program, models))
        self.resources.callback(self._log_faults, executor)
        return executor

    def conclude(self, verdict: Verdict) -> Verdict:
        """Show the verdict on the stage's model, log it, and return it."""
        self.note(verdict.text)
        self._log("verdict", [verdict._asdict()])
        for observer in self.observers:
            observer.on_verdict(verdict)
        return verdict

    def _log_faults(self, executor: Executor) -> None:
        """Log faults after the last step, such as in the last evaluation, which no step's metrics include."""
        self._log("fault", [fault._asdict() for fault in executor.faults()])

    def _log(self, event: str, facts: Sequence[dict[str, Any]]) -> None:
        """Append events to the log after training."""
        if facts:
            folder = self.config.output_dir / "logs"
            with contextlib.closing(RunLog(folder, self.stage.name, tensorboard=False)) as log:
                for values in facts:
                    log.event(event, **values)


@contextlib.contextmanager
def open_run(
    config: RunConfig, stage: Stage, observers: Sequence[Observer] = (), stop: StopRequest | None = None
) -> Iterator[Run]:
    """Lock the output folder and set up device and threads for one stage.

    Args:
        config: configuration of the run.
        stage: stage to run.
        observers: observers of the training.
        stop: request to stop the run. None if nothing can stop it.

    Raises:
        UserError: settings contradict each other, the output folder is in use, it holds checkpoints of this stage
            although `resume` is off, it holds something else under the name of the model, or the requested GPU does
            not exist.
        Interrupted: a signal arrived before the first step, or after the last one, when the stage is finished.
    """
    check_workers(config.dist)
    idle = check_settings(config, stage)
    compute = ComputeContext(config, find_device(config.device), [], stage.name)
    run = Run(stage, config, compute, observers, stop or StopRequest())
    with lock_folder(config.output_dir), limit_threads(compute_threads(config)), _stopping(run), run.resources:
        check_output_folder(config, stage)
        run.is_saved = run.model_folder.exists()
        check_writable(config.output_dir, "--output-dir")
        for line in (*idle, *precision_warnings(config, compute.device)):
            run.note(line)
        check_writable(config.cache_dir or default_cache_dir(), "--cache-dir")
        if config.resume and not has_checkpoints(config):
            run.note(f"nothing to resume in {config.output_dir}; starting a new run")
        yield run
        if run.stop.signal:
            raise Interrupted(f"{stage.name}: stopped; this stage is finished and saved", run.stop.signal)


@contextlib.contextmanager
def _stopping(run: Run) -> Iterator[None]:
    """Set the stage of the stop request until the block ends."""
    run.stop.stage, run.stop.training = run.stage.name, False
    try:
        yield
    finally:
        run.stop.stage, run.stop.training = "", False
