"""Every family of decoders against transformers, and the laws that hold for each."""

import dataclasses

import pytest
import torch
from families import FAMILIES, SHAPES, SIZES, disturbed, hugging_face
from torch.func import grad, jvp, vmap

from rlhf import random
from rlhf.data.packing import build_rows
from rlhf.models.architecture import architecture_of, get_architecture, model_types
from rlhf.models.decoding import generate_completions
from rlhf.models.forward import forward, packed_hidden_states, padding_layout
from rlhf.models.gpt_neox_config import PRESETS as NEOX_PRESETS
from rlhf.models.layers import rms_norm
from rlhf.models.llama_config import LLAMA_PRESETS, QWEN2_PRESETS, QWEN3_PRESETS, LlamaConfig
from rlhf.models.rope import rotary_frequencies, rotate, rotation_at
from rlhf.tree import cast, named_leaves, tree_map

TOKENS = (random.uniform(random.key(3), (3, 40)) * SIZES["vocab_size"]).long()
PADDINGS = {
    "left": torch.arange(40).expand(3, 40) >= torch.tensor([[0], [5], [33]]),
    "right": torch.arange(40).expand(3, 40) < torch.tensor([[40], [27], [2]]),
}
EACH = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES)
def config(request):
    return request.param


@pytest.fixture(scope="module")
def params(config):
    return disturbed(config)


@pytest.fixture(scope="module")
def oracle(params, config):
    return hugging_face(params, config)


def test_every_family_is_here():
    assert {config.model_type for config in SHAPES.values()} == set(model_types())


@pytest.mark.parametrize("padding", [None, *PADDINGS])
def test_logits_are_those_of_transformers(params, config, oracle, padding):
    """Positions past the context that llama3 scales from, too; a different score for each token and place."""
    mask = None if padding is None else PADDINGS[padding]
    given = {} if mask is None else {"attention_mask": mask.long(), "position_ids": padding_layout(mask)[0]}
    with torch.no_grad():
        expected = oracle(TOKENS, **given).logits
    found = forward(params, TOKENS, config=config, attention_mask=mask)
    real = slice(None) if mask is None else mask
    torch.testing.assert_close(found[real], expected[real], atol=1e-4, rtol=0)
    assert float(expected.std()) > 0.3


def test_logits_of_packed_rows_are_those_of_transformers_alone(params, config, oracle):
    family, texts = architecture_of(config), [TOKENS[0, :17], TOKENS[1, :9], TOKENS[2, :30]]
    rows = build_rows([text.numpy() for text in texts], [(0, 0), (0, 17), (1, 0)]).rows
    hidden = packed_hidden_states(params, rows, config).view(*rows.tokens.shape, -1)
    for text, (row, start) in zip(texts, [(0, 0), (0, 17), (1, 0)], strict=True):
        with torch.no_grad():
            expected = oracle(text[None]).logits[0]
        found = family.logits(params, hidden[row, start : start + len(text)], config=config)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("lengths", [[6, 6, 6], [6, 1, 4]], ids=["equal", "ragged"])
def test_invariant_15_cached_logits_are_those_of_transformers(params, config, oracle, lengths):
    """Prompts padded right into a cache, then token by token, prepared for decoding and not."""
    family, lengths = architecture_of(config), torch.tensor(lengths)
    for prepared in (params, family.prepare_for_decoding(params, torch.float32)):
        cache = family.init_cache(prepared, 3, 12, config=config)
        hidden = family.prefill(prepared, TOKENS[:, :6], lengths, cache, config=config)
        texts = [TOKENS[row, :length] for row, length in enumerate(lengths)]
        for step in range(5):
            found = family.logits(prepared, hidden, config=config)
            for row, text in enumerate(texts):
                with torch.no_grad():
                    expected = oracle(text[None]).logits[0, -1]
                torch.testing.assert_close(found[row], expected, atol=1e-4, rtol=0)
            new = TOKENS[torch.arange(3), 20 + step]
            hidden = family.decode(prepared, new, lengths + step, cache, config=config, cache_length=11)
            texts = [torch.cat([text, token[None]]) for text, token in zip(texts, new, strict=True)]


def test_the_cache_holds_key_value_heads_alone(params, config):
    cache = architecture_of(config).init_cache(params, 3, 12, config=config)
    heads, width = config.kv_heads, config.head_width
    assert {leaf.shape for leaf in cache.keys} == {(3, heads, width, 12)}
    assert {leaf.shape for leaf in cache.values} == {(3, heads, 12, width)}


def test_greedy_completions_are_those_of_transformers(params, config, oracle):
    settings = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
    expected = oracle.generate(TOKENS[:, :6], attention_mask=torch.ones(3, 6, dtype=torch.int64), **settings)
    prepared = architecture_of(config).prepare_for_decoding(params, torch.float32)
    keys, lengths = random.split(random.key(4), 3), torch.full((3,), 6)
    out = generate_completions(prepared, TOKENS[:, :6], lengths, keys, config=config, max_new_tokens=12, top_k=1)
    assert torch.equal(out.tokens, expected[:, 6:])


def test_gradients_are_those_of_transformers(params, config, oracle):
    weights = random.normal(random.key(6), (3, 40, SIZES["vocab_size"]))

    def loss(params):
        return (forward(params, TOKENS, config=config).log_softmax(-1) * weights).mean()

    oracle.zero_grad()
    (oracle(TOKENS).logits.log_softmax(-1) * weights).mean().backward()
    found = architecture_of(config).to_hugging_face(grad(loss)(params))
    theirs = {name: leaf.grad for name, leaf in oracle.named_parameters()}
    assert {name.replace("embed_out", "lm_head") for name in found} == theirs.keys()
    for name, gradient in found.items():
        expected = theirs[name.replace("embed_out", "lm_head")]
        torch.testing.assert_close(gradient, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4)


@EACH
def test_gradient_checkpointing_changes_no_bit(config):
    params, decoder = disturbed(config), architecture_of(config)

    def loss(params, checkpointing):
        hidden = decoder.hidden_states(params, TOKENS, config=config, gradient_checkpointing=checkpointing)
        return hidden.square().sum()

    plain, recomputed = (grad(loss)(params, checkpointing) for checkpointing in (False, True))
    for name, leaf in named_leaves(plain).items():
        assert torch.equal(named_leaves(recomputed)[name], leaf), name


def product(one, two):
    """The inner product of two trees."""
    return sum((a * b).sum() for a, b in zip(*(named_leaves(tree).values() for tree in (one, two)), strict=True))


@EACH
def test_derivatives_of_a_whole_model_exist_forward_backward_twice_and_mapped(config):
    config = dataclasses.replace(config, n_layer=1)
    params, tokens = cast(disturbed(config), torch.float64), TOKENS[:1, :5]

    def loss(params):
        return forward(params, tokens, config=config).log_softmax(-1)[..., 3].sum()

    along = tree_map(lambda leaf: leaf.cos(), params)
    _, slope = jvp(loss, (params,), (along,))
    gradient = grad(loss)(params)
    torch.testing.assert_close(slope, product(gradient, along), rtol=1e-9, atol=1e-9)
    _, bent = jvp(grad(loss), (params,), (along,))
    curvature = product(bent, along)
    _, forward_twice = jvp(lambda p: jvp(loss, (p,), (along,))[1], (params,), (along,))
    torch.testing.assert_close(forward_twice, curvature, rtol=1e-9, atol=1e-9)
    step = 1e-4
    moved = [loss(tree_map(lambda leaf, d, s=s: leaf + s * d, params, along)) for s in (step, 0, -step)]
    torch.testing.assert_close(curvature, (moved[0] - 2 * moved[1] + moved[2]) / step**2, rtol=1e-4, atol=1e-4)
    twice = named_leaves(grad(lambda p: product(grad(loss)(p), along))(params))
    for name, leaf in named_leaves(bent).items():
        torch.testing.assert_close(twice[name], leaf, rtol=1e-9, atol=1e-9)
    pair = tree_map(lambda leaf: torch.stack([leaf, 1.1 * leaf]), params)
    mapped = vmap(grad(loss))(pair)
    scaled = grad(loss)(tree_map(lambda leaf: 1.1 * leaf, params))
    for name, leaf in named_leaves(mapped).items():
        torch.testing.assert_close(leaf[1], named_leaves(scaled)[name], rtol=1e-9, atol=1e-10)


@EACH
def test_bfloat16_is_near_float32_and_its_cache_gives_what_it_gives(config):
    params, decoder = disturbed(config, scale=0.1), architecture_of(config)
    exact = forward(params, TOKENS, config=config)
    half = forward(decoder.cast_for_compute(params, torch.bfloat16), TOKENS, config=config)
    assert half.dtype == torch.bfloat16
    assert float((half.float() - exact).norm()) < 0.03 * float(exact.norm())
    prepared = decoder.prepare_for_decoding(params, torch.bfloat16)
    cache = decoder.init_cache(prepared, 3, 41, config=config)
    hidden = decoder.prefill(prepared, TOKENS[:, :39], torch.full((3,), 39), cache, config=config)
    hidden = decoder.decode(prepared, TOKENS[:, 39], torch.full((3,), 39), cache, config=config, cache_length=40)
    found = decoder.logits(prepared, hidden[:, None], config=config)[:, 0].float()
    assert float((found - exact[:, -1]).norm()) < 0.03 * float(exact[:, -1].norm())


@EACH
def test_one_graph_without_breaks_gives_what_eager_execution_gives(config):
    params, decoder = disturbed(config), architecture_of(config)
    cache = decoder.init_cache(params, 3, 8, config=config)
    decoder.prefill(params, TOKENS[:, :6], torch.full((3,), 6), cache, config=config)

    def step(params, tokens, cache):
        hidden = decoder.hidden_states(params, tokens, config=config)
        new = decoder.decode(params, tokens[:, 6], torch.full((3,), 6), cache, config=config, cache_length=7)
        return decoder.logits(params, hidden, config=config), new

    torch.compiler.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    copies = [tree_map(torch.clone, cache) for _ in range(2)]
    found, expected = compiled(params, TOKENS, copies[0]), step(params, TOKENS, copies[1])
    for one, two in zip((*found, *copies[0].keys), (*expected, *copies[1].keys), strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


@EACH
def test_dropout_drops_where_the_family_has_it(config):
    params, decoder = disturbed(config), architecture_of(config)
    plain, dropped = (
        decoder.hidden_states(params, TOKENS, config=config, dropout_rate=rate, key=random.key(1)) for rate in (0, 0.3)
    )
    assert torch.equal(plain, dropped) != decoder.has_dropout


@EACH
def test_a_model_from_scratch_begins_with_flat_logits_and_small_residuals(config):
    decoder = architecture_of(config)
    fresh = decoder.init(config, key=random.key(0))
    assert named_leaves(fresh).keys() == named_leaves(decoder.empty(config)).keys()
    assert float(forward(fresh, TOKENS, config=config).std()) < 0.3
    again, other = (decoder.init(config, key=random.key(seed)) for seed in (0, 1))
    name = decoder.embedding
    assert torch.equal(named_leaves(fresh)[name], named_leaves(again)[name])
    assert not torch.equal(named_leaves(fresh)[name], named_leaves(other)[name])


@EACH
def test_fewer_tokens_give_the_same_logits(config):
    params, decoder = disturbed(config), architecture_of(config)
    few = decoder.select_vocab(params, 40)
    found = forward(few, TOKENS % 40, config=dataclasses.replace(config, vocab_size=40))
    assert torch.equal(found, forward(params, TOKENS % 40, config=config)[..., :40])


# ---- the parts


def test_a_rotation_is_that_of_complex_numbers():
    x, positions = random.normal(random.key(1), (1, 5, 2, 8)).double(), torch.tensor([[0, 3, 1, 7, 100]])
    frequencies = rotary_frequencies(6, theta=100.0, scaling=None, device=torch.device("cpu"))
    found = rotate(x, rotation_at(positions, frequencies))
    for t in range(5):
        for head in range(2):
            for i in range(3):
                turn = torch.polar(torch.ones(()).double(), positions[0, t] * 100.0 ** (-torch.tensor(i).double() / 3))
                point = torch.complex(x[0, t, head, i], x[0, t, head, i + 3]) * turn
                torch.testing.assert_close(found[0, t, head, i], point.real, atol=1e-4, rtol=0)
                torch.testing.assert_close(found[0, t, head, i + 3], point.imag, atol=1e-4, rtol=0)
    assert torch.equal(found[..., 6:], x[..., 6:])


def test_scores_of_rotated_vectors_depend_on_distance_alone():
    q, k = random.normal(random.key(1), (2, 1, 1, 1, 8)).double()
    frequencies = rotary_frequencies(8, theta=10.0, scaling=None, device=torch.device("cpu")).double()

    def score(t, s):
        return (
            rotate(q, rotation_at(torch.tensor([[t]]), frequencies))
            * rotate(k, rotation_at(torch.tensor([[s]]), frequencies))
        ).sum()

    torch.testing.assert_close(score(9, 4), score(25, 20), atol=1e-5, rtol=0)
    assert abs(float(score(9, 4) - score(4, 9))) > 0.1


def test_rms_norm_value():
    x, weight = torch.tensor([[3.0, 4.0]]).double(), torch.tensor([2.0, -1.0]).double()
    root = (12.5 + 0.5) ** 0.5
    torch.testing.assert_close(rms_norm(x, {"weight": weight}, eps=0.5), torch.tensor([[6 / root, -4 / root]]).double())


# ---- shapes


PUBLISHED = {
    "smollm2-135m": (LLAMA_PRESETS, 134_515_008),
    "smollm2-360m": (LLAMA_PRESETS, 361_821_120),
    "qwen2.5-0.5b": (QWEN2_PRESETS, 494_032_768),
    "qwen3-0.6b": (QWEN3_PRESETS, 596_049_920),
    "pythia-70m": (NEOX_PRESETS, 70_426_624),
    "pythia-160m": (NEOX_PRESETS, 162_322_944),
    "pythia-410m": (NEOX_PRESETS, 405_334_016),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_named_shapes_have_the_published_number_of_parameters(name):
    presets, count = PUBLISHED[name]
    empty = architecture_of(presets[name]).empty(presets[name])
    assert sum(leaf.numel() for leaf in named_leaves(empty).values()) == count


def test_settings_of_a_shape_describe_it(config):
    family = architecture_of(config)
    settings = family.shape_to_settings(config)
    again = family.settings_to_shape(settings)
    assert family.shape_to_settings(again) == settings
    assert type(again) is type(config)


OLD = {
    "vocab_size": 32000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128,
}  # fmt: skip


def test_settings_of_older_versions_are_read():
    llama = get_architecture("llama").settings_to_shape
    shape = llama(OLD | {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert (shape.kv_heads, shape.head_width, shape.rope_theta, shape.rope_scaling.factor) == (4, 16, 5e5, 2.0)
    assert not shape.tie_word_embeddings
    neox = get_architecture("gpt_neox").settings_to_shape(OLD | {"rotary_pct": 0.5, "rotary_emb_base": 100})
    assert (neox.rotary_width, neox.rope_theta) == (8, 100.0)


REFUSED = {
    "another activation": ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
    "another activation of NeoX": ("gpt_neox", {"hidden_act": "relu"}, "hidden_act is 'relu', expected 'gelu'"),
    "YaRN": ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn', expected default"),
    "dynamic": ("qwen2", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
    "no factor": ("llama", {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling of type linear has no factor"),
    "factor 0": ("llama", {"rope_scaling": {"type": "linear", "factor": 0}}, "factor must be above 0, got 0"),
    "RoPE by layer": ("qwen3", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "for all layers"),
    "a window": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, "sliding windows are not supported"),
    "a window by layer": ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "has 'sliding_attention'"),
    "part of a head": ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    "no size": ("llama", {"hidden_size": None}, "n_embd must be at least 1, got None"),
    "heads": ("llama", {"num_key_value_heads": 3}, r"n_head must be a multiple of n_kv_head \(3\), got 4"),
    "width": ("llama", {"num_attention_heads": 5}, r"n_embd must be a multiple of n_head \(5\), got 64"),
    "odd": ("llama", {"head_dim": 7}, "head_dim must be even, got 7"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_config_asks_for_and_nobody_does_is_refused_by_name(case):
    model_type, changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        get_architecture(model_type).settings_to_shape(OLD | changes)


def test_a_window_that_no_layer_has_is_no_obstacle():
    qwen2 = get_architecture("qwen2").settings_to_shape
    qwen2(OLD | {"use_sliding_window": True, "max_window_layers": 2})
    qwen2(OLD | {"use_sliding_window": False, "sliding_window": 32768})
    qwen2(OLD | {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0})


def test_sizes_that_are_not_given_follow_from_the_others():
    shape = dataclasses.replace(LLAMA_PRESETS["small"], n_embd=192, n_head=6, n_kv_head=None)
    assert (shape.kv_heads, shape.head_width, shape.inner_width) == (6, 32, 512)
    assert dataclasses.replace(LlamaConfig(), n_embd=4096).inner_width == 10944
