"""Completion of prompts by one model: token by token for a terminal, or all at once for a file."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf.data.chat_tokens import TEMPLATE_FLAG, encode_chat
from rlhf.data.conversations import Message
from rlhf.data.encoding import chat_tokenizer
from rlhf.distributed.compute_context import compute_dtype
from rlhf.errors import UserError
from rlhf.execution.executor import LocalExecutor
from rlhf.execution.program import ModelState, Program
from rlhf.generate.complete import complete, decode_completions, default_length, make_completion_fn
from rlhf.generate.generate_config import GenerateConfig
from rlhf.io.model_folder import load_language_model
from rlhf.io.tokenizer import Tokenizer
from rlhf.models.architecture import ModelShape, architecture_of
from rlhf.models.decoding import Completions
from rlhf.ops import scale_logits
from rlhf.random import uniform_at
from rlhf.sampling import filter_logits, sample_token
from rlhf.tree import to_device
from rlhf.types import Params

ROWS = 64
"""Number of completions of a micro-batch."""


@torch.no_grad()
def stream(
    params: Params,
    prompt: Tensor,
    key: Tensor,
    *,
    config: ModelShape,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_tokens: Sequence[int] = (),
) -> Iterator[int]:
    """Yield the tokens of a completion one at a time, which are those that `generate_completions` draws.

    Args:
        params: parameters prepared for decoding (`Architecture.prepare_for_decoding`).
        prompt: [P] int64, at least one token; P + max_new_tokens must fit in n_positions.
        key: [2] int32, consumed.
        config: shape of `params`.
        max_new_tokens: maximum number of tokens, at least 1.
        temperature: softmax temperature, above 0.
        top_k: number of most likely tokens to draw from; 0 keeps all, 1 is greedy.
        top_p: probability of the most likely tokens to draw from, in (0, 1]; 1 keeps all.
        stop_tokens: ids of the tokens that end the completion, of which the last token is one.

    Yields:
        Token ids.

    Raises:
        ValueError: an argument is out of range, or prompt and completion do not fit.
    """
    length = len(prompt)
    slots = length + max_new_tokens
    if not 1 <= length < slots <= config.n_positions:
        raise ValueError(
            f"stream: prompt and completion have {length} + {max_new_tokens} tokens, expected at least 1 each and at "
            f"most n_positions = {config.n_positions} in all"
        )
    decoder = architecture_of(config)
    cache = decoder.init_cache(params, 1, slots, config=config)
    lengths = torch.tensor([length], device=prompt.device)
    hidden = decoder.prefill(params, prompt[None], lengths, cache, config=config)
    for step in range(max_new_tokens):
        logits = scale_logits(decoder.logits(params, hidden, config=config), temperature)
        logits = filter_logits(logits, top_k=top_k, top_p=top_p)
        token = sample_token(logits, uniform_at(key, torch.tensor([step], device=key.device)))
        yield int(token)
        if int(token) in stop_tokens or step + 1 == max_new_tokens:
            return
        hidden = decoder.decode(params, token, lengths + step, cache, config=config, cache_length=length + step + 1)


class TextChunk(NamedTuple):
    """New text of a completion."""

    text: str
    """New characters; empty while the bytes of a character are incomplete."""
    ended: bool
    """True if the model has ended the completion by itself."""


def text_chunks(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[TextChunk]:
    """Yield the text of tokens as they arrive, in whole characters; together, the text without the stop token."""
    decoded: list[int] = []
    shown, ended = 0, False
    for token in tokens:
        ended = token in tokenizer.stop_ids
        decoded += [] if ended else [token]
        text = tokenizer.decode(decoded)
        whole = text.rstrip("\N{REPLACEMENT CHARACTER}")  # bytes of a character whose rest is still to come
        yield TextChunk(whole[shown:], ended)
        shown = max(shown, len(whole))
    rest = tokenizer.decode(decoded)[shown:]
    if rest:
        yield TextChunk(rest, ended)


class Completer:
    """A model that completes prompts with the settings of rlhf-generate."""

    def __init__(self, folder: Path, config: GenerateConfig, device: torch.device) -> None:
        """Load the model.

        Raises:
            UserError: the model cannot be read, or its context is too short for the completions.
        """
        model = load_language_model(folder)
        self.model = model = model._replace(tokenizer=chat_tokenizer(model.tokenizer, config.data))
        self.folder, self._device, self._context = folder, device, model.config.n_positions
        self.configure(config)
        self._dtype = compute_dtype(config.precision)
        decoder = architecture_of(model.config)
        self._params: Params = decoder.prepare_for_decoding(to_device(model.params, device), self._dtype)

    def configure(self, config: GenerateConfig) -> None:
        """Replace the settings of the sampling.

        Raises:
            UserError: the model's context is too short for the completions.
        """
        context = self._context
        length = config.max_new_tokens or default_length(context)
        if length >= context:
            raise UserError(
                f"--max-new-tokens {length}: {self.folder} reads {context} tokens in all; give at most {context - 1}"
            )
        self.max_new_tokens, self.room, self._config = length, context - length, config

    def encode(self, prompt: str | list[Message]) -> np.ndarray:
        """Return [n] int64: the last tokens of a text or conversation that leave room for the completion.

        Raises:
            UserError: the model has no chat template for a conversation, or the template refuses it.
        """
        tokenizer = self.model.tokenizer
        if isinstance(prompt, str):
            (tokens,) = tokenizer.encode([prompt])
            return np.array(tokenizer.begin(tokens, self.room), dtype=np.int64)
        if tokenizer.chat_template is None:
            raise UserError(
                f"{self.folder}: the tokenizer has no chat template to write conversations by; add {TEMPLATE_FLAG}; "
                "or leave --chat out, and write the text around each prompt as --template"
            )
        try:
            tokens = tokenizer.cut(encode_chat(tokenizer, prompt, []).prompt, self.room)
        except ValueError as error:
            raise UserError(f"{self.folder}: {error}") from error
        return np.array(tokens, dtype=np.int64)

    def stream(self, prompt: str | list[Message], key: Tensor) -> Iterator[TextChunk]:
        """Yield the completion of one prompt, as it is drawn."""
        tokens, model = torch.from_numpy(self.encode(prompt)).to(self._device), self.model
        stops = model.tokenizer.stop_ids
        drawn_tokens = stream(
            self._params, tokens, key.to(self._device), config=model.config, stop_tokens=stops, **self._sampling()
        )
        return text_chunks(model.tokenizer, drawn_tokens)

    def complete(self, prompts: Sequence[str | list[Message]], keys: Tensor) -> list[TextChunk]:
        """Return whole completions of many prompts, drawn together; `keys` is [n, 2]."""
        model = self.model
        program = Program({}, {"rollout": self._rollout()}, {})
        executor = LocalExecutor(program, ModelState({"policy": model.params}, {}), self._device)
        completions = complete(executor, [self.encode(prompt) for prompt in prompts], keys, rows=ROWS)
        texts = decode_completions(model.tokenizer, completions)
        return [TextChunk(text, ended) for text, ended in zip(texts, completions.ended.tolist(), strict=True)]

    def _rollout(self) -> Callable[..., Completions]:
        model = self.model
        return make_completion_fn(
            model.config, dtype=self._dtype, stop_tokens=model.tokenizer.stop_ids, **self._sampling()
        )

    def _sampling(self) -> dict[str, Any]:
        config = self._config
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": config.temperature,
            "top_k": 1 if config.greedy else config.top_k,
            "top_p": config.top_p,
        }
