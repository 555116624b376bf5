"""The shapes of Llama, Qwen2 and Qwen3, and their form in config.json. This module needs no torch."""

from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from rlhf.models.config_sizes import SIZES, check_sizes, read_sizes
from rlhf.models.rope_config import Rope, RopeScaling, read_rope, write_rope


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Shape of a Llama language model: Llama 2, 3, 3.1 and 3.2, SmolLM2, TinyLlama."""

    model_type: ClassVar[str] = "llama"
    """Hugging Face's name of the architecture."""
    own_settings: ClassVar[tuple[str, ...]] = (
        "rms_norm_eps", "tie_word_embeddings", "attention_bias", "mlp_bias"
    )  # fmt: skip
    """Names of the fields that have the same name in config.json."""

    vocab_size: int = 32000
    """Number of tokens in the vocabulary."""
    n_positions: int = 2048
    """Context length in tokens (`max_position_embeddings`)."""
    n_embd: int = 2048
    """Hidden size (`hidden_size`)."""
    n_layer: int = 22
    """Number of transformer blocks (`num_hidden_layers`)."""
    n_head: int = 32
    """Number of attention heads per block (`num_attention_heads`)."""
    n_kv_head: int | None = None
    """Number of key-value heads per block (`num_key_value_heads`), a divisor of n_head; None stands for n_head."""
    head_dim: int | None = None
    """Width of a head; None stands for n_embd / n_head."""
    n_inner: int | None = None
    """Width of the MLP (`intermediate_size`); None stands for 8/3 n_embd, rounded up to a multiple of 64."""
    rms_norm_eps: float = 1e-5
    """Term added to the mean square in every norm."""
    rope_theta: float = 10000.0
    """Base of the rotary embeddings' wavelengths."""
    rope_scaling: RopeScaling | None = None
    """Scaling of the rotary embeddings for a longer context."""
    tie_word_embeddings: bool = True
    """True if the output layer is the embedding; otherwise it is a leaf of its own, `lm_head.weight`."""
    attention_bias: bool = False
    """True if the projections of attention have biases."""
    mlp_bias: bool = False
    """True if the MLP has biases."""

    def __post_init__(self) -> None:
        check_sizes(self, "vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
        check_sizes(self, *(name for name in ("n_kv_head", "head_dim", "n_inner") if getattr(self, name) is not None))
        if not isinstance(self.rms_norm_eps, int | float) or not self.rms_norm_eps > 0:
            raise ValueError(f"rms_norm_eps must be above 0, got {self.rms_norm_eps!r}")
        if self.n_head % self.kv_heads:
            raise ValueError(f"n_head must be a multiple of n_kv_head ({self.kv_heads}), got {self.n_head}")
        if self.head_dim is None and self.n_embd % self.n_head:
            raise ValueError(f"n_embd must be a multiple of n_head ({self.n_head}), got {self.n_embd}")
        if self.head_width % 2:
            raise ValueError(f"head_dim must be even, got {self.head_width}")

    @property
    def kv_heads(self) -> int:
        """Return the number of key-value heads."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def head_width(self) -> int:
        """Return the width of a head."""
        return self.n_embd // self.n_head if self.head_dim is None else self.head_dim

    @property
    def inner_width(self) -> int:
        """Return the width of the MLP."""
        return -(-8 * self.n_embd // (3 * 64)) * 64 if self.n_inner is None else self.n_inner

    @property
    def qkv_bias(self) -> bool:
        """Return whether queries, keys and values have biases."""
        return self.attention_bias

    @property
    def qk_norm(self) -> bool:
        """Return whether queries and keys are normalised head by head."""
        return False


@dataclass(frozen=True, kw_only=True)
class Qwen2Config(LlamaConfig):
    """Shape of a Qwen2 or Qwen2.5 language model: a Llama with biases on queries, keys and values."""

    model_type: ClassVar[str] = "qwen2"
    own_settings: ClassVar[tuple[str, ...]] = ("rms_norm_eps", "tie_word_embeddings")
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1000000.0

    @property
    def qkv_bias(self) -> bool:
        """Return whether queries, keys and values have biases: always."""
        return True


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(LlamaConfig):
    """Shape of a Qwen3 language model: a Llama that normalises queries and keys head by head."""

    model_type: ClassVar[str] = "qwen3"
    own_settings: ClassVar[tuple[str, ...]] = ("rms_norm_eps", "tie_word_embeddings", "attention_bias")
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1000000.0

    @property
    def qk_norm(self) -> bool:
        """Return whether queries and keys are normalised head by head: always."""
        return True


Config = TypeVar("Config", bound=LlamaConfig)

_TINY: dict[str, Any] = {"vocab_size": 512, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_kv_head": 1}
_SMALL: dict[str, Any] = {
    "vocab_size": 1024,
    "n_positions": 128,
    "n_embd": 128,
    "n_layer": 4,
    "n_head": 4,
    "n_kv_head": 2,
}

LLAMA_PRESETS: dict[str, LlamaConfig] = {
    "tiny": LlamaConfig(**_TINY),
    "small": LlamaConfig(**_SMALL),
    "smollm2-135m": LlamaConfig(
        vocab_size=49152, n_positions=8192, n_embd=576, n_layer=30, n_head=9, n_kv_head=3, n_inner=1536,
        rope_theta=100000.0,
    ),
    "smollm2-360m": LlamaConfig(
        vocab_size=49152, n_positions=8192, n_embd=960, n_layer=32, n_head=15, n_kv_head=5, n_inner=2560,
        rope_theta=100000.0,
    ),
}  # fmt: skip
"""Shapes by name: two for a laptop, and SmolLM2's (Ben Allal et al. 2025, https://arxiv.org/abs/2502.02737)."""

QWEN2_PRESETS: dict[str, Qwen2Config] = {
    "tiny": Qwen2Config(**_TINY),
    "small": Qwen2Config(**_SMALL),
    "qwen2.5-0.5b": Qwen2Config(
        vocab_size=151936, n_positions=32768, n_embd=896, n_layer=24, n_head=14, n_kv_head=2, n_inner=4864
    ),
}
"""Shapes by name: two for a laptop, and Qwen2.5's smallest (Qwen Team 2024, https://arxiv.org/abs/2412.15115)."""

QWEN3_PRESETS: dict[str, Qwen3Config] = {
    "tiny": Qwen3Config(**_TINY),
    "small": Qwen3Config(**_SMALL),
    "qwen3-0.6b": Qwen3Config(
        vocab_size=151936, n_positions=40960, n_embd=1024, n_layer=28, n_head=16, n_kv_head=8, head_dim=128,
        n_inner=3072,
    ),
}  # fmt: skip
"""Shapes by name: two for a laptop, and Qwen3's smallest (Yang et al. 2025, https://arxiv.org/abs/2505.09388)."""


def check_full_attention(settings: dict[str, Any]) -> None:
    """Check that every layer of a config.json attends to all earlier tokens.

    Args:
        settings: contents of config.json.

    Raises:
        ValueError: a layer attends to a window of them, or in another way.

    Example:
        >>> check_full_attention({"layer_types": ["full_attention", "full_attention"]})
    """
    layers = settings.get("layer_types")
    if layers is None:
        is_windowed = settings.get("use_sliding_window") and settings.get("sliding_window", 4096) is not None
        if is_windowed and settings.get("max_window_layers", 28) < settings.get("num_hidden_layers", 0):
            raise ValueError("use_sliding_window is true; sliding windows are not supported")
    elif other := next((layer for layer in layers if layer != "full_attention"), None):
        raise ValueError(f"layer_types has {other!r}, expected 'full_attention' alone; other layers are not supported")


def settings_to_shape(kind: type[Config], settings: dict[str, Any]) -> Config:
    """Return the shape that a config.json describes.

    Args:
        kind: type of the shape.
        settings: contents of config.json.

    Raises:
        ValueError: the model has something that is not supported, such as a sliding window. The message names it.

    Example:
        >>> settings_to_shape(LlamaConfig, shape_to_settings(LLAMA_PRESETS["tiny"])).n_kv_head
        1
    """
    if (activation := settings.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise ValueError(f"hidden_act is {activation!r}, expected 'silu'; other activations are not supported")
    check_full_attention(settings)
    rope = read_rope(settings)
    if rope.partial_rotary_factor != 1.0:
        raise ValueError(f"partial_rotary_factor is {rope.partial_rotary_factor!r}, expected 1.0")
    own = {name: settings[name] for name in kind.own_settings if name in settings}
    unstated = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6}  # what transformers takes
    return kind(
        **read_sizes(settings),
        **(unstated | own),
        n_kv_head=settings.get("num_key_value_heads"),
        head_dim=settings.get("head_dim", 128 if kind is Qwen3Config else None),
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
    )


def shape_to_settings(config: LlamaConfig) -> dict[str, Any]:
    """Return the part of config.json that describes the shape.

    Example:
        >>> shape_to_settings(LLAMA_PRESETS["smollm2-135m"])["num_key_value_heads"]
        3
    """
    settings = {theirs: getattr(config, name) for name, theirs in SIZES.items()}
    settings |= {"intermediate_size": config.inner_width, "num_key_value_heads": config.kv_heads}
    settings |= {"head_dim": config.head_width, "hidden_act": "silu", "attention_dropout": 0.0}
    settings |= {name: getattr(config, name) for name in config.own_settings}
    return settings | write_rope(Rope(config.rope_theta, config.rope_scaling, 1.0))
