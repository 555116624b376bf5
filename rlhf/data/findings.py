"""Findings in the records of a data file: duplicates, contradictions, and likely mistakes."""

import hashlib
import re
from array import array
from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from rlhf.data.conversations import as_key
from rlhf.data.schema import PREFERENCES, PROMPTS, Schema
from rlhf.io.tokenizer import Tokenizer

_CONTROL_TOKENS = (
    "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|eos|>",
    "<start_of_turn>", "<end_of_turn>", "<s>", "</s>", "<bos>", "<eos>", "<pad>", "[INST]", "[/INST]",
)  # fmt: skip
"""Texts of well-known models' control tokens."""


class Findings(NamedTuple):
    """Counts of records."""

    duplicates: int
    """Records whose texts equal those of an earlier record."""
    contradictions: int
    """Pairs that another pair with the same prompt orders in the opposite way."""
    repeated_prompts: int
    """Records in which every answer begins with the whole prompt."""
    control_tokens: dict[str, int]
    """Number of records that contain each control token as text. It is encoded as text."""

    def describe(self, schema: Schema, count: int) -> list[str]:
        """Return a line for the user about each finding that matters.

        Args:
            schema: schema of the records.
            count: number of records in the file.
        """
        lines = []
        if self.duplicates:
            lines.append(f"exact duplicates of earlier records: {self.duplicates} of {count} {schema.name}")
        if self.contradictions:
            lines.append(
                f"{self.contradictions} of {count} pairs contradict another pair: same prompt, chosen and rejected "
                "swapped; remove one of the two"
            )
        if 2 * self.repeated_prompts >= count:
            lines.append(
                f"{self.repeated_prompts} of {count} {schema.name} repeat the prompt at the beginning of "
                f"{' and '.join(map(repr, schema.answers))}; leave it out there, the model reads the prompt before it"
            )
        if self.control_tokens:
            tokens = ", ".join(f"{token!r} in {number}" for token, number in self.control_tokens.items())
            lines.append(
                f"special tokens are written in the texts ({tokens} of {count} records); they stay text, letter by "
                "letter. Leave them out: end-of-text is added where a completion ends"
            )
        return lines


class Inspector:
    """A collector of findings in one pass over the records, with a few bytes per record."""

    def __init__(self, schema: Schema, tokenizer: Tokenizer) -> None:
        """Start without records, for a schema and the tokenizer of the texts."""
        self._schema = schema
        self._digests, self._swapped = array("Q"), array("Q")
        self._repeated_prompts = 0
        self._control_tokens: Counter[str] = Counter()
        names = sorted({*_CONTROL_TOKENS, *tokenizer.special_tokens}, key=len, reverse=True)
        texts = [name for name, ids in zip(names, tokenizer.encode(names), strict=True) if len(ids) > 1]
        self._pattern = re.compile("|".join(map(re.escape, texts)) or r"(?!)")

    def add(self, fields: dict[str, Any]) -> None:
        """Add the texts or conversations of a record."""
        prompt, *answers = (as_key(fields[key]) for key in self._schema.keys)
        self._digests.append(_digest(prompt, *answers))
        if self._schema is PREFERENCES:
            self._swapped.append(_digest(prompt, *reversed(answers)))
        if answers and prompt.strip() and all(answer.startswith(prompt) for answer in answers):
            self._repeated_prompts += 1
        self._control_tokens.update({token for text in (prompt, *answers) for token in self._pattern.findall(text)})

    @property
    def digests(self) -> np.ndarray:
        """Return a digest of each record, [records] uint64; equal if all texts are."""
        return np.array(self._digests, dtype=np.uint64)

    def findings(self) -> Findings:
        """Return the findings in the records added so far."""
        digests = self.digests
        contradictions = np.isin(digests, np.array(self._swapped, dtype=np.uint64))
        return Findings(
            duplicates=len(digests) - len(np.unique(digests)),
            contradictions=int(contradictions.sum()),
            repeated_prompts=0 if self._schema is PROMPTS else self._repeated_prompts,
            control_tokens=dict(self._control_tokens.most_common()),
        )


def _digest(*texts: str) -> int:
    """Return a 64-bit digest; among a million different records, two agree with probability 3e-8."""
    content = "".join(f"{len(text)}:{text}" for text in texts)
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "big")
