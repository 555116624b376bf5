"""How weights lie for fast products, and the forms of products of single tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.tree import cast
from rlhf.types import Params

_ALIGNMENT = 64
"""Rows to which an embedding is filled up on GPUs: their matrix units cannot write rows of 50,257 logits."""
_NO_TOKEN = -1e30
_SMALL = 1 << 18
"""Elements of a weight up to which a product is left to the compiler; beyond, the library is faster."""
_PACKS = bool(torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported())
"""Whether this CPU's library has layouts of its own for the weights of bfloat16 products."""


def prepare_for_decoding(params: Params, dtype: torch.dtype) -> Params:
    """GPT-2's parameters to read single tokens with, all in `dtype`: without gradients, embeddings may be rounded too.

    On CPUs large bfloat16 matrices are laid out for `packed_product` ("packed" takes the place of "weight"; the
    embedding has both). On GPUs the embedding is filled up, see `pad_vocab`.
    """
    packs = _PACKS and dtype == torch.bfloat16 and params["ln_f"]["weight"].is_cpu

    def convert(tree: Params) -> Params:
        if isinstance(tree, Tensor):
            return tree.to(dtype)
        weight = tree.get("weight")
        if packs and weight is not None and weight.ndim == 2 and weight.numel() > _SMALL:
            return {"packed": _pack(weight.T), "bias": tree["bias"].to(dtype)}
        return {name: convert(part) for name, part in tree.items()}

    copy: Params = cast(params | {"h": []}, dtype) | {"h": [convert(block) for block in params["h"]]}
    embedding = copy["wte"]["weight"]
    packed = {"packed": _pack(embedding)} if packs and embedding.numel() > _SMALL else {}
    return copy | {"wte": {"weight": pad_vocab(embedding)} | packed}


def _pack(weight: Tensor) -> Tensor:
    """A weight [N, K] as oneDNN reads it fastest: an opaque tensor."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16().contiguous())
    return packed


@torch.library.custom_op("rlhf::packed_product", mutates_args=())
def packed_product(x: Tensor, packed: Tensor) -> Tensor:
    """[..., N] = x @ weight.T, of [..., K] bfloat16 and a weight [N, K] that `prepare_for_decoding` has packed.

    Plain weights are laid out so at every product, which takes longer than a product with a few rows. An operator of
    our own around oneDNN's, which the compiler knows only for constants.
    """
    rows: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    return rows


@packed_product.register_fake
def _(x: Tensor, packed: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


def pad_vocab(embedding: Tensor) -> Tensor:
    """The embedding [V, D]; on a GPU filled up with zeros to rows of logits that its matrix units can write."""
    missing = -len(embedding) % _ALIGNMENT
    return F.pad(embedding, (0, 0, 0, missing)) if embedding.is_cuda and missing else embedding


def mask_vocab_padding(logits: Tensor, vocab_size: int) -> Tensor:
    """Logits [..., W] made with an `pad_vocab`ed embedding, of W >= vocab_size columns: what is no token becomes -1e30.

    Softmax makes exactly 0 of that, and 0 times it is 0, so sums over tokens stay what they are. To cut the columns off
    instead makes passes over the logits twice as long: a GPU's vector loads must not cross the end of a row.
    """
    if logits.shape[-1] == vocab_size:
        return logits
    token = torch.arange(logits.shape[-1], device=logits.device)
    return torch.where(token < vocab_size, logits, _NO_TOKEN)


def product(x: Tensor, p: Params) -> Tensor:
    """[B, T, N] = x @ p["weight"], of [B, T, K] and [K, N], or the same with what `prepare_for_decoding` has packed.

    In compiled bfloat16 code on CPUs, single tokens times a small weight are a batch of one, whose product the compiler
    may write itself (`own_products` of `rlhf.execution.compiled`).
    """
    if "packed" in p:
        packed: Tensor = packed_product(x, p["packed"])
        return packed
    weight: Tensor = p["weight"]
    small = x.is_cpu and x.shape[1] == 1 and weight.numel() <= _SMALL and x.dtype == torch.bfloat16
    if small and torch.compiler.is_compiling():
        return torch.bmm(x.transpose(0, 1), weight.unsqueeze(0)).transpose(0, 1)
    return x @ weight
