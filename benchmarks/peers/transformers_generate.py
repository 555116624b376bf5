"""Completions by `transformers`' generate."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks import material
from benchmarks.session import Session


def run(
    session: Session,
    *,
    model: str,
    size: str,
    device: str,
    prompts: int,
    batch: int,
    stops: list[int],
    precision: str = "fp32",
    cache: str = "dynamic",
) -> None:
    """Complete `prompts` prompts, `batch` at a time.

    Args:
        session: asks for the rounds.
        model: folder.
        size: of `material.SIZES`.
        device: cpu or cuda.
        prompts: of a round.
        batch: completed together.
        stops: tokens that end a completion; without any all run to the end.
        precision: fp32, or bf16 for weights and cache.
        cache: transformers' key-value cache, dynamic or static.
    """
    work = material.SIZES[size]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device).eval()
    network.generation_config.eos_token_id = None
    lengths = material.fixed_lengths(prompts, work.prompt)
    queue = torch.tensor(material.sequences(lengths, work.shape.vocab_size)).to(device)
    limits: dict[str, Any] = {"max_new_tokens": work.completion}
    limits |= {"eos_token_id": stops} if stops else {"min_new_tokens": work.completion}
    session.ready(parameters=sum(parameter.numel() for parameter in network.parameters()))
    for _ in session.rounds():
        made = 0
        for prompt in queue.split(batch):
            out = network.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                top_k=0,
                pad_token_id=1,
                cache_implementation=cache,
                **limits,
            )
            made += _length(out[:, work.prompt :], stops)
        session.answer(tokens=made)


def _length(completions: torch.Tensor, stops: list[int]) -> int:
    """Tokens drawn, the stop token included and what follows it left out."""
    stopped = torch.isin(completions, torch.tensor(stops, dtype=torch.int64, device=completions.device)).long()
    return int((stopped.cumsum(dim=1) - stopped == 0).sum())
