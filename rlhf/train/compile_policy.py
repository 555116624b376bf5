"""The decision whether to compile a stage: if it can be compiled and the run is long enough to make up for it."""

from collections.abc import Sequence
from pathlib import Path

import torch

from rlhf.config import OptimizerConfig, RunConfig, SFTConfig
from rlhf.distributed.compute_context import find_device
from rlhf.errors import UserError
from rlhf.execution.compiled import has_compiler
from rlhf.io.cache import default_cache_dir
from rlhf.stages import Stage
from rlhf.train.context import Run
from rlhf.tree import leaves
from rlhf.types import Params

_SAVED_S = {torch.float32: 1e-9, torch.bfloat16: 2.5e-9}
"""Seconds that compilation saves per token and value that the forward pass puts into or takes out of a matrix product.
It speeds up what is between the products. Measured on two cores, with models from 4 layers of 128 to 30 of 576."""

_COMPILE_S, _COMPILE_FORWARD_S = 0.45, 0.25
"""Seconds of compilation per parameter tensor with and without gradients."""


def compile_obstacle(config: RunConfig, stage: Stage) -> str:
    """Return the reason why a stage cannot be compiled with its settings on this machine, or an empty text.

    Raises:
        UserError: there is an obstacle and the setting is `--compile on`.
    """
    settings: OptimizerConfig = stage.section_of(config)
    obstacle = ""
    if settings.gradient_checkpointing:
        obstacle = f"compiled code would keep what --{stage.section}.gradient-checkpointing computes again"
    elif isinstance(settings, SFTConfig) and settings.dropout:
        obstacle = f"dropout's code would be another for every shape: set --{stage.section}.dropout 0"
    elif find_device(config.device).type == "cpu" and not has_compiler():
        obstacle = "no C++ compiler is on the PATH: install g++"
    if obstacle and config.compile == "on":
        raise UserError(f"--compile on: {obstacle}; or use --compile off")
    return obstacle


def compile_folder(run: Run, params: Params, tokens: float, *, evaluated: Sequence[Params] = ()) -> Path | None:
    """Return the folder for compiled code, or None if the stage is not compiled.

    Args:
        run: run of the stage.
        params: trained parameters.
        tokens: number of tokens with gradients in the whole run. It must not depend on the step that a run is resumed
            from, on workers or on threads, because the decision changes the bits of the result.
        evaluated: models that compiled code runs without gradients.

    Raises:
        UserError: the stage cannot be compiled and the setting is `--compile on`.
    """
    config = run.config
    trained = leaves(params)
    values = sum(sum(leaf.shape) for leaf in trained if leaf.ndim == 2)
    cost_s = _COMPILE_S * len(trained) + _COMPILE_FORWARD_S * len(leaves(evaluated))
    is_long = _SAVED_S[run.dtype] * values * tokens > cost_s
    if config.compile == "off" or (config.compile == "auto" and not is_long):
        return None
    if obstacle := compile_obstacle(config, run.stage):
        run.note(f"not compiled, though it would be faster: {obstacle}")
        return None
    folder = (config.cache_dir or default_cache_dir()) / "compiled"
    run.note(f"compiling: about {cost_s:.0f} s the first time; the code is kept in {folder}")
    return folder
