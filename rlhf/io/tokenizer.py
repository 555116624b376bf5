"""Text to token ids and back, through the `tokenizers` library.

Three sources: a folder with `tokenizer.json`; a folder with GPT-2's `vocab.json` and `merges.txt`; or a byte-level BPE
trained on the user's texts. Text never becomes a control token: "<|endoftext|>" in a text is encoded letter by letter.
"""

import hashlib
import itertools
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from rlhf.errors import UserError
from rlhf.io.files import check_folder, read_json

EOS = "<|endoftext|>"
PAD = "<|pad|>"
_LONGEST = 10_000  # characters that training takes at once


class Tokenizer:
    """An immutable tokenizer with an end-of-text token."""

    def __init__(self, backend: Backend, eos: str, source: str) -> None:
        """Wrap a `tokenizers.Tokenizer`; raises UserError (naming `source`) unless it knows `eos`."""
        eos_id = backend.token_to_id(eos)
        if eos_id is None:
            raise UserError(f"{source}: the tokenizer has no end-of-text token {eos!r}; add it to the vocabulary")
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self.eos = eos
        self.eos_id = eos_id
        self.vocab_size: int = max(backend.get_vocab().values()) + 1  # ids may have holes

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """A byte-level BPE of at most `vocab_size` entries, with special tokens 0 (end of text) and 1 (padding).

        The same texts give the same tokenizer. Fewer entries come out of texts too small for more merges.
        """
        backend = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[EOS, PAD],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        _interruptible(lambda: backend.train_from_iterator(_cut(texts), trainer))
        return cls(backend, EOS, "trained tokenizer")

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read a tokenizer folder.

        Raises:
            UserError: files are missing or broken, or there is no end-of-text token.
        """
        check_folder(folder, "it should hold tokenizer.json, or vocab.json and merges.txt")
        whole, vocab, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
        try:
            if whole.is_file():
                backend = Backend.from_file(str(whole))
            elif vocab.is_file() and merges.is_file():
                backend = _byte_level(models.BPE.from_file(str(vocab), str(merges)))
                backend.add_special_tokens([token for token in (EOS, PAD) if backend.token_to_id(token) is not None])
            else:
                raise UserError(f"{folder}: has neither tokenizer.json nor vocab.json and merges.txt; save them there")
        except UserError:
            raise
        except Exception as error:  # the library raises bare Exception for anything wrong with a file
            raise UserError(f"{folder}: the tokenizer cannot be read ({error})") from error
        return cls(backend, _eos_name(folder), str(folder))

    def save(self, folder: Path) -> None:
        """Write the files that `transformers.AutoTokenizer` reads."""
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
        """A token that no text contains, to mark padding by: `<|pad|>`, or the byte 0xFF, which UTF-8 never uses."""
        pad = self._backend.token_to_id(PAD)
        return pad if pad is not None else self._backend.token_to_id("ÿ")


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


def _byte_level(model: models.BPE) -> Backend:
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _eos_name(folder: Path) -> str:
    """The end-of-text token that tokenizer_config.json names, else GPT-2's."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return EOS
    settings = read_json(path)
    token = settings.get("eos_token", EOS) if isinstance(settings, dict) else settings
    token = token.get("content", token) if isinstance(token, dict) else EOS if token is None else token
    if not isinstance(token, str):
        raise UserError(f"{path}: eos_token must be a text, got {token!r}")
    return token
