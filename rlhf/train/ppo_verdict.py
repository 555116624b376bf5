"""The verdict on a policy by the log of its training."""

import math

import numpy as np

from rlhf.config import PPOConfig
from rlhf.monitor.log import LogReader
from rlhf.train.context import Run
from rlhf.verdicts import Verdict, ppo_verdict

SCORES = ("objective/scores", "objective/rlhf_reward", "objective/non_score_reward")
"""Metrics in the unit of the score."""

_LINES = 5
"""Lines at the end of the log whose mean is compared with the first line."""


def conclude_ppo(run: Run, settings: PPOConfig) -> Verdict | None:
    """Return the verdict on the policy after showing and logging it; None if the log holds too few iterations."""
    reader = LogReader(run.config.output_dir / "logs")
    reader.poll()
    scores, kls, ended = (
        reader.series(run.stage.name, name).values
        for name in ("objective/scores", "objective/kl", "response_length/ended")
    )
    if len(scores) < 2 * _LINES:
        return None
    means = [float(np.nanmean(values[-_LINES:])) for values in (scores, kls, ended)]
    verdict = ppo_verdict(
        score_before=float(scores[0]),
        score=means[0],
        error=float(np.nanstd(scores[-_LINES:], ddof=1)) * math.sqrt(1 + 1 / _LINES),
        kl=means[1],
        budget=settings.active_kl_budget,
        ended=means[2],
        must_end=settings.stop_at_eos and bool(settings.missing_eos_penalty),
        unit="standard deviations" if run.units else "reward units",
    )
    return run.conclude(verdict)
