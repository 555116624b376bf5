"""The same architecture as an nn.Module, trained as one would by hand: torch.compile, autocast, fused AdamW."""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks import material
from benchmarks.session import Session


class Block(nn.Module):
    """Attention and MLP, each behind a layer norm and around a residual."""

    def __init__(self, width: int, heads: int) -> None:
        """One layer."""
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.c_fc, self.mlp_c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.c_attn(self.ln_1(x)).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.c_proj(attended)
        return x + self.mlp_c_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class GPT2(nn.Module):
    """Tokens in, mean loss of the next token out."""

    def __init__(self, shape: material.Shape) -> None:
        """Random weights; `load` brings the right ones."""
        super().__init__()
        self.wte = nn.Embedding(shape.vocab_size, shape.n_embd)
        self.wpe = nn.Embedding(shape.n_positions, shape.n_embd)
        self.h = nn.ModuleList(Block(shape.n_embd, shape.n_head) for _ in range(shape.n_layer))
        self.ln_f = nn.LayerNorm(shape.n_embd)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T] int64 to a scalar."""
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.h:
            x = block(x)
        logits = F.linear(self.ln_f(x)[:, :-1], self.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Read a GPT2LMHeadModel's weights; its projections are stored the other way round."""
        stored = load_file(folder / "model.safetensors")
        for name, parameter in self.named_parameters():
            leaf = stored[_PROJECTION.sub(lambda match: _PLACES[match[0]], f"transformer.{name}")]
            parameter.copy_(leaf.T if leaf.ndim == 2 and name.startswith("h.") else leaf)


_PLACES = {"c_attn": "attn.c_attn", "c_proj": "attn.c_proj", "c_fc": "mlp.c_fc", "mlp_c_proj": "mlp.c_proj"}
"""Where the projections of a `Block` stand in a model folder."""
_PROJECTION = re.compile(r"\b(mlp_)?c_\w+\b")


def run(session: Session, *, model: str, size: str, device: str, precision: str) -> None:
    """Optimiser steps on full sequences; arguments as `benchmarks.ours.sft`."""
    work = material.SIZES[size]
    count, length = work.sft
    network = GPT2(work.shape)
    network.load(Path(model))
    network.to(device)
    matrices = [parameter for parameter in network.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in network.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    compiled = torch.compile(network)
    data = torch.tensor(material.demonstrations(work, varied=False)).to(device).split(count)
    session.ready(parameters=sum(parameter.numel() for parameter in network.parameters()))
    step = 0
    for _ in session.rounds():
        for _ in range(work.steps):
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
                loss = compiled(data[step % len(data)])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
        session.answer(tokens=work.steps * count * length, loss=float(loss) * count * (length - 1))
