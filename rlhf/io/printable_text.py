"""Untrusted text, such as a model's, in a form that is safe to print in a terminal or draw in a figure."""

import re
import unicodedata

_UNSAFE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and line feed: C0, DEL, C1
    r"\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks that turn the direction of the text around
    r"\u2028\u2029\ud800-\udfff]"
)
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode categories that draw nothing, or change how their neighbours are drawn."""

EMPTY = "(empty)"
"""The mark in the place of a completion without visible text, on screens and not in files."""


def printable(text: str) -> str:
    r"""Return the text with characters that could steer a terminal escaped: ESC as `\x1b`, U+202E as `\u202e`."""
    return _UNSAFE.sub(lambda match: _escape(match[0]), text)


def visible(text: str) -> str:
    """Return the text on one line of known width: a line feed is ↵, and characters that draw nothing are escaped."""
    text = text.replace("\n", "↵").replace("\t", " ")
    return "".join(_escape(char) if unicodedata.category(char) in _HIDDEN else char for char in text)


def shorten(text: str, width: int) -> str:
    """Return the beginning of `text`, at most `width` characters with the ellipsis."""
    return text if len(text) <= width else f"{text[: max(width - 1, 0)]}…"


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
