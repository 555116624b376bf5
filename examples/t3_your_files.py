"""Tutorial 3: the whole pipeline on JSON files of one's own."""

# %% [markdown]
# # 3. The pipeline on your own files
#
# The pipeline reads three JSON files: demonstrations, preference pairs and prompts. Here we
# make up small ones. The task is to answer a greeting politely.

# %%
import json
from pathlib import Path

NAMES = ["Ada", "Alan", "Barbara", "Edsger", "Grace", "John", "Kurt", "Leslie"]
GOOD = ["Good morning, {name}. How may I help you?", "Hello {name}, it is nice to see you."]
BAD = ["What do you want, {name}?", "Go away."]

demonstrations = [
    {"prompt": f"{name} says hello.", "completion": " " + reply.format(name=name)}
    for name in NAMES
    for reply in (*GOOD, *BAD)
]
preferences = [
    {
        "prompt": f"{name} says hello.",
        "chosen": " " + good.format(name=name),
        "rejected": " " + bad.format(name=name),
    }
    for name in NAMES
    for good in GOOD
    for bad in BAD
]
prompts = [{"prompt": f"{name} says hello."} for name in NAMES]
for name, records in {
    "demonstrations": demonstrations,
    "preferences": preferences,
    "prompts": prompts,
}.items():
    Path(f"{name}.json").write_text(json.dumps(records))
print(json.dumps(preferences[0], indent=1))

# %% [markdown]
# In a terminal, one command trains the three stages:
#
# ```sh
# rlhf-train pipeline --sft-data demonstrations.json --preference-data preferences.json --prompt-data prompts.json
# ```
#
# From Python, the same settings are typed dataclasses. The model below is tiny, so that this
# page builds in seconds.

# %%
import rlhf
from rlhf.config import (
    LogConfig,
    ModelConfig,
    PipelineRun,
    PPOConfig,
    RewardConfig,
    SFTConfig,
    TokenizerConfig,
)

config = PipelineRun(
    sft_data="demonstrations.json",
    preference_data="preferences.json",
    prompt_data="prompts.json",
    output_dir="outputs/polite",
    threads=1,
    model=ModelConfig(preset="tiny"),
    tokenizer=TokenizerConfig(vocab_size=320),
    sft=SFTConfig(epochs=60, batch_size=8, learning_rate=3e-3, val_fraction=0.1),
    reward=RewardConfig(epochs=10, batch_size=8, learning_rate=1e-3, val_fraction=0.1),
    ppo=PPOConfig(
        num_iterations=12,
        batch_size=64,
        learning_rate=5e-4,
        kl_coef=0.1,
        num_epochs=2,
        max_new_tokens=24,
    ),
    log=LogConfig(tensorboard=False),
)


def show(stage, step, metrics):
    if stage == "ppo" and step % 3 == 0:
        print(
            f"iteration {step}: score {metrics['objective/scores']:+.2f}, KL {metrics['objective/kl']:.1f} nats"
        )


result = rlhf.train.run(config, callback=show)
print(result.model)

# %% [markdown]
# ## What is in the folder
#
# Every stage leaves a model folder in Hugging Face's form, a log and checkpoints.

# %%
for path in sorted(Path("outputs/polite").glob("*")):
    print(path)

# %% [markdown]
# `rlhf.load_run` reads the log. `rlhf-monitor --log-dir outputs/polite/logs` shows it in the
# terminal, and with `--serve` in the browser.

# %%
run = rlhf.load_run("outputs/polite")
print("stages:", list(run.metrics))
print(
    "held-out pairs ordered rightly:", run.metrics["reward"]["eval/reward/accuracy"].values[-1]
)
print("first and last score:", run.metrics["ppo"]["objective/scores"].values[[0, -1]].round(2))
print("the best completion of the last iteration:")
last = [sample for sample in run.samples if sample["step"] == 12]
best = max(last, key=lambda sample: sample["score"])
print(best["prompt"], "->", best["completion"])

# %% [markdown]
# ## Try the model
#
# `rlhf-generate --model-dir outputs/polite/policy` asks for prompts. In Python, a model is its
# parameters, its shape and its tokenizer.

# %%
import torch

for stage in ("sft", "policy"):
    model = rlhf.load_model(f"outputs/polite/{stage}")
    tokens = torch.tensor(model.tokenizer.encode(["Grace says hello."]))
    out = rlhf.generate_completions(
        model.params,
        tokens,
        torch.tensor([tokens.shape[1]]),
        rlhf.random.split(rlhf.random.key(0), 1),
        config=model.config,
        max_new_tokens=24,
        top_k=1,  # the most likely token, each time
        stop_tokens=[model.tokenizer.eos_id],
    )
    print(f"{stage:>6}:{model.tokenizer.decode(out.tokens[0][out.mask[0]].tolist())}")

# %% [markdown]
# Is it working? `rlhf-monitor --log-dir outputs/polite/logs --check` goes through the [health
# checks](../is_it_working.md). With so few records and a tiny model, some of them will rightly
# complain.
