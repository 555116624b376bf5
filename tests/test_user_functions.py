"""What a user's code may do to the process, and which functions are refused."""

import os

import pytest
import torch

from rlhf.errors import UserError
from rlhf.io import process_state
from rlhf.io.user_functions import call_function, load_function
from rlhf.train.sink import open_sink

CHANGES = {
    "os.chdir('/')": "the working directory",
    "torch.set_default_dtype(torch.float64)": "torch's default dtype",
    "torch.set_default_device('meta')": "torch's default device",
    "torch.set_num_threads(torch.get_num_threads() + 1)": "torch's number of threads",
    "torch.set_grad_enabled(False)": "torch's grad mode",
    "torch.autograd.set_detect_anomaly(True)": "torch's anomaly mode",
    "torch.use_deterministic_algorithms(True)": "torch's deterministic algorithms",
    "import logging; logging.getLogger('rlhf').disabled = True": "the logger rlhf",  # as dictConfig does by default
}


def settings() -> dict:
    return {name: read() for name, (read, _) in process_state._SETTINGS.items()}


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(process_state, "_reported", set())


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("change", CHANGES)
def test_a_call_cannot_change_the_process_and_is_reported_once(caplog, change):
    def reward(prompts, completions):
        exec(change, {"os": os, "torch": torch})
        return [1.0]

    caplog.set_level("INFO", logger="rlhf")
    before = settings()
    for _ in range(2):
        assert call_function(reward, "reward r", [{}], prompts=["p"], completions=["c"]) == [1.0]
        assert settings() == before
    assert caplog.messages == [f"reward r: changed {CHANGES[change]}; put back"]


def test_an_import_or_a_sink_that_changes_the_process_is_put_back(tmp_path):
    changes = "torch.set_default_dtype(torch.float64); os.chdir('/')"
    (tmp_path / "s.py").write_text(
        f"import os, torch\n{changes}\ndef f(stage, step, metrics):\n    {changes}\n    1 / 0\n"
    )
    before = settings()
    sink = open_sink("s.py:f")
    assert settings() == before
    assert sink is not None
    sink("ppo", 1, {})
    assert settings() == before


@pytest.mark.parametrize(
    "text",
    [
        "async def f(prompts, completions): return [1.0]",
        "async def f(prompts, completions): yield 1.0",
        "class F:\n    async def __call__(self, prompts, completions): return [1.0]\nf = F()",
    ],
)
def test_async_functions_are_refused_at_once(tmp_path, text):
    (tmp_path / "a.py").write_text(text)
    with pytest.raises(UserError, match="async"):
        load_function("a.py:f", "--ppo.reward a.py:f")


def test_a_returned_coroutine_is_refused_without_a_warning():
    async def scores():
        return [1.0]

    with pytest.raises(UserError, match="async"):
        call_function(lambda prompts, completions: scores(), "reward r", [{}], prompts=["p"], completions=["c"])


def write_module(folder, name, text):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(text)
    return folder / f"{name}.py"


def test_modules_beside_a_file_are_found(tmp_path):
    write_module(tmp_path / "beside", "helper_beside_judge", "def value(text):\n    return float(len(text))\n")
    path = write_module(
        tmp_path / "beside",
        "judge",
        "import helper_beside_judge\ndef score(prompts, completions):\n"
        "    return [helper_beside_judge.value(text) for text in completions]\n"
        "def late(prompts, completions):\n    import late_helper_of_judge\n    return late_helper_of_judge.scores\n",
    )
    write_module(tmp_path / "beside", "late_helper_of_judge", "scores = [7.0]\n")
    score = load_function(f"{path}:score", "--ppo.reward")
    assert call_function(score, "reward score", [{}], prompts=["a"], completions=["abc"]) == [3.0]
    late = load_function(f"{path}:late", "--ppo.reward")
    assert call_function(late, "reward late", [{}], prompts=["a"], completions=["abc"]) == [7.0]


@pytest.mark.parametrize("name", ["torch", "random", "json", "numpy", "rlhf"])
def test_a_users_module_never_shadows_an_installed_one(tmp_path, name):
    write_module(tmp_path / name, name, "raise SystemExit('shadowed')\n")
    path = write_module(
        tmp_path / name, "judge", f"import {name}\ndef score(prompts, completions):\n    return [1.0]\n"
    )
    if name in ("random", "json"):
        load_function(f"{path}:score", "--ppo.reward")
    else:
        with pytest.raises(UserError, match=rf"{name} comes from .*, though .* lies beside it; rename one"):
            load_function(f"{path}:score", "--ppo.reward")


def test_files_of_one_name_in_two_folders_are_two_modules_and_their_helpers_are_not_mixed_up(tmp_path):
    functions = []
    for number in (1, 2):
        folder = tmp_path / f"folder{number}"
        path = write_module(folder, "same", f"def score(prompts, completions):\n    return [{number}.0]\n")
        functions.append(load_function(f"{path}:score", "--ppo.reward"))
    assert [function(prompts=[], completions=[]) for function in functions] == [[1.0], [2.0]]
    for number in (1, 2):
        folder = tmp_path / f"folder{number}"
        write_module(folder, "helper_of_same", f"x = {number}\n")
        path = write_module(folder, "user", "import helper_of_same\ndef score(prompts, completions):\n    return []\n")
        if number == 1:
            load_function(f"{path}:score", "--ppo.reward")
        else:
            with pytest.raises(UserError, match=r"helper_of_same comes from .*folder1"):
                load_function(f"{path}:score", "--ppo.reward")
