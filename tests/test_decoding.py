"""Completing prompts: against the full forward pass, transformers, and each completion alone."""

import dataclasses

import pytest
import torch
from families import SHAPES, disturbed, hugging_face

from rlhf import random
from rlhf.models.architecture import architecture_of
from rlhf.models.decoding import generate_completions as generate
from rlhf.models.forward import forward
from rlhf.models.heads import apply_head
from rlhf.ops import entropy, token_log_probs
from rlhf.tree import tree_map

LENGTHS = torch.tensor([6, 1, 4])


@pytest.fixture(params=["gpt2", "qwen3"])
def config(request):
    """Families of different blocks; qwen3 shares keys and values. `test_families` has the others."""
    return dataclasses.replace(SHAPES[request.param], n_positions=32)


@pytest.fixture
def params(config):
    return disturbed(config)


@pytest.fixture
def keys():
    return random.split(random.key(11), 3)


def test_generate_log_probs_and_values_are_those_of_the_full_forward(params, config, tokens, keys):
    head = {"weight": random.normal(random.key(9), (1, config.n_embd)), "bias": torch.tensor([0.5])}
    out = generate(
        params, tokens[:, :6], LENGTHS, keys, config=config, max_new_tokens=10, temperature=0.7, top_k=20,
        stop_tokens=[3, 17], value_head=head,
    )  # fmt: skip
    assert out.mask.any()
    decoder = architecture_of(config)
    for row in range(3):
        length = int(out.mask[row].sum())
        sequence = torch.cat([tokens[row, : LENGTHS[row]], out.tokens[row, :length]])
        hidden = decoder.hidden_states(params, sequence[None], config=config)[0, LENGTHS[row] - 1 : -1]
        expected = token_log_probs(
            decoder.logits(params, hidden, config=config), out.tokens[row, :length], temperature=0.7
        )
        torch.testing.assert_close(out.log_probs[row, :length], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out.values[row, :length], apply_head(head, hidden), atol=1e-5, rtol=1e-5)


def test_generate_row_depends_on_its_prompt_and_key_alone(params, config, tokens, keys):
    def run(rows: list[int], width: int = 6):
        return generate(params, tokens[rows, :width], LENGTHS[rows], keys[rows], config=config, max_new_tokens=12)

    together = run([0, 1, 2])
    for row, width in ((0, 6), (1, 1), (2, 4)):
        alone = run([row], width)
        assert torch.equal(alone.tokens[0], together.tokens[row])
        torch.testing.assert_close(alone.log_probs[0], together.log_probs[row], atol=1e-5, rtol=1e-5)
    assert torch.equal(run([2, 0]).tokens, together.tokens[[2, 0]])


ENDS = {"ends": [3, 17, 20, 21, 22, 23], "full": []}


@pytest.mark.parametrize("ends", ENDS, ids=str)
@pytest.mark.parametrize("max_concurrent", [1, 2, 3, 8, 9, 16, 40])
def test_generate_slots_and_shared_prompts_change_nothing(params, config, tokens, max_concurrent, ends):
    """Refilling, dropping rows and reading a prompt once for its samples: the same tokens as row by row."""
    count, head = 19, {"weight": random.normal(random.key(9), (1, config.n_embd)), "bias": torch.tensor([0.5])}
    source, keys = torch.arange(count) % 3, random.split(random.key(8), count)
    settings = {"config": config, "max_new_tokens": 11, "stop_tokens": ENDS[ends], "value_head": head}
    given = {"with_entropies": True, "temperature": 0.8}
    out = generate(
        params, tokens[:, :6], LENGTHS, keys, source=source, max_concurrent=max_concurrent, **settings, **given
    )
    assert len(set(out.mask.sum(dim=1).tolist())) > (3 if ENDS[ends] else 0), (
        "lengths must differ for refills to matter"
    )
    for row in range(count):
        prompt = slice(int(source[row]), int(source[row]) + 1)
        alone = generate(params, tokens[prompt, :6], LENGTHS[prompt], keys[row : row + 1], **settings, **given)
        assert torch.equal(alone.tokens[0], out.tokens[row])
        assert torch.equal(alone.mask[0], out.mask[row])
        assert alone.ended[0] == out.ended[row]
        for field in ("log_probs", "values", "entropies"):
            torch.testing.assert_close(getattr(alone, field)[0], getattr(out, field)[row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", [0, 2, 5])
def test_generate_looks_at_all_that_a_row_has_read_after_others_were_dropped(config, seed):
    """The rows fill one block of the cache or two: a length held for another row would hide keys."""
    config = dataclasses.replace(config, n_positions=64)
    params = disturbed(config)
    prompts = (random.uniform(random.key(4), (8, 40)) * config.vocab_size).long()
    lengths, keys = torch.tensor([1, 40] * 4), random.split(random.key(seed), 8)
    settings = {"config": config, "max_new_tokens": 20, "stop_tokens": ENDS["ends"]}
    out = generate(params, prompts, lengths, keys, **settings)
    for row in range(8):
        alone = generate(params, prompts[row : row + 1], lengths[row : row + 1], keys[row : row + 1], **settings)
        assert torch.equal(alone.tokens[0], out.tokens[row])
        torch.testing.assert_close(alone.log_probs[0], out.log_probs[row], atol=1e-5, rtol=1e-5)


def test_generate_entropies_are_those_of_the_distribution_drawn_from(params, config, tokens, keys):
    settings = {"config": config, "max_new_tokens": 1, "temperature": 0.7}
    out = generate(params, tokens[:, :6], torch.full((3,), 6), keys, with_entropies=True, **settings)
    expected = entropy(forward(params, tokens[:, :6], config=config)[:, -1], temperature=0.7)
    torch.testing.assert_close(out.entropies[:, 0], expected, atol=1e-5, rtol=1e-5)
    assert not generate(params, tokens[:, :6], LENGTHS, keys, **settings).entropies.any()


def test_generate_different_keys_give_different_completions(params, config, tokens):
    same_prompt, same_length = tokens[:1, :6].expand(64, -1), torch.full((64,), 6)
    out = generate(params, same_prompt, same_length, random.split(random.key(1), 64), config=config, max_new_tokens=6)
    assert len({tuple(row) for row in out.tokens.tolist()}) > 60


def test_generate_first_token_follows_the_models_distribution(params, config, tokens):
    count = 4000
    prompt, lengths = tokens[:1, :6].expand(count, -1), torch.full((count,), 6)
    keys = random.split(random.key(2), count)
    out = generate(params, prompt, lengths, keys, config=config, max_new_tokens=1, temperature=1.3)
    probs = (forward(params, tokens[:1, :6], config=config)[0, -1] / 1.3).double().softmax(-1)
    counts = torch.bincount(out.tokens[:, 0], minlength=config.vocab_size)
    common = probs * count >= 5
    chi_square = ((counts - probs * count).square() / (probs * count))[common].sum().item()
    assert chi_square < common.sum().item() + 4 * (2 * common.sum().item()) ** 0.5


def test_generate_greedy_equals_transformers(params, config, tokens, keys):
    model = hugging_face(params, config)
    mask = torch.ones(3, 6, dtype=torch.int64)
    settings = {"do_sample": False, "max_new_tokens": 10, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(tokens[:, :6], attention_mask=mask, **settings)
    out = generate(params, tokens[:, :6], torch.full((3,), 6), keys, config=config, max_new_tokens=10, top_k=1)
    assert torch.equal(out.tokens, expected[:, 6:])


def test_generate_ends_rows_at_stop_tokens(params, config, tokens, keys):
    free = generate(params, tokens[:, :6], LENGTHS, keys, config=config, max_new_tokens=12)
    assert free.mask.all()
    assert not free.ended.any()
    stop = int(free.tokens[0, 4])
    out = generate(params, tokens[:, :6], LENGTHS, keys, config=config, max_new_tokens=12, stop_tokens=[stop])
    for row in range(3):
        drawn = free.tokens[row].tolist()
        length = drawn.index(stop) + 1 if stop in drawn else 12
        assert out.tokens[row].tolist() == drawn[:length] + [0] * (12 - length)
        assert out.mask[row].tolist() == [True] * length + [False] * (12 - length)
        assert bool(out.ended[row]) == (stop in drawn)
        assert not out.log_probs[row, length:].any()


def test_generate_draws_no_stop_token_before_the_minimum(params, config, tokens, keys):
    stops = list(range(0, config.vocab_size, 2))
    for minimum in (0, 3, 5):
        limits = {"max_new_tokens": 8, "min_new_tokens": minimum, "stop_tokens": stops}
        out = generate(params, tokens[:, :6], LENGTHS, keys, config=config, **limits)
        assert (out.tokens[:, :minimum] % 2 == 1).all()
        assert (out.mask.sum(dim=1) > minimum).all()
    assert (
        generate(params, tokens[:, :6], LENGTHS, keys, config=config, max_new_tokens=8, stop_tokens=stops).ended
    ).all()


def test_generate_filters_shape_what_is_drawn_but_not_the_log_probs(params, config, tokens, keys):
    out = generate(params, tokens[:, :6], torch.full((3,), 6), keys, config=config, max_new_tokens=1, top_k=2)
    logits = forward(params, tokens[:, :6], config=config)[:, -1]
    assert all(out.tokens[row, 0] in logits[row].topk(2).indices for row in range(3))
    torch.testing.assert_close(out.log_probs[:, 0], token_log_probs(logits, out.tokens[:, 0]), atol=1e-5, rtol=1e-5)


def test_wrong_arguments_are_named(params, config, tokens, keys):
    good = {"config": config, "max_new_tokens": 4}
    with pytest.raises(ValueError, match=r"generate_completions: max_new_tokens is 27, expected in \[1, 26\]"):
        generate(params, tokens[:, :6], LENGTHS, keys, config=config, max_new_tokens=27)
    with pytest.raises(TypeError, match=r"generate_completions: prompts has dtype torch\.int32"):
        generate(params, tokens[:, :6].int(), LENGTHS, keys, **good)
    with pytest.raises(ValueError, match=r"generate_completions: keys has shape \(2,\)"):
        generate(params, tokens[:, :6], LENGTHS, keys[0], **good)
    for lengths in ([0, 4, 4], [6, 7, 6]):
        with pytest.raises(ValueError, match=r"generate_completions: prompt_lengths is \[.*\], expected in \[1, 6\]"):
            generate(params, tokens[:, :6], torch.tensor(lengths), keys, **good)
    with pytest.raises(ValueError, match=r"generate_completions: keys is 2, expected 3, one per prompt"):
        generate(params, tokens[:, :6], LENGTHS, keys[:2], **good)
    for fewest in (-1, 5):
        with pytest.raises(
            ValueError, match=rf"generate_completions: min_new_tokens is {fewest}, expected in \[0, 4\]"
        ):
            generate(params, tokens[:, :6], LENGTHS, keys, min_new_tokens=fewest, **good)
    with pytest.raises(ValueError, match="scale_logits: temperature is 0, expected above 0"):
        generate(params, tokens[:, :6], LENGTHS, keys, temperature=0, **good)
    with pytest.raises(ValueError, match=r"align_left: mask is .*, expected without holes"):
        generate(params, tokens[:, :6], torch.tensor([[1, 0, 1, 0, 0, 0]] * 3).bool(), keys, **good)


@pytest.mark.parametrize("before", [0, 1, 4], ids="{} in front".format)
def test_prompts_padded_on_the_left_with_their_mask_are_those_padded_on_the_right(params, config, tokens, keys, before):
    width = 6 + before
    padded = torch.full((3, width), 7)
    mask = torch.zeros(3, width, dtype=torch.bool)
    for row, length in enumerate(LENGTHS.tolist()):
        begin = width - length if before else 0
        padded[row, begin : begin + length] = tokens[row, :length]
        mask[row, begin : begin + length] = True
    settings = {"config": config, "max_new_tokens": 9}
    expected = generate(params, tokens[:, :6], LENGTHS, keys, **settings)
    for found, wanted in zip(generate(params, padded, mask, keys, **settings), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


def test_nothing_of_a_completion_has_a_gradient(params, config, tokens, keys):
    learnt = tree_map(lambda leaf: leaf.clone().requires_grad_(), params)
    out = generate(learnt, tokens[:, :6], LENGTHS, keys, config=config, max_new_tokens=3)
    assert not any(field.requires_grad for field in out)


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_completions_under_a_transform_are_refused_with_the_reason(params, config, tokens, keys, transform):
    def run(scale):
        scaled = tree_map(lambda leaf: leaf * scale, params)
        return generate(scaled, tokens[:, :6], LENGTHS, keys, config=config, max_new_tokens=3).log_probs.sum()

    calls = {
        "vmap": lambda: torch.func.vmap(run)(torch.ones(2)),
        "grad": lambda: torch.func.grad(run)(torch.tensor(1.0)),
        "jvp": lambda: torch.func.jvp(run, (torch.tensor(1.0),), (torch.tensor(1.0),)),
    }
    with pytest.raises(
        RuntimeError, match=r"generate_completions: does not support transforms .* one key per completion"
    ):
        calls[transform]()
