"""Our side of every comparison: the one file that knows rlhf's entry points."""

import functools
import itertools
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch

from benchmarks import material
from benchmarks.bench import Made
from benchmarks.session import Session
from rlhf.batches import CompletionPairBatch, PairBatch, TokenBatch
from rlhf.config import CheckpointConfig, DistConfig, DPOConfig, LogConfig, PPOConfig, PPORun, RewardConfig, SFTConfig
from rlhf.data.collate import Prefetch, pair_batches, token_batches
from rlhf.data.dataset import TokenSequence, default_cache_dir, texts
from rlhf.data.demo_data import write_embedded
from rlhf.data.preference_batches import completion_pair_batches
from rlhf.data.schema import DEMONSTRATIONS
from rlhf.distributed import open_executor
from rlhf.errors import UserError
from rlhf.execution.draws import compiled_draw
from rlhf.execution.executor import Executor
from rlhf.execution.memory import keep_freed_memory
from rlhf.execution.program import ModelState, Program
from rlhf.generate.complete import complete, make_completion_fn
from rlhf.io.model_folder import (
    LanguageModel,
    RewardModel,
    RewardStatistics,
    load_language_model,
    load_reward_model,
    save_language_model,
    save_reward_model,
)
from rlhf.io.tokenizer import Tokenizer
from rlhf.models.architecture import ModelShape, architecture_of
from rlhf.models.decode_state import decode_steps
from rlhf.models.gpt2_config import GPT2Config
from rlhf.models.heads import init_reward_head
from rlhf.models.llama_config import LlamaConfig
from rlhf.random import key, split
from rlhf.train import dpo as dpo_stage
from rlhf.train import reward as reward_stage
from rlhf.train import sft as sft_stage
from rlhf.train.ppo import run_ppo
from rlhf.tree import named_leaves

FP32: tuple[dict[str, Any], ...] = ({"precision": "fp32"},)
"""Our settings that compute in IEEE fp32."""
BEST: tuple[dict[str, Any], ...] = (*FP32, {"precision": "bf16"})
"""All our settings; the fastest of them counts where any precision is allowed."""
COMPILED_FP32 = tuple(setting | {"compile": choice} for setting in FP32 for choice in ("on", "off"))
"""The same where steps are made, which may be compiled."""
COMPILED_BEST = tuple(setting | {"compile": choice} for setting in BEST for choice in ("on", "off"))
COMPILED_BF16: tuple[dict[str, Any], ...] = ({"precision": "bf16", "compile": "on"},)
"""What is fastest on a GPU, where compilation takes too long for trials."""

PHASES = ("generate", "score", "update")
"""Of a PPO iteration, as its log names their seconds."""

_STEPS = 1_000_000
"""Of the schedule: no run gets that far."""


@dataclass(frozen=True)
class Records:
    """Tokenised records in memory, as `rlhf.data.dataset.Dataset` gives them: one sequence each, or two for a pair."""

    records: list[list[np.ndarray]]
    prompt: int = 1
    """Tokens of each record's prompt."""

    def __len__(self) -> int:
        return len(self.records)

    def of_step(self, step: int, count: int) -> list[int]:
        """`count` records after those of the steps before; after the last comes the first."""
        return [(step * count + place) % len(self.records) for place in range(count)]

    def lengths(self, record: int, max_length: int) -> list[int]:
        """Tokens of each of the record's sequences."""
        return [len(tokens) for tokens in self.records[record]]

    def sequences(self, record: int, max_length: int) -> list[Any]:
        """The record's sequences."""
        return [TokenSequence(tokens, self.prompt) for tokens in self.records[record]]


def generate(
    session: Session,
    *,
    model: str,
    size: str,
    device: str,
    prompts: int,
    batch: int,
    stops: list[int],
    precision: str,
    compile: str,  # noqa: A002
) -> None:
    """Complete `prompts` prompts, `batch` at a time; arguments as the peer's."""
    work, loaded = material.SIZES[size], load_language_model(Path(model))
    program = functools.partial(_rollout, loaded.config, work.completion, tuple(stops), batch, precision, compile)
    lengths = material.fixed_lengths(prompts, work.prompt)
    queue = [np.array(tokens) for tokens in material.sequences(lengths, work.shape.vocab_size)]
    with _executor(program, ModelState({"policy": loaded.params}, {}), device) as executor:
        session.ready(parameters=_count(loaded.params))
        for number, _ in enumerate(session.rounds()):
            completions = complete(executor, queue, split(key(number), len(queue)), rows=len(queue))
            session.answer(tokens=int(completions.mask.sum()))


def sft(
    session: Session,
    *,
    model: str,
    size: str,
    device: str,
    varied: bool,
    precision: str,
    compile: str,  # noqa: A002
    micro_batch: int = 0,
) -> None:
    """Optimiser steps on demonstrations, loss on every token.

    Args:
        session: asks for the rounds.
        model: folder.
        size: of `material.SIZES`.
        device: cpu or cuda.
        varied: lengths that vary instead of full sequences.
        precision: fp32 or bf16.
        compile: on or off.
        micro_batch: packed rows computed at once; 0 is the whole batch.
    """
    work, loaded = material.SIZES[size], load_language_model(Path(model))
    count, longest = work.sft
    rows = micro_batch or count
    settings = SFTConfig(loss_on="all", micro_batch_size=rows, schedule="constant", warmup_fraction=0.0)
    program = functools.partial(sft_stage.make_sft_program, loaded.config, settings, *_computing(precision, compile))
    data = Records([[np.array(tokens)] for tokens in material.demonstrations(work, varied)])

    def batches_of(step: int) -> list[TokenBatch]:
        records = data.of_step(step, count)
        return token_batches(data, records, max_length=longest, rows=rows, loss_on="all", key=key(step))

    with _executor(program, ModelState(loaded.params, {}), device) as executor:
        session.ready(parameters=_count(loaded.params))
        _step_rounds(session, executor, batches_of, work.steps, _summed_loss)


def _summed_loss(metrics: Mapping[str, float], batches: list[TokenBatch]) -> float:
    return metrics["loss/sft"] * sum(len(batch.targets) for batch in batches)


def _step_rounds(
    session: Session,
    executor: Executor,
    batches_of: Callable[[int], list[Any]],
    steps: int,
    loss: Callable[[Mapping[str, float], list[Any]], float],
) -> None:
    """Make `steps` optimiser steps a round, and answer with their tokens and the last one's loss."""
    prefetched = Prefetch(map(batches_of, itertools.count()))
    for _ in session.rounds():
        tokens = 0
        for batches in itertools.islice(prefetched, steps):
            metrics = executor.step("main", batches, overlap=prefetched.prepare)
            tokens += sum(int((batch.rows.segments > 0).sum()) for batch in batches)
        session.answer(tokens=tokens, loss=loss(metrics, batches))


def _rollout(
    config: ModelShape,
    longest: int,
    stops: tuple[int, ...],
    max_concurrent: int,
    precision: str,
    compile: str,  # noqa: A002
) -> Program:
    _, dtype, folder = _computing(precision, compile)
    draw = decode_steps if folder is None else compiled_draw(folder)
    rollout = make_completion_fn(
        config, dtype=dtype, max_new_tokens=longest, stop_tokens=stops, max_concurrent=max_concurrent, draw=draw
    )
    return Program({}, {"rollout": rollout}, {})


def _executor(make_program: Any, models: ModelState, device: str) -> Any:
    keep_freed_memory()
    return open_executor(make_program, models, DistConfig(), device=torch.device(device))


def _computing(precision: str, choice: str) -> tuple[int, torch.dtype, Path | None]:
    """Steps of the schedule, dtype, and where the stages keep compiled code, as `make_program` takes them."""
    return _STEPS, _dtype(precision), default_cache_dir() / "compiled" if choice == "on" else None


def _dtype(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _count(params: Any) -> int:
    return sum(leaf.numel() for leaf in named_leaves(params).values())


def make_material(folder: Path, size: str, pretrained: Path | None = None) -> Made:
    """Write what every side loads: a language model, a reward model, and PPO's prompts.

    Args:
        folder: where to.
        size: of `material.SIZES`.
        pretrained: folder of a language model of this size; without it weights are random.

    Raises:
        UserError: `pretrained` holds no language model.
        SystemExit: it holds one of another size.
    """
    work = material.SIZES[size]
    demonstrations = write_embedded(folder / "data").demonstrations
    model = _random_model(work.shape, demonstrations) if pretrained is None else load_language_model(pretrained)
    if (found := _count(model.params)) != work.shape.parameters:
        expected = f"--size {size} is of one with {work.shape.parameters:,}"
        raise SystemExit(f"python -m benchmarks: --model {pretrained} has {found:,} parameters; {expected}")
    if pretrained is None:
        save_language_model(folder / "model", model, facts={})
    params = {"trunk": model.params, "head": init_reward_head(model.config.n_embd, key=key(1))}
    scorer = RewardModel(params, model.config, model.tokenizer, RewardStatistics(0.0, 1.0, 0))
    save_reward_model(folder / "reward", scorer, facts={})
    count = min(4 * work.ppo.prompts, max(256, work.ppo.prompts))
    prompts = _prompts(demonstrations, model.tokenizer, work.ppo.prompt, count)
    (folder / "prompts.json").write_text(json.dumps(prompts))
    return Made((pretrained or folder / "model").absolute(), folder / "reward", folder / "prompts.json", demonstrations)


def _random_model(shape: material.Shape | material.LlamaShape, demonstrations: Path) -> LanguageModel:
    config = model_shape(shape)
    tokenizer = _tokenizer(demonstrations, shape.vocab_size)
    return LanguageModel(architecture_of(config).init(config, key=key(0)), config, tokenizer)


def model_shape(shape: material.Shape | material.LlamaShape) -> ModelShape:
    """Return the shape as our models have it."""
    return (GPT2Config if isinstance(shape, material.Shape) else LlamaConfig)(**shape._asdict())


def _tokenizer(source: Path, vocab_size: int) -> Tokenizer:
    """Return a tokenizer trained on demonstrations, with an entry for every row of the embedding.

    A model folder's rows without an entry are left out when it is read. The entries beyond the trained ones are filler.
    """
    trained = Tokenizer.train(texts(source, DEMONSTRATIONS), min(1024, vocab_size))
    with tempfile.TemporaryDirectory() as folder:
        trained.save(Path(folder))
        backend = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
    backend.add_tokens([f"<filler {number}>" for number in range(vocab_size - trained.vocab_size)])
    return Tokenizer(backend, trained.eos, "the benchmark's tokenizer")


def _prompts(source: Path, tokenizer: Tokenizer, length: int, count: int) -> list[dict[str, Any]]:
    """Texts of exactly `length` tokens: stretches of the demonstrations, cut where the text gives the same tokens."""
    (tokens,) = tokenizer.encode([" ".join(texts(source, DEMONSTRATIONS))[:100_000]])
    found = []
    for start in range(0, len(tokens) - length, length // 2):
        text = tokenizer.decode(tokens[start : start + length])
        (ids,) = tokenizer.encode([text])
        if len(ids) == length:
            found.append({"prompt": text, "ids": ids})
        if len(found) == count:
            return found
    raise RuntimeError(f"the demonstrations give {len(found)} prompts of {length} tokens, {count} are needed")


def reward(session: Session, *, model: str, size: str, device: str, precision: str, compile: str) -> None:  # noqa: A002
    """Optimiser steps on preference pairs; `model` is a reward model's folder."""
    work, loaded = material.SIZES[size], load_reward_model(Path(model))
    count, longest = work.pairs
    settings = RewardConfig(micro_batch_size=2 * count, schedule="constant", warmup_fraction=0.0, learning_rate=1e-3)
    program = functools.partial(
        reward_stage.make_reward_program, loaded.config, settings, *_computing(precision, compile)
    )
    data = Records([[np.array(tokens) for tokens in pair] for pair in material.preferences(work)])

    def batches_of(step: int) -> list[PairBatch]:
        packs = pair_batches(data, data.of_step(step, count), max_length=longest, rows=2 * count)
        return [pack.batch for pack in packs]

    with _executor(program, ModelState(loaded.params, {}), device) as executor:
        session.ready(parameters=_count(loaded.params))
        _step_rounds(session, executor, batches_of, work.steps, lambda metrics, batches: metrics["loss/reward"])


def dpo(session: Session, *, model: str, size: str, device: str, precision: str, compile: str) -> None:  # noqa: A002
    """Optimiser steps of DPO on preference pairs; the reference's log-probs are computed before the first."""
    work, loaded = material.SIZES[size], load_language_model(Path(model))
    count, longest = work.pairs
    settings = DPOConfig(micro_batch_size=2 * count, schedule="constant", warmup_fraction=0.0, learning_rate=1e-3)
    program = functools.partial(dpo_stage.make_dpo_program, loaded.config, settings, *_computing(precision, compile))
    pairs = material.preferences(work)[: material.DPO_BATCHES * count]
    data = Records([[np.array(tokens) for tokens in pair] for pair in pairs], material.pair_prompt(work))
    pack = functools.partial(completion_pair_batches, data, max_length=longest, rows=2 * count)
    with _executor(program, ModelState(loaded.params, {}), device) as executor:
        batches = [pack(data.of_step(step, count)) for step in range(material.DPO_BATCHES)]
        ref_log_probs = dpo_stage.reference_log_probs(executor, data, [packed for some in batches for packed in some])

        def batches_of(step: int) -> list[CompletionPairBatch]:
            return [packed.batch for packed in pack(data.of_step(step, count), ref_log_probs=ref_log_probs)]

        session.ready(parameters=_count(loaded.params))
        _step_rounds(session, executor, batches_of, work.steps, lambda metrics, batches: metrics["loss/dpo"])


def ppo(
    session: Session,
    *,
    model: str,
    reward: str,
    prompts_file: str,
    size: str,
    device: str,
    critic: str,
    precision: str,
    compile: str,  # noqa: A002
    iteration: Sequence[int] = (),
    micro_batch: int = 0,
    rollout_batch: int = 0,
    workers: int = 0,
) -> None:
    """Iterations of the whole stage, as `rlhf-train ppo` runs it: PPO, or RLOO where there is no critic.

    A reward function of weight 0 is called once in each iteration: there the run is held between rounds, so that a
    round is everything from there to the same place of the next iteration.

    Args:
        session: asks for the rounds.
        model: folder of policy and reference.
        reward: folder of the reward model, or a reward function.
        prompts_file: records with `prompt`.
        size: of `material.SIZES`.
        device: cpu or cuda.
        critic: separate, shared or none.
        precision: fp32 or bf16.
        compile: on or off.
        iteration: of `material.Iteration`; empty is the size's own.
        micro_batch: completions scored or updated on at once; 0 is a whole minibatch.
        rollout_batch: completions generated at once; 0 is all of an iteration.
        workers: on Ray, with this process's number of threads each; 0 computes in this process.
    """
    work = material.SIZES[size]
    made = material.Iteration(*iteration) if iteration else work.ppo
    with tempfile.TemporaryDirectory(prefix="rlhf-benchmark-") as folder:
        config = PPORun(
            output_dir=Path(folder) / "run",
            prompt_data=Path(prompts_file),
            device=device,
            precision=precision,
            compile=compile,
            threads=torch.get_num_threads(),
            dist=DistConfig(num_workers=workers, threads_per_worker=torch.get_num_threads()),
            log=LogConfig(samples=0, tensorboard=False),
            checkpoint=CheckpointConfig(every=_STEPS),
            ppo=PPOConfig(
                model_path=Path(model),
                reward=(reward, "0*benchmarks.ours:hold"),
                estimator="rloo" if critic == "none" else "gae",
                critic=critic,
                num_iterations=_STEPS,
                batch_size=made.prompts,
                samples_per_prompt=made.samples,
                num_epochs=made.epochs,
                minibatch_size=made.minibatch,
                micro_batch_size=micro_batch or made.minibatch,
                rollout_batch_size=rollout_batch or made.completions,
                max_new_tokens=made.completion,
                stop_at_eos=False,
                learning_rate=3e-6,
            ),
        )
        log = config.output_dir / "logs" / "metrics.jsonl"
        _held.append(functools.partial(_hold, session, log, work.shape.parameters, made))
        keep_freed_memory()
        try:
            run_ppo(config)
        except UserError:
            if not session.over:
                raise


_held: list[Callable[[], None]] = []
"""What the reward function calls."""


def hold(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """The reward function that holds the run between rounds."""
    _held[-1]()
    return [0.0] * len(prompts)


def _hold(session: Session, log: Path, parameters: int, iteration: material.Iteration) -> None:
    last = json.loads(log.read_text().splitlines()[-1])
    if "response_length/mean" in last:
        if last["policy/updates"] != iteration.updates:
            raise RuntimeError(f"{last['policy/updates']} updates in an iteration")
        tokens = round(iteration.completions * (iteration.prompt + last["response_length/mean"]))
        session.answer(tokens=tokens, **{name: last[f"timing_s/{name}"] for name in PHASES})
    else:
        session.ready(parameters=parameters)
    if not session.wait():
        raise SystemExit
