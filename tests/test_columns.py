"""Columns of other names: each file of a run has its own, and what evaluates the run reads them again."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from chat_templates import TEMPLATES, said, user, write_tokenizer
from rlhf.cli.generate_screen import read_prompts

import rlhf.train
from rlhf.config import DataConfig, PipelineRun, PPORun, RewardRun, SFTRun, TokenizerConfig
from rlhf.data.schema import DEMONSTRATIONS, PREFERENCES, PROMPTS
from rlhf.errors import UserError
from rlhf.evaluate.evaluate_config import EvaluateConfig
from rlhf.evaluate.evaluation import run_evaluation
from rlhf.evaluate.evaluation_inputs import classify_files, unique_prompts
from rlhf.evaluate.held_out import held_out_data
from rlhf.io.presets import load_config, narrow


def write(path: Path, records: list[dict]) -> Path:
    path.write_text(json.dumps(records))
    return path


@pytest.fixture(scope="module")
def config(tmp_path_factory, short_pipeline) -> PipelineRun:
    """A pipeline whose files call the prompt by three names."""
    folder = tmp_path_factory.mktemp("columns")
    sft, pairs, prompts = (
        json.loads(path.read_text())
        for path in (short_pipeline.sft_data, short_pipeline.preference_data, short_pipeline.prompt_data)
    )
    sft = [{"question": record["prompt"], "answer": record["completion"]} for record in sft]
    pairs = [{"text": r["prompt"], "better": r["chosen"], "worse": r["rejected"]} for r in pairs]
    return replace(
        short_pipeline,
        output_dir=folder / "run",
        sft_data=write(folder / "sft.json", sft),
        preference_data=write(folder / "pairs.json", pairs),
        prompt_data=write(folder / "prompts.json", prompts),
    )


SFT_COLUMNS, PAIR_COLUMNS = ("prompt=question", "completion=answer"), ("prompt=text", "chosen=better", "rejected=worse")


def test_the_configuration_keeps_the_columns_of_every_stage_and_evaluations_read_by_them(config):
    rlhf.train.run(replace(narrow(config, SFTRun), data=DataConfig(columns=SFT_COLUMNS)))
    rlhf.train.run(replace(narrow(config, RewardRun), data=DataConfig(columns=PAIR_COLUMNS)))
    kept = load_config(str(config.output_dir / "config.yaml"))
    assert kept.data.columns == (*SFT_COLUMNS, *PAIR_COLUMNS)
    kinds = {data.schema: data.problem for data in held_out_data(config.output_dir, kept)[:2]}
    assert kinds == {DEMONSTRATIONS: "", PREFERENCES: ""}
    report = run_evaluation(EvaluateConfig(model_dir=config.output_dir, threads=1))
    assert [evaluation.kind for evaluation in report.evaluations] == ["sft", "reward"]
    again = replace(narrow(config, RewardRun), data=DataConfig(columns=PAIR_COLUMNS), resume=True)
    rlhf.train.run(again)  # finished, and nothing is added twice
    assert load_config(str(config.output_dir / "config.yaml")).data.columns == (*SFT_COLUMNS, *PAIR_COLUMNS)


@pytest.mark.parametrize("kind", [PipelineRun, PPORun])
def test_a_column_that_no_file_has_stops_a_run_before_it_begins(config, tmp_path, kind):
    columns = (*SFT_COLUMNS, *PAIR_COLUMNS, "prompt=quest")
    run = replace(narrow(config, kind), output_dir=tmp_path / "run", data=DataConfig(columns=columns))
    name = "quest" if kind is PipelineRun else "question"
    with pytest.raises(
        UserError, match=f"^--data.columns prompt={name}: no file that is read for 'prompt' has a column"
    ):
        rlhf.train.run(run)
    assert not (tmp_path / "run").exists()


def test_the_other_programs_refuse_a_column_that_no_file_has(config, tmp_path):
    prompts = write(tmp_path / "prompts.json", [{"prompt": "a"}])
    message = (
        "^--data.columns prompt=q: no file that is read for 'prompt' has a column 'q'; .*prompts.json has 'prompt'$"
    )
    with pytest.raises(UserError, match=message):
        read_prompts(prompts, ("prompt=q",))
    evaluation = EvaluateConfig(
        model_dir=config.output_dir, test_data=(prompts,), data=DataConfig(columns=("prompt=q",))
    )
    (config.output_dir / "sft").mkdir(parents=True, exist_ok=True)
    with pytest.raises(UserError, match=message):
        run_evaluation(evaluation)


CHATS = {
    "an answer ends it": (
        [user("a"), said("b"), user("c"), said("d")],
        DEMONSTRATIONS,
        [user("a"), said("b"), user("c")],
    ),
    "a question ends it": ([user("a"), said("b"), user("c")], PROMPTS, [user("a"), said("b"), user("c")]),
    "two questions": ([user("a"), user("b"), said("c")], DEMONSTRATIONS, [user("a"), user("b")]),
    "no answer": ([user("a")], PROMPTS, [user("a")]),
}


@pytest.mark.parametrize("case", CHATS)
@pytest.mark.parametrize("extra", [{}, {"prompt": "a", "id": 1}], ids=["messages", "messages and prompt"])
def test_the_turns_before_the_last_answer_are_the_prompt_of_messages(tmp_path, case, extra):
    messages, kind, prompt = CHATS[case]
    path = write(tmp_path / "chats.json", [extra | {"dialogue": messages}, extra | {"dialogue": messages}])
    (data,) = classify_files([path], ["messages=dialogue"])
    assert data.schema is kind
    assert read_prompts(path, ["messages=dialogue"]) == [prompt, prompt]
    if kind is DEMONSTRATIONS:
        assert unique_prompts(data).records == [0]


def test_a_policy_answers_the_last_questions_of_messages(short_pipeline, tmp_path):
    """Without a file of prompts, and with one whose records are whole conversations."""
    write_tokenizer(tmp_path / "tokenizer", None)
    (tmp_path / "mine.jinja").write_text(TEMPLATES["marked"])
    chats = [{"messages": [user(f"topic {n}"), said(f"About {n}.")]} for n in range(8)]
    files = [write(tmp_path / "sft.json", chats), write(tmp_path / "open.json", [{"messages": [user("topic 9")]}])]
    config = replace(
        narrow(short_pipeline, SFTRun),
        output_dir=tmp_path / "run",
        sft_data=files[0],
        data=DataConfig(template=str(tmp_path / "mine.jinja")),
        tokenizer=TokenizerConfig(path=tmp_path / "tokenizer"),
        model=replace(short_pipeline.model, n_positions=96),
    )
    rlhf.train.run(config)
    for number, (path, first) in enumerate(zip(files, ("user: topic 0", "user: topic 9"), strict=True)):
        report = run_evaluation(
            EvaluateConfig(
                model_dir=tmp_path / "run" / "sft", test_data=(path,), eval_type="policy", decoding=("greedy",),
                limit=3, max_new_tokens=4, threads=1, output=tmp_path / f"report {number}",
            )
        )  # fmt: skip
        assert [evaluation.kind for evaluation in report.evaluations] == ["policy"]
        lines = (tmp_path / f"report {number}" / "completions.jsonl").read_text().splitlines()
        assert json.loads(lines[0])["prompt"] == first
