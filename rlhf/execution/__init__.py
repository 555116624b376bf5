"""How a stage's pure functions are run: the executor interface, its form in one process, and compiled code."""
