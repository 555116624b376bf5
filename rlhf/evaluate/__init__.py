"""Evaluation of models on held-out data and by judges."""
