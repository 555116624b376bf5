"""TRL's side of `benchmarks.learning`: PPO in the last release that has it, RLOO and DPO in the newest.

A round is one turn of the trainer's loop, held at the end of a step. The policy is saved at so many points on the way.
Settings have the same names and values on our side.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from transformers.modeling_outputs import BaseModelOutput

from benchmarks import material
from benchmarks.session import Session


class Hold(TrainerCallback):
    """Answers after every step, holds the loop until the next may begin, and saves the policy at its points."""

    def __init__(self, session: Session, output: str, model: str, steps: int, points: int) -> None:
        """One step is a round."""
        self._session, self._output, self._start = session, Path(output), Path(model)
        self._steps, self._every = steps, steps // points

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Wait for the first round."""
        self._session.ready()
        self._go_on()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        """Save where a point is due, then answer."""
        self._session.answer()
        step = state.global_step
        if step % self._every == 0:
            folder = self._output / f"point-{step}"
            getattr(model, "policy", model).save_pretrained(folder)
            for path in self._start.glob("tokenizer*"):
                shutil.copy(path, folder)
        if step < self._steps:
            self._go_on()

    def _go_on(self) -> None:
        if not self._session.wait():
            raise SystemExit(0)


class Reward(nn.Module):
    """The reward function as the model that TRL's PPOTrainer asks for: its hidden states are the tokens."""

    base_model_prefix = "model"

    def __init__(self, tokenizer: Any) -> None:
        """Texts are read behind the prompt's last words."""
        super().__init__()
        self.model, self._tokenizer = Tokens(), tokenizer

    def score(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, T, 1] tokens to as many scores, of which one row's are equal."""
        texts = self._tokenizer.batch_decode(tokens[..., 0], skip_special_tokens=True)
        completions = [text.partition("Agent:")[2] for text in texts]
        scores = torch.tensor(material.kindness([], completions))
        return scores[:, None, None].expand(tokens.shape)


class Tokens(nn.Module):
    """A backbone that returns its input."""

    def forward(self, input_ids: torch.Tensor, **rest: Any) -> BaseModelOutput:
        """[B, T] to hidden states [B, T, 1]."""
        return BaseModelOutput(hidden_states=(input_ids.unsqueeze(-1),))


def ppo(
    session: Session, *, output: str, model: str, prompts: str, seed: int, points: int, device: str, **s: Any
) -> None:
    """PPO with a separate critic: the SFT model's trunk, and a head that starts at 0.

    Args:
        session: asks for the rounds.
        output: folder of the points.
        model: folder of policy and reference.
        prompts: file of records with `prompt`.
        seed: of the order of prompts and of sampling.
        points: policies to save, evenly over the steps.
        device: cpu.
        s: settings of `benchmarks.learning.SETTINGS`.
    """
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    tokenizer.add_special_tokens({"pad_token": "<|never drawn|>"})  # the trainer takes every pad token for an end
    ids = tokenizer([record["prompt"] for record in material.records(prompts)])["input_ids"]
    value = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
    nn.init.zeros_(value.score.weight)
    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            per_device_train_batch_size=s["prompts_per_step"],
            gradient_accumulation_steps=1,
            num_mini_batches=s["prompts_per_step"] // s["minibatch"],
            num_ppo_epochs=s["epochs"],
            total_episodes=s["steps"] * s["prompts_per_step"],
            local_rollout_forward_batch_size=s["prompts_per_step"],
            response_length=s["max_new_tokens"],
            stop_token="eos",
            temperature=1.0,
            num_sample_generations=0,
            missing_eos_penalty=None,
            kl_coef=s["kl_coef"],
            cliprange=s["clip_eps"],
            lam=s["lam"],
            vf_coef=s["value_coef"],
            eval_strategy="no",
            **_common(folder, seed, s),
        )
        trainer = PPOTrainer(
            args=config,
            processing_class=tokenizer,
            model=_load(model),
            ref_model=_load(model),
            reward_model=Reward(tokenizer),
            value_model=value,
            train_dataset=Dataset.from_dict({"input_ids": ids}),
            eval_dataset=Dataset.from_dict({"input_ids": ids[:1]}),
            callbacks=[Hold(session, output, model, s["steps"], points)],
        )
        trainer.train()


def rloo(
    session: Session, *, output: str, model: str, prompts: str, seed: int, points: int, device: str, **s: Any
) -> None:
    """RLOO with one update for each batch of completions; arguments as `ppo`."""
    from trl import RLOOConfig, RLOOTrainer

    completions = s["prompts_per_step"] * s["samples_per_prompt"]
    with tempfile.TemporaryDirectory() as folder:
        trainer = RLOOTrainer(
            model=_load(model),
            reward_funcs=material.kindness,
            args=RLOOConfig(
                per_device_train_batch_size=completions,
                gradient_accumulation_steps=1,
                num_generations=s["samples_per_prompt"],
                num_iterations=s["epochs"],
                max_completion_length=s["max_new_tokens"],
                temperature=1.0,
                beta=s["kl_coef"],
                epsilon=s["clip_eps"],
                max_steps=s["steps"],
                max_grad_norm=0.0,
                disable_dropout=True,
                **_common(folder, seed, s),
            ),
            train_dataset=Dataset.from_list([{"prompt": record["prompt"]} for record in material.records(prompts)]),
            processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
            callbacks=[Hold(session, output, model, s["steps"], points)],
        )
        trainer.train()


def dpo(
    session: Session, *, output: str, model: str, pairs: str, seed: int, points: int, device: str, **s: Any
) -> None:
    """DPO on preference pairs, with the reference's log-probs computed before the first step; arguments as `ppo`.

    The pairs lie in the order in which our side reads them.
    The trainer ends every completion by the end-of-text token as text, which the tokenizer must read as the token.
    """
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(model, split_special_tokens=False)
    assert tokenizer(tokenizer.eos_token)["input_ids"] == [tokenizer.eos_token_id]

    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model=_load(model),
            args=DPOConfig(
                per_device_train_batch_size=s["pairs_per_step"],
                gradient_accumulation_steps=1,
                beta=s["beta"],
                max_steps=s["steps"],
                max_grad_norm=s["max_grad_norm"],
                precompute_ref_log_probs=True,
                train_sampling_strategy="sequential",
                dataloader_pin_memory=False,
                **_common(folder, seed, s),
            ),
            train_dataset=Dataset.from_list(material.records(pairs)),
            processing_class=tokenizer,
            callbacks=[Hold(session, output, model, s["steps"], points)],
        )
        trainer.train()


def _load(model: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def _common(folder: str, seed: int, s: dict[str, Any]) -> dict[str, Any]:
    """What every trainer is told: AdamW at a constant rate without decay, nothing written."""
    return {
        "output_dir": folder,
        "seed": seed,
        "learning_rate": s["learning_rate"],
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "adam_epsilon": s["adam_eps"],
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
