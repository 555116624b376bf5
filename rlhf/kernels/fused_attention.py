"""Fused and compiled forms of `rlhf.models.attention`: torch's own attention, FlashAttention-2 and a Triton kernel."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import _engine_run_backward

from rlhf.transforms import is_transformed, reference_needed

_PLAIN = 512
"""Length up to which the plain form is faster in bf16 on a CPU."""

Function = Callable[..., Any]


def attention_layout(
    reference: Function, segments: Tensor | None, bounds: Tensor | None, like: Tensor, width: int
) -> Any:
    """Omit the bias where `self_attention` reads bounds instead: on a GPU, in bfloat16."""
    if bounds is None or not flash_attention_takes(like, width):
        return reference(segments, bounds, like, width)
    return reference(None, None, like, width)._replace(bounds=bounds)


def flash_attention_takes(like: Tensor, width: int) -> bool:
    """Return True if FlashAttention supports heads of this width, of the device and dtype of `like`."""
    return like.is_cuda and like.dtype == torch.bfloat16 and width % 8 == 0 and width <= 256


def self_attention(reference: Function, q: Tensor, k: Tensor, v: Tensor, layout: Any) -> Tensor:
    """Run FlashAttention on packed sequences, which never looks at another sequence.

    Source: Dao 2023, "FlashAttention-2", https://arxiv.org/abs/2307.08691, in torch's implementation.
    """
    if layout.bounds is None:
        return reference(q, k, v, layout)
    rows, _, length, _ = q.shape  # no sequence is longer
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # tokens first, as they lie in memory
    attended: Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, layout.bounds, layout.bounds, length, length, 0.0, True, False
    )[0]
    return attended.view(rows, length, *attended.shape[1:]).transpose(1, 2)


def attention(reference: Function, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Run torch's fused attention, except in bfloat16 on a CPU, where its backward pass is slow."""
    if torch.compiler.is_compiling():
        return _compiled_attention(reference, q, k, v, bias)
    if reference_needed(q, k, v):
        return reference(q, k, v, bias)
    if _is_bfloat16_on_cpu(q):
        if q.shape[2] <= _PLAIN:
            return reference(q, k, v, bias)
        return attention(reference, q.float(), k.float(), v.float(), bias).to(q.dtype)
    is_differentiated = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if is_differentiated and not is_transformed():
        attended: Tensor = _FusedAttention.apply(reference, q, k, v, bias)  # type: ignore[no-untyped-call]
        return attended
    return _fused(q, k, v, bias)


def _compiled_attention(reference: Function, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    if not _is_bfloat16_on_cpu(q):
        return _fused(q, k, v, bias)
    length = q.shape[2]
    if length > _PLAIN:
        return _fused(q.float(), k.float(), v.float(), bias).to(q.dtype)
    if bias is None:
        bias = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().float().log()
    k, v = _repeat_heads(k, q), _repeat_heads(v, q)
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5 + bias
    highest = scores.detach().amax(-1, keepdim=True)  # a constant: it cancels
    weights: Tensor = _Exp.apply(scores - highest)  # type: ignore[no-untyped-call]
    return (weights @ v / weights.float().sum(-1, keepdim=True)).to(q.dtype)  # one pass less than the softmax


def prompt_attention(reference: Function, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Run torch's fused attention in every dtype: there is no backward pass."""
    return reference(q, k, v) if reference_needed(q, k, v) else _fused(q, k, v, None)


def init_kv_cache(
    reference: Function, like: Tensor, *, n_layer: int, batch_size: int, n_kv_head: int, slots: int, width: int
) -> Any:
    """Lay all of a slot together on a GPU, as [B, S, G, H], for `decode_attention`.

    On CPUs slots are contiguous in the keys, components in the values, so that both products read memory in order.
    """
    if not like.is_cuda:
        return reference(like, n_layer=n_layer, batch_size=batch_size, n_kv_head=n_kv_head, slots=slots, width=width)
    empty = reference(like, n_layer=0, batch_size=batch_size, n_kv_head=n_kv_head, slots=slots, width=width)
    keys, values = ([like.new_zeros(batch_size, slots, n_kv_head, width) for _ in range(n_layer)] for _ in range(2))
    return empty._replace(
        keys=tuple(k.permute(0, 2, 3, 1) for k in keys), values=tuple(v.transpose(1, 2) for v in values)
    )


def decode_attention(
    reference: Function,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    bias: Tensor,
) -> Tensor:
    """Run the Triton kernel on a GPU; it reads no slot that is not in use."""
    if not q.is_cuda:
        return reference(q, k, v, keys, values, lengths, bias)
    from rlhf.kernels.decode_attention_triton import decode_attention_triton  # here, because it imports Triton

    return decode_attention_triton(q, k, v, keys, values, lengths)


def attend_to_cache(reference: Function, q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """Compile to sums of products, which become vector code; products of such small matrices would cost calls."""
    if not torch.compiler.is_compiling():
        return reference(q, keys, values, bias)
    wide = torch.promote_types(q.dtype, torch.float32)
    if keys.shape[1] != q.shape[1]:
        q, keys, values = q.view(len(q), keys.shape[1], -1, q.shape[-1]), keys.unsqueeze(2), values.unsqueeze(2)
        bias = bias[:, None]
    scores = (q.to(wide)[..., None] * keys.to(wide)).sum(-2)
    weights = (scores * q.shape[-1] ** -0.5 + bias[:, None]).softmax(-1)
    attended = (weights[..., None] * values.to(wide)).sum(-2).to(q.dtype)
    return attended if attended.ndim == 3 else attended.flatten(1, 2)


def additive_mask(reference: Function, allowed: Tensor) -> Tensor:
    """Take the mask's logarithm in compiled code, which stores its result; anything cheaper is recomputed per layer."""
    return allowed.float().log() if torch.compiler.is_compiling() else reference(allowed)


def _is_bfloat16_on_cpu(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.is_cpu


def _fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.to(q.dtype)
    if q.is_cuda and (bias is not None or q.dtype == torch.float32):  # whose kernel takes no shared keys
        k, v = _repeat_heads(k, q), _repeat_heads(v, q)
    is_shared = k.shape[1] != q.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None, enable_gqa=is_shared)


def _repeat_heads(x: Tensor, q: Tensor) -> Tensor:
    """Return keys or values for each head of the queries."""
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _graph(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return fused attention's inputs and output, with a graph of their own between them."""
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        return (q, k, v), _fused(q, k, v, bias)


class _FusedAttention(torch.autograd.Function):
    """Fused attention whose backward pass is the reference's when differentiated again."""

    @staticmethod
    def forward(ctx: Any, reference: Function, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, k, v, bias)
        ctx.reference, ctx.graph = reference, _graph(q, k, v, bias)
        output: Tensor = ctx.graph[1].detach()
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias = ctx.saved_tensors
        if not torch.is_grad_enabled() and not is_transformed():
            inputs, output = ctx.graph or _graph(q, k, v, bias)  # again where the graph around is retained
            ctx.graph = None  # what attention keeps is freed layer by layer
            # `torch.autograd.grad` would import SymPy to compare shapes: half a second and 36 MB
            return None, *_engine_run_backward((output,), (gradient,), False, False, inputs, False, False), None
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            inputs = [x if x.requires_grad else x.detach().requires_grad_() for x in (q, k, v)]
            output = ctx.reference(*inputs, bias)
            gradients = torch.autograd.grad(output, inputs, gradient, create_graph=create_graph)
        return None, *gradients, None


class _Exp(torch.autograd.Function):
    """Exponential in bfloat16, whose gradient reads that result: a compiler would store a float32 copy as well."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.exp().bfloat16()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (exp,) = ctx.saved_tensors
        return gradient.float() * exp.float()
