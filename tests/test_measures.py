"""What evaluation measures of packed texts equals what each text gives alone."""

import pytest
import torch
from laws import assert_close

from rlhf import random
from rlhf.data.collate import join_completions, pack_completions, unpack_tokens
from rlhf.evaluate.measures import make_measure
from rlhf.kl import exact_kl
from rlhf.models import gpt2
from rlhf.models.decoding import generate_completions as generate
from rlhf.models.forward import forward
from rlhf.models.gpt2_config import GPT2Config
from rlhf.ops import entropy, token_log_probs
from rlhf.tree import tree_map_named

OTHER = GPT2Config(vocab_size=48, n_positions=40, n_embd=24, n_layer=1, n_head=3)


def loud(seed):
    """Weights so large that every part of the model shows."""
    return tree_map_named(lambda _, leaf: 10 * leaf if leaf.ndim > 1 else leaf, gpt2.init(OTHER, key=random.key(seed)))


@pytest.fixture
def models(params):
    reference = loud(5)
    reward = {"trunk": loud(6), "head": {"weight": random.normal(random.key(8), (1, 24))}}
    return params, {"reference": reference, "reward_model_0": reward}


@pytest.fixture
def texts(tokens, params, config):
    """Prompts [n] and completions [B, T] with lengths, of different lengths; the first is the model's own choice."""
    prompts = [tokens[0, :3].numpy(), tokens[1, :1].numpy(), tokens[2, :5].numpy()]
    options = {"config": config, "max_new_tokens": 7, "top_k": 1}
    own = generate(params, tokens[:1, :3], torch.tensor([3]), random.key(9)[None], **options).tokens
    return prompts, torch.cat([own, tokens[1:, 5:]]), torch.tensor([7, 2, 5])


def test_measures_of_packed_texts_are_those_of_each_alone(models, texts, config):
    """A reference of another shape, too: its own number of heads is used."""
    params, frozen = models
    prompts, completions, lengths = texts
    measure = make_measure(config, reference=OTHER, reward_models=[OTHER], temperature=0.7)
    packs = pack_completions(join_completions(prompts, completions, lengths), range(3), rows=2, row_length=14)
    results = [measure(params, frozen, pack.batch) for pack in packs]
    found = [unpack_tokens(packs, [result[field] for result in results], (3, 7)) for field in range(5)]
    scores = torch.cat([result.scores for result in results])[
        torch.argsort(torch.cat([pack.sequences for pack in packs]))
    ]
    for row, (prompt, length) in enumerate(zip(prompts, lengths.tolist(), strict=True)):
        whole = torch.cat([torch.from_numpy(prompt), completions[row, :length]])[None]
        own, other = (
            forward(p, whole[:, :-1], config=c)[0, len(prompt) - 1 :]
            for p, c in ((params, config), (frozen["reference"], OTHER))
        )
        targets = whole[0, len(prompt) :]
        expected = (
            token_log_probs(own, targets, temperature=0.7),
            own.argmax(-1) == targets,
            entropy(own, temperature=0.7),
            token_log_probs(other, targets, temperature=0.7),
            exact_kl(own, other, temperature=0.7),
        )
        for field, value in enumerate(expected):
            assert_close(found[field][row, :length].float(), value.float(), 1e-4)
        reward_model = frozen["reward_model_0"]
        hidden = gpt2.hidden_states(reward_model["trunk"], whole, config=OTHER)[0, -1]
        assert_close(scores[row, 0], hidden @ reward_model["head"]["weight"][0], 1e-4)
    assert found[1][0].all(), "the model's own choice"
    assert not found[1].all()


def test_without_reference_and_reward_models_there_is_nothing_of_theirs(params, texts, config):
    prompts, completions, lengths = texts
    (pack,) = pack_completions(join_completions(prompts, completions, lengths), range(3), rows=8, row_length=14)
    found = make_measure(config)(params, {}, pack.batch)
    assert not found.ref_log_probs.any()
    assert not found.exact_kl.any()
    assert found.scores.shape == (3, 0)
    assert found.log_probs.dtype == torch.float32
