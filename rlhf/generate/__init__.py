"""Completion of prompts by a model."""
