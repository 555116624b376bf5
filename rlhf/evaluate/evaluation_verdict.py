"""The sentence under an evaluation's table."""

from pathlib import Path

from rlhf.evaluate.evaluation_result import Evaluation
from rlhf.verdicts import Verdict, policy_verdict, reward_verdict, sft_verdict

_TRAINED = ("trained on", "learnt from")
"""Words in the origin of test data that the model has seen."""


def judge_evaluation(evaluation: Evaluation, reward_model: Path | None) -> str:
    """Return the verdict on an evaluation's figures; empty for a policy that is compared with no other model.

    Args:
        evaluation: the evaluation of one model.
        reward_model: the folder of the reward model that the policy was trained on; None if there is none.
    """
    if evaluation.kind == "policy":
        verdict = _policy(evaluation, reward_model)
        return verdict.text if verdict is not None else ""
    text = (_sft if evaluation.kind == "sft" else _reward)(evaluation).text
    if evaluation.data.origin.startswith("which") and any(words in evaluation.data.origin for words in _TRAINED):
        text = text.replace(" held-out", "")
        return f"{text} The model was trained on these records: the figures say nothing about new text."
    if any(words in evaluation.data.origin for words in _TRAINED):
        return f"{text} But {evaluation.data.origin}: the figures are better than on new text."
    return text


def _sft(evaluation: Evaluation) -> Verdict:
    figure = evaluation.figures["model"]["eval/perplexity"]
    return sft_verdict(figure.value, evaluation.facts["unigram_perplexity"], figure.n)


def _reward(evaluation: Evaluation) -> Verdict:
    figures = evaluation.figures["model"]
    accuracy = figures["eval/reward/accuracy"]
    return reward_verdict(
        accuracy.value,
        accuracy.n,
        bag_of_words=figures["eval/baseline/bag_of_words"].value,
        longer=figures["eval/baseline/longer"].value,
    )


def _policy(evaluation: Evaluation, reward_model: Path | None) -> Verdict | None:
    """Return the verdict by the first judge that is not the reward model, or else by that."""
    wins = evaluation.figures.get("wins", {})
    names = [name.removeprefix("eval/win_rate/") for name in wins if name.startswith("eval/win_rate/")]
    if not names:
        return None
    own = reward_model.name if reward_model is not None else ""
    judge = next((name for name in names if name != own), own)
    figure = wins[f"eval/win_rate/{judge}"]
    return policy_verdict(
        judge="the reward model" if judge == own else judge,
        wins=(figure.value, figure.low, figure.high),
        prompts=figure.n,
        against=evaluation.against,
        is_own_reward=judge == own,
        ended=evaluation.figures["policy"]["eval/ended"].value,
    )
