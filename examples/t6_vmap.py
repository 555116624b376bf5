"""Tutorial 6: per-example gradients and reward ensembles with vmap."""

# %% [markdown]
# # 6. Per-example gradients and reward ensembles with `vmap`
#
# Parameters are arguments, and nothing is changed in place. So `torch.func` works on models
# and losses: `grad`, `vmap`, `jvp` and their compositions.

# %%
import torch
from rlhf import (
    GPT2Config,
    adamw,
    apply_head,
    constant_schedule,
    forward,
    gpt2,
    init_reward_head,
    random,
    reward_loss,
    sft_loss,
    token_log_probs,
)
from rlhf.tree import named_leaves

config = GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2)
params = gpt2.init(config, key=random.key(0))
tokens = (torch.arange(8 * 12).reshape(8, 12) * 7) % 50

# %% [markdown]
# ## Per-example gradients
#
# `grad` differentiates the loss of one sequence; `vmap` maps it over the batch. The result is
# a tree of parameters with a leading axis: one gradient for each example.


# %%
def loss_of_one(params, row):
    log_probs = token_log_probs(forward(params, row[None, :-1], config=config), row[None, 1:])
    return sft_loss(log_probs, mask=torch.ones_like(log_probs, dtype=torch.bool))[0]


per_example = torch.func.vmap(torch.func.grad(loss_of_one), in_dims=(None, 0))(params, tokens)
norms = sum(
    leaf.flatten(1).square().sum(1) for leaf in named_leaves(per_example).values()
).sqrt()
print("norms of the gradients:", norms.numpy().round(1))
one = torch.func.grad(loss_of_one)(params, tokens[3])
print(
    "as without vmap:",
    torch.allclose(per_example["wte"]["weight"][3], one["wte"]["weight"], atol=1e-5),
)

# %% [markdown]
# Gradients of single examples give the noise scale, influence scores, or differentially
# private training.
#
# ## An ensemble of reward models
#
# Initialise several heads from several keys, train them together, and read their disagreement.
# Overoptimisation of a reward model is bounded by what an ensemble agrees on (Coste et al.
# 2024, https://arxiv.org/abs/2310.02743).

# %%
MEMBERS, PAIRS = 5, 64
keys = random.split(random.key(1), MEMBERS)
heads = torch.func.vmap(lambda key: init_reward_head(config.n_embd, key=key))(keys)
print("weights of the ensemble:", tuple(heads["weight"].shape))

texts = (torch.arange(2 * PAIRS * 10).reshape(2 * PAIRS, 10) ** 2 + 3) % 50
hidden = gpt2.hidden_states(params, texts, config=config)[:, -1]  # at the last token
wanted = texts.float().mean(dim=1)  # the taste to learn: larger tokens
first, second = hidden[:PAIRS], hidden[PAIRS:]
better = (wanted[:PAIRS] > wanted[PAIRS:])[:, None]
chosen, rejected = torch.where(better, first, second), torch.where(better, second, first)


def ensemble_loss(head, seen):
    scores = apply_head(head, chosen), apply_head(head, rejected)
    return reward_loss(scores[0], rejected_scores=scores[1], mask=seen)[0] / seen.sum()


# %% [markdown]
# Every member sees another half of the pairs. One `vmap` over heads and masks trains all of
# them; AdamW is mapped, too.

# %%
seen = torch.func.vmap(lambda key: random.uniform(key, (PAIRS,)) < 0.5)(
    random.split(random.key(2), MEMBERS)
)
optimizer = adamw(constant_schedule(3e-2))
state = torch.func.vmap(optimizer.init)(heads)
for _ in range(150):
    grads, losses = torch.func.vmap(torch.func.grad_and_value(ensemble_loss))(heads, seen)
    heads, state = torch.func.vmap(optimizer.update)(grads, state, heads)
print("losses:", losses.numpy().round(3))

scores = torch.func.vmap(apply_head, in_dims=(0, None))(heads, hidden)  # [members, texts]
print("mean disagreement:", round(float(scores.std(dim=0).mean()), 2))
print(
    "a careful reward, the lowest of the members:",
    scores.min(dim=0).values[:4].numpy().round(2),
)

# %% [markdown]
# ## Derivatives of derivatives
#
# A product of the Hessian and a vector is a derivative of the gradient in its direction.

# %%
head = init_reward_head(config.n_embd, key=random.key(0))
everything = torch.ones(PAIRS, dtype=torch.bool)
gradient = torch.func.grad(lambda head: ensemble_loss(head, everything))
direction = gradient(head)
_, product = torch.func.jvp(gradient, (head,), (direction,))
print(
    f"curvature along the gradient: {float((product['weight'] * direction['weight']).sum()):.4g}"
)
