"""Model folders: transformers and we load what the other saved, to the same numbers; anything damaged is refused."""

import dataclasses
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf import random
from rlhf.errors import UserError
from rlhf.io.manifest import read_manifest, write_manifest
from rlhf.io.model_config import is_reward_model
from rlhf.io.model_folder import (
    LanguageModel,
    RewardModel,
    RewardStatistics,
    load_language_model,
    load_reward_model,
    load_shape,
    save_language_model,
    save_reward_model,
)
from rlhf.io.tokenizer import Tokenizer
from rlhf.models import gpt2
from rlhf.models.forward import forward
from rlhf.models.gpt2_config import GPT2Config
from rlhf.models.heads import apply_head, init_reward_head
from rlhf.tree import named_leaves, tree_map_named


@pytest.fixture(scope="module")
def config(tokenizer) -> GPT2Config:
    return GPT2Config(vocab_size=tokenizer.vocab_size, n_positions=32, n_embd=16, n_layer=2, n_head=2)


@pytest.fixture(scope="module")
def model(config, tokenizer) -> LanguageModel:
    blank = gpt2.init(config, key=random.key(1))
    names = {name: number for number, name in enumerate(named_leaves(blank))}

    def disturb(name: str, leaf: Tensor) -> Tensor:
        return leaf + 0.2 * random.normal(random.fold_in(random.key(2), names[name]), tuple(leaf.shape))

    return LanguageModel(tree_map_named(disturb, blank), config, tokenizer)


@pytest.fixture(scope="module")
def reward_model(model) -> RewardModel:
    head = init_reward_head(model.config.n_embd, key=random.key(3))
    params = {"trunk": model.params, "head": head}
    return RewardModel(params, model.config, model.tokenizer, RewardStatistics(0.25, 1.5, 17))


@pytest.fixture(scope="module")
def saved(tmp_path_factory, model, reward_model) -> Path:
    """lm/ and rm/, not to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    save_language_model(folder / "lm", model, facts={"stage": "sft", "seed": 3})
    save_reward_model(folder / "rm", reward_model, facts={"stage": "reward"})
    return folder


@pytest.fixture(scope="module")
def tokens(config) -> Tensor:
    return (random.uniform(random.key(5), (3, 20)) * config.vocab_size).long()


def quietly(make: Callable[[], Any]) -> Any:
    """What a transformers call returns; the random weights that it draws first do not move the global generator."""
    with torch.random.fork_rng():
        return make()


def assert_same_params(found: Any, expected: Any) -> None:
    found, expected = named_leaves(found), named_leaves(expected)
    assert list(found) == list(expected)
    for name, leaf in expected.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], leaf), name


def test_a_language_model_comes_back_bit_for_bit(saved, model):
    found = load_language_model(saved / "lm")
    assert_same_params(found.params, model.params)
    assert found.config == model.config
    assert found.tokenizer.fingerprint == model.tokenizer.fingerprint
    assert read_manifest(saved / "lm")["stage"] == "sft"


def test_a_reward_model_comes_back_bit_for_bit(saved, reward_model):
    found = load_reward_model(saved / "rm")
    assert_same_params(found.params, reward_model.params)
    assert found.config == reward_model.config
    assert found.statistics == reward_model.statistics
    assert found.tokenizer.fingerprint == reward_model.tokenizer.fingerprint


def test_is_reward_model_tells_them_apart(saved):
    assert is_reward_model(saved / "rm")
    assert not is_reward_model(saved / "lm")


def test_transformers_computes_the_same_logits(saved, model, tokens):
    import transformers  # here, because it takes seconds that most tests need not wait

    theirs = quietly(lambda: transformers.AutoModelForCausalLM.from_pretrained(saved / "lm")).eval()
    assert type(theirs).__name__ == "GPT2LMHeadModel"
    logits = forward(model.params, tokens, config=model.config)
    assert logits.abs().max() > 1
    torch.testing.assert_close(theirs(tokens).logits, logits, rtol=0, atol=1e-4)
    assert theirs.config.eos_token_id == model.tokenizer.eos_id


def test_transformers_generates_what_we_would(saved, model):
    import transformers  # here, because it takes seconds that most tests need not wait

    theirs = quietly(lambda: transformers.AutoModelForCausalLM.from_pretrained(saved / "lm")).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved / "lm")
    prompt = tokenizer("the quick", return_tensors="pt")
    made = theirs.generate(**prompt, max_new_tokens=6, do_sample=False)[0].tolist()
    ours = prompt["input_ids"][0].tolist()
    while len(ours) < len(made):
        logits = forward(model.params, torch.tensor([ours]), config=model.config)
        ours.append(int(logits[0, -1].argmax()))
    assert made == ours


@pytest.mark.parametrize("auto", ["AutoModelForSequenceClassification", "GPT2ForSequenceClassification"])
def test_transformers_computes_the_same_scores(saved, reward_model, auto):
    """A right-padded batch of sequences that end in end-of-text: the score is taken there, not at the padding."""
    import transformers  # here, because it takes seconds that most tests need not wait

    theirs = quietly(lambda: getattr(transformers, auto).from_pretrained(saved / "rm")).eval()
    tokenizer = reward_model.tokenizer
    texts = ["a", "the quick brown fox", "", "pack my box with five dozen"]
    sequences = [[*tokens, tokenizer.eos_id] for tokens in tokenizer.encode(texts)]
    padded = torch.full((len(sequences), max(map(len, sequences))), theirs.config.pad_token_id)
    for row, sequence in enumerate(sequences):
        padded[row, : len(sequence)] = torch.tensor(sequence)
    scores = theirs(padded, attention_mask=padded != theirs.config.pad_token_id).logits
    assert scores.shape == (len(sequences), 1)
    ours = []
    for sequence in sequences:
        hidden = gpt2.hidden_states(reward_model.params["trunk"], torch.tensor([sequence]), config=reward_model.config)
        ours.append(apply_head(reward_model.params["head"], hidden)[0, -1])
    torch.testing.assert_close(scores[:, 0], torch.stack(ours), rtol=0, atol=1e-4)
    assert len({round(float(score), 3) for score in ours}) == len(ours)


def their_model(kind: str, config: GPT2Config, **options: Any) -> Any:
    import transformers  # here, because it takes seconds that most tests need not wait

    shape = {name: getattr(config, name) for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
    shape |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    return quietly(lambda: getattr(transformers, kind)(transformers.GPT2Config(**shape, **options))).eval()


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_we_load_a_language_model_that_transformers_saved(tmp_path, config, tokenizer, tokens, dtype, shards):
    theirs = their_model("GPT2LMHeadModel", config).to(dtype)
    theirs.save_pretrained(tmp_path, **({"max_shard_size": "10KB"} if shards else {}))
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 if not shards else len(list(tmp_path.glob("*-of-*"))) > 2
    tokenizer.save(tmp_path)
    ours = load_language_model(tmp_path)
    assert ours.config == config
    assert {leaf.dtype for leaf in named_leaves(ours.params).values()} == {torch.float32}
    logits = forward(ours.params, tokens, config=config)
    torch.testing.assert_close(theirs.float()(tokens).logits, logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_we_load_a_reward_model_that_transformers_saved(tmp_path, config, tokenizer, tokens, dtype):
    theirs = their_model("GPT2ForSequenceClassification", config, num_labels=1).to(dtype)
    theirs.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    ours = load_reward_model(tmp_path)
    assert ours.statistics == RewardStatistics(0.0, 1.0, 0)
    real = tokens.clamp(min=2)  # no padding among them
    hidden = gpt2.hidden_states(ours.params["trunk"], real, config=config)
    scores = theirs.float()(real).logits[:, 0]
    torch.testing.assert_close(apply_head(ours.params["head"], hidden)[:, -1], scores, rtol=0, atol=1e-4)


def test_a_base_model_is_read_as_a_language_model(tmp_path, config, tokenizer, tokens):
    import transformers  # here, because it takes seconds that most tests need not wait

    their_model("GPT2Model", config).save_pretrained(tmp_path / "start")
    tokenizer.save(tmp_path / "start")
    ours = load_language_model(tmp_path / "start")
    theirs = quietly(lambda: transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "start")).eval()
    logits = forward(ours.params, tokens, config=config)
    torch.testing.assert_close(theirs(tokens).logits, logits, rtol=0, atol=1e-4)
    save_language_model(tmp_path / "lm", ours, facts={})
    assert json.loads((tmp_path / "lm" / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]
    with pytest.raises(UserError, match="holds a GPT2Model, expected a GPT2ForSequenceClassification"):
        load_reward_model(tmp_path / "start")


def test_two_labels_are_refused(tmp_path, config, tokenizer):
    their_model("GPT2ForSequenceClassification", config, num_labels=2).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    with pytest.raises(UserError, match=r"score\.weight of shape \(2, 16\), expected shape \(1, 16\): .* one label"):
        load_reward_model(tmp_path)


def test_a_value_head_and_a_critic_are_saved_beside_the_model(tmp_path, model, reward_model):
    head = {"weight": torch.arange(16.0)[None], "bias": torch.tensor([2.0])}
    critic = reward_model._replace(params={"trunk": model.params, "head": head})
    save_language_model(tmp_path / "policy", model, facts={}, value_head=head, critic=critic)
    beside = load_file(tmp_path / "policy" / "value_head.safetensors")
    assert torch.equal(beside["weight"], head["weight"])
    assert torch.equal(beside["bias"], head["bias"])
    listed = read_manifest(tmp_path / "policy")["files"]
    assert {"value_head.safetensors", "critic/model.safetensors", "critic/config.json"} <= set(listed)
    found = load_reward_model(tmp_path / "policy" / "critic")
    assert_same_params(found.params["trunk"], model.params)
    assert torch.equal(found.params["head"]["weight"], head["weight"])
    assert torch.equal(load_file(tmp_path / "policy" / "critic" / "value_head.safetensors")["bias"], head["bias"])
    assert_same_params(load_language_model(tmp_path / "policy").params, model.params)


def test_saving_replaces_the_whole_folder(tmp_path, model, reward_model):
    target = tmp_path / "model"
    save_reward_model(target, reward_model, facts={})
    (target / "stale.txt").write_text("x")
    write_manifest(target, {})
    save_language_model(target, model, facts={"again": True})
    assert not (target / "stale.txt").exists()
    assert not (target / "reward_statistics.json").exists()
    assert read_manifest(target)["again"] is True
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002], ids=oct)
def test_what_is_saved_follows_the_umask(tmp_path, model, reward_model, mask):
    before = os.umask(mask)
    try:
        head = {"weight": torch.zeros(1, 16), "bias": torch.zeros(1)}
        critic = reward_model._replace(params={"trunk": model.params, "head": head})
        save_language_model(tmp_path / "lm", model, facts={}, value_head=head, critic=critic)
        save_reward_model(tmp_path / "rm", reward_model, facts={})
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    wrong = {
        str(path): oct(mode) for path, mode in modes.items() if mode != (0o777 if path.is_dir() else 0o666) & ~mask
    }
    assert wrong == {}


def configured(**changes: Any) -> Callable[[Path], None]:
    """A change of config.json; a value of `...` removes the key."""

    def change(folder: Path) -> None:
        settings = json.loads((folder / "config.json").read_text()) | changes
        kept = {key: value for key, value in settings.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(kept))

    return change


def weighted(name: str, change: Callable[[Tensor], Tensor] | None) -> Callable[[Path], None]:
    """A change of one tensor; None removes it."""

    def apply(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        old = state.pop(name)
        if change is not None:
            state[name] = change(old)
        save_file(state, folder / "model.safetensors")

    return apply


def added(prefix: str = "", **tensors: Tensor) -> Callable[[Path], None]:
    """Another prefix of all names, and more tensors."""

    def apply(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        extra = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
        save_file({prefix + name: leaf for name, leaf in state.items()} | extra, folder / "model.safetensors")

    return apply


def bare(source: Path, target: Path) -> Path:
    """A copy without a manifest, as somebody else may have saved it."""
    shutil.copytree(source, target)
    (target / "manifest.json").unlink()
    return target


def written(name: str, content: str | bytes | None) -> Callable[[Path], None]:
    """Another content of a file; None removes it."""

    def apply(folder: Path) -> None:
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return apply


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def both(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: [change(folder) for change in changes]


def index_only(content: str) -> Callable[[Path], None]:
    return both(written("model.safetensors", None), written("model.safetensors.index.json", content))


def larger_tokenizer(folder: Path) -> None:
    Tokenizer.train([f"many words {number}" for number in range(500)], 500).save(folder)


WTE, SCORE = "transformer.wte.weight", "score.weight"
# kind of folder, change (its manifest is removed first), pieces of the message
REFUSED: dict[str, tuple[str, Callable[[Path], Any], list[str]]] = {
    "no config": ("lm", written("config.json", None), ["config.json: no such file", "not a model folder"]),
    "config cut off": ("lm", cut("config.json", 40), ["config.json: cannot be read"]),
    "config is a list": ("lm", written("config.json", "[]"), ["config.json", "not a JSON object"]),
    "config not UTF-8": ("lm", written("config.json", b'{"\xff": 1}'), ["config.json: cannot be read"]),
    "no weights": ("lm", written("model.safetensors", None), ["model.safetensors: no such file", "safetensors alone"]),
    "no tokenizer": ("lm", written("tokenizer.json", None), ["has neither tokenizer.json nor"]),
    "another family": ("lm", configured(model_type="mamba"), ["model_type is 'mamba'", "expected one of gpt2"]),
    "no layers": (
        "lm",
        configured(architectures=["GPT2DoubleHeadsModel"]),
        ["GPT2DoubleHeadsModel", "GPT2LMHeadModel"],
    ),
    "a reward model": ("rm as lm", configured(), ["holds a GPT2ForSequenceClassification", "GPT2LMHeadModel"]),
    "a language model": ("lm as rm", configured(), ["holds a GPT2LMHeadModel", "GPT2ForSequenceClassification"]),
    "relu": ("lm", configured(activation_function="relu"), ["activation_function is 'relu'", "'gelu_new'"]),
    "exact gelu": ("lm", configured(activation_function="gelu"), ["activation_function is 'gelu'", "'gelu_new'"]),
    "scaled by layer": ("lm", configured(scale_attn_by_inverse_layer_idx=True), ["scale_attn_by_inverse_layer_idx"]),
    "unscaled": ("lm", configured(scale_attn_weights=False), ["scale_attn_weights is False"]),
    "cross attention": ("lm", configured(add_cross_attention=True), ["add_cross_attention is True"]),
    "untied": ("lm", configured(tie_word_embeddings=False), ["tie_word_embeddings is False"]),
    "wide MLP": ("lm", configured(n_inner=32), ["n_inner is 32", "expected 64"]),
    "heads do not divide": ("lm", configured(n_head=3), ["config.json", "n_embd must be a multiple of n_head"]),
    "n_layer is 0": ("lm", configured(n_layer=0), ["config.json", "n_layer must be at least 1"]),
    "n_layer is null": ("lm", configured(n_layer=None), ["config.json", "n_layer"]),
    "n_layer is a text": ("lm", configured(n_layer="2"), ["config.json", "n_layer"]),
    "n_layer is a fraction": ("lm", configured(n_layer=1.5), ["config.json", "n_layer"]),
    "epsilon is a text": ("lm", configured(layer_norm_epsilon="1e-5"), ["config.json", "layer_norm_epsilon"]),
    "epsilon is negative": ("lm", configured(layer_norm_epsilon=-1.0), ["config.json", "layer_norm_epsilon"]),
    "no shape": ("lm", configured(n_embd=..., n_head=...), ["does not match config.json"]),
    "more layers": ("lm", configured(n_layer=3), ["h.2.", "missing"]),
    "longer context": ("lm", configured(n_positions=64), ["wpe.weight", "(32, 16)", "(64, 16)"]),
    "other vocabulary": ("lm", configured(vocab_size=77), ["wte.weight", "(77, 16)"]),
    "tensor missing": ("lm", weighted("transformer.h.1.mlp.c_fc.bias", None), ["h.1.mlp.c_fc.bias", "missing"]),
    "tensor transposed": (
        "lm",
        weighted("transformer.wpe.weight", lambda t: t.T.contiguous()),
        ["wpe.weight", "(16, 32)"],
    ),
    "tensor of another model": ("lm", weighted(WTE, lambda t: t[:5].clone()), ["wte.weight", "(5, 16)"]),
    "whole numbers": ("lm", weighted(WTE, lambda t: t.long()), ["wte.weight"]),
    "NaN": ("lm", weighted(WTE, lambda t: t * float("nan")), ["wte.weight", "not finite"]),
    "one infinity": (
        "lm",
        weighted("transformer.ln_f.bias", lambda t: t.index_fill(0, torch.tensor([3]), torch.inf)),
        ["ln_f.bias"],
    ),
    "NaN in the score": ("rm", weighted(SCORE, lambda t: t * float("nan")), ["score.weight", "not finite"]),
    "NaN below the score": ("rm", weighted(WTE, lambda t: t * float("nan")), ["wte.weight", "not finite"]),
    "no score": ("rm", weighted(SCORE, None), ["no score.weight", "one label"]),
    "wide score": ("rm", weighted(SCORE, lambda t: torch.ones(1, 32)), ["score.weight", "(1, 32)", "(1, 16)"]),
    "weights empty": ("lm", written("model.safetensors", b""), ["model.safetensors: cannot be read", "cut off"]),
    "weights cut in the header": (
        "lm",
        cut("model.safetensors", 100),
        ["model.safetensors: cannot be read", "cut off"],
    ),
    "weights cut in the data": ("lm", cut("model.safetensors", -1), ["model.safetensors: cannot be read", "cut off"]),
    "weights are a pickle": (
        "lm",
        written("model.safetensors", pickle.dumps({"a": 1})),
        ["model.safetensors: cannot be"],
    ),
    "index not JSON": ("lm", index_only("{"), ["model.safetensors.index.json"]),
    "index is a list": ("lm", index_only("[]"), ["model.safetensors.index.json"]),
    "index without map": ("lm", index_only("{}"), ["model.safetensors.index.json"]),
    "index with a list": ("lm", index_only('{"weight_map": []}'), ["model.safetensors.index.json"]),
    "index with a number": ("lm", index_only('{"weight_map": {"a": 1}}'), ["model.safetensors.index.json"]),
    "shard missing": ("lm", index_only('{"weight_map": {"a": "x.safetensors"}}'), ["x.safetensors: cannot be read"]),
    "statistics cut off": ("rm", cut("reward_statistics.json", 5), ["reward_statistics.json: cannot be read"]),
    "statistics are a list": ("rm", written("reward_statistics.json", "[]"), ["reward_statistics.json: cannot"]),
    "statistics misspelt": (
        "rm",
        written("reward_statistics.json", '{"mean": 0, "sdt": 1, "completions": 3}'),
        ["reward_statistics.json: cannot be read"],
    ),
    "std 0": (
        "rm",
        written("reward_statistics.json", '{"mean": 0, "std": 0, "completions": 3}'),
        ["reward_statistics", "std"],
    ),
    "std NaN": (
        "rm",
        written("reward_statistics.json", '{"mean": 0, "std": NaN, "completions": 3}'),
        ["reward_statistics"],
    ),
    "mean null": (
        "rm",
        written("reward_statistics.json", '{"mean": null, "std": 1, "completions": 3}'),
        ["reward_statistics"],
    ),
    "mean a text": (
        "rm",
        written("reward_statistics.json", '{"mean": "0", "std": 1, "completions": 3}'),
        ["reward_statistics"],
    ),
    "another output layer": ("lm", added(lm_head__weight=torch.ones(300, 16)), ["lm_head.weight differs", "tie_word"]),
    "a small output layer": ("lm", added(lm_head__weight=torch.ones(2, 16)), ["lm_head.weight differs"]),
    "a bias on the logits": ("lm", added(lm_head__bias=torch.ones(300)), ["lm_head.bias is not 0"]),
    "tensor unknown": ("lm", added(extra__weight=torch.ones(2)), ["extra.weight is in no gpt2"]),
    "torch.compile": ("lm", added("_orig_mod."), ["begin with '_orig_mod.'", "torch.compile", "removeprefix"]),
    "DDP": ("lm", added("module."), ["begin with 'module.'", "DataParallel", "removeprefix"]),
    "PEFT": ("lm", added("base_model.model."), ["begin with 'base_model.model.'", "PEFT"]),
    "trlX": ("rm", added("base_model."), ["begin with 'base_model.'", "trlX"]),
    "FSDP of a compiled model": ("lm", added("_fsdp_wrapped_module._orig_mod."), ["'_fsdp_wrapped_module._orig_mod.'"]),
    "LoRA": ("lm", added(transformer__h__0__lora_A__weight=torch.ones(2)), ["LoRA", "merge_and_unload"]),
    "architectures a text": ("lm", configured(architectures="GPT2LMHeadModel"), ["architectures must be a list"]),
    "generation config cut off": ("lm", written("generation_config.json", "{"), ["generation_config.json: cannot"]),
    "generation config a list": ("lm", written("generation_config.json", "[]"), ["generation_config.json: is not"]),
    "end of text a word": ("lm", configured(eos_token_id="0"), ["config.json: eos_token_id must be a token id"]),
    "pointers of Git LFS": (
        "lm",
        written("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"),
        ["model.safetensors: is a pointer of Git LFS", "git lfs pull"],
    ),
    "tokenizer a pointer": (
        "lm",
        written("tokenizer.json", "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"),
        ["tokenizer.json: is a pointer of Git LFS", "git lfs pull"],
    ),
    "more tokens than embeddings": ("lm", larger_tokenizer, ["vocab"]),
}


DEEP = [
    "longer context", "other vocabulary", "tensor transposed", "tensor of another model", "whole numbers", "NaN",
    "one infinity", "no shape", "generation config cut off", "generation config a list",
]  # fmt: skip
"""What only a look at all weights shows."""


@pytest.mark.parametrize("wrong", REFUSED)
def test_a_damaged_or_foreign_folder_is_refused(tmp_path, saved, wrong):
    kind, change, pieces = REFUSED[wrong]
    folder = tmp_path / "model"
    shutil.copytree(saved / kind[:2], folder)
    (folder / "manifest.json").unlink()  # else its checksums tell
    change(folder)
    load = load_reward_model if kind.endswith("rm") else load_language_model
    with pytest.raises(UserError) as caught:
        load(folder)
    assert str(caught.value).startswith(str(folder))
    for piece in pieces:
        assert piece in str(caught.value)
    assert len(str(caught.value)) < 500
    if load is load_language_model and wrong not in DEEP:  # found out before any stage is trained
        with pytest.raises(UserError) as early:
            load_shape(folder)
        assert str(early.value) == str(caught.value)
    for function in ("from_hugging_face", "with_leaves", "load_file:"):  # names of functions tell a user nothing
        assert function not in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "reward_statistics.json"])
def test_one_flipped_bit_is_found_by_its_checksum(tmp_path, saved, name):
    folder = tmp_path / "model"
    shutil.copytree(saved / "rm", folder)
    content = bytearray((folder / name).read_bytes())
    content[-3] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_reward_model(folder)
    assert str(caught.value).startswith(str(folder / name))


def test_weights_cut_off_are_found_by_their_size(tmp_path, saved):
    folder = tmp_path / "model"
    shutil.copytree(saved / "lm", folder)
    cut("model.safetensors", -100)(folder)
    with pytest.raises(UserError, match=r"model\.safetensors: has \d+ bytes, expected \d+; the file is cut off"):
        load_language_model(folder)


def test_a_missing_folder_or_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for load in (load_language_model, load_reward_model, is_reward_model):
        for name, problem in (("missing", "no such folder"), ("file", "is a file and no folder")):
            with pytest.raises(UserError, match=f"{name}: {problem}; it should be a model folder"):
                load(tmp_path / name)


def test_a_config_with_a_byte_order_mark_is_read(saved, tmp_path):
    """As editors on Windows write it."""
    folder = tmp_path / "model"
    shutil.copytree(saved / "lm", folder)
    (folder / "manifest.json").unlink()
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + (folder / "config.json").read_bytes())
    assert load_language_model(folder).config == load_language_model(saved / "lm").config


def test_a_config_that_is_nested_too_deeply_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"config\.json: cannot be read as JSON"):
        load_language_model(tmp_path)


class Bomb:
    """Unpickling it leaves a mark."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def test_no_pickle_is_ever_read(tmp_path, saved, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    shutil.copytree(saved / "lm", folder)
    (folder / "model.safetensors").unlink()
    (folder / "manifest.json").unlink()
    for name in ("pytorch_model.bin", "model.pt"):
        (folder / name).write_bytes(pickle.dumps({"transformer.wte.weight": Bomb()}))
    with pytest.raises(
        UserError, match=r"model\.safetensors: no such file; .* pytorch_model\.bin, and pickles are not"
    ):
        load_language_model(folder)
    assert not (tmp_path / "unpickled").exists()


def test_a_folder_without_manifest_is_fine(tmp_path, saved, model):
    folder = tmp_path / "model"
    shutil.copytree(saved / "lm", folder)
    (folder / "manifest.json").unlink()
    assert_same_params(load_language_model(folder).params, model.params)


@pytest.mark.parametrize("kind", ["lm", "rm"])
def test_rows_beyond_the_tokenizer_are_left_out(tmp_path, kind, model, reward_model, tokens):
    """Log-probs are those of transformers' logits of the tokenizer's ids alone."""
    import transformers  # here, because it takes seconds that most tests need not wait

    size, folder = model.config.vocab_size, tmp_path / kind
    wider = dataclasses.replace(model.config, vocab_size=size + 20)
    rows = torch.cat([model.params["wte"]["weight"], torch.ones(20, wider.n_embd)])
    trunk = model.params | {"wte": {"weight": rows}}
    if kind == "lm":
        save_language_model(folder, model._replace(params=trunk, config=wider), facts={})
        ours = load_language_model(folder)
        theirs = quietly(lambda: transformers.AutoModelForCausalLM.from_pretrained(folder)).eval()
        expected = theirs(tokens).logits[..., :size].log_softmax(-1)
        logits = forward(ours.params, tokens, config=ours.config)
        assert logits.shape[-1] == size
        torch.testing.assert_close(logits.log_softmax(-1), expected, rtol=0, atol=1e-4)
        save_language_model(tmp_path / "again", ours, facts={})
        again = quietly(lambda: transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")).eval()
        torch.testing.assert_close(again(tokens).logits, logits, rtol=0, atol=1e-4)
    else:
        params = {"trunk": trunk, "head": reward_model.params["head"]}
        save_reward_model(folder, reward_model._replace(params=params, config=wider), facts={})
        ours = load_reward_model(folder)
        assert_same_params(ours.params, reward_model.params)
    assert ours.config == model.config
    assert kind == "rm" or load_shape(folder)[0] == model.config
    (note,) = ours.notes
    assert note.startswith(f"{folder}: the embedding has {size + 20} rows and the tokenizer {size} entries")


def test_a_vocabulary_as_large_as_the_tokenizer_needs_no_line(saved):
    assert load_language_model(saved / "lm").notes == load_reward_model(saved / "rm").notes == ()


@pytest.mark.parametrize("architectures", [None, [], ...], ids=["null", "empty", "absent"])
@pytest.mark.parametrize("kind", ["lm", "rm"])
def test_without_architectures_the_weights_tell_the_kind_of_model(tmp_path, saved, kind, architectures):
    folder = bare(saved / kind, tmp_path / "model")
    configured(architectures=architectures)(folder)
    load, wrong = (load_language_model, load_reward_model)[:: 1 if kind == "lm" else -1]
    assert is_reward_model(folder) == (kind == "rm")
    assert load(folder).config == load(saved / kind).config
    with pytest.raises(UserError, match="expected a GPT2"):
        wrong(folder)


def test_an_output_layer_that_equals_the_embedding_is_left_aside(tmp_path, saved, model):
    folder = bare(saved / "lm", tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    state |= {"lm_head.weight": state[WTE].clone(), "lm_head.bias": torch.zeros(len(state[WTE]))}
    save_file(state, folder / "model.safetensors")
    loaded = load_language_model(folder)
    assert_same_params(loaded.params, model.params)
    assert loaded.notes == ()


def test_an_output_layer_of_another_size_but_the_same_used_rows_is_left_aside(tmp_path, saved, model):
    folder = bare(saved / "lm", tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    save_file(state | {"lm_head.weight": torch.cat([state[WTE], torch.ones(3, 16)])}, folder / "model.safetensors")
    assert_same_params(load_language_model(folder).params, model.params)


def test_a_value_head_among_the_weights_is_told(tmp_path, saved, model):
    folder = bare(saved / "lm", tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    save_file(state | {"v_head.summary.weight": torch.zeros(1, 16)}, folder / "model.safetensors")
    loaded = load_language_model(folder)
    assert_same_params(loaded.params, model.params)
    assert loaded.notes == (f"{folder}: the weights have a value head (v_head.*), which is not read",)


def test_a_reward_model_that_pads_with_its_end_of_text_is_told(tmp_path, saved, tokens):
    """transformers reads its score one token earlier."""
    import transformers  # here, because it takes seconds that most tests need not wait

    folder = bare(saved / "rm", tmp_path / "model")
    (folder / "reward_statistics.json").unlink()
    configured(pad_token_id=0)(folder)
    ours = load_reward_model(folder)
    (note,) = ours.notes
    assert "transformers reads the score at the token before it" in note
    theirs = quietly(lambda: transformers.AutoModelForSequenceClassification.from_pretrained(folder)).eval()
    sequence = torch.cat([tokens[:1].clamp(min=2), torch.tensor([[0]])], dim=1)
    hidden = gpt2.hidden_states(ours.params["trunk"], sequence, config=ours.config)
    scores = apply_head(ours.params["head"], hidden)[0]
    torch.testing.assert_close(theirs(sequence).logits[0, 0], scores[-2], rtol=0, atol=1e-4)


def test_a_reward_folder_of_ours_without_its_manifest_is_told(tmp_path, saved):
    folder = bare(saved / "rm", tmp_path / "model")
    (note,) = load_reward_model(folder).notes
    assert note.startswith(f"{folder}: has no manifest.json")


def test_the_generation_config_is_saved_again_without_ids_that_are_gone(tmp_path, saved):
    folder = bare(saved / "lm", tmp_path / "model")
    settings = {"eos_token_id": [0, 5, 9999], "pad_token_id": 9999, "temperature": 0.7, "max_new_tokens": 9}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    save_language_model(tmp_path / "again", load_language_model(folder), facts={})
    kept = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert kept == settings | {"eos_token_id": [0, 5], "pad_token_id": None}


def test_what_is_written_out_though_it_is_the_default_is_fine(tmp_path, saved, model):
    folder = tmp_path / "model"
    shutil.copytree(saved / "lm", folder)
    (folder / "manifest.json").unlink()
    configured(n_inner=4 * model.config.n_embd, activation_function="gelu_pytorch_tanh")(folder)
    assert_same_params(load_language_model(folder).params, model.params)


@pytest.mark.parametrize("statistics", [(0.0, 1e-6, 2), (-3.5, 0.5, 1024), (1e6, 1e6, 0)], ids=str)
def test_any_sensible_statistics_come_back(tmp_path, reward_model, statistics):
    saved = reward_model._replace(statistics=RewardStatistics(*statistics))
    save_reward_model(tmp_path / "rm", saved, facts={})
    assert load_reward_model(tmp_path / "rm").statistics == saved.statistics


def test_defaults_of_older_transformers_configs_are_filled_in(tmp_path, saved, model):
    """The Hub's own gpt2 config has neither every flag nor an epsilon of another value."""
    folder = tmp_path / "model"
    shutil.copytree(saved / "lm", folder)
    (folder / "manifest.json").unlink()
    gone = ("scale_attn_weights", "tie_word_embeddings", "activation_function", "layer_norm_epsilon", "architectures")
    configured(**dict.fromkeys(gone, ...), n_ctx=32, n_inner=None)(folder)
    found = load_language_model(folder)
    assert found.config == model.config
    assert_same_params(found.params, model.params)


def test_buffers_and_the_tied_head_in_a_weights_file_are_left_aside(tmp_path, saved, model):
    folder = tmp_path / "model"
    shutil.copytree(saved / "lm", folder)
    (folder / "manifest.json").unlink()
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["transformer.wte.weight"].clone()
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
    state["transformer.h.1.attn.masked_bias"] = torch.tensor(-1e4)
    state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    save_file(state, folder / "model.safetensors")
    assert_same_params(load_language_model(folder).params, model.params)
