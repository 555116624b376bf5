"""The gradient of a step, laid flat: against `torch.func`, and what it keeps and leaves alone."""

import gc
import weakref

import pytest
import torch
from test_compiled import OBJECTIVES, models
from torch.func import grad_and_value

from rlhf import random
from rlhf.execution.gradients import make_gradient
from rlhf.execution.program import SumOfLosses
from rlhf.tree import flat_layout, leaves, tree_map, unflatten

BATCH = random.normal(random.key(2), (5, 3))


@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_it_is_that_of_torch_func_to_the_bit(kind, gradient_checkpointing, params, config):
    make, batches = OBJECTIVES[kind]
    objective = make(config, gradient_checkpointing=gradient_checkpointing)
    trained, frozen = models(kind, params, config)
    layout = flat_layout(trained)
    gradient = make_gradient(objective, layout, None)
    for batch in batches(config)[:2]:
        expected, result = grad_and_value(objective, has_aux=True)(trained, frozen, batch)
        flat, found = gradient(trained, frozen, batch)
        torch.testing.assert_close(unflatten(flat, layout), expected, atol=0, rtol=0)
        torch.testing.assert_close(found, result, atol=0, rtol=0)
        assert not any(leaf.requires_grad for leaf in leaves(found))


def squares(params, frozen, batch):
    """Does not read `idle`."""
    errors = (batch @ params["w"]).tanh()
    return errors.square().sum(), {"count": torch.tensor(len(batch))}


PARAMS = {"idle": torch.ones(70), "w": random.normal(random.key(1), (3,))}


def test_what_a_loss_does_not_read_has_gradient_zero_and_so_have_the_gaps():
    layout = flat_layout(PARAMS)
    flat, _ = make_gradient(squares, layout, None)(PARAMS, {}, BATCH)
    where = flat.nonzero().flatten().tolist()
    assert where == [layout.offsets[1] + n for n in range(3)]


def test_a_loss_that_reads_no_parameter_has_gradient_zero():
    def constant(params, frozen, batch):
        return batch.sum(), {"count": torch.tensor(1)}

    flat, (loss, _) = make_gradient(constant, flat_layout(PARAMS), None)(PARAMS, {}, BATCH)
    assert loss == BATCH.sum()
    assert not flat.any()


def test_it_is_pure_also_of_tensors_that_the_loss_closes_over():
    other = torch.ones(3, requires_grad=True)

    def objective(params, frozen, batch):
        return (params["w"] * other).sum() + frozen["w"].sum(), {"count": torch.tensor(1)}

    before, frozen = tree_map(torch.clone, PARAMS), {"w": torch.ones(3)}
    gradient = make_gradient(objective, flat_layout(PARAMS), None)
    with torch.no_grad():  # whatever the caller's mode
        first, second = (gradient(PARAMS, frozen, BATCH)[0] for _ in range(2))
    assert first.any()
    torch.testing.assert_close(first, second, atol=0, rtol=0)
    torch.testing.assert_close(PARAMS, before, atol=0, rtol=0)
    for leaf in (*leaves(PARAMS), frozen["w"], other):
        assert leaf.grad is None
    assert not any(leaf.requires_grad for leaf in leaves(PARAMS))


def noting(kept):
    class Kept:
        """What autograd keeps of one tensor."""

        def __init__(self, tensor):
            self.tensor = tensor
            kept.add(self)

    return Kept


def test_what_one_part_keeps_is_gone_before_the_next_begins():
    kept, alive, params = weakref.WeakSet(), [], {"a": torch.ones(3), "b": torch.ones(3)}

    def part(name):
        def objective(own, frozen, batch):
            gc.collect()
            alive.append(len(kept))
            inner = own[name].exp()
            loss = inner.square().sum()
            alive.append(len(kept))
            return loss, {name: inner.sum(), "count": torch.tensor(3)}  # metrics that hold the graph change nothing

        return objective

    objective = SumOfLosses((part("a"), part("b")))
    with torch.autograd.graph.saved_tensors_hooks(noting(kept), lambda of: of.tensor):
        flat, (loss, metrics) = make_gradient(objective, flat_layout(params), None)(params, {}, BATCH)
    assert alive == [0, 2, 0, 2]
    whole, _ = grad_and_value(objective, has_aux=True)(params, {}, BATCH)
    torch.testing.assert_close(unflatten(flat, flat_layout(params)), whole, atol=0, rtol=0)
    assert loss == 6 * torch.e**2
    assert metrics.keys() == {"a", "b", "count"}


def test_gradients_of_a_parameter_that_parts_share_add_up():
    params = {"both": torch.tensor([1.0, 2.0]), "one": torch.ones(2)}

    def first(params, frozen, batch):
        return params["both"].sum(), {"count": torch.tensor(1)}

    def second(params, frozen, batch):
        return (10 * params["both"] * params["one"]).sum(), {"count": torch.tensor(1)}

    objective, layout = SumOfLosses((first, second, first)), flat_layout(params)
    flat, (loss, _) = make_gradient(objective, layout, None)(params, {}, BATCH)
    expected, (whole, _) = grad_and_value(objective, has_aux=True)(params, {}, BATCH)
    torch.testing.assert_close(unflatten(flat, layout), expected, atol=0, rtol=0)
    assert unflatten(flat, layout)["both"].tolist() == [12.0, 12.0]
    assert loss == whole


class Look(torch.autograd.Function):
    """The identity, whose backward pass calls something."""

    @staticmethod
    def forward(ctx, x, call):
        ctx.call = call
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.call()
        return gradient, None


def test_the_backward_pass_frees_what_it_has_used():
    kept, alive = weakref.WeakSet(), []

    def look():
        gc.collect()
        alive.append(len(kept))

    def objective(params, frozen, batch):
        loss = Look.apply(params["w"], look).exp().tanh().sigmoid().sum()
        look()
        return loss, {"count": torch.tensor(1)}

    with torch.autograd.graph.saved_tensors_hooks(noting(kept), lambda of: of.tensor):
        make_gradient(objective, flat_layout(PARAMS), None)(PARAMS, {}, BATCH)
    assert alive == [3, 0]


def test_each_leaf_is_freed_when_its_gradient_is_laid_down():
    """Of two leaves, the one that is used last has its gradient first; it is in place when the other's begins."""
    params, seen = {"early": torch.ones(3), "late": torch.ones(3)}, []

    def objective(own, frozen, batch):
        def look():
            seen.append(own["late"].grad)

        return (Look.apply(own["early"].exp(), look) * own["late"]).sum(), {"count": torch.tensor(1)}

    make_gradient(objective, flat_layout(params), None)(params, {}, BATCH)
    assert seen == [None]
