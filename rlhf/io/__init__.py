"""Files: model folders, checkpoints, tokenizer, logs, configuration."""
