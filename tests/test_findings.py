"""Findings in a data file: duplicates, contradictions, repeated prompts, control tokens, pairs that become equal."""

import json
from types import SimpleNamespace

import pytest

from rlhf.data.dataset import Dataset, load_dataset
from rlhf.data.schema import DEMONSTRATIONS, PREFERENCES, PROMPTS, Schema
from rlhf.io.tokenizer import Tokenizer
from rlhf.train.supervised import DataSplit, _note_known_texts, _note_shared


def pair(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def shown(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


CLEAN = [shown("p", "a"), shown("q", "a"), shown("p", "b")]
TABLE = {
    "nothing": (DEMONSTRATIONS, CLEAN, []),
    "duplicates": (
        DEMONSTRATIONS,
        [*CLEAN, *CLEAN[:2]],
        ["exact duplicates of earlier records: 2 of 5 demonstrations"],
    ),
    "not by joining": (DEMONSTRATIONS, [shown("ab", "c"), shown("a", "bc")], []),
    "prompts": (PROMPTS, [{"prompt": "p", "n": 1}, {"prompt": "p", "n": 2}], ["earlier records: 1 of 2 prompts"]),
    "duplicate pairs": (PREFERENCES, [pair("p", "a", "b")] * 3, ["earlier records: 2 of 3 preference pairs"]),
    "contradiction": (
        PREFERENCES,
        [pair("p", "a", "b"), pair("p", "b", "a"), pair("q", "a", "b"), pair("q", "c", "d")],
        ["2 of 4 pairs contradict another pair"],
    ),
    "other prompt": (PREFERENCES, [pair("p", "a", "b"), pair("q", "b", "a")], []),
    "prompt repeated": (
        DEMONSTRATIONS,
        [shown("Hi, you", "Hi, you there"), shown("So", "So it is"), shown("p", "a")],
        ["2 of 3 demonstrations repeat the prompt at the beginning of 'completion'"],
    ),
    "prompt repeated in both": (
        PREFERENCES,
        [pair("red", "red a", "red b")],
        ["1 of 1 preference pairs repeat the prompt at the beginning of 'chosen' and 'rejected'"],
    ),
    "prompt seldom repeated": (DEMONSTRATIONS, [shown("p", "p a"), *CLEAN], []),
    "empty prompt": (DEMONSTRATIONS, [shown("", "a"), shown(" ", " b")], []),
    "control tokens": (
        DEMONSTRATIONS,
        [shown("p", "a<|endoftext|>"), shown("<|im_start|>q", "b<|im_end|><|im_end|>"), shown("r", "c<|endoftext|>")],
        ["('<|endoftext|>' in 2, "],
    ),
    "the tokenizer's own": (DEMONSTRATIONS, [shown("p", "a<|pad|>")], ["('<|pad|>' in 1 of 1 records)"]),
}


def loaded(tmp_path, tokenizer: Tokenizer, schema: Schema, records: list[dict], name: str = "data") -> Dataset:
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return load_dataset(path, schema, tokenizer, tmp_path / "cache")


@pytest.mark.parametrize(("schema", "records", "expected"), TABLE.values(), ids=TABLE)
def test_each_finding_is_one_line(tmp_path, tokenizer, schema, records, expected):
    for _ in range(2):  # tokenised, then from the cache
        dataset = loaded(tmp_path, tokenizer, schema, records)
        lines = dataset.findings.describe(schema, len(dataset))
        assert len(lines) == len(expected)
        assert all(part in line for part, line in zip(expected, lines, strict=True))


SHARED = "a b c d e f g h"


@pytest.mark.parametrize(
    ("chosen", "rejected", "becomes_equal"),
    [(f"{SHARED} good", f"{SHARED} bad", True), (f"{SHARED} good", SHARED, True), ("good", "bad", False)],
    ids=["same beginning", "one is the other's beginning", "different"],
)
def test_equal_pairs_are_those_whose_sequences_agree(tmp_path, chosen, rejected, becomes_equal):
    tokenizer = Tokenizer.train(["x"], 260)  # a token per character
    pairs = [pair("question", "ok", "no"), pair("question", chosen, rejected)]
    dataset, equal_lengths = loaded(tmp_path, tokenizer, PREFERENCES, pairs), []
    for max_length in range(4, 40):
        first, second = dataset.sequences(1, max_length)
        agree = first.tokens.tolist() == second.tokens.tolist()
        assert dataset.equal_pairs(max_length) == ([1] if agree else [])
        equal_lengths += [max_length] * agree
    assert bool(equal_lengths) == becomes_equal


@pytest.mark.parametrize(
    ("validation", "count"), [(CLEAN, 3), ([CLEAN[0], shown("new", "x")], 1), ([shown("new", "x")], 0)]
)
def test_records_that_both_files_have_are_told(tmp_path, tokenizer, validation, count):
    run = SimpleNamespace(lines=[])
    run.note = run.lines.append
    train = loaded(tmp_path, tokenizer, DEMONSTRATIONS, CLEAN)
    held_out = loaded(tmp_path, tokenizer, DEMONSTRATIONS, validation, "val")
    _note_shared(run, tmp_path / "val.json", DataSplit(train, [0, 1, 2], held_out, list(range(len(validation)))))
    assert len(run.lines) == bool(count)
    assert all(f"val.json: {count} of {len(validation)} held-out records are also" in line for line in run.lines)


def test_equal_records_on_both_sides_of_a_split_are_told(tmp_path, tokenizer):
    lines = []
    dataset = loaded(tmp_path, tokenizer, DEMONSTRATIONS, [*CLEAN, CLEAN[0]])
    _note_shared(SimpleNamespace(note=lines.append), tmp_path / "all.json", DataSplit(dataset, [0, 1], dataset, [2, 3]))
    assert len(lines) == 1
    assert "all.json: 1 of 2 held-out records are also" in lines[0]


@pytest.mark.parametrize(
    ("held_out", "known"),
    [
        ([("q", "a", "c"), ("q", "c", "b")], 2),
        ([("q", "a", "c"), ("other", "a", "c"), ("q", "b", "c")], 2),
        ([("q", "a", "new"), ("q", "b", "c")], 0),
    ],
    ids=["both", "most", "half"],
)
def test_held_out_pairs_of_known_texts_are_told_if_they_are_most(tmp_path, tokenizer, held_out, known):
    lines = []
    pairs = [pair("q", "a", "b"), pair("q", "b", "c"), *(pair(*texts) for texts in held_out)]
    dataset = loaded(tmp_path, tokenizer, PREFERENCES, pairs)
    split = DataSplit(dataset, [0, 1], dataset, list(range(2, len(pairs))))
    _note_known_texts(SimpleNamespace(note=lines.append), tmp_path / "pairs.json", split)
    expected = f"pairs.json: both texts of {known} of {len(held_out)} held-out pairs are in training pairs too; "
    assert [line.partition(expected)[2][:4] for line in lines] == (["what"] if known else [])
