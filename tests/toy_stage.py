"""A stage in one file: it learns how often each byte occurs in a text. Ray workers import it too."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rlhf.config import OptimizerConfig, RunConfig
from rlhf.errors import UserError
from rlhf.execution.program import ModelState, Program, StepSpec
from rlhf.io.files import atomic_folder, save_tensors, sha256
from rlhf.io.manifest import write_manifest
from rlhf.ranges import PositiveInt
from rlhf.setting_rules import Rule
from rlhf.stages import Stage, StageProgram, StageResult
from rlhf.train import Observer
from rlhf.train.context import open_run
from rlhf.train.loop import train
from rlhf.train.observers import LoopState, Observers
from rlhf.train.signals import StopRequest
from rlhf.train.stage_inputs import make_schedule
from rlhf.train.supervised import make_adamw


@dataclass(frozen=True, kw_only=True)
class BytesConfig(OptimizerConfig):
    """Frequencies of bytes."""

    steps: PositiveInt = 6
    """Optimiser steps."""
    batch_size: PositiveInt = 32
    """Bytes per step."""


@dataclass(frozen=True, kw_only=True)
class BytesRun(RunConfig):
    """rlhf-train bytes."""

    text: Path | None = None
    """What is learnt from."""
    bytes: BytesConfig = field(default_factory=BytesConfig)


def objective(params, frozen, batch):
    """Cross-entropy of bytes [n]."""
    loss = -torch.log_softmax(params["logits"], dim=0)[batch].sum()
    return loss, {"loss/bytes_sum": loss.detach(), "count": torch.tensor(len(batch))}


def make_bytes_program(settings: BytesConfig) -> Program:
    optimizer = make_adamw(settings, make_schedule(settings, settings.steps))
    return Program({"main": StepSpec(objective, optimizer, settings.max_grad_norm)}, {}, {})


def check_bytes(config: Any, models: Mapping[str, Any]) -> tuple[str, ...]:
    if config.text is None or not config.text.is_file():
        raise UserError(f"--text {config.text}: no such file")
    return tuple(models)  # for the tests


def run_bytes(config: Any, observers: Sequence[Observer] = (), stop: StopRequest | None = None) -> StageResult:
    settings = config.bytes
    with open_run(config, STAGE, observers, stop) as run:
        text = torch.tensor(list(config.text.read_bytes()))
        executor = run.open_executor(
            functools.partial(make_bytes_program, settings), ModelState({"logits": torch.zeros(256)}, {})
        )

        def advance(step: int, state: LoopState, observers: Observers) -> tuple[dict[str, float], LoopState]:
            batch = text.roll(-step * settings.batch_size)[: settings.batch_size]
            metrics = executor.step("main", list(batch.split(settings.micro_batch_size)))
            return metrics, {"read": state["read"] + len(batch)}

        identity = {"data": sha256(config.text)}
        state = train(run, executor, total=settings.steps, state={"read": 0}, identity=identity, advance=advance)
        if not run.is_saved:
            with atomic_folder(run.model_folder) as folder:
                save_tensors(folder / "model.safetensors", run.trained_params(executor))
                write_manifest(folder, {"stage": STAGE.name})
        return StageResult(run.model_folder, {"read": state["read"]})


STAGE = Stage(
    name="bytes",
    title="frequencies",
    help="Frequencies of bytes in a text.",
    config=BytesRun,
    program=StageProgram(check_bytes, run_bytes),
    folder="frequencies",
    data="text",
    schema="demonstrations",
    files={"text": "data"},
    rules=(Rule(("bytes.schedule",), lambda config: config.bytes.steps == 1, "has no effect on one step"),),
    unit="pass",
    checkpoint_every=2,
    shown=("loss/bytes",),
)
