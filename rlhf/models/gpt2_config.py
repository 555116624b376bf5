"""The shape of a GPT-2, and its form in config.json. This module needs no torch."""

from dataclasses import dataclass
from typing import Any, ClassVar

from rlhf.field_docs import documented


@documented
@dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """Shape of a GPT-2 language model, in the names of its `config.json`.

    Example:
        >>> GPT2Config(n_embd=1024, n_layer=24, n_head=16) == PRESETS["gpt2-medium"]
        True
    """

    model_type: ClassVar[str] = "gpt2"
    """Hugging Face's name of the architecture."""

    vocab_size: int = 50257
    """Number of tokens in the vocabulary."""
    n_positions: int = 1024
    """Context length in tokens."""
    n_embd: int = 768
    """Hidden size, a multiple of n_head."""
    n_layer: int = 12
    """Number of transformer blocks."""
    n_head: int = 12
    """Number of attention heads per block."""
    layer_norm_epsilon: float = 1e-5
    """Term added to the variance in every layer norm."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            size = getattr(self, name)
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be at least 1, got {size!r}")
        if not isinstance(self.layer_norm_epsilon, int | float) or not self.layer_norm_epsilon > 0:
            raise ValueError(f"layer_norm_epsilon must be above 0, got {self.layer_norm_epsilon!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd must be a multiple of n_head ({self.n_head}), got {self.n_embd}")

    @property
    def kv_heads(self) -> int:
        """Return the number of key-value heads: one for each query head."""
        return self.n_head

    @property
    def head_width(self) -> int:
        """Return the width of a head."""
        return self.n_embd // self.n_head


PRESETS: dict[str, GPT2Config] = {
    "tiny": GPT2Config(vocab_size=512, n_positions=64, n_embd=64, n_layer=2, n_head=2),
    "small": GPT2Config(vocab_size=1024, n_positions=128, n_embd=128, n_layer=4, n_head=4),
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "gpt2-large": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "gpt2-xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
}
"""Shapes by name: two for a laptop, and the four that OpenAI released (Radford et al. 2019, table 2)."""

_SHAPE = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "layer_norm_epsilon")
_REQUIRED = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


def settings_to_shape(settings: dict[str, Any]) -> GPT2Config:
    """Return the shape that a config.json describes.

    Args:
        settings: contents of config.json.

    Raises:
        ValueError: the model is not a plain GPT-2. The message names the setting.

    Example:
        >>> settings_to_shape({"n_embd": 64, "n_head": 2, "n_layer": 2}).n_embd
        64
    """
    for name, allowed in _REQUIRED.items():
        if (got := settings.get(name, allowed[0])) not in allowed:
            raise ValueError(f"{name} is {got!r}, expected {allowed[0]!r}; only plain GPT-2 models can be read")
    config = GPT2Config(**{name: settings[name] for name in _SHAPE if name in settings})
    if settings.get("n_inner") not in (None, 4 * config.n_embd):
        raise ValueError(f"n_inner is {settings['n_inner']}, expected {4 * config.n_embd} (4 n_embd)")
    return config


def shape_to_settings(config: GPT2Config) -> dict[str, Any]:
    """Return the part of config.json that describes the shape.

    Example:
        >>> settings_to_shape(shape_to_settings(PRESETS["tiny"])) == PRESETS["tiny"]
        True
    """
    settings = {name: getattr(config, name) for name in _SHAPE}
    settings |= {"activation_function": "gelu_new", "scale_attn_weights": True, "tie_word_embeddings": True}
    return settings | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
