"""Text from a model is a stranger's: what of it may reach a terminal."""

import re

_UNSAFE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and line feed: C0, DEL, C1
    r"\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks that turn the direction of the text around
    r"\u2028\u2029\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""The text with every character that could steer a terminal written out: ESC as `\x1b`, U+202E as `\u202e`."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
