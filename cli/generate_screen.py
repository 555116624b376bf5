"""Input and output of rlhf-generate: prompts from flags, a file, a pipe or a person, and their completions."""

import contextlib
import dataclasses
import json
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from rlhf.cli.generate_commands import HELP, change_setting, describe_settings
from torch import Tensor

from rlhf.data.conversations import Message, as_text
from rlhf.data.data_files import DataFiles
from rlhf.data.prompt_template import frame
from rlhf.data.schema import PROMPTS, check_renames, read_checked
from rlhf.distributed.compute_context import available_cores, find_device, limit_threads
from rlhf.errors import Interrupted, UserError
from rlhf.evaluate.comparison import sample_keys
from rlhf.generate.best_of_completer import open_completer
from rlhf.generate.completer import Completer, TextChunk
from rlhf.generate.generate_config import GENERATE_RULES, GenerateConfig
from rlhf.io.files import read_json, read_text
from rlhf.io.output import check_output, write_output
from rlhf.io.paths import short_names
from rlhf.io.printable_text import EMPTY, printable
from rlhf.io.user_log import log_user
from rlhf.setting_rules import check_rules

_WELCOME = (
    "Each prompt is completed on its own; /help lists commands. Ctrl-C stops a completion; Ctrl-D, or Ctrl-C at the "
    "prompt, ends."
)
_REFRESHES_PER_SECOND = 12


def run_generate(config: GenerateConfig, console: Console) -> None:
    """Complete the prompts, and show or write the completions.

    Raises:
        UserError: a model, a file or a setting cannot be used.
        Interrupted: Ctrl-C, except at the prompt.
    """
    for line in check_rules(config, GENERATE_RULES):
        log_user(line)
    if config.template is not None and "{prompt}" not in config.template:
        raise UserError(f"--template {config.template!r}: has no {{prompt}}, in whose place each prompt is put")
    if config.prompt and config.prompt_file is not None:
        raise UserError("--prompt and --prompt-file: give one of the two")
    if config.output is not None:
        inputs = [file for folder in _folders(config) if folder.is_dir() for file in folder.iterdir()]
        inputs += [config.prompt_file] if config.prompt_file is not None else []
        check_output(config.output, "--output", inputs=inputs, overwrite=config.overwrite)
    for text in (*config.prompt, config.template or ""):
        _check_text(text)
    prompts = _prompts(config)
    device = find_device(config.device)
    with limit_threads(config.threads or available_cores()):
        completers = [open_completer(folder, config, device) for folder in _folders(config)]
        for line in dict.fromkeys(line for completer in completers for line in completer.model.notes):
            log_user(line)
        try:
            if config.output is not None:
                _write_file(config, config.output, list(_typed(console) if prompts is None else prompts), completers)
            elif prompts is None:
                _converse(config, console, completers)
            else:
                for number, prompt in enumerate(prompts):
                    _show(config, console, completers, _framed(config, prompt), number)
        except KeyboardInterrupt:
            raise Interrupted("stopped", signal.SIGINT) from None


def read_prompts(path: Path, columns: Sequence[str] = ()) -> list[Any]:
    """Return the prompts of a file: `prompt` of each record, or the lines of a text file that are not blank.

    Args:
        path: the file.
        columns: other names of columns, as in `rlhf.data.data_files.DataFiles`.

    Raises:
        UserError: it cannot be read, or holds no prompt.
    """
    if path.suffix == ".txt":
        lines = re.split(r"\r\n|\r|\n", read_text(path))  # and not at the other ends of lines that Python knows
        if not (prompts := [line for line in lines if line.strip()]):
            raise UserError(f"{path}: the file is empty; it needs a prompt per line")
        return prompts
    files = DataFiles((path,), tuple(columns))
    check_renames([(files, PROMPTS)])
    return [record.fields["prompt"] for record in read_checked(files, PROMPTS)]


def _prompts(config: GenerateConfig) -> Iterator[str | list[Message]] | None:
    """Return prompts from flags, a file or a pipe, or None if a person types them."""
    if config.prompt:
        return iter(config.prompt)
    if config.prompt_file is not None:
        return iter(read_prompts(config.prompt_file, config.data.columns))
    if not sys.stdin.isatty():
        return _piped()
    return None


def _piped() -> Iterator[str]:
    try:
        for line in sys.stdin:
            _check_text(line)
            if line.strip():
                yield line.rstrip("\n")
    except UnicodeDecodeError:
        raise UserError("what is piped in is not UTF-8 text; convert it with iconv") from None


def _check_text(text: str) -> None:
    """Raise UserError if a text was read from bytes that are not UTF-8, which Python passes on as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"the prompt or template {text!r} is not UTF-8 text; convert it with iconv") from None


def _folders(config: GenerateConfig) -> list[Path]:
    """Return the folders of the models. For the output folder of a run, this is policy/ or otherwise sft/."""
    folder = config.model_dir
    if not (folder / "config.json").is_file():
        folder = next(
            (folder / name for name in ("policy", "sft") if (folder / name / "config.json").is_file()), folder
        )
    return [folder] if config.against is None else [folder, config.against]


def _framed(config: GenerateConfig, prompt: str | list[Message]) -> str | list[Message]:
    """Return a prompt as the model gets it: a text in its frame, or a conversation."""
    if not isinstance(prompt, str):
        return prompt
    if config.chat:
        return [{"role": "user", "content": prompt}]
    return (config.template or "{prompt}").replace("\\n", "\n").replace("{prompt}", prompt)


def _with_remembered_template(config: GenerateConfig, folder: Path) -> GenerateConfig:
    """Return the configuration with the form of the model's training prompts if it has none; tell the user."""
    if config.template is not None or config.chat:
        return config
    try:
        manifest = read_json(folder / "manifest.json")
        chat, template = manifest.get("chat"), manifest.get("template")
    except (UserError, AttributeError):
        chat, template = None, None
    if chat is True:
        log_user("each prompt is a turn of a conversation, as in the model's training (--chat)")
        return dataclasses.replace(config, chat=True)
    if not isinstance(template, str) or template == "{prompt}" or "{prompt}" not in template:
        return config
    log_user(f"each prompt is put into {template!r}, as in the model's training; /template {{prompt}} ends that")
    return dataclasses.replace(config, template=template)


def _keys(config: GenerateConfig, number: int) -> Tensor:
    """Return the [samples, 2] keys that rlhf-evaluate uses for prompt `number` and the same seed."""
    return sample_keys(config.seed, number + 1, _samples(config)).view(number + 1, -1, 2)[number]


def _samples(config: GenerateConfig) -> int:
    return 1 if config.greedy else config.samples


def _show(config: GenerateConfig, console: Console, completers: Sequence[Completer], prompt: Any, number: int) -> None:
    """Print the completions of a prompt while they are generated."""
    for key in _keys(config, number):
        if len(completers) > 1:
            _show_beside(console, completers, prompt, key)
        else:
            _show_one(console, completers[0], prompt, key)
        console.print()


def _show_one(console: Console, completer: Completer, prompt: Any, key: Tensor) -> None:
    ended, text = False, ""
    _put(console, printable(as_text(prompt)), "dim")
    try:
        for chunk in completer.stream(prompt, key):
            _put(console, printable(chunk.text))
            ended, text = chunk.ended, text + chunk.text
        if not text.strip():
            _put(console, f" {EMPTY}", "dim")
    finally:
        console.print()
    if not ended:
        console.print(Text(f"(cut at {completer.max_new_tokens} tokens)", style="dim"))


def _show_beside(console: Console, completers: Sequence[Completer], prompt: Any, key: Tensor) -> None:
    """Print two columns that grow together. Without a terminal, they are printed once, when they are complete."""
    texts = [Text() for _ in completers]
    names = short_names([completer.folder for completer in completers])

    def table() -> Table:
        grid = Table(
            expand=True, title=Text(printable(as_text(prompt)), style="dim", justify="left"), title_justify="left"
        )
        for name in names:
            grid.add_column(Text(name), ratio=1, overflow="fold")
        grid.add_row(*texts)
        return grid

    streams = {column: completer.stream(prompt, key) for column, completer in enumerate(completers)}
    with Live(table(), console=console, refresh_per_second=_REFRESHES_PER_SECOND, vertical_overflow="visible") as live:
        while streams:
            for column in list(streams):
                chunk: TextChunk | None = next(streams[column], None)
                if chunk is None:
                    del streams[column]
                    texts[column].append("" if texts[column].plain.strip() else EMPTY, "dim")
                else:
                    texts[column].append(printable(chunk.text))
            live.update(table())
    if not console.is_terminal:  # where Live ends no line
        console.print()


def _converse(config: GenerateConfig, console: Console, completers: Sequence[Completer]) -> None:
    """Complete prompts that a person types, and carry out commands."""
    console.print(Text(_WELCOME, style="dim"))
    config, number = _with_remembered_template(config, completers[0].folder), 0
    for typed in _typed(console):
        if typed.startswith("/") and not typed.startswith("//"):
            config = _obey(config, console, completers, typed)
            continue
        prompt = typed.removeprefix("/")
        template = (config.template or "{prompt}").replace("\\n", "\n")
        framed = _framed(config, prompt) if config.chat else frame(template, prompt)
        try:
            _show(config, console, completers, framed, number)
        except KeyboardInterrupt:
            console.print(Text("(stopped)", style="dim"))
        number += 1


def _obey(config: GenerateConfig, console: Console, completers: Sequence[Completer], line: str) -> GenerateConfig:
    """Carry out a command; return the settings from now on."""
    if line.strip() in ("/help", "/settings"):
        text = HELP if line.strip() == "/help" else describe_settings(config)
        console.print(Text(text, style="dim"))
        return config
    try:
        changed = change_setting(config, line)
        for completer in completers:
            completer.configure(changed)
    except UserError as error:
        console.print(Text(str(error), style="red"))
        return config
    console.print(Text(describe_settings(changed), style="dim"))
    return changed


def _typed(console: Console) -> Iterator[str]:
    """Yield the prompts that a person types, until the end of the input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (arrow keys and history)
    while True:
        try:
            prompt = console.input("[bold]>[/] ")
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if prompt.strip():
            yield prompt


def _put(console: Console, text: str, style: str = "") -> None:
    """Print a text immediately, without a line end."""
    console.print(Text(text, style=style), end="", soft_wrap=True)
    console.file.flush()


def _write_file(config: GenerateConfig, path: Path, prompts: Sequence[Any], completers: Sequence[Completer]) -> None:
    """Write all completions as JSON Lines."""
    if not prompts:
        raise UserError("no prompts were given")
    samples = _samples(config)
    framed = [_framed(config, prompt) for prompt in prompts for _ in range(samples)]
    keys = sample_keys(config.seed, len(prompts), samples)
    columns = [completer.complete(framed, keys) for completer in completers]
    lines = []
    for number, completions in enumerate(zip(*columns, strict=True)):
        line = {"prompt": framed[number], "sample": number % samples}
        for prefix, completion in zip(("", "against_"), completions, strict=False):
            line |= {f"{prefix}completion": completion.text, f"{prefix}ended": completion.ended}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_output(path, "".join(lines), "--output", overwrite=config.overwrite)
