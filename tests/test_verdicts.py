"""One sentence about each model, by its figures; and the rules that end a stage that has gone wrong."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

import rlhf.train.ppo_verdict
from rlhf.config import PipelineRun, PPOConfig
from rlhf.evaluate.baselines import unigram_perplexity
from rlhf.stages import STAGES
from rlhf.train.early_stop import KEPT_FIRST, KEPT_NEWEST, find_failure
from rlhf.verdicts import dpo_verdict, policy_verdict, ppo_verdict, reward_verdict, sft_verdict

PPO = {
    "score_before": -0.1,
    "score": 1.2,
    "error": 0.1,
    "kl": 5.0,
    "budget": 10.0,
    "ended": 1.0,
    "must_end": True,
    "unit": "sd",
}
POLICY = {"judge": "mine", "prompts": 90, "against": "sft", "is_own_reward": False, "ended": 1.0}


def test_a_reward_model_that_loses_to_a_bag_of_words_is_sand():
    verdict = reward_verdict(0.617, 200, bag_of_words=0.783, longer=0.51)
    assert not verdict.sound
    assert verdict.text.startswith(
        "The reward model orders 62% of 200 held-out pairs, worse than a bag of words (78%): do not optimise it yet."
    )


@pytest.mark.parametrize(
    ("accuracy", "pairs", "bag", "longer", "sound", "words"),
    [
        (0.60, 1000, 0.55, 0.70, False, "worse than always choosing the longer (70%)"),
        (0.60, 1000, 0.55, 0.30, False, "worse than always choosing the shorter (70%)"),
        (0.51, 1000, 0.50, 0.50, False, "a coin"),
        (0.70, 1000, 0.69, 0.50, True, "about as many as a bag of words (69%)"),
        (0.80, 1000, 0.60, 0.50, True, "it can be optimised"),
        (0.80, 1000, math.nan, 0.50, True, "it can be optimised"),
        (0.62, 20, 0.78, 0.50, True, "about as many"),  # twenty pairs do not tell the two apart
    ],
)
def test_a_reward_model_is_judged_by_its_baselines(accuracy, pairs, bag, longer, sound, words):
    verdict = reward_verdict(accuracy, pairs, bag_of_words=bag, longer=longer)
    assert verdict.sound is sound or (verdict.sound is False and "coin" in verdict.text and pairs == 20)
    assert words in verdict.text or pairs == 20


@given(accuracy=st.floats(0, 1), bag=st.floats(0, 1), longer=st.floats(0, 1), pairs=st.integers(1, 10**5))
def test_a_better_reward_model_is_never_judged_worse(accuracy, bag, longer, pairs):
    verdict = reward_verdict(accuracy, pairs, bag_of_words=bag, longer=longer)
    better = reward_verdict(min(accuracy + 0.1, 1.0), pairs, bag_of_words=bag, longer=longer)
    assert better.sound or not verdict.sound
    assert verdict.text.endswith(".")


@pytest.mark.parametrize(
    ("accuracy", "pairs", "sound", "words"),
    [
        (0.70, 200, True, "70% of 200 held-out pairs (95% interval 63% to 76%; a coin 50%, the longer 55%, a bag of"),
        (0.60, 50, False, "cannot be told from a coin"),
        (0.20, 50, False, "not swapped"),
        (1.00, 2, False, "cannot be told"),
    ],
)
def test_a_policy_of_dpo_is_judged_by_wilsons_interval(accuracy, pairs, sound, words):
    verdict = dpo_verdict(accuracy, pairs, bag_of_words=0.6, longer=0.55)
    assert verdict.sound is sound
    assert words in verdict.text
    low, high = binomtest(round(accuracy * pairs), pairs).proportion_ci(method="wilson")  # SciPy's
    assert f"{low:.0%} to {high:.0%}" in verdict.text
    assert "bag of words" not in dpo_verdict(accuracy, pairs, bag_of_words=math.nan, longer=0.55).text


def test_a_language_model_is_judged_by_token_frequencies():
    assert sft_verdict(100.0, 400.0, 80).sound
    poor = sft_verdict(390.0, 400.0, 80)
    assert not poor.sound
    assert "390" in poor.text
    assert "--sft.epochs" in poor.text
    assert not sft_verdict(math.nan, 400.0, 80).sound


def test_unigram_perplexity_is_that_of_smoothed_counts():
    train, held_out = [np.array([0, 0, 1])], [np.array([0, 2])]
    probabilities = np.array([3, 2, 1]) / 6  # counts 2, 1, 0, plus one
    expected = math.exp(-(math.log(probabilities[0]) + math.log(probabilities[2])) / 2)
    assert unigram_perplexity(train, held_out, 3) == pytest.approx(expected)
    uniform = [np.arange(7)]
    assert unigram_perplexity(uniform, uniform, 7) == pytest.approx(7)


@pytest.mark.parametrize(
    ("changes", "sound", "words"),
    [
        ({}, True, "rose from -0.10 to +1.20 sd at a KL of 5 nats"),
        ({"kl": 53.0}, False, "left its reference"),
        ({"ended": 0.1}, False, "only 10% of its completions end"),
        ({"ended": 0.1, "must_end": False}, True, "rose"),
        ({"score": -0.2}, True, "has not gained measurably"),
        ({"score": 0.05}, True, "has not gained measurably"),
        ({"score": -0.4}, False, "has become worse"),
        ({"kl": 53.0, "budget": math.inf}, True, "rose"),
    ],
)
def test_a_policy_is_judged_by_its_last_iterations(changes, sound, words):
    verdict = ppo_verdict(**(PPO | changes))
    assert verdict.sound is sound
    assert words in verdict.text


@pytest.mark.parametrize(
    ("wins", "changes", "sound", "words"),
    [
        ((0.7, 0.6, 0.8), {}, True, "is preferred to sft by mine: it wins on 70% of 90 prompts (95% interval 60% to"),
        ((0.5, 0.4, 0.6), {}, False, "cannot be told from"),
        ((0.3, 0.2, 0.4), {}, False, "loses to"),
        ((1.0, math.nan, math.nan), {}, True, "is preferred to"),
        ((0.7, 0.6, 0.8), {"ended": 0.2}, False, "only 20% of its completions end"),
        ((0.7, 0.6, 0.8), {"is_own_reward": True}, True, "judge it by another one"),
    ],
)
def test_a_policy_is_judged_against_another_model(wins, changes, sound, words):
    verdict = policy_verdict(wins=wins, **(POLICY | changes))
    assert verdict.sound is sound
    assert words in verdict.text


def history(values, name="objective/kl"):
    return [{name: value} for value in values]


def test_a_stage_ends_when_its_kl_is_far_above_the_budget_and_stays_there():
    assert find_failure(history([1, 2, 50, 50, 50, 50]), kl_budget=10.0) == ""
    assert "50 nats" in find_failure(history([1, 50, 50, 50, 50, 50]), kl_budget=10.0)
    assert find_failure(history([1, 50, 50, 39, 50, 50]), kl_budget=10.0) == ""
    assert find_failure(history([50] * 9)) == "", "no budget, no failure"


def test_a_stage_ends_when_its_loss_rises_far_above_its_start():
    count = KEPT_FIRST + KEPT_NEWEST
    assert find_failure(history([5.0] * count, "loss/sft"), loss="loss/sft") == ""
    rising = history([5.0] * KEPT_FIRST + [9.0] * KEPT_NEWEST, "loss/sft")
    assert "from 5 to 9" in find_failure(rising, loss="loss/sft")
    slow = history([5.0] * KEPT_FIRST + [7.0] * KEPT_NEWEST, "loss/sft")
    assert find_failure(slow, loss="loss/sft") == "", "a rise by less than half is noise or overfitting"
    assert find_failure(rising[:-1], loss="loss/sft") == "", "too few to tell"
    spike = history([5.0] * (count - 1) + [90.0], "loss/sft")
    assert find_failure(spike, loss="loss/sft") == "", "one step is no trend"


@pytest.mark.parametrize(("stops", "must_end"), [(True, True), (False, False)])
def test_a_policy_has_to_end_its_completions_only_where_it_can(monkeypatch, stops, must_end):
    seen = {}
    ones = SimpleNamespace(values=np.ones(10))
    reader = SimpleNamespace(poll=lambda: True, series=lambda stage, name: ones)
    monkeypatch.setattr(rlhf.train.ppo_verdict, "LogReader", lambda folder: reader)
    monkeypatch.setattr(rlhf.train.ppo_verdict, "ppo_verdict", lambda **arguments: seen.update(arguments))
    run = SimpleNamespace(config=PipelineRun(), stage=STAGES["ppo"], units={}, conclude=lambda verdict: verdict)
    rlhf.train.ppo_verdict.conclude_ppo(run, PPOConfig(stop_at_eos=stops, missing_eos_penalty=1.0))
    assert seen["must_end"] is must_end
