"""Compiled steps and draws of the families beside GPT-2, whose own are in test_compiled."""

import dataclasses

import pytest
import test_compiled
import torch
from families import FAMILIES, disturbed
from laws import assert_close
from torch._dynamo.utils import counters

from rlhf import random
from rlhf.execution.compiled import has_compiler
from rlhf.execution.draws import compiled_draw
from rlhf.execution.gradients import make_gradient
from rlhf.models.architecture import architecture_of
from rlhf.models.decoding import generate_completions
from rlhf.tree import flat_layout

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not has_compiler(), reason="no C++ compiler on the PATH"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),  # the compiler's own
]
FAMILY = pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gpt2"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


def shape_of(family):
    return dataclasses.replace(FAMILIES[family], n_positions=32)


@FAMILY
@pytest.mark.parametrize(("kind", "precision"), [("sft", "fp32"), ("ppo_shared", "bf16")])
def test_gradients_are_those_of_the_plain_function_in_one_graph(family, kind, precision, folder):
    config = shape_of(family)
    make, batches = test_compiled.OBJECTIVES[kind]
    dtype, tolerance = test_compiled.PRECISIONS[precision]
    trained, frozen = test_compiled.models(kind, disturbed(config, scale=0.05), config)
    objective, layout = make(config, dtype=dtype), flat_layout(trained)
    plain, fast = (make_gradient(objective, layout, compile_to) for compile_to in (None, folder))
    before = counters["stats"]["unique_graphs"]
    for batch in batches(config):
        expected, found = plain(trained, frozen, batch), fast(trained, frozen, batch)
        assert_close(found[1], expected[1], tolerance)
        assert float((found[0] - expected[0]).norm()) < tolerance * float(expected[0].norm())
    assert counters["stats"]["unique_graphs"] == before + 1


@FAMILY
def test_compiled_draws_make_the_same_completions(family, folder):
    config = shape_of(family)
    params = architecture_of(config).prepare_for_decoding(disturbed(config), torch.float32)
    prompts = (random.uniform(random.key(3), (5, 6)) * config.vocab_size).long()
    keys, lengths = random.split(random.key(5), 5), torch.tensor([6, 1, 4, 3, 6])
    settings = {"config": config, "max_new_tokens": 20, "stop_tokens": [3, 17, 20], "max_concurrent": 3}
    plain = generate_completions(params, prompts, lengths, keys, **settings)
    found = generate_completions(params, prompts, lengths, keys, draw=compiled_draw(folder), **settings)
    assert torch.equal(found.tokens, plain.tokens)
    torch.testing.assert_close(found.log_probs, plain.log_probs, atol=1e-5, rtol=1e-5)
