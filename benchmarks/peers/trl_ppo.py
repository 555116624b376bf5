"""Iterations of TRL's PPOTrainer, in the last release that has one.

A round is one turn of the trainer's loop, held in `on_step_end`. No evaluation completions, no saving, no reports.
`gradient_accumulation_steps` would make one update of four minibatches, so a whole batch is one device's and is cut by
`num_mini_batches`: as many updates as on our side, which is checked.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer

from benchmarks import material
from benchmarks.session import Session


class Hold(TrainerCallback):
    """Answers after every iteration and holds the loop until the next may begin."""

    def __init__(self, session: Session, work: material.Size) -> None:
        """One iteration is a round."""
        self._session, self._work = session, work
        self.updates = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Wait for the first round."""
        self._session.ready(parameters=self._work.shape.parameters)
        self._go_on()

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Answer when the iteration is over."""
        work = self._work.ppo
        assert self.updates == work.updates, self.updates
        self.updates = 0
        self._session.answer(tokens=work.completions * (work.prompt + work.completion))
        self._go_on()

    def count(self, *_: Any) -> None:
        """Called after every update."""
        self.updates += 1

    def _go_on(self) -> None:
        if not self._session.wait():
            raise SystemExit(0)


def run(
    session: Session, *, model: str, reward: str, prompts_file: str, size: str, device: str, precision: str = "fp32"
) -> None:
    """Iterations with a separate critic that starts from the reward model.

    Args:
        session: asks for the rounds.
        model: folder of policy and reference.
        reward: folder of the reward model.
        prompts_file: records with `ids`.
        size: of `material.SIZES`.
        device: cpu or cuda.
        precision: fp32, or bf16 under autocast with fp32 weights.
    """
    work = material.SIZES[size]
    prompts, epochs, minibatch, completion = work.ppo.prompts, work.ppo.epochs, work.ppo.minibatch, work.ppo.completion
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    tokenizer.add_special_tokens({"pad_token": "<|never drawn|>"})  # the trainer takes every pad token for an end
    ids = [record["ids"] for record in json.loads(Path(prompts_file).read_text())]

    def policy() -> Any:
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    def scorer() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(reward, dtype=torch.float32)

    hold = Hold(session, work)
    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            output_dir=folder,
            per_device_train_batch_size=prompts,
            gradient_accumulation_steps=1,
            num_mini_batches=prompts // minibatch,
            num_ppo_epochs=epochs,
            total_episodes=1_000_000 * prompts,
            local_rollout_forward_batch_size=prompts,
            response_length=completion,
            temperature=1.0,
            num_sample_generations=0,
            learning_rate=3e-6,
            bf16=precision == "bf16",
            gradient_checkpointing=False,
            use_cpu=device == "cpu",
            logging_strategy="no",
            save_strategy="no",
            eval_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = PPOTrainer(
            args=config,
            processing_class=tokenizer,
            model=policy(),
            ref_model=policy(),
            reward_model=scorer(),
            value_model=scorer(),
            train_dataset=Dataset.from_dict({"input_ids": ids}),
            eval_dataset=Dataset.from_dict({"input_ids": ids[:1]}),
            callbacks=[hold],
        )
        trainer.optimizer.optimizer.register_step_post_hook(hold.count)
        trainer.train()
