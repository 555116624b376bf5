"""Stands in for the peers of the benchmarks: it answers as one, does no work, and fails as FAKE_PEER tells it to.

As a program it takes the place of the peers' interpreter: what follows is that interpreter's command line.
"""

import json
import os
import sys
from pathlib import Path

from benchmarks import material, session

FAULT = os.environ.get("FAKE_PEER", "")
"""dead: it does not start; round N: it ends in that round (from 0); fewer tokens: of every round."""


def run(talk, *, size, parameters=None, prompts=0, tokens=None, **settings):
    """Rounds of no work."""
    shape = material.SIZES[size].shape
    talk.ready(parameters=shape.parameters if parameters is None else parameters)
    for number, _ in enumerate(talk.rounds()):
        if f"round {number}" == FAULT:
            print("out of luck")
            raise RuntimeError("in the middle of a round")
        talk.answer(tokens=(tokens or prompts * material.SIZES[size].completion) - (FAULT == "fewer tokens"))


def facts_of(target, settings):
    """What the peer that is asked for would say of its rounds."""
    size = material.SIZES[settings["size"]]
    rows, length = size.sft
    pairs, member = size.pairs
    if target.endswith("transformers_generate:run"):
        return {"tokens": None}
    if target.endswith("trl_ppo:run"):
        return {"tokens": size.ppo.prompts * (size.ppo.prompt + size.ppo.completion)}
    if target.endswith(":rloo"):
        iteration = material.Iteration(*settings["iteration"])
        return {"tokens": iteration.completions * (iteration.prompt + iteration.completion)}
    if target.endswith(":dpo"):
        return {"tokens": size.steps * 2 * pairs * member}
    if target.endswith(":reward"):
        return {"tokens": size.steps * 2 * pairs * member, "parameters": size.shape.parameters + size.shape.n_embd}
    return {"tokens": size.steps * rows * length}


def main(arguments):
    """What the peers' interpreter is asked to do."""
    if FAULT == "dead":
        raise SystemExit("a peer that does not start")
    if arguments[0].endswith("trainer_script.py"):
        (Path(json.loads(arguments[1])["output"]) / "first step").touch()
        return
    assert arguments[:2] == ["-m", "benchmarks.session"], arguments
    target, settings = arguments[2], json.loads(arguments[3])
    session.main("fake_peer:run", settings | facts_of(target, settings))


if __name__ == "__main__":
    main(sys.argv[1:])
