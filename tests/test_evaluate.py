"""rlhf-evaluate end to end on tiny models, against transformers, NumPy and scikit-learn; and what users get wrong."""

import dataclasses
import importlib.metadata
import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from rlhf.cli.evaluate_tables import show_report

from rlhf import random
from rlhf.config import (
    DistConfig,
    LogConfig,
    ModelConfig,
    PipelineRun,
    PPOConfig,
    RewardConfig,
    RewardRun,
    SFTConfig,
    SFTRun,
)
from rlhf.data.schema import PROMPTS as PROMPTS_SCHEMA
from rlhf.errors import UserError
from rlhf.evaluate.comparison import MeasuredCompletions
from rlhf.evaluate.estimates import Figure, figures, mean
from rlhf.evaluate.evaluate_config import EvaluateConfig
from rlhf.evaluate.evaluation import Report, _optimises, run_evaluation
from rlhf.evaluate.evaluation_inputs import TestData as Records
from rlhf.evaluate.evaluation_result import Evaluation
from rlhf.evaluate.judges import Preferences
from rlhf.evaluate.policy_evaluation import Comparison, ScoredCompletions, _sampling, comparison_figures
from rlhf.evaluate.reward_evaluation import calibration_error_by_chance
from rlhf.io.model_folder import LanguageModel, RewardModel, RewardStatistics, save_language_model, save_reward_model
from rlhf.io.presets import dump_config, load_config, narrow
from rlhf.io.tokenizer import Tokenizer
from rlhf.models import gpt2
from rlhf.models.gpt2_config import GPT2Config
from rlhf.statistics import expected_calibration_error
from rlhf.train.reward import run_reward
from rlhf.train.sft import run_sft
from rlhf.tree import tree_map_named

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "wizards",
    "box",
    "with",
    "five",
    "dozen",
    "liquor",
    "jugs",
]


def sentence(number, length):
    return " ".join(WORDS[(7 * number + 3 * place * place) % len(WORDS)] for place in range(length))


DEMONSTRATIONS = [{"prompt": sentence(n, 1 + n % 4), "completion": " " + sentence(n + 5, 2 + n % 5)} for n in range(30)]
PAIRS = [
    {"prompt": sentence(n, 2), "chosen": " " + sentence(n, 1 + n % 6), "rejected": " " + sentence(n + 1, 1 + n % 4)}
    for n in range(40)
]
PROMPTS = [{"prompt": sentence(n, 2 + n % 3), "item": WORDS[n]} for n in range(12)]


def write(path, records):
    path.write_text(json.dumps(records))
    return path


def model(tokenizer, seed, **shape):
    """Weights larger than at the start of training: the distributions are not uniform."""
    config = GPT2Config(
        vocab_size=tokenizer.vocab_size, **{"n_positions": 48, "n_embd": 16, "n_layer": 2, "n_head": 2} | shape
    )
    params = gpt2.init(config, key=random.key(seed))
    return LanguageModel(tree_map_named(lambda _, leaf: 8 * leaf if leaf.ndim > 1 else leaf, params), config, tokenizer)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory, tokenizer):
    """A run's folders run/{sft,policy,reward}, data files and judges.py; not to be changed."""
    folder = tmp_path_factory.mktemp("shelf")
    for number, name in enumerate(("sft", "policy")):
        save_language_model(folder / "run" / name, model(tokenizer, number), facts={})
    trunk = model(tokenizer, 2)
    params = {"trunk": trunk.params, "head": {"weight": random.normal(random.key(3), (1, 16))}}
    reward = RewardModel(params, trunk.config, tokenizer, RewardStatistics(0.0, 1.0, 0))
    save_reward_model(folder / "run" / "reward", reward, facts={})
    for name, records in {"demonstrations": DEMONSTRATIONS, "pairs": PAIRS, "prompts": PROMPTS}.items():
        write(folder / f"{name}.json", records)
    (folder / "judges.py").write_text(
        "def length(prompts, completions): return [float(len(c)) for c in completions]\n"
        "reward = length\n"
        "def nan(prompts, completions): return [float('nan') for c in completions]\n"
        "def shorter(prompts, first, second): return [float(len(a) < len(b)) for a, b in zip(first, second)]\n"
    )
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def evaluate(shelf, tmp_path):
    """Run an evaluation; (evaluation.json, other files' records)."""

    def run(*files, **settings):
        paths = tuple(shelf / f"{name}.json" for name in files)
        given = {"model_dir": shelf / "run", "output": tmp_path / "out", "threads": 1, "max_new_tokens": 6}
        run_evaluation(EvaluateConfig(**{"test_data": paths} | given | settings))
        return read(tmp_path / "out")

    return run


def read(folder):
    def refuse(literal):
        raise AssertionError(f"{literal} is no JSON")

    whole = json.loads((folder / "evaluation.json").read_text(), parse_constant=refuse)
    lines = {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("completions", "pairs")
        if (folder / f"{name}.jsonl").exists()
    }
    return whole, lines


def values(evaluation, column="model"):
    return {name: figure["value"] for name, figure in evaluation["figures"][column].items()}


@pytest.fixture(scope="module")
def foreign(shelf, tokenizer, tmp_path_factory):
    """Folders that transformers has made and saved: a language model and a reward model."""
    import transformers

    folder, shape = tmp_path_factory.mktemp("foreign"), {"n_embd": 24, "n_layer": 1, "n_head": 3, "n_positions": 64}
    kinds = {"lm": transformers.GPT2LMHeadModel, "rm": transformers.GPT2ForSequenceClassification}
    for name, kind in kinds.items():
        with torch.random.fork_rng():
            torch.manual_seed(5)
            config = transformers.GPT2Config(
                vocab_size=tokenizer.vocab_size, **shape, initializer_range=0.3, num_labels=1,
                bos_token_id=0, eos_token_id=0, pad_token_id=tokenizer.pad_id,
            )  # fmt: skip
            kind(config).save_pretrained(folder / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(shelf / "run" / "sft" / file, folder / name)
    return folder


def folder_of(which, shelf, foreign, kind):
    return shelf / "run" / {"lm": "sft", "rm": "reward"}[kind] if which == "ours" else foreign / kind


@pytest.mark.parametrize("which", ["ours", "foreign"])
def test_perplexity_is_that_of_transformers(which, shelf, foreign, evaluate):
    import transformers

    folder = folder_of(which, shelf, foreign, "lm")
    network = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    nats, hits, count = 0.0, 0, 0
    for record in DEMONSTRATIONS:
        prompt, completion = (tokenizer(record[key])["input_ids"] for key in ("prompt", "completion"))
        tokens = torch.tensor([[*prompt, *completion, tokenizer.eos_token_id]])
        labels = tokens.clone()
        labels[:, : len(prompt)] = -100
        with torch.no_grad():
            out = network(tokens, labels=labels)
        nats, count = nats + float(out.loss) * (len(completion) + 1), count + len(completion) + 1
        hits += int((out.logits[0, :-1].argmax(-1) == tokens[0, 1:])[len(prompt) - 1 :].sum())
    whole, _ = evaluate("demonstrations", model_dir=folder, eval_type="sft")
    (found,) = whole["evaluations"]
    assert values(found)["eval/perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert values(found)["eval/accuracy"] == pytest.approx(hits / count)
    assert (found["tokens"], found["figures"]["model"]["eval/perplexity"]["n"]) == (count, 30)


def test_pairs_that_truncation_makes_equal_are_left_out_and_told(evaluate, tmp_path):
    long = "a b c d e f g h i j" * 20
    equal = [{"prompt": "p", "chosen": f"{long} good", "rejected": f"{long} bad"}] * 3
    write(tmp_path / "some.json", [*PAIRS, *equal])
    whole, lines = evaluate(test_data=(tmp_path / "some.json",), eval_type="reward")
    (found,) = whole["evaluations"]
    different = sum(pair["chosen"] != pair["rejected"] for pair in PAIRS)
    assert (found["equal"], len(lines["pairs"])) == (3, different)
    assert found["figures"]["model"]["eval/reward/accuracy"]["n"] == different
    write(tmp_path / "all.json", equal)
    with pytest.raises(UserError, match=r"all\.json: after truncation to \d+ tokens .* nothing is left to evaluate"):
        evaluate(test_data=(tmp_path / "all.json",), eval_type="reward")


@pytest.mark.parametrize("which", ["ours", "foreign"])
def test_reward_figures_are_those_of_ten_lines_of_numpy(which, shelf, foreign, evaluate):
    import transformers
    from sklearn.calibration import calibration_curve

    folder = folder_of(which, shelf, foreign, "rm")
    network = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def scored(text):
        ids = tokenizer(text["prompt"])["input_ids"] + tokenizer(text["answer"])["input_ids"]
        with torch.no_grad():
            return float(network(torch.tensor([[*ids, tokenizer.eos_token_id]])).logits)

    pairs = [pair for pair in PAIRS if pair["chosen"] != pair["rejected"]]
    scores = np.array([[scored(pair | {"answer": pair[side]}) for side in ("chosen", "rejected")] for pair in pairs])
    lengths = np.array([[len(tokenizer(pair[side])["input_ids"]) for side in ("chosen", "rejected")] for pair in pairs])
    whole, lines = evaluate("pairs", model_dir=folder)
    (found,) = whole["evaluations"]
    margins, longer = scores[:, 0] - scores[:, 1], lengths[:, 0] - lengths[:, 1]
    confidence = 1 / (1 + np.exp(-abs(margins)))
    accuracy, sure = calibration_curve(margins > 0, confidence, n_bins=20)
    assert values(found) == {name: pytest.approx(value, rel=1e-4, abs=1e-5) for name, value in {
        "eval/reward/accuracy": (margins > 0).mean(),
        "eval/reward/margin": margins.mean(),
        "loss/reward": np.log1p(np.exp(-margins)).mean(),
        "eval/reward/mean": scores.mean(),
        "eval/reward/calibration_error": values(found)["eval/reward/calibration_error"],
        "eval/reward/length_correlation": np.corrcoef(scores.ravel(), lengths.ravel())[0, 1],
        "eval/baseline/longer": ((longer > 0) + 0.5 * (longer == 0)).mean(),
        "eval/baseline/bag_of_words": values(found)["eval/baseline/bag_of_words"],
        "eval/reward/gain_over_longer": (margins > 0).mean() - values(found)["eval/baseline/longer"],
        "eval/reward/gain_over_bag_of_words": (margins > 0).mean() - values(found)["eval/baseline/bag_of_words"],
    }.items()}  # fmt: skip
    curve = found["reliability"]
    assert [row["accuracy"] for row in curve] == pytest.approx(accuracy.tolist())
    assert [row["confidence"] for row in curve] == pytest.approx(sure.tolist(), abs=1e-5)
    shares = np.array([row["n"] for row in curve]) / len(pairs)
    assert values(found)["eval/reward/calibration_error"] == pytest.approx(
        (abs(accuracy - sure) * shares).sum(), abs=1e-5
    )
    assert [line["chosen_score"] for line in lines["pairs"]] == pytest.approx(scores[:, 0].tolist(), abs=1e-4)
    groups = found["accuracy_by_length_difference"]
    assert sum(row["accuracy"]["n"] for row in groups) == len(pairs)
    for row in groups:
        inside = (row["from"] <= longer) & (longer <= row["to"])
        assert row["accuracy"]["value"] == pytest.approx((margins > 0)[inside].mean())


def test_a_calibrated_model_has_a_calibration_error_by_chance():
    generator = np.random.default_rng(0)
    sizes = generator.exponential(1.5, 300)
    right = generator.random((500, 300)) < 1 / (1 + np.exp(-sizes))
    errors = [expected_calibration_error(torch.from_numpy(np.where(row, sizes, -sizes))) for row in right]
    assert calibration_error_by_chance(sizes) == pytest.approx(np.mean(errors), rel=0.05)


def test_the_bag_of_words_learns_from_the_train_file(evaluate, shelf, tmp_path):
    """The chosen one says yes: learnt from a train file, and from the other folds."""
    pairs = [{"prompt": f"p{n}", "chosen": f" yes {n}", "rejected": f" no {n}"} for n in range(20)]
    turned = [{"prompt": "p", "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in pairs]
    path, train = write(tmp_path / "yes.json", pairs), write(tmp_path / "no.json", turned)

    for train_data, expected in ((None, 1.0), (train, 0.0)):
        whole, _ = evaluate(model_dir=shelf / "run" / "reward", test_data=(path,), train_data=train_data)
        assert values(whole["evaluations"][0])["eval/baseline/bag_of_words"] == expected


def by_hand(scores, entropy=1.0):
    completions = MeasuredCompletions(["x"] * 4, [[1, 2, 3]] * 4, np.ones(4), np.full(4, entropy), {}, {})
    return ScoredCompletions(completions, {"eval/judge/gold": np.array(scores)})


def test_win_rate_and_intervals_by_hand():
    """Scores 2:1, 1:1, 0:2, 3:0: two wins, a tie, a loss. The pairwise judge changes its mind about the second."""
    sides = {"policy": by_hand([2.0, 1.0, 0.0, 3.0]), "against": by_hand([1.0, 1.0, 2.0, 0.0])}
    preferences = {"pair": Preferences(np.array([1.0, 1.0, 0.0, 1.0]), np.array([1.0, 0.0, 0.0, 1.0]))}
    found = comparison_figures(Comparison("sampled", 1, [{"prompt": "p"}] * 4, sides, preferences, 0), seed=0)
    for judge in ("gold", "pair"):
        wins = {share: found["wins"][f"eval/{share}/{judge}"].value for share in ("win_rate", "wins", "ties", "losses")}
        assert wins == {"win_rate": 2.5 / 4, "wins": 0.5, "ties": 0.25, "losses": 0.25}
    # every resample of four outcomes (1, ½, 0, 1): 4^4 of them; the ends are quantiles of their means
    exact = np.array(np.meshgrid(*[[1, 0.5, 0, 1]] * 4)).reshape(4, -1).mean(axis=0)
    assert found["wins"]["eval/win_rate/gold"][1:3] == pytest.approx(np.percentile(exact, [2.5, 97.5]))
    difference = found["difference"]["eval/judge/gold"]
    assert (difference.value, difference.n) == (0.5, 4)
    assert found["wins"]["eval/first_place/pair"].value == (1 + 1 + 0 + 1 + 0 + 1 + 1 + 0) / 8


def test_samples_of_one_prompt_count_as_one():
    sides = {"policy": by_hand([2.0, 1.0, 0.0, 3.0]), "against": by_hand([1.0, 1.0, 2.0, 0.0])}
    found = comparison_figures(Comparison("sampled", 2, [{"prompt": "p"}] * 4, sides, {}, 0), seed=0)
    assert found["policy"]["eval/judge/gold"] == figures({"it": mean([1.5, 1.5])}, seed=0)["it"]
    assert found["wins"]["eval/win_rate/gold"][0] == 0.625


def test_policy_evaluation(evaluate, shelf):
    judges = (f"{shelf}/judges.py:length", f"{shelf}/judges.py:shorter")
    whole, lines = evaluate("prompts", judge=judges, samples=2)
    assert whole["skipped"].keys() == {"sft", "reward"}
    sampled, greedy = whole["evaluations"]
    assert (sampled["decoding"], greedy["decoding"]) == ("sampled", "greedy")
    assert len(lines["completions"]) == 12 * 2 + 12
    for evaluation in (sampled, greedy):
        own = [line for line in lines["completions"] if line["decoding"] == evaluation["decoding"]]
        for part in ("policy", "against"):
            found = values(evaluation, part)
            assert found["eval/judge/length"] == pytest.approx(np.mean([len(line[part]["completion"]) for line in own]))
            assert found["eval/response_length/mean"] == pytest.approx(np.mean([line[part]["tokens"] for line in own]))
            assert found["eval/reward/reward"] == pytest.approx(np.mean([line[part]["reward/reward"] for line in own]))
            assert found["eval/ended"] == np.mean([line[part]["ended"] for line in own])
            assert found["eval/objective/kl_exact"] == pytest.approx(np.mean([line[part]["kl"] for line in own]))
        longer = [np.sign(len(line["policy"]["completion"]) - len(line["against"]["completion"])) for line in own]
        assert values(evaluation, "wins")["eval/win_rate/length"] == pytest.approx((1 + np.mean(longer)) / 2)
        assert values(evaluation, "wins")["eval/win_rate/shorter"] == pytest.approx((1 - np.mean(longer)) / 2)
        difference = (
            values(evaluation, "policy")["eval/reward/reward"] - values(evaluation, "against")["eval/reward/reward"]
        )
        assert values(evaluation, "difference")["eval/reward/reward"] == pytest.approx(difference)
    assert values(sampled, "against")["eval/objective/kl_exact"] == 0, "the SFT model is the reference"
    assert values(sampled, "policy")["eval/objective/kl_exact"] > 1
    assert "eval/objective/kl_k3" in values(sampled, "policy").keys() - values(greedy, "policy").keys()
    assert all(figure["n"] == 12 for columns in sampled["figures"].values() for figure in columns.values())


def test_best_of_n_is_the_mean_over_all_subsets_of_the_completions(evaluate, shelf):
    whole, lines = evaluate("prompts", judge=(f"{shelf}/judges.py:length",), best_of=(1, 2, 4), limit=5)
    sampled, greedy = whole["evaluations"]
    own = [line["policy"] for line in lines["completions"] if line["decoding"] == "sampled"]
    assert len(own) == 5 * 4, "as many as the largest n"
    for n in (1, 2, 4):
        for figure, key in {"reward": "reward/reward", "length": "judge/length"}.items():
            means = []
            for prompt in range(5):
                drawn = own[4 * prompt : 4 * prompt + 4]
                best = [
                    max(subset, key=lambda line: line["reward/reward"]) for subset in itertools.combinations(drawn, n)
                ]
                means.append(np.mean([line[key] for line in best]))
            assert values(sampled, "policy")[f"eval/best_of/{n}/{figure}"] == pytest.approx(np.mean(means))
    assert values(sampled, "policy")["eval/best_of/1/reward"] == pytest.approx(
        values(sampled, "policy")["eval/reward/reward"]
    )
    assert not any("best_of" in name for name in values(greedy, "policy"))


def test_best_of_n_needs_a_reward_model_and_sampled_completions(evaluate, shelf):
    with pytest.raises(UserError, match="--best-of: the best is chosen by a reward model, and there is none"):
        evaluate("prompts", model_dir=shelf / "run" / "policy", best_of=(2,))
    with pytest.raises(UserError, match="--best-of: needs sampled completions"):
        evaluate("prompts", best_of=(2,), decoding=("greedy",))


def test_completions_do_not_depend_on_company_or_batches(evaluate):
    _, one = evaluate("prompts", decoding=("sampled",))
    _, other = evaluate("prompts", decoding=("sampled",), samples=3, rollout_batch_size=5, micro_batch_size=2, limit=7)
    first = [line["policy"]["completion"] for line in other["completions"] if line["sample"] == 0]
    assert first == [line["policy"]["completion"] for line in one["completions"]][:7]
    assert len({line["policy"]["completion"] for line in other["completions"]}) > 7


def test_estimated_kl_agrees_with_the_exact_one(evaluate, shelf, tokenizer, tmp_path):
    """Near models, so that k3's rare large terms do not matter, and many samples."""
    sft = model(tokenizer, 0)
    near = tree_map_named(
        lambda _, leaf: leaf + 0.02 * random.normal(random.key(leaf.numel()), tuple(leaf.shape)), sft.params
    )
    save_language_model(tmp_path / "near", sft._replace(params=near), facts={})
    settings = {"model_dir": tmp_path / "near", "against": shelf / "run" / "sft", "decoding": ("sampled",)}
    whole, _ = evaluate("prompts", samples=100, **settings)
    found = whole["evaluations"][0]["figures"]["policy"]
    for name in ("kl", "kl_k3"):
        gap = found[f"eval/objective/{name}"]["value"] - found["eval/objective/kl_exact"]["value"]
        width = found[f"eval/objective/{name}"]["high"] - found[f"eval/objective/{name}"]["low"]
        assert abs(gap) < width


def test_prompts_are_taken_from_other_files(evaluate):
    whole, lines = evaluate("demonstrations", eval_type="policy", decoding=("greedy",))
    distinct = list(dict.fromkeys(record["prompt"] for record in DEMONSTRATIONS))
    assert [line["prompt"] for line in lines["completions"]] == distinct
    assert whole["evaluations"][0]["data_origin"] == "the prompts of its demonstrations"


def test_one_record_has_no_interval(evaluate, tmp_path):
    whole, _ = evaluate("demonstrations", "pairs", "prompts", limit=1)
    assert [evaluation["eval_type"] for evaluation in whole["evaluations"]] == ["sft", "reward", "policy", "policy"]
    for evaluation in whole["evaluations"]:
        for figure in (figure for column in evaluation["figures"].values() for figure in column.values()):
            assert (figure["low"], figure["high"], figure["n"]) == (None, None, 1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps, with the figures that it ended with."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        config = PipelineRun(
            output_dir=folder / "run", threads=1, seed=3,
            model=ModelConfig(preset="tiny"), log=LogConfig(tensorboard=False),
            sft_data=write(folder / "demonstrations.json", DEMONSTRATIONS),
            preference_data=write(folder / "pairs.json", PAIRS),
            prompt_data=write(folder / "prompts.json", PROMPTS),
            sft=SFTConfig(max_steps=2, val_fraction=0.3), reward=RewardConfig(max_steps=2, val_fraction=0.3),
        )  # fmt: skip
        metrics = [run_sft(narrow(config, SFTRun)).metrics, run_reward(narrow(config, RewardRun)).metrics]
        (folder / "run" / "config.yaml").write_text(dump_config(config))
    torch.set_num_threads(1)
    return folder / "run", metrics


def test_without_test_data_the_figures_are_those_that_training_ended_with(trained, tmp_path):
    folder, (sft, reward) = trained
    report = run_evaluation(EvaluateConfig(model_dir=folder, output=tmp_path, threads=1))
    assert report.skipped == {"policy": f"{folder} has no policy/"}
    for evaluation, metrics in zip(read(tmp_path)[0]["evaluations"], (sft, reward), strict=True):
        found = values(evaluation)
        shared = found.keys() & metrics.keys()
        assert len(shared) >= 3
        assert {name: found[name] for name in shared} == pytest.approx(
            {name: metrics[name] for name in shared}, rel=1e-5
        )
    assert evaluation["bag_of_words"] == f"training on the other pairs of {folder.parent / 'pairs.json'}"


def test_a_file_of_the_run_that_is_gone_is_named(trained, shelf, tmp_path):
    """And no prompts are taken from records that the run has learnt from."""
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    shutil.copytree(shelf / "run" / "sft", folder / "policy")
    config = load_config(str(folder / "config.yaml"))
    config = dataclasses.replace(config, prompt_data=tmp_path / "gone.json")
    (folder / "config.yaml").write_text(dump_config(config))
    report = run_evaluation(EvaluateConfig(model_dir=folder, threads=1))
    gone = f"{tmp_path / 'gone.json'}, which the run read, no longer exists; give another file as --test-data"
    assert report.skipped == {"policy": gone}


@pytest.fixture
def moved(trained, tmp_path):
    """The project of the trained run, data and all, at another place; the original is not there any more."""
    shutil.copytree(trained[0].parent, tmp_path / "project")
    config = load_config(str(tmp_path / "project" / "run" / "config.yaml"))
    gone = {
        name: tmp_path / "gone" / getattr(config, name).name for name in ("sft_data", "preference_data", "prompt_data")
    }
    config = dataclasses.replace(config, output_dir=tmp_path / "gone" / "run", **gone)
    (tmp_path / "project" / "run" / "config.yaml").write_text(dump_config(config))
    return tmp_path / "project"


def evaluated(folder, kind, **settings):
    report = run_evaluation(EvaluateConfig(model_dir=folder, eval_type=kind, threads=1, limit=4, **settings))
    (evaluation,) = report.evaluations
    return evaluation.data


@pytest.mark.parametrize("recorded", ["manifest", "checkpoint", "nowhere"])
@pytest.mark.parametrize(("kind", "name"), [("sft", "demonstrations.json"), ("reward", "pairs.json")])
def test_held_out_records_are_those_of_the_data_that_the_run_had(moved, kind, name, recorded, monkeypatch, tmp_path):
    """Wherever they lie, from wherever one evaluates; the digest may be in the model's manifest or the checkpoint's."""
    run, data = moved / "run", moved / name
    if recorded != "manifest":
        (run / kind / "manifest.json").unlink()
    if recorded != "checkpoint":
        shutil.rmtree(run / "checkpoints")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    write(tmp_path / "elsewhere" / name, [PAIRS, DEMONSTRATIONS][kind == "sft"][:3])
    test = evaluated(run, kind)
    assert (str(test.path), test.origin) == (str(data), "held out by the run")
    write(data, json.loads(data.read_text())[::-1])
    if recorded == "nowhere":  # an older run: nothing to compare with
        assert str(evaluated(run, kind).path) == str(data)
        return
    with pytest.raises(UserError, match=f"{name} is no longer what the run learnt from; give another file as --test-d"):
        evaluated(run, kind)
    data.unlink()
    with pytest.raises(UserError, match=f"{name}, which the run read, no longer exists"):
        evaluated(run, kind)


def test_relative_paths_of_an_older_run_are_those_beside_it(moved, monkeypatch, tmp_path):
    path = moved / "run" / "config.yaml"
    config = dataclasses.replace(
        load_config(str(path)), output_dir=Path("run"), sft_data=Path("demonstrations.json"), sft_val_data=None
    )
    path.write_text(dump_config(config))
    write(tmp_path / "demonstrations.json", DEMONSTRATIONS[:3])
    monkeypatch.chdir(tmp_path)
    assert str(evaluated(Path("project/run"), "sft").path) == str(moved / "demonstrations.json")


@pytest.mark.parametrize("part", ["run", "run/sft"])
def test_a_test_file_that_the_model_was_trained_on_is_told(moved, part, caplog):
    caplog.set_level("INFO", logger="rlhf")
    data = (shutil.copy(moved / "demonstrations.json", moved / "renamed.json"),)
    test = evaluated(moved / part, "sft", test_data=tuple(map(Path, data)))
    assert test.origin == "which the model was trained on"
    assert "(which the model was trained on)" in caplog.text
    write(moved / "renamed.json", [*DEMONSTRATIONS[::-1], {"prompt": "new", "completion": " text"}])
    origin = evaluated(moved / part, "sft", test_data=tuple(map(Path, data))).origin
    learnt = round(0.7 * len(DEMONSTRATIONS))
    told = f"{learnt} of its {len(DEMONSTRATIONS) + 1} records are among those that the model was trained on"
    assert origin == (told if part == "run" else ""), "a model alone does not know the records"


@pytest.mark.parametrize("width", [80, 120])
def test_the_tables_fit(shelf, tmp_path, width):
    judges = (f"{shelf}/judges.py:length", f"{shelf}/judges.py:shorter")
    paths = tuple(shelf / f"{name}.json" for name in ("demonstrations", "pairs", "prompts"))
    report = run_evaluation(
        EvaluateConfig(
            model_dir=shelf / "run", test_data=paths, output=tmp_path, judge=judges, threads=1, max_new_tokens=6
        )
    )
    console = Console(width=width, no_color=True, record=True, file=(tmp_path / "screen").open("w"))
    show_report(report, console)
    console.file.close()
    text = console.export_text()
    tables = [line for line in text.splitlines() if line.startswith(("│", "┃"))]
    assert max(map(len, tables)) <= width
    assert "…" not in text, "nothing is cut off"
    for wanted in (
        "perplexity",
        "always the longer",
        "expected calibration error",
        "calibrated model has",
        "judge: length",
        "win rate",
    ):
        assert wanted in text
    assert "favoured the first place with 0" in " ".join(text.split())


def test_what_a_judge_is_called_does_not_change_the_form_of_its_scores(tmp_path, capsys):
    found = {"policy": {"eval/judge/blended": Figure(150.5, 149.5, 151.5, 9), "eval/ended": Figure(0.5, 0.4, 0.6, 9)}}
    facts = {"decoding": "greedy", "temperature": 1.0, "cut": 0}
    data = Records(tmp_path / "prompts.json", PROMPTS_SCHEMA, None, "")
    evaluation = Evaluation("policy", {"policy": tmp_path}, data, "prompts", found, facts)
    show_report(Report([evaluation], {}, tmp_path), Console(width=100))
    shown = capsys.readouterr().out
    assert "+150.5 [+149.5, +151.5]" in shown
    assert "0.500 [0.400, 0.600]" in shown


def main(argv):
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="rlhf-evaluate")
    try:
        return entry.load()([str(word) for word in argv])
    except SystemExit as stop:
        return stop.code


@pytest.fixture(scope="module")
def wrong(shelf, tmp_path_factory, tokenizer):
    """Things that cannot be used."""
    folder = tmp_path_factory.mktemp("wrong")
    other = Tokenizer.train(["entirely different words"] * 2, 300)
    save_language_model(folder / "other_words", model(other, 0), facts={})
    (folder / "empty.json").write_text("")
    (folder / "none.json").write_text("[]")
    write(folder / "columns.json", [{"text": "a", "label": 1}])
    write(folder / "broken.json", [PAIRS[0], {"prompt": "p", "chosen": "c"}])
    write(folder / "ties.json", [{"prompt": "p", "chosen": "c", "rejected": "c"}])
    (folder / "nothing").mkdir()
    shutil.copytree(shelf / "run" / "sft", folder / "damaged")
    (folder / "damaged" / "model.safetensors").write_bytes(b"no")
    return folder


DEMONSTRATIONS_FILE, PAIRS_FILE, PROMPTS_FILE = (
    ["--test-data", f"{{shelf}}/{name}.json"] for name in ("demonstrations", "pairs", "prompts")
)
WRONG = {  # flags, and what the message says

    "no folder": (["--model-dir", "{wrong}/absent"], "absent: no such folder; give a run's output folder"),
    "no model": (["--model-dir", "{wrong}/nothing"], "holds no model, expected a run's sft/, reward/ or policy/"),
    "damaged": (["--model-dir", "{wrong}/damaged", *DEMONSTRATIONS_FILE], "damaged"),
    "no data": (["--model-dir", "{shelf}/run/sft"], "--test-data: give files to evaluate on"),
    "absent file": (["--test-data", "{wrong}/absent.json"], "absent.json: no such file"),
    "empty": (["--test-data", "{wrong}/empty.json"], "the file is empty"),
    "no records": (["--test-data", "{wrong}/none.json"], "the list is empty"),
    "columns": (["--test-data", "{wrong}/columns.json"], "record 1 (line 1) has 'label', 'text'; expected"),
    "second record": (["--test-data", "{wrong}/broken.json"], "record 2 (line 1) has no key 'rejected'"),
    "ties": (["--test-data", "{wrong}/ties.json", "--eval-type", "reward"], "in every pair the chosen text equals"),
    "kind": (
        [*PROMPTS_FILE, "--eval-type", "sft"],
        "nothing to evaluate: sft: no demonstrations among the test data",
    ),
    "reward model's policy": (
        ["--model-dir", "{shelf}/run/reward", *PROMPTS_FILE], "reward is not a language model",
    ),
    "vocabulary": (
        [*PROMPTS_FILE, "--against", "{wrong}/other_words"],
        "only models with the same tokenizer can be compared",
    ),
    "against a reward model": (
        [*PROMPTS_FILE, "--against", "{shelf}/run/reward"], "expected a GPT2LMHeadModel",
    ),
    "reward model that writes": (
        [*PROMPTS_FILE, "--reward-model", "{shelf}/run/sft"], "expected a GPT2ForSequenceClassification",
    ),
    "judge": ([*PROMPTS_FILE, "--judge", "nothing"], "--judge nothing: it is not module:function"),
    "judge without policy": (
        [*PAIRS_FILE, "--eval-type", "reward", "--judge", "{shelf}/judges.py:length"],
        "--judge: completions are made only in the policy evaluation",
    ),
    "judge named as the reward model": (
        [*PROMPTS_FILE, "--judge", "{shelf}/judges.py:reward"], "reward is also the name of the reward model",
    ),
    "pairwise alone": (
        ["--model-dir", "{shelf}/run/policy", *PROMPTS_FILE, "--judge", "{shelf}/judges.py:shorter"],
        "a pairwise judge needs a second model",
    ),
    "train data": (
        [*PAIRS_FILE, "--train-data", "{shelf}/prompts.json"], "has prompts, expected preference pairs",
    ),
    "no room": ([*PROMPTS_FILE, "--max-new-tokens", "48"], "leaves no room for a prompt"),
    "samples": ([*PROMPTS_FILE, "--samples", "0"], "samples must be at least 1"),
    "no gpu": ([*PROMPTS_FILE, "--device", "cuda"], "torch finds no NVIDIA GPU"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_refused_with_its_remedy_and_nothing_is_written(name, shelf, wrong, tmp_path, capfd):
    if name == "no gpu" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    flags, message = WRONG[name]
    given = [flag.format(shelf=shelf, wrong=wrong) for flag in flags]
    base = [] if "--model-dir" in given else ["--model-dir", shelf / "run"]
    assert main([*base, *given, "--output", tmp_path / "out", "--threads", "1"]) == 2
    out, err = capfd.readouterr()
    plain = " ".join(err.translate(dict.fromkeys(map(ord, "│╭╮╰╯─"), " ")).split())
    assert message in plain
    assert "Traceback" not in err
    assert out == ""
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_refused_before_anything_is_read(tmp_path, capfd):
    (tmp_path / "d.json").write_text("mine")
    (tmp_path / "empty").mkdir()
    assert main(["--model-dir", tmp_path / "empty", "--output", tmp_path / "d.json"]) == 2
    assert "d.json: is a file, expected a folder" in capfd.readouterr().err
    assert (tmp_path / "d.json").read_text() == "mine"


@pytest.mark.parametrize("flag", ["--against", "--reward-model"])
def test_another_model_that_is_none_is_refused_before_anything_is_evaluated(flag, shelf, tmp_path, capfd):
    assert main(["--model-dir", shelf / "run", flag, tmp_path]) == 2
    out, err = capfd.readouterr()
    assert (out, err) == ("", f"error: {tmp_path}/config.json: no such file; {tmp_path} is not a model folder\n")


def test_a_judge_that_gives_nan_is_told(shelf, tmp_path, capfd):
    flags = ["--test-data", shelf / "prompts.json", "--judge", f"{shelf}/judges.py:nan", "--max-new-tokens", "4"]
    assert main(["--model-dir", shelf / "run", *flags, "--output", tmp_path / "out"]) == 3
    torch.set_num_threads(1)
    assert "judge nan is nan for the completion" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_files_of_an_earlier_evaluation_do_not_stay(evaluate, tmp_path):
    evaluate("prompts", decoding=("greedy",))
    _, lines = evaluate("demonstrations", eval_type="sft")
    assert lines == {}


@pytest.mark.slow
def test_workers_give_the_same_numbers(shelf, tmp_path):
    paths = tuple(shelf / f"{name}.json" for name in ("demonstrations", "pairs", "prompts"))
    judges = (f"{shelf}/judges.py:length", f"{shelf}/judges.py:shorter")
    found = []
    for workers in (0, 2):
        out = tmp_path / str(workers)
        config = EvaluateConfig(
            model_dir=shelf / "run", test_data=paths, output=out, threads=1, judge=judges, samples=2, max_new_tokens=6,
            rollout_batch_size=4, micro_batch_size=2, dist=DistConfig(num_workers=workers),
        )  # fmt: skip
        run_evaluation(config)
        found.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert found[0] == found[1]
    assert found[0].keys() == {"evaluation.json", "completions.jsonl", "pairs.jsonl", ".rlhf.json"}


def test_completions_are_as_long_as_the_runs_or_as_the_default():
    lengths = {
        None: _sampling(EvaluateConfig(model_dir=Path()), None, 128).max_new_tokens,
        "without PPO": _sampling(EvaluateConfig(model_dir=Path()), PipelineRun(), 128).max_new_tokens,
        "of PPO": _sampling(
            EvaluateConfig(model_dir=Path()), PipelineRun(ppo=PPOConfig(max_new_tokens=9)), 128
        ).max_new_tokens,
        "asked for": _sampling(
            EvaluateConfig(model_dir=Path(), max_new_tokens=7), PipelineRun(ppo=PPOConfig(max_new_tokens=9)), 128
        ).max_new_tokens,
    }
    assert lengths == {None: 64, "without PPO": 64, "of PPO": 9, "asked for": 7}


@pytest.mark.parametrize(
    ("reward", "folder", "expected"),
    [
        ((), "moved/reward", True),
        ((), "other", False),
        (("mine:brevity",), "moved/reward", False),
        (("0.5*run/reward", "mine:brevity"), "moved/reward", True),
        (("elsewhere/rm",), "elsewhere/rm", True),
        ((), None, False),
    ],
)
def test_a_policy_was_trained_on_the_reward_models_of_its_run_alone(reward, folder, expected):
    run = PipelineRun(output_dir=Path("run"), ppo=PPOConfig(reward=reward))
    assert _optimises(run, Path("moved"), None if folder is None else Path(folder)) is expected
    assert not _optimises(None, Path("moved"), Path("moved/reward"))
