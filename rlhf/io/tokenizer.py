"""Conversion between text and token ids with the `tokenizers` library.

A tokenizer is read from a folder in any form that `rlhf.io.tokenizer_files` supports, or is a byte-level BPE trained on
the user's texts. Text is never encoded as a control token: "<|endoftext|>" in a text is encoded letter by letter.
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer as Backend

from rlhf.errors import UserError
from rlhf.io.chat_template import ChatTemplate, control_tokens, read_template, read_token_names
from rlhf.io.tokenizer_files import (
    EOS,
    PAD,
    read_backend,
    read_bos_id,
    read_end_of_text,
    read_files,
    read_pad_token,
    with_template,
    without_pad_token,
    write_files,
)
from rlhf.io.tokenizer_training import train_backend


class Tokenizer:
    """An immutable tokenizer with an end-of-text token."""

    def __init__(
        self,
        backend: Backend,
        eos: str,
        source: str,
        *,
        stop_ids: Sequence[int] = (),
        bos_id: int | None = None,
        pad: str | None = None,
        files: Mapping[str, bytes] | None = None,
        notes: Sequence[str] = (),
        template: str | None = None,
        token_names: Mapping[str, str] | None = None,
    ) -> None:
        """Wrap a `tokenizers.Tokenizer`.

        Args:
            backend: the tokenizer to wrap.
            eos: the end-of-text token.
            source: name of the tokenizer in errors.
            stop_ids: ids that end a completion; empty for the id of `eos` alone.
            bos_id: id of the token that begins every text; None if there is none.
            pad: the padding token; None chooses one by the rule of `pad_id`.
            files: contents of the folder's files by path, which `save` writes again.
            notes: lines for the user about the folder it was read from.
            template: the chat template; None if there is none.
            token_names: special tokens by the names that templates use, such as `bos_token`.

        Raises:
            UserError: `eos` is not in the vocabulary.
            ValueError: the template is not valid.
        """
        eos_id = backend.token_to_id(eos)
        if eos_id is None:
            raise UserError(f"{source}: the tokenizer has no end-of-text token {eos!r}; add it to the vocabulary")
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()
        self._backend, self._pad, self._files, self._source = backend, pad, dict(files or {}), source
        self._token_names = {"eos_token": eos} | dict(token_names or {})
        self.eos = eos
        self.eos_id = eos_id
        self.stop_ids: tuple[int, ...] = tuple(stop_ids) or (eos_id,)
        self.bos_id = bos_id
        self.notes = tuple(notes)
        self.special_ids = frozenset(
            number for number, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self.chat_template = None if template is None else ChatTemplate(template, self._token_names)
        self.end_of_turn_id = self._find_end_of_turn()
        if self.end_of_turn_id not in self.stop_ids:
            self.stop_ids += (self.end_of_turn_id,)
        vocabulary = backend.get_vocab()
        self.vocab_size: int = max(vocabulary.values()) + 1
        if holes := self.vocab_size - len(set(vocabulary.values())):
            self.notes += (f"{source}: {holes} ids below {self.vocab_size} have no token, yet a model can draw them",)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Train a byte-level BPE of at most `vocab_size` entries, with special tokens 0 (end of text) and 1 (padding).

        The same texts give the same tokenizer. Small texts may yield fewer merges and so fewer entries.
        """
        return cls(train_backend(texts, vocab_size), EOS, "trained tokenizer")

    @classmethod
    def load(cls, folder: Path, rows: int | None = None) -> "Tokenizer":
        """Read a tokenizer folder.

        Args:
            folder: folder with files as `transformers` saves them.
            rows: number of rows of the embedding of the folder's model; None if there is no model.

        Raises:
            UserError: files are missing, damaged or contradictory, or there is no end-of-text token.
        """
        backend, notes = read_backend(folder, rows)
        end, pad, files = read_end_of_text(folder, backend), read_pad_token(folder), read_files(folder)
        notes += end.notes
        bos_id = read_bos_id(backend)
        template, token_names = read_template(folder), read_token_names(folder)
        try:
            ChatTemplate(template or "", token_names)
        except ValueError as error:  # texts can be read without
            template, notes = None, (*notes, f"{folder}: {error}; the template is not used")
        return cls(
            backend,
            end.token,
            str(folder),
            stop_ids=end.stop_ids,
            bos_id=bos_id,
            pad=pad,
            files=files,
            notes=notes,
            template=template,
            token_names=token_names,
        )

    def with_template(self, template: str) -> "Tokenizer":
        """Return the tokenizer with another chat template, which `save` writes.

        Raises:
            ValueError: the template is not valid, or writes a control token that the vocabulary lacks.
        """
        for name in control_tokens(template):
            if self._backend.token_to_id(name) is None:
                raise ValueError(
                    f"the template writes {name}, which is not a token of the tokenizer; choose another template"
                )
        return Tokenizer(
            self._backend,
            self.eos,
            self._source,
            stop_ids=self.stop_ids,
            bos_id=self.bos_id,
            pad=self._pad,
            files=with_template(self._files, template) if self._files else None,
            notes=self.notes,
            template=template,
            token_names=self._token_names,
        )

    def save(self, folder: Path, *, pads_with_eos: bool = True) -> None:
        """Write the files that `transformers.AutoTokenizer` reads; files it was read from are written unchanged.

        Args:
            folder: the folder to write to.
            pads_with_eos: True keeps a setting that the end-of-text token is the padding token. Pass False for reward
                models, whose score `transformers` reads at the last token that is not padding.
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
        if self.chat_template is not None:
            write_files(folder, with_template({}, self.chat_template.source))
        self._backend.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, without special tokens."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_rendered(self, texts: Sequence[str], mark: str = "") -> list[list[int]]:
        """Return the token ids of texts in which special tokens are written out, as a chat template does.

        Args:
            texts: texts to encode.
            mark: a character that is left out of the ids; a special token with it inside stays text.
        """
        if mark and any(mark in text for text in texts):
            return [self._encode_marked(text, mark) for text in texts]
        return [encoding.ids for encoding in self._writing.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _encode_marked(self, text: str, mark: str) -> list[int]:
        (found,) = self._writing.encode_batch([text], add_special_tokens=False)
        ids, place = list[int](), 0
        for number, (start, end) in zip(found.ids, found.offsets, strict=True):
            if number in self.special_ids:
                ids += [*self.encode([text[place:start].replace(mark, "")])[0], number]
                place = end
        return ids + self.encode([text[place:].replace(mark, "")])[0]

    @functools.cached_property
    def _writing(self) -> Backend:
        """The tokenizer that encodes a special token's text as that token."""
        return Backend.from_str(self._backend.to_str())

    def _find_end_of_turn(self) -> int:
        """Return the id that ends the assistant's turn in the chat template; end-of-text if there is none."""
        if self.chat_template is None:
            return self.eos_id
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            text = self.chat_template.render(turns).text
        except ValueError:  # the template asks for more; its own error shows with the first record
            return self.eos_id
        ((*_, after),) = [text.rsplit("b", 1)]
        ids = [number for number in self.encode_rendered([after])[0] if number in self.special_ids]
        return ids[0] if ids else self.eos_id

    def begin(self, ids: Sequence[int], limit: int | None = None) -> list[int]:
        """Return the token ids of a prompt as the model reads them.

        The token that begins every text comes first, once. An empty prompt is the end-of-text token.

        Args:
            ids: token ids of the prompt's text, from `encode`.
            limit: maximum number of tokens, at least 1; a longer prompt is cut at its beginning, after the first token.
        """
        start = [] if self.bos_id is None else [self.bos_id]
        rest = list(ids[len(start) :] if start and list(ids[:1]) == start else ids)
        whole = start + rest or [self.eos_id]
        return whole if limit is None else self.cut(whole, limit)

    def cut(self, ids: Sequence[int], limit: int) -> list[int]:
        """Return the last `limit` token ids of a prompt; the first of several stays if it begins every text."""
        kept = list(ids[-limit:])
        if len(kept) > 1 and ids[0] == self.bos_id:
            kept[0] = ids[0]
        return kept

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids; special tokens are skipped, and bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode(list(tokens), skip_special_tokens=True)

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """Return the part of `decode(tokens)` that each token contributes; the parts join to exactly that text.

        A character whose bytes span several tokens belongs to the last of them; the others contribute "".
        """
        text = self.decode(tokens)
        parts = self._backend.decode_batch([[token] for token in tokens], skip_special_tokens=True)
        if "".join(parts) == text:
            return parts
        prefixes = [_common_prefix(self.decode(tokens[:end]), text) for end in range(1, len(tokens))]
        ends = [0, *itertools.accumulate(prefixes, max), len(text)]
        return [text[first:end] for first, end in itertools.pairwise(ends)]

    @property
    def special_tokens(self) -> list[str]:
        """Return the texts of the special tokens."""
        return [token.content for token in self._backend.get_added_tokens_decoder().values() if token.special]

    @property
    def fingerprint(self) -> str:
        """Return a hex digest that is equal for two tokenizers exactly if they encode alike."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()

    def same_vocabulary(self, other: "Tokenizer") -> bool:
        """Return whether both tokenizers have the same token for every id."""
        return self._backend.get_vocab() == other._backend.get_vocab()

    @property
    def pad_id(self) -> int | None:
        """Return the id of a token that no text contains, for padding; None if there is none.

        It is the padding token of the folder unless that is the end-of-text token, else `<|pad|>`, else the byte 0xFF,
        which UTF-8 never uses, else the last special token that neither begins nor ends texts.
        """
        special = [token for token in reversed(self.special_tokens) if token != self.eos]
        ids = [self._backend.token_to_id(token) for token in (self._pad, PAD, "ÿ", *special) if token is not None]
        taken = (None, self.eos_id, self.bos_id, *self.stop_ids[1:])
        return next((number for number in ids if number not in taken), None)


def _common_prefix(first: str, second: str) -> int:
    """Return the number of characters that two texts begin with in common."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, pair in pairs if pair[0] != pair[1]), min(len(first), len(second)))
