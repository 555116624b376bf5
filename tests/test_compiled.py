"""Compiled code against the plain functions it was made from: the same numbers, one graph for all shapes."""

import dataclasses
import functools
import json
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import pytest
import torch
from laws import assert_close, assert_same_bits
from torch._dynamo.utils import counters

from rlhf import random
from rlhf.config import (
    CheckpointConfig,
    DistConfig,
    LogConfig,
    ModelConfig,
    PipelineRun,
    PPOConfig,
    RewardConfig,
    SFTConfig,
)
from rlhf.data.collate import join_completions, pack_completions, pair_batches, ppo_batch, token_batches
from rlhf.data.dataset import TokenSequence
from rlhf.execution.compiled import compiled, has_compiler
from rlhf.execution.draws import compiled_draw
from rlhf.execution.gradients import make_gradient
from rlhf.kernels import fused_layers
from rlhf.models import gpt2
from rlhf.models.decoding import generate_completions as generate
from rlhf.models.forward import forward
from rlhf.models.gpt2_config import GPT2Config
from rlhf.models.heads import init_reward_head, init_value_head
from rlhf.ops import token_log_probs
from rlhf.train.pipeline import run_stages
from rlhf.train.ppo_objective import make_ppo_objective
from rlhf.train.reward import make_reward_objective
from rlhf.train.sft import make_sft_objective
from rlhf.tree import flat_layout

pytestmark = [
    pytest.mark.skipif(not has_compiler(), reason="no C++ compiler on the PATH"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),  # the compiler's own
]

LENGTHS = [3, 9, 14, 5, 2, 11, 7, 16, 4, 6, 13, 8]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


class Records(NamedTuple):
    """Sequences as a `Dataset` gives them; one, or two for a pair."""

    records: list[list[np.ndarray]]

    def lengths(self, record, max_length):
        return [len(tokens) for tokens in self.records[record]]

    def sequences(self, record, max_length):
        return [TokenSequence(tokens, 1) for tokens in self.records[record]]


def sequence(seed, length, config):
    return (random.uniform(random.key(seed), (length,)) * config.vocab_size).long().numpy()


def sft_batches(config):
    """Of many rows, of two, and of a single sequence, in rows of different lengths."""
    data = Records([[sequence(seed, length, config)] for seed, length in enumerate(LENGTHS)])
    options = {"max_length": 16, "loss_on": "all", "key": random.key(1)}
    return [
        token_batches(data, records, rows=rows, **options)[0]
        for records, rows in ((range(12), 8), (range(5), 2), ([4], 8), ([7], 8))
    ]


def reward_batches(config):
    """Of many pairs and of one."""
    pairs = [
        [sequence(2 * n, a, config), sequence(2 * n + 1, b, config)] for n, (a, b) in enumerate(pairwise_lengths())
    ]
    return [
        pair_batches(Records(pairs), records, max_length=16, rows=8)[0].batch
        for records in (range(6), [1], range(2, 5))
    ]


def pairwise_lengths():
    return list(zip(LENGTHS[::2], LENGTHS[1::2], strict=True))


def ppo_batches(config):
    """Of several completions and of one, of 17 tokens or more: fewer are a case of their own for the compiler."""
    prompts = [sequence(seed, 4, config) for seed in range(6)]
    tokens = torch.from_numpy(np.stack([sequence(seed, 24, config) for seed in range(10, 16)]))
    lengths = torch.tensor([24, 18, 21, 19, 23, 20])
    names = ("old_log_probs", "ref_log_probs", "old_values", "advantages", "returns")
    arrays = {name: random.normal(random.key(seed), (6, 24)) for seed, name in enumerate(names, 20)}
    joined = join_completions(prompts, tokens, lengths)
    return [
        ppo_batch(packed, **arrays, kl_coef=0.1, weights=torch.ones(6))
        for which in (range(6), [1], range(2, 6))
        for packed in pack_completions(joined, which, rows=8, row_length=32)
    ]


def models(kind, params, config):
    """(trained parameters, frozen models) of a stage."""
    head = init_value_head(config.n_embd)
    if kind == "sft":
        return params, {}
    if kind == "reward":
        return {"trunk": params, "head": init_reward_head(config.n_embd, key=random.key(4))}, {}
    value = {"critic": {"trunk": params, "head": head}} if kind == "ppo" else {"value_head": head}
    return {"policy": params} | value, {"reference": params}


OBJECTIVES = {
    "sft": (make_sft_objective, sft_batches),
    "reward": (make_reward_objective, reward_batches),
    "ppo": (lambda config, **options: make_ppo_objective(config, config, loss_kl="exact", **options), ppo_batches),
    "ppo_shared": (lambda config, **options: make_ppo_objective(config, None, **options), ppo_batches),
}
PRECISIONS = {"fp32": (torch.float32, 1e-5), "bf16": (torch.bfloat16, 3e-2)}


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        ("sft", "fp32"),
        *(
            pytest.param(kind, precision, marks=pytest.mark.slow)
            for kind in OBJECTIVES
            for precision in PRECISIONS
            if (kind, precision) != ("sft", "fp32")
        ),
    ],
)
def test_gradients_are_those_of_the_plain_function_and_one_graph_serves_all_shapes(
    kind, precision, params, config, folder
):
    make, batches = OBJECTIVES[kind]
    dtype, tolerance = PRECISIONS[precision]
    trained, frozen = models(kind, params, config)
    objective, layout = make(config, dtype=dtype), flat_layout(trained)
    plain, fast = (make_gradient(objective, layout, compile_to) for compile_to in (None, folder))
    before = counters["stats"]["unique_graphs"]
    shapes = set()
    for batch in batches(config):
        shapes.add((batch.rows.tokens.shape, len(batch.mask)))
        expected, found = plain(trained, frozen, batch), fast(trained, frozen, batch)
        assert_close(found[1], expected[1], tolerance)
        scale = expected[0].abs().max().item()
        assert_close(found[0] / scale, expected[0] / scale, tolerance)
    assert len(shapes) > 2
    assert_same_bits(fast(OrderedDict(trained), frozen, batch), found)  # models are not looked at again
    assert counters["stats"]["unique_graphs"] == before + 1


@pytest.mark.parametrize(("dtype", "short"), [(torch.bfloat16, True), (torch.float32, False)], ids=["bf16", "fp32"])
def test_exponentials_are_short_in_bfloat16_alone_and_exact_to_20_ulp(tmp_path, dtype, short):
    def both(params, frozen, x):
        return x.float().exp(), x.float().sigmoid()

    x = torch.linspace(-87.0, 88.0, 4096).to(dtype)
    x[:4] = torch.tensor([torch.nan, -torch.inf, torch.inf, -200.0])
    for found, expected in zip(compiled(both, tmp_path)({"a": x}, {}, x), both({}, {}, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=20 * 2**-23, atol=2**-125, equal_nan=True)
    written = "".join(path.read_text() for path in tmp_path.rglob("*.cpp"))
    assert ("exp_u20" in written) == short


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"top_k": 5, "top_p": 0.9, "min_new_tokens": 2, "temperature": 0.7}])
def test_compiled_draws_make_the_same_completions(params, config, folder, options):
    """Rows are refilled, and dropped when none is waiting: their number and the filled part of the cache change."""
    draw = compiled_draw(folder)
    prompts = torch.from_numpy(np.stack([sequence(seed, 6, config) for seed in range(11)]))
    lengths = torch.tensor([6, 2, 3, 1, 5, 4, 6, 6, 2, 3, 4])
    settings = {"config": config, "max_new_tokens": 14, "stop_tokens": [1, 2, 3], "with_entropies": True} | options
    settings["value_head"] = init_value_head(config.n_embd) | {
        "weight": random.normal(random.key(5), (1, config.n_embd))
    }
    graphs = []
    for seed, max_concurrent in ((1, 8), (2, 8), (3, 5), (4, 11)):
        keys = random.split(random.key(seed), 11)
        expected = generate(params, prompts, lengths, keys, max_concurrent=max_concurrent, **settings)
        found = generate(
            params, prompts, lengths, keys, max_concurrent=max_concurrent, draw=draw, draws_per_call=3, **settings
        )
        for name in ("tokens", "mask", "ended"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
        for name in ("log_probs", "values", "entropies"):
            assert_close(getattr(found, name), getattr(expected, name), 1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert len(set(graphs)) == 1, "compiled again after the first iteration"


@pytest.mark.slow
@pytest.mark.parametrize("small", [fused_layers._SMALL, 0], ids=["the compiler's own products", "packed weights"])
def test_compiled_draws_in_bfloat16_have_the_log_probs_of_the_full_forward(folder, small, monkeypatch):
    """Wide enough for the compiler's own products; what one row says depends neither on its slot nor on the others."""
    monkeypatch.setattr(fused_layers, "_SMALL", small)
    config = GPT2Config(vocab_size=96, n_positions=48, n_embd=64, n_layer=2, n_head=2)
    params = gpt2.cast_for_compute(gpt2.init(config, key=random.key(1)), torch.bfloat16)
    to_draw_with = gpt2.prepare_for_decoding(params, torch.bfloat16)
    draw = compiled_draw(folder)
    prompts = torch.from_numpy(np.stack([sequence(seed, 6, config) for seed in range(9)]))
    lengths, keys = torch.tensor([6, 2, 3, 1, 5, 4, 6, 6, 2]), random.split(random.key(3), 9)

    def run(rows):
        settings = {"config": config, "max_new_tokens": 14, "draw": draw, "draws_per_call": 2}
        return generate(to_draw_with, prompts[rows], lengths[rows], keys[rows], **settings)

    out, turned = run(torch.arange(9)), run(torch.arange(9).flip(0))
    assert_same_bits(turned.tokens.flip(0), out.tokens)
    assert_same_bits(turned.log_probs.flip(0), out.log_probs)
    for row, (prompt, length) in enumerate(zip(prompts, lengths.tolist(), strict=True)):
        text = torch.cat([prompt[:length], out.tokens[row]])
        logits = forward(params, text[None], config=config)[0, length - 1 : -1]
        assert_close(out.log_probs[row], token_log_probs(logits, out.tokens[row]), 0.02)


def pipeline(folder, cache, **changes):
    config = PipelineRun(
        output_dir=folder,
        cache_dir=cache,
        threads=1,
        model=ModelConfig(preset="tiny"),
        log=LogConfig(tensorboard=False),
        checkpoint=CheckpointConfig(every=100),
        sft=SFTConfig(max_steps=4, batch_size=16, micro_batch_size=4, eval_every=4),
        reward=RewardConfig(max_steps=4, batch_size=8, micro_batch_size=4, eval_every=4),
        ppo=PPOConfig(num_iterations=3, batch_size=16, minibatch_size=8, num_epochs=2, rollout_batch_size=8,
                      rollout_slots=4, micro_batch_size=4, max_new_tokens=12),
    )  # fmt: skip
    run_stages(dataclasses.replace(config, **changes))
    lines = [json.loads(line) for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()]
    left_out = ("time", "timing_s/", "perf/", "fault/", "peak_bytes", "notes")
    return [{k: v for k, v in line.items() if not k.startswith(left_out)} for line in lines if "event" not in line]


@pytest.mark.slow
def test_stages_run_compiled_as_they_do_plain_and_never_compile_again(tmp_path, folder):
    run = functools.partial(pipeline, cache=folder)
    plain, fast = (run(tmp_path / choice, compile=choice) for choice in ("off", "on"))
    assert [line["step"] for line in plain] == [line["step"] for line in fast]
    for expected, found in zip(plain, fast, strict=True):
        for name, value in expected.items():
            assert found[name] == (pytest.approx(value, rel=2e-3, abs=2e-4) if isinstance(value, float) else value), (
                name
            )


@pytest.mark.slow
def test_compiled_stages_have_the_same_bytes_on_ray_workers(tmp_path, folder):
    """One process compiles, the others wait for its code and load it."""
    alone = pipeline(tmp_path / "alone", folder / "shared", compile="on")
    together = pipeline(tmp_path / "together", folder / "shared", compile="on", dist=DistConfig(num_workers=2))
    assert together == alone
    for name in ("sft", "reward", "policy"):
        mine, theirs = (next((tmp_path / run / name).rglob("*.safetensors")) for run in ("together", "alone"))
        assert mine.read_bytes() == theirs.read_bytes()
