"""The execution of a stage's pure functions: the executor interface, its in-process form, and compiled code."""
