"""Execution of the pure functions of a stage: the executor interface, its in-process form, and compiled code."""
