"""Our side of `benchmarks.learning`: its material, our runs, and the measure of both sides' policies."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from benchmarks.session import Session
from rlhf.config import (
    CheckpointConfig,
    DPOConfig,
    DPORun,
    LogConfig,
    ModelConfig,
    PPOConfig,
    PPORun,
    SFTConfig,
    SFTRun,
    TokenizerConfig,
)
from rlhf.data.demo_data import EmbeddedFiles, write_embedded
from rlhf.data.schema import PROMPTS
from rlhf.distributed.compute_context import open_compute_context
from rlhf.evaluate.comparison import Sampling, load_models
from rlhf.evaluate.evaluate_config import EvaluateConfig
from rlhf.evaluate.evaluation_inputs import TestData
from rlhf.evaluate.judges import open_judges
from rlhf.evaluate.policy_evaluation import Comparison, compare_models
from rlhf.io.model_folder import load_language_model, save_language_model
from rlhf.random import Purpose, fold_in, key
from rlhf.train.dpo import run_dpo
from rlhf.train.observers import Observer, StageStart
from rlhf.train.ppo import run_ppo
from rlhf.train.sft import run_sft
from rlhf.train.stage_inputs import record_order
from rlhf.tree import named_leaves, tree_map_named

REWARD = "benchmarks.material:kindness"


class Hold(Observer):
    """Answers after every step and holds the run until the next may begin; after the last one it goes on to its end."""

    def __init__(self, session: Session) -> None:
        """One step is a round."""
        self._session, self._total = session, 0

    def on_start(self, start: StageStart) -> None:
        """Wait for the first round."""
        self._total = start.total
        self._session.ready()
        self._session.wait()

    def on_step(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Answer, and end the run where no further round is asked for."""
        shown = ("objective/scores", "objective/kl", "response_length/mean", "rewards/accuracies")
        self._session.answer(**{name: metrics[name] for name in shown if name in metrics})
        return step < self._total and not self._session.wait()


def make_sft(folder: Path, seed: int, steps: int = 150) -> EmbeddedFiles:
    """Train folder/sft, a Llama of 2 layers of 64, on the embedded example; return the example's files."""
    files = write_embedded(folder.parent / "data")
    if not (folder / "sft").is_dir():
        run_sft(
            SFTRun(
                output_dir=folder,
                seed=seed,
                sft_data=files.demonstrations,
                model=ModelConfig(family="llama", preset="tiny"),
                tokenizer=TokenizerConfig(vocab_size=512),
                sft=SFTConfig(max_steps=steps, val_fraction=0.0, learning_rate=3e-3),
                **_alone(),
            )
        )
    return files


def make_pairs(folder: Path, prompts: Path, *, samples: int, max_new_tokens: int, seed: int) -> Path:
    """Write folder/pairs.json: completions of the SFT model, two and two, ordered by the reward."""
    path = folder / "pairs.json"
    if not path.is_file():
        made = _complete(
            folder / "sft", folder / "sft", prompts, samples=samples, max_new_tokens=max_new_tokens, seed=1000 + seed
        )
        scored = made.sides["policy"]
        prompts_of = [record["prompt"] for record in made.columns]
        scores = scored.scores["eval/judge/kindness"].tolist()
        pairs = ordered_pairs(prompts_of, scored.completions.texts, scores, scored.completions.ended.tolist())
        path.write_text(json.dumps(pairs, indent=0))
    return path


def in_our_order(pairs: Path, *, seed: int, count: int) -> Path:
    """Write beside a file of pairs the first `count` that our run of this seed learns from, in its order."""
    records, path = json.loads(pairs.read_text()), pairs.with_name("pairs-in-order.json")
    order = record_order(fold_in(key(seed), int(Purpose.ORDER)), len(records), 0, count)
    path.write_text(json.dumps([records[record] for record in order], indent=0))
    return path


def ordered_pairs(
    prompts: Sequence[str], texts: Sequence[str], scores: Sequence[float], ended: Sequence[float]
) -> list[dict[str, str]]:
    """Return pairs of every two completions, the better one chosen, without ties and completions cut short or empty."""
    pairs = []
    for first in range(0, len(texts), 2):
        better, worse = sorted((first, first + 1), key=lambda row: -scores[row])
        if scores[better] > scores[worse] and all(ended[row] and texts[row].strip() for row in (better, worse)):
            pairs.append({"prompt": prompts[first], "chosen": texts[better], "rejected": texts[worse]})
    return pairs


def ppo(
    session: Session, *, output: str, model: str, prompts: str, seed: int, points: int, device: str, **s: Any
) -> None:
    """Our PPO or RLOO. Arguments as `benchmarks.peers.trl_learning.ppo` and `rloo` have them.

    RLOO's loss is TRL's divided by max_new_tokens, so epsilon is too; then Adam's steps are the same.
    """
    rloo = s["method"] == "rloo"
    settings = PPOConfig(
        model_path=Path(model),
        reward=(REWARD,),
        num_iterations=s["steps"],
        batch_size=s["prompts_per_step"],
        samples_per_prompt=s["samples_per_prompt"],
        num_epochs=s["epochs"],
        minibatch_size=s["minibatch"],
        micro_batch_size=s["minibatch"],
        rollout_batch_size=s["prompts_per_step"] * s["samples_per_prompt"],
        rollout_slots=s["prompts_per_step"] * s["samples_per_prompt"],
        max_new_tokens=s["max_new_tokens"],
        missing_eos_penalty=0.0,
        kl_coef=s["kl_coef"],
        kl_budget=float("inf"),
        clip_eps=s["clip_eps"],
        learning_rate=s["learning_rate"],
        adam_eps=s["adam_eps"] / s["max_new_tokens"] if rloo else s["adam_eps"],
        max_grad_norm=float("inf"),
        schedule="constant",
        warmup_fraction=0.0,
        **({"estimator": "rloo", "loss_per": "constant"} if rloo else {"lam": s["lam"], "value_coef": s["value_coef"]}),
    )
    shared = _alone() | {"checkpoint": CheckpointConfig(every=s["steps"] // points, keep=points)}
    config = PPORun(output_dir=Path(output), seed=seed, prompt_data=Path(prompts), ppo=settings, **shared)
    run_ppo(config, observers=[Hold(session)])
    save_points(Path(output), Path(model))


def dpo(
    session: Session, *, output: str, model: str, pairs: str, seed: int, points: int, device: str, **s: Any
) -> None:
    """Our DPO. Arguments as `benchmarks.peers.trl_learning.dpo` has them."""
    settings = DPOConfig(
        model_path=Path(model),
        epochs=1e6,
        max_steps=s["steps"],
        batch_size=s["pairs_per_step"],
        micro_batch_size=s["pairs_per_step"],
        val_fraction=0.0,
        beta=s["beta"],
        learning_rate=s["learning_rate"],
        adam_eps=s["adam_eps"],
        max_grad_norm=s["max_grad_norm"],
        schedule="constant",
        warmup_fraction=0.0,
        weight_decay=0.0,
    )
    shared = _alone() | {"checkpoint": CheckpointConfig(every=s["steps"] // points, keep=points)}
    run_dpo(
        DPORun(output_dir=Path(output), seed=seed, preference_data=Path(pairs), dpo=settings, **shared),
        observers=[Hold(session)],
    )
    save_points(Path(output), Path(model))


def save_points(output: Path, model: Path) -> None:
    """Write the policy of every checkpoint as a model folder, output/point-STEP."""
    start = load_language_model(model)
    for checkpoint in sorted(output.glob("checkpoints/*/step-*")):
        state = load_file(checkpoint / "state.safetensors")
        prefix = next(name for name in ("params.policy.", "params.") if any(leaf.startswith(name) for leaf in state))
        params = tree_map_named(lambda name, leaf: state[f"{prefix}{name}"].view(leaf.shape), start.params)  # noqa: B023
        assert named_leaves(params).keys() == named_leaves(start.params).keys()
        save_language_model(output / f"point-{int(checkpoint.name[5:])}", start._replace(params=params), facts={})


def measure(policy: Path, reference: Path, prompts: Path, *, samples: int, max_new_tokens: int) -> dict[str, float]:
    """Return a policy's mean reward, exact KL, length and share of ended completions, on prompts that it never saw."""
    made = _complete(policy, reference, prompts, samples=samples, max_new_tokens=max_new_tokens, seed=0).sides["policy"]
    return {
        "gold": float(made.scores["eval/judge/kindness"].mean()),
        "kl": float(made.completions.kl["exact"].mean()),
        "tokens": float(np.mean([len(row) for row in made.completions.tokens])),
        "ended": float(made.completions.ended.mean()),
    }


def _complete(
    policy: Path, reference: Path, prompts: Path, *, samples: int, max_new_tokens: int, seed: int
) -> Comparison:
    config = EvaluateConfig(device="cpu", threads=1, samples=samples, seed=seed, rollout_batch_size=256)
    sampling = Sampling(("sampled",), 1.0, max_new_tokens, seed)
    models, data = load_models({"policy": policy}, reference, {}), TestData(prompts, PROMPTS, None, "")
    with open_compute_context(config) as context:
        (made,) = compare_models(config, context, models, data, sampling, open_judges([REWARD]))
    return made


def _alone() -> dict[str, Any]:
    return {
        "device": "cpu",
        "threads": 1,
        "compile": "off",
        "stop_early": False,
        "log": LogConfig(samples=0, tensorboard=False),
    }
