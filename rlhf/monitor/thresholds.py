"""Where the health checks draw their lines, and why there."""

from typing import Literal, NamedTuple

Level = Literal["ok", "warning", "problem", "unknown"]
LEVELS: tuple[Level, ...] = ("ok", "unknown", "warning", "problem")
"""The more serious later."""


def worst(*levels: Level) -> Level:
    """The most serious of some levels."""
    return max(levels, key=LEVELS.index)


class Threshold(NamedTuple):
    """Where a figure becomes a warning and where a problem."""

    warning: float
    problem: float
    source: str

    def level(self, value: float) -> Level:
        """How bad a figure is; where `problem` is the smaller of the two, small is bad."""
        sign = 1 if self.problem >= self.warning else -1
        return (
            "problem"
            if sign * value >= sign * self.problem
            else "warning"
            if sign * value >= sign * self.warning
            else "ok"
        )


THRESHOLDS = {
    "negative-kl": Threshold(
        -0.1,
        -0.5,
        "nats per completion; the mean of k1 over 64 completions has a standard error of about "
        "sqrt(2 KL / 64), under 0.06 at a KL of 0.1; TRL's FAQ on negative KL",
    ),
    "kl-level": Threshold(
        0.5,
        1.0,
        "nats per token; Gao et al. 2022 see gold scores fall before 100 nats per 200-token reply; "
        "Stiennon et al. 2020 use up to 25 nats per 48; our demo settles at 0.28",
    ),
    "kl-growth": Threshold(3.0, 10.0, "now / middle of the run; steady growth gives at most 2; our measurement"),
    "first-ratio": Threshold(0.01, 0.05, "|ratio - 1|; 1 by definition, within 1e-4 in fp32 and 1e-2 in bf16 (ours)"),
    "clip-fraction": Threshold(0.3, 0.5, "share of tokens; Huang et al. 2024 stay under 0.2, our demo under 0.16"),
    "approx-kl": Threshold(
        0.1,
        0.5,
        "nats per token; early stopping is usual at 0.015 (Spinning Up) to 0.1 (TRL's target_kl of old); "
        "our demo's median is 0.02",
    ),
    "entropy-collapse": Threshold(
        0.2,
        0.05,
        "now / at the start; our demo halves it; near 0 nothing more is learnt (Cui et al. 2025, "
        "https://arxiv.org/abs/2505.22617)",
    ),
    "length-growth": Threshold(
        2.0, 4.0, "now / at the start; PPO lengthened replies up to 2 times, Singhal et al. 2023"
    ),
    "length-shrinkage": Threshold(0.5, 0.25, "now / at the start; the same, downwards"),
    "over-optimisation": Threshold(
        4.0, 8.0, "fall of the gold score from its best in standard errors; Gao et al. 2022, figure 1, has the shape"
    ),
    "value-function": Threshold(0.0, -0.5, "explained variance; 0 is what the mean of the returns reaches"),
    "reward-model-chance": Threshold(
        0.55,
        0.52,
        "held-out accuracy; chance is 0.5 with a standard error of 0.03 on 300 pairs; published models "
        "reach 0.63 to 0.76",
    ),
    "reward-model-length": Threshold(
        0.5,
        0.7,
        "|correlation of reward and length|; Singhal et al. 2023, table 1; 0.31 in our demo, where good "
        "replies are longer",
    ),
    "constant-rewards": Threshold(0.9, 0.99, "share of completions with the commonest score; our measurement"),
    "repeated-text": Threshold(
        0.2,
        0.5,
        "share of 4-grams that were there before in the same text (rep-4, Welleck et al. 2020: people 0.00, "
        "greedy GPT-2 above 0.4)",
    ),
    "same-text": Threshold(0.5, 0.9, "share of the commonest completion over different prompts; our demo 0.1"),
    "unfinished": Threshold(0.8, 0.5, "share that ended; our demo has 1.0"),
    "throughput": Threshold(0.5, 0.25, "tokens/s now / median before; single steps vary by 20% on our machine"),
    "overfitting": Threshold(1.05, 1.25, "held-out loss now / its lowest; evaluation varies by 1% on 300 records"),
}
"""In one place, each with the unit and where it comes from."""
