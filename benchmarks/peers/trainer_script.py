"""SFT as a script around transformers' Trainer: what one writes without this library. Ends after its first step."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


class FirstStep(TrainerCallback):
    """Leaves a file behind after the first step."""

    def __init__(self, folder: Path) -> None:
        """Where to."""
        self._folder = folder

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Say so and stop."""
        (self._folder / "first step").touch()
        control.should_training_stop = True


def main(settings: dict[str, Any]) -> None:
    """Read the file, tokenise it, train.

    Args:
        settings: folders `model` and `output`, file `data`, `rows` of a batch, `device`, `threads`.
    """
    torch.set_num_threads(settings["threads"])
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    text = Path(settings["data"]).read_text(encoding="utf-8")
    records = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    texts = [record["prompt"] + record["completion"] + tokenizer.eos_token for record in records]
    encoded = tokenizer(texts, truncation=True, max_length=model.config.max_position_embeddings)["input_ids"]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=settings["output"],
            per_device_train_batch_size=settings["rows"],
            use_cpu=settings["device"] == "cpu",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        train_dataset=[{"input_ids": ids} for ids in encoded],
        callbacks=[FirstStep(Path(settings["output"]))],
    )
    trainer.train()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
