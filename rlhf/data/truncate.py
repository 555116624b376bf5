"""The rule for records longer than the context.

The completion matters more than the prompt, and its beginning more than its end:

    1. The prompt loses its beginning until everything fits, but keeps at least half of the context.
    2. If that is not enough, the completion loses its end, and with it the end-of-text token.

Preference pairs keep the same prompt on both sides: that which the longer one needs. A prompt for PPO loses its
beginning until max_new_tokens fit behind it.
"""

from typing import NamedTuple


class Fit(NamedTuple):
    """How much of one record is kept."""

    prompt: int
    """Tokens kept from the prompt's end."""
    completion: int
    """Tokens kept from the completion's beginning."""
    ends: bool
    """Whether the end-of-text token follows: only behind a whole completion."""


def fit(prompt: int, completion: int, max_length: int, *, longest: int | None = None) -> Fit:
    """Apply the rule.

    Args:
        prompt: tokens of the prompt, at least 1.
        completion: tokens of the completion, without end-of-text.
        max_length: tokens allowed in all, at least 2.
        longest: completion that decides about the prompt (the pair's longer one); None is `completion`.
    """
    needed = max(completion, longest or 0) + 1
    kept = min(prompt, max(max_length - needed, max_length // 2))
    room = max_length - kept
    return Fit(kept, min(completion, room), completion < room)
