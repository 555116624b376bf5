"""The text that stands around every prompt of a data file, such as the names of who speaks in dialogues."""

from collections.abc import Sequence

_FEWEST = 10
"""Number of different prompts below which a shared beginning or end may be chance."""


def common_template(prompts: Sequence[str]) -> str:
    r"""Return a template with `{prompt}` for the part in which prompts differ; `{prompt}` alone if they share nothing.

    What they share is cut back to whole words, so that prompts which merely begin with the same letter share nothing.

    Example:
        >>> common_template([f"Customer: item {n} broke.\nAgent:" for n in range(20)])
        'Customer: item {prompt} broke.\nAgent:'
    """
    different = set(prompts)
    if len(different) < _FEWEST:
        return "{prompt}"
    before = _shared_beginning(different)
    before = before[: max((place + 1 for place, sign in enumerate(before) if sign.isspace()), default=0)]
    after = _shared_beginning({prompt[len(before) :][::-1] for prompt in different})[::-1]
    start = next((place for place, sign in enumerate(after) if sign.isspace()), len(after))
    return f"{before}{{prompt}}{after[start:]}"


def _shared_beginning(texts: set[str]) -> str:
    first, last = min(texts), max(texts)
    return first[: next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


def frame(template: str, prompt: str) -> str:
    """Return a prompt within a template; one that is framed already stays as it is."""
    before, _, after = template.partition("{prompt}")
    if before + after and prompt.startswith(before) and prompt.endswith(after):
        return prompt
    return template.replace("{prompt}", prompt)
