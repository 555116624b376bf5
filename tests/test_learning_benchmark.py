"""Learning beside TRL: the figures by hand, and our sides from their material to their measure, in process."""

import io
import json
from pathlib import Path

import pytest

from benchmarks import learners, learning, material
from benchmarks.session import Session
from rlhf.train import dpo

ROOT = Path(__file__).parents[1]
RLOO = learning.SETTINGS["rloo"] | {
    "steps": 2, "prompts_per_step": 2, "samples_per_prompt": 2, "minibatch": 4, "max_new_tokens": 8
}  # fmt: skip
PPO = learning.SETTINGS["ppo"] | {"steps": 2, "prompts_per_step": 4, "minibatch": 2, "max_new_tokens": 8}
DPO = learning.SETTINGS["dpo"] | {"steps": 2, "pairs_per_step": 2, "max_new_tokens": 8}


def point(gold, kl):
    return {"gold": gold, "kl": kl}


def run(ours, peer, seconds=((1.0, 2.0, 4.0), (9.0, 6.0, 8.0))):
    points = {"ours": [point(*at) for at in ours], "peer": [point(*at) for at in peer]}
    times = dict(zip(("ours", "peer"), map(list, seconds), strict=True))
    return {"start": point(0.25, 0.0), "steps": [1, 2], "points": points, "seconds": times}


RUNS = [
    run([(0.5, 1.0), (1.0, 4.0)], [(0.5, 1.0), (0.75, 2.0)]),
    run([(0.5, 1.0), (0.5, 2.0)], [(0.5, 1.0), (0.75, 2.0)]),
]


@pytest.mark.parametrize("method", learning.SETTINGS)
def test_what_the_documentation_shows_is_of_the_present_settings(method):
    result = json.loads((ROOT / "docs" / "results" / f"learning-{method}.json").read_text())
    assert result["settings"] == learning.SETTINGS[method]
    assert result["rows"] == learning.figures(result["runs"])
    page = (ROOT / "docs" / "methods" / f"{method}.md").read_text()
    assert f"```{{learning-result}} {method}\n```" in page


def test_the_reward_is_a_share_of_words_whatever_their_number():
    assert material.kindness([], ["Thank you.", "THANK, you! Thank you", "thanks", ""]) == [0.5, 0.5, 0.0, 0.0]


def test_figures_are_means_over_seeds_with_students_intervals_of_paired_differences():
    rows = {row["policy"]: row for row in learning.figures(RUNS)}
    half = 12.7062 * 0.25  # Student's 97.5% quantile for two runs, and the standard error of 1 and 0.5
    assert rows["ours"]["gold"] == pytest.approx([0.75, 0.75 - half, 0.75 + half], abs=1e-4)
    assert rows["difference"]["kl"][0] == pytest.approx(1.0)
    assert rows["start"]["gold"] == [0.25, 0.25, 0.25]


def test_gold_scores_are_compared_where_the_curves_have_the_same_kl():
    assert learning.gold_at_equal_kl(RUNS[0]) == pytest.approx(0.5 + 0.5 / 3 - 0.75)  # a third of the way from 1 to 4
    assert learning.gold_at_equal_kl(RUNS[1]) == pytest.approx(-0.25)


def test_speed_is_that_of_steps_in_pairs_without_each_runs_first():
    assert learning.speed(RUNS[:1])["ratio"] == pytest.approx((3.0 + 2.0) / 2)
    assert learning.speed(RUNS[:1])["ours"]["median"] == 3.0


def test_a_plot_has_both_sides(tmp_path):
    content = {"method": "rloo", "peer": "TRL 1.16", "runs": RUNS}
    learning.draw(content, tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    assert text.count("<!-- TRL 1.16 -->") == text.count("<!-- rlhf -->") == 1


def test_both_sides_are_told_the_same(tmp_path):
    settings = {"steps": 2}
    ours, peer = (learning._setting(side, "rloo", tmp_path, settings) for side in ("ours", "peer"))
    assert ours.settings == peer.settings | {"method": "rloo"}
    assert learning._setting("peer", "ppo", tmp_path, settings).path.startswith(str(tmp_path))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learning") / "seed-0"
    return folder, learners.make_sft(folder, 0, steps=2)


@pytest.mark.parametrize(("function", "settings"), [(learners.ppo, PPO), (learners.ppo, RLOO), (learners.dpo, DPO)])
def test_our_side_answers_every_step_and_leaves_its_policies(made, tmp_path, function, settings):
    folder, files = made
    method = next(name for name, of in (("dpo", DPO), ("rloo", RLOO), ("ppo", PPO)) if settings is of)
    pairs = [{"prompt": "Agent:", "chosen": " Thank you.", "rejected": " No."}] * 3
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    data = {"pairs": str(tmp_path / "pairs.json")} if method == "dpo" else {"prompts": str(files.prompts)}
    answers = io.StringIO()
    function(
        Session(io.StringIO("round\n" * 2), answers),
        output=str(tmp_path / "run"),
        model=str(folder / "sft"),
        seed=0,
        points=2,
        device="cpu",
        method=method,
        **data,
        **settings,
    )
    assert len(answers.getvalue().splitlines()) == 3  # ready, and two steps
    assert (tmp_path / "run" / "policy").is_dir()
    first, last = (tmp_path / "run" / f"point-{step}" / "model.safetensors" for step in (1, 2))
    assert first.read_bytes() != last.read_bytes()
    assert last.read_bytes() == (tmp_path / "run" / "policy" / "model.safetensors").read_bytes()


def test_a_policy_is_measured_against_its_reference(made, tmp_path):
    folder, files = made
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(json.loads(Path(files.heldout_prompts).read_text())[:2]))
    measured = learners.measure(folder / "sft", folder / "sft", prompts, samples=2, max_new_tokens=8)
    assert measured["kl"] == pytest.approx(0.0, abs=1e-6)
    assert 0 <= measured["gold"] <= 1
    assert 0 < measured["tokens"] <= 8


def test_pairs_are_ordered_by_the_reward():
    texts = [" No.", " Thank you.", " Yes.", " No.", " Thank you", " No.", "", " Thank you."]
    scores, ended = material.kindness([], texts), [1.0] * 4 + [0.0] + [1.0] * 3  # a pair, a tie, one cut, one empty
    pairs = learners.ordered_pairs(["Agent:"] * 8, texts, scores, ended)
    assert pairs == [{"prompt": "Agent:", "chosen": " Thank you.", "rejected": " No."}]


def test_the_peer_gets_pairs_in_the_order_of_our_run(tmp_path, monkeypatch):
    pairs = [{"prompt": "Agent:", "chosen": f" {n}.", "rejected": " No."} for n in range(5)]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    ordered = json.loads(learners.in_our_order(tmp_path / "pairs.json", seed=3, count=6).read_text())
    seen = []
    monkeypatch.setattr(dpo, "completion_pair_batches", recorded(dpo.completion_pair_batches, seen))
    start = learners.make_sft(tmp_path / "seed-0", 0, steps=1) and tmp_path / "seed-0" / "sft"
    learners.dpo(
        Session(io.StringIO("round\n" * 3), io.StringIO()),
        output=str(tmp_path / "run"),
        model=str(start),
        pairs=str(tmp_path / "pairs.json"),
        seed=3,
        points=1,
        device="cpu",
        **DPO | {"steps": 3},
    )
    assert [pair["chosen"] for pair in ordered] == [f" {n}." for n in seen]


def recorded(pack, seen):
    """`completion_pair_batches`, noting the records of every training step."""

    def packed(dataset, records, *, ref_log_probs=None, **options):
        seen.extend(records if ref_log_probs is not None else [])
        return pack(dataset, records, ref_log_probs=ref_log_probs, **options)

    return packed
