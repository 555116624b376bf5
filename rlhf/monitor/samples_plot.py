"""The plot of the policy's newest completions beside its first ones."""

import functools
import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf.io.printable_text import shorten, visible
from rlhf.monitor.log import LogReader

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROWS = 6
_FIRST, _LAST = 2048, 256
"""Numbers of completions among which the first and the newest ones are chosen."""
_COLUMNS = (34, 44, 44)  # characters of prompt, before, now
_LONGEST = 220  # characters shown of a text
_LONGEST_NAME = 50  # characters shown of the run's name
_LINE, _CHARACTER = 0.155, 0.0775  # inches of the 9 pt mono font
_GAP = 3  # characters between columns
_FONT = "DejaVu Sans Mono"


def draw_samples(reader: LogReader, name: str = "") -> "Figure | None":
    """Draw completions of the newest iteration by falling score, beside the first completions of the same prompts.

    Args:
        reader: log of the run.
        name: name of the run, which the title says if there are others.
    """
    rows = choose(reader)
    if not rows:
        return None
    from matplotlib.figure import Figure

    now = f"now: {reader.progress('ppo').unit} {rows[0][1]['step']}"
    heads = ["prompt", "at first" if any(before for before, _ in rows) else "", now]
    cells = [[_wrap(now["prompt"], 0), _cell(before, 1, step=True), _cell(now, 2)] for before, now in rows]
    heights = [max(map(len, row)) + 1 for row in cells]
    lines = sum(heights) + 5
    width = (sum(_COLUMNS) + 2 * _GAP + 4) * _CHARACTER
    figure = Figure(figsize=(width, lines * _LINE + 0.3))
    write = functools.partial(figure.text, family=_FONT, fontsize=9, va="baseline", parse_math=False)
    left = [(2 + sum(_COLUMNS[:n]) + n * _GAP) * _CHARACTER / width for n in range(3)]
    title = "What does the policy say now?" + f" (first run: {visible(shorten(name, _LONGEST_NAME))})" * bool(name)
    figure.text(left[0], _at(1.5, figure), title, fontweight="bold", fontsize=11)
    for column, head in zip(left, heads, strict=True):
        write(column, _at(3.3, figure), head, color="#555555")
    top = 5.0
    for row, height in zip(cells, heights, strict=True):
        figure.add_artist(_rule(left[0], 1 - left[0], _at(top - 1.2, figure)))
        for column, texts in zip(left, row, strict=True):
            for line, text in enumerate(texts):
                write(column, _at(top + line, figure), text)
        top += height
    return figure


def choose(reader: LogReader) -> list[tuple[dict[str, Any] | None, dict[str, Any]]]:
    """Return (an earlier completion of the same prompt or None, a newest completion) pairs, by falling score."""
    store = reader.samples
    if not len(store):
        return []
    stage, step = store.offsets[-1][:2]
    newest = [s for s in store[-_LAST:] if s["stage"] == stage and s["step"] == step]
    earlier: dict[str, dict[str, Any]] = {}
    for sample in store[:_FIRST]:
        if sample["stage"] == stage and sample["step"] < step:
            earlier.setdefault(sample["prompt"], sample)
    pairs = [(earlier.get(sample["prompt"]), sample) for sample in newest]
    pairs = [pair for pair in pairs if pair[0]] or pairs
    pairs.sort(key=lambda pair: -_number(pair[1], "score"))
    return [pairs[place] for place in np.unique(np.linspace(0, len(pairs) - 1, _ROWS).round().astype(int))]


def _number(sample: dict[str, Any], name: str) -> float:
    value = sample.get(name)
    return float(value) if isinstance(value, int | float) else float("-inf")


def _cell(sample: dict[str, Any] | None, column: int, step: bool = False) -> list[str]:
    """Draw a completion with its figures below."""
    if sample is None:
        return ["(this prompt has no earlier one)"] if step else []
    figures = [
        f"{label} {_number(sample, name):z.2f}"
        for name, label in (("score", "score"), ("kl", "KL"))
        if _number(sample, name) > float("-inf")
    ]
    return [
        *_wrap(sample["completion"], column),
        "→ " + ", ".join([*figures, *([f"iteration {sample['step']}"] if step else [])]),
    ]


def _wrap(text: str, column: int) -> list[str]:
    shown = shorten("".join(char if ord(char) in _glyphs() else "□" for char in visible(text.strip())), _LONGEST)
    return textwrap.wrap(shown, _COLUMNS[column], break_on_hyphens=False) or ["(empty)"]


@functools.cache
def _glyphs() -> frozenset[int]:
    """Return the characters that the font has."""
    from matplotlib.font_manager import findfont, get_font

    return frozenset(get_font(findfont(_FONT)).get_charmap())


def _at(line: float, figure: "Figure") -> float:
    return float(1 - line * _LINE / figure.get_figheight())


def _rule(left: float, right: float, height: float) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([left, right], [height, height], color="#cccccc", linewidth=0.8)
