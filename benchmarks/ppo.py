"""Whole PPO iterations against the last TRL release with PPO."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import material, ours, roofline
from benchmarks.bench import Bench
from benchmarks.compare import Work, compare_all

_TARGETS = {("separate", "fp32"): 1.6, ("separate", "best"): 3.2, ("shared", "best"): 5.0}
CRITICS = ("separate", "shared")
"""Ours: a model of its own, or a head on the policy's trunk."""
PASSES = {"separate": ((True, False, False), (True, False)), "shared": ((True, False), (True,))}
"""Models that score and models that are updated, as `least` takes them: those with True need logits."""
FP32: tuple[dict[str, Any], ...] = ({},)
"""TRL's settings in IEEE fp32; its whole iterations are not compiled."""
BEST: tuple[dict[str, Any], ...] = (*FP32, {"matmul": "medium"}, {"precision": "bf16"})
"""All its settings."""


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
    settings = files(bench)
    return Work(
        f"{described('PPO', bench, size.ppo)}, {critic} critic, {kind}",
        "TRL 1.12 PPOTrainer",
        bench.ours("ppo", ours.COMPILED_FP32 if kind == "fp32" else ours.COMPILED_BEST, critic=critic, **settings),
        bench.theirs("trl_ppo:run", FP32 if kind == "fp32" else BEST, **settings),
        target,
        lambda number: least(size.shape, size.ppo, number, *PASSES[critic]),
        exact=kind == "fp32",
    )


def files(bench: Bench) -> dict[str, Any]:
    """What an iteration loads, as both sides' settings."""
    made = bench.made
    return {"model": str(made.model), "reward": str(made.reward), "prompts_file": str(made.prompts)}


def rolled_out(method: str, bench: Bench, iteration: material.Iteration) -> str:
    """What is rolled out in an iteration, in words."""
    samples = f" x {iteration.samples} completions" if iteration.samples > 1 else ""
    length = f"{iteration.prompt}+{iteration.completion} tokens"
    return f"{method} iteration, {bench.size}, {iteration.prompts} prompts{samples}, {length}"


def described(method: str, bench: Bench, iteration: material.Iteration) -> str:
    """What is done in an iteration, in words."""
    return f"{rolled_out(method, bench, iteration)}, {iteration.epochs} epochs of {iteration.minibatch}"


def least(
    shape: material.Shape | material.LlamaShape,
    iteration: material.Iteration,
    number_bytes: int,
    scoring: Sequence[bool],
    updated: Sequence[bool],
) -> list[roofline.Phase]:
    """The phases of an iteration.

    Args:
        shape: of every model.
        iteration: what is done.
        number_bytes: bytes of a number.
        scoring: for each model that reads every completion once, whether it needs logits.
        updated: the same for each model that is updated.
    """
    length = iteration.prompt + iteration.completion
    tokens, predicted = iteration.completions * length, iteration.completions * iteration.completion
    scored = [
        roofline.Phase(
            roofline.forward_flops(shape, tokens, length, predicted * logits), number_bytes * shape.parameters
        )
        for logits in scoring
    ]
    share = iteration.minibatch / iteration.completions
    update = [roofline.step(shape, share * tokens, length, share * predicted * logits) for logits in updated]
    rows, samples = iteration.completions, iteration.samples
    generated = roofline.generation(shape, rows, iteration.prompt, iteration.completion, number_bytes, samples)
    return [*generated, *scored, *itertools.chain(*(iteration.updates * update))]
