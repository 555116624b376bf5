"""Reading and writing the files of a tokenizer folder, in every form that `transformers` saves.

`tokenizer.json` holds everything; older folders have GPT-2's `vocab.json` and `merges.txt` with `added_tokens.json`.
`tokenizer_config.json` and `special_tokens_map.json` name more tokens, and the model's `config.json` and
`generation_config.json` name tokens that end a text.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from rlhf.errors import UserError
from rlhf.io.files import check_folder, read_json
from rlhf.io.near_misses import pointer_remedy

EOS = "<|endoftext|>"
PAD = "<|pad|>"

_FILES = (
    "tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
    "tokenizer_config.json", "chat_template.jinja",
)  # fmt: skip
_SPECIAL = ("bos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_EXTRA = ("additional_special_tokens", "extra_special_tokens")


class EndOfText(NamedTuple):
    """The tokens that end a text."""

    token: str
    """The token appended to texts in training."""
    stop_ids: tuple[int, ...]
    """All ids that end a completion."""
    notes: tuple[str, ...]
    """Lines for the user about disagreements between the folder's files."""


def byte_level(model: models.BPE, *, add_prefix_space: bool = False) -> Backend:
    """Return a byte-level BPE without special tokens."""
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    return backend


def read_backend(folder: Path, rows: int | None) -> tuple[Backend, tuple[str, ...]]:
    """Return the tokenizer that a folder's files describe, and lines for the user.

    Args:
        folder: the tokenizer folder.
        rows: number of rows of the model's embedding, below which a special token without an id gets one; None sets no
            limit.

    Raises:
        UserError: files are missing or damaged, or contradict each other about a token's id.
    """
    check_folder(folder, "it should hold tokenizer.json, or vocab.json and merges.txt")
    settings = _read_object(folder / "tokenizer_config.json")
    special_map = _read_object(folder / "special_tokens_map.json")
    backend = _read_vocabulary(folder, settings)
    declared = _declared_tokens(folder, settings)
    named, special = _named_tokens(folder, settings, special_map)
    _add_tokens(backend, [token for _, token in sorted(declared.values(), key=lambda entry: entry[0])], special)
    for content, (number, _) in declared.items():
        if backend.token_to_id(content) != number:
            raise UserError(
                f"{folder}: gives the added token {content!r} the id {number}, but by the vocabulary it has "
                f"{backend.token_to_id(content)}; the files are of different tokenizers, save them again"
            )
    missing = [token for token in named if backend.token_to_id(token.content) is None]
    room = len(missing) if rows is None else max(rows - _size(backend), 0)
    _add_tokens(backend, [token for token in named if token not in missing[room:]], special)
    if not missing[room:]:
        return backend, ()
    names = ", ".join(repr(token.content) for token in missing[room:])
    return backend, (f"{folder}: names {names}, for which the model has no embedding; not used",)


def read_end_of_text(folder: Path, backend: Backend) -> EndOfText:
    """Return the end-of-text tokens, in the order tokenizer_config, special_tokens_map, config, generation_config.

    Raises:
        UserError: a file is damaged, or the token is not in the vocabulary.
    """
    names: dict[str, list[str]] = {}
    notes = []
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _content(folder / file, "eos_token", _read_object(folder / file).get("eos_token"))
        if token is not None:
            names.setdefault(token, []).append(file)
    for file in ("config.json", "generation_config.json"):
        for number in read_ids(folder / file, "eos_token_id", _read_object(folder / file).get("eos_token_id")):
            token = backend.id_to_token(number)
            if token is None:
                notes.append(f"{folder / file}: eos_token_id {number} is not an id of the tokenizer; not used")
            else:
                names.setdefault(token, []).append(file)
    end, *further = names or {EOS: []}
    if backend.token_to_id(end) is None:
        raise UserError(f"{folder}: the tokenizer has no end-of-text token {end!r}; add it to the vocabulary")
    further = [token for token in further if backend.token_to_id(token) is not None]
    if further:
        texts = ", ".join(f"{token!r} ({', '.join(names[token])})" for token in (end, *further))
        notes.append(
            f"{folder}: names several end-of-text tokens, {texts}; each of them ends a completion, and texts that are "
            f"learnt or scored end with {end!r}"
        )
    stop_ids = tuple(stop for token in (end, *further) if (stop := backend.token_to_id(token)) is not None)
    return EndOfText(end, stop_ids, tuple(notes))


def read_bos_id(backend: Backend) -> int | None:
    """Return the id of the token that the tokenizer's post-processor puts before every text; None if there is none."""
    plain, whole = (backend.encode("a", add_special_tokens=added).ids for added in (False, True))
    return None if whole[:1] == plain[:1] else whole[0]


def read_pad_token(folder: Path) -> str | None:
    """Return the padding token of tokenizer_config.json, or else of special_tokens_map.json."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _content(folder / file, "pad_token", _read_object(folder / file).get("pad_token"))
        if token is not None:
            return token
    return None


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the contents of a tokenizer folder's files, by path inside the folder."""
    paths = [folder / name for name in _FILES] + sorted((folder / "additional_chat_templates").glob("*.jinja"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.is_file()}


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the files that `read_files` returns to a folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def without_pad_token(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return `files` without the settings of a padding token."""
    changed = dict(files)
    for name in {"tokenizer_config.json", "special_tokens_map.json"} & files.keys():
        settings = json.loads(files[name].decode("utf-8-sig"))
        settings.pop("pad_token", None)
        changed[name] = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
    return changed


def with_template(files: Mapping[str, bytes], template: str) -> dict[str, bytes]:
    """Return `files` with another chat template, stored only in a file of its own."""
    changed = dict(files) | {"chat_template.jinja": template.encode()}
    if b'"chat_template"' in changed.get("tokenizer_config.json", b""):
        settings = json.loads(changed["tokenizer_config.json"].decode("utf-8-sig"))
        settings.pop("chat_template", None)
        changed["tokenizer_config.json"] = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
    return changed


def read_ids(path: Path, key: str, value: Any) -> list[int]:
    """Return the token ids of a setting that is a number, a list or null.

    Args:
        path: file of the setting, for errors.
        key: name of the setting, for errors.
        value: value of the setting.

    Raises:
        UserError: the value is anything else.
    """
    numbers = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(number) is not int or number < 0 for number in numbers):
        raise UserError(f"{path}: {key} must be a token id or a list of such, got {value!r}")
    return numbers


def _read_vocabulary(folder: Path, settings: Mapping[str, Any]) -> Backend:
    complete, vocab, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    prefix = settings.get("add_prefix_space")
    if prefix not in (None, True, False):
        raise UserError(f"{folder / 'tokenizer_config.json'}: add_prefix_space must be true or false, got {prefix!r}")
    try:
        if complete.is_file():
            backend = Backend.from_file(str(complete))
            if str(settings.get("tokenizer_class")).startswith("GPT2Tokenizer"):  # reads its settings alone
                pre = backend.pre_tokenizer
                if isinstance(pre, pre_tokenizers.ByteLevel) and pre.add_prefix_space != bool(prefix):
                    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(prefix))
            return backend
        if vocab.is_file() and merges.is_file():
            backend = byte_level(models.BPE.from_file(str(vocab), str(merges)), add_prefix_space=bool(prefix))
            backend.add_special_tokens([token for token in (EOS, PAD) if backend.token_to_id(token) is not None])
            return backend
    except Exception as error:  # the library raises bare Exception for anything wrong with a file
        for path in (complete, vocab, merges):
            if remedy := pointer_remedy(path):
                raise UserError(f"{path}: {remedy}") from error
        raise UserError(f"{folder}: the tokenizer cannot be read ({error})") from error
    raise UserError(f"{folder}: has neither tokenizer.json nor vocab.json and merges.txt; save them there")


def _declared_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[str, tuple[int, AddedToken]]:
    """Return the added tokens with an id, by content."""
    path = folder / "tokenizer_config.json"
    declared: dict[str, tuple[int, AddedToken]] = {}
    entries: list[tuple[Path, Any, Any]] = []
    if (folder / "tokenizer.json").is_file():
        file = folder / "tokenizer.json"
        added = _read_object(file).get("added_tokens") or []
        entries += [(file, fields.get("id"), fields) for fields in added]
    if "added_tokens_decoder" in settings:
        decoder = settings["added_tokens_decoder"]
        if not isinstance(decoder, dict):
            raise UserError(f"{path}: added_tokens_decoder must be an object, got {decoder!r}")
        entries += [(path, number, fields) for number, fields in decoder.items()]
    else:
        path = folder / "added_tokens.json"
        entries += [(path, number, {"content": content}) for content, number in _read_object(path).items()]
    for file, number, fields in entries:
        try:
            flags = {name: fields[name] for name in _FLAGS if name in fields}
            declared[fields["content"]] = (int(number), AddedToken(fields["content"], **flags))
        except (TypeError, ValueError, KeyError) as error:
            raise UserError(f"{file}: {fields!r} with id {number!r} is not an added token") from error
    return declared


def _named_tokens(
    folder: Path, settings: Mapping[str, Any], special_map: Mapping[str, Any]
) -> tuple[list[AddedToken], set[str]]:
    """Return (the special tokens in the settings except end-of-text tokens, the texts of all special tokens)."""
    contents: dict[str, None] = {}
    ends = set()
    for file, entries in (("tokenizer_config.json", settings), ("special_tokens_map.json", special_map)):
        path = folder / file
        end = _content(path, "eos_token", entries.get("eos_token"))
        ends |= set() if end is None else {end}
        for key in _SPECIAL:
            token = _content(path, key, entries.get(key))
            contents |= {} if token is None else {token: None}
        for key in _EXTRA:
            extra = entries.get(key) or []
            if not isinstance(extra, list | dict):
                raise UserError(f"{path}: {key} must be a list of tokens, got {extra!r}")
            for value in extra.values() if isinstance(extra, dict) else extra:
                contents |= {str(_content(path, key, value)): None}
    return [AddedToken(content, special=True) for content in contents if content not in ends], {*contents, *ends}


def _add_tokens(backend: Backend, tokens: list[AddedToken], special: set[str]) -> None:
    """Add tokens, or update the flags of tokens that were added before."""
    present = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for token in tokens:
        if token.content in special:
            token.special = True
        if repr(token) != repr(present.get(token.content)):
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])


def _read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; empty if there is no file."""
    if not path.is_file():
        return {}
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise UserError(f"{path}: is not a JSON object")
    return settings


def _content(path: Path, key: str, value: Any) -> str | None:
    """Return the text of a token that is written as a text or an object with `content`; None for null."""
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str) and value is not None:
        raise UserError(f"{path}: {key} must be a text, got {value!r}")
    return content


def _size(backend: Backend) -> int:
    return max(backend.get_vocab().values(), default=-1) + 1
