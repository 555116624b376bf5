"""What a person is told when a run begins: what there is to resume, and what has changed since."""

from pathlib import Path

import pytest
import torch

from rlhf.config import PPORun, RunConfig, SFTRun
from rlhf.errors import UserError
from rlhf.io.checkpoint import Checkpoint, save_checkpoint
from rlhf.stages.identity import changes
from rlhf.stages.run import check_output, open_run


def test_a_finished_folder_tells_how_another_run_starts_from_its_models(tmp_path):
    save_checkpoint(tmp_path / "checkpoints" / "ppo", Checkpoint(4, {"w": torch.ones(2)}, {}), keep=1)
    for name in ("sft", "reward"):
        (tmp_path / name).mkdir()
    flags = f"--ppo.model-path {tmp_path}/sft --ppo.reward {tmp_path}/reward"
    with pytest.raises(UserError, match=rf"\(step 4\); continue .* to start there from the models here, add {flags}$"):
        check_output(PPORun(output_dir=tmp_path), "ppo")


NOTHING = "nothing to resume in {folder}: starting anew"


@pytest.mark.parametrize(("resume", "there"), [(True, ""), (True, "sft"), (True, "reward"), (False, "")])
def test_a_run_says_that_there_is_nothing_to_resume(tmp_path, capsys, resume, there):
    """Once; a later stage of a pipeline that is resumed has checkpoints beside it and need not say so."""
    if there:
        save_checkpoint(tmp_path / "checkpoints" / there, Checkpoint(1, {"w": torch.ones(2)}, {}), keep=1)
    with open_run(SFTRun(output_dir=tmp_path, resume=resume, threads=1), "sft") as run:
        expected = [NOTHING.format(folder=tmp_path)] if resume and not there else []
        assert run.notes == expected
    assert ("starting anew" in capsys.readouterr().err) == bool(expected)


@pytest.mark.parametrize(
    ("config", "stage", "name", "said"),
    [
        (
            SFTRun(sft_data=Path("b.json")),
            "sft",
            "data",
            "data was other: b.json has changed",
        ),
        (SFTRun(), "sft", "data", "data was other: the embedded example has changed"),
        (PPORun(), "ppo", "model", "model was other: the weights that the stage starts from have changed"),
        (PPORun(), "ppo", "reward", "reward was other: a reward model's weights or statistics have changed"),
        (PPORun(), "ppo", "seed", "seed was 0a, is 1b"),
    ],
)
def test_what_has_changed_is_told_in_words(config: RunConfig, stage, name, said):
    same = {"compiled": False, "threads": 1}
    assert changes(config, stage, same | {name: "0a"}, same | {name: "1b"}) == [said]
    assert changes(config, stage, same, same) == []
