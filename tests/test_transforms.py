"""Every public function of the core under `grad`, `vmap`, `jvp` and twice differentiated, in one table.

Each case is a function of tensors in float64, hyperparameters among them, against the plain loop (`vmap`) and against
finite differences (the others). To cover a function, add a case to `CASES`; that every public function of `MODULES` has
one is a test, but for those in `OTHERS`, which say why not.
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

from rlhf import (
    advantages,
    best_of_n_sampling,
    ensembles,
    experience,
    group_baselines,
    kl,
    losses,
    ops,
    optim,
    policy_losses,
    preference_losses,
    random,
    remat,
    weighting,
)
from rlhf.advantages import gae, gae_loop, returns_to_go, token_rewards
from rlhf.batches import Rows
from rlhf.best_of_n_sampling import best_of_n
from rlhf.ensembles import combine_scores, error_correlation
from rlhf.experience import make_experience, postprocess_scores
from rlhf.group_baselines import dpo_advantages, equal_groups, group_advantages
from rlhf.kl import adaptive_kl_coef, budget_kl_coef, exact_kl, importance_weighted_kl, kl_estimate, ratio_of
from rlhf.losses import clip_ratio, ppo_policy_loss, ppo_value_loss, reward_loss, sft_loss, weighted_sum
from rlhf.models import attention, forward, gpt2, heads, layers, llama, rope
from rlhf.ops import (
    entropy,
    gather_rows,
    is_argmax,
    masked_mean,
    masked_sum,
    masked_var,
    mean_metrics,
    scale_logits,
    target_logits,
    token_log_probs,
    upcast,
    whiten,
)
from rlhf.optim import AdamState, adamw, clip_by_global_norm, clip_scale
from rlhf.policy_losses import cispo_loss, gspo_loss
from rlhf.preference_losses import dpo_loss, ipo_loss, sequence_log_ratio
from rlhf.schedules import constant_schedule
from rlhf.tree import cast

MODULES = (
    losses, policy_losses, preference_losses, weighting, advantages, group_baselines, ensembles, best_of_n_sampling, kl,
    ops, optim, experience, remat, layers, attention, rope, heads, forward,
)  # fmt: skip

OTHERS = {
    "loss_weights": "lengths in, constants out",
    "bon_kl_bound": "a number in, a number out",
    "chunk_size": "numbers in, a number out",
    "init_reward_head": "makes parameters of a key",
    "init_value_head": "makes parameters of a number",
    "pack_affine": "prepares parameters for decoding, of which no gradient is taken",
    "pack_linear": "prepares parameters for decoding, of which no gradient is taken",
    "rotary_frequencies": "numbers in, a constant out",
    "rotation_at": "integers in, constants out",
    "pack_embedding": "prepares parameters for decoding, of which no gradient is taken",
    "init_kv_cache": "makes zeros",
    "write_prompts": "writes into the cache",
    "decode_attention": "writes into the cache",
    "padding_layout": "integers in, integers out",
    "attention_layout": "integers in, a mask out",
    "additive_mask": "a mask in, a constant out",
    "causal": "a number in, a mask out",
    "at_predictors": "`packed_hidden_states` at some rows",
    "trunk_states": "`packed_hidden_states` of cast parameters",
    "prompt_attention": "`attention` without a gradient",
}


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


def clipped_by(loss):
    return lambda x, old, advantages, low, high, mask: loss(
        x, old_log_probs=old, advantages=advantages, mask=mask, clip_eps=low, clip_eps_high=high
    )[0]


GROUPS = torch.tensor([1, 0, 1, 0])
PACKED = torch.tensor([0, 1, 0, 1, 1])


def controlled(kl_coef, kl, samples, target, horizon):
    return adaptive_kl_coef(kl_coef, kl, num_samples=samples, target=target, horizon=horizon)


SHAPE = gpt2.GPT2Config(vocab_size=5, n_positions=4, n_embd=4, n_layer=1, n_head=2)
TOKENS = torch.tensor([[1, 4, 0, 2]])
ROWS = Rows(TOKENS, torch.tensor([[0, 1, 0, 1]]), torch.tensor([[1, 1, 2, 2]]), torch.tensor([0, 2, 4]))


def decoder(seed):
    """seed -> embedding, projections of attention and of the MLP."""
    shapes = ((5, 4), (4, 12), (4, 16))
    return tuple(0.5 * floats(10 * seed + n, *shape) for n, shape in enumerate(shapes))


def with_params(function):
    """`function` of a whole GPT-2 in which those three leaves are arguments."""
    rest = cast(gpt2.init(SHAPE, key=random.key(3)), torch.float64)

    def call(wte, c_attn, c_fc):
        (block,) = rest["h"]
        attn = block["attn"] | {"c_attn": block["attn"]["c_attn"] | {"weight": c_attn}}
        mlp = block["mlp"] | {"c_fc": block["mlp"]["c_fc"] | {"weight": c_fc}}
        return function(rest | {"wte": {"weight": wte}, "h": [block | {"attn": attn, "mlp": mlp}]})

    return call


LLAMA = llama.LlamaConfig(vocab_size=5, n_positions=4, n_embd=4, n_layer=1, n_head=2, n_kv_head=1, n_inner=6)


def llama_leaves(seed):
    """seed -> embedding, projection of keys, gate of the MLP."""
    return tuple(0.5 * floats(10 * seed + n, *shape) for n, shape in enumerate(((5, 4), (2, 4), (6, 4))))


def with_llama(function):
    """`function` of a whole Llama in which those three leaves are arguments."""
    rest = cast(llama.init(LLAMA, key=random.key(3)), torch.float64)

    def call(embedding, k_proj, gate_proj):
        (block,) = rest["layers"]
        attention = block["self_attn"] | {"k_proj": {"weight": k_proj}}
        mlp = block["mlp"] | {"gate_proj": {"weight": gate_proj}}
        layers = [block | {"self_attn": attention, "mlp": mlp}]
        return function(rest | {"embed_tokens": {"weight": embedding}, "layers": layers})

    return call


def heads_of(*shape):
    return lambda seed: tuple(floats(10 * seed + n, *shape) for n in range(3))


def affine_params(seed):
    return floats(seed, 2, 3, 4), floats(seed + 10, 4, 5), floats(seed + 20, 5)


def norm_params(seed):
    return floats(seed, 2, 3, 4), floats(seed + 10, 4), floats(seed + 20, 4)


def per_row_function(shared, x):
    return (torch.tanh(x @ shared).sum(-1), x.square().sum(-1))


def small(seed):
    """Parameters, gradient and moments [2, 1], and the numbers of `adamw`."""
    numbers = (0.1, 0.8, 0.9, 1e-3, 0.2, 0.05)
    return (*(floats(10 * seed + n, 2, 1) for n in range(4)), *(tensor(n * (1 + 0.01 * seed)) for n in numbers))


def updated(p, g, m, v, rate, b1, b2, eps, weight_decay, given):
    """The second update of a leaf that decays and of one that does not; `given` takes the place of the schedule."""
    optimizer = adamw(constant_schedule(rate), b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    grads, mu, nu, params = ({"weight": x, "bias": x[0]} for x in (g, m, v.square() + 0.1, p))
    state = AdamState(torch.ones((), dtype=torch.int64), mu, nu)
    first, state = optimizer.update(grads, state, params)
    return optimizer.update(grads, state, first, learning_rate=given)[0]


def clipped(x, max_norm, norm, mask):
    return clip_by_global_norm({"a": x, "b": x[0]}, max_norm), clip_by_global_norm([x], max_norm, norm=norm)


CASES = {
    "remat": Case(lambda x, w, b: remat.remat(per_row_function)(w, x), affine_params, (0, 1)),
    "remat, of a model": Case(
        with_params(lambda p: gpt2.hidden_states(p, TOKENS, config=SHAPE, gradient_checkpointing=True)),
        decoder,
        (0, 1, 2),
    ),
    "in_chunks": Case(
        lambda x, w, b: remat.in_chunks(per_row_function, 4)(w, x.reshape(-1, x.shape[-1])), affine_params, (0, 1)
    ),
    "affine": Case(lambda x, w, b: layers.affine(x, {"weight": w, "bias": b}), affine_params, (0, 1, 2)),
    "linear": Case(lambda x, w, b: layers.linear(x, {"weight": w.T, "bias": b}), affine_params, (0, 1, 2)),
    "linear, no bias": Case(lambda x, w, b: layers.linear(x, {"weight": w.T}), affine_params, (0, 1)),
    "join_linear": Case(
        lambda x, w, b: layers.join_linear([{"weight": w, "bias": b}, {"weight": w.sin(), "bias": b.sin()}]),
        affine_params,
        (1, 2),
    ),
    "rms_norm": Case(lambda x, w, b: layers.rms_norm(x, {"weight": w}, eps=1e-5), norm_params, (0, 1)),
    "swiglu": Case(lambda x, y, mask: layers.swiglu(x, y), per_token(2), (0, 1)),
    "rotate": Case(
        lambda q, k, v: rope.rotate(q, rope.rotation_at(torch.arange(3), torch.ones(1, dtype=torch.float64))),
        heads_of(1, 3, 2, 4),
        (0,),
    ),
    "layer_norm": Case(
        lambda x, w, b: layers.layer_norm(x, {"weight": w, "bias": b}, eps=1e-5), norm_params, (0, 1, 2)
    ),
    "gelu": Case(lambda x, mask: layers.gelu(x), per_token(1), (0,)),
    "dropout": Case(lambda x, mask: layers.dropout(x, 0.3, key=random.key(1)), per_token(1), (0,)),
    "unembed": Case(
        lambda x, w, b: layers.unembed(x, {"weight": w.T}, vocab_size=5, padded=True), affine_params, (0, 1)
    ),
    "attention": Case(lambda q, k, v: attention.attention(q, k, v, None), heads_of(1, 2, 3, 2), (0, 1, 2)),
    "attention, shared keys": Case(
        lambda q, k, v: attention.attention(q, k[:, :1], v[:, :1], None), heads_of(1, 2, 3, 2), (0, 1, 2)
    ),
    "repeat_heads": Case(lambda q, k, v: attention.repeat_heads(q, 4), heads_of(1, 2, 3, 2), (0,)),
    "attention, segments": Case(
        lambda q, k, v: attention.attention(q, k, v, attention.attention_layout(ROWS.segments[:, 1:], None, q, 2).bias),
        heads_of(1, 2, 3, 2),
        (0, 1, 2),
    ),
    "self_attention": Case(
        lambda q, k, v: attention.self_attention(q, k, v, attention.AttentionLayout(None, None)),
        heads_of(1, 2, 3, 2),
        (0, 1, 2),
    ),
    "heads_first": Case(
        lambda q, k, v: attention.heads_first(torch.stack((q, k, v), 2)), heads_of(1, 3, 2, 2), (0, 1, 2)
    ),
    "attend_to_cache": Case(
        lambda q, k, v: attention.attend_to_cache(q[:, :, 0], k.transpose(-1, -2), v, torch.zeros(1, 3)),
        heads_of(1, 2, 3, 2),
        (0, 1, 2),
    ),
    "attend_to_cache, shared keys": Case(
        lambda q, k, v: attention.attend_to_cache(q[:, :, 0], k[:, :1].transpose(-1, -2), v[:, :1], torch.zeros(1, 3)),
        heads_of(1, 2, 3, 2),
        (0, 1, 2),
    ),
    "apply_head": Case(lambda x, w, b: heads.apply_head({"weight": w[None], "bias": b[:1]}, x), norm_params, (0, 1, 2)),
    "value_head_from_reward": Case(
        lambda w, mean, std, weight: heads.value_head_from_reward({"weight": w}, mean=mean, std=std, weight=weight),
        lambda seed: (floats(seed, 1, 4), tensor(0.3 + seed), tensor(1.5), tensor(0.7)),
        (0, 1, 2, 3),
    ),
    "forward": Case(with_params(lambda p: forward.forward(p, TOKENS, config=SHAPE)), decoder, (0, 1, 2)),
    "forward, padded": Case(
        with_params(lambda p: forward.forward(p, TOKENS, config=SHAPE, attention_mask=TOKENS > 0)), decoder, (0, 1, 2)
    ),
    "packed_hidden_states": Case(
        with_params(lambda p: forward.packed_hidden_states(p, ROWS, SHAPE)), decoder, (0, 1, 2)
    ),
    "forward, llama": Case(with_llama(lambda p: forward.forward(p, TOKENS, config=LLAMA)), llama_leaves, (0, 1, 2)),
    "packed_hidden_states, llama": Case(
        with_llama(lambda p: forward.packed_hidden_states(p, ROWS, LLAMA, gradient_checkpointing=True)),
        llama_leaves,
        (0, 1, 2),
    ),
    "adamw": Case(updated, small, tuple(range(10))),
    "clip_by_global_norm": Case(clipped, per_token(1, 0.3, 0.7), (0, 1, 2)),
    "clip_scale": Case(lambda max_norm, norm, mask: clip_scale(norm, max_norm), per_token(0, 0.3, 0.7), (0, 1)),
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
    "clip_ratio": Case(
        lambda x, low, high, mask: clip_ratio("test", x.exp(), low, high), per_token(1, 0.2, 0.3), (0, 1, 2)
    ),
    "weighted_sum": Case(lambda x, w, mask: weighted_sum("test", x, mask, w), per_token(2), (0,)),
    "ppo_policy_loss, clip-higher": Case(clipped_by(ppo_policy_loss), per_token(3, 0.2, 0.3), (0, 3, 4)),
    "cispo_loss": Case(clipped_by(cispo_loss), per_token(3, 0.2, 0.3), ()),  # its gradient is not its value's
    "gspo_loss": Case(clipped_by(gspo_loss), per_token(3, 0.02, 0.03), (0, 3, 4)),
    "gspo_loss, packed": Case(
        clipped_by(lambda x, **options: gspo_loss(x, sequences=PACKED.expand(x.shape), **options)),
        per_token(3, 0.02, 0.03),
        (0, 3, 4),
    ),
    "dpo_loss": Case(
        lambda chosen, rejected, beta, smoothing, mask: dpo_loss(
            chosen, rejected_log_ratios=rejected, mask=mask, beta=beta, label_smoothing=smoothing
        )[0],
        per_token(2, 0.3, 0.1),
        (0, 1, 2, 3),
    ),
    "ipo_loss": Case(
        lambda chosen, rejected, beta, mask: ipo_loss(chosen, rejected_log_ratios=rejected, mask=mask, beta=beta)[0],
        per_token(2, 0.3),
        (0, 1, 2),
    ),
    "sequence_log_ratio": Case(
        lambda x, ref, mask: sequence_log_ratio(x, ref_log_probs=ref, mask=mask), per_token(2), (0,)
    ),
    "group_advantages": Case(lambda x, targets: group_advantages(x[:, 0], GROUPS), logits(1), (0,)),
    "group_advantages, mean over deviation": Case(
        lambda x, targets: group_advantages(x[:, 0], GROUPS, baseline="mean", scale="group_std"), logits(1), (0,)
    ),
    "group_advantages, batch over deviation": Case(
        lambda x, targets: group_advantages(x[:, 0], GROUPS, baseline="batch", scale="batch_std"), logits(1), (0,)
    ),
    "dpo_advantages": Case(
        lambda x, beta, targets: dpo_advantages(x[:, 0], x[:, 1], GROUPS, beta=beta), logits(1, 0.3), (1,)
    ),
    "equal_groups": Case(lambda x, targets: equal_groups(x[:, 0].round(), GROUPS), logits(1), ()),
    "error_correlation": Case(lambda x, targets: error_correlation(x[:, 0], x[:, 1], x[:, 2]), logits(1), ()),
    "combine_scores, mean": Case(lambda x, targets: combine_scores(x), logits(1), (0,)),
    "combine_scores, min": Case(lambda x, targets: combine_scores(x, how="min"), logits(1), (0,)),
    "combine_scores, uncertainty": Case(
        lambda x, coef, targets: combine_scores(x, how="uncertainty", coef=coef), logits(1, 0.3), (0, 1)
    ),
    "best_of_n": Case(lambda proxy, values, targets: best_of_n(proxy, values, 3), logits(2), (1,)),
    "importance_weighted_kl": Case(
        lambda x, old, ref, mask: importance_weighted_kl(x, old_log_probs=old, ref_log_probs=ref), per_token(3), (0,)
    ),
    "token_rewards": Case(rewarded, per_row(0.3), (0, 1, 4)),
    "returns_to_go": Case(
        lambda scores, rewards, values, after, gamma, mask: returns_to_go(rewards, mask, gamma=gamma),
        per_row(0.9),
        (1, 4),
    ),
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
    "budget_kl_coef": Case(
        lambda coef, kl, budget, floor: budget_kl_coef(coef, kl, budget=budget, floor=floor),
        lambda seed: tuple(tensor(n + 0.01 * seed) for n in (0.2, 12.0, 10.0, 0.05)),
        (0, 1, 2, 3),
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
    "target_logits": Case(target_logits, logits(1), (0,)),
    "is_argmax": Case(is_argmax, logits(1), ()),
    "mean_metrics": Case(
        lambda x, mask: mean_metrics({"a_sum": masked_sum(x, mask), "count": mask.sum()})["a"], per_token(1), (0,)
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
    assert public == {name.partition(",")[0] for name in CASES} | OTHERS.keys()


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
