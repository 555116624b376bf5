"""Text from a model is a stranger's: what of it may reach a terminal or a figure."""

import re
import unicodedata

_UNSAFE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and line feed: C0, DEL, C1
    r"\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks that turn the direction of the text around
    r"\u2028\u2029\ud800-\udfff]"
)
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode categories that draw nothing, or change how their neighbours are drawn."""


def printable(text: str) -> str:
    r"""The text with every character that could steer a terminal written out: ESC as `\x1b`, U+202E as `\u202e`."""
    return _UNSAFE.sub(lambda found: _written_out(found[0]), text)


def visible(text: str) -> str:
    """The text on one line of known width: a line feed is ↵, and all that draws nothing is written out, too."""
    text = text.replace("\n", "↵").replace("\t", " ")
    return "".join(_written_out(char) if unicodedata.category(char) in _HIDDEN else char for char in text)


def shorten(text: str, width: int) -> str:
    """The beginning of `text`, at most `width` characters with the ellipsis."""
    return text if len(text) <= width else f"{text[: max(width - 1, 0)]}…"


def _written_out(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
