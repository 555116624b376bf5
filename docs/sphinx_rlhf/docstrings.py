"""Docstrings of this project as Markdown: prose, equations, and the sections Args, Returns, Raises and Example."""

import re
import textwrap
from collections.abc import Callable, Mapping

_SECTION = re.compile(r"^(Args|Returns|Yields|Raises|Example|Examples|Attributes):\n", re.MULTILINE)
_ENTRY = re.compile(r"^(\*{0,2}\w+(?:, \w+)*): ", re.MULTILINE)
_CODE = re.compile(r"`[^`]+`|https?://[^\s<>]*[^\s<>.,;:)]")

Link = Callable[[str], str | None]
"""Name in backticks -> the full name of the object that it refers to, or None."""


def to_markdown(docstring: str, *, link: Link, annotations: Mapping[str, str] | None = None) -> str:
    """Return the Markdown of a docstring.

    Args:
        docstring: cleaned, as `inspect.cleandoc` does.
        link: finds what a name in backticks refers to.
        annotations: of the arguments, by name.
    """
    body, *sections = _SECTION.split(docstring + "\n")
    parts = [_prose(body, link)]
    for title, text in zip(sections[::2], sections[1::2], strict=True):
        content, rest = _indented(text)
        if title.startswith("Example"):
            parts.append(f"**Example**\n\n{_example(content, link)}")
        else:
            known = annotations or {} if title == "Args" else {}
            parts.append(f"**{title}**\n\n{_entries(content, link, known)}")
        parts.append(_prose(rest, link))
    return "\n\n".join(part for part in parts if part.strip())


def first_line(docstring: str) -> str:
    """Return a docstring's first paragraph, in one line."""
    return " ".join(docstring.split("\n\n", maxsplit=1)[0].split())


def inline(text: str, link: Link) -> str:
    """Return one paragraph of prose as Markdown, with names in backticks linked."""
    pieces, last = [], 0
    for match in _CODE.finditer(text):
        pieces += [_escape(text[last : match.start()]), _linked(match.group(), link)]
        last = match.end()
    return "".join((*pieces, _escape(text[last:])))


def _linked(code: str, link: Link) -> str:
    """Return an address, or a name in backticks, as a link where it leads somewhere."""
    if not code.startswith("`"):
        return f"<{code}>"
    target = link(code[1:-1])
    return f"{{py:obj}}`{code[1:-1]} <{target}>`" if target else code


def _escape(text: str) -> str:
    return re.sub(r"([*<$\[\]#~|]|(?<!\w)_|_(?!\w))", r"\\\1", text)


def _prose(text: str, link: Link) -> str:
    """Return paragraphs; those that are indented are equations or code, and stay as they are."""
    blocks = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        if not block.strip():
            continue
        if all(line.startswith("    ") for line in block.splitlines()):
            blocks.append(_fence(textwrap.dedent(block)))
        elif block.startswith("Source:"):
            text = block.removeprefix("Source:").strip()
            blocks.append(f"**Source.** {inline(text[0].upper() + text[1:], link)}")
        else:
            blocks.append(inline(block, link))
    return "\n\n".join(blocks)


def _fence(code: str) -> str:
    is_code = any(word in code for word in ("register", "rlhf.", "def ", "import "))
    return f"```{'python' if is_code else 'text'}\n{code}\n```"


def _indented(text: str) -> tuple[str, str]:
    """Return the indented lines of a section, dedented, and the rest."""
    lines = text.splitlines()
    end = next((number for number, line in enumerate(lines) if line and not line.startswith(" ")), len(lines))
    return textwrap.dedent("\n".join(lines[:end])).strip("\n"), "\n".join(lines[end:])


def _entries(content: str, link: Link, annotations: Mapping[str, str]) -> str:
    pieces = _ENTRY.split("\n" + content if not _ENTRY.match(content) else content)
    head, names, texts = pieces[0], pieces[1::2], pieces[2::2]
    lines = [_prose(head, link)] if head.strip() else []
    for name, text in zip(names, texts, strict=True):
        kind = annotations.get(name, "")
        shown = f"- `{name}`" + (f" (`{kind}`)" if kind else "")
        lines.append(f"{shown}: {inline(' '.join(text.split()), link)}")
    return "\n".join(lines) if not head.strip() else "\n\n".join([lines[0], "\n".join(lines[1:])])


def _example(content: str, link: Link) -> str:
    """Return the interactive session of an example, with prose between its parts."""
    blocks = re.split(r"\n\s*\n", content)
    return "\n\n".join(
        f"```pycon\n{textwrap.dedent(block)}\n```" if ">>>" in block else _prose(block, link) for block in blocks
    )
