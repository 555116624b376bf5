"""The demonstration behind `rlhf-example`."""
