"""The shape of a GPT-NeoX, such as Pythia, and its form in config.json. This module needs no torch."""

from dataclasses import dataclass
from typing import Any, ClassVar

from rlhf.models.config_sizes import SIZES, check_sizes, read_sizes
from rlhf.models.rope_config import Rope, RopeScaling, read_rope, write_rope

_ROTARY_SHARE = 0.25
"""Share of a head that is rotated if config.json names none."""


@dataclass(frozen=True, kw_only=True)
class GPTNeoXConfig:
    """Shape of a GPT-NeoX language model."""

    model_type: ClassVar[str] = "gpt_neox"
    """Hugging Face's name of the architecture."""

    vocab_size: int = 50304
    """Number of tokens in the vocabulary."""
    n_positions: int = 2048
    """Context length in tokens (`max_position_embeddings`)."""
    n_embd: int = 512
    """Hidden size (`hidden_size`), a multiple of n_head."""
    n_layer: int = 6
    """Number of transformer blocks (`num_hidden_layers`)."""
    n_head: int = 8
    """Number of attention heads per block (`num_attention_heads`)."""
    n_inner: int | None = None
    """Width of the MLP (`intermediate_size`); None stands for 4 n_embd."""
    layer_norm_eps: float = 1e-5
    """Term added to the variance in every layer norm."""
    use_parallel_residual: bool = True
    """True if attention and MLP read the same states; otherwise the MLP reads those after attention."""
    partial_rotary_factor: float = _ROTARY_SHARE
    """Share of each head that is rotated (`rotary_pct`)."""
    rope_theta: float = 10000.0
    """Base of the rotary embeddings' wavelengths (`rotary_emb_base`)."""
    rope_scaling: RopeScaling | None = None
    """Scaling of the rotary embeddings for a longer context."""
    tie_word_embeddings: bool = False
    """True if the output layer is the embedding; otherwise it is a leaf of its own, `lm_head.weight`."""
    attention_bias: bool = True
    """True if the projections of attention have biases."""

    def __post_init__(self) -> None:
        check_sizes(self, "vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
        check_sizes(self, *(["n_inner"] if self.n_inner is not None else []))
        if not isinstance(self.layer_norm_eps, int | float) or not self.layer_norm_eps > 0:
            raise ValueError(f"layer_norm_eps must be above 0, got {self.layer_norm_eps!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd must be a multiple of n_head ({self.n_head}), got {self.n_embd}")
        if self.rotary_width % 2 or not 0 < self.rotary_width <= self.head_width:
            raise ValueError(
                f"partial_rotary_factor must rotate an even number of the {self.head_width} components of a head, got "
                f"{self.partial_rotary_factor!r}"
            )

    @property
    def kv_heads(self) -> int:
        """Return the number of key-value heads: one for each query head."""
        return self.n_head

    @property
    def head_width(self) -> int:
        """Return the width of a head."""
        return self.n_embd // self.n_head

    @property
    def rotary_width(self) -> int:
        """Return the number of components of a head that are rotated."""
        return int(self.head_width * self.partial_rotary_factor)

    @property
    def inner_width(self) -> int:
        """Return the width of the MLP."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner


PRESETS: dict[str, GPTNeoXConfig] = {
    "tiny": GPTNeoXConfig(vocab_size=512, n_positions=64, n_embd=64, n_layer=2, n_head=2),
    "small": GPTNeoXConfig(vocab_size=1024, n_positions=128, n_embd=128, n_layer=4, n_head=4),
    "pythia-70m": GPTNeoXConfig(),
    "pythia-160m": GPTNeoXConfig(n_embd=768, n_layer=12, n_head=12),
    "pythia-410m": GPTNeoXConfig(n_embd=1024, n_layer=24, n_head=16),
}
"""Shapes by name: two for a laptop, and three of Pythia's (Biderman et al. 2023, https://arxiv.org/abs/2304.01373)."""

_OWN = ("layer_norm_eps", "use_parallel_residual", "tie_word_embeddings", "attention_bias")


def settings_to_shape(settings: dict[str, Any]) -> GPTNeoXConfig:
    """Return the shape that a config.json describes.

    Args:
        settings: contents of config.json.

    Raises:
        ValueError: the model has something that is not supported, such as another activation. The message names it.

    Example:
        >>> settings_to_shape(shape_to_settings(PRESETS["tiny"])).partial_rotary_factor
        0.25
    """
    if (activation := settings.get("hidden_act", "gelu")) != "gelu":
        raise ValueError(f"hidden_act is {activation!r}, expected 'gelu'; other activations are not supported")
    rope = read_rope(settings, share=_ROTARY_SHARE)
    return GPTNeoXConfig(
        **read_sizes(settings),
        **{name: settings[name] for name in _OWN if name in settings},
        partial_rotary_factor=rope.partial_rotary_factor,
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
    )


def shape_to_settings(config: GPTNeoXConfig) -> dict[str, Any]:
    """Return the part of config.json that describes the shape.

    Example:
        >>> shape_to_settings(PRESETS["pythia-70m"])["rotary_pct"]
        0.25
    """
    settings = {theirs: getattr(config, name) for name, theirs in SIZES.items()}
    settings |= {"intermediate_size": config.inner_width, "hidden_act": "gelu"}
    settings |= {"attention_dropout": 0.0, "hidden_dropout": 0.0}
    settings |= {name: getattr(config, name) for name in _OWN}
    rope = write_rope(Rope(config.rope_theta, config.rope_scaling, config.partial_rotary_factor))
    return settings | rope | {"rotary_pct": config.partial_rotary_factor, "rotary_emb_base": config.rope_theta}
