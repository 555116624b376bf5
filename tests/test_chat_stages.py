"""Conversations through every stage, a resumed run, evaluate and generate, on a tiny model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from chat_templates import TEMPLATES, said, user, write_tokenizer
from rlhf.cli.generate import main as generate

import rlhf.train
from rlhf.config import DataConfig, DPORun, PipelineRun, PPORun, RewardRun, SFTRun, TokenizerConfig
from rlhf.data.data_files import data_files
from rlhf.data.dataset import load_dataset
from rlhf.data.encoding import chat_tokenizer
from rlhf.data.schema import DEMONSTRATIONS
from rlhf.errors import UserError
from rlhf.evaluate.evaluate_config import EvaluateConfig
from rlhf.evaluate.evaluation import run_evaluation
from rlhf.io.presets import narrow
from rlhf.io.tokenizer import Tokenizer
from rlhf.models.gpt2_config import GPT2Config
from rlhf.train.dpo import check_dpo
from rlhf.train.reward import check_reward
from rlhf.train.sft import check_sft
from rlhf.train.stage_inputs import ModelSpec

REWARD = """
def polite(prompts, completions, topic):
    assert all([turn["role"] for turn in prompt][-1] == "user" for prompt in prompts)
    assert all([set(turn) for turn in completion] == [{"role", "content"}] for completion in completions)
    assert all(completion[0]["role"] == "assistant" for completion in completions)
    assert all(isinstance(name, str) for name in topic)
    return [float(len(completion[0]["content"])) for completion in completions]

def better(prompts, first, second):
    return [float(len(a[0]["content"]) >= len(b[0]["content"])) for a, b in zip(first, second)]
"""
TOPICS = [f"topic {number}" for number in range(20)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    sft = [{"dialogue": [user(t), said(f"About {t}."), user("more"), said("No.")]} for t in TOPICS]
    pairs = [{"chosen": [user(t), said("With pleasure.")], "rejected": [user(t), said(f"No {t}")]} for t in TOPICS]
    prompts = [{"prompt": [user(t)], "topic": t} for t in TOPICS]
    for name, records in {"sft": sft, "pairs": pairs, "prompts": prompts}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    (folder / "judges.py").write_text(REWARD)
    write_tokenizer(folder / "tokenizer", None)
    (folder / "mine.jinja").write_text(TEMPLATES["marked"])
    return folder


@pytest.fixture(scope="module")
def config(folder, short_pipeline) -> PipelineRun:
    return replace(
        short_pipeline,
        output_dir=folder / "run",
        sft_data=folder / "sft.jsonl",
        preference_data=folder / "pairs.jsonl",
        prompt_data=(folder / "prompts.jsonl",),
        data=DataConfig(columns=("messages=dialogue",), template=str(folder / "mine.jinja")),
        tokenizer=TokenizerConfig(path=folder / "tokenizer"),
        model=replace(short_pipeline.model, n_positions=96),
        ppo=replace(
            short_pipeline.ppo,
            num_iterations=2,
            reward=(str(folder / "run" / "reward"), f"0.1*{folder / 'judges.py'}:polite"),
        ),
    )


@pytest.fixture(scope="module")
def finished(config) -> PipelineRun:
    rlhf.train.run(config)
    return config


def test_every_model_has_the_template_and_ends_turns_as_it_says(finished, folder):
    from transformers import AutoTokenizer

    for name in ("sft", "reward", "policy"):
        saved = Tokenizer.load(finished.output_dir / name)
        assert saved.chat_template.source == TEMPLATES["marked"]
        assert AutoTokenizer.from_pretrained(finished.output_dir / name).chat_template == TEMPLATES["marked"]
    settings = json.loads((finished.output_dir / "policy" / "config.json").read_text())
    assert saved.end_of_turn_id in [settings["eos_token_id"]]


def test_samples_show_the_conversation_as_text(finished):
    lines = (finished.output_dir / "logs" / "samples.jsonl").read_text().splitlines()
    assert all(json.loads(line)["prompt"].startswith("user: topic ") for line in lines)


def test_a_resumed_run_ends_with_the_same_bits(finished, config, folder):
    stopped = replace(config, output_dir=folder / "resumed")
    stopped = replace(
        stopped, ppo=replace(stopped.ppo, reward=(str(folder / "resumed" / "reward"), config.ppo.reward[1]))
    )
    rlhf.train.run(stopped, callback=lambda stage, step, metrics: (stage, step) == ("sft", 2))
    rlhf.train.run(replace(stopped, resume=True))
    for name in ("sft", "reward", "policy"):
        model = (folder / "resumed" / name / "model.safetensors").read_bytes()
        assert model == (finished.output_dir / name / "model.safetensors").read_bytes()


def test_another_template_does_not_continue_the_run(config, folder):
    changed = replace(narrow(config, SFTRun), output_dir=folder / "changed")
    rlhf.train.run(changed, callback=lambda stage, step, metrics: step == 2)
    (folder / "other.jinja").write_text(TEMPLATES["chatml"])
    other = replace(changed, resume=True, data=replace(changed.data, template=str(folder / "other.jinja")))
    with pytest.raises(UserError, match="the chat template has changed"):
        rlhf.train.run(other)


def test_evaluation_reads_the_conversations_that_the_run_held_out(finished, folder):
    report = run_evaluation(EvaluateConfig(model_dir=finished.output_dir, threads=1, limit=4, decoding=("greedy",)))
    assert [evaluation.kind for evaluation in report.evaluations] == ["sft", "reward", "policy"]
    assert report.skipped == {}


def test_evaluation_gives_judges_messages(finished, folder):
    files = (folder / "sft.jsonl", folder / "pairs.jsonl", folder / "prompts.jsonl")
    report = run_evaluation(
        EvaluateConfig(
            model_dir=finished.output_dir,
            test_data=files,
            data=DataConfig(columns=("messages=dialogue",)),
            judge=(f"{folder / 'judges.py'}:polite", f"{folder / 'judges.py'}:better"),
            threads=1,
            limit=4,
            decoding=("greedy",),
            output=folder / "report",
            eval_type="all",
        )
    )
    sft, _, policy = report.evaluations
    assert "eval/judge/polite" in policy.figures["policy"]
    assert sft.facts["tokens"] == sum(answer_tokens(finished, topic) for topic in TOPICS[:4])
    lines = [json.loads(line) for line in (folder / "report" / "completions.jsonl").read_text().splitlines()]
    assert lines[0]["prompt"] == "user: topic 0"


def test_the_unigram_model_knows_the_learnt_turns_alone(finished, folder):
    tokenizer = chat_tokenizer(Tokenizer.load(finished.output_dir / "sft"), finished.data)
    files = data_files(folder / "sft.jsonl", ("messages=dialogue",))
    dataset = load_dataset(files, DEMONSTRATIONS, tokenizer, folder / "cache")
    assert len(dataset.learnt_tokens(range(4))) == sum(answer_tokens(finished, topic) for topic in TOPICS[:4])


@pytest.mark.parametrize(
    ("kind", "check", "data"),
    [(SFTRun, check_sft, "sft_val_data"), (RewardRun, check_reward, "preference_val_data"),
     (DPORun, check_dpo, "preference_val_data")],
    ids=["sft", "reward", "dpo"],
)  # fmt: skip
def test_conversations_to_validate_on_need_a_template_too(folder, short_pipeline, tmp_path, kind, check, data):
    records = {
        "sft_val_data": {"messages": [user("a"), said("b")]},
        "preference_val_data": {"chosen": [user("a"), said("b")], "rejected": [user("a"), said("c")]},
    }
    (tmp_path / "chats.json").write_text(json.dumps([records[data]]))
    run = narrow(replace(short_pipeline, **{data: tmp_path / "chats.json"}), kind)
    spec = ModelSpec(GPT2Config(), Tokenizer.load(folder / "tokenizer"), "")
    with pytest.raises(UserError, match=r"chats\.json: holds conversations, "):
        check(run, {"sft": spec})


def answer_tokens(finished: PipelineRun, topic: str) -> int:
    """The tokens of both answers with the ends of their turns."""
    first, second = Tokenizer.load(finished.output_dir / "sft").encode([f"About {topic}.", "No."])
    return len(first) + len(second) + 2


def test_generate_writes_conversations_and_the_users_turn(finished, folder):
    model = ["--model-dir", str(finished.output_dir), "--greedy", "--max-new-tokens", "4", "--threads", "1"]
    (folder / "one.json").write_text(json.dumps([{"prompt": [user("topic 3")]}]))
    assert generate([*model, "--prompt-file", str(folder / "one.json"), "--output", str(folder / "a.jsonl")]) == 0
    assert generate([*model, "--chat", "--prompt", "topic 3", "--output", str(folder / "b.jsonl")]) == 0
    framed = Tokenizer.load(finished.output_dir / "sft").chat_template
    text = framed.render([user("topic 3")], add_generation_prompt=True).text
    first, second = (json.loads((folder / name).read_text()) for name in ("a.jsonl", "b.jsonl"))
    assert first == second
    assert first["prompt"] == [user("topic 3")]
    assert text.endswith("assistant\n")


def test_every_stage_refuses_conversations_without_a_template_before_it_trains(config, folder):
    """Also the last stage of a pipeline whose first ones read texts."""
    (folder / "texts.json").write_text(json.dumps([{"prompt": "a", "completion": "b"}] * 4))
    (folder / "pairs.json").write_text(json.dumps([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4))
    plain = replace(config, data=DataConfig(), output_dir=folder / "none", tokenizer=TokenizerConfig(vocab_size=300))
    plain = replace(plain, ppo=replace(plain.ppo, reward=()), sft_data=folder / "texts.json")
    late = replace(plain, preference_data=folder / "pairs.json")
    for refused in (narrow_data(plain, folder), plain, late):
        with pytest.raises(UserError, match=r"holds conversations, .*add --data\.template chatml"):
            rlhf.train.run(refused)
        assert not (folder / "none" / "sft").exists()


def narrow_data(config: PipelineRun, folder: Path) -> PipelineRun:
    (folder / "chats.json").write_text(json.dumps([{"messages": [user("a"), said("b")]}] * 4))
    return replace(config, sft_data=folder / "chats.json")


@pytest.mark.parametrize("kind", [RewardRun, PPORun])
def test_a_single_stage_takes_a_template_for_a_model_without_one(config, folder, kind, tmp_path):
    """A model of texts learns conversations, and what it becomes has the template."""
    base = folder / "texts-model"
    if not base.exists():
        (folder / "texts.json").write_text(json.dumps([{"prompt": "a", "completion": "b"}] * 8))
        texts = replace(config, data=DataConfig(), output_dir=folder / "texts-run", sft_data=folder / "texts.json")
        rlhf.train.run(narrow(texts, SFTRun))
        (folder / "texts-run" / "sft").rename(base)
    run = narrow(config, kind)
    run = replace(run, output_dir=tmp_path, tokenizer=TokenizerConfig(), data=DataConfig(template="plain"))
    run = replace(run, model=type(run.model)())
    if kind is RewardRun:
        run = replace(run, reward=replace(run.reward, model_path=base))
    else:
        run = replace(run, ppo=replace(run.ppo, model_path=base, reward=(config.ppo.reward[1],)))
    result = rlhf.train.run(run)
    assert Tokenizer.load(result.model).chat_template.source == TEMPLATES["plain"]
