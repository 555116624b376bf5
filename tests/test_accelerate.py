"""Fast forms and their references: the same results, and a library that is whole without the fast forms."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf import random
from rlhf.accelerate import accelerated, reference_of
from rlhf.models import attention, decoding, layers
from rlhf.ops import target_logits
from rlhf.sampling import cumulative, sample_token

TESTS = Path(__file__).parent


def normal(number, *shape, dtype=torch.float32):
    return random.normal(random.fold_in(random.key(4), number), shape).to(dtype)


def weights(dtype):
    return {"weight": normal(1, 8, 12, dtype=dtype), "bias": normal(2, 12, dtype=dtype)}


def norm(dtype):
    return {"weight": normal(3, 8, dtype=dtype), "bias": normal(4, 8, dtype=dtype)}


def heads(dtype):
    return tuple(normal(n, 2, 2, 3, 4, dtype=dtype) for n in range(3))


BIAS = torch.tensor([[[[0.0, -torch.inf, -torch.inf], [0.0, 0.0, -torch.inf], [-torch.inf, 0.0, 0.0]]]])
FORMS = {
    "affine": (layers.affine, lambda d: (normal(0, 2, 3, 8, dtype=d), weights(d)), {}),
    "layer_norm": (layers.layer_norm, lambda d: (normal(0, 2, 3, 8, dtype=d), norm(d)), {"eps": 1e-5}),
    "gelu": (layers.gelu, lambda d: (normal(0, 2, 3, 8, dtype=d),), {}),
    "unembed": (
        layers.unembed,
        lambda d: (normal(0, 5, 8, dtype=d), {"weight": normal(1, 11, 8, dtype=d)}),
        {"vocab_size": 11, "padded": True},
    ),
    "attention": (attention.attention, lambda d: (*heads(d), BIAS), {}),
    "prompt_attention": (attention.prompt_attention, heads, {}),
    "attend_to_cache": (
        attention.attend_to_cache,
        lambda d: (
            normal(0, 2, 2, 4, dtype=d),
            normal(1, 2, 2, 4, 3, dtype=d),
            normal(2, 2, 2, 3, 4, dtype=d),
            torch.tensor([[0.0, 0.0, -torch.inf], [0.0, 0.0, 0.0]]),
        ),
        {},
    ),
    "additive_mask": (attention.additive_mask, lambda d: (torch.tensor([True, False]),), {}),
    "target_logits": (target_logits, lambda d: (normal(0, 4, 7, dtype=d), torch.tensor([6, 0, 3, 3])), {}),
    "sample_token": (
        sample_token,
        lambda d: (normal(0, 9, 300, dtype=d), torch.linspace(0, 0.99, 9, dtype=torch.float64)),
        {},
    ),
    "cumulative": (cumulative, lambda d: (normal(0, 3, 400, dtype=d).abs(),), {}),
    "steps_per_call": (decoding.steps_per_call, lambda d: (40, torch.device("cpu")), {}),
    "attended_slots": (decoding.attended_slots, lambda d: (33, 100, torch.device("cpu")), {}),
}


@pytest.mark.parametrize("compiling", [False, True], ids=["eager", "compiling"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("form", FORMS)
def test_a_fast_form_equals_its_reference(form, dtype, tolerance, compiling, monkeypatch):
    function, make, options = FORMS[form]
    arguments = make(dtype)
    expected = reference_of(function)(*arguments, **options)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    found = function(*arguments, **options)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_a_kernel_that_is_not_there_leaves_the_reference():
    def reference():
        return 1

    assert accelerated("no_such_kernel.anything")(reference) is reference
    with pytest.raises(AttributeError):
        accelerated("fused_layers.no_such_function")(reference)


def test_the_library_is_correct_without_its_kernels():
    """But for the tests of what is computed again, which the reference keeps."""
    files = ["test_gpt2.py", "test_decoding.py", "test_sampling.py", "test_shard.py", "test_executor.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no_kernels", "-p", "no:cacheprovider"]
    command += [*files, "-k", "not gradient_checkpointing"]
    result = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
