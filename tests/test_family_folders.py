"""Model folders of every family: transformers and we load what the other saved, to the same numbers."""

import dataclasses
import json

import pytest
import torch
from families import FAMILIES, SHAPES, disturbed
from families import hugging_face as in_transformers
from safetensors.torch import load_file

from rlhf import random
from rlhf.errors import UserError
from rlhf.io.model_folder import (
    LanguageModel,
    RewardModel,
    RewardStatistics,
    load_language_model,
    load_reward_model,
    load_shape,
    load_trunk,
    save_language_model,
    save_reward_model,
)
from rlhf.models.architecture import architecture_of
from rlhf.models.forward import forward
from rlhf.models.heads import apply_head, init_reward_head
from rlhf.tree import named_leaves

EACH = pytest.mark.parametrize("name", FAMILIES)


def tokens_of(tokenizer):
    return (random.uniform(random.key(3), (2, 12)) * tokenizer.vocab_size).long()


def model_of(name, tokenizer, rows=0):
    """A language model whose embedding has `rows` rows more than the tokenizer has entries."""
    config = dataclasses.replace(SHAPES[name], vocab_size=tokenizer.vocab_size + rows)
    return LanguageModel(disturbed(config), config, tokenizer)


def saved_by_transformers(folder, model, tokenizer, **options):
    """Save a model of transformers with the tokenizer's files."""
    model.save_pretrained(folder, **options)
    tokenizer.save(folder)
    return folder


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_loads_what_we_save(name, tokenizer, tmp_path):
    import transformers

    model, tokens = model_of(name, tokenizer), tokens_of(tokenizer)
    save_language_model(tmp_path / "lm", model, facts={})
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "lm", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        expected = theirs.eval()(tokens).logits
    torch.testing.assert_close(forward(model.params, tokens, config=model.config), expected, atol=1e-5, rtol=0)
    again = load_language_model(tmp_path / "lm")
    for leaf, saved in zip(named_leaves(model.params).values(), named_leaves(again.params).values(), strict=True):
        assert torch.equal(leaf, saved)


@pytest.mark.parametrize("form", ["whole", "shards", "bfloat16"])
@EACH
def test_we_load_what_transformers_saves(name, form, tokenizer, tmp_path):
    """With more rows than the tokenizer has entries, as embeddings are padded."""
    import transformers

    model, tokens = model_of(name, tokenizer, rows=5), tokens_of(tokenizer)
    theirs = in_transformers(model.params, model.config)
    if form == "bfloat16":
        theirs = theirs.bfloat16()
    options = {"max_shard_size": "20KB"} if form == "shards" else {}
    folder = saved_by_transformers(tmp_path / "lm", theirs, tokenizer, **options)
    assert (folder / "model.safetensors.index.json").is_file() == (form == "shards")
    found = load_language_model(folder)
    assert found.config.vocab_size == tokenizer.vocab_size
    assert load_shape(folder)[0] == found.config
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(tokens).logits[..., : tokenizer.vocab_size]
    torch.testing.assert_close(forward(found.params, tokens, config=found.config), expected, atol=1e-5, rtol=0)
    assert all(leaf.dtype == torch.float32 for leaf in named_leaves(found.params).values())


@EACH
def test_reward_models_go_to_transformers_and_back(name, tokenizer, tmp_path):
    """One that starts from a language model with an output layer of its own has none."""
    import transformers

    language_model = model_of(name, tokenizer)
    save_language_model(tmp_path / "lm", language_model, facts={})
    trunk = load_trunk(tmp_path / "lm")
    assert "lm_head" not in trunk.params
    head = init_reward_head(trunk.config.n_embd, key=random.key(3))
    model = RewardModel({"trunk": trunk.params, "head": head}, trunk.config, tokenizer, RewardStatistics(0.0, 1.0, 0))
    save_reward_model(tmp_path / "rm", model, facts={})
    kind = transformers.AutoModelForSequenceClassification
    theirs, report = kind.from_pretrained(tmp_path / "rm", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = tokens_of(tokenizer).clamp(min=2)  # without padding, at whose beginning transformers would read
    with torch.no_grad():
        expected = theirs.eval()(tokens).logits[:, 0]
    saved_by_transformers(tmp_path / "theirs", theirs, tokenizer)
    for folder in (tmp_path / "rm", tmp_path / "theirs"):
        found = load_reward_model(folder)
        decoder = architecture_of(found.config)
        hidden = decoder.hidden_states(found.params["trunk"], tokens, config=found.config)
        torch.testing.assert_close(apply_head(found.params["head"], hidden[:, -1]), expected, atol=1e-5, rtol=0)


@EACH
def test_a_critic_beside_the_policy_is_a_folder_of_its_family(name, tokenizer, tmp_path):
    model = model_of(name, tokenizer)
    save_language_model(tmp_path / "lm", model, facts={})
    trunk = load_trunk(tmp_path / "lm")
    head = {"weight": torch.ones(1, trunk.config.n_embd), "bias": torch.ones(1)}
    critic = RewardModel({"trunk": trunk.params, "head": head}, trunk.config, tokenizer, RewardStatistics(0.0, 1.0, 0))
    save_language_model(tmp_path / "policy", model, facts={}, critic=critic)
    found = load_reward_model(tmp_path / "policy" / "critic")
    assert found.config.model_type == model.config.model_type
    for leaf, saved in zip(
        named_leaves(trunk.params).values(), named_leaves(found.params["trunk"]).values(), strict=True
    ):
        assert torch.equal(leaf, saved)


def test_an_output_layer_of_its_own_is_saved_under_the_name_that_all_versions_read(tokenizer, tmp_path):
    save_language_model(tmp_path / "neox", model_of("gpt_neox", tokenizer), facts={})
    assert "embed_out.weight" in load_file(tmp_path / "neox" / "model.safetensors")
    save_language_model(tmp_path / "qwen", model_of("qwen2", tokenizer), facts={})
    assert "lm_head.weight" in load_file(tmp_path / "qwen" / "model.safetensors")


def test_an_output_layer_that_is_missing_is_named(tokenizer, tmp_path):
    tied = dataclasses.replace(model_of("qwen2", tokenizer).config, tie_word_embeddings=True)
    save_language_model(tmp_path / "lm", LanguageModel(disturbed(tied), tied, tokenizer), facts={})
    (tmp_path / "lm" / "manifest.json").unlink()
    change_settings(tmp_path / "lm", tie_word_embeddings=False)
    for load in (load_language_model, load_shape):
        with pytest.raises(UserError, match=r"does not match config.json \(lm_head.weight is missing\)"):
            load(tmp_path / "lm")


def change_settings(folder, **changes):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | changes))


REFUSED = {
    "code of its own": ({"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}, "auto_map is set: .* code of its own"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config is set: quantised weights are not read"),
    "another class": ({"architectures": ["MistralForCausalLM"]}, "holds a MistralForCausalLM, expected a GPT2LMHead"),
    "another type": ({"architectures": None, "model_type": "mamba"}, "model_type is 'mamba', expected one of gpt2"),
    "a window": ({"layer_types": ["sliding_attention"]}, "layer_types has 'sliding_attention'"),
    "RoPE": ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "rope_type is 'yarn', expected default"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_done_is_refused_before_weights_are_read(case, tokenizer, tmp_path):
    changes, message = REFUSED[case]
    save_language_model(tmp_path / "lm", model_of("llama", tokenizer), facts={})
    (tmp_path / "lm" / "manifest.json").unlink()
    (tmp_path / "lm" / "model.safetensors").write_bytes(b"not weights")
    change_settings(tmp_path / "lm", **changes)
    for load in (load_language_model, load_shape):
        with pytest.raises(UserError, match=message):
            load(tmp_path / "lm")
