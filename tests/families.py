"""Tiny shapes of every family, parameters away from their initial values, and the same models in transformers."""

import torch

from rlhf import random
from rlhf.models.architecture import architecture_of, model_types
from rlhf.models.gpt2_config import GPT2Config
from rlhf.models.gpt_neox_config import GPTNeoXConfig
from rlhf.models.llama_config import LlamaConfig, Qwen2Config, Qwen3Config
from rlhf.models.rope_config import RopeScaling
from rlhf.tree import named_leaves, tree_map_named

SIZES = {"vocab_size": 48, "n_positions": 64, "n_embd": 24, "n_layer": 2, "n_head": 6}
LLAMA3 = RopeScaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=32)
LINEAR = RopeScaling(rope_type="linear", factor=4.0)

SHAPES = {
    "gpt2": GPT2Config(**SIZES),
    "llama": LlamaConfig(**SIZES, n_kv_head=2),
    "llama, all options": LlamaConfig(
        **SIZES, n_kv_head=1, head_dim=8, n_inner=40, tie_word_embeddings=False, attention_bias=True, mlp_bias=True
    ),
    "llama 3": LlamaConfig(**SIZES, n_kv_head=6, rope_theta=1000.0, rope_scaling=LLAMA3),
    "llama, linear": LlamaConfig(**SIZES, n_kv_head=3, rope_scaling=LINEAR),
    "qwen2": Qwen2Config(**SIZES, n_kv_head=2, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**SIZES, n_kv_head=2, head_dim=8, attention_bias=True),
    "gpt_neox": GPTNeoXConfig(**SIZES, partial_rotary_factor=0.5),
    "gpt_neox, one after the other": GPTNeoXConfig(
        **SIZES, use_parallel_residual=False, tie_word_embeddings=True, rope_scaling=LINEAR, partial_rotary_factor=1.0
    ),
}
"""Every family, and its options."""
FAMILIES = {name: SHAPES[name] for name in model_types()}


def disturbed(config, seed=1, scale=0.2):
    """Random parameters with biases and norms away from 0 and 1, so that a dropped one shows."""
    blank = architecture_of(config).init(config, key=random.key(seed))
    number = {name: place for place, name in enumerate(named_leaves(blank))}

    def disturb(name, leaf):
        return leaf + scale * random.normal(random.fold_in(random.key(seed + 1), number[name]), tuple(leaf.shape))

    return tree_map_named(disturb, blank)


def hugging_face(params, config):
    """The same model in transformers, by its Auto classes."""
    import transformers  # here, because it takes seconds that most tests need not wait

    family = architecture_of(config)
    settings = family.shape_to_settings(config) | {"bos_token_id": 0, "eos_token_id": 0}
    with torch.random.fork_rng():  # a new transformers model draws random weights
        theirs = transformers.AutoConfig.for_model(config.model_type, **settings)
        model = transformers.AutoModelForCausalLM.from_config(theirs).eval()
    state = {name.replace("embed_out", "lm_head"): leaf for name, leaf in family.to_hugging_face(params).items()}
    missing, unknown = model.load_state_dict(state, strict=False)
    assert not unknown
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model
