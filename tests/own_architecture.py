"""A throw-away architecture in one file: a gated bag of the tokens before, with a running sum as its state.

    gated_t = sigmoid(e_t W + b) * e_t,   hidden_t = tanh(sum of gated_s over s <= t / sqrt(t)) + e_t

over the tokens of t's own segment. Importing this module registers it, also in a worker that is sent a `BagShape`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from rlhf.models.architecture import Architecture, register
from rlhf.models.hugging_face import strip_prefix, take_leaves
from rlhf.models.layers import affine, dropout, unembed
from rlhf.ops import gather_rows
from rlhf.random import fold_in, normal
from rlhf.tree import cast, named_leaves, tree_map_named


@dataclass(frozen=True, kw_only=True)
class BagShape:
    model_type: ClassVar[str] = "gated_bag"
    vocab_size: int = 512
    n_positions: int = 64
    n_embd: int = 32
    n_layer: int = 1

    def __post_init__(self):
        if self.n_layer != 1:
            raise ValueError(f"n_layer must be 1, got {self.n_layer}")


def empty(config):
    def leaf(*shape):
        return torch.empty(shape, device="meta")

    width = config.n_embd
    return {
        "embedding": {"weight": leaf(config.vocab_size, width)},
        "gate": {"weight": leaf(width, width), "bias": leaf(width)},
        "output": {"weight": leaf(config.vocab_size, width)},
    }


def init(config, *, key):
    structure = empty(config)
    number = {name: index for index, name in enumerate(named_leaves(structure))}

    def leaf(name, like):
        return 0.3 * normal(fold_in(key, number[name]), tuple(like.shape)) if like.ndim > 1 else torch.zeros(like.shape)

    return tree_map_named(leaf, structure)


def gated(params, tokens):
    """Embeddings and what they add to the state, [B, T, D] each."""
    embedded = gather_rows(params["embedding"]["weight"], tokens).to(params["gate"]["weight"].dtype)
    return embedded, torch.sigmoid(affine(embedded, params["gate"])) * embedded


def state_to_hidden(total, count, embedded):
    return torch.tanh(total / count.to(total.dtype).sqrt()) + embedded


def hidden_states(
    params, tokens, *, config, positions=None, segments=None, bounds=None, dropout_rate=0.0, key=None,
    gradient_checkpointing=False,
):  # fmt: skip
    embedded, added = gated(params, tokens)
    length = tokens.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
    seen = seen.expand(len(tokens), -1, -1) if segments is None else seen & (segments[:, :, None] == segments[:, None])
    hidden = state_to_hidden(seen.to(added.dtype) @ added, seen.sum(-1, keepdim=True), embedded)
    return dropout(hidden, dropout_rate, key=key) if dropout_rate else hidden


def logits(params, hidden, *, config, padded=False):
    return unembed(hidden, params["output"], vocab_size=config.vocab_size, padded=padded)


def init_cache(params, batch_size, slots, *, config):
    return {"total": params["gate"]["weight"].new_zeros(batch_size, config.n_embd)}


def prefill(params, tokens, lengths, cache, *, config, rows=None, source=None):
    each = torch.arange(len(tokens), device=tokens.device)
    rows, source = each if rows is None else rows, each if source is None else source
    embedded, added = gated(params, tokens)
    real = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    total = torch.where(real[..., None], added, 0.0).sum(1)
    cache["total"][rows] = total[source]
    return state_to_hidden(total, lengths[:, None], embedded[each, lengths - 1])[source]


def decode(params, tokens, lengths, cache, *, config, cache_length):
    embedded, added = (x[:, 0] for x in gated(params, tokens[:, None]))
    cache["total"].add_(added)
    return state_to_hidden(cache["total"], lengths[:, None] + 1, embedded)


ARCHITECTURE = register(
    Architecture(
        shape=BagShape,
        presets={"tiny": BagShape()},
        init=init,
        empty=empty,
        hidden_states=hidden_states,
        logits=logits,
        unembedding=lambda params: {"output": params["output"]},
        cast_for_compute=cast,
        prepare_for_decoding=cast,
        init_cache=init_cache,
        prefill=prefill,
        decode=decode,
        select_vocab=lambda params, rows: (
            params | {name: {"weight": params[name]["weight"][:rows].clone()} for name in ("embedding", "output")}
        ),
        to_hugging_face=lambda params: {f"bag.{name}": leaf for name, leaf in named_leaves(params).items()},
        from_hugging_face=lambda state, *, config: take_leaves(empty(config), strip_prefix(state, "bag.")),
        settings_to_shape=lambda settings: BagShape(
            **{name: settings[name] for name in ("vocab_size", "n_positions", "n_embd") if name in settings}
        ),
        shape_to_settings=lambda config: {
            name: getattr(config, name) for name in ("vocab_size", "n_positions", "n_embd")
        },
        causal_lm="GatedBagLMHeadModel",
        sequence_classifier="GatedBagForSequenceClassification",
        prefix="bag.",
        embedding="embedding.weight",
    )
)
