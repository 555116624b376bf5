"""Text to token ids and back, through the `tokenizers` library.

Two sources: a folder in any form that `rlhf.io.tokenizer_files` reads, or a byte-level BPE trained on the user's
texts. Text never becomes a control token: "<|endoftext|>" in a text is encoded letter by letter.
"""

import hashlib
import itertools
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from rlhf.errors import UserError
from rlhf.io.tokenizer_files import (
    EOS,
    PAD,
    byte_level,
    read_backend,
    read_end_of_text,
    read_files,
    read_pad_token,
    without_pad_token,
    write_files,
)

_LONGEST = 10_000  # characters that training takes at once


class Tokenizer:
    """An immutable tokenizer with an end-of-text token."""

    def __init__(
        self,
        backend: Backend,
        eos: str,
        source: str,
        *,
        stop_ids: Sequence[int] = (),
        pad: str | None = None,
        files: Mapping[str, bytes] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        """Wrap a `tokenizers.Tokenizer`.

        Args:
            backend: encodes and decodes.
            eos: the end-of-text token.
            source: names the tokenizer in errors.
            stop_ids: ids that end a completion; empty is that of `eos` alone.
            pad: the token that marks padding; None chooses one, see `pad_id`.
            files: of the folder that it was read from, which `save` writes again.
            notes: lines for the user about that folder.

        Raises:
            UserError: the tokenizer does not know `eos`.
        """
        eos_id = backend.token_to_id(eos)
        if eos_id is None:
            raise UserError(f"{source}: the tokenizer has no end-of-text token {eos!r}; add it to the vocabulary")
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()
        self._backend, self._pad, self._files = backend, pad, dict(files or {})
        self.eos = eos
        self.eos_id = eos_id
        self.stop_ids: tuple[int, ...] = tuple(stop_ids) or (eos_id,)
        self.notes = tuple(notes)
        vocabulary = backend.get_vocab()
        self.vocab_size: int = max(vocabulary.values()) + 1
        if holes := self.vocab_size - len(set(vocabulary.values())):
            self.notes += (f"{source}: {holes} ids below {self.vocab_size} have no token, yet a model can draw them",)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """A byte-level BPE of at most `vocab_size` entries, with special tokens 0 (end of text) and 1 (padding).

        The same texts give the same tokenizer. Fewer entries come out of texts too small for more merges.
        """
        backend = byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[EOS, PAD],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        _interruptible(lambda: backend.train_from_iterator(_cut(texts), trainer))
        return cls(backend, EOS, "trained tokenizer")

    @classmethod
    def load(cls, folder: Path, rows: int | None = None) -> "Tokenizer":
        """Read a tokenizer folder.

        Args:
            folder: with files as `transformers` saves them.
            rows: of the embedding of the folder's model; None is a tokenizer without a model.

        Raises:
            UserError: files are missing, damaged or contradictory, or there is no end-of-text token.
        """
        backend, notes = read_backend(folder, rows)
        end, pad, files = read_end_of_text(folder, backend), read_pad_token(folder), read_files(folder)
        notes += end.notes
        return cls(backend, end.token, str(folder), stop_ids=end.stop_ids, pad=pad, files=files, notes=notes)

    def save(self, folder: Path, *, pads_with_eos: bool = True) -> None:
        """Write the files that `transformers.AutoTokenizer` reads: those it was read from, as they were.

        Args:
            folder: to write into.
            pads_with_eos: keep a setting that end-of-text tokens are padding. Beside a reward model it may not stay:
                `transformers` reads a score at the last token that is no padding.
        """
        if self._files:
            drop = not pads_with_eos and self._pad == self.eos
            write_files(folder, without_pad_token(self._files) if drop else self._files)
            return
        pad = PAD if self._backend.token_to_id(PAD) is not None else None
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.eos,
            "eos_token": self.eos,
            "unk_token": self.eos,
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": True,
        } | ({"pad_token": pad} if pad else {})
        self._backend.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids; special tokens give nothing, bytes that are no UTF-8 give U+FFFD."""
        return self._backend.decode(list(tokens), skip_special_tokens=True)

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """What each token adds to `decode(tokens)`; they join to exactly that.

        A character whose bytes lie in several tokens belongs to the last of them, the others add "".
        """
        whole = self.decode(tokens)
        alone = self._backend.decode_batch([[token] for token in tokens], skip_special_tokens=True)
        if "".join(alone) == whole:
            return alone
        shared = [_shared(self.decode(tokens[:end]), whole) for end in range(1, len(tokens))]
        ends = [0, *itertools.accumulate(shared, max), len(whole)]
        return [whole[first:end] for first, end in itertools.pairwise(ends)]

    @property
    def special_tokens(self) -> list[str]:
        """The texts that its special tokens are written as."""
        return [token.content for token in self._backend.get_added_tokens_decoder().values() if token.special]

    @property
    def fingerprint(self) -> str:
        """Hex digest that two tokenizers share exactly if they encode alike."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()

    def same_vocabulary(self, other: "Tokenizer") -> bool:
        """Whether both give every id the same token."""
        return self._backend.get_vocab() == other._backend.get_vocab()

    @property
    def pad_id(self) -> int | None:
        """A token that no text contains, to mark padding by; None where there is none.

        It is the one that the folder names, unless that is the end of text, else `<|pad|>`, else the byte 0xFF, which
        UTF-8 never uses.
        """
        ids = [self._backend.token_to_id(token) for token in (self._pad, PAD, "ÿ") if token is not None]
        return next((number for number in ids if number not in (None, self.eos_id)), None)


def _interruptible(work: Callable[[], None]) -> None:
    """Do work of native code, which keeps signals waiting, in a thread, so that they are heard at once."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # for the thread that waits
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def _cut(texts: Iterable[str]) -> Iterator[str]:
    """Pieces of texts: training takes time quadratic in the length of a run of one character."""
    for text in texts:
        for start in range(0, len(text), _LONGEST):
            yield text[start : start + _LONGEST]


def _shared(text: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    return next(
        (place for place, pair in enumerate(zip(text, other, strict=False)) if pair[0] != pair[1]),
        min(len(text), len(other)),
    )
