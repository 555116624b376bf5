"""Optimiser steps of the trainers of TRL's newest release: SFT, reward model, DPO and RLOO.

A round is a number of whole turns of the trainer's own loop: loading and collating a batch (in RLOO, generating and
scoring it), forward, backward, clipping, update. The loop is held at the end of a step until the next round is asked
for. Saving, evaluation and logging are off, checkpointed activations too.
"""

import functools
import tempfile
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl import (
    DPOConfig,
    DPOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from benchmarks import material
from benchmarks.session import Session


class Hold(TrainerCallback):
    """Answers after every so many steps and holds the loop until it may go on."""

    def __init__(self, session: Session, steps: int) -> None:
        """Rounds of `steps` steps."""
        self._session, self._steps, self._done = session, steps, 0
        self.tokens = 0
        self.loss: torch.Tensor | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        """Wait for the first round."""
        self._session.ready(parameters=sum(parameter.numel() for parameter in model.parameters()))
        self._go_on()

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Answer when the round's last step is done."""
        self._done += 1
        if self._done % self._steps == 0:
            self._session.answer(tokens=self.tokens, loss=None if self.loss is None else float(self.loss))
            self.tokens = 0
            self._go_on()

    def _go_on(self) -> None:
        if not self._session.wait():
            raise SystemExit(0)


def sft(
    session: Session,
    *,
    model: str,
    size: str,
    device: str,
    varied: bool,
    precision: str = "fp32",
    compiled: bool = False,
    rows: int = 0,
    parts: int = 1,
    **layout: Any,
) -> None:
    """Steps on demonstrations, loss on every token.

    Args:
        session: asks for the rounds.
        model: folder.
        size: of `material.SIZES`.
        device: cpu or cuda.
        varied: lengths that vary instead of full sequences.
        precision: fp32, or bf16 under autocast with fp32 weights.
        compiled: `torch_compile`.
        rows: of a batch; 0 is the number of sequences in a step.
        parts: forward and backward passes that a batch is cut into, as evenly as that goes.
        layout: further fields of `SFTConfig`, such as packing.
    """
    work = material.SIZES[size]
    count, longest = work.sft
    data = Dataset.from_dict({"input_ids": material.demonstrations(work, varied)})
    hold = Hold(session, work.steps)
    rows = rows or count
    parts = min(parts, rows)
    arguments = _common(device, precision, compiled, round(rows / parts)) | {"max_length": longest, "loss_type": "nll"}
    arguments |= {"completion_only_loss": False, "gradient_accumulation_steps": parts} | layout
    trainer = _counting(SFTTrainer, hold, lambda inputs: int((inputs["input_ids"] >= material.FIRST_TOKEN).sum()))
    _train(trainer, SFTConfig, hold, _policy(model), data, AutoTokenizer.from_pretrained(model), arguments)


def reward(
    session: Session, *, model: str, size: str, device: str, precision: str = "fp32", compiled: bool = False
) -> None:
    """Steps on preference pairs; arguments as `sft`, `model` is a reward model's folder."""
    work = material.SIZES[size]
    count, longest = work.pairs
    chosen, rejected = zip(*material.preferences(work), strict=True)
    data = Dataset.from_dict({"chosen_ids": list(chosen), "rejected_ids": list(rejected)})
    network = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32)
    hold = Hold(session, work.steps)
    trainer = _counting(RewardTrainer, hold, lambda inputs: int(inputs["attention_mask"].sum()))
    arguments = _common(device, precision, compiled, count)
    arguments |= {"max_length": longest, "center_rewards_coefficient": 0.01}
    _train(trainer, RewardConfig, hold, network, data, AutoTokenizer.from_pretrained(model), arguments)


def dpo(
    session: Session, *, model: str, size: str, device: str, precision: str = "fp32", compiled: bool = False
) -> None:
    """Steps on preference pairs, with the reference's log-probs computed before the first; arguments as `sft`."""
    work = material.SIZES[size]
    count, longest = work.pairs
    shared = material.pair_prompt(work)
    pairs = material.preferences(work)[: material.DPO_BATCHES * count]
    data = Dataset.from_dict(
        {
            "prompt_ids": [chosen[:shared] for chosen, _ in pairs],
            "chosen_ids": [chosen[shared:] for chosen, _ in pairs],
            "rejected_ids": [rejected[shared:] for _, rejected in pairs],
        }
    )
    hold = Hold(session, work.steps)

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
            return dataset

    trainer = _counting(Tokenised, hold, lambda inputs: int(inputs["attention_mask"].sum()))
    arguments = _common(device, precision, compiled, count)
    arguments |= {"max_length": longest, "precompute_ref_log_probs": True}
    _train(trainer, DPOConfig, hold, _policy(model), data, AutoTokenizer.from_pretrained(model), arguments)


def rloo(
    session: Session,
    *,
    model: str,
    prompts_file: str,
    size: str,
    device: str,
    iteration: list[int],
    precision: str = "fp32",
) -> None:
    """Iterations of one update each, on completions that all run to the end.

    Args:
        session: asks for the rounds.
        model: folder of policy and reference.
        prompts_file: records with `prompt`.
        size: of `material.SIZES`.
        device: cpu or cuda.
        iteration: of `material.Iteration`.
        precision: fp32, or bf16 under autocast with fp32 weights.
    """
    work = material.Iteration(*iteration)
    assert (work.epochs, work.minibatch) == (1, work.completions)
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    never = {"pad_token": "<|never drawn|>", "eos_token": "<|never drawn|>"}  # an end would be masked
    tokenizer.add_special_tokens(never)
    prompts = Dataset.from_list([{"prompt": record["prompt"]} for record in material.records(prompts_file)])
    network = _policy(model)
    network.generation_config.eos_token_id = None
    hold = Hold(session, 1)

    class Counting(RLOOTrainer):
        def _prepare_inputs(self, generation_batch: Any) -> Any:
            inputs = super()._prepare_inputs(generation_batch)
            hold.tokens += int(inputs["prompt_mask"].sum() + inputs["completion_mask"].sum())
            return inputs

    trainer = functools.partial(Counting, reward_funcs=material.kindness)
    arguments = _common(device, precision, False, work.minibatch) | {
        "num_generations": work.samples,
        "max_completion_length": work.completion,
        "temperature": 1.0,
        "beta": 0.2,
        "learning_rate": 3e-6,
    }
    del arguments["train_sampling_strategy"]
    _train(trainer, RLOOConfig, hold, network, prompts, tokenizer, arguments)


def _policy(model: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def _train(
    trainer: Any, config: Any, hold: Hold, network: Any, data: Dataset, tokenizer: Any, arguments: dict[str, Any]
) -> None:
    """Train until the session ends."""
    with tempfile.TemporaryDirectory() as folder:
        trainer(
            model=network,
            args=config(output_dir=folder, **arguments),
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[hold],
        ).train()


def _common(device: str, precision: str, compiled: bool, rows: int) -> dict[str, Any]:
    """What our side has too: AdamW at a constant rate, gradients clipped to 1, nothing written."""
    return {
        "per_device_train_batch_size": rows,
        "max_steps": 1_000_000,
        "train_sampling_strategy": "sequential",
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "bf16": precision == "bf16",
        "torch_compile": compiled,
        "gradient_checkpointing": False,
        "use_cpu": device == "cpu",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": device == "cuda",
    }


def _counting(trainer: Any, hold: Hold, count: Any) -> Any:
    """The trainer, counting useful tokens and keeping the last loss: a sum, where it divides by a number of tokens."""

    class Counting(trainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
            hold.tokens += count(inputs)
            loss = super().training_step(model, inputs, num_items_in_batch)
            hold.loss = loss.detach() * (1 if num_items_in_batch is None else num_items_in_batch)
            return loss

    return Counting
