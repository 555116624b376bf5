"""Packed micro-batches through whole objectives, against one sequence at a time and against transformers."""

import dataclasses

import pytest
import torch
from torch.func import grad_and_value

from rlhf import random, remat
from rlhf.batches import PairBatch, PPOBatch, ScoreBatch, TokenBatch
from rlhf.data.packing import build_rows
from rlhf.generate.complete import make_completion_fn
from rlhf.kl import exact_kl, importance_weighted_kl, kl_estimate
from rlhf.losses import ppo_policy_loss, ppo_value_loss
from rlhf.models import architecture, gpt2
from rlhf.models.heads import apply_head
from rlhf.models.scoring import make_pair_scores, make_scorer
from rlhf.ops import entropy, mean_metrics, token_log_probs
from rlhf.train.ppo_objective import make_ppo_objective
from rlhf.train.reward import make_reward_objective
from rlhf.train.sft import make_sft_objective
from rlhf.tree import named_leaves, tree_map, tree_sum

PROMPTS, LENGTHS = [3, 1, 5, 2], [4, 6, 2, 5]
"""Prompt and completion tokens of four sequences."""
LAYOUTS = {
    "one per row": [(0, 0), (1, 0), (2, 0), (3, 0)],
    "packed": [(0, 0), (0, 7), (1, 0), (1, 7)],
    "reversed": [(1, 7), (1, 0), (0, 7), (0, 0)],
    "with gaps": [(2, 5), (0, 9), (1, 3), (4, 1)],
}


@pytest.fixture
def sequences(config):
    lengths = [p + c for p, c in zip(PROMPTS, LENGTHS, strict=True)]
    draws = [random.uniform(random.fold_in(random.key(21), n), (length,)) for n, length in enumerate(lengths)]
    return [(draw * config.vocab_size).long() for draw in draws]


@pytest.fixture
def model(params, config):
    """Everything PPO trains and reads, each part with weights of its own."""
    head = {"weight": random.normal(random.key(31), (1, config.n_embd)), "bias": torch.tensor([0.3])}
    critic = {"trunk": nudged(params, 32), "head": head}
    return {"policy": params, "critic": critic}, {"reference": nudged(params, 33), "reward_model_0": critic}


def nudged(params, seed):
    number = iter(range(1000))
    return tree_map(
        lambda p: p + 0.05 * random.normal(random.fold_in(random.key(seed), next(number)), tuple(p.shape)), params
    )


def token_batch(sequences, places) -> TokenBatch:
    packed = build_rows([s.numpy() for s in sequences], places)
    predictors, targets = [], []
    for sequence, prompt, start in zip(sequences, PROMPTS, packed.starts, strict=True):
        for t in range(prompt, len(sequence)):
            predictors.append(start + t - 1)
            targets.append(int(sequence[t]))
    count = len(targets)
    return TokenBatch(
        packed.rows, torch.tensor(predictors), torch.tensor(targets), torch.ones(count, dtype=torch.bool), random.key(0)
    )


def extras(batch):
    """Weights and sequences, which the losses per token do not read."""
    return torch.ones(batch.targets.shape), torch.zeros_like(batch.targets)


def ppo_batch(sequences, places, seed=40) -> PPOBatch:
    batch = token_batch(sequences, places)
    old, ref, values, advantages, returns = (
        random.normal(random.fold_in(random.key(seed), n), batch.targets.shape) for n in range(5)
    )
    return PPOBatch(*batch[:4], old - 4.0, ref - 4.0, values, advantages, returns, torch.tensor(0.7), *extras(batch))


def alone(params, config, sequence, prompt):
    """[C, D] hidden states that predict the completion, from the unpacked sequence."""
    return gpt2.hidden_states(params, sequence[None], config=config)[0, prompt - 1 : -1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sft_objective_equals_transformers_loss_in_any_layout(params, config, sequences, layout, hugging_face):
    loss, metrics = make_sft_objective(config)(params, {}, token_batch(sequences, LAYOUTS[layout]))
    oracle, total, correct = hugging_face(params, config), 0.0, 0
    for sequence, prompt, count in zip(sequences, PROMPTS, LENGTHS, strict=True):
        labels = sequence.clone()
        labels[:prompt] = -100
        out = oracle(sequence[None], labels=labels[None])
        total += out.loss.item() * count
        correct += int((out.logits[0, prompt - 1 : -1].argmax(-1) == sequence[prompt:]).sum())
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert metrics["loss/sft_sum"].item() == pytest.approx(total, rel=1e-5)
    assert metrics["count"].item() == sum(LENGTHS)
    assert metrics["sft/accuracy_sum"].item() == correct


def test_sft_accuracy_counts_the_tokens_that_are_most_likely(params, config, sequences):
    batch = token_batch(sequences, LAYOUTS["one per row"])
    hidden = gpt2.hidden_states(params, batch.rows.tokens, config=config).flatten(0, 1)[batch.predictors]
    best = gpt2.logits(params, hidden, config=config).argmax(-1)
    some = torch.where(torch.arange(len(best)) < 5, best, (best + 1) % config.vocab_size)
    _, metrics = make_sft_objective(config)(params, {}, batch._replace(targets=some))
    assert metrics["sft/accuracy_sum"].item() == 5


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_invariant_2_packing_and_padding_change_no_gradient(params, config, sequences, layout):
    objective = grad_and_value(make_sft_objective(config), has_aux=True)
    plain, _ = objective(params, {}, token_batch(sequences, LAYOUTS["one per row"]))
    packed, _ = objective(params, {}, token_batch(sequences, LAYOUTS[layout]))
    for name, gradient in named_leaves(plain).items():
        torch.testing.assert_close(named_leaves(packed)[name], gradient, atol=2e-5, rtol=1e-4, msg=name)


def test_filling_changes_nothing(params, config, sequences):
    """Positions whose mask is False may point anywhere."""
    batch = token_batch(sequences, LAYOUTS["packed"])
    filled = batch._replace(
        predictors=torch.cat([batch.predictors, torch.tensor([0, 5])]),
        targets=torch.cat([batch.targets, torch.tensor([1, 2])]),
        mask=torch.cat([batch.mask, torch.tensor([False, False])]),
    )
    objective = grad_and_value(make_sft_objective(config), has_aux=True)
    plain, (loss, metrics) = objective(params, {}, batch)
    with_filling, (same_loss, same_metrics) = objective(params, {}, filled)
    assert same_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert {k: v.item() for k, v in same_metrics.items()} == pytest.approx({k: v.item() for k, v in metrics.items()})
    for name, gradient in named_leaves(plain).items():
        torch.testing.assert_close(named_leaves(with_filling)[name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"entropy_coef": 0.1}, {"loss_kl": "k3"}, {"loss_kl": "exact"}], ids=str)
@pytest.mark.parametrize("tokens_at_once", [1, 4])
def test_logits_in_chunks_and_checkpointed_blocks_change_nothing(
    model, config, sequences, options, tokens_at_once, monkeypatch
):
    params, frozen = model
    batch = ppo_batch(sequences, LAYOUTS["packed"])
    sft, ppo = make_sft_objective(config), make_ppo_objective(config, config, **options)
    of_sft = grad_and_value(sft, has_aux=True)(params["policy"], {}, token_batch(sequences, LAYOUTS["packed"]))
    of_ppo = grad_and_value(ppo, has_aux=True)(params, frozen, batch)
    monkeypatch.setattr(remat, "_CHUNK", tokens_at_once * config.vocab_size)
    largest = []

    def watched(params, hidden, **options):
        largest.append(len(hidden))
        return gpt2.logits(params, hidden, **options)

    watched_family = dataclasses.replace(gpt2.ARCHITECTURE, logits=watched)
    monkeypatch.setitem(architecture._REGISTERED, "gpt2", watched_family)
    sft = make_sft_objective(config, gradient_checkpointing=True)
    ppo = make_ppo_objective(config, config, gradient_checkpointing=True, **options)
    chunked = grad_and_value(sft, has_aux=True)(params["policy"], {}, token_batch(sequences, LAYOUTS["packed"]))
    torch.testing.assert_close(chunked, of_sft, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(grad_and_value(ppo, has_aux=True)(params, frozen, batch), of_ppo, atol=2e-5, rtol=1e-5)
    assert max(largest) == tokens_at_once


def test_a_reward_models_gradient_with_checkpointed_blocks(model, config, sequences):
    batch, packed = token_batch(sequences, LAYOUTS["packed"]), LAYOUTS["packed"]
    starts = build_rows([s.numpy() for s in sequences], packed).starts
    last = torch.tensor([start + len(s) - 1 for start, s in zip(starts, sequences, strict=True)])
    pairs = PairBatch(batch.rows, last[:2], last[2:], torch.zeros(2), torch.ones(2, dtype=torch.bool))
    plain, again = (
        grad_and_value(make_reward_objective(config, gradient_checkpointing=on), has_aux=True)(
            model[0]["critic"], {}, pairs
        )
        for on in (False, True)
    )
    torch.testing.assert_close(again, plain, atol=0, rtol=0)


def test_invariant_3_micro_batches_add_up(params, config, sequences):
    objective = grad_and_value(make_sft_objective(config), has_aux=True)

    def part(rows):
        kept = [sequences[row] for row in rows]
        packed = build_rows([s.numpy() for s in kept], [(n, 0) for n in range(len(rows))])
        index = [packed.starts[n] + t - 1 for n, row in enumerate(rows) for t in range(PROMPTS[row], len(kept[n]))]
        targets = torch.cat([kept[n][PROMPTS[row] :] for n, row in enumerate(rows)])
        mask = torch.ones(len(index), dtype=torch.bool)
        return objective(params, {}, TokenBatch(packed.rows, torch.tensor(index), targets, mask, random.key(0)))

    whole, (loss, metrics) = part([0, 1, 2, 3])
    split, (split_loss, split_metrics) = tree_sum([part([2]), part([0, 3]), part([1])])
    torch.testing.assert_close(split_loss, loss)
    torch.testing.assert_close(mean_metrics(split_metrics), mean_metrics(metrics))
    for name, gradient in named_leaves(whole).items():
        torch.testing.assert_close(named_leaves(split)[name], gradient, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_ppo_objective_equals_its_parts_one_sequence_at_a_time(model, config, sequences, layout, temperature):
    params, frozen = model
    batch = ppo_batch(sequences, LAYOUTS[layout])
    objective = make_ppo_objective(
        config, config, temperature=temperature, value_coef=0.3, entropy_coef=0.02, loss_kl="k3", dual_clip=3.0
    )
    loss, metrics = objective(params, frozen, batch)
    total, start = torch.zeros(()), 0
    for sequence, prompt, count in zip(sequences, PROMPTS, LENGTHS, strict=True):
        part = slice(start, start + count)
        start += count
        logits = gpt2.logits(params["policy"], alone(params["policy"], config, sequence, prompt), config=config)
        log_probs = token_log_probs(logits, sequence[prompt:], temperature=temperature)
        values = apply_head(params["critic"]["head"], alone(params["critic"]["trunk"], config, sequence, prompt))
        ones = torch.ones(count, dtype=torch.bool)
        policy_loss, _ = ppo_policy_loss(
            log_probs,
            old_log_probs=batch.old_log_probs[part],
            advantages=batch.advantages[part],
            mask=ones,
            dual_clip=3.0,
        )
        value_loss, _ = ppo_value_loss(
            values, old_values=batch.old_values[part], returns=batch.returns[part], mask=ones
        )
        kl = kl_estimate(log_probs, batch.ref_log_probs[part], estimator="k3").sum()
        total += policy_loss + 0.3 * value_loss - 0.02 * entropy(logits, temperature=temperature).sum() + 0.7 * kl
    torch.testing.assert_close(loss, total, atol=1e-3, rtol=1e-5)
    assert metrics["count"].item() == sum(LENGTHS)
    means = ("loss/policy_avg", "loss/value_avg", "policy/entropy_avg", "loss/kl_avg", "val/ratio")
    assert {f"{name}_sum" for name in means} <= metrics.keys()


def test_ppo_objective_on_a_shared_trunk_reads_the_policys_states(model, config, sequences):
    params, frozen = model
    head = params["critic"]["head"]
    shared = {"policy": params["policy"], "value_head": head}
    twin = {"policy": params["policy"], "critic": {"trunk": params["policy"], "head": head}}
    batch = ppo_batch(sequences, LAYOUTS["packed"])
    one, _ = make_ppo_objective(config, None)(shared, frozen, batch)
    two, _ = make_ppo_objective(config, config)(twin, frozen, batch)
    torch.testing.assert_close(one, two)


def test_ppo_objective_exact_kl_in_the_loss(model, config, sequences):
    params, frozen = model
    batch = ppo_batch(sequences, LAYOUTS["packed"])
    without, _ = make_ppo_objective(config, config)(params, frozen, batch)
    with_kl, metrics = make_ppo_objective(config, config, loss_kl="exact")(params, frozen, batch)
    expected = sum(
        exact_kl(
            *(gpt2.logits(p, alone(p, config, s, n), config=config) for p in (params["policy"], frozen["reference"]))
        ).sum()
        for s, n in zip(sequences, PROMPTS, strict=True)
    )
    torch.testing.assert_close(metrics["loss/kl_avg_sum"], expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(with_kl - without, 0.7 * expected, atol=1e-3, rtol=1e-4)


def test_ppo_objective_entropy_bonus_reaches_the_gradient(model, config, sequences):
    params, frozen = model
    batch = ppo_batch(sequences, LAYOUTS["packed"])

    def entropies(policy):
        logits = (
            gpt2.logits(policy, alone(policy, config, s, prompt), config=config)
            for s, prompt in zip(sequences, PROMPTS, strict=True)
        )
        return sum(entropy(of_sequence).sum() for of_sequence in logits)

    without, bonus = (
        grad_and_value(make_ppo_objective(config, config, entropy_coef=coef), has_aux=True)(params, frozen, batch)[0]
        for coef in (0.0, 0.5)
    )
    expected = named_leaves(torch.func.grad(entropies)(params["policy"]))
    for name, gradient in named_leaves(bonus["policy"]).items():
        change = gradient - named_leaves(without["policy"])[name]
        torch.testing.assert_close(change, -0.5 * expected[name], atol=1e-3, rtol=1e-3, msg=name)


def test_ppo_objective_critic_warmup_gives_the_policy_no_gradient(model, config, sequences):
    params, frozen = model
    objective = make_ppo_objective(config, config, policy_coef=0.0, entropy_coef=0.1)
    gradients, _ = grad_and_value(objective, has_aux=True)(params, frozen, ppo_batch(sequences, LAYOUTS["packed"]))
    assert not any(leaf.any() for leaf in named_leaves(gradients["policy"]).values())
    assert all(leaf.any() for leaf in named_leaves(gradients["critic"]["head"]).values())


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("recompute", [False, True], ids=["captured", "recomputed"])
def test_invariant_1_first_minibatch_has_ratio_one(model, config, tokens, temperature, recompute):
    """Sample, then look at the same tokens through the update: ratio 1, approximate KL 0, clip fraction 0."""
    from rlhf.batches import PromptBatch

    params, frozen = model
    rollout = make_completion_fn(config, max_new_tokens=9, temperature=temperature, stop_tokens=[5], top_k=30)
    lengths = torch.tensor([6, 2, 4])
    out = rollout(params, frozen, PromptBatch(tokens[:, :6], lengths, torch.arange(3), random.split(random.key(4), 3)))
    counts = out.mask.sum(dim=1).tolist()
    sequences = [torch.cat([tokens[r, : lengths[r]], out.tokens[r, : counts[r]]]) for r in range(3)]
    packed = build_rows([s.numpy() for s in sequences], [(0, 0), (1, 0), (1, 16)])
    index = torch.cat([torch.arange(counts[r]) + packed.starts[r] + lengths[r] - 1 for r in range(3)])
    last = torch.tensor([packed.starts[r] + len(sequences[r]) - 1 for r in range(3)])
    targets, old = out.tokens[out.mask], out.log_probs[out.mask]
    mask = torch.ones_like(targets, dtype=torch.bool)
    if recompute:
        scorer = make_scorer(config, None, [], temperature=temperature, log_probs=True)
        old = scorer(params, frozen, ScoreBatch(packed.rows, index, targets, mask, last)).log_probs
    noise = random.normal(random.key(5), targets.shape)
    batch = PPOBatch(
        packed.rows, index, targets, mask, old, old, noise, noise, noise, torch.tensor(0.0), noise, targets
    )
    _, sums = make_ppo_objective(config, config, temperature=temperature)(params, frozen, batch)
    means = mean_metrics(sums)
    assert means["val/ratio"].item() == pytest.approx(1.0, abs=1e-5)
    assert means["policy/approxkl_avg"].item() == pytest.approx(0.0, abs=1e-10)
    assert means["policy/clipfrac_avg"].item() == 0.0
    if recompute:
        assert means["val/ratio"].item() == 1.0
        assert means["policy/approxkl_avg"].item() == 0.0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scorer_equals_one_sequence_at_a_time(model, config, sequences, layout):
    params, frozen = model
    batch, starts = (
        token_batch(sequences, LAYOUTS[layout]),
        build_rows([s.numpy() for s in sequences], LAYOUTS[layout]).starts,
    )
    last = torch.tensor([start + len(s) - 1 for start, s in zip(starts, sequences, strict=True)])
    scorer = make_scorer(config, config, [config], temperature=0.8, log_probs=True, bootstrap=True)
    scores = scorer(params, frozen, ScoreBatch(*batch[:4], last))
    start = 0
    for number, (sequence, prompt, count) in enumerate(zip(sequences, PROMPTS, LENGTHS, strict=True)):
        part = slice(start, start + count)
        start += count
        logits, ref_logits = (
            gpt2.logits(p, alone(p, config, sequence, prompt), config=config)
            for p in (params["policy"], frozen["reference"])
        )
        targets = sequence[prompt:]
        close = {"atol": 1e-5, "rtol": 1e-5}
        torch.testing.assert_close(scores.log_probs[part], token_log_probs(logits, targets, temperature=0.8), **close)
        torch.testing.assert_close(
            scores.ref_log_probs[part], token_log_probs(ref_logits, targets, temperature=0.8), **close
        )
        critic = params["critic"]
        values = apply_head(critic["head"], alone(critic["trunk"], config, sequence, prompt))
        torch.testing.assert_close(scores.values[part], values, **close)
        whole = gpt2.hidden_states(critic["trunk"], sequence[None], config=config)[0, -1]
        torch.testing.assert_close(scores.scores[number, 0], apply_head(critic["head"], whole), **close)
        torch.testing.assert_close(scores.bootstrap_values[number], apply_head(critic["head"], whole), **close)


def test_scorer_computes_only_what_was_asked_for(model, config, sequences):
    params, frozen = model
    batch = ScoreBatch(*token_batch(sequences, LAYOUTS["packed"])[:4], torch.tensor([3, 4]))
    scores = make_scorer(config, None, [])(params, frozen, batch)
    assert scores.scores.shape == (2, 0)
    assert not any(tensor.any() for tensor in (scores.log_probs, scores.values, scores.bootstrap_values))
    assert scores.ref_log_probs.all()


def test_scorer_values_of_a_shared_trunk_come_with_recomputed_log_probs(model, config, sequences):
    params, frozen = model
    head = params["critic"]["head"]
    shared, twin = (
        {"policy": params["policy"], "value_head": head},
        {"policy": params["policy"], "critic": {"trunk": params["policy"], "head": head}},
    )
    batch = ScoreBatch(*token_batch(sequences, LAYOUTS["packed"])[:4], torch.tensor([3, 4]))
    one = make_scorer(config, None, [], log_probs=True)(shared, frozen, batch)
    two = make_scorer(config, config, [], log_probs=True)(twin, frozen, batch)
    torch.testing.assert_close(one.values, two.values)
    one, two = (make_scorer(config, critic, [], bootstrap=True) for critic in (None, config))
    after = one(shared, frozen, batch).bootstrap_values
    assert after.all()
    torch.testing.assert_close(after, two(twin, frozen, batch).bootstrap_values)


def test_reward_objective_and_scores_read_the_last_tokens(params, config, sequences):
    model = {"trunk": params, "head": {"weight": random.normal(random.key(8), (1, config.n_embd))}}
    starts = build_rows([s.numpy() for s in sequences], LAYOUTS["packed"])
    last = torch.tensor([start + len(s) - 1 for start, s in zip(starts.starts, sequences, strict=True)])
    margin, mask = torch.tensor([0.4, -0.2]), torch.tensor([True, True])
    batch = PairBatch(starts.rows, last[[0, 2]], last[[1, 3]], margin, mask)
    expected = torch.stack(
        [apply_head(model["head"], gpt2.hidden_states(params, s[None], config=config)[0, -1]) for s in sequences]
    )
    chosen, rejected = make_pair_scores(config)(model, {}, batch)
    torch.testing.assert_close(torch.stack([chosen, rejected], dim=1).flatten(), expected, atol=1e-5, rtol=1e-5)
    loss, metrics = make_reward_objective(config, centre_coef=0.1)(model, {}, batch)
    c, r = expected[[0, 2]], expected[[1, 3]]
    by_hand = (-torch.log(torch.sigmoid(c - r - margin)) + 0.1 * (c + r) ** 2).sum()
    torch.testing.assert_close(loss, by_hand, atol=1e-5, rtol=1e-5)
    assert metrics["count"].item() == 2
    first = batch._replace(mask=torch.tensor([True, False]))
    loss, metrics = make_reward_objective(config, centre_coef=0.1)(model, {}, first)
    by_hand = -torch.log(torch.sigmoid(c - r - margin))[0] + 0.1 * (c + r)[0] ** 2
    torch.testing.assert_close(loss, by_hand, atol=1e-5, rtol=1e-5)
    assert metrics["count"].item() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradients_are_fp32_whatever_the_models_run_in(model, config, sequences, dtype):
    params, frozen = model
    objective = grad_and_value(make_ppo_objective(config, config, dtype=dtype), has_aux=True)
    gradients, (loss, metrics) = objective(params, frozen, ppo_batch(sequences, LAYOUTS["packed"]))
    exact, _ = grad_and_value(make_ppo_objective(config, config), has_aux=True)(
        params, frozen, ppo_batch(sequences, LAYOUTS["packed"])
    )
    assert loss.dtype == torch.float32
    for name, gradient in named_leaves(gradients).items():
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, named_leaves(exact)[name], atol=0.6, rtol=0.2, msg=name)
    assert not any(value.requires_grad for value in metrics.values())


def test_objectives_compile_to_one_graph(model, config, sequences):
    params, frozen = model
    batch = ppo_batch(sequences, LAYOUTS["packed"])
    step = grad_and_value(make_ppo_objective(config, config, loss_kl="k2"), has_aux=True)
    gradients, (loss, _) = torch.compile(step, backend="aot_eager", fullgraph=True)(params, frozen, batch)
    expected, (expected_loss, _) = step(params, frozen, batch)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(named_leaves(gradients), named_leaves(expected), atol=1e-5, rtol=1e-4)


OF_POLICY = {"entropy_coef": 0.02, "loss_kl": "k3", "clip_eps": 0.4}


@pytest.mark.parametrize("weight_kl", [False, True])
def test_weights_of_a_batch_are_those_of_every_term_of_the_policy(model, config, sequences, weight_kl):
    params, frozen = {"policy": model[0]["policy"]}, model[1]
    batch = ppo_batch(sequences, LAYOUTS["packed"])
    objective = make_ppo_objective(config, None, weight_kl=weight_kl, **OF_POLICY)
    kept = torch.arange(len(batch.mask)) < LENGTHS[0]
    weighted, sums = objective(params, frozen, batch._replace(weights=3.0 * kept))
    masked, _ = objective(params, frozen, batch._replace(mask=kept))
    torch.testing.assert_close(weighted, 3.0 * masked, rtol=1e-5, atol=1e-5)
    assert sums["count"] == sum(LENGTHS)


def test_the_kl_in_the_loss_is_weighed_by_the_ratio_where_it_is_asked_for(model, config, sequences):
    params, frozen = {"policy": model[0]["policy"]}, model[1]
    batch = ppo_batch(sequences, LAYOUTS["one per row"])
    log_probs = make_scorer(config, None, [], log_probs=True)(
        params, frozen, ScoreBatch(*batch[:4], torch.zeros(4, dtype=torch.int64))
    ).log_probs
    plain, weighed = (
        make_ppo_objective(config, None, weight_kl=weigh, **OF_POLICY)(params, frozen, batch)[1]["loss/kl_avg_sum"]
        for weigh in (False, True)
    )
    torch.testing.assert_close(plain, kl_estimate(log_probs, batch.ref_log_probs, estimator="k3").sum())
    expected = importance_weighted_kl(log_probs, old_log_probs=batch.old_log_probs, ref_log_probs=batch.ref_log_probs)
    torch.testing.assert_close(weighed, expected.sum())
