"""The charts of the page and the plots: the question that each answers, and the metrics that it draws."""

from collections.abc import Iterable
from typing import NamedTuple

from rlhf.metrics import describe, in_order


class Chart(NamedTuple):
    """A chart of one or more metrics."""

    question: str
    """Heading of the section of the chart."""
    title: str
    metrics: tuple[str, ...]
    scatter: bool = False
    """True draws the first metric against the second instead of both over steps."""


QUESTIONS = {
    "Is the loss falling?": {"loss": "Loss", "accuracy": "Accuracy", "perplexity": "", "reward-loss": ""},
    "Does the reward model tell good from bad?": {
        "pair-accuracy": "Accuracy",
        "margin": "Margin",
        "length-correlation": "Correlation of reward with length",
        "held-out-rewards": "Rewards of held-out completions",
        "training-rewards": "Rewards of training completions",
    },
    "Does the policy tell chosen from rejected?": {
        "preference-loss": "Loss",
        "preference-accuracy": "Accuracy of implicit rewards",
        "implicit-rewards": "Implicit rewards",
        "held-out-implicit-rewards": "Implicit rewards of held-out pairs",
    },
    "Is the reward rising?": {
        "score": "",
        "equal-groups": "", "sources": "Rewards by source", "disagreement": "", "gold": "Gold scores",
    },
    "How far from the reference?": {"kl": "", "kl-penalty": "", "kl-coef": ""},
    "Is it over-optimised?": {"over-optimisation": "Score against √KL"},
    "Is the value function learning?": {"explained-variance": "", "value-loss": "", "value": "", "value-clip": ""},
    "Are the updates sound?": dict.fromkeys(
        (
            "update-kl", "clip", "ratio", "entropy", "surprise",
            "policy-loss", "kl-loss", "grad-norm", "lr", "updates",
        ), "",
    ),
    "How long are the completions?": {"length": "", "ended": ""},
    "Where does the time go?": {
        "phases": "Parts of the step", "step-time": "", "throughput": "", "restarts": "", "recovery": "",
    },
}  # fmt: skip
"""Questions in order, with the charts that answer them (`Metric.chart`) and the title of each; where that is empty, the
first metric's label is the title."""

SCATTERS = {"over-optimisation": ("objective/scores", "objective/kl")}
"""Charts of metrics that stand in other charts too."""

OTHERS = "Everything else"
"""Question of the charts that are not in `QUESTIONS`."""


def charts(keys: Iterable[str]) -> dict[str, Chart]:
    """Return the charts of the given metrics by name, in order; charts that are not in `QUESTIONS` come last."""
    keys = in_order(dict.fromkeys(keys))
    titles = {name: (question, title) for question, group in QUESTIONS.items() for name, title in group.items()}
    members: dict[str, list[str]] = {name: [] for name in titles}
    for key in keys:
        members.setdefault(describe(key).chart or f"{key} alone", []).append(key)
    members |= {name: list(pair) if set(pair) <= set(keys) else [] for name, pair in SCATTERS.items()}
    present = {}
    for name, metrics in members.items():
        if metrics:
            question, title = titles.get(name, (OTHERS, describe(metrics[0]).chart))
            present[name] = Chart(question, title or describe(metrics[0]).label, tuple(metrics), name in SCATTERS)
    return present


def curve_label(key: str, title: str) -> str:
    """Return a metric's name in a chart's legend: its label without the chart's title."""
    label = describe(key).label
    return label.partition(": ")[2] or label.removeprefix(f"{title}, ")
