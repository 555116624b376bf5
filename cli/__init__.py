"""The programs: thin, typed command lines over `rlhf.stages`."""
