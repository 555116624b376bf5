"""Data sets: tokenised once, cached by content, memory-mapped, and every column kept as it is."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers

from rlhf.data.dataset import Dataset, check_file, default_cache_dir, load_dataset, texts
from rlhf.data.schema import DEMONSTRATIONS, PREFERENCES, PROMPTS, Schema
from rlhf.errors import UserError
from rlhf.io.tokenizer import EOS, PAD, Tokenizer

SCHEMAS = {"demonstrations": DEMONSTRATIONS, "preferences": PREFERENCES, "prompts": PROMPTS}
RECORDS = {
    "demonstrations": [{"prompt": "the fox", "completion": " jumps"}, {"prompt": "é𝄞", "completion": "\n\t x "}],
    "preferences": [
        {"prompt": "the fox", "chosen": " jumps", "rejected": " sleeps"},
        {"prompt": "", "chosen": "日本", "rejected": "no"},
    ],
    "prompts": [{"prompt": "the fox", "answer": 42}, {"prompt": "the lazy dog", "answer": [1, {"é": None}]}],
}
KINDS = list(RECORDS)


class CountingTokenizer(Tokenizer):
    """Counts the texts that it encodes."""

    encoded = 0

    def encode(self, texts):
        self.encoded += len(texts)
        return super().encode(texts)


def counting(tokenizer: Tokenizer) -> CountingTokenizer:
    return CountingTokenizer(tokenizer._backend, tokenizer.eos, "test")


def written(folder: Path, records: list, name: str = "data.json", *, lines: bool = False) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text("\n".join(map(json.dumps, records)) if lines else json.dumps(records))
    return path


def loaded(tmp_path: Path, kind: str, tokenizer: Tokenizer, records: list | None = None, **options: bool) -> Dataset:
    path = written(tmp_path / "data", RECORDS[kind] if records is None else records, **options)
    return load_dataset(path, SCHEMAS[kind], tokenizer, tmp_path / "cache")


def content(dataset: Dataset) -> list:
    """All that a data set gives, as plain values."""
    everything = []
    for record in range(len(dataset)):
        sequences = [(s.tokens.tolist(), s.prompt) for s in dataset.sequences(record, 100)]
        columns = dataset.columns(record) if dataset.schema is PROMPTS else None
        everything.append((sequences, dataset.prompt(record, 100).tolist(), dataset.margin(record), columns))
    return everything


def cache_folders(cache: Path) -> list[Path]:
    return sorted((cache / "datasets").iterdir()) if (cache / "datasets").is_dir() else []


@pytest.mark.parametrize("lines", [False, True], ids=["list", "lines"])
def test_demonstrations_are_prompt_completion_and_end_of_text(tmp_path, tokenizer, lines):
    dataset = loaded(tmp_path, "demonstrations", tokenizer, lines=lines)
    assert len(dataset) == 2
    for record, fields in enumerate(RECORDS["demonstrations"]):
        prompt, completion = tokenizer.encode([fields["prompt"], fields["completion"]])
        (sequence,) = dataset.sequences(record, 100)
        assert sequence.tokens.dtype == np.int64
        assert sequence.tokens.tolist() == [*prompt, *completion, tokenizer.eos_id]
        assert sequence.prompt == len(prompt)


def test_preferences_are_two_sequences_behind_one_prompt(tmp_path, tokenizer):
    dataset = loaded(tmp_path, "preferences", tokenizer)
    fields = RECORDS["preferences"][0]
    prompt, chosen, rejected = tokenizer.encode([fields["prompt"], fields["chosen"], fields["rejected"]])
    for sequence, answer in zip(dataset.sequences(0, 100), (chosen, rejected), strict=True):
        assert sequence.tokens.tolist() == [*prompt, *answer, tokenizer.eos_id]
        assert sequence.prompt == len(prompt)


def test_prompts_keep_every_column_as_it_stands_in_the_file(tmp_path, tokenizer):
    records = [
        {"prompt": "a", "unicode": "é𝄞\u2028\x00\x7f\n", "nested": {"b": [1, 2.5, None, True, {"": []}]}},
        {"prompt": "b", "big": 2**70, "small": 1e-300, "surrogate": "\ud800", "é𝄞": "key"},
        {"prompt": "", "empty": "", "chosen": None},
        {"prompt": "plain"},
    ]
    dataset = loaded(tmp_path, "prompts", tokenizer, records)
    assert [dataset.columns(record) for record in (3, 0, 2, 1)] == [records[record] for record in (3, 0, 2, 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_prompt_becomes_the_end_of_text_token(tmp_path, tokenizer, kind):
    fields = RECORDS[kind][0] | {"prompt": ""}
    dataset = loaded(tmp_path, kind, tokenizer, [fields])
    assert dataset.prompt(0, 100).tolist() == [tokenizer.eos_id]
    for sequence in dataset.sequences(0, 100) if kind != "prompts" else []:
        assert sequence.prompt == 1
        assert sequence.tokens[0] == tokenizer.eos_id


def test_special_tokens_in_a_text_stay_text(tmp_path, tokenizer):
    text = f"say {EOS} or {PAD}{EOS}"
    records = [{"prompt": text, "completion": text}]
    ((sequence,),) = (loaded(tmp_path, "demonstrations", tokenizer, records).sequences(0, 1000),)
    body = sequence.tokens.tolist()[:-1]
    control = {tokenizer.eos_id, tokenizer._backend.token_to_id(PAD)}
    assert len(control) == 2
    assert not control & set(body)
    assert tokenizer.decode(body) == text + text
    assert sequence.tokens[-1] == tokenizer.eos_id


def test_margins_are_kept_and_default_to_zero(tmp_path, tokenizer):
    pair = RECORDS["preferences"][0]
    margins = [1.5, 0, -3, 1e-3]
    records = [pair | {"margin": margin} for margin in margins] + [pair]
    dataset = loaded(tmp_path, "preferences", tokenizer, records)
    assert [dataset.margin(record) for record in range(5)] == [*map(np.float32, margins), 0.0]


def test_the_keys_are_those_of_every_record_that_is_kept(tmp_path, tokenizer):
    kept, tie = {"prompt": "p", "chosen": "c", "rejected": "r"}, {"prompt": "p", "chosen": "c", "rejected": "c"}
    records = [kept, kept | {"margin": 1}, tie | {"source": "x"}, kept | {"author": "y"}]
    expected = ["author", "chosen", "margin", "prompt", "rejected"]
    for _ in range(2):  # the second time from the cache
        assert loaded(tmp_path, "preferences", tokenizer, records).keys == expected
    assert sorted(check_file(written(tmp_path / "data", records), SCHEMAS["preferences"])) == expected


def test_pairs_without_a_difference_are_dropped_and_counted(tmp_path, tokenizer):
    def pair(chosen: str, rejected: str) -> dict:
        return {"prompt": "p", "chosen": chosen, "rejected": rejected, "margin": len(chosen)}

    records = [pair("a", "a"), pair("bb", "c"), pair("d", "d"), pair("eee", "eee "), pair("f", "f")]
    dataset = loaded(tmp_path, "preferences", tokenizer, records)
    assert dataset.dropped == 3
    assert len(dataset) == 2
    assert [dataset.margin(record) for record in range(2)] == [2.0, 3.0]
    chosen = [tokenizer.decode(dataset.sequences(record, 9)[0].tokens[1:]) for record in range(2)]
    assert chosen == ["bb", "eee"]
    assert loaded(tmp_path, "preferences", tokenizer, records).dropped == 3  # from the cache too
    assert loaded(tmp_path, "preferences", tokenizer).dropped == 0


def test_only_pairs_without_a_difference_are_refused(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"data\.json: in every pair the chosen text equals the rejected one"):
        loaded(tmp_path, "preferences", tokenizer, [{"prompt": "p", "chosen": "a", "rejected": "a"}] * 3)
    assert cache_folders(tmp_path / "cache") == []


def test_arrays_are_memory_mapped(tmp_path, tokenizer):
    dataset = loaded(tmp_path, "prompts", tokenizer)
    for array in (dataset._tokens, dataset._offsets, dataset._prompts, dataset._margins, dataset._column_offsets):
        assert isinstance(array, np.memmap)
        assert not array.flags.writeable


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_tokenised_once(tmp_path, tokenizer, kind):
    tokenizer = counting(tokenizer)
    first = content(loaded(tmp_path, kind, tokenizer))
    encoded = tokenizer.encoded
    assert encoded > 0
    (folder,) = cache_folders(tmp_path / "cache")
    before = {path: path.stat().st_ino for path in [folder, *folder.iterdir()]}
    assert content(loaded(tmp_path, kind, tokenizer)) == first
    assert tokenizer.encoded == encoded
    assert {path: path.stat().st_ino for path in [folder, *folder.iterdir()]} == before


def test_the_cache_goes_by_content_not_by_name_or_time(tmp_path, tokenizer):
    tokenizer = counting(tokenizer)
    path = written(tmp_path / "data", RECORDS["prompts"])
    first = content(load_dataset(path, PROMPTS, tokenizer, tmp_path / "cache"))
    encoded = tokenizer.encoded
    copy = tmp_path / "elsewhere.txt"
    shutil.copy(path, copy)
    os.utime(copy, (0, 0))
    assert content(load_dataset(copy, PROMPTS, tokenizer, tmp_path / "cache")) == first
    assert tokenizer.encoded == encoded
    stamp = path.stat()
    path.write_text(path.read_text().replace("fox", "box"))  # same size, same time
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert load_dataset(path, PROMPTS, tokenizer, tmp_path / "cache").columns(0)["prompt"] == "the box"


def test_the_cache_goes_by_tokenizer_and_kind(tmp_path, tokenizer):
    path = written(tmp_path / "data", RECORDS["preferences"])
    cache = tmp_path / "cache"
    other = Tokenizer.train(["entirely different text"], 280)
    first = content(load_dataset(path, PREFERENCES, tokenizer, cache))
    second = load_dataset(path, PREFERENCES, other, cache)
    assert second.sequences(0, 100)[0].tokens.tolist()[:-1] != first[0][0][0][0][:-1]
    assert other.decode(second.sequences(0, 100)[0].tokens) == "the fox jumps"
    assert load_dataset(path, PROMPTS, tokenizer, cache).columns(0) == RECORDS["preferences"][0]
    assert content(load_dataset(path, PREFERENCES, tokenizer, cache)) == first
    assert len(cache_folders(cache)) == 3


def test_the_cache_goes_by_the_end_of_text_token(tmp_path, tokenizer):
    """It stands in the arrays, for empty prompts: two tokenizers that differ in it alone must not share them."""
    other = Tokenizer(tokenizer._backend, PAD, "test")
    assert other.eos_id != tokenizer.eos_id
    records = [{"prompt": ""}]
    assert loaded(tmp_path, "prompts", tokenizer, records).prompt(0, 9).tolist() == [tokenizer.eos_id]
    assert loaded(tmp_path, "prompts", other, records).prompt(0, 9).tolist() == [other.eos_id]


DAMAGES = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_written_anew(tmp_path, tokenizer, damage):
    first = content(loaded(tmp_path, "prompts", tokenizer))
    (folder,) = cache_folders(tmp_path / "cache")
    names = os.listdir(folder)
    assert len(names) > 3
    for name in names:
        DAMAGES[damage](folder / name)
        assert content(loaded(tmp_path, "prompts", tokenizer)) == first, name
        assert cache_folders(tmp_path / "cache") == [folder]  # nothing temporary is left
        assert sorted(os.listdir(folder)) == sorted(names)


@pytest.mark.parametrize("text", ["null", "[]", "{}", '{"checksums": {}}', '{"checksum": 3}', '{"checksum": {}}'])
def test_a_cache_with_another_meta_file_is_written_anew(tmp_path, tokenizer, text):
    first = content(loaded(tmp_path, "prompts", tokenizer))
    (folder,) = cache_folders(tmp_path / "cache")
    (folder / "meta.json").write_text(text)
    assert content(loaded(tmp_path, "prompts", tokenizer)) == first


def test_a_cache_folder_that_is_empty_is_written_anew(tmp_path, tokenizer):
    first = content(loaded(tmp_path, "prompts", tokenizer))
    (folder,) = cache_folders(tmp_path / "cache")
    for path in folder.iterdir():
        path.unlink()
    assert content(loaded(tmp_path, "prompts", tokenizer)) == first


def test_what_a_killed_process_left_half_written_does_not_count(tmp_path, tokenizer):
    first = content(loaded(tmp_path, "prompts", tokenizer))
    (folder,) = cache_folders(tmp_path / "cache")
    folder.rename(folder.with_name(f".{folder.name}.1.tmp"))
    assert content(loaded(tmp_path, "prompts", tokenizer)) == first


def test_nothing_is_written_beside_the_data(tmp_path, tokenizer):
    data = tmp_path / "data"
    paths = {kind: written(data, RECORDS[kind], f"{kind}.json") for kind in KINDS}
    before = {path: (path.stat().st_mtime_ns, path.stat().st_mode) for path in [data, *data.iterdir()]}
    for path in [*paths.values(), data]:
        path.chmod(path.stat().st_mode & ~0o222)  # read-only, as far as the user running this is bound by it
    try:
        for kind, path in paths.items():
            assert len(load_dataset(path, SCHEMAS[kind], tokenizer, tmp_path / "cache")) == 2
    finally:
        for path, (_, mode) in before.items():
            path.chmod(mode)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_mode) for path in [data, *data.iterdir()]} == before


def test_default_cache_dir_follows_the_environment(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "rlhf"
    path = written(tmp_path / "data", RECORDS["prompts"])
    load_dataset(path, PROMPTS, tokenizer)
    assert len(cache_folders(tmp_path / "xdg" / "rlhf")) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache_dir() == tmp_path / "home" / ".cache" / "rlhf"


@pytest.mark.parametrize("max_length", [2, 3, 4, 7, 11, 50])
@pytest.mark.parametrize("kind", ["demonstrations", "preferences"])
def test_sequences_are_fitted_to_the_context(tmp_path, tokenizer, kind, max_length):
    answers = SCHEMAS[kind].answers
    records = [
        {"prompt": "xyzw" * p} | {key: "AB" * (1 + (c + 3 * place) % 5) for place, key in enumerate(answers)}
        for p in range(4)
        for c in range(4)
    ]
    dataset = loaded(tmp_path, kind, tokenizer, records)
    cut = 0
    for record, fields in enumerate(records):
        (prompt,) = tokenizer.encode([fields["prompt"]])
        prompt = prompt or [tokenizer.eos_id]
        encoded = tokenizer.encode([fields[key] for key in answers])
        sequences = dataset.sequences(record, max_length)
        assert dataset.lengths(record, max_length) == [len(s.tokens) for s in sequences]
        assert len({s.prompt for s in sequences}) == 1, "the members of a pair have different prompts"
        for sequence, answer in zip(sequences, encoded, strict=True):
            tokens = sequence.tokens.tolist()
            assert len(tokens) <= max_length
            assert tokens[: sequence.prompt] == prompt[len(prompt) - sequence.prompt :]
            rest = tokens[sequence.prompt :]
            assert rest == ([*answer, tokenizer.eos_id])[: len(rest)]
            assert rest
        needed = len(prompt) + max(map(len, encoded)) + 1
        cut += needed > max_length
        if needed <= max_length:
            assert all(s.prompt == len(prompt) and s.tokens[-1] == tokenizer.eos_id for s in sequences)
    assert dataset.count_cut(max_length) == cut


@pytest.mark.parametrize("max_length", [1, 2, 5, 30])
def test_prompts_lose_their_beginning(tmp_path, tokenizer, max_length):
    records = [{"prompt": "abcdefg"[:n] * 3} for n in range(8)]
    dataset = loaded(tmp_path, "prompts", tokenizer, records)
    encoded = [tokens or [tokenizer.eos_id] for tokens in tokenizer.encode([fields["prompt"] for fields in records])]
    for record, tokens in enumerate(encoded):
        kept = dataset.prompt(record, max_length)
        assert kept.dtype == np.int64
        assert kept.tolist() == tokens[-max_length:]
        assert dataset.columns(record) == records[record]  # the text itself stays whole
    assert dataset.count_cut(max_length) == sum(len(tokens) > max_length for tokens in encoded)


def test_records_keep_their_numbers_over_many_blocks(tmp_path, tokenizer):
    records = [{"prompt": f"{number}", "number": number} for number in range(2500)]
    dataset = loaded(tmp_path, "prompts", tokenizer, records, lines=True)
    assert len(dataset) == 2500
    for number in (0, 1023, 1024, 2047, 2048, 2499):
        assert dataset.columns(number) == records[number]
        assert tokenizer.decode(dataset.prompt(number, 9)) == str(number)
    records[1500] = {"promt": "1500"}
    with pytest.raises(UserError, match=r"record 1501 \(line 1501\) has no key 'prompt'; 'promt' looks like a"):
        loaded(tmp_path, "prompts", tokenizer, records, lines=True)


def test_large_vocabularies_are_not_cut_to_16_bits(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [EOS, *(f"unused{number}" for number in range(66_000)), *alphabet]
    (tmp_path / "vocab.json").write_text(json.dumps({name: number for number, name in enumerate(names)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = Tokenizer.load(tmp_path)
    dataset = loaded(tmp_path, "prompts", tokenizer, [{"prompt": "large ids"}])
    tokens = dataset.prompt(0, 99)
    assert tokens.min() > 1 << 16
    assert tokenizer.decode(tokens) == "large ids"


BAD = {
    "empty file": ("prompts", "", "is empty"),
    "empty list": ("prompts", "[]", "list is empty"),
    "cut off": ("prompts", '[{"prompt": "x"},\n {"prompt": "y"', "line 2, column 16: record 2"),
    "missing key": ("demonstrations", '[{"prompt": "x", "text": "y"}]', "record 1 (line 1) has no key 'completion'"),
    "pairs as demonstrations": (
        "demonstrations",
        '{"prompt": "x", "chosen": "a", "rejected": "b"}',
        "give the file as --preference-data",
    ),
    "demonstrations as pairs": ("preferences", '{"prompt": "x", "completion": "a"}', "give the file as --sft-data"),
    "null": ("preferences", '{"prompt": "x", "chosen": null, "rejected": "b"}', "'chosen' is null"),
    "white space": ("preferences", '{"prompt": "x", "chosen": "a", "rejected": " "}', "'rejected' is only white space"),
    "surrogate": ("prompts", '{"prompt": "\\udc80"}', "record 1 (line 1): 'prompt' has the lone surrogate \\udc80"),
    "Latin-1": ("prompts", b'{"prompt": "\xe9t\xe9"}', "byte 0xe9 is not UTF-8"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_files_are_refused_and_leave_nothing_behind(tmp_path, tokenizer, bad):
    kind, text, piece = BAD[bad]
    path = tmp_path / "bad.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UserError) as caught:
        load_dataset(path, SCHEMAS[kind], tokenizer, tmp_path / "cache")
    assert str(caught.value).startswith(f"{path}: ")
    assert piece in str(caught.value)
    assert cache_folders(tmp_path / "cache") == []


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=KINDS)
def test_a_missing_file_or_a_folder_is_refused(tmp_path, tokenizer, schema: Schema):
    for path, what in ((tmp_path / "missing.json", "no such file"), (tmp_path, "holds no file of records")):
        with pytest.raises(UserError, match=what):
            load_dataset(path, schema, tokenizer, tmp_path / "cache")


def test_a_cache_folder_that_cannot_be_written_is_refused_by_its_own_name(tmp_path, tokenizer):
    (tmp_path / "file").write_text("")
    path = written(tmp_path / "data", RECORDS["prompts"])
    with pytest.raises(UserError, match="cannot be written") as caught:
        load_dataset(path, PROMPTS, tokenizer, tmp_path / "file")
    assert str(tmp_path / "file") in str(caught.value)
    assert "--cache-dir" in str(caught.value)  # --output-dir would not help


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file whose reading fails")
def test_a_file_that_cannot_be_read_is_refused(tmp_path, tokenizer):
    with pytest.raises(UserError, match="/proc/self/mem: cannot be read"):
        load_dataset(Path("/proc/self/mem"), PROMPTS, tokenizer, tmp_path / "cache")
    with pytest.raises(UserError, match="/proc/self/mem: cannot be read"):
        list(texts(Path("/proc/self/mem"), PROMPTS))


def test_texts_are_all_texts_of_the_kind_and_checked(tmp_path):
    for kind, schema in SCHEMAS.items():
        path = written(tmp_path, RECORDS[kind])
        assert list(texts(path, schema)) == [fields[key] for fields in RECORDS[kind] for key in schema.keys]
    with pytest.raises(UserError, match="has no key 'completion'"):
        list(texts(written(tmp_path, RECORDS["prompts"]), DEMONSTRATIONS))


MEASURE = """
import json, resource, sys
from pathlib import Path
from rlhf.data.dataset import load_dataset
from rlhf.data.schema import PROMPTS
from rlhf.io.tokenizer import Tokenizer

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

folder = Path(sys.argv[1])
tokenizer = Tokenizer.train(["warm up"], 260)
load_dataset(folder / "small.json", PROMPTS, tokenizer, folder / "cache")
before = peak()
dataset = load_dataset(folder / "large.json", PROMPTS, tokenizer, folder / "cache")
assert len(dataset) == 50_000
print(peak() - before)
"""


def test_fifty_thousand_records_do_not_stay_in_memory(tmp_path):
    record = {"prompt": "word " * 5, "blob": "x" * 900}
    written(tmp_path, [record] * 1200, "small.json")
    large = written(tmp_path, [record] * 50_000, "large.json")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=tmp_path,
        env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
    )
    assert done.returncode == 0, done.stderr
    megabytes = large.stat().st_size / 2**20
    assert megabytes > 40
    # the file is never held whole, let alone as Python objects; mapped pages and a few arrays of numbers remain
    assert float(done.stdout) < megabytes / 2


def test_loading_leaves_the_global_random_state_alone(tmp_path, tokenizer):
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    loaded(tmp_path, "prompts", tokenizer)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()


@pytest.mark.parametrize("size", [0, None])
def test_a_cache_with_a_flipped_byte_or_a_cut_file_reads_as_a_fresh_one(tmp_path, tokenizer, size):
    expected = content(loaded(tmp_path, "prompts", tokenizer))
    (folder,) = cache_folders(tmp_path / "cache")
    for name in sorted(file.name for file in folder.iterdir()):
        whole = (folder / name).read_bytes()
        for place in range(0, len(whole), max(1, len(whole) // 8)):
            flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
            (folder / name).write_bytes(flipped if size is None else whole[:place])
            assert content(loaded(tmp_path, "prompts", tokenizer)) == expected


@pytest.mark.parametrize("kind", ["demonstrations", "preferences"])
@pytest.mark.parametrize("records", [[0, 1], [1]], ids=str)
def test_the_tokens_of_all_answers_are_those_of_the_single_sequences(tmp_path, tokenizer, kind, records):
    dataset = loaded(tmp_path, kind, tokenizer)
    singly = [s.tokens[s.prompt :] for record in records for s in dataset.sequences(record, 1000)]
    found = dataset.learnt_tokens(records)
    assert found.dtype == np.int64
    assert sorted(found.tolist()) == sorted(np.concatenate(singly).tolist())


@pytest.mark.parametrize("kind", ["demonstrations", "preferences"])
@pytest.mark.parametrize("max_length", range(2, 40))
def test_records_end_where_all_their_truncated_sequences_do(tmp_path, tokenizer, kind, max_length):
    dataset = loaded(tmp_path, kind, tokenizer)
    sequences = [dataset.sequences(record, max_length) for record in range(len(dataset))]
    ended = [all(sequence.tokens[-1] == dataset.end_id for sequence in record) for record in sequences]
    assert dataset.count_ended(max_length, range(len(dataset))) == sum(ended)
