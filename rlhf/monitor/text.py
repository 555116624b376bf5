"""Text of unknown origin, made safe to draw."""

import unicodedata

_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode categories that draw nothing, or change how their neighbours are drawn."""


def visible(text: str) -> str:
    r"""`text` on one line, with everything that a terminal or a font would act on spelt out, such as \x1b or \u202e."""
    return "".join(
        "↵"
        if char == "\n"
        else " "
        if char == "\t"
        else _escape(char)
        if unicodedata.category(char) in _HIDDEN
        else char
        for char in text
    )


def shorten(text: str, width: int) -> str:
    """The beginning of `text`, at most `width` characters with the ellipsis."""
    return text if len(text) <= width else f"{text[: max(width - 1, 0)]}…"


def _escape(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
