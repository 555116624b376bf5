"""GPT-2 against transformers, and the laws of attention, padding, packing and caching."""

import pytest
import torch
from torch import Tensor

from rlhf import random
from rlhf.models import gpt2
from rlhf.models.forward import forward, padding_layout
from rlhf.models.gpt2_config import PRESETS, GPT2Config
from rlhf.models.layers import dropout
from rlhf.tree import cast, named_leaves, tree_map
from rlhf.types import Params


@pytest.fixture
def oracle(params, config, hugging_face):
    return hugging_face(params, config)


PADDINGS = {
    "unpadded": torch.ones(3, 12, dtype=torch.bool),
    "left": torch.arange(12).expand(3, 12) >= torch.tensor([[0], [5], [9]]),
    "right": torch.arange(12).expand(3, 12) < torch.tensor([[12], [7], [2]]),
}


@pytest.mark.parametrize("padding", PADDINGS)
def test_forward_equals_transformers(params, config, tokens, oracle, padding):
    mask = PADDINGS[padding]
    positions, _ = padding_layout(mask)
    with torch.no_grad():
        expected = oracle(tokens, attention_mask=mask.long(), position_ids=positions).logits
    logits = forward(params, tokens, config=config, attention_mask=mask)
    torch.testing.assert_close(logits[mask], expected[mask], atol=1e-4, rtol=0)
    if padding == "unpadded":
        torch.testing.assert_close(forward(params, tokens, config=config), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("head_width", [2, 8])
def test_forward_equals_transformers_at_other_shapes(head_width, hugging_face):
    config = GPT2Config(vocab_size=31, n_positions=20, n_embd=8 * head_width, n_layer=1, n_head=8)
    params = gpt2.init(config, key=random.key(4))
    oracle = hugging_face(params, config)
    tokens = (random.uniform(random.key(5), (2, 20)) * 31).long()
    with torch.no_grad():
        expected = oracle(tokens).logits
    torch.testing.assert_close(forward(params, tokens, config=config), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_invariant_2_padding_changes_no_logit(params, config, tokens, padding):
    mask = PADDINGS[padding]
    logits = forward(params, tokens, config=config, attention_mask=mask)
    for row in range(3):
        alone = forward(params, tokens[row, mask[row]][None], config=config)
        torch.testing.assert_close(logits[row, mask[row]], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_invariant_2_content_of_padding_changes_no_logit_or_gradient(params, config, tokens, padding):
    mask = PADDINGS[padding]
    other = torch.where(mask, tokens, (tokens + 11) % config.vocab_size)

    def loss(params: Params, tokens: Tensor) -> Tensor:
        return forward(params, tokens, config=config, attention_mask=mask)[mask].square().sum()

    for one, two in zip(
        named_leaves(torch.func.grad(loss)(params, tokens)).values(),
        named_leaves(torch.func.grad(loss)(params, other)).values(),
        strict=True,
    ):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-5)


def test_trunk_packed_sequences_do_not_see_each_other(params, config, tokens):
    lengths = [5, 4, 3]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    segments = torch.cat([torch.full((length,), number + 1) for number, length in enumerate(lengths)])[None]
    packed = gpt2.hidden_states(params, tokens[:1], config=config, positions=positions, segments=segments)
    start = 0
    for length in lengths:
        alone = gpt2.hidden_states(params, tokens[:1, start : start + length], config=config)
        torch.testing.assert_close(packed[:, start : start + length], alone, atol=1e-5, rtol=1e-5)
        start += length


def test_trunk_is_causal(params, config, tokens):
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % config.vocab_size
    before, after = (gpt2.hidden_states(params, t, config=config) for t in (tokens, changed))
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.isclose(before[:, 7:], after[:, 7:]).all(dim=-1).any()


@pytest.mark.parametrize("lengths", [[6, 6, 6], [6, 1, 4]], ids=["equal", "ragged"])
def test_invariant_15_cached_decoding_equals_the_full_forward(params, config, tokens, oracle, lengths):
    """Prefill right-padded prompts, decode token by token, and compare each step's logits with the whole sequence's."""
    lengths = torch.tensor(lengths)
    cache = gpt2.init_cache(params, 3, 12, config=config)
    hidden = gpt2.prefill(params, tokens[:, :6], lengths, cache, config=config)
    rows = torch.arange(3)
    sequences = [tokens[row, : lengths[row]] for row in range(3)]
    for step in range(6):
        for row, sequence in enumerate(sequences):
            full = forward(params, sequence[None], config=config)[0, -1]
            torch.testing.assert_close(gpt2.logits(params, hidden, config=config)[row], full, atol=1e-5, rtol=1e-5)
            with torch.no_grad():
                torch.testing.assert_close(full, oracle(sequence[None]).logits[0, -1], atol=1e-4, rtol=0)
        following = tokens[rows, 6 + step]
        sequences = [torch.cat([s, following[row : row + 1]]) for row, s in enumerate(sequences)]
        hidden = gpt2.decode(params, following, lengths + step, cache, config=config, cache_length=7 + step)


def test_decode_does_not_depend_on_how_much_of_the_cache_is_looked_at(params, config, tokens):
    results = []
    for used in (7, 9, 12):
        cache = gpt2.init_cache(params, 3, 12, config=config)
        gpt2.prefill(params, tokens[:, :6], torch.tensor([6, 2, 4]), cache, config=config)
        lengths = torch.tensor([6, 2, 4])
        results.append(gpt2.decode(params, tokens[:, 6], lengths, cache, config=config, cache_length=used))
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(results[0], results[2], atol=1e-6, rtol=1e-6)


def test_hugging_face_names_round_trip(params, config):
    state = gpt2.to_hugging_face(params)
    for prefix in ("transformer.", ""):
        renamed = {name.replace("transformer.", prefix): leaf for name, leaf in state.items()}
        renamed |= {"lm_head.weight": state["transformer.wte.weight"], f"{prefix}h.0.attn.bias": torch.ones(1)}
        back = gpt2.from_hugging_face(renamed, config=config)
        assert all(a is b for a, b in zip(named_leaves(params).values(), named_leaves(back).values(), strict=True))


def test_from_hugging_face_names_what_is_wrong(params, config):
    state = gpt2.to_hugging_face(params)
    with pytest.raises(ValueError, match=r"h\.1\.mlp\.c_fc\.weight is missing"):
        gpt2.from_hugging_face({n: t for n, t in state.items() if "h.1.mlp.c_fc.weight" not in n}, config=config)
    with pytest.raises(ValueError, match=r"wpe\.weight has shape \(5, 16\), expected \(32, 16\)"):
        gpt2.from_hugging_face(state | {"transformer.wpe.weight": torch.ones(5, 16)}, config=config)
    with pytest.raises(ValueError, match="surplus"):
        gpt2.from_hugging_face(state | {"surplus": torch.ones(1)}, config=config)


def test_init_has_gpt2s_statistics():
    config = GPT2Config(vocab_size=500, n_positions=64, n_embd=64, n_layer=8, n_head=4)
    for name, leaf in named_leaves(gpt2.init(config, key=random.key(0))).items():
        if name.endswith("bias"):
            assert not leaf.any(), name
        elif "ln_" in name:
            assert (leaf == 1).all(), name
        else:
            std = 0.02 / (2 * 8) ** 0.5 if "c_proj" in name else 0.02
            assert leaf.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(leaf.mean().item()) < 5 * std / leaf.numel() ** 0.5, name


def test_init_depends_on_the_key_alone_and_differs_by_leaf(config):
    one, same, other = (gpt2.init(config, key=random.key(seed)) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(named_leaves(one).values(), named_leaves(same).values(), strict=True))
    assert not torch.equal(one["wte"]["weight"], other["wte"]["weight"])
    assert not torch.equal(one["h"][0]["mlp"]["c_fc"]["weight"], one["h"][1]["mlp"]["c_fc"]["weight"])


@pytest.mark.parametrize(
    ("preset", "count"),
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_presets_have_the_published_sizes(preset, count):
    assert sum(leaf.numel() for leaf in named_leaves(gpt2.empty(PRESETS[preset])).values()) == count


def test_config_refuses_impossible_shapes():
    with pytest.raises(ValueError, match=r"n_embd must be a multiple of n_head \(3\), got 16"):
        GPT2Config(n_embd=16, n_head=3)
    with pytest.raises(ValueError, match="n_layer must be at least 1, got 0"):
        GPT2Config(n_layer=0)


def test_dropout_drops_the_share_asked_for_and_keeps_the_mean(key):
    dropped = dropout(torch.ones(400, 100), 0.3, key=key)
    assert (dropped == 0).double().mean().item() == pytest.approx(0.3, abs=0.01)
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_no_bit(params, config, tokens, key, dtype, dropout):
    segments = torch.tensor([[1] * 5 + [2] * 7, [1] * 12, [3] * 9 + [0] * 3])

    def loss(params, gradient_checkpointing):
        hidden = gpt2.hidden_states(
            gpt2.cast_for_compute(params, dtype),
            tokens,
            config=config,
            segments=segments,
            dropout_rate=dropout,
            key=key,
            gradient_checkpointing=gradient_checkpointing,
        )
        return hidden.float().sin().sum()

    plain, again = (torch.func.grad_and_value(loss)(params, checkpointing) for checkpointing in (False, True))
    torch.testing.assert_close(again, plain, atol=0, rtol=0)


def test_gradient_checkpointing_runs_every_block_again(params, config, tokens, monkeypatch):
    blocks, norm = [], gpt2.layer_norm
    monkeypatch.setattr(gpt2, "layer_norm", lambda *args, **options: blocks.append(0) or norm(*args, **options))
    for checkpointing, norms in ((False, 2 * config.n_layer + 1), (True, 4 * config.n_layer + 1)):
        blocks.clear()
        torch.func.grad(
            lambda params, on=checkpointing: gpt2.hidden_states(
                params, tokens, config=config, gradient_checkpointing=on
            ).sum()
        )(params)
        assert len(blocks) == norms


def test_dropout_follows_its_key(params, config, tokens, key):
    def run(**arguments):
        return gpt2.hidden_states(params, tokens, config=config, **arguments)

    assert torch.equal(run(dropout_rate=0.5, key=key), run(dropout_rate=0.5, key=key))
    assert not torch.isclose(run(dropout_rate=0.5, key=key), run(dropout_rate=0.5, key=random.key(8))).all()
    assert torch.equal(run(dropout_rate=0.0, key=key), run())


def test_trunk_runs_in_the_dtype_of_its_parameters(params, config, tokens):
    low = forward(cast(params, torch.bfloat16), tokens, config=config)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), forward(params, tokens, config=config), atol=0.15, rtol=0.1)


def test_compute_copy_leaves_the_embeddings_in_the_dtype_of_the_master_weights(params):
    low = gpt2.cast_for_compute(params, torch.bfloat16)
    master = {name for name, leaf in named_leaves(low).items() if leaf.dtype == torch.float32}
    assert master == {"wte.weight", "wpe.weight"}


def test_trunk_compiles_to_one_graph(params, config, tokens):
    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(params, tokens, config=config), forward(params, tokens, config=config), atol=1e-5, rtol=1e-5
    )


def test_forward_leaves_its_arguments_alone(params, config, tokens):
    copies = tree_map(torch.clone, params)
    forward(params, tokens, config=config)
    assert all(
        torch.equal(a, b) for a, b in zip(named_leaves(params).values(), named_leaves(copies).values(), strict=True)
    )


def test_wrong_arguments_are_named(params, config, tokens, key):
    with pytest.raises(TypeError, match=r"hidden_states: tokens has dtype torch.int32"):
        gpt2.hidden_states(params, tokens.int(), config=config)
    with pytest.raises(ValueError, match=r"hidden_states: tokens has shape \(12,\), expected 2 dimensions"):
        gpt2.hidden_states(params, tokens[0], config=config)
    with pytest.raises(ValueError, match=r"hidden_states: length is 33, expected at most n_positions = 32"):
        gpt2.hidden_states(params, torch.zeros(1, 33, dtype=torch.int64), config=config)
    with pytest.raises(ValueError, match=r"forward: attention_mask has shape \(3, 11\)"):
        forward(params, tokens, config=config, attention_mask=torch.ones(3, 11, dtype=torch.bool))
    long = torch.zeros(1, 33, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"forward: length is 33, expected at most n_positions = 32"):
        forward(params, long, config=config, attention_mask=long == 0)
    with pytest.raises(
        ValueError, match=r"hidden_states: positions has shape \(3, 11\), expected \(3, 12\) like tokens"
    ):
        gpt2.hidden_states(params, tokens, config=config, positions=tokens[:, 1:])
    with pytest.raises(
        ValueError, match=r"hidden_states: segments has shape \(1, 12\), expected \(3, 12\) like tokens"
    ):
        gpt2.hidden_states(params, tokens, config=config, segments=tokens[:1])
    with pytest.raises(ValueError, match="hidden_states: segments is None, expected given with bounds"):
        gpt2.hidden_states(params, tokens, config=config, bounds=torch.tensor([0, 36], dtype=torch.int32))
    with pytest.raises(ValueError, match="hidden_states: key is None"):
        gpt2.hidden_states(params, tokens, config=config, dropout_rate=0.1)
    with pytest.raises(ValueError, match=r"hidden_states: dropout_rate is 1\.0"):
        gpt2.hidden_states(params, tokens, config=config, dropout_rate=1.0, key=key)
    cache = gpt2.init_cache(params, 3, 10, config=config)
    with pytest.raises(ValueError, match="prefill: width is 12, expected at most 10"):
        gpt2.prefill(params, tokens, torch.full((3,), 12), cache, config=config)
