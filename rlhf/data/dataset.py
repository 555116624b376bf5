"""Data files as memory-mapped token arrays, tokenised once and cached by content.

A large data set takes disk space and a few open files, but no memory.
"""

import hashlib
import itertools
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf.data.array_files import file_checksum, save_array
from rlhf.data.conversations import contents_of
from rlhf.data.data_files import Record, Source, as_data_files, content_digest
from rlhf.data.encoding import encode_records, holds_conversations
from rlhf.data.findings import Findings, Inspector
from rlhf.data.schema import PREFERENCES, PROMPTS, Schema, read_checked
from rlhf.data.truncate import Truncation, truncate
from rlhf.errors import UserError
from rlhf.io.cache import default_cache_dir
from rlhf.io.files import atomic_folder
from rlhf.io.tokenizer import Tokenizer

_FORMAT = 4
_RECORDS_AT_ONCE = 1024
_ONLY_TIES = "{path}: in every pair the chosen text equals the rejected one; nothing is left to learn from"
_FILES = {
    "tokens.npy",
    "offsets.npy",
    "prompts.npy",
    "margins.npy",
    "learnt.npy",
    "column_offsets.npy",
    "columns.jsonl",
    "digests.npy",
}


class TokenSequence(NamedTuple):
    """One prompt with its completion, ready for a model."""

    tokens: np.ndarray
    """[n] int64: prompt, completion, end-of-text unless the completion was cut."""
    prompt: int
    """Tokens of the prompt."""
    learnt: np.ndarray | None = None
    """[n - prompt] bool, True where the assistant wrote the token; None if all tokens after the prompt are learnt."""


class Dataset:
    """A tokenised data file. Records are numbered from 0; the members of a pair are (chosen, rejected).

    `end_id` is the token that ends an answer: end-of-text, or the end of a turn in conversations. `dropped` is the
    number of dropped pairs, whose texts are equal; `keys` has all keys of the remaining records, `findings` their
    likely mistakes, and `digests` [records] a number for each record, equal if all its texts are.
    """

    def __init__(self, folder: Path, schema: Schema, bos_id: int | None = None) -> None:
        """Open a cache folder written by `load_dataset`."""
        self.schema, self._bos_id = schema, bos_id
        self.members = max(1, len(schema.answers))
        self._tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        self._offsets = np.load(folder / "offsets.npy", mmap_mode="r")
        self._prompts = np.load(folder / "prompts.npy", mmap_mode="r")
        self._learnt = np.load(folder / "learnt.npy", mmap_mode="r")
        self._margins = np.load(folder / "margins.npy", mmap_mode="r")
        self._columns = np.memmap(folder / "columns.jsonl", mode="r") if schema is PROMPTS else None
        self.digests = np.load(folder / "digests.npy", mmap_mode="r")
        self._column_offsets = np.load(folder / "column_offsets.npy", mmap_mode="r")
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.end_id: int = meta["end"]
        self.dropped: int = meta["dropped"]
        self.keys: list[str] = meta["keys"]
        self.findings = Findings(**meta["findings"])

    def __len__(self) -> int:
        return len(self._prompts) // self.members

    def sequences(self, record: int, max_length: int) -> list[TokenSequence]:
        """Return the record's sequences (one, or chosen and rejected), truncated to `max_length` tokens."""
        return [
            self._truncated(record * self.members + member, lengths)
            for member, lengths in enumerate(self._truncations(record, max_length))
        ]

    def lengths(self, record: int, max_length: int) -> list[int]:
        """Return the number of tokens of each sequence that `sequences` returns."""
        truncations = self._truncations(record, max_length)
        return [lengths.prompt + lengths.completion + lengths.ends for lengths in truncations]

    def answer_lengths(self, record: int) -> list[int]:
        """Return the number of tokens of each of the record's answers, not truncated and without end-of-text."""
        first, last = record * self.members, (record + 1) * self.members
        lengths: list[int] = (np.diff(self._offsets[first : last + 1]) - self._prompts[first:last]).tolist()
        return lengths

    def learnt_tokens(self, records: Sequence[int]) -> np.ndarray:
        """Return the tokens of `records` that are learnt, [n] int64: not truncated, and then an end for each."""
        rows = (np.asarray(records)[:, None] * self.members + np.arange(self.members)).ravel()
        parts = list(map(slice, self._offsets[rows] + self._prompts[rows], self._offsets[rows + 1]))
        tokens, learnt = np.asarray(self._tokens), np.asarray(self._learnt)  # a memory map is slow to slice
        answers = [tokens[part][learnt[part] > 0] if len(learnt) else tokens[part] for part in parts]
        return np.concatenate([*answers, np.full(len(answers), self.end_id)])

    def token_counts(self) -> np.ndarray:
        """Return the number of tokens of each sequence, not truncated, end-of-text included, [records, members]."""
        lengths = np.diff(self._offsets) + (1 if self.schema.answers else 0)
        return lengths.reshape(-1, self.members)

    def answer_counts(self) -> np.ndarray:
        """Return the number of tokens of each answer, not truncated, end-of-text included, [records, members]."""
        return self.token_counts() - np.reshape(self._prompts, (-1, self.members))

    def prompt(self, record: int, max_length: int) -> np.ndarray:
        """Return the last `max_length` tokens of the prompt, [n] int64."""
        start = int(self._offsets[record * self.members])
        stop = start + int(self._prompts[record * self.members])
        return self._from_prompt(start, max(start, stop - max_length), stop)

    def margin(self, record: int) -> float:
        """Return the pair's `margin` column; 0 if it has none."""
        return float(self._margins[record])

    def columns(self, record: int) -> dict[str, Any]:
        """Return all fields of a prompt record, including `prompt`, as they are in the file."""
        assert self._columns is not None, "only prompt files keep their columns"
        start, stop = self._column_offsets[record : record + 2]
        return json.loads(self._columns[start:stop].tobytes())

    def count_cut(self, max_length: int, records: Sequence[int] | None = None) -> int:
        """Return the number of `records` (None: all) longer than `max_length` tokens, end-of-text included."""
        cut = self.token_counts().max(axis=1) > max_length
        return int((cut if records is None else cut[list(records)]).sum())

    def count_ended(self, max_length: int, records: Sequence[int]) -> int:
        """Return the number of `records` whose answers keep their end when they are truncated to `max_length`."""
        answers = self.answer_counts()[list(records)]
        prompts = self.token_counts()[list(records)] - answers
        return int((answers <= max_length - np.minimum(prompts, max_length // 2)).all(axis=1).sum())

    def equal_pairs(self, max_length: int) -> list[int]:
        """Return the records whose chosen and rejected sequences are equal after truncation to `max_length`."""
        if self.members < 2:
            return []
        candidates = np.flatnonzero(self.token_counts().min(axis=1) > max_length)  # otherwise the texts still differ
        pairs = ((record, self.sequences(record, max_length)) for record in candidates.tolist())
        return [record for record, (chosen, rejected) in pairs if np.array_equal(chosen.tokens, rejected.tokens)]

    def mean_tokens(self, max_length: int) -> float:
        """Return the mean number of tokens of a record's sequences together, each cut to `max_length`."""
        return float(np.minimum(self.token_counts(), max_length).sum()) / len(self)

    def _truncations(self, record: int, max_length: int) -> list[Truncation]:
        first = record * self.members
        bounds = self._offsets[first : first + self.members + 1].tolist()
        prompts = self._prompts[first : first + self.members].tolist()
        answers = [bounds[i + 1] - bounds[i] - prompts[i] for i in range(self.members)]
        longest = max(answers)
        return [
            truncate(prompt, answer, max_length, longest=longest)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def _truncated(self, sequence: int, lengths: Truncation) -> TokenSequence:
        begin = int(self._offsets[sequence])
        middle = begin + int(self._prompts[sequence])
        stop = middle + lengths.completion
        tokens = self._from_prompt(begin, middle - lengths.prompt, stop)
        if lengths.ends:
            tokens = np.append(tokens, self.end_id)
        if not len(self._learnt):
            return TokenSequence(tokens, lengths.prompt)
        return TokenSequence(tokens, lengths.prompt, np.append(self._learnt[middle:stop], [True] * lengths.ends) > 0)

    def _from_prompt(self, begin: int, first: int, last: int) -> np.ndarray:
        """Return tokens first..last-1 of a prompt that begins at `begin`; the token that begins every text stays."""
        tokens: np.ndarray = self._tokens[first:last].astype(np.int64)
        if self._bos_id is not None and len(tokens) > 1 and self._tokens[begin] == self._bos_id:
            tokens[0] = self._bos_id
        return tokens


def load_dataset(source: Source, schema: Schema, tokenizer: Tokenizer, cache_dir: Path | None = None) -> Dataset:
    """Read, check and tokenise data files, or open the cached arrays of the same content.

    Pairs whose chosen and rejected texts are equal are dropped and counted (`Dataset.dropped`). An empty prompt becomes
    the end-of-text token; conversations are written by the tokenizer's chat template.

    Args:
        source: the files, in any form that `rlhf.data.records` reads.
        schema: the expected kind of records.
        tokenizer: the tokenizer of the texts.
        cache_dir: the cache folder; None is `default_cache_dir()`.

    Raises:
        UserError: the file or a record is invalid (`read_checked`), or all records are dropped.
    """
    identity = f"{_FORMAT}:{schema.name}:{tokenizer.fingerprint}:{tokenizer.eos_id}:{content_digest(source)}"
    if columns := as_data_files(source).columns:
        identity += f":{list(columns)}"
    if tokenizer.chat_template is not None:
        identity += f":{tokenizer.chat_template.digest}"
    if tokenizer.bos_id is not None:
        identity += f":{tokenizer.bos_id}"
    folder = (cache_dir or default_cache_dir()) / "datasets" / hashlib.sha256(identity.encode()).hexdigest()[:32]
    if not _is_complete(folder):
        with atomic_folder(folder, "--cache-dir") as temporary:
            _write(source, schema, tokenizer, temporary)
    return Dataset(folder, schema, tokenizer.bos_id)


def check_file(source: Source, schema: Schema) -> set[str]:
    """Check data files and return all keys of their records, without those of pairs with equal texts.

    Raises:
        UserError: a file or record is invalid, or all pairs have equal texts.
    """
    keys: set[str] = set()
    for record in read_checked(source, schema):
        if not _is_tie(record, schema):
            keys |= record.fields.keys()
    if not keys:
        raise UserError(_ONLY_TIES.format(path=source))
    return keys


def texts(source: Source, schema: Schema) -> Iterator[str]:
    """Yield every text of a data file after checking its record, to train a tokenizer on."""
    for record in read_checked(source, schema):
        yield from (text for key in schema.keys for text in contents_of(record.fields[key]))


def _write(source: Source, schema: Schema, tokenizer: Tokenizer, folder: Path) -> None:
    """Tokenise a data file into flat files, a block of records at a time, then write the arrays with headers."""
    kind = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    lengths, prompts, margins, column_ends, dropped, end_id = [], [], [], [0], 0, tokenizer.eos_id
    keys: set[str] = set()
    inspector = Inspector(schema, tokenizer)
    records = read_checked(source, schema)
    with (
        (folder / "tokens.bin").open("wb") as stream,
        (folder / "learnt.bin").open("wb") as learnt,
        (folder / "columns.jsonl").open("wb") as columns,
    ):
        while block := list(itertools.islice(records, _RECORDS_AT_ONCE)):
            usable = [record for record in block if not _is_tie(record, schema)]
            dropped += len(block) - len(usable)
            end_id = tokenizer.end_of_turn_id if holds_conversations(block[0]) else tokenizer.eos_id
            for record, prompt, answers, mask in encode_records(usable, schema, tokenizer, source):
                keys |= record.fields.keys()
                inspector.add(record.fields)
                for answer in answers:
                    stream.write(np.array(prompt + answer, dtype=kind).tobytes())
                    lengths.append(len(prompt) + len(answer))
                    prompts.append(len(prompt))
                if mask is not None:
                    learnt.write(bytes(len(prompt)) + bytes(mask))
                margins.append(record.fields.get("margin", 0.0) if schema is PREFERENCES else 0.0)
                if schema is PROMPTS:
                    column_ends.append(column_ends[-1] + columns.write(json.dumps(record.fields).encode() + b"\n"))
    if not prompts:
        raise UserError(_ONLY_TIES.format(path=source))
    for name, dtype in (("tokens", kind), ("learnt", np.uint8)):
        flat = folder / f"{name}.bin"
        save_array(folder / f"{name}.npy", np.memmap(flat, dtype, "r") if flat.stat().st_size else np.empty(0, dtype))
        flat.unlink()
    save_array(folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    save_array(folder / "prompts.npy", np.array(prompts, dtype=np.int32))
    save_array(folder / "margins.npy", np.array(margins, dtype=np.float32))
    save_array(folder / "column_offsets.npy", np.array(column_ends, dtype=np.int64))
    save_array(folder / "digests.npy", inspector.digests)
    checksums = {name: file_checksum(folder / name) for name in sorted(_FILES)}
    meta = {"format": _FORMAT, "end": end_id, "dropped": dropped, "keys": sorted(keys), "checksums": checksums}
    meta["findings"] = inspector.findings()._asdict()
    meta["checksum"] = _checksum_of_meta(meta)
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def _is_tie(record: Record, schema: Schema) -> bool:
    return schema is PREFERENCES and record.fields["chosen"] == record.fields["rejected"]


def _is_complete(folder: Path) -> bool:
    """Return whether a cache folder is complete and undamaged; if not, it is written again."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta.pop("checksum") != _checksum_of_meta(meta):
            return False
        return all(file_checksum(folder / name) == meta["checksums"][name] for name in _FILES)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _checksum_of_meta(meta: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(meta).encode())
