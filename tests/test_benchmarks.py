"""The benchmarks: their arithmetic by hand, our sides in process, and whole runs against a peer that does no work."""

import io
import itertools
import json
import math
import os
import shlex
import subprocess
import sys
import time
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
import tyro
from test_layers import imports_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import __main__ as program
from benchmarks import (
    compare,
    cost_model,
    generate,
    history,
    material,
    ours,
    ppo,
    rloo,
    roofline,
    scaling,
    session,
    sides,
    timing,
)
from benchmarks.bench import Bench
from benchmarks.peers import environment
from benchmarks.peers.module_gpt2 import GPT2
from rlhf.io.model_folder import load_language_model, load_reward_model
from rlhf.models.architecture import architecture_of
from rlhf.tree import named_leaves

ROOT = Path(__file__).parents[1]
TINY = material.SIZES["tiny"]
EAGER = {"precision": "fp32", "compile": "off"}


# ---- paired timings


def test_variants_take_turns_and_only_measured_rounds_count(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def variant(name, seconds):
        def run():
            calls.append(name)
            now[0] += seconds if calls.count(name) > 1 else 1000  # the first time is the warm-up

        return run

    def before():
        calls.append("before")
        now[0] += 70

    times = timing.interleave({"a": variant("a", 2), "b": variant("b", 3)}, 3, warmup=1, before=before)
    assert times == {"a": [2, 2, 2], "b": [3, 3, 3]}
    assert "".join(calls).replace("before", "-") == "-a-b-b-a-a-b-b-a"


def test_figures_of_timings():
    assert timing.summary([5.0, 1, 4, 2, 3]) == {"median": 3, "low": 1.5, "high": 4.5, "min": 1, "max": 5}
    assert set(timing.summary([7.0]).values()) == {7}
    assert timing.spread([0.002, 0.001, 0.0305]) == "2 [1 to 30.5]"
    assert timing.ratio([1, 4, 9], [2, 1, 3]) == 3  # of 1/2, 4 and 3; the ratio of the medians is 2
    with pytest.raises(ValueError, match="zip"):
        timing.ratio([1, 2], [1])


# ---- the roofline


def brute_force_forward(shape, length, logits, start=0):
    """Multiplications and additions of one sequence's positions from `start` on, product by product."""
    flops, width = 0, shape.n_embd
    for position in range(start, length):
        for _ in range(shape.n_layer):
            for inputs, outputs in ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)):
                flops += 2 * inputs * outputs
            for _ in range(position + 1):  # every key up to its own: a score, and a share of the value
                flops += 2 * width + 2 * width
    return flops + logits * 2 * width * shape.vocab_size


def test_forward_flops_equal_a_count_product_by_product():
    for length in (1, 2, 16):
        expected = 3 * brute_force_forward(TINY.shape, length, length - 1)
        assert roofline.forward_flops(TINY.shape, 3 * length, length, 3 * (length - 1)) == expected


def test_forward_flops_equal_torchs_own_count_of_a_real_model():
    length = 16
    with torch.random.fork_rng():
        model = GPT2(TINY.shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, length, dtype=torch.int64))
    every_pair = roofline.forward_flops(TINY.shape, length, 2 * length - 1, length - 1)  # torch counts masked ones too
    assert counter.get_total_flops() == every_pair


def test_generation_is_one_phase_for_each_token():
    shape, rows, prompt, completion = TINY.shape, 2, TINY.prompt, TINY.completion
    phases = roofline.generation(shape, rows, prompt, completion, 4)
    assert len(phases) == completion
    assert phases[0] == (rows * brute_force_forward(shape, prompt, 1), 4 * shape.parameters)
    for context, phase in enumerate(phases[1:], prompt + 1):
        cache = rows * shape.n_layer * context * 2 * shape.n_embd
        assert phase.flops == rows * brute_force_forward(shape, context, 1, start=context - 1)
        assert phase.bytes == 4 * (shape.parameters + cache)


def test_a_step_is_three_forwards_then_adamw():
    shape = TINY.shape
    forward = roofline.forward_flops(shape, 64, 16, 60)
    weights = 4 * shape.parameters
    assert roofline.step(shape, 64, 16, 60) == [(3 * forward, 3 * weights), (0, 7 * weights)]


def test_least_seconds_takes_the_longer_of_arithmetic_and_traffic_phase_by_phase():
    phases = [roofline.Phase(100, 1), roofline.Phase(1, 100)]
    assert roofline.least_seconds(phases, flops=10, bandwidth=20) == 10 + 5


def test_a_ppo_iteration_has_its_generation_three_scorings_and_all_updates(bench):
    prompts, epochs, minibatch, *_ = TINY.ppo
    length, updates = TINY.prompt + TINY.completion, prompts // minibatch
    phases = ppo.work(bench, "separate", "fp32", 0.0).least(4)
    assert len(phases) == TINY.completion + 3 + epochs * updates * (2 + 2)
    with_logits = prompts * brute_force_forward(TINY.shape, length, TINY.completion)
    without = prompts * brute_force_forward(TINY.shape, length, 0)
    generation = sum(phase.flops for phase in phases[: TINY.completion])
    expected = generation + (with_logits + 2 * without) + 3 * epochs * (with_logits + without)
    assert sum(phase.flops for phase in phases) == pytest.approx(expected, rel=1e-12)
    assert len(ppo.work(bench, "shared", "fp32", 0.0).least(4)) == TINY.completion + 2 + epochs * updates * 2


def test_an_rloo_iteration_reads_a_prompt_once_and_updates_no_critic(bench):
    against_trl, against_ours = (work.least(4) for work in rloo.works(bench))
    prompt, completion, completions = TINY.ppo.prompt, TINY.ppo.completion, TINY.ppo.completions
    assert against_trl[0].flops == completions // 4 * brute_force_forward(TINY.shape, prompt, 1)
    scored = completions * brute_force_forward(TINY.shape, prompt + completion, completion)
    assert [phase.flops for phase in against_trl[completion:]] == [scored, 3 * scored, 0]
    assert len(against_ours) == completion + 2 + TINY.ppo.updates * 2


# ---- what both sides work on


@pytest.mark.parametrize("name", ["tiny", "small", "smollm2"])
def test_numbers_of_a_shape_are_those_of_our_model(name):
    shape = material.SIZES[name].shape
    config = ours.model_shape(shape)
    leaves = named_leaves(architecture_of(config).empty(config))
    assert sum(leaf.numel() for leaf in leaves.values()) == shape.parameters
    matrices = [leaf.numel() for path, leaf in leaves.items() if leaf.ndim == 2 and path.split(".")[1:2] == ["0"]]
    assert sum(matrices) == shape.block_matrices


def test_parameters_of_gpt2_are_the_published_number():
    assert material.SIZES["gpt2"].shape.parameters == 124_439_808


@pytest.mark.parametrize("longest", [128, 256])
def test_varied_lengths_average_a_third_of_the_longest(longest):
    lengths = np.array(material.varied_lengths(4096, longest))
    assert 4 <= lengths.min() < longest / 8
    assert lengths.max() == longest
    assert 0.28 < lengths.mean() / longest < 0.36
    assert lengths.tolist() == material.varied_lengths(4096, longest)  # the same on both sides


@pytest.mark.parametrize("name", material.SIZES)
def test_stop_tokens_end_completions_at_a_third_of_the_longest(name):
    size = material.SIZES[name]
    stops = material.stop_tokens(size)
    assert stops == sorted(set(stops))
    assert stops[-1] < size.shape.vocab_size
    drawn = np.random.default_rng(0).integers(0, size.shape.vocab_size, (20_000, size.completion))
    ended = drawn >= stops[0]
    lengths = np.where(ended.any(1), ended.argmax(1) + 1, size.completion)
    assert lengths.mean() == pytest.approx(size.completion / 3, rel=0.04)


@pytest.mark.parametrize("size", material.SIZES.values(), ids=material.SIZES)
def test_data_have_the_sizes_that_are_promised(size):
    size = size._replace(shape=size.shape._replace(n_layer=1))
    count, longest = size.sft
    full = material.demonstrations(size, varied=False)
    assert {len(tokens) for tokens in full} == {longest}
    assert len(full) % count == 0
    pairs, length = size.pairs
    chosen = material.preferences(size)
    assert {(len(pair[0]), len(pair[1])) for pair in chosen} == {(length, length)}
    shared = material.pair_prompt(size)
    assert all(pair[0][:shared] == pair[1][:shared] and pair[0] != pair[1] for pair in chosen)
    assert len(chosen) % pairs == 0
    assert min(min(tokens) for tokens in full) >= material.FIRST_TOKEN
    assert max(max(tokens) for tokens in full) < size.shape.vocab_size
    assert size.prompt + size.completion <= size.shape.n_positions


# ---- refusals


WORK = compare.Work("a piece of work", "a peer", (), (), 1.0, lambda number: [roofline.Phase(1e6, 1e6)])


def side_with(*, rounds=({"tokens": 64, "loss": 3.0},), **facts):
    usual = {"parameters": 10, "threads": 1, "torch": "2", "fp32_error": 1e-7}
    return SimpleNamespace(facts=usual | facts, rounds=list(rounds))


UNLIKE = {
    "parameters": {"parameters": 11},
    "threads": {"threads": 2},
    "torch": {"torch": "3"},
    "float32 products are not IEEE": {"fp32_error": 1e-3},
    "tokens of a round": {"rounds": [{"tokens": 63, "loss": 3.0}]},
    "losses differ": {"rounds": [{"tokens": 64, "loss": 3.01}]},
}


@pytest.mark.parametrize("message", UNLIKE)
def test_sides_that_are_not_alike_are_refused(message):
    compare.check_alike(WORK, side_with(), side_with())
    for pair in ((side_with(), side_with(**UNLIKE[message])), (side_with(**UNLIKE[message]), side_with())):
        with pytest.raises(sides.SideError, match=f"a piece of work: .*{message}"):
            compare.check_alike(WORK, *pair)


def test_what_may_differ_is_let_through():
    close = side_with(rounds=[{"tokens": 64, "loss": 3.002}])
    compare.check_alike(WORK, side_with(), close)
    narrow = side_with(fp32_error=1e-3, rounds=[{"tokens": 64, "loss": 3.3}])
    compare.check_alike(replace(WORK, exact=False), side_with(), narrow)
    others = side_with(rounds=[{"tokens": 63, "loss": 2.0}])
    compare.check_alike(replace(WORK, same_tokens=False), side_with(), others)


def test_the_error_of_float32_products_is_found_by_deed():
    assert session.conditions("cpu")["fp32_error"] < 1e-5
    factor = torch.rand(256, 256, generator=torch.Generator().manual_seed(0))
    exact = factor.double() @ factor.double()
    narrow = (factor.bfloat16() @ factor.bfloat16()).double()
    assert (narrow - exact).abs().max() / exact.abs().max() > 1e-5  # what would be refused


# ---- what may import what


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "peers").glob("*.py")), ids=lambda path: path.name)
def test_peers_know_nothing_of_us_but_the_material_and_the_session(path):
    own = {module for module in imports_of(path) if module.split(".")[0] in ("rlhf", "benchmarks", "ray", "rich")}
    assert own <= {"benchmarks", "benchmarks.material", "benchmarks.session", "benchmarks.session.Session"}


def test_what_peers_import_is_in_their_environment():
    allowed = set(sys.stdlib_module_names) | {"numpy", "torch"}
    for name in ("material", "session"):
        assert {module.split(".")[0] for module in imports_of(ROOT / "benchmarks" / f"{name}.py")} <= allowed


# ---- our sides, in this process


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return ours.make_material(tmp_path_factory.mktemp("material"), "tiny")


def rounds_of(function, rounds, **settings):
    """What one of our sides says when it is asked for so many rounds."""
    answers = io.StringIO()
    function(session.Session(io.StringIO("round\n" * rounds), answers), size="tiny", device="cpu", **settings)
    ready, *answered = map(json.loads, answers.getvalue().splitlines())
    assert len(answered) == rounds
    assert all(facts["peak_bytes"] > 1e7 for facts in answered)
    return ready, answered


def test_our_generation_draws_every_token(made):
    settings = {"model": str(made.model), "prompts": 3, "batch": 2, "stops": []}
    ready, answered = rounds_of(ours.generate, 2, **settings, **EAGER)
    assert ready["parameters"] == TINY.shape.parameters
    assert [facts["tokens"] for facts in answered] == [3 * TINY.completion] * 2


def test_our_generation_stops_where_the_peer_would(made):
    """An untrained model draws nearly uniformly, so completions are as long as `stop_tokens` makes them."""
    stops = material.stop_tokens(TINY)
    _, answered = rounds_of(ours.generate, 40, model=str(made.model), prompts=16, batch=4, stops=stops, **EAGER)
    lengths = [facts["tokens"] / 16 for facts in answered]
    assert len(set(lengths)) > 1  # every round has draws of its own
    assert np.mean(lengths) == pytest.approx(TINY.completion / 3, rel=0.1)


def test_our_sft_step_has_the_loss_of_the_module_written_for_the_benchmark(made):
    settings = {"model": str(made.model), "varied": False}
    ready, answered = rounds_of(ours.sft, 3, **settings, **EAGER)
    count, longest = TINY.sft
    assert ready["parameters"] == TINY.shape.parameters
    assert [facts["tokens"] for facts in answered] == [TINY.steps * count * longest] * 3
    with torch.random.fork_rng():
        model = GPT2(TINY.shape)
    model.load(made.model)
    batch = torch.tensor(material.demonstrations(TINY, varied=False)[:count])
    expected = model(batch).item() * count * (longest - 1)
    assert answered[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert expected == pytest.approx(count * (longest - 1) * math.log(TINY.shape.vocab_size), rel=0.01)


def test_our_sft_takes_sequences_of_many_lengths_in_turn(made):
    _, answered = rounds_of(ours.sft, 3, model=str(made.model), varied=True, **EAGER)
    lengths = [len(tokens) for tokens in material.demonstrations(TINY, varied=True)]
    assert [facts["tokens"] for facts in answered] == np.reshape(lengths[:12], (3, 4)).sum(1).tolist()
    assert len(set(lengths)) > 3


def test_our_reward_step_reads_both_members_of_every_pair(made):
    ready, answered = rounds_of(ours.reward, 2, model=str(made.reward), **EAGER)
    pairs, length = TINY.pairs
    assert ready["parameters"] == TINY.shape.parameters + TINY.shape.n_embd
    assert [facts["tokens"] for facts in answered] == [TINY.steps * 2 * pairs * length] * 2
    assert all(0 < facts["loss"] < 5 for facts in answered)


def test_our_dpo_starts_at_its_reference_and_learns_the_pairs_that_come_back(made):
    ready, answered = rounds_of(ours.dpo, 2 * material.DPO_BATCHES, model=str(made.model), **EAGER)
    pairs, length = TINY.pairs
    assert ready["parameters"] == TINY.shape.parameters
    assert {facts["tokens"] for facts in answered} == {TINY.steps * 2 * pairs * length}
    assert answered[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    first, second = np.reshape([facts["loss"] for facts in answered], (2, -1)).mean(1)
    assert second < first


def test_our_rloo_makes_one_update_on_four_completions_of_a_prompt(made):
    iteration = TINY.ppo._replace(prompts=1, samples=4, epochs=1, minibatch=4)
    settings = {"model": str(made.model), "reward": "benchmarks.material:kindness", "critic": "none"}
    _, answered = rounds_of(ours.ppo, 2, prompts_file=str(made.prompts), iteration=iteration, **settings, **EAGER)
    assert [facts["tokens"] for facts in answered] == [4 * (TINY.ppo.prompt + TINY.ppo.completion)] * 2


@pytest.mark.parametrize(("critic", "micro"), [("separate", 0), ("shared", 2)])
def test_our_ppo_is_held_between_iterations_and_ends_when_no_more_are_asked_for(made, critic, micro):
    files = {"model": str(made.model), "reward": str(made.reward), "prompts_file": str(made.prompts)}
    ready, answered = rounds_of(ours.ppo, 2, critic=critic, micro_batch=micro, rollout_batch=micro, **files, **EAGER)
    assert ready["parameters"] == TINY.shape.parameters
    assert [facts["tokens"] for facts in answered] == [TINY.ppo.prompts * (TINY.ppo.prompt + TINY.ppo.completion)] * 2


def test_prompts_are_of_the_promised_length_in_our_tokens(made):
    records = json.loads(made.prompts.read_text())
    assert len(records) == 4 * TINY.ppo[0]
    assert {len(record["ids"]) for record in records} == {TINY.prompt}


def test_a_pretrained_model_is_loaded_where_it_lies_and_is_the_reward_models_trunk(made, tmp_path):
    again = ours.make_material(tmp_path, "tiny", made.model)
    assert again.model == made.model
    assert again.prompts.read_text() == made.prompts.read_text()
    trunk = named_leaves(load_reward_model(again.reward).params["trunk"])
    assert all(
        torch.equal(leaf, trunk[name]) for name, leaf in named_leaves(load_language_model(made.model).params).items()
    )
    with pytest.raises(SystemExit, match=r"--model .* has [\d,]+ parameters; --size small is of one with 940,800"):
        ours.make_material(tmp_path / "small", "small", made.model)


# ---- sides as processes, and whole runs


@pytest.fixture
def bench(made, tmp_path):
    """A run against a peer that does no work."""
    python = tmp_path / "peers" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} {ROOT}/tests/fake_peer.py "$@"\n')
    python.chmod(0o755)
    return Bench("tiny", "cpu", 2, 1, "", tmp_path / "peers", tmp_path / "output", made)


def fake(**settings):
    """A side of no work, without the detour over another interpreter."""
    common = {"size": "tiny", "device": "cpu", "threads": 1, "tokens": 5}
    return sides.Setting("fake", "fake_peer:run", common | settings, path=str(ROOT / "tests"))


def children():
    """Processes that this one has started and that still run, or were not waited for."""
    return {number for path in Path("/proc/self/task").glob("*/children") for number in path.read_text().split()}


@pytest.fixture
def _nothing_is_left_running():
    before = children()
    yield
    assert children() <= before


@pytest.mark.usefixtures("_nothing_is_left_running")
def test_a_side_that_dies_is_reported_with_the_end_of_its_log(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_PEER", "round 1")
    log = tmp_path / "logs" / "side.log"
    with sides.Side(fake(), log) as side:
        side.round()
        assert side.rounds[0]["tokens"] == 5
        with pytest.raises(sides.SideError, match=r"fake_peer:run \(fake\) ended: .*in the middle of a round"):
            side.round()
    assert "out of luck" in log.read_text()  # what a library prints is no answer
    with pytest.raises(sides.SideError, match="No module named 'no_peer'"):
        sides.Side(replace(fake(), target="no_peer:run"), log)


@pytest.mark.usefixtures("_nothing_is_left_running")
def test_the_peer_may_end_between_two_rounds(tmp_path):
    with sides.Side(fake(), tmp_path / "side.log") as side:
        side._process.kill()
        side._process.wait()
        with pytest.raises(sides.SideError, match="ended"):
            side.round()


KEYS = ["work", "peer", "ours, ms", "peer, ms", "ours, tokens/s", "peer, tokens/s", "ratio", "target", "of roofline"]
DETAILS = ["settings", "tried", "seconds", "tokens", "conditions", "peak_bytes", "machine limits"]


@pytest.mark.usefixtures("_nothing_is_left_running")
def test_a_comparison_prints_its_table_and_writes_json(bench, monkeypatch, capsys):
    """Ours without compilation, against a peer of two settings of which one is taken."""
    monkeypatch.setattr(ours, "COMPILED_FP32", (EAGER,))
    generate.run(replace(bench, only="batch 2"))
    printed = capsys.readouterr().out
    assert "generate-tiny-cpu" in printed
    assert all(heading in printed for heading in KEYS[2:])
    written = json.loads((bench.output / "generate-tiny-cpu.json").read_text())
    assert set(written) == {"taken", "machine", "rows"}
    assert {"cpu", "cores", "python", "torch", "ray", "numpy"} <= set(written["machine"])
    assert written["machine"]["torch"] == version("torch")
    (row,) = written["rows"]
    assert list(row) == KEYS + DETAILS
    assert row["tokens"] == {"ours": [20, 20], "peer": [20, 20]}
    assert set(row["tried"]["peer"]) == {"cache dynamic", "cache static"}
    assert set(row["seconds"]) == {"ours", "peer", "copy", "product"}
    assert row["conditions"]["ours"]["parameters"] == TINY.shape.parameters
    rates = [
        20 / mine / (20 / theirs) for mine, theirs in zip(row["seconds"]["ours"], row["seconds"]["peer"], strict=True)
    ]
    assert row["ratio"] == pytest.approx(np.median(rates))
    least = roofline.least_seconds(
        roofline.generation(TINY.shape, 2, TINY.prompt, TINY.completion, 4),
        flops=2 * 2048**3 / np.min(row["seconds"]["product"]),
        bandwidth=2 * 4 * 2**26 / np.min(row["seconds"]["copy"]),
    )
    assert row["of roofline"] == pytest.approx(least / np.median(row["seconds"]["ours"]))


def test_a_run_is_compared_with_an_earlier_one(tmp_path, capsys):
    """The peer's time, which the machine doubled, cancels in the ratio; the last line is JSON."""
    earlier, now = tmp_path / "earlier", tmp_path / "now"
    sft = {"work": "SFT", "peer": "TRL", "ratio": 3.0, "seconds": {"ours": [1.0, 2.0, 3.0]}}
    timing.write("sft", [sft], earlier)
    timing.write("memory", [{"work": "PPO", "peer": "TRL", "ours, MB": 400.0, "ratio": 0.5}], earlier)
    rows = [sft | {"ratio": 3.3, "seconds": {"ours": [4.0]}}, sft | {"work": "another"}]
    written = [timing.write("sft", rows, now), timing.write("scaling", [{"what": "step", "ms": 7.0}], now)]
    written += [timing.write("phases", [{"iteration": "PPO", "phase": "score", "ms": "5 [4 to 9]"}], now)]
    history.report(written, history.read(earlier))
    *table, last = capsys.readouterr().out.splitlines()
    assert "this run against the earlier one" in "".join(table)
    assert json.loads(last)["rows"] == {
        "SFT, TRL": {"ours": 4000.0, "ratio": 3.3},
        "another, TRL": {"ours": 2000.0, "ratio": 3.0},
        "step": {"ours": 7.0, "ratio": None},
        "PPO, score": {"ours": 5.0, "ratio": None},
    }
    (compared,) = json.loads(last)["against"]
    assert compared["now / then"] == 2
    assert compared["ratio to the peer, now / then"] == pytest.approx(1.1)


@pytest.mark.parametrize("content", [None, "[]", '{"rows": [1]}', "{"])
def test_a_file_that_holds_no_results_is_refused_before_anything_is_measured(tmp_path, monkeypatch, content):
    path = tmp_path / "earlier.json"
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "sft", "--against", str(path)])
    with pytest.raises(SystemExit, match=r"--against .*earlier\.json is no file of results"):
        program.command()


@pytest.mark.usefixtures("_nothing_is_left_running")
def test_a_peer_that_does_not_start_ends_the_program(bench, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_PEER", "dead")
    monkeypatch.setattr(ours, "COMPILED_FP32", (EAGER,))
    command = ["benchmarks", "generate", "--size", "tiny", "--only", "batch 2", "--threads", "1"]
    command += ["--peers", str(bench.peers), "--output", str(bench.output)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match=r"no setting works: .*a peer that does not start"):  # text: exit code 1
        program.command()
    assert not list(bench.output.glob("*.json"))


def test_peers_that_are_not_installed_are_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "sft", "--peers", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match=r"python -m benchmarks peers --peers .*none"):
        program.command()


def test_the_readmes_commands_parse_and_leave_none_out():
    lines = (ROOT / "benchmarks" / "README.md").read_text().splitlines()
    commands = [shlex.split(line, comments=True)[3:] for line in lines if line.startswith("python -m benchmarks")]
    asked = [tyro.cli(program.Benchmarks, args=command) for command in commands]
    (choices,) = [field.type for field in fields(program.Benchmarks) if field.name == "which"]
    assert {one.which for one in asked} == set(get_args(get_args(choices)[0]))


def test_help_does_not_wait_for_torch():
    code = "import sys, benchmarks.__main__; assert {'torch', 'ray', 'numpy', 'rich'}.isdisjoint(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ---- the peers' environment


@pytest.mark.parametrize("torch_version", ["2.13.0", "2.13.0+cpu"])
def test_one_command_makes_the_environment_with_our_torch(tmp_path, monkeypatch, torch_version):
    """A stand-in for Python notes what it is asked to do; its `venv` copies itself."""
    python, notes = tmp_path / "python", tmp_path / "notes"
    python.write_text(
        f'#!/bin/sh\necho "$@" >> {notes}\n'
        f'[ "$2" = venv ] && mkdir -p "$3/bin" && cp {python} "$3/bin/python"\nexit 0\n'
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(environment, "version", lambda package: torch_version)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "peers", "--peers", str(tmp_path / "peers")])
    program.command()
    venv, torch_line, peers, trl = notes.read_text().splitlines()
    assert venv == f"-m venv {tmp_path}/peers"
    assert all(line.startswith("-m pip install") for line in (torch_line, peers, trl))
    assert torch_line.endswith(f" torch=={torch_version}")
    assert (" --extra-index-url https://download.pytorch.org/whl/cpu " in torch_line) == ("+" in torch_version)
    assert ("index" in torch_line) == ("+" in torch_version)
    assert f"torch=={torch_version} --requirement {ROOT}/benchmarks/peers/requirements.txt" in peers
    assert f"--no-deps --upgrade --target {tmp_path}/peers/trl-with-ppo" in trl
    environment.check(tmp_path / "peers")


def test_peers_are_pinned():
    folder = ROOT / "benchmarks" / "peers"
    for name in ("requirements.txt", "requirements-ppo.txt"):
        lines = [line for line in (folder / name).read_text().splitlines() if line and not line.startswith("#")]
        assert lines
        assert all("==" in line for line in lines)


# ---- every comparison, as it is run


def run_program(bench, *arguments, **environment):
    """`python -m benchmarks` in a process of its own; of our settings, one without compilation is tried."""
    code = f"""
from benchmarks import ours, __main__ as program
ours.COMPILED_FP32 = ours.COMPILED_BEST = ({EAGER},)
program.command()
"""
    command = [sys.executable, "-c", code, *arguments, "--size", "tiny", "--rounds", "2", "--threads", "1"]
    command += ["--peers", str(bench.peers), "--output", str(bench.output)]
    environment = os.environ | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("which", program.COMPARISONS)
def test_every_comparison_runs_to_its_end(bench, which):
    done = run_program(bench, which)
    assert done.returncode == 0, done.stderr
    title = f"{which}-tiny-cpu"
    assert title in done.stdout
    assert len(json.loads(done.stdout.splitlines()[-1])["rows"])
    rows = json.loads((bench.output / f"{title}.json").read_text())["rows"]
    expected = {"startup": 1, "generate": 2, "sft": 6, "reward": 1, "dpo": 1, "ppo": 3, "rloo": 2, "memory": 5}
    assert len(rows) == expected[which]
    assert all(row["ratio"] > 0 for row in rows)
    if which == "memory":
        assert [(row["peer"], row["peer, MB"]) for row in rows[:2]] == [("a limit", 6000)] * 2
        assert all(100 < row["ours, MB"] == pytest.approx(row["ratio"] * row["peer, MB"]) for row in rows)


@pytest.mark.slow
def test_a_peer_that_breaks_off_ends_the_program_with_an_exit_code(bench):
    done = run_program(bench, "memory", "--only", "shared critic, fp32", FAKE_PEER="round 1")
    assert done.returncode == 1
    assert "in the middle of a round" in done.stderr
    assert done.stderr.startswith("python -m benchmarks: benchmarks.peers.trl_ppo:run")


def test_the_table_of_the_cost_model_is_the_readmes():
    assert cost_model.table() in Path(program.__file__).with_name("README.md").read_text()


@pytest.mark.parametrize("gpus", cost_model.GPUS)
def test_no_design_of_the_cost_model_costs_more_than_the_one_before(gpus):
    costs = [cost_model.step_cost(gpus, design) for design in cost_model.DESIGNS.values()]
    assert all(new["ms"] <= old["ms"] for old, new in itertools.pairwise(costs))
    for cost in costs:
        parts = [cost[name] for name in ("computation", "traffic", "calls", "snapshots")]
        assert sum(parts) == pytest.approx(cost["ms"])
        assert cost["of ideal"] == pytest.approx(parts[0] / cost["ms"])


def test_traffic_of_the_cost_model_is_what_each_gpu_sends():
    """Counted GPU by GPU: a range of the gradient to every other owner, and the same of the parameters."""
    gpus, near = 64, cost_model.MACHINE
    share = cost_model.PARAMETERS / gpus
    all_to_all = cost_model.Design(by_machine=False)
    expected = 2e3 * share * (7 / cost_model.WITHIN + 56 / cost_model.BETWEEN)
    assert cost_model.step_cost(gpus, all_to_all)["traffic"] == pytest.approx(expected)
    expected = 2e3 * share * (7 * gpus / near / cost_model.WITHIN + 7 / cost_model.BETWEEN)
    assert cost_model.step_cost(gpus, cost_model.Design())["traffic"] == pytest.approx(expected)


def test_timed_calls_pass_everything_on():
    calls = scaling._Calls()
    work = calls.timed(lambda executor, name, *, overlap: overlap(name))
    assert work(object(), "ppo", overlap=str.upper) == "PPO"
    assert calls.seconds > 0
