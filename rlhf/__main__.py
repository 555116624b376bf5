"""The list of programs, printed by `python -m rlhf`."""

from rlhf.cli.programs import main

if __name__ == "__main__":
    raise SystemExit(main())
