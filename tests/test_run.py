"""What a person is told when a run begins: what there is to resume, and what has changed since."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf.config import CheckpointConfig, LogConfig, PPORun, RunConfig, SFTRun
from rlhf.errors import NonFiniteError, UserError
from rlhf.io.checkpoint import Checkpoint, save_checkpoint
from rlhf.io.output_folder import check_output_folder
from rlhf.stages import STAGES
from rlhf.train.context import open_run
from rlhf.train.loop import train
from rlhf.train.resume import diff_settings


def test_a_finished_folder_tells_how_another_run_starts_from_its_models(tmp_path):
    save_checkpoint(tmp_path / "checkpoints" / "ppo", Checkpoint(4, {"w": torch.ones(2)}, {}), keep=1)
    for name in ("sft", "reward"):
        (tmp_path / name).mkdir()
    flags = f"--ppo.model-path {tmp_path}/sft --ppo.reward {tmp_path}/reward"
    with pytest.raises(UserError, match=rf"\(step 4\); continue .* to start there from the models here, add {flags}$"):
        check_output_folder(PPORun(output_dir=tmp_path), STAGES["ppo"])


NOTHING = "nothing to resume in {folder}; starting a new run"


@pytest.mark.parametrize(("resume", "there"), [(True, ""), (True, "sft"), (True, "reward"), (False, "")])
def test_a_run_says_that_there_is_nothing_to_resume(tmp_path, caplog, resume, there):
    """Once; a later stage of a pipeline that is resumed has checkpoints beside it and need not say so."""
    if there:
        save_checkpoint(tmp_path / "checkpoints" / there, Checkpoint(1, {"w": torch.ones(2)}, {}), keep=1)
    caplog.set_level("INFO", "rlhf")
    with open_run(SFTRun(output_dir=tmp_path, resume=resume, threads=1), STAGES["sft"]) as run:
        expected = [NOTHING.format(folder=tmp_path)] if resume and not there else []
        assert run.compute.notes == expected
    assert caplog.messages == expected
    assert {record.stage for record in caplog.records} <= {"sft"}


@pytest.mark.parametrize(
    ("config", "stage", "name", "said"),
    [
        (
            SFTRun(sft_data=Path("b.json")),
            "sft",
            "data",
            "sft_data b.json: the data have changed",
        ),
        (SFTRun(), "sft", "data", "the embedded example: the data have changed"),
        (PPORun(), "ppo", "model", "the start of ppo: the weights that the stage starts from have changed"),
        (PPORun(), "ppo", "seed", "seed was 0a, is 1b"),
    ],
)
def test_what_has_changed_is_told_in_words(config: RunConfig, stage, name, said):
    same = {"compiled": False, "threads": 1}
    assert diff_settings(config, STAGES[stage], same | {name: "0a"}, same | {name: "1b"}) == ([said], [])
    assert diff_settings(config, STAGES[stage], same, same) == ([], [])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_state_that_is_not_finite_replaces_no_checkpoint(tmp_path, value):
    """Whatever made it so: here it is the executor that says it."""
    spoilt = {"count": torch.tensor(7), "params.w": torch.tensor([1.0, value, 1.0])}
    executor = SimpleNamespace(
        compiled=False, version=3, faults=list, peak_bytes=lambda: 0, snapshot=lambda: {"params.w": torch.ones(3)}
    )

    def advance(step, state, observers):
        if step == 1:
            executor.snapshot = lambda: spoilt
        return {"loss": 1.0}, state

    config = SFTRun(
        output_dir=tmp_path, threads=1, checkpoint=CheckpointConfig(every=1, keep=1), log=LogConfig(tensorboard=False)
    )
    with (
        open_run(config, STAGES["sft"]) as run,
        pytest.raises(NonFiniteError, match=r"^sft, step 2: params\.w is not finite"),
    ):
        train(run, executor, total=3, state={}, identity={}, advance=advance)
    assert [path.name for path in (tmp_path / "checkpoints" / "sft").iterdir()] == ["step-000001"]
    last = (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["event"] == "nonfinite"
