"""Fast forms of reference functions. Nothing needs this folder: without it the references run."""
