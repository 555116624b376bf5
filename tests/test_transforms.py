"""Every public function of the core under `grad`, `vmap`, `jvp` and twice differentiated, in one table.

Each case is a function of tensors in float64, hyperparameters among them, against the plain loop (`vmap`) and against
finite differences (the others). To cover a function, add a case to `CASES`; that every public function of `MODULES` has
one is a test. Models, heads and sampling are not in the table yet: add their modules to `MODULES`, their cases below.
"""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from laws import coins, floats
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap
from torch.utils import _pytree as pytree

from rlhf import advantages, experience, kl, losses, ops
from rlhf.advantages import gae, gae_loop, token_rewards
from rlhf.experience import make_experience, postprocess_scores
from rlhf.kl import adaptive_kl_coef, exact_kl, kl_estimate, ratio_of
from rlhf.losses import ppo_policy_loss, ppo_value_loss, reward_loss, sft_loss
from rlhf.ops import (
    entropy,
    gather_rows,
    is_argmax,
    masked_mean,
    masked_sum,
    masked_var,
    mean_metrics,
    scale_logits,
    token_log_probs,
    upcast,
    whiten,
)

MODULES = (losses, advantages, kl, ops, experience)


class Case(NamedTuple):
    function: Callable
    """Of tensors; a tensor or a tree of them."""
    make: Callable
    """seed -> its arguments."""
    differentiated: tuple[int, ...]
    """Which arguments it is differentiated in; the others are constants, masks and ids."""


def per_token(count, *numbers):
    """seed -> `count` tensors [3, 5], the numbers as [] tensors that vary with the seed, a mask with holes."""

    def make(seed):
        tensors = [0.5 * floats(10 * seed + n, 3, 5) for n in range(count)]
        scalars = [torch.tensor(number * (1 + 0.01 * seed), dtype=torch.float64) for number in numbers]
        return (*tensors, *scalars, coins(seed, 3, 5))

    return make


def per_row(*numbers):
    """seed -> scores [3], KL [3, 5], values [3, 5], bootstrap values [3], the numbers, a mask with holes."""

    def make(seed):
        kl, values, *rest = per_token(2, *numbers)(seed)
        return (floats(seed + 50, 3), kl, values, floats(seed + 60, 3), *rest)

    return make


def logits(count, *numbers):
    """seed -> `count` tensors [4, 7] of logits, the numbers, targets [4]."""

    def make(seed):
        tensors = [floats(10 * seed + n, 4, 7) for n in range(count)]
        scalars = [torch.tensor(number * (1 + 0.01 * seed), dtype=torch.float64) for number in numbers]
        return (*tensors, *scalars, (torch.arange(4) * 3 + seed) % 7)

    return make


def tensor(number):
    return torch.tensor(number, dtype=torch.float64)


def rewarded(scores, kl, values, after, coefficient, mask):
    return token_rewards(scores, kl, mask, kl_coef=coefficient)


def estimated(form):
    return lambda scores, rewards, values, after, gamma, lam, mask: form(
        rewards, values, mask, gamma=gamma, lam=lam, bootstrap_value=after
    )


def experienced(scores, log_probs, values, after, kl_coef, gamma, lam, mask):
    """Its inputs are constants; the coefficients are not."""
    return make_experience(
        scores,
        log_probs,
        log_probs.cos(),
        values,
        mask,
        kl_coef=kl_coef,
        gamma=gamma,
        lam=lam,
        kl_estimator="k3",
        whiten_rewards=True,
        bootstrap_value=after,
    )[:2]


def controlled(kl_coef, kl, samples, target, horizon):
    return adaptive_kl_coef(kl_coef, kl, num_samples=samples, target=target, horizon=horizon)


CASES = {
    "sft_loss": Case(lambda x, mask: sft_loss(x, mask=mask)[0], per_token(1), (0,)),
    "reward_loss": Case(
        lambda chosen, rejected, margin, coefficient, mask: reward_loss(
            chosen, rejected_scores=rejected, mask=mask, margin=margin, centre_coef=coefficient
        )[0],
        per_token(3, 0.1),
        (0, 1, 3),
    ),
    "ppo_policy_loss": Case(
        lambda x, old, advantages, eps, dual, mask: ppo_policy_loss(
            x, old_log_probs=old, advantages=advantages, mask=mask, clip_eps=eps, dual_clip=dual
        )[0],
        per_token(3, 0.2, 1.5),
        (0, 3, 4),
    ),
    "ppo_value_loss": Case(
        lambda x, old, returns, eps, mask: ppo_value_loss(
            x, old_values=old, returns=returns, mask=mask, value_clip_eps=eps
        )[0],
        per_token(3, 0.2),
        (0, 3),
    ),
    "token_rewards": Case(rewarded, per_row(0.3), (0, 1, 4)),
    "gae": Case(estimated(gae), per_row(0.9, 0.8), (1, 2, 3, 4, 5)),
    "gae_loop": Case(estimated(gae_loop), per_row(0.9, 0.8), (1, 2, 3, 4, 5)),
    "kl_estimate, k1": Case(lambda x, y, mask: kl_estimate(x, y, estimator="k1"), per_token(2), (0, 1)),
    "kl_estimate, k2": Case(lambda x, y, mask: kl_estimate(x, y, estimator="k2"), per_token(2), (0, 1)),
    "kl_estimate, k3": Case(lambda x, y, mask: kl_estimate(x, y, estimator="k3"), per_token(2), (0, 1)),
    "ratio_of": Case(lambda x, mask: ratio_of(x), per_token(1), (0,)),
    "exact_kl": Case(lambda x, y, t, targets: exact_kl(x, y, temperature=t), logits(2, 0.7), (0, 1, 2)),
    "adaptive_kl_coef": Case(
        controlled, lambda seed: tuple(tensor(n + 0.1 * seed) for n in (0.2, 6.5, 64.0, 6.0, 1e3)), (0, 1, 2, 3, 4)
    ),
    "masked_sum": Case(masked_sum, per_token(1), (0,)),
    "masked_mean": Case(masked_mean, per_token(1), (0,)),
    "masked_var": Case(masked_var, per_token(1), (0,)),
    "whiten": Case(whiten, per_token(1), (0,)),
    "upcast": Case(lambda x, mask: upcast(x), per_token(1), (0,)),
    "gather_rows": Case(lambda x, ids: gather_rows(x, ids % 4), logits(1), (0,)),
    "token_log_probs": Case(lambda x, t, targets: token_log_probs(x, targets, temperature=t), logits(1, 0.7), (0, 1)),
    "entropy": Case(lambda x, t, targets: entropy(x, temperature=t), logits(1, 0.7), (0, 1)),
    "scale_logits": Case(lambda x, t, targets: scale_logits(x, t), logits(1, 0.7), (0, 1)),
    "is_argmax": Case(is_argmax, logits(1), ()),
    "mean_metrics": Case(
        lambda x, mask: mean_metrics({"a": masked_sum(x, mask), "count": mask.sum()})["a"], per_token(1), (0,)
    ),
    "postprocess_scores": Case(
        lambda scores, kl, values, after, penalty, clip, mask: postprocess_scores(
            scores, mask[:, 0], missing_eos_penalty=penalty, clip=clip
        ),
        per_row(0.5, 1.1),
        (0, 4, 5),
    ),
    "make_experience": Case(experienced, per_row(0.2, 0.9, 0.8), (4, 5, 6)),
}
CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
DIFFERENTIABLE = pytest.mark.parametrize(
    "case",
    [case for case in CASES.values() if case.differentiated],
    ids=[n for n, c in CASES.items() if c.differentiated],
)


def of_differentiated(case, seed):
    """(the function of those arguments alone, with floating outputs in a tuple, and the arguments)."""
    arguments = case.make(seed)

    def function(*inputs):
        whole = list(arguments)
        for number, x in zip(case.differentiated, inputs, strict=True):
            whole[number] = x
        return tuple(pytree.tree_leaves(case.function(*whole)))

    return function, [arguments[number] for number in case.differentiated]


def test_every_public_function_has_a_case():
    public = {
        name
        for module in MODULES
        for name, member in vars(module).items()
        if inspect.isfunction(member) and member.__module__ == module.__name__ and not name.startswith("_")
    }
    assert public == {name.partition(",")[0] for name in CASES}


@DIFFERENTIABLE
def test_derivatives_are_those_of_finite_differences(case):
    """Reverse and forward mode, and both with `vmap` over the vectors."""
    function, inputs = of_differentiated(case, 1)
    inputs = [x.clone().requires_grad_() for x in inputs]
    with torch.random.fork_rng():  # the vectors are random
        assert gradcheck(
            function, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
        )


@DIFFERENTIABLE
def test_second_derivatives_are_those_of_finite_differences(case):
    """Reverse over reverse, and forward over reverse."""
    function, inputs = of_differentiated(case, 2)
    inputs = [x.clone().requires_grad_() for x in inputs]
    with torch.random.fork_rng():
        assert gradgradcheck(function, inputs, check_fwd_over_rev=True)


@DIFFERENTIABLE
def test_torch_func_has_the_same_derivatives(case):
    """grad, jvp, and jvp of grad, against torch.autograd."""
    function, inputs = of_differentiated(case, 3)
    argnums = tuple(range(len(inputs)))

    def total(*inputs):
        outputs = function(*inputs)
        return sum((x * torch.arange(1, x.numel() + 1).view(x.shape)).sum() for x in outputs)

    leaves = [x.clone().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(total(*leaves), leaves, create_graph=True)
    torch.testing.assert_close(grad(total, argnums)(*inputs), expected, rtol=1e-12, atol=1e-12)
    tangents = tuple(torch.ones_like(x) for x in inputs)
    _, along = jvp(total, tuple(inputs), tangents)
    torch.testing.assert_close(along, sum(gradient.sum() for gradient in expected), rtol=1e-10, atol=1e-10)
    _, curvature = jvp(grad(total, argnums), tuple(inputs), tangents)
    slope = sum(gradient.sum() for gradient in expected)
    again = (
        torch.autograd.grad(slope, leaves, materialize_grads=True)
        if slope.requires_grad
        else map(torch.zeros_like, leaves)
    )
    torch.testing.assert_close(curvature, tuple(again), rtol=1e-9, atol=1e-9)


@CASE
def test_vmap_is_the_loop(case):
    """Over all arguments at once, hyperparameters included; then with the derivatives inside."""
    batches = [case.make(seed) for seed in (4, 5, 6)]
    stacked = [torch.stack(column) for column in zip(*batches, strict=True)]

    def compare(function):
        rows = [function(*arguments) for arguments in batches]
        expected = pytree.tree_map(lambda *leaves: torch.stack(leaves), *rows)
        torch.testing.assert_close(vmap(function)(*stacked), expected, rtol=1e-10, atol=1e-12)

    compare(case.function)
    if case.differentiated:
        compare(
            grad(lambda *x: sum(y.square().sum() for y in pytree.tree_leaves(case.function(*x))), case.differentiated)
        )


@CASE
def test_vmap_over_numbers_alone_keeps_the_rest(case):
    """A sweep: each hyperparameter by itself, the data the same for all."""
    arguments = case.make(7)
    for number in (n for n in case.differentiated if arguments[n].ndim == 0):
        dims = tuple(0 if n == number else None for n in range(len(arguments)))
        values = arguments[number] * torch.tensor([1.0, 0.9, 0.8], dtype=torch.float64)
        swept = [x if n != number else values for n, x in enumerate(arguments)]
        rows = [case.function(*(x if n != number else value for n, x in enumerate(arguments))) for value in values]
        expected = pytree.tree_map(lambda *leaves: torch.stack(leaves), *rows)
        torch.testing.assert_close(vmap(case.function, in_dims=dims)(*swept), expected, rtol=1e-10, atol=1e-12)
