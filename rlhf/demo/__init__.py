"""The demonstration that `rlhf-example` runs."""
