"""Commands within rlhf-generate's conversation: lines that begin with a slash."""

import dataclasses
from typing import Any

from rlhf.errors import UserError
from rlhf.generate.generate_config import GenerateConfig

HELP = """/help                 this list
/settings             the settings in use
/temperature 0.7      and likewise /top-k, /top-p, /max-new-tokens, /samples, /seed
/greedy on            or off
/template TEXT        text around each prompt, with {prompt} in its place; \\n is a line break
//TEXT                a prompt that begins with a slash
Ctrl-C stops a completion; Ctrl-D ends."""

_NUMBERS = {"temperature": float, "top_k": int, "top_p": float, "max_new_tokens": int, "samples": int, "seed": int}
_CHANGED = (*_NUMBERS, "greedy", "template")


def change_setting(config: GenerateConfig, line: str) -> GenerateConfig:
    """Return the configuration after a command such as `/temperature 0.7`.

    Raises:
        UserError: there is no such command, or its value is not valid.
    """
    word, _, text = line.removeprefix("/").partition(" ")
    name, text = word.replace("-", "_"), text.strip()
    if name not in _CHANGED:
        raise UserError(f"/{word}: no such command; /help lists them")
    try:
        return dataclasses.replace(config, **{name: _value(name, text)})
    except ValueError as error:
        raise UserError(f"/{word} {text}: {error}") from error


def describe_settings(config: GenerateConfig) -> str:
    """Return the settings that commands change, in one line."""
    return "  ".join(f"{name.replace('_', '-')} {getattr(config, name)!r}" for name in _CHANGED)


def _value(name: str, text: str) -> Any:
    if name in _NUMBERS:
        kind = _NUMBERS[name]
        try:
            return kind(text)
        except ValueError:
            raise ValueError(f"expected a {'whole ' if kind is int else ''}number") from None
    if name == "greedy":
        if text not in ("on", "off"):
            raise ValueError("expected on or off")
        return text == "on"
    if "{prompt}" not in text:
        raise ValueError("has no {prompt}, in whose place each prompt is put")
    return text
