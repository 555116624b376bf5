"""Chat templates: Jinja templates that render a conversation as the text that a model reads.

A template is untrusted code that comes with a model. It therefore runs in Jinja's immutable sandbox, with the
extensions, filters and functions that `transformers` provides, and renders the same text.
"""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rlhf.errors import UserError
from rlhf.io.files import read_json, read_text
from rlhf.io.paths import is_file_name

NAMED_TEMPLATES = {
    "chatml": """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + \
'<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    "plain": """{% for message in messages %}{% if message['role'] == 'user' %}\
{{ '\\n\\nHuman: ' + message['content'] }}{% elif message['role'] == 'assistant' %}\
{{ '\\n\\nAssistant: ' + message['content'] + eos_token }}{% else %}\
{{ '\\n\\n' + message['role'] | capitalize + ': ' + message['content'] }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}""",
}
"""Templates that ship with the library: ChatML, which needs its two special tokens, and the plain text of HH data."""

_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
"""Characters that Unicode reserves for internal use, which mark positions in rendered text."""
_FAILURES = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_CONTROL = re.compile(r"<\|\w+\|>")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Rendered(NamedTuple):
    """A conversation as text."""

    text: str
    spans: list[tuple[int, int]]
    """Ranges [start, end) of `text` that `{% generation %}` encloses."""


class ChatTemplate:
    """A chat template with the special tokens that it names."""

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        """Compile a template.

        Args:
            source: text of the template.
            tokens: special tokens by name, such as `eos_token`.

        Raises:
            ValueError: the template is not valid.
        """
        self.source, self._tokens = source, dict(tokens)
        self.marks_generation = _GENERATION.search(source) is not None
        self._template = _compile(source)

    @property
    def digest(self) -> str:
        """Return a hex digest of the template, and of the day if the template writes it."""
        day = datetime.now().strftime("%Y-%m-%d") if "strftime_now" in self.source else ""
        return hashlib.sha256(f"{self.source}:{day}:{sorted(self._tokens.items())}".encode()).hexdigest()

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False) -> Rendered:
        """Return a conversation as text, as `transformers` does with `apply_chat_template(tokenize=False)`.

        Args:
            messages: turns of the conversation, each with a role and a content.
            add_generation_prompt: True appends the text that precedes the assistant's next answer.

        Raises:
            ValueError: the template refuses the conversation or fails.
        """
        try:
            text: str = self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._tokens,
            )
        except _FAILURES as error:
            raise ValueError(f"the chat template refuses the conversation ({error})") from error
        start, end = _MARKS[:2]
        if not self.marks_generation:
            return Rendered(text, [])
        parts, spans, length = re.split(f"([{start}{end}])", text), [], 0
        plain: list[str] = []
        for part in parts:
            if part == start:
                spans.append((length, length))
            elif part == end:
                spans[-1] = (spans[-1][0], length)
            else:
                plain.append(part)
                length += len(part)
        return Rendered("".join(plain), spans)


def control_tokens(source: str) -> list[str]:
    """Return the distinct parts of a template that look like control tokens, such as `<|im_end|>`."""
    return list(dict.fromkeys(_CONTROL.findall(source)))


def load_template(name: str) -> str:
    """Return the template of a name in `NAMED_TEMPLATES`, or in a file.

    Raises:
        UserError: there is no such name or file.
    """
    if name in NAMED_TEMPLATES:
        return NAMED_TEMPLATES[name]
    path = Path(name).expanduser()
    if not is_file_name(name) and not path.is_file():
        named = ", ".join(NAMED_TEMPLATES)
        raise UserError(f"--data.template {name}: no such template; there are {named}, or name a file with one")
    return read_text(path)


def read_template(folder: Path) -> str | None:
    """Return the chat template of a tokenizer folder; None if it has none.

    Raises:
        UserError: a file cannot be read.
    """
    if (folder / "chat_template.jinja").is_file():
        return read_text(folder / "chat_template.jinja")
    template = _settings(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several by name
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    return template if isinstance(template, str) else None


def read_token_names(folder: Path) -> dict[str, str]:
    """Return the special tokens that a folder's settings name, by names such as `bos_token`."""
    tokens: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        settings = _settings(folder / file)
        for name in _NAMES:
            value = settings.get(name)
            content = value.get("content") if isinstance(value, dict) else value
            tokens |= {name: content} if isinstance(content, str) else {}
    return tokens


def unused_mark(texts: Sequence[str]) -> str:
    """Return a character that is in none of the texts, to mark positions in rendered text."""
    used = {mark for text in texts for mark in _MARKS if mark in text}
    return next((mark for mark in _MARKS[2:] if mark not in used), "")


def _settings(path: Path) -> dict[str, Any]:
    value = read_json(path) if path.is_file() else {}
    return value if isinstance(value, dict) else {}


class _Generation(Extension):
    """The tag {% generation %}, which puts marks around the text that the assistant writes."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        start, end = _MARKS[:2]
        return f"{start}{caller()}{end}"


@functools.lru_cache(maxsize=32)
def _compile(source: str) -> Any:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _make_dict
    try:
        return environment.from_string(source)
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        raise ValueError(f"not a valid chat template ({error}{f', line {line}' if line else ''})") from error


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)
