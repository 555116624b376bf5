"""Tutorial 4: a PPO loop of one's own."""

# %% [markdown]
# # 4. A PPO loop of your own, in forty lines
#
# The stages of `rlhf-train` read files, log and resume. Research code often needs none of that. This loop trains a small
# GPT-2 with PPO, a KL penalty and a value head, to say token 7. All of it is on this page.

# %%
import torch

from rlhf import GPT2Config, adamw, apply_head, constant_schedule, gae, generate_completions, gpt2, init_value_head
from rlhf import join, kl_estimate, ppo_policy_loss, ppo_value_loss, random, token_log_probs, token_rewards, whiten

config = GPT2Config(vocab_size=16, n_positions=16, n_embd=32, n_layer=1, n_head=2)
params = {"policy": gpt2.init(config, key=random.key(0)), "value_head": init_value_head(config.n_embd)}
reference, optimizer = params, adamw(constant_schedule(3e-3))
state, prompts, lengths = optimizer.init(params), torch.arange(64)[:, None] % 16, torch.ones(64, dtype=torch.int64)

# %% [markdown]
# One forward pass gives log-probs and values. Position $t$ of `tokens[:, :-1]` predicts position $t$ of `tokens[:, 1:]`;
# `join` puts completions behind their prompts and returns the mask of the completions in that layout.


# %%
def evaluate(params, tokens):
    hidden = gpt2.hidden_states(params["policy"], tokens[:, :-1], config=config)
    logits = gpt2.logits(params["policy"], hidden, config=config)
    return token_log_probs(logits, tokens[:, 1:]), apply_head(params["value_head"], hidden)


def loss(params, tokens, mask, old_log_probs, old_values, advantages, returns):
    log_probs, values = evaluate(params, tokens)
    policy, _ = ppo_policy_loss(log_probs, old_log_probs=old_log_probs, advantages=advantages, mask=mask)
    value, _ = ppo_value_loss(values, old_values=old_values, returns=returns, mask=mask)
    return (policy + 0.1 * value) / mask.sum()


# %% [markdown]
# The loop samples completions, scores them, and makes four updates on them.

# %%
for iteration in range(15):
    keys = random.split(random.fold_in(random.key(1), iteration), len(prompts))
    out = generate_completions(params["policy"], prompts, lengths, keys, config=config, max_new_tokens=8)
    tokens, mask = join(prompts, lengths, out)
    (log_probs, values), (ref_log_probs, _), mask = evaluate(params, tokens), evaluate(reference, tokens), mask[:, 1:]
    scores = (out.tokens == 7).float().mean(dim=1)
    rewards = token_rewards(scores, kl_estimate(log_probs, ref_log_probs), mask, kl_coef=0.01)
    advantages, returns = gae(rewards, values, mask)
    for epoch in range(4):
        grads = torch.func.grad(loss)(params, tokens, mask, log_probs, values, whiten(advantages, mask), returns)
        params, state = optimizer.update(grads, state, params)
    if iteration % 2 == 0:
        print(f"iteration {iteration}: {scores.mean():.2f} of the tokens are 7")
assert scores.mean() > 0.5

# %% [markdown]
# ## Make it your own
#
# - **Another loss**: write a function of the same tensors, and call it in `loss`.
# - **Another advantage**: replace `gae`, or see [the next tutorial](t5_custom_parts.md) for an estimator that the
#   programs know, too.
# - **A pre-trained model**: `model = rlhf.load_model("path/to/gpt2")` has `params`, `config` and `tokenizer`.
# - **Prompts of unequal length**: pad them on the right, and give their lengths.
