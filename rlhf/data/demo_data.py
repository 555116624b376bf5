"""The embedded example: a fictional customer service, generated from a seed, and the gold score of its replies.

Demonstrations are replies of mixed quality; preference pairs are two such replies, compared by simulated annotators who
make errors; prompts are customers' messages. The annotators approximate `gold_score`, which training never sees and
which evaluates the result.
"""

import json
import math
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from rlhf.errors import UserError
from rlhf.io.files import clear_write_errors, write_bytes

ITEMS = (
    "tea", "lamp", "kettle", "scarf", "novel", "camera", "guitar", "jacket", "clock", "mug", "tent", "radio", "desk",
    "pillow", "printer", "blender", "rug", "helmet", "backpack", "bicycle",
)  # fmt: skip
_PROBLEMS = (
    "arrived late", "arrived broken", "has the wrong colour", "is too small", "stopped working", "has a scratch",
    "never arrived", "is missing a part",
)  # fmt: skip
_OPENINGS = ("My", "Hello, my", "I am upset, my new", "Can you help? My")
_APOLOGIES = ("I am sorry about your {item}.", "Sorry that your {item} {problem}.", "We apologise for the {item}.")
_DISMISSALS = ("That is not my problem.", "These things happen.", "You should read the label.")
_REMEDIES = ("We will send you a new one today.", "We will refund you in full.", "We will repair it for free.")
_DELAYS = ("Please wait a few weeks.", "Nothing can be done.", "Ask somebody else.")
_CLOSINGS = ("Thank you for your patience.", "Have a lovely day.", "We are glad to help.")
_BRUSH_OFFS = ("Do not write again.", "Stop complaining.", "I am busy now.")

_KIND = re.compile(r"\b(sorry|apologise)\b")
_HELPFUL = re.compile(r"\b(send you a new one|refund you|repair it)\b")
_WARM = re.compile(r"\b(thank you|lovely day|glad to help)\b")
_RUDE = re.compile(
    r"\b(not my problem|things happen|read the label|few weeks|nothing can be done|somebody else|not write again|"
    r"stop complaining|busy now)\b"
)

PROMPT_COLUMNS = ("prompt", "item")


class EmbeddedFiles(NamedTuple):
    """Paths of the files that `write_embedded` writes."""

    demonstrations: Path
    preferences: Path
    prompts: Path
    heldout_prompts: Path
    """Prompts for evaluation, whose combinations of item and problem do not occur in training."""


def gold_score(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """Return gold scores of replies: one point each for an apology, the customer's item, a remedy and a kind closing.

    A rude or unhelpful phrase, another item, a repeated sentence and an unfinished sentence cost one point each. A
    perfect reply scores 4.

    Args:
        prompts: prompts written by `write_embedded`.
        completions: replies.
        **columns: ignored; part of the signature of reward functions.
    """
    return [_judge(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def write_embedded(folder: Path, *, seed: int = 0, size: int = 6000) -> EmbeddedFiles:
    """Write the example's four JSON files.

    Args:
        folder: the folder, created if missing.
        seed: seed of the generator; the same seed gives the same bytes.
        size: number of demonstrations, and of preference pairs.

    Raises:
        UserError: the folder cannot be written, or a file in it has other content.
    """
    rng = random.Random(seed)
    pairs = [(item, problem) for item in ITEMS for problem in _PROBLEMS]
    rng.shuffle(pairs)
    cases = [(opening, item, problem) for item, problem in pairs for opening in _OPENINGS]
    heldout, known = cases[:200], cases[200:]
    files = EmbeddedFiles(*(folder / f"{name}.json" for name in EmbeddedFiles._fields))
    contents = {
        files.demonstrations: _json(_demonstration(rng, rng.choice(known)) for _ in range(size)),
        files.preferences: _json(_preference(rng, rng.choice(known)) for _ in range(size)),
        files.prompts: _json(map(_prompt_record, known)),
        files.heldout_prompts: _json(map(_prompt_record, heldout)),
    }
    for path, content in contents.items():
        if path.exists() and not (path.is_file() and path.read_bytes() == bytes(content, "utf-8")):
            raise UserError(
                f"{path}: already exists, and is not what the example would write; name it as the data file if it "
                "is yours, or choose another --output-dir"
            )
    with clear_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for path, content in contents.items():
        if not path.exists():
            write_bytes(path, content.encode())
    return files


def _judge(prompt: str, completion: str) -> float:
    text = completion.lower()
    words = set(re.findall(r"[a-z]+", text))
    items = {item for item in ITEMS if item in prompt.lower()}
    sentences = [sentence.strip() for sentence in re.findall(r"[^.]+\.", text)]
    merits = bool(_KIND.search(text)) + bool(words & items) + bool(_HELPFUL.search(text)) + bool(_WARM.search(text))
    faults = len(_RUDE.findall(text)) + len(words & (set(ITEMS) - items)) + len(sentences) - len(set(sentences))
    return float(merits - faults - (not text.rstrip().endswith(".")))


def _demonstration(rng: random.Random, case: tuple[str, str, str]) -> dict[str, str]:
    return {"prompt": _prompt(*case), "completion": _reply(rng, case)}


def _preference(rng: random.Random, case: tuple[str, str, str]) -> dict[str, str]:
    """Return two different replies, ordered by an annotator who errs according to the Bradley-Terry model."""
    prompt, first, second = _prompt(*case), _reply(rng, case), _reply(rng, case)
    while second == first:
        second = _reply(rng, case)
    difference = _judge(prompt, first) - _judge(prompt, second)
    if rng.random() > 1.0 / (1.0 + math.exp(-2.0 * difference)):
        first, second = second, first
    return {"prompt": prompt, "chosen": first, "rejected": second}


def _prompt_record(case: tuple[str, str, str]) -> dict[str, str]:
    return dict(zip(PROMPT_COLUMNS, (_prompt(*case), case[1]), strict=True))


def _prompt(opening: str, item: str, problem: str) -> str:
    return f"Customer: {opening} {item} {problem}.\nAgent:"


def _reply(rng: random.Random, case: tuple[str, str, str]) -> str:
    """Return a reply of up to three sentences, each good, bad or missing."""
    _, item, problem = case
    named = item if rng.random() < 0.8 else rng.choice(ITEMS)
    parts = []
    for good, bad in ((_APOLOGIES, _DISMISSALS), (_REMEDIES, _DELAYS), (_CLOSINGS, _BRUSH_OFFS)):
        draw = rng.random()
        if draw < 0.8:
            parts.append(rng.choice(good if draw < 0.4 else bad).format(item=named, problem=problem))
    return " " + " ".join(parts or [rng.choice(_DISMISSALS)])


def _json(records: Iterable[dict[str, str]]) -> str:
    return "[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n"
