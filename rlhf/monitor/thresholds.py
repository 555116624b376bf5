"""The thresholds of the health checks, each with its source."""

from typing import Literal, NamedTuple

Level = Literal["ok", "warning", "problem", "unknown"]
LEVELS: tuple[Level, ...] = ("ok", "unknown", "warning", "problem")
"""Levels in increasing order of severity."""


def worst(*levels: Level) -> Level:
    """Return the most serious of the given levels."""
    return max(levels, key=LEVELS.index)


class Threshold(NamedTuple):
    """The values at which a figure becomes a warning and a problem."""

    warning: float
    problem: float
    source: str

    def level(self, value: float) -> Level:
        """Return the level of a figure. If `problem` is below `warning`, low figures are bad."""
        sign = 1 if self.problem >= self.warning else -1
        return (
            "problem"
            if sign * value >= sign * self.problem
            else "warning"
            if sign * value >= sign * self.warning
            else "ok"
        )


_SINGHAL = "Singhal et al. 2023, https://arxiv.org/abs/2310.03716"

THRESHOLDS = {
    "negative-kl": Threshold(
        -0.1,
        -0.5,
        "nats per completion; below 0 by noise alone: a mean of k1 over 64 completions has a standard error of about "
        "sqrt(2 KL / 64), 0.06 at a KL of 0.1; the fault is that of TRL's training FAQ",
    ),
    "kl-level": Threshold(
        0.5,
        1.0,
        "nats per token, as completions differ in length; TRL's training FAQ asks for 0 to 10 nats, 0.2 per token at "
        "50 tokens; our demo settles at 0.15",
    ),
    "kl-growth": Threshold(3.0, 10.0, "now / middle of the run; steady growth gives 2, ours levels off"),
    "first-ratio": Threshold(0.01, 0.05, "|ratio - 1|; 1 by definition, and by our tests within 1e-5 in fp32"),
    "clip-fraction": Threshold(
        0.3, 0.5, "share of tokens; our demo's largest is 0.05, in the seventh iteration, and it ends near 0"
    ),
    "approx-kl": Threshold(
        0.1,
        0.5,
        "nats per token; Spinning Up stops an iteration at 0.015; our demo's median is 0.002, and its "
        "largest, in the eighth iteration, 0.06",
    ),
    "entropy-collapse": Threshold(
        0.2,
        0.05,
        "now / at the start; our demo halves it; near 0 nothing more is learnt: Cui et al. 2025, "
        "https://arxiv.org/abs/2505.22617",
    ),
    "length-growth": Threshold(
        2.0, 4.0, f"now / at the start; that PPO lengthens replies: {_SINGHAL}; the limits ours"
    ),
    "length-shrinkage": Threshold(0.5, 0.25, "now / at the start; our limits, the same downwards"),
    "over-optimisation": Threshold(
        4.0,
        8.0,
        "fall of the gold score from its best, in standard errors of the difference of two of eight means; "
        "by chance, the best is above the last by 4 in one run of 5,000; Gao et al. 2022, https://arxiv.org/abs/2210.10760",
    ),
    "value-function": Threshold(0.0, -0.5, "explained variance; 0 is what the mean of the returns reaches"),
    "reward-model-chance": Threshold(
        0.55, 0.52, "held-out accuracy; chance is 0.5 by definition, with a standard error of 0.03 on our 300 pairs"
    ),
    "reward-model-length": Threshold(
        0.5, 0.7, f"|correlation of reward and length|; {_SINGHAL}; 0.33 in our demo, where good replies are longer"
    ),
    "constant-rewards": Threshold(0.9, 0.99, "share of completions with the commonest score; our demo has 0.01"),
    "equal-groups": Threshold(
        0.5,
        0.9,
        "share of completions in groups of equal scores; our limits: half of the work, or nearly all, is in vain; "
        "Yu et al. 2025, section 3.2, https://arxiv.org/abs/2503.14476, sample until no such group is left",
    ),
    "repeated-text": Threshold(
        0.2,
        0.5,
        "share of 4-grams that the same text had before: seq-rep-4 of Welleck et al. 2020, "
        "https://arxiv.org/abs/1908.04319, where people have under 0.01 and greedy decoding over 0.4",
    ),
    "same-text": Threshold(0.5, 0.9, "share of the commonest completion over different prompts; our demo has 0.03"),
    "unfinished": Threshold(0.8, 0.5, "share that ended; our demo ends at 1.0"),
    "throughput": Threshold(0.5, 0.25, "tokens/s now / median before; single steps vary by 20% on our machine"),
    "overfitting": Threshold(1.05, 1.25, "held-out loss now / its lowest; our demo's only falls"),
}
"""Thresholds by name, each with its unit and source."""
