"""Fast forms of `rlhf.models.layers`: forms that a compiler fuses, oneDNN's weight layouts, and padding for GPUs."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.transforms import reference_needed

_ALIGNMENT = 64
"""Multiple to which an embedding's rows are padded on GPUs: their matrix units cannot write rows of 50,257 logits."""
_NO_TOKEN = -1e30
_SMALL = 1 << 18
"""Elements of a weight up to which the compiler writes a product; oneDNN is faster beyond."""
_PACKS = bool(torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported())
"""True if oneDNN has packed layouts for the weights of bfloat16 products on this CPU."""
_GELU_LINEAR = 2 * math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715 * _GELU_LINEAR

Function = Callable[..., Any]


def affine(reference: Function, x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Compute product and sum in one call; compiled code fuses the sum with the next operation."""
    if torch.compiler.is_compiling() or "packed" in p:
        return _product(x, p) + p["bias"]
    flat = torch.addmm(p["bias"], x.reshape(-1, x.shape[-1]), p["weight"])
    return flat.view(*x.shape[:-1], -1)


def pack_affine(reference: Function, p: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pack a large bfloat16 weight on a CPU for oneDNN: "packed" replaces "weight"."""
    if not _packs(p["weight"]):
        return reference(p)
    return {"packed": _pack(p["weight"].T), "bias": p["bias"]}


def linear(reference: Function, x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Read a packed weight; compiled code writes products of single tokens with a small weight itself."""
    if "packed" not in p and not torch.compiler.is_compiling():
        return reference(x, p)
    product = _product(x, p if "packed" in p else {"weight": p["weight"].T})
    return product + p["bias"] if "bias" in p else product


def pack_linear(reference: Function, p: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pack a large bfloat16 weight on a CPU for oneDNN: "packed" replaces "weight"."""
    if not _packs(p["weight"]):
        return reference(p)
    bias = {"bias": p["bias"]} if "bias" in p else {}
    return {"packed": _pack(p["weight"])} | bias


def layer_norm(reference: Function, x: Tensor, p: dict[str, Tensor], *, eps: float) -> Tensor:
    """Run torch's kernel, except where it is differentiated forward: torch's second derivative is wrong there.

    In compiled code of low precision the gradients of weight and bias are summed by row first.
    """
    if torch.compiler.is_compiling() and x.dtype != torch.float32:
        weight, bias = (p[name].expand(len(x), 1, -1) for name in ("weight", "bias"))
        return F.layer_norm(x, (x.shape[-1],), eps=eps) * weight + bias
    if not torch.compiler.is_compiling() and reference_needed(x, p["weight"], p["bias"]):
        return reference(x, p, eps=eps)
    return F.layer_norm(x, (x.shape[-1],), p["weight"], p["bias"], eps)


def gelu(reference: Function, x: Tensor) -> Tensor:
    """Use the identity x sigmoid(2z) = x (1 + tanh z) / 2 in compiled code, where exp is faster than tanh."""
    if not torch.compiler.is_compiling():
        return reference(x)
    wide = x.float()
    return (wide * torch.sigmoid(wide * (_GELU_LINEAR + _GELU_CUBIC * wide * wide))).to(x.dtype)


def unembed(
    reference: Function, hidden: Tensor, embedding: dict[str, Tensor], *, vocab_size: int, padded: bool = False
) -> Tensor:
    """Read packed weights on a CPU; on a GPU compute as many columns as its matrix units can write.

    Cutting columns off makes passes over the logits twice as long, because a GPU's vector loads must not cross the end
    of a row: -1e30 instead becomes exactly 0 in a softmax, and 0 times it is 0, so sums over tokens do not change.
    """
    if "packed" in embedding:
        logits = _product(hidden, embedding)
    else:
        weight = pad_vocab(embedding["weight"].to(hidden.dtype))
        logits = _product(hidden, {"weight": weight.T})
    return mask_vocab_padding(logits, vocab_size) if padded else logits[..., :vocab_size]


def pack_embedding(reference: Function, embedding: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the packed weight to the plain one; on a GPU pad the plain one."""
    weight = embedding["weight"]
    packed = {"packed": _pack(weight)} if _packs(weight) else {}
    return {"weight": pad_vocab(weight)} | packed


def pad_vocab(embedding: Tensor) -> Tensor:
    """Return the embedding [V, D]; on a GPU padded with zeros to rows of logits that its matrix units can write."""
    missing = -len(embedding) % _ALIGNMENT
    return F.pad(embedding, (0, 0, 0, missing)) if embedding.is_cuda and missing else embedding


def mask_vocab_padding(logits: Tensor, vocab_size: int) -> Tensor:
    """Return logits [..., W] whose columns from `vocab_size` on are -1e30."""
    if logits.shape[-1] == vocab_size:
        return logits
    token = torch.arange(logits.shape[-1], device=logits.device)
    return torch.where(token < vocab_size, logits, _NO_TOKEN)


@torch.library.custom_op("rlhf::packed_product", mutates_args=())
def packed_product(x: Tensor, packed: Tensor) -> Tensor:
    """Return [..., N] = x @ weight.T, of [..., K] bfloat16 and a packed weight [N, K].

    A plain weight is packed anew in every product, which takes longer than a product with a few rows. This operator
    wraps oneDNN's, which the compiler supports for constants only.
    """
    rows: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    return rows


@packed_product.register_fake
def _(x: Tensor, packed: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


def _packs(weight: Tensor) -> bool:
    return _PACKS and weight.is_cpu and weight.dtype == torch.bfloat16 and weight.numel() > _SMALL


def _pack(weight: Tensor) -> Tensor:
    """Return a weight [N, K] as oneDNN reads it fastest: an opaque tensor."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16().contiguous())
    return packed


def _product(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Return x @ weight of x [..., K], for p["weight"] [K, N] or its packed form.

    In compiled bfloat16 code on CPUs, single tokens [B, 1, K] times a small weight are a batch of one, whose product
    the compiler may write itself (`compile_products` of `rlhf.execution.compiled`).
    """
    if "packed" in p:
        packed: Tensor = packed_product(x, p["packed"])
        return packed
    weight = p["weight"]
    is_small = x.ndim == 3 and x.shape[1] == 1 and weight.numel() <= _SMALL
    if torch.compiler.is_compiling() and is_small and x.is_cpu and x.dtype == torch.bfloat16:
        return torch.bmm(x.transpose(0, 1), weight.unsqueeze(0)).transpose(0, 1)
    return x @ weight
