"""python -m benchmarks real-data: default runs on real data, three seeds each, with an independent judge of each.

Nothing but the data flags is set. Every run is a folder below OUTPUT/real-data, so that finished ones are not made
again; its finals, verdicts and judge go into OUTPUT/real-data.json and a table on the terminal.
"""

import dataclasses
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.monitor.compare import run_finals
from rlhf.monitor.health import findings
from rlhf.monitor.log import read_logs
from rlhf.monitor.run_facts import verdicts_of

SHOWN = ("objective/scores", "objective/kl", "response_length/mean", "response_length/ended")
LIMIT_KL, LEAST_ENDED = 15.0, 0.9


@dataclasses.dataclass(frozen=True)
class Task:
    """One data set: the command without folder and seed, the pairs that are held out, and a judge of samples."""

    command: tuple[str, ...]
    test_pairs: str = ""
    judge: Callable[[Sequence[dict[str, Any]], Path], list[float]] | None = None


def sentiment(samples: Sequence[dict[str, Any]], data: Path) -> list[float]:
    """Return the log-odds of a positive sentence by a bag of words that learnt from other labelled sentences."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    labelled = json.loads((data / "sent_labelled.json").read_text(encoding="utf-8"))
    words = CountVectorizer(binary=True, token_pattern=r"(?u)\b\w+\b")
    inputs = words.fit_transform([record["text"] for record in labelled])
    model = LogisticRegression(max_iter=1000).fit(inputs, [record["label"] for record in labelled])
    texts = [sample["prompt"] + sample["completion"] for sample in samples]
    return [float(value) for value in model.decision_function(words.transform(texts))]


def preferred_words(samples: Sequence[dict[str, Any]], data: Path) -> list[float]:
    """Return the scores of completions by a bag of words that learnt from the held-out pairs (Bradley-Terry)."""
    import scipy.sparse
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    pairs = json.loads((data / "hh_helpful_pref_test.json").read_text(encoding="utf-8"))
    chosen, rejected = ([pair[side] for pair in pairs] for side in ("chosen", "rejected"))
    words = CountVectorizer(binary=True, token_pattern=r"(?u)\b\w+\b").fit(chosen + rejected)
    differences = words.transform(chosen) - words.transform(rejected)
    model = LogisticRegression(max_iter=1000, fit_intercept=False)
    model.fit(scipy.sparse.vstack([differences, -differences]), [1] * len(pairs) + [0] * len(pairs))
    texts = [sample["completion"] for sample in samples]
    return [float(value) for value in model.decision_function(words.transform(texts))]


def checkable_answer(samples: Sequence[dict[str, Any]], data: Path) -> list[float]:
    """Return 1 for each completion whose last number is the answer of its question, else 0."""
    import re

    def last_number(text: str) -> str:
        found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
        return found[-1].replace(",", "").rstrip(".") if found else ""

    pairs = json.loads((data / "math_sft_train.json").read_text(encoding="utf-8"))
    pairs += [
        {"prompt": pair["prompt"], "completion": pair["chosen"]}
        for name in ("math_pref_train", "math_pref_test")
        for pair in json.loads((data / f"{name}.json").read_text(encoding="utf-8"))
    ]
    answers = {pair["prompt"]: last_number(pair["completion"]) for pair in pairs}
    known = [sample for sample in samples if sample["prompt"] in answers]
    return [float(last_number(sample["completion"]) == answers[sample["prompt"]]) for sample in known]


def _pipeline(name: str, prompts: str = "{{data}}/{name}_prompts.json") -> tuple[str, ...]:
    demonstrations, pairs = (f"{{data}}/{name}_{kind}_train.json" for kind in ("sft", "pref"))
    data = ("--sft-data", demonstrations, "--preference-data", pairs, "--prompt-data", prompts.format(name=name))
    return ("pipeline", *data)


TASKS = {
    "sent": Task(_pipeline("sent"), "sent_pref_test.json", sentiment),
    "hh_helpful": Task(_pipeline("hh_helpful"), "hh_helpful_pref_test.json", preferred_words),
    "math": Task(_pipeline("math", "{{made}}/questions.json"), "math_pref_test.json", checkable_answer),
    "arg": Task(
        ("reward", "--preference-data", "{data}/arg_pref_train.json", "--reward.model-path", "{made}/sft"),
        "arg_pref_test.json",
    ),
    "demo": Task(("pipeline", "--config", "demo")),
}
"""The demo trains on the embedded example. `arg` has no demonstrations: its arguments, as texts, stand in. The prompts
of `math` are the questions of its pairs, whose answers are known."""


def run(output: Path, data: Path, *, only: str = "", seeds: int = 3, extra: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Make the runs that are not there yet, print a line for each, and write and return their results.

    Args:
        output: folder of the runs and of real-data.json.
        data: folder of the data files.
        only: names of tasks, separated by commas; empty is all.
        seeds: runs of each task.
        extra: flags for every run, such as --sft.model-path of a pre-trained model.
    """
    results = []
    names = [name for name in TASKS if not only or name in only.split(",")]
    for name in names:
        for seed in range(seeds):
            folder = output / "real-data" / f"{name}-{seed}"
            result = _measure(name, seed, folder, data, _train(name, seed, folder, data, extra))
            results.append(result)
            print(_line(result), flush=True)
            (output / "real-data.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def _train(name: str, seed: int, folder: Path, data: Path, extra: Sequence[str]) -> float:
    """Run a task's command, or continue it; return the seconds that it took, or had taken if it was finished before."""
    taken = folder.parent / f"{name}-{seed}-seconds"
    made = folder.parent / f"{name}-{seed}-start"
    if name in ("arg", "math"):
        made.mkdir(parents=True, exist_ok=True)
        pairs = json.loads((data / f"{name}_pref_train.json").read_text(encoding="utf-8"))
    if name == "math":
        questions = dict.fromkeys(pair["prompt"] for pair in pairs)
        (made / "questions.json").write_text(json.dumps([{"prompt": question} for question in questions]))
    if name == "arg" and not (made / "sft").is_dir():
        records = sorted({(pair["prompt"], pair[side]) for pair in pairs for side in ("chosen", "rejected")})
        file = made / "arguments.json"
        file.write_text(json.dumps([{"prompt": prompt, "completion": text} for prompt, text in records]))
        _call(["sft", "--sft-data", str(file), "--output-dir", str(made), "--seed", str(seed), *extra])
    words = [word.format(data=data, made=made) for word in TASKS[name].command]
    begun = time.monotonic()
    status = _call([*words, "--output-dir", str(folder), "--seed", str(seed), "--resume", *extra])
    if test := TASKS[name].test_pairs:
        program = "from rlhf.cli.evaluate import main; import sys; sys.exit(main())"
        flags = ["--model-dir", str(folder), "--eval-type", "reward", "--test-data", str(data / test), "--overwrite"]
        subprocess.run([sys.executable, "-c", program, *flags], check=False)
    seconds = time.monotonic() - begun
    if status == 0 and not taken.is_file():
        taken.write_text(f"{seconds:.0f}")
    return float(taken.read_text()) if taken.is_file() else seconds


def _call(words: Sequence[str]) -> int:
    """Run rlhf-train and return its exit code; a run that stops itself is a result too."""
    program = "from rlhf.cli.train import main; import sys; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", program, *words], check=False).returncode


def _measure(name: str, seed: int, folder: Path, data: Path, seconds: float) -> dict[str, Any]:
    (reader,) = read_logs([folder])
    finals = {key: figure.value for key, figure in run_finals(reader).items()}
    problems = [
        f"{found.stage} {found.check}: {found.summary}" for found in findings(reader) if found.level == "problem"
    ]
    result: dict[str, Any] = {
        "task": name, "seed": seed, "seconds": round(seconds), "command": " ".join(TASKS[name].command),
        "finals": finals, "problems": problems,
        "verdicts": {stage: verdict["text"] for stage, verdict in verdicts_of(reader).items()},
    }  # fmt: skip
    evaluation = folder / "report" / "evaluation.json"
    if evaluation.is_file():
        result["evaluation"] = json.loads(evaluation.read_text(encoding="utf-8"))["evaluations"]
    if (judge := TASKS[name].judge) is not None and len(reader.samples):
        steps = [sample["step"] for sample in reader.samples]
        first, last = (
            [sample for sample, step in zip(reader.samples, steps, strict=True) if condition(step)]
            for condition in (lambda step: step <= 3, lambda step: step > max(steps) - 3)
        )
        result["judge"] = [_mean(judge(first, data)), _mean(judge(last, data))]
    kl, ended = finals.get("objective/kl", 0.0), finals.get("response_length/ended", 1.0)
    result["passed"] = not problems and kl <= LIMIT_KL and ended >= LEAST_ENDED
    return result


def _mean(values: Sequence[float]) -> list[float]:
    """Return the mean and the half-width of its 95% interval."""
    half = 1.96 * float(np.std(values)) / math.sqrt(max(len(values), 1))
    return [float(np.mean(values)), half] if values else [math.nan, math.nan]


def _line(result: dict[str, Any]) -> str:
    figures = "  ".join(f"{key} {result['finals'][key]:.3g}" for key in SHOWN if key in result["finals"])
    judge = ""
    if "judge" in result:
        (before, _), (after, half) = result["judge"]
        judge = f"  judge {before:.3g} to {after:.3g} ± {half:.2g}"
    state = "passed" if result["passed"] else f"NOT PASSED {'; '.join(result['problems'])}"
    verdicts = "".join(f"\n    {stage}: {text}" for stage, text in result["verdicts"].items())
    return f"{result['task']} seed {result['seed']}, {result['seconds']} s: {figures}{judge}  {state}{verdicts}"
