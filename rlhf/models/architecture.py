"""The interface of decoders, and the table of architectures.

An architecture is one file and one line in `_MODULES`. Its functions are pure. They take a pytree of parameters and a
frozen dataclass, the shape. A model is a shape and its parameters: the shape's `model_type` leads to the architecture.
The module of an architecture that is defined elsewhere calls `register` when it is imported.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor

from rlhf.field_docs import documented
from rlhf.types import Params


class ModelShape(Protocol):
    """The shape of a model: a frozen dataclass with at least these fields."""

    model_type: ClassVar[str]
    """Hugging Face's name of the architecture."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens in the vocabulary."""

    @property
    def n_positions(self) -> int:
        """Context length in tokens."""

    @property
    def n_embd(self) -> int:
        """Hidden size."""

    @property
    def n_layer(self) -> int:
        """Number of transformer blocks."""


@documented
@dataclass(frozen=True, eq=False, kw_only=True)
class Architecture:
    """A family of decoders as pure functions.

    `rlhf.models.transformer` describes what the passes take and return. `segments` tell sequences in a row apart: the
    hidden state of a token depends on itself and the earlier tokens of its segment alone.
    """

    shape: type[Any]
    """Frozen dataclass with the fields of `ModelShape`."""
    presets: Mapping[str, Any]
    """Shapes by name, for models from scratch."""

    init: Callable[..., Params]
    """(shape, *, key) -> random parameters, float32."""
    empty: Callable[[Any], Params]
    """(shape) -> the parameters' structure on the `meta` device, without memory."""
    hidden_states: Callable[..., Tensor]
    """(params, tokens [B, T], *, config, positions, segments, bounds, dropout, key, gradient_checkpointing) ->
    [B, T, D]: hidden states after the last norm."""
    logits: Callable[..., Tensor]
    """(params, hidden [..., D], *, config, padded=False) -> [..., V] logits, as `rlhf.models.layers.unembed`
    returns them."""
    unembedding: Callable[[Params], Params]
    """(params) -> the part of the parameters that `logits` reads."""
    cast_for_compute: Callable[..., Params]
    """(params, dtype) -> parameters to compute with, differentiable."""
    prepare_for_decoding: Callable[..., Params]
    """(params, dtype) -> parameters for `prefill`, `decode` and `logits` alone, fastest for single tokens."""

    init_cache: Callable[..., Any]
    """(params, batch_size, slots, *, config) -> a pytree of zeros [B, ...] in the dtype and on the device of the
    computation, which `prefill` and `decode` write in place."""
    prefill: Callable[..., Tensor]
    """(params, tokens [U, P], lengths [U], cache, *, config, rows, source) -> [R, D]: last hidden states of whole
    prompts."""
    decode: Callable[..., Tensor]
    """(params, tokens [B], lengths [B], cache, *, config, cache_length) -> [B, D]: hidden states of one more token."""

    select_vocab: Callable[[Params, int], Params]
    """(params, rows) -> the parameters with the first `rows` tokens of the vocabulary alone."""
    to_hugging_face: Callable[[Params], dict[str, Tensor]]
    """(params) -> the state dict of Hugging Face's model, without tied weights."""
    from_hugging_face: Callable[..., Params]
    """(state dict, *, config) -> params; ValueError names a tensor that is missing, unknown or of another shape."""
    settings_to_shape: Callable[[dict[str, Any]], Any]
    """(config.json) -> the shape; ValueError names a setting that the architecture does not support."""
    shape_to_settings: Callable[[Any], dict[str, Any]]
    """(shape) -> the part of config.json that describes it."""
    trunk_shape: Callable[[Any], Any] = lambda shape: shape
    """(shape) -> the shape of the decoder without an output layer of its own, for models with a scalar head."""
    causal_lm: str
    """Name of Hugging Face's class of language models."""
    sequence_classifier: str
    """Name of Hugging Face's class of models with a scalar head `score`."""
    aliases: frozenset[str] = field(default=frozenset())
    """Names of further classes whose folders are read like those of `causal_lm`."""
    prefix: str
    """Prefix of the weights' names in Hugging Face files, such as `transformer.`."""
    embedding: str
    """Name of the token embedding, without the prefix."""
    ignored_suffixes: tuple[str, ...] = ()
    """Suffixes of the names of buffers, which have no effect."""
    output_layer: str = "lm_head"
    """Name of an untied output layer in model folders; among the parameters it is `lm_head.weight`."""
    has_dropout: bool = True
    """True if `hidden_states` supports dropout."""

    @property
    def model_type(self) -> str:
        """Hugging Face's name of the architecture."""
        name: str = self.shape.model_type
        return name


_MODULES = {
    "gpt2": ("rlhf.models.gpt2", "ARCHITECTURE"),
    "llama": ("rlhf.models.llama", "LLAMA"),
    "qwen2": ("rlhf.models.llama", "QWEN2"),
    "qwen3": ("rlhf.models.llama", "QWEN3"),
    "gpt_neox": ("rlhf.models.gpt_neox", "ARCHITECTURE"),
}
"""Module of each `model_type`, and the name of the architecture in it."""

_REGISTERED: dict[str, Architecture] = {}


def register(architecture: Architecture) -> Architecture:
    """Add an architecture to the table, or replace the one of the same `model_type`.

    Call this function at the top level of the module that defines the shape, so that workers register it too.

    Example:
        >>> register(get_architecture("gpt2")) is get_architecture("gpt2")
        True
    """
    _REGISTERED[architecture.model_type] = architecture
    return architecture


def model_types() -> list[str]:
    """Return the `model_type` of every architecture, sorted.

    Example:
        >>> "gpt2" in model_types()
        True
    """
    return sorted({*_MODULES, *_REGISTERED})


def architectures() -> list[Architecture]:
    """Return every architecture, sorted by `model_type`.

    Example:
        >>> "gpt2" in [architecture.model_type for architecture in architectures()]
        True
    """
    return [get_architecture(name) for name in model_types()]


def get_architecture(model_type: str) -> Architecture:
    """Return the architecture with a name that Hugging Face uses.

    Args:
        model_type: Hugging Face's name of the architecture.

    Raises:
        ValueError: there is no such architecture.

    Example:
        >>> get_architecture("gpt2").causal_lm
        'GPT2LMHeadModel'
    """
    if model_type not in _REGISTERED:
        if model_type not in _MODULES:
            raise ValueError(f"model_type is {model_type!r}, expected one of {', '.join(model_types())}")
        module, name = _MODULES[model_type]
        register(getattr(importlib.import_module(module), name))
    return _REGISTERED[model_type]


def architecture_of(config: ModelShape) -> Architecture:
    """Return the architecture that a shape belongs to.

    Args:
        config: shape of a model.

    Example:
        >>> architecture_of(rlhf.PRESETS["tiny"]).model_type
        'gpt2'
    """
    return get_architecture(config.model_type)
