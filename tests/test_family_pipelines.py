"""Every family through the whole system: SFT, reward model, PPO, resume, Ray, evaluation, and a folder to give away."""

import dataclasses
import json

import pytest
import torch
from families import FAMILIES

import rlhf
from rlhf.config import ModelConfig, PPOConfig, SFTConfig
from rlhf.errors import UserError
from rlhf.evaluate.evaluate_config import EvaluateConfig
from rlhf.evaluate.evaluation import run_evaluation
from rlhf.io.model_folder import load_language_model, load_reward_model
from rlhf.models.forward import forward
from rlhf.train.stage_inputs import new_config

OTHERS = [name for name in FAMILIES if name != "gpt2"]
STAGES = {"sft": "sft", "reward": "reward", "ppo": "policy"}


@pytest.fixture(scope="module")
def run_of(short_pipeline, tmp_path_factory):
    """family -> a finished pipeline, with a separate critic; run once."""
    done = {}

    def run(family):
        if family not in done:
            model = ModelConfig(family=family, preset="tiny", n_layer=1, n_embd=16, n_head=2, n_positions=64)
            config = dataclasses.replace(short_pipeline, model=model, output_dir=tmp_path_factory.mktemp(family))
            rlhf.train.run(config)
            done[family] = config
        return done[family]

    return run


def weights(config):
    return {stage: (config.output_dir / folder / "model.safetensors").read_bytes() for stage, folder in STAGES.items()}


@pytest.mark.parametrize("family", OTHERS)
def test_a_pipeline_trains_what_transformers_loads(family, run_of):
    import transformers

    folder = run_of(family).output_dir
    first = rlhf.load_run(folder).metrics["ppo"]["val/ratio_first"].values
    assert first == pytest.approx([1.0] * 4, abs=1e-5)
    found = load_language_model(folder / "policy")
    assert found.config.model_type == family
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "policy").eval()
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            forward(found.params, tokens, config=found.config), theirs(tokens).logits, atol=1e-5, rtol=0
        )
    for trained in ("reward", "policy/critic"):
        assert load_reward_model(folder / trained).config.model_type == family
        kind = transformers.AutoModelForSequenceClassification
        _, report = kind.from_pretrained(folder / trained, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_resuming_gives_the_bits_of_the_run_that_never_stopped(family, run_of, tmp_path):
    whole = run_of(family)
    stopped = dataclasses.replace(whole, output_dir=tmp_path / "run")
    rlhf.train.run(stopped, callback=lambda stage, step, metrics: (stage, step) == ("ppo", 2))
    assert not (stopped.output_dir / "policy").exists()
    rlhf.train.run(dataclasses.replace(stopped, resume=True))
    assert weights(stopped) == weights(whole)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_what_was_trained_is_evaluated(family, run_of, tmp_path):
    report = run_evaluation(EvaluateConfig(model_dir=run_of(family).output_dir, output=tmp_path / "report", threads=1))
    assert [evaluation.kind for evaluation in report.evaluations] == ["sft", "reward", "policy", "policy"]


@pytest.mark.parametrize("family", ["qwen2", "gpt_neox"])
def test_a_critic_shared_or_from_the_policy_and_bfloat16_with_checkpointing(family, run_of, tmp_path):
    """The separate critic starts from a policy with an output layer of its own, because there is no reward model."""
    start = run_of(family)
    reward = tmp_path / "length.py"
    reward.write_text(
        "def longest(prompts, completions, **columns):\n    return [float(len(c)) for c in completions]\n"
    )
    for critic in ("shared", "separate"):
        ppo = dataclasses.replace(
            start.ppo, model_path=start.output_dir / "sft", reward=(f"{reward}:longest",), critic=critic,
            gradient_checkpointing=True, num_iterations=2,
        )  # fmt: skip
        config = dataclasses.replace(start, ppo=ppo, output_dir=tmp_path / critic, precision="bf16", start_at="ppo")
        rlhf.train.run(config)
        assert torch.isfinite(
            torch.as_tensor(rlhf.load_run(tmp_path / critic).metrics["ppo"]["loss/value_avg"].values)
        ).all()


def test_a_reward_model_of_another_family_scores_the_policy(run_of, tmp_path):
    """Where the tokenizers are the same; and a clear refusal where they are not."""
    start, other = run_of("llama"), run_of("gpt_neox")
    ppo = PPOConfig(**(vars(start.ppo) | {"reward": (str(other.output_dir / "reward"),), "num_iterations": 2}))
    config = dataclasses.replace(
        start, ppo=dataclasses.replace(ppo, model_path=start.output_dir / "sft"), output_dir=tmp_path / "mixed",
        start_at="ppo",
    )  # fmt: skip
    rlhf.train.run(config)
    assert load_language_model(tmp_path / "mixed" / "policy").config.model_type == "llama"
    assert load_reward_model(tmp_path / "mixed" / "policy" / "critic").config.model_type == "gpt_neox"
    settings = other.output_dir / "reward" / "tokenizer.json"
    changed = json.loads(settings.read_text())
    changed["model"]["vocab"] = {token: number for number, token in enumerate(reversed(changed["model"]["vocab"]))}
    changed["added_tokens"] = [
        entry | {"id": changed["model"]["vocab"][entry["content"]]} for entry in changed["added_tokens"]
    ]
    before = settings.read_bytes(), (other.output_dir / "reward" / "manifest.json").read_bytes()
    settings.write_text(json.dumps(changed))
    (other.output_dir / "reward" / "manifest.json").unlink()
    try:
        with pytest.raises(UserError, match=r"the reward model's vocabulary .* is not the policy's"):
            rlhf.train.run(dataclasses.replace(config, output_dir=tmp_path / "refused"))
    finally:
        settings.write_bytes(before[0])
        (other.output_dir / "reward" / "manifest.json").write_bytes(before[1])


# ---- shapes of models from scratch


def test_a_preset_of_one_family_brings_the_family():
    assert new_config(ModelConfig(preset="smollm2-135m"), 100).model_type == "llama"
    assert new_config(ModelConfig(preset="qwen3-0.6b"), 100).head_dim == 128
    assert new_config(ModelConfig(preset="pythia-70m", n_layer=2), 100).n_layer == 2
    assert new_config(ModelConfig(), 100).model_type == "gpt2"
    assert new_config(ModelConfig(family="gpt2", preset="gpt2", n_layer=2), 100).n_embd == 768


NO_SIZE = "gpt_neox has no such size"
REFUSED = {
    "no key-value heads in GPT-2": ({"n_kv_head": 2}, r"model.n_kv_head: gpt2 has no such size; leave it out"),
    "no inner width in GPT-2": ({"n_inner": 64}, r"model.n_inner: gpt2 has no such size"),
    "none in NeoX": ({"family": "gpt_neox", "n_kv_head": 2}, f"model.n_kv_head: {NO_SIZE}"),
    "another family's preset": (
        {"family": "qwen2", "preset": "smollm2-135m"},
        r"--model.preset smollm2-135m: belongs to llama, not to qwen2; drop --model.family, or name a preset of "
        r"qwen2: tiny, small, qwen2.5-0.5b",
    ),
    "the default family beside another's preset": (
        {"family": "gpt2", "preset": "pythia-70m"}, "--model.preset pythia-70m: belongs to gpt_neox, not to gpt2; drop"
    ),
    "no such family": ({"family": "mamba"}, r"--model.family: model_type is 'mamba', expected one of gpt2"),
    "heads": ({"family": "llama", "n_head": 3}, r"model.n_head must be a multiple of n_kv_head \(2\), got 3"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_sizes_that_a_family_does_not_have_are_refused_by_name(case):
    settings, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        new_config(ModelConfig(**settings), 100)


def test_dropout_is_refused_where_a_family_has_none(short_pipeline, tmp_path):
    config = dataclasses.replace(
        short_pipeline, model=ModelConfig(family="llama"), sft=SFTConfig(dropout=0.1), output_dir=tmp_path / "run"
    )
    with pytest.raises(
        UserError, match=r"--sft.dropout 0\.1: models of the family llama have no dropout; leave it out"
    ):
        rlhf.train.run(config)
