"""Every file of a tokenizer folder: present, absent, contradictory, damaged. AutoTokenizer is the oracle."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf import random
from rlhf.data.dataset import load_dataset
from rlhf.data.schema import DEMONSTRATIONS
from rlhf.errors import UserError
from rlhf.io.model_folder import LanguageModel, load_language_model, save_language_model
from rlhf.io.tokenizer import EOS, PAD, Tokenizer
from rlhf.models import gpt2
from rlhf.models.gpt2_config import PRESETS

TEXTS = ["the quick elephant", " elephant", "elephantelephant jumps", "<|im_end|>", "", "é ÿ"]
CLASS = {"whole": "PreTrainedTokenizerFast", "parts": "GPT2Tokenizer"}


def added(content: str, **flags: bool) -> dict[str, Any]:
    plain = {"lstrip": False, "rstrip": False, "normalized": True, "single_word": False, "special": False}
    return {"content": content} | plain | flags


@pytest.fixture(params=["whole", "parts"])
def folder(request, tmp_path, tokenizer) -> Path:
    """A folder with tokenizer.json, or with vocab.json and merges.txt, and settings that name the end of text."""
    target = tmp_path / request.param
    target.mkdir()
    tokenizer.save(target)
    if request.param == "parts":
        model = json.loads((target / "tokenizer.json").read_text())["model"]
        (target / "tokenizer.json").unlink()
        write(target, "vocab.json", model["vocab"])
        lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
        (target / "merges.txt").write_text("\n".join(lines) + "\n")
    write(target, "tokenizer_config.json", {"tokenizer_class": CLASS[request.param], "eos_token": EOS})
    return target


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(json.dumps(value))


def change(folder: Path, name: str, **settings: Any) -> None:
    path = folder / name
    write(folder, name, (json.loads(path.read_text()) if path.is_file() else {}) | settings)


def theirs(folder: Path) -> Any:
    import transformers  # here, because it takes seconds that most tests need not wait

    return transformers.AutoTokenizer.from_pretrained(folder)


def assert_encodes_as_transformers(folder: Path) -> Tokenizer:
    """Texts, end of text and size; special tokens stay text in both."""
    ours, oracle = Tokenizer.load(folder), theirs(folder)
    for text, ids in zip(TEXTS, ours.encode(TEXTS), strict=True):
        assert oracle(text, split_special_tokens=True)["input_ids"] == ids, text
        assert oracle.decode(ids) == ours.decode(ids), text
    assert (ours.eos_id, ours.vocab_size) == (oracle.eos_token_id, len(oracle))
    return ours


ADDED: dict[str, Callable[[Path, int], None]] = {
    "nothing": lambda folder, size: None,
    "added_tokens.json": lambda folder, size: write(folder, "added_tokens.json", {"elephant": size}),
    "two, in another order": lambda folder, size: write(
        folder, "added_tokens.json", {"elephant": size + 1, "jumps": size}
    ),
    "added_tokens_decoder": lambda folder, size: change(
        folder, "tokenizer_config.json", added_tokens_decoder={str(size): added("elephant")}
    ),
    "one with spaces": lambda folder, size: change(
        folder, "tokenizer_config.json", added_tokens_decoder={str(size): added("elephant", lstrip=True)}
    ),
    "special": lambda folder, size: change(
        folder, "tokenizer_config.json", added_tokens_decoder={str(size): added("<|im_end|>", special=True)}
    ),
    "end of text among them": lambda folder, size: change(
        folder, "tokenizer_config.json",
        added_tokens_decoder={str(size): added("<|im_end|>", special=True)}, eos_token="<|im_end|>",
    ),
    "padding by name": lambda folder, size: change(folder, "tokenizer_config.json", pad_token="[PAD]"),
    "more by name": lambda folder, size: change(
        folder, "tokenizer_config.json", additional_special_tokens=["<|im_end|>", "<|user|>"]
    ),
    "more in the map": lambda folder, size: write(
        folder, "special_tokens_map.json", {"pad_token": {"content": "[PAD]"}, "eos_token": EOS}
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ADDED)
def test_added_tokens_encode_as_in_transformers(folder, tokenizer, case):
    ADDED[case](folder, tokenizer.vocab_size)
    ours = assert_encodes_as_transformers(folder)
    assert ours.notes == ()
    if case in ("added_tokens.json", "added_tokens_decoder"):
        assert ours.encode(["elephant"]) == [[tokenizer.vocab_size]]
    if case == "end of text among them":
        assert (ours.eos, ours.stop_ids) == ("<|im_end|>", (tokenizer.vocab_size,))


@pytest.mark.parametrize("case", ["added_tokens.json", "special", "more by name"])
def test_a_folder_is_saved_again_as_it_was(folder, tokenizer, tmp_path, case):
    ADDED[case](folder, tokenizer.vocab_size)
    change(folder, "tokenizer_config.json", model_max_length=64, split_special_tokens=False, pad_token=EOS)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<|im_end|>{{ m.content }}{% endfor %}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    again = tmp_path / "again"
    again.mkdir()
    Tokenizer.load(folder).save(again)
    for path in folder.rglob("*.*"):
        assert (again / path.relative_to(folder)).read_bytes() == path.read_bytes(), path.name
    start, saved = theirs(folder), theirs(again)
    messages = [{"role": "user", "content": "the elephant"}]
    template = start.chat_template["default"]
    ids = start.apply_chat_template(messages, chat_template=template)["input_ids"]
    assert saved.apply_chat_template(messages, chat_template=saved.chat_template["default"])["input_ids"] == ids
    assert saved.model_max_length == 64
    assert Tokenizer.load(again).fingerprint == Tokenizer.load(folder).fingerprint


def test_beside_a_reward_model_the_end_of_text_is_not_the_padding(folder, tmp_path):
    """transformers reads a score at the last token that is no padding."""
    change(folder, "tokenizer_config.json", pad_token=EOS, model_max_length=64)
    write(folder, "special_tokens_map.json", {"pad_token": EOS, "eos_token": EOS})
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.pad_id not in (None, tokenizer.eos_id)
    tokenizer.save(tmp_path, pads_with_eos=False)
    assert theirs(tmp_path).pad_token is None
    assert theirs(tmp_path).model_max_length == 64


def test_padding_is_what_the_folder_names(folder, tokenizer):
    change(folder, "tokenizer_config.json", pad_token="[PAD]")
    assert Tokenizer.load(folder).pad_id == tokenizer.vocab_size


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "PreTrainedTokenizerFast"])
def test_a_space_in_front_is_added_as_in_transformers(folder, kind, prefix):
    if folder.name == "whole":
        change(folder, "tokenizer_config.json", tokenizer_class=kind, add_prefix_space=prefix)
    else:
        change(folder, "tokenizer_config.json", add_prefix_space=prefix)
    assert_encodes_as_transformers(folder)


END_OF_TEXT = [
    # tokenizer_config, special_tokens_map, config, generation_config (None: no such setting), then the ids that end
    (EOS, None, None, None, (0,)),
    (PAD, None, None, None, (1,)),
    (None, PAD, None, None, (1,)),
    (None, {"content": PAD}, None, None, (1,)),
    (None, None, 1, None, (1,)),
    (None, None, None, [1], (1,)),
    (None, None, None, None, (0,)),
    (EOS, EOS, 0, 0, (0,)),
    (EOS, PAD, None, None, (0, 1)),
    (EOS, None, 1, None, (0, 1)),
    (EOS, None, 1, [0, 1, 7], (0, 1, 7)),
    (None, PAD, 0, [7], (1, 0, 7)),
    (None, None, 7, 1, (7, 1)),
    (EOS, "</s>", None, None, (0,)),
    (EOS, None, 50256, [50256], (0,)),
    (None, None, 50256, None, (0,)),
]


@pytest.mark.parametrize(("settings", "special_map", "config", "generation", "ids"), END_OF_TEXT)
def test_the_end_of_text_goes_by_the_order_of_the_files(folder, settings, special_map, config, generation, ids):
    change(folder, "tokenizer_config.json", eos_token=settings)
    if special_map is not None:
        write(folder, "special_tokens_map.json", {"eos_token": special_map})
    if config is not None:
        write(folder, "config.json", {"model_type": "gpt2", "eos_token_id": config})
    if generation is not None:
        write(folder, "generation_config.json", {"eos_token_id": generation})
    loaded = Tokenizer.load(folder)
    assert (loaded.eos_id, loaded.stop_ids) == (ids[0], ids)
    assert len(loaded.notes) == (len(ids) > 1) + [config, generation].count(50256) + (generation == [50256])
    if len(ids) > 1:
        assert "names several end-of-text tokens" in loaded.notes[-1]
        assert f"end with {loaded.eos!r}" in loaded.notes[-1]


CONTRADICTORY: dict[str, tuple[Callable[[Path, int], None], str]] = {
    "another id": (
        lambda folder, size: write(folder, "added_tokens.json", {"elephant": size + 10}), "'elephant' the id"
    ),
    "id of another token": (
        lambda folder, size: write(folder, "added_tokens.json", {"elephant": 5}), "'elephant' the id"
    ),
    "another id in the settings": (
        lambda folder, size: change(
            folder, "tokenizer_config.json", added_tokens_decoder={str(size + 1): added("elephant")}
        ),
        "'elephant' the id",
    ),
    "no such end of text": (
        lambda folder, size: change(folder, "tokenizer_config.json", eos_token="</s>"), "no end-of-text token '</s>'"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTRADICTORY)
def test_files_that_contradict_each_other_are_refused(folder, tokenizer, case):
    contradict, piece = CONTRADICTORY[case]
    contradict(folder, tokenizer.vocab_size)
    with pytest.raises(UserError) as caught:
        Tokenizer.load(folder)
    assert str(caught.value).startswith(str(folder))
    assert piece in str(caught.value)


@pytest.mark.parametrize(
    "content", ['{"a', "[1]", '{"eos_token": 5}', b"\xff\xfe"], ids=["cut off", "a list", "a number", "bytes"]
)
@pytest.mark.parametrize(
    "name",
    ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json", "generation_config.json"],
)
def test_a_damaged_file_is_refused_by_its_name(folder, name, content):
    if name.endswith("config.json") and "tokenizer" not in name and isinstance(content, str):
        content = content.replace('"eos_token": 5', '"eos_token_id": "5"')
    if name == "added_tokens.json" and isinstance(content, str):
        content = content.replace("5", '"five"')
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError) as caught:
        Tokenizer.load(folder)
    assert str(caught.value).startswith(str(folder / name))


DAMAGED_SETTINGS = [
    {"added_tokens_decoder": []},
    {"added_tokens_decoder": {"300": "elephant"}},
    {"added_tokens_decoder": {"x": {"content": "elephant"}}},
    {"added_tokens_decoder": {"300": {"content": 5}}},
    {"added_tokens_decoder": {"300": {"text": "elephant"}}},
    {"additional_special_tokens": "elephant"},
    {"additional_special_tokens": [5]},
    {"pad_token": 5},
    {"add_prefix_space": "yes"},
]


@pytest.mark.parametrize("settings", DAMAGED_SETTINGS, ids=str)
def test_a_damaged_setting_is_refused_by_its_file(folder, settings):
    change(folder, "tokenizer_config.json", **settings)
    with pytest.raises(UserError) as caught:
        Tokenizer.load(folder)
    assert str(caught.value).startswith(str(folder / "tokenizer_config.json"))


def test_a_special_token_without_an_embedding_is_told_and_not_used(folder, tokenizer):
    change(folder, "tokenizer_config.json", pad_token="[PAD]", additional_special_tokens=["<|user|>"])
    size = tokenizer.vocab_size
    assert Tokenizer.load(folder).vocab_size == size + 2
    for rows, missing in ((size, "'[PAD]', '<|user|>'"), (size + 1, "'<|user|>'")):
        loaded = Tokenizer.load(folder, rows)
        assert loaded.vocab_size == rows
        assert loaded.notes == (f"{folder}: names {missing}, for which the model has no embedding; not used",)


def test_ids_without_a_token_are_told(tmp_path, tokenizer):
    vocabulary = {token: number for token, number in tokenizer._backend.get_vocab().items() if number != 40}
    write(tmp_path, "vocab.json", vocabulary)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    loaded = Tokenizer.load(tmp_path)
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded.notes == (f"{tmp_path}: 1 ids below {loaded.vocab_size} have no token, yet a model can draw them",)


FOREIGN = {
    "SentencePiece": ({"tokenizer.model": "\x0a"}, "has tokenizer.model and no tokenizer.json; convert it once"),
    "SentencePiece, T5's name": ({"spiece.model": "\x0a"}, "has spiece.model and no tokenizer.json; convert it once"),
    "tiktoken": ({"qwen.tiktoken": "IQ== 0"}, "has qwen.tiktoken and no tokenizer.json; convert it once"),
    "another byte-level BPE": (
        {"vocab.json": "{}", "merges.txt": "", "tokenizer_config.json": '{"tokenizer_class": "Qwen2Tokenizer"}'},
        "has the vocab.json of a Qwen2Tokenizer and no tokenizer.json; convert it once",
    ),
}
"""Tokenizers that transformers converts to tokenizer.json, and that would be read wrongly, or not at all."""


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_tokenizer_in_another_form_is_refused_with_its_conversion(kind, tmp_path):
    files, message = FOREIGN[kind]
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}: {message}")) as error:
        Tokenizer.load(tmp_path)
    assert f"AutoTokenizer as T; T.from_pretrained('{tmp_path}').save_pretrained('{tmp_path}')" in str(error.value)


@pytest.mark.parametrize("kind", [None, "GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast"])
def test_the_older_form_of_gpt2_is_read(kind, tmp_path, tokenizer):
    write(tmp_path, "vocab.json", tokenizer._backend.get_vocab())
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    write(tmp_path, "tokenizer_config.json", {"tokenizer_class": kind})
    assert Tokenizer.load(tmp_path).vocab_size == tokenizer.vocab_size


# ---- the token that begins every text


BEGINNINGS = {
    "none": (False, {}, False),
    "the post-processor's": (True, {}, True),
    "asked for in vain": (False, {"add_bos_token": True}, False),
    "declined in vain": (True, {"add_bos_token": False}, True),
}
"""Whether the post-processor adds it, the settings, and whether texts begin with it."""


@pytest.fixture
def beginning(tokenizer, tmp_path):
    """A folder as Llama's: `<|begin|>` is a token of its own."""

    def make(case):
        processed, settings, _ = BEGINNINGS[case]
        tokenizer.save(tmp_path)
        whole = json.loads((tmp_path / "tokenizer.json").read_text())
        number = tokenizer.vocab_size
        whole["added_tokens"].append(added("<|begin|>", special=True, normalized=False) | {"id": number})
        if processed:
            start, text = {"SpecialToken": {"id": "<|begin|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
            second = {"Sequence": {"id": "B", "type_id": 1}}
            token = {"<|begin|>": {"id": "<|begin|>", "ids": [number], "tokens": ["<|begin|>"]}}
            whole["post_processor"] = {
                "type": "TemplateProcessing", "single": [start, text], "pair": [start, text, second],
                "special_tokens": token,
            }  # fmt: skip
        write(tmp_path, "tokenizer.json", whole)
        names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "bos_token": "<|begin|>"}
        write(tmp_path, "tokenizer_config.json", names | settings)
        return tmp_path

    return make


@pytest.mark.parametrize("case", BEGINNINGS)
def test_prompts_begin_as_transformers_has_them(beginning, case):
    folder = beginning(case)
    ours, oracle = Tokenizer.load(folder), theirs(folder)
    assert (ours.bos_id is not None) == BEGINNINGS[case][2]
    for text, ids in zip(TEXTS, ours.encode(TEXTS), strict=True):
        expected = oracle(text, split_special_tokens=True)["input_ids"] or [ours.eos_id]
        assert ours.begin(ids) == expected, text
        assert ours.begin(ours.begin(ids)) == expected, "it begins a text once"
        for limit in range(2, 6):
            cut = ours.begin(ids, limit)
            assert len(cut) == min(limit, len(expected))
            assert cut == expected or (cut[:1] == expected[:1] or ours.bos_id is None)
            assert cut[1:] == expected[len(expected) - len(cut) + 1 :]
            if len(ids) > limit:
                assert ours.cut(ids, limit) == list(ids[-limit:]), "a template that does not begin so is left as it is"
            assert ours.cut(expected, limit) == cut


def test_records_begin_with_it_whole_and_cut_and_their_completions_do_not(beginning, tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    tokenizer = Tokenizer.load(beginning("the post-processor's"))
    write(folder, "data.json", [{"prompt": "the quick brown fox jumps over", "completion": " the lazy dog"}])
    dataset = load_dataset(folder / "data.json", DEMONSTRATIONS, tokenizer, folder)
    prompt, completion = tokenizer.encode(["the quick brown fox jumps over", " the lazy dog"])
    begin, end = [tokenizer.bos_id], [tokenizer.eos_id]
    (whole,) = dataset.sequences(0, 64)
    assert whole.tokens.tolist() == begin + prompt + completion + end
    room = len(completion) + 1 + 4
    assert dataset.sequences(0, room)[0].tokens.tolist() == begin + prompt[-3:] + completion + end
    assert dataset.prompt(0, 3).tolist() == begin + prompt[-2:]


def test_a_saved_model_names_it(beginning, tmp_path_factory):
    tokenizer = Tokenizer.load(beginning("the post-processor's"))
    config = dataclasses.replace(PRESETS["tiny"], vocab_size=tokenizer.vocab_size, n_layer=1)
    model = LanguageModel(gpt2.init(config, key=random.key(0)), config, tokenizer)
    folder = tmp_path_factory.mktemp("saved") / "lm"
    save_language_model(folder, model, facts={})
    assert json.loads((folder / "config.json").read_text())["bos_token_id"] == tokenizer.bos_id
    assert load_language_model(folder).tokenizer.bos_id == tokenizer.bos_id


def test_padding_is_a_special_token_where_nothing_else_is_free(tokenizer, tmp_path):
    """As in SmolLM2, whose padding token ends texts and whose vocabulary lacks the byte 0xFF."""
    tokenizer.save(tmp_path)
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = whole["model"]["vocab"]
    for old, new in (("<|pad|>", "<|unused|>"), ("ÿ", "@@")):
        vocabulary[new] = vocabulary.pop(old)
    whole["added_tokens"] = [
        entry | {"content": entry["content"].replace("pad", "unused")} for entry in whole["added_tokens"]
    ]
    write(tmp_path, "tokenizer.json", whole)
    write(tmp_path, "tokenizer_config.json", {"eos_token": EOS, "pad_token": EOS})
    assert Tokenizer.load(tmp_path).pad_id == vocabulary["<|unused|>"]
