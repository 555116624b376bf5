"""python -m rlhf: the list of programs."""

from rlhf.cli.programs import main

if __name__ == "__main__":
    raise SystemExit(main())
