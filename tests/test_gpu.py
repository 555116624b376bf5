"""What runs on a GPU against the same on the CPU; skipped, with the reason, where there is no NVIDIA GPU."""

import os
import warnings

import pytest
import test_compiled
import torch
import toy
from laws import assert_close, assert_same_bits

from rlhf import random
from rlhf.config import DistConfig
from rlhf.data.packing import build_rows
from rlhf.distributed import connected, open_executor
from rlhf.execution.draws import CUDAGraphRunner, compiled_draw
from rlhf.execution.executor import LocalExecutor
from rlhf.execution.gradients import make_gradient
from rlhf.execution.program import ModelState, Program, StepSpec
from rlhf.models import gpt2
from rlhf.models.attention import AttentionLayout, attend_to_cache, attention_layout, heads_first, self_attention
from rlhf.models.decode_state import decode_steps
from rlhf.models.decoding import generate_completions as generate
from rlhf.models.forward import forward
from rlhf.models.gpt2_config import GPT2Config
from rlhf.ops import token_log_probs
from rlhf.optim import adamw
from rlhf.schedules import linear_schedule
from rlhf.tree import flat_layout, to_device, tree_map

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU here: NCCL and CUDA not run"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),  # the compiler's own
]

CONFIG = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=211, n_positions=64)
PROMPTS = (random.uniform(random.key(1), (13, 9)) * CONFIG.vocab_size).long()
LENGTHS = torch.tensor([3, 9, 1, 5, 7, 2, 8, 4, 6, 9, 3, 5, 1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def params():
    """Drawn wide enough that distributions are far from uniform."""
    return tree_map(lambda leaf: 4 * leaf if leaf.ndim > 1 else leaf, gpt2.init(CONFIG, key=random.key(0)))


# ---- one process


@pytest.mark.parametrize("kind", ["sft", "reward", "ppo", "ppo_shared"])
def test_steps_agree_with_the_cpu(params, kind):
    make_objective, make_batches = test_compiled.OBJECTIVES[kind]
    models = ModelState(*test_compiled.models(kind, params, CONFIG))
    objective = make_objective(CONFIG)
    program = Program({"main": StepSpec(objective, adamw(linear_schedule(1e-3, 50), eps=1e-2), 0.5)}, {}, {})
    states, metrics = [], []
    for device in ("cpu", "cuda"):
        executor = LocalExecutor(program, models, torch.device(device))
        metrics.append([executor.step("main", [batch]) for batch in make_batches(CONFIG)])
        states.append(executor.snapshot())
    for mine, theirs in zip(*metrics, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    for name, leaf in states[0].items():
        if not name.startswith("optimizer"):
            torch.testing.assert_close(states[1][name], leaf, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["sft", "ppo_shared"])
def test_compiled_gradients_agree_with_plain_ones(folder, params, kind, precision):
    dtype, tolerance = (torch.float32, 1e-4) if precision == "fp32" else (torch.bfloat16, 3e-2)
    make_objective, make_batches = test_compiled.OBJECTIVES[kind]
    trained, frozen = to_device(test_compiled.models(kind, params, CONFIG), "cuda")
    layout, objective = flat_layout(trained), make_objective(CONFIG, dtype=dtype)
    plain, fast = (make_gradient(objective, layout, place) for place in (None, folder))
    for batch in to_device(make_batches(CONFIG), "cuda"):
        (expected, (loss, _)), (found, (fast_loss, _)) = (of(trained, frozen, batch) for of in (plain, fast))
        assert float(fast_loss) == pytest.approx(float(loss), rel=tolerance)
        assert float((found - expected).norm()) < tolerance * float(expected.norm())


def test_attention_of_packed_rows_agrees_with_the_masked_form():
    lengths, places = [9, 16, 5, 30, 2], [(0, 0), (0, 9), (1, 0), (2, 0), (1, 5)]
    rows = to_device(
        build_rows([random.uniform(random.key(0), (n,)).long().numpy() for n in lengths], places).rows, "cuda"
    )
    shape = (*rows.tokens.shape, 3, 2, 64)
    qkv, weights = (random.normal(random.key(seed), shape).cuda() for seed in (1, 2))
    weights = weights[:, :, 0].transpose(1, 2)
    real = (rows.segments > 0)[:, None, :, None]
    found = []
    for dtype in (torch.float64, torch.bfloat16):
        leaf = qkv.to(torch.bfloat16).to(dtype).requires_grad_()
        if dtype == torch.bfloat16:
            out = self_attention(*heads_first(leaf), AttentionLayout(None, rows.bounds))
        else:
            out = self_attention(*heads_first(leaf), attention_layout(rows.segments, None, leaf, leaf.shape[4]))
        (out.double() * weights.double() * real).sum().backward()
        found += [(out.detach().double() * real), leaf.grad.double()]
    for exact, fast in zip(found[:2], found[2:], strict=True):
        assert torch.isfinite(fast).all()
        assert float((fast - exact).norm()) < 1e-2 * float(exact.norm())


@pytest.mark.parametrize("shared", [1, 3])
@pytest.mark.parametrize(("width", "dtype"), [(16, torch.float32), (64, torch.float32), (24, torch.bfloat16)], ids=str)
def test_attention_to_a_cache_agrees_with_the_plain_form(width, dtype, shared):
    from rlhf.kernels.decode_attention_triton import decode_attention_triton

    qkv = random.normal(random.key(1), (5, 3 * shared + 6, width))
    cache = random.normal(random.key(2), (2, 5, 150, 3, width))
    qkv, cache, lengths = qkv.cuda().to(dtype), cache.cuda().to(dtype), torch.tensor([0, 63, 64, 149, 7])
    q, k, v = qkv.split([3 * shared, 3, 3], dim=1)
    keys, values = written = cache.clone()
    found = decode_attention_triton(q, k, v, keys.permute(0, 2, 3, 1), values.transpose(1, 2), lengths.cuda())
    cache[0, range(5), lengths], cache[1, range(5), lengths] = k, v
    assert_same_bits(written, cache)
    bias = torch.where(torch.arange(150) <= lengths[:, None], 0.0, -torch.inf).double()
    (keys, values), q = cache.cpu().double(), q.cpu().double()
    exact = attend_to_cache(q, keys.permute(0, 2, 3, 1), values.transpose(1, 2), bias)
    assert_close(found.cpu().double(), exact, 1e-5 if dtype == torch.float32 else 1e-2)


# ---- completions


def completions(params, device, draw=decode_steps, dtype=torch.float32, seed=5, **settings):
    """26 completions of 13 prompts of several lengths in 7 rows, many of them ended by a stop token."""
    settings = {"max_concurrent": 7, "max_new_tokens": 24, "stop_tokens": range(9), "top_k": 0} | settings
    head = {"weight": random.normal(random.key(2), (1, CONFIG.n_embd)), "bias": torch.zeros(1)}
    placed = to_device((params, head, PROMPTS, LENGTHS, random.split(random.key(seed), 26)), device)
    params, head, *tensors = placed
    params, source = gpt2.prepare_for_decoding(params, dtype), torch.arange(26, device=device) % 13
    return generate(params, *tensors, config=CONFIG, source=source, value_head=head, draw=draw, **settings)


def assert_same(found, expected, tolerance):
    found, expected = to_device(found, "cpu"), to_device(expected, "cpu")
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.ended, expected.ended)
    for name in ("log_probs", "values"):
        assert_close(getattr(found, name), getattr(expected, name), tolerance)


def test_completions_are_those_of_the_cpu(params):
    expected = completions(params, "cpu")
    assert 5 < int(expected.ended.sum()) < 26
    assert_same(completions(params, "cuda"), expected, 1e-4)


@pytest.mark.parametrize(
    "settings", [{}, {"stop_tokens": ()}, {"max_concurrent": None, "top_p": 0.9, "min_new_tokens": 3}], ids=str
)
def test_recorded_completions_are_the_plain_ones(folder, params, settings):
    """Also with other parameters, which a recording has to take in, and again with the first."""
    draw = compiled_draw(folder)
    others = tree_map(lambda leaf: leaf * 1.1, params)
    for number, some in enumerate((params, others, params, params)):
        expected = completions(some, "cuda", seed=number // 3, **settings)
        assert_same(completions(some, "cuda", draw, seed=number // 3, **settings), expected, 1e-4)


def test_recorded_completions_in_bf16_have_the_log_probs_of_a_full_pass(folder, params):
    found = to_device(
        completions(params, "cuda", compiled_draw(folder), torch.bfloat16, max_concurrent=None, stop_tokens=()), "cpu"
    )
    assert int(found.mask.sum()) == 26 * 24
    rounded = tree_map(lambda leaf: leaf.bfloat16().float(), params)
    for row, completion in enumerate(found.tokens):
        start = int(LENGTHS[row % 13])
        text = torch.cat([PROMPTS[row % 13, :start], completion])
        exact = token_log_probs(forward(rounded, text[None], config=CONFIG)[0, start - 1 : -1], completion)
        assert float((found.log_probs[row] - exact).abs().mean()) < 0.03


def test_a_replay_does_not_wait_for_the_device(params):
    """Watched from the second time on: the first one records."""
    draw = CUDAGraphRunner(decode_steps)
    warnings.simplefilter("ignore")  # that looking for it is a prototype
    for mode in ("default", "error"):

        def watched(*arguments, mode=mode, **options):
            torch.cuda.set_sync_debug_mode(mode)
            try:
                return draw(*arguments, **options)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        completions(params, "cuda", watched, max_concurrent=None, stop_tokens=())


def test_a_recording_takes_what_it_is_given():
    def step(model, nothing, cache, x):
        cache.copy_(x * model["w"])
        return cache, x + cache

    recorded, w = CUDAGraphRunner(step), torch.ones(3, device="cuda")
    for factor in (1.0, 2.0, 3.0):
        w.fill_(factor)  # the same tensor, changed
        cache, total = recorded({"w": w}, None, torch.zeros(3, device="cuda"), torch.full((3,), 5.0, device="cuda"))
        assert cache.tolist() == [5 * factor] * 3
        assert total.tolist() == [5 + 5 * factor] * 3
    again, _ = recorded({"w": w}, None, cache, torch.ones(3, device="cuda"))
    assert again.data_ptr() == cache.data_ptr()
    assert recorded({"w": w}, None, torch.zeros(3, device="cuda"), torch.ones(1, device="cuda"))[1].tolist() == [4] * 3


def test_logits_do_not_show_how_the_embedding_is_filled_up(params):
    hidden = random.normal(random.key(9), (5, CONFIG.n_embd))
    found = gpt2.logits(to_device(params, "cuda"), hidden.cuda(), config=CONFIG)
    assert found.shape == (5, CONFIG.vocab_size)
    assert_close(found.cpu(), gpt2.logits(params, hidden, config=CONFIG), 1e-5)
    log_probs = token_log_probs(found, torch.arange(5, device="cuda"))
    assert_close(log_probs.cpu(), token_log_probs(gpt2.logits(params, hidden, config=CONFIG), torch.arange(5)), 1e-5)


# ---- through Ray


@pytest.mark.parametrize(
    ("workers", "servers", "gpus", "backend"),
    [(1, 0, 1.0, "nccl"), (2, 0, 0.25, "gloo"), (2, 0, 0.25, "shared"), (2, 1, 0.25, "shared")],
    ids=["one rank through NCCL", "two ranks on a GPU through gloo", "through memory", "with a server of its own"],
)
@pytest.mark.parametrize("mode", ["tree", "ring"])
def test_workers_on_a_gpu_agree_with_the_cpu(monkeypatch, workers, servers, gpus, backend, mode):
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(toy.__file__))
    dist = DistConfig(
        num_workers=workers, num_servers=servers, gpus_per_worker=gpus, backend=backend, reduce=mode, snapshot_every=2
    )
    states = []
    for settings in (DistConfig(), dist):
        with (
            connected(settings),
            open_executor(toy.make_program, toy.models(), settings, device=torch.device("cpu")) as executor,
        ):
            states.append(toy.drive(executor, 5)[1])
    for name, leaf in states[0].items():
        torch.testing.assert_close(states[1][name], leaf, rtol=1e-3, atol=1e-4)
