"""Whole PPO iterations against the last TRL release with PPO."""

from pathlib import Path
from typing import Any

from benchmarks import material, ours, roofline
from benchmarks.bench import Bench
from benchmarks.compare import Work, compare_all

_TARGETS = {("separate", "fp32"): 1.6, ("separate", "best"): 3.2, ("shared", "best"): 5.0}
CRITICS = ("separate", "shared")
"""Ours: a model of its own, or a head on the policy's trunk."""
_FP32: tuple[dict[str, Any], ...] = ({},)
_BEST: tuple[dict[str, Any], ...] = (*_FP32, {"matmul": "medium"}, {"precision": "bf16"})


def run(bench: Bench) -> list[Path]:
    """Measure every row."""
    return compare_all("ppo", works(bench), bench)


def works(bench: Bench) -> list[Work]:
    """A separate critic on both sides; then a head on our policy's trunk against TRL's separate critic."""
    return [work(bench, critic, kind, target) for (critic, kind), target in _TARGETS.items()]


def work(bench: Bench, critic: str, kind: str, target: float) -> Work:
    """Generation, scoring and several epochs of updates.

    Args:
        bench: the run.
        critic: ours: separate or shared; TRL's is always separate.
        kind: fp32 or best.
        target: the ratio to reach.
    """
    size = material.SIZES[bench.size]
    _, epochs, minibatch, *_ = size.ppo
    settings = files(bench)
    return Work(
        f"{iteration(bench)}, {epochs} epochs of {minibatch}, {critic} critic, {kind}",
        "TRL 1.12 PPOTrainer",
        bench.ours("ppo", ours.COMPILED_FP32 if kind == "fp32" else ours.COMPILED_BEST, critic=critic, **settings),
        bench.theirs("trl_ppo:run", _FP32 if kind == "fp32" else _BEST, **settings),
        target,
        lambda number: _least(size, critic, number),
        exact=kind == "fp32",
    )


def files(bench: Bench) -> dict[str, Any]:
    """What an iteration loads, as both sides' settings."""
    made = bench.made
    return {"model": str(made.model), "reward": str(made.reward), "prompts_file": str(made.prompts)}


def iteration(bench: Bench) -> str:
    """What is rolled out in an iteration, in words."""
    size = material.SIZES[bench.size]
    return f"PPO iteration, {bench.size}, {size.ppo.prompts} prompts, {size.ppo.prompt}+{size.ppo.completion} tokens"


def _least(size: material.Size, critic: str, number_bytes: int) -> list[roofline.Phase]:
    """Reference, critic and reward model read every sequence once; policy and critic are updated in every epoch."""
    prompts, epochs, minibatch, prompt, completion = size.ppo
    length = prompt + completion
    tokens, predicted = prompts * length, prompts * completion
    weights = number_bytes * size.shape.parameters
    separate = critic == "separate"
    scored = [
        roofline.Phase(roofline.forward_flops(size.shape, tokens, length, logits), weights)
        for logits in ([predicted, 0, 0] if separate else [predicted, 0])
    ]
    updates = prompts // minibatch
    update = roofline.step(size.shape, tokens / updates, length, predicted / updates)
    if separate:
        update += roofline.step(size.shape, tokens / updates, length, 0)
    return [
        *roofline.generation(size.shape, prompts, prompt, completion, number_bytes),
        *scored,
        *(epochs * updates * update),
    ]
