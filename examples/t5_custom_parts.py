"""Tutorial 5: a reward, a judge, an estimator and a loss of one's own."""

# %% [markdown]
# # 5. A custom reward, judge, estimator and loss
#
# Nothing here needs a fork of `rlhf`. Rewards and judges are Python functions in a file.
# Estimators are one record. Losses are functions.
#
# First, a small language model to start from: eighty steps of supervised fine-tuning on the
# embedded example.

# %%
import json
from pathlib import Path

import rlhf
import torch
from rlhf.config import LogConfig, ModelConfig, PPOConfig, PPORun, SFTConfig, SFTRun

SMALL = {"threads": 1, "log": LogConfig(tensorboard=False)}
sft = rlhf.train.run(
    SFTRun(
        output_dir="outputs/sft",
        sft=SFTConfig(max_steps=80, learning_rate=3e-3, max_length=64),
        model=ModelConfig(preset="tiny"),
        **SMALL,
    )
)
print(sft.model)

# %% [markdown]
# ## A reward
#
# A reward function gets the prompts, the completions and, by name, the other columns of the
# prompt file. It returns one number for each completion.

# %%
Path("my_rewards.py").write_text("""
def brevity(prompts: list[str], completions: list[str], **columns: list) -> list[float]:
    return [-len(completion) / 10 for completion in completions]


def on_topic(prompts, completions, topic, **columns):
    return [float(word in completion) for word, completion in zip(topic, completions)]


def shorter(prompts: list[str], first: list[str], second: list[str], **columns: list) -> list[float]:
    return [0.5 * (1 + (len(a) < len(b)) - (len(a) > len(b))) for a, b in zip(first, second)]
""")
records = [
    {"prompt": f"Customer: My {item} arrived broken.\nAgent:", "topic": item}
    for item in ("lamp", "tent", "mug", "desk")
]
Path("prompts.json").write_text(json.dumps(records))

# %% [markdown]
# `--ppo.reward` names sources, with weights. A source of weight 0 is logged and never
# optimised, which shows whether a rising reward is real:
#
# ```sh
# rlhf-train ppo --prompt-data prompts.json --ppo.model-path outputs/sft/sft --ppo.reward my_rewards.py:brevity '0*my_rewards.py:on_topic'
# ```

# %%
ppo = PPOConfig(
    model_path="outputs/sft/sft",
    reward=("my_rewards.py:brevity", "0*my_rewards.py:on_topic"),
    num_iterations=8,
    batch_size=32,
    learning_rate=1e-3,
)
rlhf.train.run(
    PPORun(output_dir="outputs/brief", prompt_data="prompts.json", ppo=ppo, **SMALL)
)
metrics = rlhf.load_run("outputs/brief").metrics["ppo"]
for name in ("objective/scores", "gold/on_topic", "response_length/mean"):
    print(name, metrics[name].values.round(2))

# %% [markdown]
# ## A judge
#
# A judge for `rlhf-evaluate` is a scorer with the signature of a reward function, or compares
# two completions, as `shorter` does in the file above. That one is asked in both orders, so
# that a bias towards a position cancels.
#
# ```sh
# rlhf-evaluate --model-dir outputs/brief/policy --against outputs/sft/sft --test-data prompts.json --judge my_rewards.py:shorter
# ```

# %%
from rlhf.evaluate.evaluate_config import EvaluateConfig
from rlhf.evaluate.evaluation import run_evaluation

run_evaluation(
    EvaluateConfig(
        model_dir=Path("outputs/brief/policy"),
        against=Path("outputs/sft/sft"),
        eval_type="policy",
        test_data=(Path("prompts.json"),),
        judge=("my_rewards.py:shorter",),
        decoding=("sampled",),
        samples=8,
        threads=1,
    )
)
report = json.loads(Path("outputs/brief/policy/report/evaluation.json").read_text())
figures = report["evaluations"][0]["figures"]
win_rate, length = (
    figures["wins"]["eval/win_rate/shorter"],
    figures["policy"]["eval/response_length/mean"],
)
print(
    f"win rate by length: {win_rate['value']:.2f}, 95% interval {win_rate['low']:.2f} to {win_rate['high']:.2f}"
)
print(f"mean length: {length['value']:.1f} tokens")

# %% [markdown]
# ## An estimator
#
# An estimator turns rewarded completions into advantages. This one subtracts the mean return
# of the same prompt's completions. `register_estimator` makes its name known to
# `--ppo.estimator`.

# %%
from rlhf.estimators import (
    AdvantageEstimate,
    Estimator,
    RewardedCompletions,
    register_estimator,
)


def less_the_group_mean(completions: RewardedCompletions) -> AdvantageEstimate:
    returns = completions.rewards.sum(dim=-1)
    same = (completions.groups[:, None] == completions.groups).float()
    centred = returns - same @ returns / same.sum(dim=1)
    return AdvantageEstimate(centred.unsqueeze(-1).expand(completions.mask.shape))


register_estimator(Estimator("group-mean", less_the_group_mean, needs_critic=False))

ppo = PPOConfig(
    model_path="outputs/sft/sft",
    reward=("my_rewards.py:brevity",),
    estimator="group-mean",
    critic="none",
    num_iterations=8,
    batch_size=8,
    samples_per_prompt=4,
    learning_rate=1e-3,
)
rlhf.train.run(
    PPORun(output_dir="outputs/group", prompt_data="prompts.json", ppo=ppo, **SMALL)
)
print(rlhf.load_run("outputs/group").metrics["ppo"]["objective/scores"].values.round(2))

# %% [markdown]
# The critic follows the estimator, so `--ppo.critic none` is not needed. On the command line,
# `--ppo.estimator FILE:FUNCTION` takes such a function from a file. For registered names, a
# `train.py` of three lines is `rlhf-train` with your additions; see
# [Add your own](../add_your_own.md#your-train-py).
#
# ## A loss
#
# A loss is a function of tensors. Return a sum over the entries that count and the sums of the
# metrics, and any batch can be split. This one clips the ratio of whole sequences instead of
# tokens (GSPO, Zheng et al. 2025, https://arxiv.org/abs/2507.18071).

# %%
from rlhf import masked_sum


def sequence_loss(log_probs, *, old_log_probs, advantages, mask, clip_eps=0.2):
    lengths = mask.sum(dim=-1).clamp(min=1)
    log_ratio = (
        torch.where(mask, log_probs - old_log_probs.detach(), 0.0).sum(dim=-1) / lengths
    )
    ratio, counts = log_ratio.exp(), mask.any(dim=-1)
    surrogate = torch.minimum(
        ratio * advantages, ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages
    )
    loss = -masked_sum(surrogate, counts)
    return loss, {"loss/policy_avg_sum": loss.detach(), "count": counts.sum()}


log_probs = torch.tensor([[-1.0, -2.0, 0.0], [-3.0, -1.0, -2.0]])
mask = torch.tensor([[True, True, False], [True, True, True]])
advantages = torch.tensor([1.0, -0.5])
loss, sums = sequence_loss(
    log_probs, old_log_probs=log_probs, advantages=advantages, mask=mask
)
print(loss / sums["count"])
print(
    torch.func.grad(
        lambda x: sequence_loss(x, old_log_probs=log_probs, advantages=advantages, mask=mask)[
            0
        ]
    )(log_probs)
)

# %% [markdown]
# Put it in the `loss` of [your own loop](t4_ppo_loop.md). A run takes a loss by
# `--ppo.loss FILE:FUNCTION`. It passes flat tensors, and `sequences` to tell completions apart;
# `--ppo.loss gspo` is this loss in that form. The laws that a loss of this library
# passes, and the tests to copy, are in [Add your own](../add_your_own.md#a-loss).
