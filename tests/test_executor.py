"""The in-process executor against plain functions on trees."""

import pytest
import torch
import toy
from laws import assert_same_bits

from rlhf import random
from rlhf.errors import NonFiniteError
from rlhf.execution.executor import LocalExecutor
from rlhf.execution.program import MetricLimit, ModelState, Program, StepSpec
from rlhf.optim import Optimizer, adamw, clip_by_global_norm
from rlhf.schedules import constant_schedule
from rlhf.tree import named_leaves, tree_map

KEY = random.key(3)
CPU = torch.device("cpu")


def objective(params, frozen, batch):
    """Least squares: a batch is (inputs [B, 3], targets [B])."""
    inputs, targets = batch
    errors = inputs @ params["w"] + params["b"] + (inputs @ frozen["offset"]["w"]) - targets
    loss = errors.square().sum()
    return loss, {"loss/squares_sum": loss.detach(), "count": torch.tensor(len(targets))}


OPTIMIZER = adamw(constant_schedule(0.01), weight_decay=0.1, weight_decay_mask=lambda params: {"w": True, "b": False})
MODELS = ModelState(
    {"w": random.normal(random.fold_in(KEY, 0), (3,)), "b": torch.zeros(1)}, {"offset": {"w": torch.ones(3)}}
)
PROGRAM = Program(
    steps={
        "main": StepSpec(objective, OPTIMIZER, 0.5),
        "frozen_b": StepSpec(
            objective, adamw(constant_schedule(0.01), lr_multiplier=lambda params: {"w": 1.0, "b": 0.0}), 0.5
        ),
    },
    eval_fns={"predict": lambda params, frozen, batch: batch[0] @ params["w"] + params["b"]},
    frozen_updates={
        "offset": lambda frozen, params: tree_map(lambda a, b: 0.5 * a + 0.5 * b, frozen, {"w": params["w"]})
    },
)


def batch(size: int, seed: int):
    key = random.fold_in(KEY, seed)
    return random.normal(random.fold_in(key, 0), (size, 3)), random.normal(random.fold_in(key, 1), (size,))


def split(whole, sizes):
    return list(zip(*(tensor.split(sizes) for tensor in whole), strict=True))


def test_step_equals_the_optimiser_on_the_mean_gradient():
    executor, params, state = LocalExecutor(PROGRAM, MODELS, CPU), MODELS.params, OPTIMIZER.init(MODELS.params)
    for step in range(4):
        whole = batch(10, step)
        metrics = executor.step("main", split(whole, [4, 3, 3]))
        gradients, (loss, _) = torch.func.grad_and_value(objective, has_aux=True)(params, MODELS.frozen, whole)
        clipped, norm = clip_by_global_norm(tree_map(lambda g: g / 10, gradients), 0.5)
        params, state = OPTIMIZER.update(clipped, state, params)
        torch.testing.assert_close(executor.params(), params, atol=1e-6, rtol=1e-5)
        assert metrics == pytest.approx({"loss/squares": loss.item() / 10, "grad_norm": norm.item()}, rel=1e-5)
    assert executor.version == 4


@pytest.mark.parametrize("sizes", [[10], [5, 5], [1] * 10, [2, 7, 1]], ids=str)
def test_invariant_3_any_split_into_micro_batches_gives_the_same_step(sizes):
    executors = [LocalExecutor(PROGRAM, MODELS, CPU) for _ in range(2)]
    whole = batch(10, 0)
    for executor, micro_batches in zip(executors, (split(whole, [4, 3, 3]), split(whole, sizes)), strict=True):
        executor.step("main", micro_batches)
    torch.testing.assert_close(executors[0].params(), executors[1].params(), atol=1e-6, rtol=1e-5)


def test_bits_do_not_depend_on_where_tensors_lie():
    """As in shared memory, as slices of other tensors, with other strides."""
    places = (
        torch.clone,
        toy.displaced,
        lambda leaf: leaf.mT.contiguous().mT if leaf.ndim == 2 else leaf[:, None].expand(-1, 2).contiguous()[:, 0],
    )
    results = []
    for place in places:
        models = ModelState(toy.models().params, tree_map(place, toy.models().frozen))
        executor = LocalExecutor(toy.make_program(), models, CPU)
        batches = [tree_map(place, toy.batch(6, number)) for number in range(40)]
        results.append((executor.step("main", batches), executor.map("predict", batches), executor.snapshot()))
    for metrics, predictions, state in results[1:]:
        assert metrics == results[0][0]
        assert_same_bits((predictions, state), results[0][1:])


def test_frozen_models_are_prepared_once_and_updated_and_saved_as_they_were():
    prepared = []

    def prepare(name, model):
        prepared.append(name)
        return {"w": model["w"].bfloat16().float()}

    program = PROGRAM._replace(prepare_frozen=prepare, eval_fns={"frozen": lambda params, frozen, batch: frozen})
    offset = {"w": torch.tensor([1 / 3, 1.0, 2.0])}
    executor = LocalExecutor(program, ModelState(MODELS.params, {"offset": offset}), CPU)
    for _ in range(3):
        executor.map("frozen", [batch(4, 0)] * 2)
        executor.step("main", [batch(4, 0)] * 2)
    assert prepared == ["offset"]
    executor.update_frozen("offset")
    expected = 0.5 * offset["w"] + 0.5 * executor.params()["w"]
    state = executor.snapshot()
    (frozen,) = executor.map("frozen", [batch(4, 0)])
    assert len(prepared) == 2
    assert_same_bits(state["frozen.offset.w"], expected)
    assert_same_bits(frozen["offset"]["w"], expected.bfloat16().float())
    assert not torch.equal(expected.bfloat16().float(), expected)
    resumed = LocalExecutor(program, MODELS, CPU)
    resumed.restore(state, 3)
    assert_same_bits(resumed.map("frozen", [batch(4, 0)])[0], frozen)
    assert_same_bits(resumed.snapshot()["frozen.offset.w"], expected)
    assert_same_bits(MODELS.frozen["offset"]["w"], torch.ones(3))


def test_map_keeps_the_order_and_reads_the_present_parameters():
    executor = LocalExecutor(PROGRAM, MODELS, CPU)
    for _ in range(2):
        parts = split(batch(9, 5), [2, 4, 3])
        params = executor.params()
        results = executor.map("predict", parts)
        for result, (inputs, _) in zip(results, parts, strict=True):
            torch.testing.assert_close(result, inputs @ params["w"] + params["b"])
        executor.step("main", parts)


def test_a_step_calls_what_is_to_be_done_meanwhile_before_its_update():
    executor, versions = LocalExecutor(PROGRAM, MODELS, CPU), []
    executor.step("main", [batch(6, 0), batch(6, 1)], overlap=lambda: versions.append(executor.version))
    assert versions == [0]


def test_restore_continues_to_the_same_bits():
    one, two = LocalExecutor(PROGRAM, MODELS, CPU), LocalExecutor(PROGRAM, MODELS, CPU)
    for step in range(3):
        one.step("main", [batch(6, step)])
        one.update_frozen("offset")
    state = {name: tensor.clone() for name, tensor in one.snapshot().items()}
    two.restore(state, 3)
    assert two.version == 3
    for step in range(3, 6):
        for executor in (one, two):
            executor.step("main", [batch(6, step)])
            executor.update_frozen("offset")
    assert all(torch.equal(a, b) for a, b in zip(one.snapshot().values(), two.snapshot().values(), strict=True))


def test_restore_names_what_does_not_fit():
    executor = LocalExecutor(PROGRAM, MODELS, CPU)
    state = executor.snapshot()
    with pytest.raises(ValueError, match=r"params\.w has shape \(4,\), expected \(3,\)"):
        executor.restore(state | {"params.w": torch.ones(4)}, 0)
    with pytest.raises(ValueError, match=r"params\.w is missing"):
        executor.restore({name: tensor for name, tensor in state.items() if name != "params.w"}, 0)
    with pytest.raises(ValueError, match=r"params\.other is unknown"):
        executor.restore(state | {"params.other": torch.ones(4)}, 0)


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_step_refuses_what_is_not_finite_and_changes_nothing(broken):
    executor = LocalExecutor(PROGRAM, MODELS, CPU)
    executor.step("main", [batch(6, 0)])
    before = {name: tensor.clone() for name, tensor in executor.snapshot().items()}
    parts = split(batch(9, 1), [3, 3, 3])
    parts[broken][1][0] = float("nan")
    with pytest.raises(NonFiniteError, match=f"micro-batch {broken}") as caught:
        executor.step("main", parts)
    assert caught.value.batch is parts[broken]
    assert executor.version == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in executor.snapshot().items())


def test_step_refuses_a_gradient_that_is_not_finite_though_the_loss_is():
    def root(params, frozen, batch):
        loss = params["w"].sub(params["w"]).sqrt().sum()  # 0, with an infinite slope
        return loss, {"count": torch.tensor(1)}

    executor = LocalExecutor(PROGRAM._replace(steps={"main": StepSpec(root, OPTIMIZER, 1.0)}), MODELS, CPU)
    with pytest.raises(NonFiniteError, match="gradient norm nan"):
        executor.step("main", [batch(1, 0)])


def test_a_step_beyond_its_limit_changes_nothing_and_returns_its_metrics():
    parts = [batch(4, 0), batch(2, 1)]
    mean = LocalExecutor(PROGRAM, MODELS, CPU).step("main", parts)["loss/squares"]
    for most, version in ((mean * 1.001, 1), (mean * 0.999, 0)):
        spec = PROGRAM.steps["main"]._replace(limit=MetricLimit("loss/squares", most))
        executor = LocalExecutor(PROGRAM._replace(steps={"main": spec}), MODELS, CPU)
        before = tree_map(torch.clone, executor.snapshot())
        assert executor.step("main", parts)["loss/squares"] == mean
        assert executor.version == version
        if version == 0:
            assert_same_bits(executor.snapshot(), before)


def test_the_caller_may_choose_a_steps_learning_rate():
    slow, fast = (LocalExecutor(PROGRAM, MODELS, CPU) for _ in range(2))
    slow.step("main", [batch(6, 0)])  # whose schedule is constant at 0.01
    fast.step("main", [batch(6, 0)], 0.01)
    assert_same_bits(slow.snapshot(), fast.snapshot())
    fast.step("main", [batch(6, 1)], 0.0)
    assert_same_bits(slow.params(), fast.params())


def test_steps_with_a_frozen_part_keep_its_bits():
    executor = LocalExecutor(PROGRAM, MODELS, CPU)
    executor.step("main", [batch(5, 0)])
    before = named_leaves(tree_map(torch.clone, executor.params()))
    executor.step("frozen_b", [batch(5, 1)])
    after = named_leaves(executor.params())
    assert torch.equal(before["b"], after["b"])
    assert not torch.equal(before["w"], after["w"])


def test_reset_optimizer_starts_its_averages_anew():
    executor, fresh = LocalExecutor(PROGRAM, MODELS, CPU), None
    executor.step("main", [batch(5, 0)])
    executor.reset_optimizer()
    fresh = LocalExecutor(PROGRAM, MODELS._replace(params=tree_map(torch.clone, executor.params())), CPU)
    for one in (executor, fresh):
        one.step("main", [batch(5, 1)])
    torch.testing.assert_close(executor.params(), fresh.params(), rtol=0, atol=0)
    assert executor.version == 2


def test_blend_moves_a_frozen_model():
    executor = LocalExecutor(PROGRAM, MODELS, CPU)
    executor.update_frozen("offset")
    expected = 0.5 + 0.5 * MODELS.params["w"]
    assert torch.equal(executor.snapshot()["frozen.offset.w"], expected)
    assert torch.equal(MODELS.frozen["offset"]["w"], torch.ones(3)), "the program itself does not change"


def test_the_program_is_not_changed_by_training():
    before = MODELS.params["w"].clone()
    LocalExecutor(PROGRAM, MODELS, CPU).step("main", [batch(5, 0)])
    assert torch.equal(MODELS.params["w"], before)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=type)
def test_a_half_applied_update_is_neither_used_nor_saved_and_a_snapshot_mends_it(monkeypatch, error):
    """The second of several pieces fails."""
    monkeypatch.setattr("rlhf.execution.shard._GROUP", 4096)
    batches, failing = [toy.batch(4, number) for number in range(3)], []
    spec = toy.make_program().steps["main"]

    def update(*arguments):
        failing.append(1)
        if len(failing) == 2:
            raise error
        return spec.optimizer.update(*arguments)

    fails = spec._replace(optimizer=Optimizer(spec.optimizer.init, update))
    broken = toy.make_program()._replace(steps={"main": spec, "fails": fails})
    executor, straight = (LocalExecutor(program, toy.models(), CPU) for program in (broken, toy.make_program()))
    executor.step("main", batches)
    state = {name: leaf.clone() for name, leaf in executor.snapshot().items()}
    with pytest.raises(type(error)):
        executor.step("fails", batches)
    assert len(failing) == 2, "the first piece was applied"
    for use in (
        executor.snapshot,
        executor.params,
        lambda: executor.map("predict", batches),
        lambda: executor.step("main", batches),
        lambda: executor.update_frozen("offset"),
    ):
        with pytest.raises(RuntimeError, match="an update failed half-way; restore a snapshot or checkpoint"):
            use()
    executor.restore(state, 1)
    for _ in range(2):
        straight.step("main", batches)
    executor.step("main", batches)
    for name, leaf in straight.snapshot().items():
        assert torch.equal(executor.snapshot()[name], leaf), name
