"""The screen of rlhf-generate: prompts from flags, a file, a pipe or a person; completions to a terminal or a file."""

import contextlib
import json
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from torch import Tensor

from rlhf.data.schema import PROMPTS, read_checked
from rlhf.distributed.compute_context import available_cores, find_device, limit_threads
from rlhf.errors import Interrupted, UserError
from rlhf.evaluate.comparison import sample_keys
from rlhf.generate.best_of_completer import open_completer
from rlhf.generate.completer import Completer, TextChunk
from rlhf.generate.generate_config import GENERATE_RULES, GenerateConfig
from rlhf.io.files import read_text
from rlhf.io.output import check_output, write_output
from rlhf.io.printable_text import printable
from rlhf.io.user_log import log_user
from rlhf.setting_rules import check_rules

_WELCOME = """Each prompt is completed on its own. Ctrl-C stops a completion; Ctrl-D, or Ctrl-C at the prompt, ends."""
_REFRESHES_PER_SECOND = 12


def run_generate(config: GenerateConfig, console: Console) -> None:
    """Complete the prompts, and show or write the completions.

    Raises:
        UserError: a model, a file or a setting cannot be used.
        Interrupted: Ctrl-C, except at the prompt.
    """
    for line in check_rules(config, GENERATE_RULES):
        log_user(line)
    if "{prompt}" not in config.template:
        raise UserError(f"--template {config.template!r}: has no {{prompt}}, in whose place each prompt is put")
    if config.prompt and config.prompt_file is not None:
        raise UserError("--prompt and --prompt-file: give one of the two")
    if config.output is not None:
        inputs = [file for folder in _folders(config) if folder.is_dir() for file in folder.iterdir()]
        inputs += [config.prompt_file] if config.prompt_file is not None else []
        check_output(config.output, "--output", inputs=inputs, overwrite=config.overwrite)
    for text in (*config.prompt, config.template):
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


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file: `prompt` of each JSON object, or the lines of a text file that are not blank.

    Raises:
        UserError: it cannot be read, or holds no prompt.
    """
    if path.suffix == ".txt":
        lines = re.split(r"\r\n|\r|\n", read_text(path))  # and not at the other ends of lines that Python knows
        if not (prompts := [line for line in lines if line.strip()]):
            raise UserError(f"{path}: the file is empty; it needs a prompt per line")
        return prompts
    return [record.fields["prompt"] for record in read_checked(path, PROMPTS)]


def _prompts(config: GenerateConfig) -> Iterator[str] | None:
    """Return prompts from flags, a file or a pipe; None where a person is to type them."""
    if config.prompt:
        return iter(config.prompt)
    if config.prompt_file is not None:
        return iter(read_prompts(config.prompt_file))
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
    """Raise UserError if `text` came in bytes that are not UTF-8, which Python hands on as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"the prompt or template {text!r} is not UTF-8 text; convert it with iconv") from None


def _folders(config: GenerateConfig) -> list[Path]:
    """Return the models' folders; of a run's output folder, its policy, or else its SFT model."""
    folder = config.model_dir
    if not (folder / "config.json").is_file():
        folder = next(
            (folder / name for name in ("policy", "sft") if (folder / name / "config.json").is_file()), folder
        )
    return [folder] if config.against is None else [folder, config.against]


def _framed(config: GenerateConfig, prompt: str) -> str:
    return config.template.replace("\\n", "\n").replace("{prompt}", prompt)


def _keys(config: GenerateConfig, number: int) -> Tensor:
    """Return the [samples, 2] keys that rlhf-evaluate has for prompt `number` and the same seed."""
    return sample_keys(config.seed, number + 1, _samples(config)).view(number + 1, -1, 2)[number]


def _samples(config: GenerateConfig) -> int:
    return 1 if config.greedy else config.samples


def _show(config: GenerateConfig, console: Console, completers: Sequence[Completer], prompt: str, number: int) -> None:
    """Print one prompt's completions while they are drawn."""
    for key in _keys(config, number):
        if len(completers) > 1:
            _show_beside(console, completers, prompt, key)
        else:
            _show_one(console, completers[0], prompt, key)
        console.print()


def _show_one(console: Console, completer: Completer, prompt: str, key: Tensor) -> None:
    ended = False
    _put(console, printable(prompt), "dim")
    try:
        for chunk in completer.stream(prompt, key):
            _put(console, printable(chunk.text))
            ended = chunk.ended
    finally:
        console.print()
    if not ended:
        console.print(Text(f"(cut at {completer.max_new_tokens} tokens)", style="dim"))


def _show_beside(console: Console, completers: Sequence[Completer], prompt: str, key: Tensor) -> None:
    """Print two columns that grow together; without a terminal they are printed once, when they are whole."""
    texts = [Text() for _ in completers]
    names = [completer.folder.name for completer in completers]
    if len(set(names)) < len(names):
        names = [str(completer.folder) for completer in completers]

    def table() -> Table:
        grid = Table(expand=True, title=Text(printable(prompt), style="dim", justify="left"), title_justify="left")
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
                else:
                    texts[column].append(printable(chunk.text))
            live.update(table())
    if not console.is_terminal:  # where Live ends no line
        console.print()


def _converse(config: GenerateConfig, console: Console, completers: Sequence[Completer]) -> None:
    """Complete prompts as a person types them."""
    console.print(Text(_WELCOME, style="dim"))
    for number, prompt in enumerate(_typed(console)):
        try:
            _show(config, console, completers, _framed(config, prompt), number)
        except KeyboardInterrupt:
            console.print(Text("(stopped)", style="dim"))


def _typed(console: Console) -> Iterator[str]:
    """Yield the prompts that a person types, until they end it."""
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
    """Print at once, without a line end."""
    console.print(Text(text, style=style), end="", soft_wrap=True)
    console.file.flush()


def _write_file(config: GenerateConfig, path: Path, prompts: Sequence[str], completers: Sequence[Completer]) -> None:
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
