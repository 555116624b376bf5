"""rlhf-generate: the tokens that `generate` draws, whole characters as they come, and an unharmed terminal."""

import importlib.metadata
import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rlhf.cli.arguments import flag_types
from rlhf.cli.generate_screen import read_prompts, run_generate

from rlhf import random
from rlhf.errors import UserError
from rlhf.evaluate.evaluate_config import EvaluateConfig
from rlhf.evaluate.evaluation import run_evaluation
from rlhf.generate.best_of_completer import open_completer
from rlhf.generate.complete import default_length
from rlhf.generate.completer import Completer, TextChunk, stream, text_chunks
from rlhf.generate.generate_config import GENERATE_RULES, GenerateConfig
from rlhf.io.model_folder import (
    LanguageModel,
    RewardModel,
    RewardStatistics,
    load_language_model,
    save_language_model,
    save_reward_model,
)
from rlhf.io.printable_text import printable
from rlhf.io.tokenizer import Tokenizer
from rlhf.models import gpt2
from rlhf.models.decoding import generate_completions as generate
from rlhf.models.gpt2_config import GPT2Config
from rlhf.models.heads import apply_head
from rlhf.setting_rules import check_rules

OPTIONS = {
    "plain": {},
    "greedy": {"top_k": 1},
    "filtered": {"temperature": 0.6, "top_k": 20, "top_p": 0.8},
    "stops": {"stop_tokens": (3, 5, 7, 11, 13, 17, 19)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_stream_draws_what_generate_draws(params, config, tokens, options):
    keys, lengths = random.split(random.key(4), 3), torch.tensor([4, 1, 7])
    whole = generate(params, tokens, lengths, keys, config=config, max_new_tokens=20, **options)
    for row, (prompt, length) in enumerate(zip(tokens, lengths, strict=True)):
        drawn = list(stream(params, prompt[:length], keys[row], config=config, max_new_tokens=20, **options))
        assert drawn == whole.tokens[row][whole.mask[row]].tolist()


def test_stream_gives_each_token_before_the_next_is_drawn(params, config, tokens, monkeypatch):
    drawn = stream(params, tokens[0], random.key(1), config=config, max_new_tokens=5)
    first = next(drawn)
    monkeypatch.setattr(
        "rlhf.generate.completer.sample_token", lambda *_, **__: pytest.fail("the second was asked for")
    )
    assert 0 <= first < config.vocab_size
    with pytest.raises(pytest.fail.Exception, match="the second"):
        next(drawn)


@pytest.mark.parametrize(("length", "new"), [(0, 4), (30, 3), (32, 1)])
def test_stream_rejects_what_does_not_fit(params, config, length, new):
    prompt = torch.zeros(length, dtype=torch.int64)
    with pytest.raises(ValueError, match=rf"stream: prompt and completion have {length} \+ {new} tokens"):
        next(stream(params, prompt, random.key(1), config=config, max_new_tokens=new))


@given(text=st.text(max_size=20))
def test_chunks_are_whole_characters_and_together_the_text(tokenizer, text):
    """Few of the characters are single tokens of this tokenizer: most come byte by byte."""
    (ids,) = tokenizer.encode([text])
    shown = [chunk.text for chunk in text_chunks(tokenizer, iter(ids))]
    assert "".join(shown) == text
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in chunk for chunk in shown)


@given(ids=st.lists(st.integers(0, 299), max_size=30))
def test_chunks_of_any_tokens_are_their_text(tokenizer, ids):
    assert "".join(chunk.text for chunk in text_chunks(tokenizer, iter(ids))) == tokenizer.decode(ids)


def test_chunks_come_at_once(tokenizer):
    (ids,) = tokenizer.encode(["a é b"])
    shown = [chunk.text for chunk in text_chunks(tokenizer, iter(ids))]
    assert len(shown) == len(ids) > 4
    assert shown[0] == "a"
    assert "" in shown, "half of é"


HOSTILE = "\x1b[31mred\x07\r\x9b2J\x7f\u202eabc\u2066\u2028ok\ttab\nline é 👩‍👩‍👧"


def test_printable_writes_out_what_steers_a_terminal():
    assert printable(HOSTILE) == ("\\x1b[31mred\\x07\\r\\x9b2J\\x7f\\u202eabc\\u2066\\u2028ok\ttab\nline é 👩‍👩‍👧")


@given(text=st.text())
def test_printable_leaves_no_control_character(text):
    import unicodedata

    kept = [character for character in printable(text) if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")]
    assert set(kept) <= {"\n", "\t"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run's folder with sft/ and policy/, whose models write anything, control characters too."""
    shelf = tmp_path_factory.mktemp("models")
    tokenizer = Tokenizer.train(["hello world, how are you today"] * 3, 280)
    shape = {"n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
    config = GPT2Config(vocab_size=tokenizer.vocab_size, **shape)
    for number, name in enumerate(("sft", "policy")):
        params = gpt2.init(config, key=random.key(number))
        save_language_model(shelf / "run" / name, LanguageModel(params, config, tokenizer), facts={})
    return shelf / "run"


@pytest.fixture
def show(folder):
    """What a run prints."""

    def run(**settings):
        out = io.StringIO()
        given = {"model_dir": folder, "threads": 1, "max_new_tokens": 12}
        run_generate(GenerateConfig(**given | settings), Console(file=out, width=100, highlight=False))
        return out.getvalue()

    return run


def test_the_screen_shows_what_the_file_holds(show, tmp_path):
    """Streamed or drawn together, the same completions."""
    prompts = ("hello", "how are you", "")
    shown = show(prompt=prompts, samples=2)
    show(prompt=prompts, samples=2, output=tmp_path / "new" / "out.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "new" / "out.jsonl").read_text().splitlines()]
    assert [(line["prompt"], line["sample"]) for line in lines] == [(p, s) for p in prompts for s in (0, 1)]
    assert len({line["completion"] for line in lines}) == 6
    expected = "".join(
        f"{line['prompt']}{printable(line['completion'])}\n" + "(cut at 12 tokens)\n" * (not line["ended"]) + "\n"
        for line in lines
    )
    assert shown == expected
    assert any(character in "".join(line["completion"] for line in lines) for character in map(chr, range(32)))
    assert not set(map(chr, range(32))) - {"\n", "\t"} & set(shown)


def test_the_longest_completion_leaves_room_for_a_prompt_where_nobody_says_how_long(show):
    assert "(cut at 32 tokens)" in show(prompt=("hello",), samples=9, max_new_tokens=None)
    assert [default_length(context) for context in (1, 48, 128, 1024)] == [1, 24, 64, 64]


def test_two_models_stand_side_by_side(show, folder, tmp_path):
    shown = show(prompt=("hello",), against=folder / "sft", greedy=True, samples=5)
    assert shown.index("policy") < shown.index("sft")
    show(prompt=("hello",), against=folder / "sft", greedy=True, output=tmp_path / "out.jsonl")
    (line,) = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    columns = [[cell.strip() for cell in row.split("│")[1:3]] for row in shown.splitlines() if row.startswith("│")]
    for side, name in enumerate(("completion", "against_completion")):
        seen = "".join("".join(column[side] for column in columns).split())
        assert seen == "".join(printable(line[name]).split())
    assert line["completion"] != line["against_completion"]


def test_two_folders_of_one_name_are_told_apart(show, folder, tmp_path):
    shutil.copytree(folder / "policy", tmp_path / "other" / "policy")
    shown = show(prompt=("hello",), against=tmp_path / "other" / "policy", greedy=True)
    heading = next(line for line in shown.splitlines() if "policy" in line)
    assert heading.split()[1::2] == ["run/policy", "other/policy"]


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_completion_has_a_mark_on_the_screen_and_none_in_a_file(show, folder, tmp_path, monkeypatch, text):
    monkeypatch.setattr(Completer, "stream", lambda self, prompt, key: iter([TextChunk(text, True)]))
    monkeypatch.setattr(Completer, "complete", lambda self, prompts, keys: [TextChunk(text, True)])
    assert show(prompt=("hello",)) == f"hello{text} (empty)\n\n"
    assert show(prompt=("hello",), against=folder / "sft").count("(empty)") == 2
    show(prompt=("hello",), output=tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text())["completion"] == text


def test_chat_without_a_template_says_what_to_do_with_flags_of_the_program(show):
    with pytest.raises(
        UserError, match=r"no chat template .*; add --data.template .*; or leave --chat out, .* --template"
    ):
        show(prompt=("hello",), chat=True)
    flags = dict(flag_types(GenerateConfig))
    assert {"--data.template", "--chat", "--template"} <= flags.keys()


def test_completions_are_those_of_an_evaluation_with_the_same_seed(folder, tmp_path, show):
    prompts = [{"prompt": "hello"}, {"prompt": "world"}]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    show(prompt_file=tmp_path / "prompts.json", samples=2, output=tmp_path / "out.jsonl", seed=5)
    config = EvaluateConfig(
        model_dir=folder / "policy", test_data=(tmp_path / "prompts.json",), output=tmp_path, threads=1, samples=2,
        decoding=("sampled",), max_new_tokens=12, seed=5, cache_dir=tmp_path,
    )  # fmt: skip
    run_evaluation(config)
    ours, theirs = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("out.jsonl", "completions.jsonl")
    )
    assert [line["completion"] for line in ours] == [line["policy"]["completion"] for line in theirs]


@pytest.fixture(scope="module")
def with_reward(folder, tmp_path_factory):
    """The model's folder beside a reward model, as a run has them."""
    run = tmp_path_factory.mktemp("with_reward")
    shutil.copytree(folder / "policy", run / "policy")
    model = load_language_model(folder / "policy")
    head = {"weight": random.normal(random.key(9), (1, model.config.n_embd))}
    params = {"trunk": model.params, "head": head}
    reward = RewardModel(params, model.config, model.tokenizer, RewardStatistics(0.0, 1.0, 9))
    save_reward_model(run / "reward", reward, facts={})
    return run / "policy", reward


def test_the_best_of_several_is_the_one_that_the_reward_model_likes_most(with_reward):
    folder, reward = with_reward
    config = GenerateConfig(model_dir=folder, best_of=5, max_new_tokens=8)
    prompts, keys = ["a b", "once upon"], random.split(random.key(3), 2)
    best = open_completer(folder, config, torch.device("cpu"))
    plain = Completer(folder, config, torch.device("cpu"))
    every_key = random.fold_in(keys.repeat_interleave(5, dim=0), torch.arange(5).repeat(2))
    drawn = plain.complete([prompt for prompt in prompts for _ in range(5)], every_key)
    scores = []
    for number in range(len(drawn)):
        tokens = tokens_of(plain, every_key[number], prompts[number // 5])
        hidden = gpt2.hidden_states(reward.params["trunk"], tokens[None], config=reward.config)
        scores.append(float(apply_head(reward.params["head"], hidden[0, -1])))
    found = best.complete(prompts, keys)
    for prompt in range(2):
        rows = range(5 * prompt, 5 * prompt + 5)
        assert found[prompt] == drawn[max(rows, key=lambda row: scores[row])]
        assert list(best.stream(prompts[prompt], keys[prompt])) == [found[prompt]]


def tokens_of(completer, key, prompt):
    """[n] int64: the prompt and the tokens that this key draws, the stop token included."""
    tokens = torch.from_numpy(completer.encode(prompt))
    drawn = stream(
        completer.model.params, tokens, key, config=completer.model.config, max_new_tokens=8,
        stop_tokens=completer.model.tokenizer.stop_ids,
    )  # fmt: skip
    return torch.cat([tokens, torch.tensor(list(drawn))])


def test_best_of_needs_a_reward_model_and_draws(folder, tmp_path):
    shutil.copytree(folder / "policy", tmp_path / "alone")
    with pytest.raises(UserError, match=r"--best-of: there is no reward model in .*reward; name one: --reward-model"):
        open_completer(tmp_path / "alone", GenerateConfig(best_of=2), torch.device("cpu"))
    with pytest.raises(UserError, match="--best-of 2: needs different completions"):
        check_rules(GenerateConfig(best_of=2, greedy=True), GENERATE_RULES)


def test_a_template_stands_around_each_prompt(show, tmp_path):
    show(prompt=("hi {x}",), template=r"Q: {prompt}\nA:", output=tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text())["prompt"] == "Q: hi {x}\nA:"
    with pytest.raises(UserError, match=r"has no \{prompt\}"):
        show(prompt=("hi",), template="Q:")


def test_prompts_are_read_from_json_and_text_files(tmp_path):
    for name, text in {
        "list.json": '[{"prompt": "a"}, {"prompt": "b", "more": 1}]',
        "lines.jsonl": '{"prompt": "a"}\n{"prompt": "b"}\n',
        "text.txt": "a\n\nb\n",
    }.items():
        (tmp_path / name).write_text(text)
        assert read_prompts(tmp_path / name) == ["a", "b"]


def main(argv):
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="rlhf-generate")
    try:
        return entry.load()([str(word) for word in argv])
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("against", [False, True])
def test_output_that_has_no_such_characters_shows_escapes(folder, monkeypatch, encoding, against):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    flags = ["--against", folder / "sft"] if against else []
    assert main(["--model-dir", folder / "sft", *flags, "--prompt", "日本", "--max-new-tokens", "1"]) == 0
    assert rb"\u65e5\u672c" in stream.buffer.getvalue()


def test_closed_input_ends_at_once(folder, monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdin", None)
    main(["--model-dir", folder / "sft", "--max-new-tokens", "1"])
    assert "Traceback" not in capfd.readouterr().err
    sys.stdin.close()


WRONG = {
    "no folder": (["--model-dir", "absent", "--prompt", "x"], "absent: no such folder"),
    "no model": (["--model-dir", ".", "--prompt", "x"], "not a model folder"),
    "no folder but a file": (["--model-dir", "empty.txt", "--prompt", "x"], "empty.txt: is a file and no folder"),
    "no text file": (["--model-dir", "{run}", "--prompt-file", "absent.txt"], "absent.txt: no such file"),
    "no file": (["--model-dir", "{run}", "--prompt-file", "absent.json"], "absent.json: no such file"),
    "no key": (["--model-dir", "{run}", "--prompt-file", "texts.json"], "record 1 (line 1) has no key 'prompt'"),
    "empty": (["--model-dir", "{run}", "--prompt-file", "empty.txt"], "the file is empty"),
    "both": (["--model-dir", "{run}", "--prompt", "x", "--prompt-file", "empty.txt"], "give one of the two"),
    "too long": (["--model-dir", "{run}", "--prompt", "x", "--max-new-tokens", "64"], "give at most 63"),
    "no output there": (
        ["--model-dir", "{run}", "--prompt", "x", "--max-new-tokens", "4", "--output", "empty.txt/x"],
        "empty.txt: cannot be written (Not a directory); choose another --output",
    ),
    "output": (["--model-dir", "{run}", "--prompt", "x", "--output", "."], "--output .: is a folder"),
    "bytes": (["--model-dir", "{run}", "--prompt", "ok", "a\udcff"], "'a\\udcff' is not UTF-8 text"),
    "bytes around": (["--model-dir", "{run}", "--prompt", "x", "--template", "\udcff{{prompt}}"], "is not UTF-8 text"),
    "range": (["--model-dir", "{run}", "--prompt", "x", "--top-p", "0"], "top_p must be in (0, 1]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_refused(name, folder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.json").write_text('[{"text": "a"}]')
    (tmp_path / "empty.txt").write_text("\n")
    flags, message = WRONG[name]
    assert main([flag.format(run=folder) for flag in flags]) == 2
    out, err = capfd.readouterr()
    assert message in " ".join(err.translate(dict.fromkeys(map(ord, "│╭╮╰╯─"), " ")).split())
    assert "Traceback" not in err
    assert out == ""


def program(*flags, **options):
    return subprocess.run(
        [Path(sys.executable).with_name("rlhf-generate"), "--threads", "1", *map(str, flags)],
        capture_output=True, text=True, timeout=60, check=False, **options,
    )  # fmt: skip


def test_what_is_piped_in_is_completed_line_by_line(folder):
    done = program("--model-dir", folder, "--max-new-tokens", "3", input="hello\n\nworld\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.index("hello") < done.stdout.index("world")


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_piped_bytes_that_are_no_text_are_refused(folder, tmp_path, locale):
    environment = {**os.environ, "LC_ALL": locale, "PYTHONIOENCODING": "", "PYTHONUTF8": "0"}
    (tmp_path / "prompts").write_bytes(b"\xff\n")
    with (tmp_path / "prompts").open() as piped:
        done = program("--model-dir", folder, "--max-new-tokens", "3", stdin=piped, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert "is not UTF-8 text" in done.stderr


class Terminal:
    """A person at a terminal, who waits for what is shown and then types."""

    def __init__(self, *flags):
        self.shown, self.seen = "", 0
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:  # the program
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests in the background would hand on that it is ignored
            name = Path(sys.executable).with_name("rlhf-generate")
            os.execve(name, [str(name), "--threads", "1", *map(str, flags)], os.environ | {"TERM": "xterm"})

    def wait_for(self, text, seconds=30):
        """Read on until `text` has been shown after what was waited for before."""
        end = time.monotonic() + seconds
        while text not in self.shown[self.seen :]:
            assert self._read(end), f"{text!r} did not come; seen: {self.shown!r}"
        self.seen = self.shown.index(text, self.seen) + len(text)

    def type(self, text):
        time.sleep(0.3)  # until the line editor has the terminal
        os.write(self.descriptor, text.encode())

    def ends(self, seconds=30):
        """The exit code."""
        end = time.monotonic() + seconds
        while self._read(end):
            pass
        if time.monotonic() > end:
            os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        os.close(self.descriptor)
        return os.waitstatus_to_exitcode(status)

    def _read(self, end):
        ready, _, _ = select.select([self.descriptor], [], [], max(0, end - time.monotonic()))
        try:
            new = os.read(self.descriptor, 4096).decode(errors="replace") if ready else ""
        except OSError:  # the program has ended
            new = ""
        self.shown += new
        return new


@pytest.mark.parametrize("end", ["\x04", "\x03"], ids=["Ctrl-D", "Ctrl-C"])
def test_a_conversation(folder, end):
    terminal = Terminal("--model-dir", folder, "--max-new-tokens", "3")
    terminal.wait_for(">")
    terminal.type("hello\n")
    terminal.wait_for("tokens)")
    terminal.wait_for(">")
    terminal.type(end)
    assert terminal.ends() == 0
    assert "Traceback" not in terminal.shown


def test_ctrl_c_stops_a_completion_and_not_the_conversation(folder, tmp_path):
    """A model whose context is long enough to be interrupted in."""
    tokenizer = Tokenizer.train(["hello"], 260)
    config = GPT2Config(vocab_size=tokenizer.vocab_size, n_positions=20_000, n_embd=16, n_layer=1, n_head=2)
    save_language_model(
        tmp_path / "m", LanguageModel(gpt2.init(config, key=random.key(0)), config, tokenizer), facts={}
    )
    terminal = Terminal("--model-dir", tmp_path / "m", "--max-new-tokens", "19000", "--greedy")
    terminal.wait_for(">")
    terminal.type("hello\n")
    terminal.wait_for("\n")
    time.sleep(0.5)
    os.kill(terminal.pid, signal.SIGINT)
    terminal.wait_for("(stopped)")
    terminal.wait_for(">")
    terminal.type("\x04")
    assert terminal.ends() == 0
