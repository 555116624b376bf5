"""Truncation of records longer than the context.

The completion takes precedence over the prompt, and its beginning over its end:

    1. The prompt is cut at its beginning until the record fits, but keeps at least half of the context.
    2. If that is not enough, the completion is cut at its end and loses the end-of-text token.

Both completions of a preference pair keep the same prompt, the one that the longer completion leaves room for. A PPO
prompt is cut at its beginning until max_new_tokens fit after it.
"""

from typing import NamedTuple


class Truncation(NamedTuple):
    """The tokens of a record that are kept."""

    prompt: int
    """Number of tokens kept from the prompt's end."""
    completion: int
    """Number of tokens kept from the completion's beginning."""
    ends: bool
    """True if the end-of-text token follows, as it does after a whole completion."""


def truncate(prompt: int, completion: int, max_length: int, *, longest: int | None = None) -> Truncation:
    """Return the lengths of a record truncated to `max_length` tokens.

    Args:
        prompt: number of tokens of the prompt, at least 1.
        completion: number of tokens of the completion, without end-of-text.
        max_length: maximum number of tokens in total, at least 2.
        longest: length of the pair's longer completion, which determines the prompt's; None is `completion`.
    """
    needed = max(completion, longest or 0) + 1
    prompt_length = min(prompt, max(max_length - needed, max_length // 2))
    room = max_length - prompt_length
    return Truncation(prompt_length, min(completion, room), completion < room)
