"""Tutorial 1: one loss, computed by hand and tested."""

# %% [markdown]
# # 1. One loss by hand, and its unit test
#
# Losses in `rlhf` are functions of tensors. They have no configuration object, no state and no
# device of their own. This tutorial computes PPO's clipped loss for four tokens by hand, and
# compares.

# %%
import torch
from rlhf import mean_metrics, ppo_policy_loss

log_probs = torch.tensor([[-1.0, -0.5, -2.0, -9.9]])  # the policy that learns, in nats
old_log_probs = torch.tensor([[-1.0, -1.0, -1.0, -9.9]])  # the policy that sampled
advantages = torch.tensor([[1.0, 2.0, -1.0, torch.nan]])
mask = torch.tensor([[True, True, True, False]])  # the last position is padding

loss, sums = ppo_policy_loss(
    log_probs, old_log_probs=old_log_probs, advantages=advantages, mask=mask
)
print(loss, sums["count"])

# %% [markdown]
# The loss is a **sum** over the tokens that count, and `count` says how many there are. The
# padding holds NaN here, and changes nothing.
#
# By hand, with the ratio $r_t = \exp(\text{log\_probs}_t - \text{old\_log\_probs}_t)$:
#
# $$L = -\sum_t \min\bigl(r_t A_t,\; \operatorname{clip}(r_t, 0.8, 1.2)\, A_t\bigr)$$
#
# | token | ratio | advantage | unclipped | clipped | the smaller |
# |---|---|---|---|---|---|
# | 1 | 1 | 1 | 1 | 1 | 1 |
# | 2 | $e^{0.5} = 1.649$ | 2 | 3.297 | 2.4 | 2.4 |
# | 3 | $e^{-1} = 0.368$ | -1 | -0.368 | -0.8 | -0.8 |

# %%
by_hand = -(1.0 + 2.4 - 0.8)
print(f"by hand {by_hand:.4f}, by rlhf {loss:.4f}")

# %% [markdown]
# Tokens 2 and 3 are clipped: the policy has already moved far enough in the direction of their
# advantages. Their gradient is exactly zero.


# %%
def total_loss(log_probs: torch.Tensor) -> torch.Tensor:
    return ppo_policy_loss(
        log_probs, old_log_probs=old_log_probs, advantages=advantages, mask=mask
    )[0]


print(torch.func.grad(total_loss)(log_probs))
print({name: round(float(value), 3) for name, value in mean_metrics(sums).items()})

# %% [markdown]
# ## Splitting a batch
#
# Sums make a batch divisible. Two halves give the loss of the whole, however unevenly the
# tokens are spread.

# %%
halves = [
    ppo_policy_loss(log_probs[:, part], old_log_probs=old_log_probs[:, part], advantages=advantages[:, part],
                    mask=mask[:, part])
    for part in (slice(0, 1), slice(1, 4))
]  # fmt: skip
total = sum(part_loss for part_loss, _ in halves)
count = sum(part_sums["count"] for _, part_sums in halves)
print(float(total / count), float(loss / sums["count"]))

# %% [markdown]
# ## Other averages
#
# Papers divide differently. `weights` scales each entry, constant and broadcast to the mask.
# With N tokens in B sequences, `N / (B * n_i)` gives the mean over sequences of their means
# over tokens.

# %%
two_rows = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, 0.0, 0.0]])
both = torch.tensor([[True, True, True], [True, False, False]])
lengths = both.sum(dim=1, keepdim=True)
weights = both.sum() / (len(both) * lengths)

constants = {"old_log_probs": two_rows, "advantages": -two_rows, "mask": both}
per_token, sums = ppo_policy_loss(two_rows, **constants)
per_sequence, _ = ppo_policy_loss(two_rows, **constants, weights=weights)
print("mean over tokens   ", float(per_token / sums["count"]))
print("mean over sequences", float(per_sequence / sums["count"]))

# %% [markdown]
# The first is -(1 + 2 + 3 + 4) / 4, the second is -(2 + 4) / 2.
#
# ## A unit test
#
# A test of a loss needs an independent answer. Here it is a loop over tokens in plain Python.
# Finite differences check the gradient, in float64.

# %%
import math


def reference_loss(log_probs, old_log_probs, advantages, mask, clip_eps=0.2):
    total = 0.0
    for new, old, advantage, counts in zip(
        log_probs, old_log_probs, advantages, mask, strict=True
    ):
        if counts:
            ratio = math.exp(new - old)
            total -= min(
                ratio * advantage, min(max(ratio, 1 - clip_eps), 1 + clip_eps) * advantage
            )
    return total


def test_the_clipped_loss():
    generator = torch.Generator().manual_seed(0)
    new, old, advantage = torch.randn(3, 50, generator=generator, dtype=torch.float64)
    counts = torch.rand(50, generator=generator) < 0.7
    loss, _ = ppo_policy_loss(new, old_log_probs=old, advantages=advantage, mask=counts)
    expected = reference_loss(new.tolist(), old.tolist(), advantage.tolist(), counts.tolist())
    assert math.isclose(loss, expected, rel_tol=1e-12)
    inputs = new.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: ppo_policy_loss(x, old_log_probs=old, advantages=advantage, mask=counts)[0],
        (inputs,),
    )


test_the_clipped_loss()
print("passed")
