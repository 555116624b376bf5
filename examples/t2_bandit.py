"""Tutorial 2: PPO on a bandit whose optimum is known in closed form."""

# %% [markdown]
# # 2. PPO on a bandit with a known answer
#
# A bandit with five arms is a language model that writes one token. RLHF maximises the reward
# less a KL penalty:
#
# $$\max_\pi\; \mathbb{E}_{y \sim \pi}[r(y)] - \beta\, \mathrm{KL}(\pi \,\|\, \pi_\text{ref})$$
#
# The maximiser is known: $\pi^*(y) = \pi_\text{ref}(y)\, e^{r(y)/\beta} / Z$. So we can see
# whether PPO finds it.

# %%
import torch
from rlhf import (
    adamw,
    cosine_schedule,
    make_experience,
    ppo_policy_loss,
    random,
    sample_token,
    token_log_probs,
)
from rlhf.estimators import AdvantageEstimate, Estimator

REWARDS = torch.tensor([0.0, 1.0, 0.6, -0.7, 0.3])
REFERENCE = torch.tensor([0.5, -1.0, 0.8, 0.0, -0.3])  # logits
BETA = 0.5

reference = REFERENCE.softmax(0)
optimum = reference * torch.exp(REWARDS / BETA)
optimum = optimum / optimum.sum()
print("reference", reference.numpy().round(3))
print("optimum  ", optimum.numpy().round(3))

# %% [markdown]
# With one token there is nothing to bootstrap from, so no critic is needed. The advantage is
# the return less the mean of the batch. An estimator is one function in a record.


# %%
def less_the_mean(completions):
    returns = completions.rewards.sum(dim=-1, keepdim=True)
    return AdvantageEstimate(returns - returns.mean())


ESTIMATOR = Estimator("less-the-mean", less_the_mean, needs_critic=False)

# %% [markdown]
# The rest is the loop of PPO: sample, score, turn scores and KL into advantages, and take a
# few steps on the same batch.

# %%
BATCH, ITERATIONS, EPOCHS = 1024, 60, 4
params = {"logits": REFERENCE.clone()}
optimizer = adamw(cosine_schedule(0.1, ITERATIONS * EPOCHS), b2=0.99)
state, distances = optimizer.init(params), []


def log_prob(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return token_log_probs(logits.expand(len(tokens), -1), tokens).unsqueeze(
        -1
    )  # [batch, 1 token]


def loss(params, tokens, old_log_probs, advantages, mask):
    constants = {"old_log_probs": old_log_probs, "advantages": advantages, "mask": mask}
    return ppo_policy_loss(log_prob(params["logits"], tokens), **constants)[0] / mask.sum()


mask = torch.ones(BATCH, 1, dtype=torch.bool)
for iteration in range(ITERATIONS):
    uniforms = random.uniform(random.fold_in(random.key(0), iteration), (BATCH,))
    tokens = sample_token(params["logits"].expand(BATCH, -1), uniforms)
    old = log_prob(params["logits"], tokens)
    experience = make_experience(
        REWARDS[tokens], old, log_prob(REFERENCE, tokens), None, mask,
        kl_coef=BETA, estimator=ESTIMATOR, whiten_advantages=False,
    )  # fmt: skip
    for _ in range(EPOCHS):
        grads = torch.func.grad(loss)(params, tokens, old, experience.advantages, mask)
        params, state = optimizer.update(grads, state, params)
    distances.append(float((params["logits"].softmax(0) - optimum).abs().sum() / 2))

print("optimum  ", optimum.numpy().round(3))
print("PPO      ", params["logits"].softmax(0).numpy().round(3))
print(
    f"total variation distance: {distances[0]:.3f} after one iteration, {distances[-1]:.3f} at the end"
)
assert distances[-1] < 0.02

# %%
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(6, 3))
axes.semilogy(range(1, ITERATIONS + 1), distances)
axes.set(xlabel="iteration", ylabel="distance to the optimum")
figure.tight_layout()

# %% [markdown]
# The stages of `rlhf-train` are held to the same standard: `tests/test_gibbs.py` trains a real
# model with the real PPO stage, and checks that it ends at this distribution.
