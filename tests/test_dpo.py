"""The stage DPO: what it writes, that it learns, and that neither workers nor a resumption change a bit."""

import dataclasses
import json
import shutil

import pytest
import test_stages
import torch
from rlhf.cli.train import parse
from test_stages import interrupt_after, metrics_of, watched_losses

from rlhf.config import CheckpointConfig, DistConfig, DPOConfig
from rlhf.data.dataset import load_dataset
from rlhf.data.preference_batches import completion_pair_batches
from rlhf.data.schema import PREFERENCES
from rlhf.errors import Interrupted, UserError
from rlhf.evaluate.evaluate_config import EvaluateConfig
from rlhf.evaluate.evaluation import run_evaluation
from rlhf.io.model_folder import load_language_model
from rlhf.metrics import is_registered
from rlhf.models.forward import forward
from rlhf.monitor.report import write_report
from rlhf.ops import token_log_probs
from rlhf.stages import STAGES, check_settings
from rlhf.train.dpo import make_completion_log_probs, run_dpo
from rlhf.train.signals import stop_on_signal
from rlhf.train.stage_defaults import StartFacts

base = test_stages.base  # the fixture


def dpo_run(base, folder, dist=None, **settings):
    run = dataclasses.replace(
        base,
        output_dir=folder / "run",
        dpo=DPOConfig(**{"batch_size": 16, "learning_rate": 3e-3, "eval_every": 3, "micro_batch_size": 4} | settings),
        checkpoint=CheckpointConfig(every=2, keep=9),
        dist=dist or DistConfig(),
    )
    shutil.copytree(base.output_dir / "sft", run.output_dir / "sft")
    return run


def weights_of(run) -> bytes:
    return (run.output_dir / "policy" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    run = dpo_run(base, tmp_path_factory.mktemp("dpo"), epochs=2)
    result = run_dpo(run)
    assert result.verdict is not None
    assert result.verdict.text.startswith("The policy's implicit rewards order ")
    assert {"eval/baseline/longer", "eval/baseline/bag_of_words"} <= result.metrics.keys()
    return run


def test_the_first_step_is_at_the_reference_and_training_moves_away_from_it(finished):
    first, *_, last = metrics_of(finished, "dpo")
    assert first["loss/dpo"] == pytest.approx(0.6931, abs=1e-4)
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert first["rewards/rejected"] == pytest.approx(0, abs=1e-5)
    assert last["loss/dpo"] < 0.6
    assert last["eval/rewards/accuracies"] > 0.7
    assert last["eval/rewards/margins"] == pytest.approx(
        last["eval/rewards/chosen"] - last["eval/rewards/rejected"], abs=1e-5
    )
    assert all(is_registered(name) for name in last if "/" in name), "the metric table has them all"


def test_every_pairs_log_probs_are_those_of_its_two_texts_alone(base):
    model = load_language_model(base.output_dir / "sft")
    dataset = load_dataset(base.preference_data, PREFERENCES, model.tokenizer, base.cache_dir)
    log_probs = make_completion_log_probs(model.config)
    batches = completion_pair_batches(dataset, [3, 0, 7, 5, 11], max_length=model.config.n_positions, rows=2)
    seen = []
    for packed in batches:
        found = torch.stack(log_probs(model.params, packed.batch), dim=1)
        for record, pair in zip(packed.records, found, strict=False):
            for sequence, value in zip(dataset.sequences(record, model.config.n_positions), pair, strict=True):
                tokens = torch.from_numpy(sequence.tokens)
                logits = forward(model.params, tokens[None, :-1], config=model.config)[0]
                expected = token_log_probs(logits, tokens[1:])[sequence.prompt - 1 :].sum()
                torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
            seen.append(record)
    assert sorted(seen) == [0, 3, 5, 7, 11]


def test_ipo_is_another_loss(base, finished, tmp_path):
    run = dpo_run(base, tmp_path, epochs=0.2, loss="ipo")
    run_dpo(run)
    assert metrics_of(run, "dpo")[0]["loss/ipo"] == pytest.approx(25.0, abs=1e-3)
    assert weights_of(run) != weights_of(finished)


def test_resuming_gives_the_bits_of_the_run_that_never_stopped(base, finished, tmp_path):
    run = dpo_run(base, tmp_path, epochs=2)
    interrupt_after(run, "dpo", 2)
    with stop_on_signal() as stop, pytest.raises(Interrupted, match="continue with --resume"):
        run_dpo(run, stop=stop)
    run_dpo(dataclasses.replace(run, resume=True))
    assert weights_of(run) == weights_of(finished)
    assert metrics_of(run, "dpo") == metrics_of(finished, "dpo")


def test_another_beta_is_not_the_same_run(finished):
    other = dataclasses.replace(finished, resume=True, dpo=dataclasses.replace(finished.dpo, beta=0.2))
    shutil.rmtree(other.output_dir / "report", ignore_errors=True)
    with pytest.raises(UserError, match=r"dpo.beta was 0.1, is 0.2"):
        run_dpo(other)


def test_evaluation_and_report_know_what_it_trained(finished, tmp_path):
    config = EvaluateConfig(
        model_dir=finished.output_dir, limit=4, threads=1, cache_dir=finished.cache_dir, output=tmp_path / "evaluation"
    )
    report = run_evaluation(config)
    kinds = {evaluation.kind for evaluation in report.evaluations}
    assert "policy" in kinds
    write_report([finished.output_dir], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert '"dpo"' in page
    assert "Accuracy of implicit rewards" in page


def test_the_command_line_has_it():
    config = parse(["dpo", "--preference-data", "pairs.json", "--dpo.beta", "0.3", "--dpo.loss", "ipo"])
    assert (config.dpo.beta, config.dpo.loss) == (0.3, "ipo")
    assert STAGES["dpo"].folder == STAGES["ppo"].folder == "policy"


def test_settings_that_contradict_are_refused(base):
    with pytest.raises(UserError, match=r"^--dpo.label-smoothing 0.1: is of --dpo.loss sigmoid alone"):
        check_settings(dataclasses.replace(base, dpo=DPOConfig(loss="ipo", label_smoothing=0.1)), STAGES["dpo"])
    lines = check_settings(dataclasses.replace(base, dpo=DPOConfig(beta=0.5)), STAGES["ppo"])
    assert any("--dpo.beta 0.5: has no effect in the pipeline" in line for line in lines)


def test_a_policy_that_is_there_is_not_replaced(base, finished, tmp_path):
    run = dpo_run(base, tmp_path)
    shutil.copytree(finished.output_dir / "policy", run.output_dir / "policy")
    with pytest.raises(UserError, match="already exists, and would be replaced by what dpo trains"):
        run_dpo(run)


def test_a_policy_that_another_stage_trained_since_is_not_replaced(finished, tmp_path):
    run = dataclasses.replace(finished, output_dir=tmp_path / "run", resume=True)
    shutil.copytree(finished.output_dir, run.output_dir)
    shutil.rmtree(run.output_dir / "policy")
    shutil.copytree(run.output_dir / "sft", run.output_dir / "policy")
    with pytest.raises(UserError, match="policy: was trained by sft, and would be replaced by what dpo trains"):
        run_dpo(run)


@pytest.mark.parametrize(("loss", "name"), [("sigmoid", "loss/dpo"), ("ipo", "loss/ipo")])
def test_a_rising_loss_ends_it(base, tmp_path, monkeypatch, loss, name):
    watched = watched_losses(monkeypatch)
    run = dpo_run(base, tmp_path, loss=loss, max_steps=2)
    run_dpo(run)
    assert watched == {name}
    assert name in metrics_of(run, "dpo")[0]


def test_the_manifest_has_provenance_and_the_facts_of_the_sft_model(finished):
    sft, policy = (json.loads((finished.output_dir / name / "manifest.json").read_text()) for name in ("sft", "policy"))
    assert policy["stage"] == "dpo"
    assert policy["provenance"]["digests"]["data"] == policy["data"]
    for name in StartFacts._fields:
        assert policy[name] == sft[name], name
