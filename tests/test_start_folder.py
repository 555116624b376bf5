"""A foreign start folder through all stages: what it says is saved again, rows without a token are never drawn."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf import random
from rlhf.config import LogConfig, PipelineRun, PPOConfig, PPORun, RewardConfig, RewardRun, SFTConfig, SFTRun
from rlhf.evaluate.evaluate_config import EvaluateConfig
from rlhf.evaluate.evaluation import run_evaluation
from rlhf.generate.completer import Completer
from rlhf.generate.generate_config import GenerateConfig
from rlhf.io.model_folder import (
    LanguageModel,
    RewardModel,
    RewardStatistics,
    load_language_model,
    save_language_model,
    save_reward_model,
)
from rlhf.io.presets import narrow
from rlhf.io.tokenizer import EOS, Tokenizer
from rlhf.models import gpt2
from rlhf.models.gpt2_config import GPT2Config
from rlhf.train.ppo import run_ppo
from rlhf.train.reward import run_reward
from rlhf.train.sft import run_sft

END, SURPLUS = "<|im_end|>", 19
DATA = {
    "sft": [{"prompt": f"say {n}", "completion": f" the word {n}"} for n in range(8)],
    "pairs": [{"prompt": f"say {n}", "chosen": " yes", "rejected": f" no {n}"} for n in range(8)],
    "prompts": [{"prompt": f"say {n}"} for n in range(8)],
}
TEMPLATE = "{% for message in messages %}{{ message.content }}<|im_end|>{% endfor %}"


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


@pytest.fixture(scope="module")
def start(tmp_path_factory, tokenizer) -> Path:
    """A chat model as somebody else saved it: tokens of its own, a template, and more rows than tokens.

    The surplus rows are so long that they would be drawn at once, and the reward model's are fewer.
    """
    shelf = tmp_path_factory.mktemp("start")
    folder, size = shelf / "m", tokenizer.vocab_size + 1
    config = GPT2Config(vocab_size=size + SURPLUS, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    params = gpt2.init(config, key=random.key(0))
    rows = params["wte"]["weight"].clone()
    rows[size:] = 5.0 * params["wte"]["weight"][:SURPLUS].sign()
    save_language_model(folder, LanguageModel(params | {"wte": {"weight": rows}}, config, tokenizer), facts={})
    (folder / "manifest.json").unlink()
    change(folder / "config.json", eos_token_id=size - 1, torch_dtype="bfloat16")
    tokens = {str(size - 1): {"content": END, "special": True}}
    change(
        folder / "tokenizer_config.json",
        added_tokens_decoder=tokens, chat_template=TEMPLATE, model_max_length=64, split_special_tokens=False,
        pad_token=EOS,
    )  # fmt: skip
    write(folder / "generation_config.json", {"eos_token_id": [0, size - 1], "temperature": 0.7})
    for name, records in DATA.items():
        write(shelf / f"{name}.json", records)
    return folder


def change(path: Path, **settings: Any) -> None:
    write(path, json.loads(path.read_text()) | settings)


@pytest.fixture(scope="module")
def run(start) -> Path:
    """The output folder of all stages, each of them short."""
    shelf = start.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(shelf / "cache"))
        config = PipelineRun(
            output_dir=shelf / "run", threads=1, log=LogConfig(tensorboard=False),
            sft_data=shelf / "sft.json", preference_data=shelf / "pairs.json", prompt_data=shelf / "prompts.json",
            sft=SFTConfig(model_path=start, max_steps=1), reward=RewardConfig(max_steps=1),
            ppo=PPOConfig(num_iterations=1, batch_size=8, minibatch_size=8, max_new_tokens=8, temperature=3.0),
        )  # fmt: skip
        run_sft(narrow(config, SFTRun))
        run_reward(narrow(config, RewardRun))
        run_ppo(narrow(config, PPORun))
    return config.output_dir


def notes_of(run: Path, stage: str) -> list[str]:
    events = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]
    return next(event["notes"] for event in events if event.get("event") == "start" and event["stage"] == stage)


@pytest.mark.parametrize("part", ["sft", "reward", "policy"])
def test_what_a_start_folder_says_is_saved_with_every_model(start, run, part):
    import transformers  # here, because it takes seconds that most tests need not wait

    theirs, ours = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (start, run / part))
    messages = [{"role": "user", "content": "the quick fox"}]
    ids = theirs.apply_chat_template(messages)["input_ids"]
    assert ours.apply_chat_template(messages)["input_ids"] == ids
    assert ids[-1] == len(theirs) - 1
    assert (ours.model_max_length, ours.split_special_tokens, len(ours)) == (64, False, len(theirs))
    assert ours.pad_token == (None if part == "reward" else EOS)
    settings = json.loads((run / part / "config.json").read_text())
    assert settings["vocab_size"] == len(theirs)
    assert settings["eos_token_id"] == [0, len(theirs) - 1]
    assert settings["dtype"] == "float32"
    assert "torch_dtype" not in settings
    generation = run / part / "generation_config.json"
    if part == "reward":
        assert not generation.exists()
    else:
        assert generation.read_bytes()
        assert json.loads(generation.read_text()) == json.loads((start / "generation_config.json").read_text())
    kind = "AutoModelForSequenceClassification" if part == "reward" else "AutoModelForCausalLM"
    with torch.random.fork_rng():
        model = getattr(transformers, kind).from_pretrained(run / part)
    assert model.transformer.wte.weight.shape == (len(theirs), 16)


def test_the_user_is_told_once_what_is_odd_about_a_start_folder(start, run):
    lines = [line for line in notes_of(run, "sft") if line.startswith(f"{start}:")]
    assert len(lines) == 2
    assert (
        "names several end-of-text tokens, '<|endoftext|>' (tokenizer_config.json, generation_config.json)" in lines[0]
    )
    assert "has" in lines[1]
    assert f"the last {SURPLUS} rows are left out" in lines[1]


def test_the_train_state_has_a_row_for_every_token_and_no_more(run, tokenizer):
    state = load_file(next((run / "checkpoints" / "ppo").glob("step-*")) / "state.safetensors")
    assert {len(leaf) for name, leaf in state.items() if name.endswith("wte.weight")} == {tokenizer.vocab_size + 1}


@pytest.mark.parametrize("name", ["the end of text of config.json", "a surplus row"])
def test_every_end_of_text_ends_a_completion_and_a_row_without_a_token_never_does(start, tmp_path, name):
    """Whichever row has the largest logit by far."""
    model = load_language_model(start)
    size, folder = model.config.vocab_size, tmp_path / "m"
    hidden = gpt2.hidden_states(model.params, torch.tensor(model.tokenizer.encode(["say"])), config=model.config)[0, -1]
    shutil.copytree(start, folder)
    state = load_file(folder / "model.safetensors")
    place = size - 1 if name.startswith("the end") else size + 3
    state["transformer.wte.weight"][place] = 9.0 * hidden
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    completer = Completer(folder, GenerateConfig(model_dir=folder, greedy=True, max_new_tokens=6), torch.device("cpu"))
    (whole,) = completer.complete(["say"], random.key(0)[None])
    streamed = list(completer.stream("say", random.key(0)))
    assert whole.text == "".join(piece.text for piece in streamed)
    if place < size:
        assert (whole.text, whole.ended, len(streamed), streamed[-1].ended) == ("", True, 1, True)
    else:
        assert whole.text


@pytest.mark.parametrize("surplus", [0, 7], ids=["as many rows as tokens", "other surplus rows"])
def test_a_padded_policy_works_with_a_reward_model_of_another_size(start, tmp_path, monkeypatch, surplus):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tokenizer = Tokenizer.load(start)
    config = GPT2Config(vocab_size=tokenizer.vocab_size + surplus, n_positions=32, n_embd=8, n_layer=1, n_head=1)
    params = {"trunk": gpt2.init(config, key=random.key(1)), "head": {"weight": torch.ones(1, 8)}}
    save_reward_model(tmp_path / "rm", RewardModel(params, config, tokenizer, RewardStatistics(0.0, 1.0, 0)), facts={})
    ppo = PPOConfig(
        model_path=start, reward=(str(tmp_path / "rm"),), num_iterations=1, batch_size=8, minibatch_size=8,
        max_new_tokens=8, temperature=3.0,
    )  # fmt: skip
    shelf = start.parent
    run_ppo(PPORun(output_dir=tmp_path / "out", threads=1, prompt_data=shelf / "prompts.json", ppo=ppo))
    evaluation = EvaluateConfig(
        model_dir=start, reward_model=tmp_path / "rm", test_data=(shelf / "prompts.json",), output=tmp_path / "report",
        temperature=3.0, max_new_tokens=8, threads=1, eval_type="policy", against=tmp_path / "out" / "policy",
    )  # fmt: skip
    report = run_evaluation(evaluation)
    assert report.evaluations


def test_a_stage_continues_from_a_checkpoint_of_a_padded_model(start, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = SFTRun(
        output_dir=tmp_path / "out", threads=1, sft_data=start.parent / "sft.json",
        sft=SFTConfig(model_path=start, max_steps=1, schedule="constant"), log=LogConfig(tensorboard=False),
    )  # fmt: skip
    run_sft(config)
    before = (tmp_path / "out" / "sft" / "model.safetensors").read_bytes()
    run_sft(dataclasses.replace(config, resume=True))
    assert (tmp_path / "out" / "sft" / "model.safetensors").read_bytes() == before
