"""python -m rlhf: the list of programs."""

from rlhf.cli.programs import main

raise SystemExit(main())
