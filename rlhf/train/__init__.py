"""Training: the loop, the stages and the pipeline."""
