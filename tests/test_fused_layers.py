"""Single tokens: weights may lie either way, and products come out the same."""

import pytest
import torch
from torch.func import grad

from rlhf import random
from rlhf.kernels import fused_layers
from rlhf.kl import exact_kl
from rlhf.models.gpt2_parameters import prepare_for_decoding
from rlhf.ops import entropy, token_log_probs
from rlhf.tree import cast, named_leaves

packs = pytest.mark.skipif(not fused_layers._PACKS, reason="this CPU's library packs no bfloat16 weights")


@packs
def test_decoding_copy_is_a_cast_whose_large_matrices_are_packed_in_bfloat16(params, monkeypatch):
    monkeypatch.setattr(fused_layers, "_SMALL", params["h"][0]["attn"]["c_proj"]["weight"].numel())
    expected = named_leaves(cast(params, torch.bfloat16))
    copy = named_leaves(prepare_for_decoding(params, torch.bfloat16))
    packed = {name: copy.pop(name) for name in list(copy) if name.endswith("packed")}
    large = {"attn.c_attn.packed", "mlp.c_fc.packed", "mlp.c_proj.packed"}
    assert {name.split(".", 2)[2] for name in packed if name.startswith("h.")} == large
    assert all(torch.equal(leaf, expected.pop(name)) and leaf.dtype == torch.bfloat16 for name, leaf in copy.items())
    for name, leaf in packed.items():
        weight = expected.pop(name.replace("packed", "weight"), copy.get("wte.weight")).float()
        weight = weight if name.startswith("wte") else weight.T
        rows = fused_layers.packed_product(torch.eye(weight.shape[1], dtype=torch.bfloat16), leaf)
        assert torch.equal(rows.float(), weight.T)
    assert expected == {}


def test_decoding_copy_in_float32_is_the_parameters_themselves(params):
    master, copy = named_leaves(params), named_leaves(prepare_for_decoding(params, torch.float32))
    assert copy.keys() == master.keys()
    assert all(leaf is master[name] for name, leaf in copy.items())


@pytest.mark.parametrize("small", [0, 10**9], ids=["large", "small"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("length", [1, 3])
def test_product_is_the_same_in_every_form(dtype, tolerance, length, small, monkeypatch, key):
    monkeypatch.setattr(fused_layers, "_SMALL", small)
    x = random.normal(key, (5, length, 16)).to(dtype)
    weight = random.normal(random.fold_in(key, 1), (16, 24)).to(dtype)
    expected = torch.einsum("btk,kn->btn", x.double(), weight.double())
    forms = [{"weight": weight}, {"weight": weight.T.contiguous().T}]
    if fused_layers._PACKS and dtype == torch.bfloat16:
        forms.append({"packed": fused_layers._pack(weight.T)})
    for form in forms:
        result = fused_layers._product(x, form)
        assert (result.shape, result.dtype, result.is_contiguous()) == (expected.shape, dtype, True)
        torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=10 * tolerance)


def test_columns_that_are_no_tokens_change_no_sum_over_tokens(key):
    wide = 5 * random.normal(key, (3, 7, 40))
    logits, other = wide[..., :33], random.normal(random.fold_in(key, 1), (3, 7, 40))
    targets = torch.arange(21).view(3, 7)

    def figures(logits, other):
        return (
            token_log_probs(logits, targets, temperature=0.7),
            entropy(logits, temperature=0.7),
            exact_kl(logits, other, temperature=0.7),
        )

    def total(wide):
        return sum(part.sum() for part in figures(*(fused_layers.mask_vocab_padding(of, 33) for of in (wide, other))))

    found, gradient = figures(*(fused_layers.mask_vocab_padding(of, 33) for of in (wide, other))), grad(total)(wide)
    expected = figures(logits, other[..., :33])
    torch.testing.assert_close(found, expected)
    assert torch.equal(gradient[..., 33:], torch.zeros(3, 7, 7))
    exact = grad(lambda logits: sum(part.sum() for part in figures(logits, other[..., :33])))(logits)
    torch.testing.assert_close(gradient[..., :33], exact)
    assert fused_layers.mask_vocab_padding(logits, 33) is logits
