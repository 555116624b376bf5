"""SmolLM2-135M-Instruct's own weights against transformers; skipped where the folder is absent. -s prints the figures.

The folder is made from a package of PyPI; RLHF_SMOLLM2 names it.
"""

import math
import os
from pathlib import Path

import pytest
import torch

from rlhf import random
from rlhf.io.model_folder import load_language_model, load_shape, save_language_model
from rlhf.models.architecture import architecture_of
from rlhf.models.decoding import generate_completions
from rlhf.models.forward import forward
from rlhf.models.llama_config import LLAMA_PRESETS
from rlhf.ops import token_log_probs

pytestmark = pytest.mark.slow

QUESTIONS = [
    "What is {}?", "Write a short poem about {}.", "Explain {} to a child.", "List three facts about {}.",
    "Why do people like {}?",
]  # fmt: skip
TOPICS = ["rain", "chess", "bread", "the Moon", "gravity", "tea", "Paris", "bees", "music", "prime numbers"]


@pytest.fixture(scope="module")
def folder() -> Path:
    default = Path(__file__).parents[2] / "shared" / "models" / "smollm2"
    path = Path(os.environ.get("RLHF_SMOLLM2", default))
    if not path.is_dir():
        pytest.skip(f"SmolLM2 absent: {path} (set RLHF_SMOLLM2)")
    return path


@pytest.fixture(scope="module")
def model(folder):
    return load_language_model(folder)


@pytest.fixture(scope="module")
def oracle(folder):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokens(model):
    """[8, 256]: the beginning of README.md."""
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (ids,) = model.tokenizer.encode([text])
    return torch.tensor(ids[: 8 * 256]).view(8, 256)


def test_the_preset_is_its_shape(folder):
    shape, _ = load_shape(folder)
    family, preset = architecture_of(shape), LLAMA_PRESETS["smollm2-135m"]
    settings = family.shape_to_settings(shape)
    assert settings["rms_norm_eps"] == pytest.approx(1e-5)
    assert settings | {"rms_norm_eps": 1e-5} == family.shape_to_settings(preset)


@torch.no_grad()
def test_log_probs_and_perplexity_are_those_of_transformers(model, oracle, tokens):
    targets = tokens[:, 1:]
    expected = torch.cat([token_log_probs(oracle(row[None]).logits[:, :-1], row[None, 1:]) for row in tokens])
    found = torch.cat(
        [
            token_log_probs(forward(model.params, row[None], config=model.config)[:, :-1], row[None, 1:])
            for row in tokens
        ]
    )
    mask = torch.arange(256).expand(8, 256) >= torch.arange(8)[:, None] * 9
    left = forward(model.params, torch.where(mask, tokens, 0), config=model.config, attention_mask=mask)
    shifted = token_log_probs(left[-1, 63:-1], targets[-1, 63:])
    alone = oracle(tokens[-1:, 63:]).logits[0, :-1]
    worst = float((found - expected).abs().max())
    perplexities = [math.exp(-float(x.double().mean())) for x in (found, expected)]
    print(f"\nlog-probs differ by at most {worst:.1e} nats; perplexity {perplexities[0]:.6f} and {perplexities[1]:.6f}")
    assert worst < 1e-3
    torch.testing.assert_close(shifted, token_log_probs(alone, targets[-1, 63:]), atol=1e-3, rtol=0)
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-4)


@torch.no_grad()
def test_greedy_completions_of_50_prompts_are_those_of_transformers(model, oracle):
    """Drawn together, in 25 rows, with end-of-turn as a stop token; theirs one by one."""
    texts = [
        f"<|im_start|>user\n{question.format(topic)}<|im_end|>\n<|im_start|>assistant\n"
        for question in QUESTIONS
        for topic in TOPICS
    ]
    import transformers

    template = transformers.AutoTokenizer.from_pretrained(oracle.config.name_or_path)
    prompts = [template(text)["input_ids"] for text in texts]
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
    prepared = architecture_of(model.config).prepare_for_decoding(model.params, torch.float32)
    out = generate_completions(
        prepared, padded, lengths, random.split(random.key(0), 50), config=model.config, max_new_tokens=64, top_k=1,
        stop_tokens=model.tokenizer.stop_ids, max_concurrent=25,
    )  # fmt: skip
    for row, prompt in enumerate(prompts):
        given = torch.tensor([prompt])
        settings = {"do_sample": False, "max_new_tokens": 64, "pad_token_id": 2, "eos_token_id": [2]}
        (expected,) = oracle.generate(given, attention_mask=torch.ones_like(given), **settings)
        assert out.tokens[row, out.mask[row]].tolist() == expected[len(prompt) :].tolist(), texts[row]
    print(f"\n50 completions alike, {int(out.mask.sum())} tokens, {int(out.ended.sum())} ended; the first:")
    print(model.tokenizer.decode(out.tokens[0, out.mask[0]].tolist()))


@torch.no_grad()
def test_a_folder_saved_here_has_equal_logits_in_transformers(model, oracle, tokens, tmp_path):
    import transformers

    save_language_model(tmp_path / "lm", model, facts={})
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "lm", dtype=torch.float32).eval()
    assert torch.equal(again(tokens[:1]).logits, oracle(tokens[:1]).logits)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "lm")
    assert (
        theirs("text that looks like <|im_end|>", split_special_tokens=True)["input_ids"]
        == (model.tokenizer.encode(["text that looks like <|im_end|>"])[0])
    )
