"""How weights lie for fast products, and the forms of products of single tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.tree import cast, tree_map
from rlhf.types import Params

_ALIGNMENT = 64
"""Rows to which an embedding is filled up on GPUs: their matrix units cannot write rows of 50,257 logits."""
_NO_TOKEN = -1e30
_SMALL = 1 << 18
"""Elements of a weight up to which a product is left to the compiler; beyond, the library is faster."""
_TILES = bool(torch.cpu.get_capabilities().get("amx_bf16"))
"""Whether this machine's CPU multiplies bfloat16 matrices in tiles (AMX)."""


def decoding_copy(params: Params, dtype: torch.dtype) -> Params:
    """GPT-2's parameters to read single tokens with, all in `dtype`: without gradients, embeddings may be rounded too.

    On CPUs large bfloat16 matrices lie transposed (only their strides differ): see `product`. On GPUs the embedding is
    filled up, see `align`.
    """

    def turned(leaf: Tensor) -> Tensor:
        if dtype != torch.bfloat16 or not leaf.is_cpu or leaf.ndim < 2 or leaf.numel() <= _SMALL:
            return leaf.to(dtype)
        parts = torch.split(leaf, 64)  # small enough to be in the cache while they are turned
        return torch.cat([part.to(dtype).T for part in parts], dim=1).T

    blocks = tree_map(turned, params["h"])
    copy: Params = cast(params | {"h": []}, dtype) | {"h": blocks}
    return copy | {"wte": {"weight": align(copy["wte"]["weight"])}}


def align(embedding: Tensor) -> Tensor:
    """The embedding [V, D]; on a GPU filled up with zeros to rows of logits that its matrix units can write."""
    missing = -len(embedding) % _ALIGNMENT
    return F.pad(embedding, (0, 0, 0, missing)) if embedding.is_cuda and missing else embedding


def mask_filling(logits: Tensor, vocab_size: int) -> Tensor:
    """Logits [..., W] made with an `align`ed embedding, of W >= vocab_size columns: what is no token becomes -1e30.

    Softmax makes exactly 0 of that, and 0 times it is 0, so sums over tokens stay what they are. To cut the columns off
    instead makes passes over the logits twice as long: a GPU's vector loads must not cross the end of a row.
    """
    if logits.shape[-1] == vocab_size:
        return logits
    token = torch.arange(logits.shape[-1], device=logits.device)
    return torch.where(token < vocab_size, logits, _NO_TOKEN)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """[B, T, N] = x @ weight, of [B, T, K] and [K, N].

    Two forms are faster for single tokens on CPUs. In compiled bfloat16 code, times a small weight: a batch of one,
    whose product the compiler may write itself (`own_products` of `rlhf.execution.compiled`). Where there are matrix
    tiles, times a large weight that lies transposed: the product the other way round, in two thirds of the time, and
    turned back, because whatever reads it works along memory. Without tiles that would take half as long again.
    """
    if x.is_cpu and x.shape[1] == 1:
        if _TILES and weight.numel() > _SMALL and weight.T.is_contiguous():
            rows: Tensor = (weight.T @ x[:, 0].T).T.contiguous()
            return rows.as_strided(rows.shape, (rows.shape[1], 1))[:, None]  # else compiled code does not turn it back
        if weight.numel() <= _SMALL and x.dtype == torch.bfloat16 and torch.compiler.is_compiling():
            return torch.bmm(x.transpose(0, 1), weight.unsqueeze(0)).transpose(0, 1)
    whole: Tensor = x @ weight
    return whole
