"""Tokenizers: GPT-2's own against transformers, trained ones against themselves, and folders in both directions."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors

from rlhf.errors import UserError
from rlhf.io.tokenizer import EOS, PAD, Tokenizer

NASTY = [
    "",
    " ",
    "   leading and trailing   ",
    "\n\n\t \r\n",
    "Hello world",
    "don't we'll I'VE you're 'S 's",
    "x1234567890 3.14159 1,000,000",
    "naïve café 日本語 𝄞 🙂👨‍👩‍👧 العربية",
    "\u00a0\u2028\u2029\u200b\ufeff\u3000",
    "\x00\x01\x7f\x80\x9f",
    "a" * 300,
    "!?#$%&'()*+,-./:;<=>@[]^_`{|}~\\\"",
    "e\u0301 \u00e9 \uff21 \ufb01",
    "\ud7ff\ue000\uffff\U0010ffff",
    f"text {EOS} in{EOS}{EOS} the middle <|pad|> <|endoftext",
]
TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(NASTY)


@pytest.fixture(scope="module")
def gpt2(shared_data: Path) -> Tokenizer:
    return Tokenizer.load(shared_data / "gpt2_vocab")


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    tokenizer.save(tmp_path)
    return tmp_path


def test_gpt2_is_read_from_its_vocabulary_and_merges(gpt2):
    assert gpt2.encode(["Hello world"]) == [[15496, 995]]
    assert gpt2.vocab_size == 50257
    assert gpt2.eos == EOS
    assert gpt2.eos_id == 50256
    assert gpt2.decode([15496, 995, 50256]) == "Hello world"


def test_gpt2_encodes_as_transformers_does(gpt2, shared_data):
    import transformers  # here, because it takes seconds that most tests need not wait

    theirs = transformers.GPT2TokenizerFast.from_pretrained(shared_data / "gpt2_vocab")
    for text, tokens in zip(NASTY, gpt2.encode(NASTY), strict=True):
        assert tokens == theirs(text, split_special_tokens=True)["input_ids"], ascii(text)
        assert gpt2.decode(tokens) == text


def test_gpt2_saved_as_tokenizer_json_stays_the_same(gpt2, tmp_path):
    gpt2.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint == gpt2.fingerprint
    assert again.same_vocabulary(gpt2)
    assert again.encode(NASTY) == gpt2.encode(NASTY)
    assert (again.eos_id, again.pad_id) == (gpt2.eos_id, gpt2.pad_id)


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_any_text_comes_back(tokenizer, text):
    (tokens,) = tokenizer.encode([text])
    assert tokenizer.decode(tokens) == text
    assert all(0 <= token < tokenizer.vocab_size for token in tokens)


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_no_text_contains_a_control_token(tokenizer, text):
    (tokens,) = tokenizer.encode([text])
    assert tokenizer.eos_id not in tokens
    assert tokenizer.pad_id not in tokens


def test_no_text_contains_gpt2s_control_tokens(gpt2):
    everything = [token for tokens in gpt2.encode(NASTY) for token in tokens]
    assert gpt2.eos_id not in everything
    assert gpt2.pad_id is not None
    assert gpt2.pad_id != gpt2.eos_id  # a sequence may end in end-of-text and still have a last token
    assert gpt2.pad_id not in everything


def test_special_token_texts_are_not_the_special_tokens(tokenizer):
    assert tokenizer.encode([EOS]) != [[tokenizer.eos_id]]
    assert tokenizer.decode([tokenizer.eos_id]) == ""
    assert tokenizer.decode(tokenizer.encode([EOS])[0]) == EOS


def test_bytes_that_are_no_text_become_replacement_characters(tokenizer):
    (tokens,) = tokenizer.encode(["\U0010ffff"])
    assert "\ufffd" in tokenizer.decode(tokens[:-1])


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(TEXTS, max_size=6))
def test_encode_of_many_is_encode_of_each(tokenizer, texts):
    assert tokenizer.encode(texts) == [tokens for text in texts for tokens in tokenizer.encode([text])]


CORPUS = [f"sample {n} of the corpus, with words and numbers {n * n}\n" for n in range(200)] + NASTY


@pytest.mark.parametrize("size", [258, 259, 300, 400])
def test_train_gives_the_size_asked_for(size):
    trained = Tokenizer.train(CORPUS, size)
    assert trained.vocab_size == size
    assert (trained.eos_id, trained.pad_id) == (0, 1)
    assert sorted(trained._backend.get_vocab().values()) == list(range(size))


def test_train_on_little_text_gives_fewer_merges():
    trained = Tokenizer.train(["ab"], 1000)
    assert trained.vocab_size == 259  # 256 bytes, two special tokens, one merge
    assert trained.decode(trained.encode(["ab é"])[0]) == "ab é"
    assert Tokenizer.train([], 300).vocab_size == 258


def test_train_is_the_same_in_every_process(tmp_path):
    (tmp_path / "corpus.json").write_text(json.dumps(CORPUS))
    program = (
        "import json; from rlhf.io.tokenizer import Tokenizer; "
        "print(Tokenizer.train(json.load(open('corpus.json')), 420).fingerprint)"
    )
    fingerprints = {Tokenizer.train(CORPUS, 420).fingerprint}
    for seed, threads in (("1", "1"), ("2", "4")):
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
            env=os.environ | {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads},
        )
        fingerprints.add(done.stdout.strip())
    assert len(fingerprints) == 1


def test_train_takes_a_generator_and_depends_on_the_texts():
    assert Tokenizer.train(iter(CORPUS), 300).fingerprint == Tokenizer.train(CORPUS, 300).fingerprint
    assert Tokenizer.train(CORPUS, 300).fingerprint != Tokenizer.train(CORPUS[:40], 300).fingerprint
    assert Tokenizer.train(CORPUS, 300).fingerprint != Tokenizer.train(CORPUS, 301).fingerprint


def test_save_and_load_change_nothing(folder, tokenizer):
    again = Tokenizer.load(folder)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.same_vocabulary(tokenizer)
    assert (again.eos, again.eos_id, again.pad_id) == (tokenizer.eos, tokenizer.eos_id, tokenizer.pad_id)
    assert again.encode(NASTY) == tokenizer.encode(NASTY)


def test_transformers_encodes_what_we_saved_alike(folder, tokenizer):
    import transformers  # here, because it takes seconds that most tests need not wait

    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text, tokens in zip(NASTY, tokenizer.encode(NASTY), strict=True):
        assert theirs(text)["input_ids"] == tokens, ascii(text)
        assert theirs.decode(tokens) == text
    assert theirs.eos_token_id == tokenizer.eos_id
    assert theirs.pad_token_id == tokenizer.pad_id
    assert len(theirs) == tokenizer.vocab_size
    assert theirs.decode([tokenizer.eos_id, *tokenizer.encode(["x"])[0]], skip_special_tokens=True) == "x"


def test_we_load_what_transformers_saved(folder, tokenizer, tmp_path_factory):
    import transformers  # here, because it takes seconds that most tests need not wait

    other = tmp_path_factory.mktemp("theirs")
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(other)
    again = Tokenizer.load(other)
    assert again.same_vocabulary(tokenizer)
    assert again.eos_id == tokenizer.eos_id
    assert again.encode(NASTY) == tokenizer.encode(NASTY)


def test_padding_and_truncation_of_a_folder_are_switched_off(folder, tokenizer):
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.enable_padding(length=20)
    backend.enable_truncation(5)
    backend.save(str(folder / "tokenizer.json"))
    assert Tokenizer.load(folder).encode(["a long text here", ""]) == tokenizer.encode(["a long text here", ""])


def test_control_tokens_that_a_folder_would_add_are_left_out(folder, tokenizer):
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(single=f"{EOS} $A {EOS}", special_tokens=[(EOS, 0)])
    backend.save(str(folder / "tokenizer.json"))
    assert Tokenizer.load(folder).encode(["the fox", ""]) == tokenizer.encode(["the fox", ""])


@pytest.mark.parametrize("written", [PAD, {"content": PAD, "special": True}], ids=["text", "dict"])
def test_the_end_of_text_token_is_what_the_settings_say(folder, written):
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": written}))
    loaded = Tokenizer.load(folder)
    assert (loaded.eos, loaded.eos_id) == (PAD, 1)


@pytest.mark.parametrize("settings_text", [None, "{}", '{"eos_token": null}'])
def test_the_end_of_text_token_is_gpt2s_where_nothing_says_otherwise(folder, settings_text):
    (folder / "tokenizer_config.json").unlink()
    if settings_text is not None:
        (folder / "tokenizer_config.json").write_text(settings_text)
    assert Tokenizer.load(folder).eos == EOS


def test_fingerprint_and_vocabulary_tell_tokenizers_apart(tokenizer):
    words = models.BPE(tokenizer._backend.get_vocab(), [])
    backend = Backend(words)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([EOS, PAD])
    unmerged = Tokenizer(backend, EOS, "test")
    assert unmerged.same_vocabulary(tokenizer)
    assert unmerged.fingerprint != tokenizer.fingerprint
    other = Tokenizer.train(CORPUS, 300)
    assert not other.same_vocabulary(tokenizer)
    assert other.fingerprint != tokenizer.fingerprint


def test_a_tokenizer_without_end_of_text_is_refused():
    with pytest.raises(UserError, match=r"some/where: the tokenizer has no end-of-text token '<\|endoftext\|>'"):
        Tokenizer(Backend(models.BPE()), EOS, "some/where")


def test_a_long_run_of_one_character_does_not_hold_training_up():
    begun = time.monotonic()
    assert Tokenizer.train(["-" * 400_000], 300).vocab_size > 258
    assert time.monotonic() - begun < 10


def test_ids_with_holes_are_counted_to_the_highest():
    assert Tokenizer(Backend(models.BPE({EOS: 0, "a": 7}, [])), EOS, "x").vocab_size == 8


BROKEN = {
    "no files": ({"tokenizer.json": None}, "has neither tokenizer.json nor vocab.json and merges.txt"),
    "vocabulary without merges": ({"tokenizer.json": None, "vocab.json": "{}"}, "has neither"),
    "empty": ({"tokenizer.json": ""}, "cannot be read"),
    "not JSON": ({"tokenizer.json": '{"version": '}, "cannot be read"),
    "no model": ({"tokenizer.json": "{}"}, "cannot be read"),
    "a list": ({"tokenizer.json": "[]"}, "cannot be read"),
    "not UTF-8": ({"tokenizer.json": b"\xff\xfe"}, "cannot be read"),
    "vocabulary not JSON": ({"tokenizer.json": None, "vocab.json": "[", "merges.txt": "a b"}, "cannot be read"),
    "merges of unknown": ({"tokenizer.json": None, "vocab.json": '{"a": 0}', "merges.txt": "a b"}, "cannot be read"),
    "no end of text": ({"tokenizer.json": None, "vocab.json": '{"a": 0}', "merges.txt": ""}, "no end-of-text token"),
    "another end of text": ({"tokenizer_config.json": '{"eos_token": "</s>"}'}, "no end-of-text token '</s>'"),
    "settings not JSON": ({"tokenizer_config.json": "{"}, "tokenizer_config.json"),
    "settings not UTF-8": ({"tokenizer_config.json": b'{"a": "\xff"}'}, "tokenizer_config.json"),
    "settings are a list": ({"tokenizer_config.json": "[1]"}, "tokenizer_config.json"),
    "end of text is a number": ({"tokenizer_config.json": '{"eos_token": 5}'}, "eos_token"),
    "end of text is a list": ({"tokenizer_config.json": '{"eos_token": ["a"]}'}, "eos_token"),
    "end of text has no content": ({"tokenizer_config.json": '{"eos_token": {"id": 0}}'}, "eos_token"),
    "content is null": ({"tokenizer_config.json": '{"eos_token": {"content": null}}'}, "eos_token"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_folder_is_refused_by_name(folder, broken):
    files, piece = BROKEN[broken]
    for name, content in files.items():
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        Tokenizer.load(folder)
    assert str(caught.value).startswith(str(folder))
    assert piece in str(caught.value)


def test_training_hears_a_signal_at_once_and_passes_on_what_the_texts_raise(monkeypatch):
    def native(backend, texts, trainer):
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000)  # as long as it runs, no handler does

    def interrupt(number, frame):
        raise KeyboardInterrupt

    def texts():
        yield "a"
        raise UserError("the file is cut off")

    with pytest.raises(UserError, match="the file is cut off"):
        Tokenizer.train(texts(), 300)
    monkeypatch.setattr("tokenizers.Tokenizer.train_from_iterator", native, raising=False)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        begun = time.process_time()
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            Tokenizer.train(["a"], 300)
        assert time.process_time() - begun < 0.3
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(("name", "problem"), [("missing", "no such folder"), ("file", "is a file and no folder")])
def test_a_missing_folder_is_refused(tmp_path, name, problem):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"{problem}; it should hold tokenizer\.json, or vocab\.json and merges\.txt"):
        Tokenizer.load(tmp_path / name)


def test_a_folder_where_tokenizer_json_is_a_folder_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(UserError, match="has neither"):
        Tokenizer.load(tmp_path)
