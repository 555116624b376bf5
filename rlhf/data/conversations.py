r"""Conversations in records: lists of messages, brought to the columns that texts have.

A message is an object with a `role` and a `content`, as chat templates take it. A record has conversations if its
columns are lists of messages, in one of these forms:

- `prompt` with `completion`, or with `chosen` and `rejected`; a prompt that is a text is the user's turn.
- `chosen` and `rejected` alone: the turns that both begin with are the prompt.
- `messages`: as a demonstration, every turn of the assistant is learnt; as a prompt, the turns before its last answer.
- `chosen` and `rejected` as texts "\n\nHuman: ... \n\nAssistant: ...", the form of Anthropic's HH data.
"""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

Message = dict[str, Any]

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}

_ROLES = ("system", "user", "assistant", "tool", "developer", "function", "ipython")
"""Roles that chat templates know; others are let through unless they look like one of these misspelt."""


def is_conversation(value: Any) -> bool:
    """Return whether a value is a list of messages, which may be incomplete."""
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) and "role" in turn for turn in value)


def to_columns(fields: dict[str, Any], answers: Sequence[str]) -> dict[str, Any]:
    """Return a record in which `prompt` and the answers are lists of messages; one without conversations unchanged.

    Args:
        fields: the record.
        answers: the columns that follow `prompt`: none, `completion`, or `chosen` and `rejected`.

    Raises:
        ValueError: chosen and rejected begin with different turns and there is no prompt.
    """
    if not answers:
        return _prompt_columns(fields)
    if "messages" in fields and not any(name in fields for name in answers) and len(answers) == 1:
        rest = {name: value for name, value in fields.items() if name not in ("messages", "prompt")}
        return rest | {"prompt": [], answers[0]: fields["messages"]} if is_conversation(fields["messages"]) else fields
    values = [fields.get(name) for name in answers]
    if fields.get("prompt") is None and len(answers) == 2 and all(map(_is_hh, values)):
        values = [_hh_turns(text) for text in values if isinstance(text, str)]
    if not all(map(is_conversation, values)):
        return fields
    conversations: list[list[Message]] = [value for value in values if isinstance(value, list)]
    prompt = fields.get("prompt")
    if isinstance(prompt, str):
        repeated = any(turn.get("role") == "user" and turn.get("content") == prompt for turn in conversations[0])
        prompt = None if repeated and len(answers) == 2 else [{"role": "user", "content": prompt}]
    if prompt is None and len(answers) == 2:
        shared = _shared_turns(*conversations)
        prompt = conversations[0][:shared]
        conversations = [turns[shared:] for turns in conversations]
    elif isinstance(prompt, list) and all(turns[: len(prompt)] == prompt != turns for turns in conversations):
        conversations = [turns[len(prompt) :] for turns in conversations]  # the answers repeat the prompt
    if prompt is None:
        return fields
    return fields | {"prompt": prompt} | dict(zip(answers, conversations, strict=True))


def problem_of(messages: Sequence[Any], *, is_prompt: bool) -> str:
    """Return the problem with a conversation and its remedy, in words; empty if there is none.

    Args:
        messages: the messages, each an object with a role.
        is_prompt: True if an answer follows, False if the messages end with the answer.
    """
    for number, turn in enumerate(messages, start=1):
        role, content = turn["role"], turn.get("content")
        if not isinstance(role, str) or not role:
            return f"turn {number} has the role {role!r}, expected a text such as 'user' or 'assistant'"
        if role not in _ROLES and (close := difflib.get_close_matches(role, _ROLES, n=1, cutoff=0.5)):
            return f"turn {number} has the role {role!r}; did you mean {close[0]!r}?"
        if content is None and turn.get("tool_calls"):
            continue
        if not isinstance(content, str):
            got = "has no 'content'" if content is None else f"has a {type(content).__name__} as 'content'"
            return f"turn {number} ({role}) {got}; write the turn's text there"
    last = messages[-1] if messages else {"role": ""}
    if is_prompt:
        return "ends with the assistant's turn, which is what is to be written; leave it out" * (
            last["role"] == "assistant"
        )
    spoken = [turn for turn in messages if turn["role"] == "assistant"]
    if not spoken:
        roles = ", ".join(dict.fromkeys(turn["role"] for turn in messages))
        return f"has no turn of the role 'assistant' (but {roles}); that turn is the answer"
    if not (spoken[-1].get("content") or "").strip() and not spoken[-1].get("tool_calls"):
        return "the assistant's last turn is empty; fill it in or remove the record"
    return ""


def contents_of(value: Any) -> list[str]:
    """Return the texts of a column: the text itself, or the content of every message."""
    if isinstance(value, str):
        return [value]
    return [turn["content"] for turn in value if isinstance(turn.get("content"), str)]


def as_text(value: Any) -> str:
    """Return a column as one text for people and simple statistics: the text itself, or a line for every message."""
    if isinstance(value, str):
        return value
    return "\n\n".join(f"{turn['role']}: {turn.get('content') or ''}" for turn in value)


def as_key(value: Any) -> str:
    """Return a text that is equal for equal columns only."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def as_completion(prompt: Any, text: str) -> Any:
    """Return a completion in the form of its prompt: a text, or a list of the assistant's message."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _prompt_columns(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a record of prompts in which `prompt` is a list of messages, if it has conversations."""
    messages = fields.get("messages")
    if not isinstance(fields.get("prompt"), str | None):
        return fields
    if isinstance(messages, list) and is_conversation(messages):
        prompt = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        return {name: value for name, value in fields.items() if name != "messages"} | {"prompt": prompt}
    if not {"chosen", "rejected"} <= fields.keys():
        return fields
    of_pair = to_columns(fields, ("chosen", "rejected")).get("prompt")
    return fields if of_pair is None else fields | {"prompt": of_pair}


def _shared_turns(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of turns that two conversations begin with, and leave at least one turn of each."""
    shared = 0
    while shared < min(len(first), len(second)) - 1 and first[shared] == second[shared]:
        shared += 1
    if not shared:
        raise ValueError(
            "'chosen' and 'rejected' begin with different turns, or have one turn each; begin both with the same "
            "turns, or give these as 'prompt'"
        )
    return shared


def _is_hh(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("\n\nHuman:") and "\n\nAssistant:" in value


def _hh_turns(text: str) -> list[Message]:
    _, *parts = _HH_TURN.split(text)
    return [
        {"role": _HH_ROLES[name], "content": content.removeprefix(" ")}
        for name, content in zip(parts[::2], parts[1::2], strict=True)
    ]
