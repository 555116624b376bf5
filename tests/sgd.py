"""A throw-away optimiser, as a user would write one: SGD with momentum. Ray workers import it too."""

import torch
import toy

from rlhf.optim import Optimizer
from rlhf.tree import tree_map

RATE, MOMENTUM = 1e-3, 0.9


def init(params):
    return tree_map(torch.zeros_like, params)


def update(grads, state, params, *, learning_rate=None):
    rate = RATE if learning_rate is None else learning_rate
    state = tree_map(lambda velocity, grad: MOMENTUM * velocity + grad, state, grads)
    return tree_map(lambda param, velocity: param - rate * velocity, params, state), state


def make_program():
    """`toy`'s work with that optimiser."""
    program = toy.make_program()
    return program._replace(
        steps={name: spec._replace(optimizer=Optimizer(init, update)) for name, spec in program.steps.items()}
    )


def make_whole_leaves_program():
    """Its optimiser says that it needs whole leaves."""
    program = make_program()
    needy = Optimizer(init, update, elementwise=False)
    return program._replace(steps=program.steps | {"needy": program.steps["main"]._replace(optimizer=needy)})
