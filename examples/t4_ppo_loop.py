"""Tutorial 4: a PPO loop of one's own."""

# %% [markdown]
# # 4. A PPO loop of your own, in forty lines
#
# The stages of `rlhf-train` read files, log and resume. Research code often needs none of
# that. This loop trains a small GPT-2 with PPO, a KL penalty and a value head, to say token 7.
# All of it is on this page.

# %%
import torch

from rlhf import (  # isort: skip
    GPT2Config, adamw, apply_head, constant_schedule, gae, generate_completions, gpt2,
    init_value_head, join, kl_estimate, ppo_policy_loss, ppo_value_loss, random,
    token_log_probs, token_rewards, whiten,
)  # fmt: skip

config = GPT2Config(vocab_size=16, n_positions=16, n_embd=32, n_layer=1, n_head=2)
policy, value_head = gpt2.init(config, key=random.key(0)), init_value_head(config.n_embd)
params = {"policy": policy, "value_head": value_head}
reference = params
optimizer = adamw(constant_schedule(3e-3))
state = optimizer.init(params)
prompts = torch.arange(64)[:, None] % 16  # 64 prompts of one token
lengths = torch.ones(64, dtype=torch.int64)

# %% [markdown]
# One forward pass gives log-probs and values. Position $t$ of `tokens[:, :-1]` predicts
# position $t$ of `tokens[:, 1:]`; `join` puts completions behind their prompts and returns the
# mask of the completions in that layout.


# %%
def evaluate(params, tokens):
    hidden = gpt2.hidden_states(params["policy"], tokens[:, :-1], config=config)
    logits = gpt2.logits(params["policy"], hidden, config=config)
    return token_log_probs(logits, tokens[:, 1:]), apply_head(params["value_head"], hidden)


def loss(params, tokens, mask, old_log_probs, old_values, advantages, returns):
    log_probs, values = evaluate(params, tokens)
    constants = {"old_log_probs": old_log_probs, "advantages": advantages, "mask": mask}
    policy_loss, _ = ppo_policy_loss(log_probs, **constants)
    value_loss, _ = ppo_value_loss(values, old_values=old_values, returns=returns, mask=mask)
    return (policy_loss + 0.1 * value_loss) / mask.sum()


# %% [markdown]
# The loop samples completions, scores them, and makes four updates on them.

# %%
for iteration in range(15):
    keys = random.split(random.fold_in(random.key(1), iteration), len(prompts))
    sampling = {"config": config, "max_new_tokens": 8}
    out = generate_completions(params["policy"], prompts, lengths, keys, **sampling)
    tokens, mask = join(prompts, lengths, out)
    mask = mask[:, 1:]

    log_probs, values = evaluate(params, tokens)
    ref_log_probs, _ = evaluate(reference, tokens)
    scores = (out.tokens == 7).float().mean(dim=1)
    kl = kl_estimate(log_probs, ref_log_probs)
    rewards = token_rewards(scores, kl, mask, kl_coef=0.01)
    advantages, returns = gae(rewards, values, mask)
    batch = (tokens, mask, log_probs, values, whiten(advantages, mask), returns)

    for _ in range(4):
        grads = torch.func.grad(loss)(params, *batch)
        params, state = optimizer.update(grads, state, params)
    if iteration % 2 == 0:
        print(f"iteration {iteration}: {scores.mean():.2f} of the tokens are 7")

# %%
assert scores.mean() > 0.5

# %% [markdown]
# ## Make it your own
#
# - **Another loss**: write a function of the same tensors, and call it in `loss`.
# - **Another advantage**: replace `gae`, or see [the next tutorial](t5_custom_parts.md) for an
#   estimator that the   programs know, too.
# - **A pre-trained model**: `model = rlhf.load_model("path/to/gpt2")` has `params`, `config`
#   and `tokenizer`.
# - **Prompts of unequal length**: pad them on the right, and give their lengths.
