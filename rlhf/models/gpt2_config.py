"""The shape of a GPT-2, apart from everything that computes: reading it imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """Architecture of a GPT-2 language model, in the names of its `config.json`."""

    vocab_size: int = 50257
    """Tokens."""
    n_positions: int = 1024
    """Longest sequence in tokens: the context."""
    n_embd: int = 768
    """Width; a multiple of n_head."""
    n_layer: int = 12
    """Blocks."""
    n_head: int = 12
    """Attention heads per block."""
    layer_norm_epsilon: float = 1e-5
    """Added to the variance in every layer norm."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            size = getattr(self, name)
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be at least 1, got {size!r}")
        if not isinstance(self.layer_norm_epsilon, int | float) or not self.layer_norm_epsilon > 0:
            raise ValueError(f"layer_norm_epsilon must be above 0, got {self.layer_norm_epsilon!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd must be a multiple of n_head ({self.n_head}), got {self.n_embd}")


PRESETS: dict[str, GPT2Config] = {
    "tiny": GPT2Config(vocab_size=512, n_positions=64, n_embd=64, n_layer=2, n_head=2),
    "small": GPT2Config(vocab_size=1024, n_positions=128, n_embd=128, n_layer=4, n_head=4),
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "gpt2-large": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "gpt2-xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
}
"""Named shapes: two for a laptop, and the four that OpenAI released (Radford et al. 2019, table 2)."""
