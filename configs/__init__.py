"""YAML presets, read by `rlhf.io.presets`."""
