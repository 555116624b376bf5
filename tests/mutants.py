"""Mutation check: every planted error in the pure core must make a test of its module fail.

Usage:
    python tests/mutants.py            all mutants
    python tests/mutants.py losses kl  those of some modules

A mutant is one change of one line: a sign, a mask, a clip, a wrong argument. Each is run in a forked child, two at a
time, whose `rlhf.<module>` is executed from the changed text in memory; the working tree is only read. First the
unchanged modules are run the same way: they must pass. The exit status is 1 if a mutant survives, if one cannot even
be imported, or if a text to replace does not occur exactly once.
"""

import gc
import importlib.util
import os
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
WORKERS = 2
SECONDS = 120
"""CPU seconds after which a child is given up."""


TESTS = {
    "advantages": "advantages group_baselines",
    "losses": "losses policy_losses",
    "kernels.compiled_ops": "accelerate",
    "evaluate.baselines": "verdicts",
    "models.attention": "fused_attention gpt2",
    "models.decode_state": "decoding",
    "models.forward": "gpt2",
    "models.gpt2_parameters": "gpt2",
    "models.gpt_neox": "families",
    "models.initial_parameters": "gpt2",
    "models.layers": "gpt2 families",
    "models.llama": "families",
    "models.output_layer": "families",
    "models.rope": "families",
    "models.transformer": "gpt2",
    "models.scoring": "objectives",
    "data.preference_batches": "dpo",
    "train.early_stop": "verdicts",
    "train.ppo_objective": "objectives",
    "train.ppo_rewards": "reward_ensembles",
    "train.reward": "objectives",
    "train.sft": "objectives",
}
"""Tests of modules whose test file has another name."""


class Mutant(NamedTuple):
    name: str
    module: str
    """Of rlhf, dotted; its tests are tests/test_<last part>.py, or as `TESTS` has it."""
    old: str
    """Occurs exactly once in the module."""
    new: str


def mutants(module: str, *changes: tuple[str, str, str]) -> list[Mutant]:
    return [Mutant(name, module, old, new) for name, old, new in changes]


MUTANTS = [
    *mutants(
        "verdicts",
        ("interval without its shift", "(accuracy + z**2 / (2 * count))", "(accuracy)"),
        ("interval of normal theory", "+ (z / (2 * count)) ** 2)", ")"),
        ("coin inside the interval", "if centre - half <= 0.5:", "if accuracy <= 0.5:"),
    ),
    *mutants(
        "data.dataset",
        ("answers with their prompts", "self._offsets[rows] + self._prompts[rows]", "self._offsets[rows]"),
        ("answers without their ends", "np.full(len(answers), self.end_id)", "np.full(0, self.end_id)"),
        (
            "first member of each pair twice",
            "+ np.arange(self.members)).ravel()",
            "+ 0).ravel()",
        ),
        ("whole prompts before the ends", "np.minimum(prompts, max_length // 2)", "prompts"),
        ("one of two answers ends", "max_length // 2)).all(axis=1)", "max_length // 2)).any(axis=1)"),
    ),
    *mutants(
        "train.ppo_objective",
        ("weights of the loss dropped", "weights=batch.weights,", "weights=None,"),
        ("weights of entropy and KL dropped", "batch.mask, batch.weights)", "batch.mask, None)"),
        ("KL never weighed", "    if weigh:\n", "    if False:\n"),
    ),
    *mutants(
        "train.dpo",
        ("reference left out", "chosen - batch.ref_chosen, rejected - batch.ref_rejected", "chosen, rejected"),
        ("chosen and rejected swapped", "return sums[0::2], sums[1::2]", "return sums[1::2], sums[0::2]"),
        (
            "tokens of all sequences",
            "torch.where(batch.sequences == sequences, tokens, 0.0)",
            "tokens.expand(len(sequences), -1)",
        ),
        ("reference of the next record", "found[packed.records] =", "found[[r - 1 for r in packed.records]] ="),
    ),
    *mutants(
        "data.preference_batches",
        ("prompt tokens count", "max(1, s.prompt)", "1"),
        ("targets of predictors", "predictors=cells - 1", "predictors=cells"),
        ("rejected reference for chosen", "ref_chosen=pad_to_two(ref[:, 0])", "ref_chosen=pad_to_two(ref[:, 1])"),
    ),
    *mutants(
        "train.ppo_rewards",
        ("members not normalised", "(scores - mean) / std if settings.normalize_reward else scores", "scores"),
        ("members judge the disagreement", "if not source.weight:", "if source.weight:"),
        ("weight of the ensemble dropped", "total + members[0][0] * combined", "total + combined"),
        (
            "gold models are members",
            "if source.weight and source.model is not None and",
            "if source.model is not None and",
        ),
    ),
    *mutants(
        "group_baselines",
        ("leave one out is the mean", "(size / (size - 1))", "1.0"),
        ("leave one out inverted", "(size / (size - 1))", "((size - 1) / size)"),
        ("batch for group", "batch if baseline ==", "groups if baseline =="),
        ("group for batch", 'baseline == "batch" else groups)', 'baseline == "batch" else batch)'),
        ("sum for mean", "shifted - (sums / sizes)[index]", "shifted - sums[index]"),
        ("mean not subtracted", "shifted - (sums / sizes)[index]", "shifted"),
        ("no shift before the mean", "shifted = scores - scores[first]", "shifted = scores"),
        ("biased deviation", "/ (sizes - 1))[index]", "/ sizes)[index]"),
        ("variance for deviation", "torch.where(varies, variance, 1.0).sqrt()", "torch.where(varies, variance, 1.0)"),
        ("root differentiated at 0", "torch.where(varies, variance, 1.0).sqrt()", "variance.sqrt()"),
        ("batch deviation for group's", 'batch if scale == "batch_std"', 'batch if scale != "batch_std"'),
        ("no eps", "else groups) + _STD_EPS)", "else groups))"),
        ("group of one allowed", "bool((sizes < 2).any())", "False"),
        ("group of one of a deviation allowed", ' or scale == "group_std") and', ") and"),
        ("batch of one allowed", "and len(batch) < 2", "and len(batch) < 1"),
        ("groups in order of appearance", "order[sizes.cumsum(0) - sizes][index]", "(sizes.cumsum(0) - sizes)[index]"),
        ("low precision kept", "scores = upcast(scores)", "scores = scores"),
        ("pair: its own partner", "flip(1).flatten()", "flatten()"),
        ("pair: unsorted", "flatten()[torch.argsort(order)]", "flatten()"),
        ("pair: the worse is chosen", "scores > scores[other]", "scores < scores[other]"),
        ("pair: a tie has a loser", "+ 0.5 * equal", "+ 0.0 * equal"),
        ("pair: the log-ratio alone", "(log_ratios - log_ratios[other])))", "log_ratios))"),
        ("pair: beta once", "return beta * (preferred", "return (preferred"),
        ("pair: three allowed", "bool((sizes != 2).any())", "bool((sizes < 2).any())"),
        ("equal by any", "(differing == 0)[index]", "(differing < 2)[index]"),
        ("unequal groups", "(differing == 0)[index]", "(differing != 0)[index]"),
    ),
    *mutants(
        "weighting",
        (
            "per sequence without B",
            "lengths.double() * len(lengths) / lengths.sum()",
            "lengths.double() / lengths.sum()",
        ),
        (
            "per sequence without N",
            "lengths.double() * len(lengths) / lengths.sum()",
            "lengths.double() * len(lengths)",
        ),
        ("constant is 1", "float(length or 1)", "1.0"),
        ("empty sequence", "torch.where(lengths > 0, 1.0 / divisors, 0.0)", "1.0 / divisors"),
        ("length of tokens", 'length is None if per != "constant" else', 'True if per != "constant" else'),
    ),
    *mutants(
        "policy_losses",
        ("cispo: weight differentiated", "log_ratio = log_probs.detach() -", "log_ratio = log_probs -"),
        ("cispo: weight not clipped", "-clipped * advantages", "-ratio * advantages"),
        ("cispo: sign", "-clipped * advantages", "clipped * advantages"),
        ("cispo: old policy's gradient", "* advantages * log_probs, mask", "* advantages * old_log_probs, mask"),
        (
            "cispo: ratio inverted",
            "log_ratio = log_probs.detach() - old_log_probs",
            "log_ratio = old_log_probs - log_probs.detach()",
        ),
        (
            "cispo: unmasked",
            "torch.where(mask, upcast(x), 0.0) for x in (log_probs, old",
            "upcast(x) for x in (log_probs, old",
        ),
        ("cispo: clip fraction", "(clipped != ratio).float()", "(clipped == ratio).float()"),
        ("gspo: sum for mean of a row", "/ mask.sum(dim=-1, keepdim=True).clamp(min=1)", ""),
        ("gspo: sum for mean of packed", "sums / same.sum(dim=-1).clamp(min=1)", "sums"),
        (
            "gspo: all sequences are one",
            "sequences.unsqueeze(-1) == sequences.unsqueeze(-2)",
            "sequences.unsqueeze(-1) > -1",
        ),
        ("gspo: masked tokens count", " & mask.unsqueeze(-2)", ""),
        ("gspo: weights dropped", "mask=mask,\n        weights=weights,", "mask=mask,"),
        ("gspo: one clip", "clip_eps_high=clip_eps_high,\n    )", ")"),
        ("gspo: old policy differentiated", "upcast(old_log_probs.detach()), 0.0)", "upcast(old_log_probs), 0.0)"),
    ),
    *mutants(
        "preference_losses",
        (
            "log-ratio: sign",
            "upcast(log_probs) - upcast(ref_log_probs.detach())",
            "upcast(ref_log_probs.detach()) - upcast(log_probs)",
        ),
        ("log-ratio: mean", "0.0).sum(dim=-1)", "0.0).mean(dim=-1)"),
        ("log-ratio: reference differentiated", "upcast(ref_log_probs.detach())", "upcast(ref_log_probs)"),
        (
            "log-ratio: unmasked",
            "torch.where(mask, upcast(log_probs) - upcast(ref_log_probs.detach()), 0.0)",
            "(upcast(log_probs) - upcast(ref_log_probs.detach()))",
        ),
        ("dpo: pair swapped", "margin = beta * chosen - beta * rejected", "margin = beta * rejected - beta * chosen"),
        ("dpo: beta left out", "margin = beta * chosen - beta * rejected", "margin = chosen - rejected"),
        (
            "dpo: beta of the difference",
            "margin = beta * chosen - beta * rejected",
            "margin = beta * (chosen - rejected)",
        ),
        (
            "dpo: smoothing adds",
            "- label_smoothing * F.logsigmoid(-margin)",
            "+ label_smoothing * F.logsigmoid(-margin)",
        ),
        ("dpo: smoothing of the same label", "F.logsigmoid(-margin)", "F.logsigmoid(margin)"),
        ("dpo: smoothing of 1", "-(1.0 - label_smoothing) *", "-1.0 *"),
        (
            "dpo: masked pairs cost log 2",
            'weighted_sum("dpo_loss", torch.where(mask, per_pair, 0.0)',
            'weighted_sum("dpo_loss", per_pair',
        ),
        ("ipo: margin of 1 / beta", "- 0.5 / beta", "- 1.0 / beta"),
        ("ipo: margin times beta", "- 0.5 / beta", "- 0.5 * beta"),
        ("ipo: margin sign", "- 0.5 / beta", "+ 0.5 / beta"),
        (
            "ipo: masked pairs cost",
            'weighted_sum("ipo_loss", torch.where(mask, per_pair, 0.0)',
            'weighted_sum("ipo_loss", per_pair',
        ),
        ("masked pairs are ties", "torch.where(mask, correct, 0.0).sum()", "correct.sum()"),
        ("a tie counts fully", "0.5 * (chosen == rejected)", "1.0 * (chosen == rejected)"),
        ("metrics attached", "chosen, rejected = chosen.detach(), rejected.detach()", "pass"),
    ),
    *mutants(
        "ensembles",
        ("min is max", "scores.amin(dim=-1)", "scores.amax(dim=-1)"),
        (
            "unbiased variance",
            "mean.unsqueeze(-1)).square().mean(dim=-1)",
            "mean.unsqueeze(-1)).square().sum(dim=-1) / (members - 1)",
        ),
        (
            "deviation for variance",
            "mean.unsqueeze(-1)).square().mean(dim=-1)",
            "mean.unsqueeze(-1)).square().mean(dim=-1).sqrt()",
        ),
        ("error with its sign", "_standardised(gold)).abs())", "_standardised(gold)))"),
        ("gold not standardised", "- _standardised(gold)", "- gold"),
        ("a constant is standardised", "(scores != scores[:1]).any()", "(scores == scores).any()"),
        ("bonus for disagreement", "mean - coef *", "mean + coef *"),
        ("low precision kept", "scores = upcast(scores)", "scores = scores"),
    ),
    *mutants(
        "best_of_n_sampling",
        ("worst of n", "(proxy.unsqueeze(-1) > proxy.unsqueeze(-2))", "(proxy.unsqueeze(-1) < proxy.unsqueeze(-2))"),
        (
            "ties not shared",
            "(share[not_above] - share[below]) / (not_above - below)",
            "share[not_above] - share[below]",
        ),
        ("draws with replacement", "math.comb(rank, n) / subsets", "(rank / count) ** n"),
        ("one sample less", "math.comb(rank, n) / subsets", "math.comb(max(rank - 1, 0), n) / math.comb(count - 1, n)"),
        ("mean for sum", "* values).sum(dim=-1)", "* values).mean(dim=-1)"),
        ("bound without its second term", "math.log(n) - (n - 1) / n", "math.log(n)"),
        ("bound of n + 1", "math.log(n) - (n - 1) / n", "math.log(n) - n / (n + 1)"),
    ),
    *mutants(
        "kl",
        (
            "importance weight inverted",
            "ratio_of(upcast(log_probs) - upcast(old_log_probs.detach()))",
            "ratio_of(upcast(old_log_probs.detach()) - upcast(log_probs))",
        ),
        ("importance weight constant", "return ratio * kl_estimate", "return ratio.detach() * kl_estimate"),
        ("no importance weight", "return ratio * kl_estimate", "return kl_estimate"),
        (
            "importance: reference differentiated",
            "kl_estimate(log_probs, ref_log_probs.detach()",
            "kl_estimate(log_probs, ref_log_probs",
        ),
    ),
    *mutants(
        "advantages",
        ("returns to go: of the last", "gamma=gamma, lam=1.0)[0]", "gamma=gamma, lam=0.0)[0]"),
        (
            "returns to go: undiscounted",
            "torch.zeros_like(rewards), mask, gamma=gamma",
            "torch.zeros_like(rewards), mask, gamma=1.0",
        ),
    ),
    *mutants(
        "monitor.compare",
        ("interval: variance of a population", "known.std(ddof=1)", "known.std()"),
        ("interval: one run less", "student_t(len(known) - 1)", "student_t(len(known))"),
        ("interval: beyond the bounds", "np.maximum(low, metric.low)", "low"),
        ("interval: a mean beyond the bounds", "np.where(mean >= metric.low, ", "np.where(mean == mean, "),
        ("groups: nothing tells runs apart", "for name in differing if name in run)", "for name in ())"),
    ),
    *mutants(
        "evaluate.baselines",
        ("unigram: no smoothing", "minlength=vocab_size) + 1.0", "minlength=vocab_size) + 0.0"),
        ("unigram: of what it learnt from", "[np.concatenate(held_out)]", "[np.concatenate(train)]"),
    ),
    *mutants(
        "train.early_stop",
        ("one step is enough", "min(kls) > _BUDGETS", "max(kls) > _BUDGETS"),
        ("loss: any rise", "last > _DIVERGED * first > 0", "last > first > 0"),
    ),
    *mutants(
        "losses",
        ("sft: sign", 'loss = -weighted_sum("sft_loss"', 'loss = weighted_sum("sft_loss"'),
        ("sft: mask ignored", "torch.where(mask, upcast(log_probs), 0.0), mask, weights)", "log_probs, mask, weights)"),
        ("weights: mean for sum", "return per_entry.sum()", "return per_entry.mean()"),
        ("weights: masked ones count", "torch.where(mask, _constant(weights), 0.0)", "_constant(weights)"),
        ("weights: differentiated", "torch.where(mask, _constant(weights), 0.0)", "torch.where(mask, weights, 0.0)"),
        (
            "sft: low precision kept",
            "torch.where(mask, upcast(log_probs), 0.0), mask",
            "torch.where(mask, log_probs, 0.0), mask",
        ),
        ("sft: metric attached", '"loss/sft_sum": loss.detach()', '"loss/sft_sum": loss'),
        (
            "sft: count of all",
            'loss.detach(), "count": mask.sum()',
            'loss.detach(), "count": torch.ones_like(mask).sum()',
        ),
        ("reward: pair swapped", "difference = chosen - rejected", "difference = rejected - chosen"),
        ("reward: unstable log", "-F.logsigmoid(required)", "-torch.sigmoid(required).log()"),
        ("reward: logsigmoid sign", "-F.logsigmoid(required)", "-F.logsigmoid(-required)"),
        (
            "reward: margin sign",
            "difference - torch.where(mask, _constant(margin",
            "difference + torch.where(mask, _constant(margin",
        ),
        ("reward: centring of the difference", "(chosen + rejected).square()", "(chosen - rejected).square()"),
        ("reward: centring not squared", "(chosen + rejected).square()", "(chosen + rejected)"),
        ("reward: tie counts fully", "0.5 * (difference == 0)", "1.0 * (difference == 0)"),
        ("reward: accuracy after margin", "correct = (difference > 0)", "correct = (required > 0)"),
        ("reward: masked pairs cost log 2", "torch.where(mask, per_pair, 0.0), mask", "per_pair, mask"),
        ("reward: masked pairs are ties", "torch.where(mask, correct, 0.0).sum()", "correct.sum()"),
        ("reward: margin metric", '"reward/margin_sum": difference', '"reward/margin_sum": required'),
        (
            "policy: ratio inverted",
            "log_ratio = torch.where(mask, upcast(log_probs), 0.0) - torch.where(mask, _constant(old_log_probs), 0.0)",
            "log_ratio = torch.where(mask, _constant(old_log_probs), 0.0) - torch.where(mask, upcast(log_probs), 0.0)",
        ),
        ("policy: log-probs unmasked", "torch.where(mask, upcast(log_probs), 0.0) - ", "log_probs - "),
        ("policy: ratio overflows", "ratio = ratio_of(log_ratio)", "ratio = log_ratio.exp()"),
        ("policy: constants differentiated", "return upcast(x.detach())", "return upcast(x)"),
        ("constants of low precision", "return upcast(x.detach())", "return x.detach()"),
        ("policy: ratio not exponentiated", "ratio = ratio_of(log_ratio)", "ratio = 1.0 + log_ratio"),
        ("policy: sign", "unclipped = -ratio * advantages", "unclipped = ratio * advantages"),
        ("policy: no lower clip", "ratio.clamp(min=1.0 - clip_eps).clamp(max", "ratio.clamp(max"),
        ("policy: no upper clip", ".clamp(max=1.0 + high)", ""),
        (
            "policy: clip around 0",
            "ratio.clamp(min=1.0 - clip_eps).clamp(max=1.0 + high)",
            "ratio.clamp(-clip_eps, high)",
        ),
        ("policy: one clip for both", "high = clip_eps if clip_eps_high is None else clip_eps_high", "high = clip_eps"),
        (
            "policy: optimistic bound",
            "torch.maximum(unclipped, clipped)\n    if",
            "torch.minimum(unclipped, clipped)\n    if",
        ),
        ("policy: always clipped", "per_token = torch.maximum(unclipped, clipped)", "per_token = clipped"),
        ("policy: never clipped", "per_token = torch.maximum(unclipped, clipped)", "per_token = unclipped"),
        ("policy: dual clip of good tokens", "torch.where(advantages < 0, torch", "torch.where(advantages > 0, torch"),
        ("policy: dual clip from below", "torch.minimum(per_token", "torch.maximum(per_token"),
        ("policy: dual clip sign", "-dual_clip * advantages", "dual_clip * advantages"),
        (
            "policy: clip fraction with ties",
            '"policy/clipfrac_avg_sum": (clipped > unclipped)',
            '"policy/clipfrac_avg_sum": (clipped >= unclipped)',
        ),
        ("policy: KL without half", "0.5 * log_ratio.detach()", "log_ratio.detach()"),
        ("policy: ratio of masked tokens", "torch.where(mask, ratio, 0.0).detach()", "ratio.detach()"),
        ("policy: default clip", "    clip_eps: float | Tensor = 0.2", "    clip_eps: float | Tensor = 0.1"),
        ("value: clip around 0", "old_values - value_clip_eps, old_values +", "-value_clip_eps, 0.0 * old_values +"),
        (
            "value: clip of the error",
            "clipped = (values - returns).square(), (within",
            "clipped = (within - returns).square(), (values",
        ),
        ("value: smaller error", "torch.maximum(unclipped, clipped), mask", "torch.minimum(unclipped, clipped), mask"),
        ("value: without half", "loss = 0.5 * weighted_sum", "loss = weighted_sum"),
        ("value: clipped to the old value", "(within - returns).square()", "(within - old_values).square()"),
        ("value: not squared", "(within - returns).square()", "(within - returns).abs()"),
        ("value: mask ignored", "torch.where(mask, x, 0.0) for x in (upcast(values)", "x for x in (upcast(values)"),
        ("value: metric attached", '"loss/value_avg_sum": loss.detach()', '"loss/value_avg_sum": loss'),
    ),
    *mutants(
        "advantages",
        ("rewards: KL sign", "-kl_coef * upcast(kl)", "kl_coef * upcast(kl)"),
        ("rewards: score first", "== mask.sum(dim=-1, keepdim=True))", "== 1)"),
        ("rewards: score in the last column", "== mask.sum(dim=-1, keepdim=True))", "== mask.shape[-1])"),
        (
            "rewards: score before every hole",
            "last = mask & (mask.cumsum(dim=-1) == mask.sum(dim=-1, keepdim=True))",
            "last = mask & ~_shift(mask, 1)",
        ),
        (
            "rewards: score on the holes behind",
            "last = mask & (mask.cumsum",
            "last = (mask.cumsum",
        ),
        ("rewards: score on every token", "torch.where(last, upcast(scores", "torch.where(mask, upcast(scores"),
        ("rewards: low precision kept", "torch.where(mask, -kl_coef * upcast(kl)", "torch.where(mask, -kl_coef * kl"),
        ("rewards: no KL on the last token", "torch.where(mask, -kl_coef", "torch.where(mask & ~last, -kl_coef"),
        ("rewards: mask ignored", "torch.where(mask, -kl_coef * upcast(kl), 0.0)", "-kl_coef * kl"),
        ("TD error: no discount", "gamma * next_values - values", "next_values - values"),
        ("TD error: no bootstrap", "rewards + gamma * next_values - values", "rewards - values"),
        ("TD error: sign of the value", "gamma * next_values - values", "gamma * next_values + values"),
        (
            "hidden values kept",
            "(torch.where(mask, upcast(x), 0.0) for x in",
            "(upcast(x).nan_to_num(0.0) for x in",
        ),
        ("low precision kept", "(torch.where(mask, upcast(x), 0.0) for x in", "(torch.where(mask, x, 0.0) for x in"),
        ("TD error: value of the same token", "_shift(values_in_front, 1))", "values_in_front)"),
        ("TD error: bootstrap nowhere", "last = inside & ~_shift(inside, 1)", "last = inside & ~inside"),
        ("TD error: bootstrap everywhere", "last = inside & ~_shift(inside, 1)", "last = inside"),
        (
            "bootstrap of low precision",
            "return rewards, values, upcast(bootstrap_value)",
            "return rewards, values, bootstrap_value",
        ),
        ("holes: order not kept", "argsort((~mask).to", "argsort(mask.to"),
        (
            "holes: not cut out",
            "front = torch.argsort((~mask).to(torch.uint8), dim=-1, stable=True)",
            "front = torch.arange(mask.shape[-1]).expand(mask.shape)",
        ),
        (
            "holes: results not put back",
            "torch.where(mask, advantages.gather(-1, place), 0.0)",
            "torch.where(mask, advantages, 0.0)",
        ),
        ("holes: off by one", "(mask.cumsum(dim=-1) - 1)", "mask.cumsum(dim=-1)"),
        ("gae: lambda missing", "advantages.shape[-1], gamma * lam, 1", "advantages.shape[-1], gamma, 1"),
        ("gae: gamma missing", "advantages.shape[-1], gamma * lam, 1", "advantages.shape[-1], lam, 1"),
        ("gae: stops one doubling early", "while reach < steps:", "while 2 * reach < steps:"),
        ("gae: decay not raised", "decay**reach * _shift", "decay * _shift"),
        ("gae: reach not doubled", "reach *= 2", "reach += 2"),
        ("gae: looks one too far", "_shift(advantages, reach)", "_shift(advantages, reach + 1)"),
        (
            "gae: returns without values",
            "advantages.gather(-1, place), 0.0)\n    return advantages, advantages + values",
            "advantages.gather(-1, place), 0.0)\n    return advantages, advantages",
        ),
        (
            "gae: default lambda",
            '= 0.95,\n    bootstrap_value: Tensor | None = None,\n) -> tuple[Tensor, Tensor]:\n    """Return gen',
            '= 0.9,\n    bootstrap_value: Tensor | None = None,\n) -> tuple[Tensor, Tensor]:\n    """Return gen',
        ),
        ("gae: lambda unchecked", "check_value(function, (lam >= 0) & (lam <= 1)", "check_value(function, lam >= 0"),
        ("gae_loop: lambda missing", "gamma * lam * advantage", "gamma * advantage"),
        ("gae_loop: in reverse", "columns[::-1]", "columns"),
        (
            "gae_loop: value of a hole",
            "next_value = torch.where(mask[..., t], values[..., t], next_value)",
            "next_value = values[..., t]",
        ),
        (
            "gae_loop: decays over holes",
            "delta + gamma * lam * advantage, advantage)",
            "delta + gamma * lam * advantage, gamma * lam * advantage)",
        ),
        ("gamma: tensors are read", "(gamma >= 0) & (gamma <= 1)", "0 <= gamma <= 1"),
    ),
    *mutants(
        "kl",
        (
            "estimates: direction",
            "difference = upcast(log_probs) - upcast(ref_log_probs)",
            "difference = ref_log_probs - log_probs",
        ),
        ("k2: without half", "0.5 * difference.square()", "difference.square()"),
        ("budget: sign", "used = kl / budget", "used = budget / kl"),
        ("budget: no floor", "return max(floor, raised)", "return raised"),
        ("budget: no bound", "min(max(used, 1 / most), most)", "used"),
        ("estimates: low precision kept", "upcast(log_probs) - upcast(ref_log_probs)", "log_probs - ref_log_probs"),
        ("k3: other direction", "torch.expm1((-difference).clamp", "torch.expm1(difference.clamp"),
        ("k3: not unbiased", "_beyond(-difference) + difference", "_beyond(-difference)"),
        ("k3: rounding", "torch.expm1((-difference).clamp(max=MAX_LOG_RATIO))", "(torch.exp(-difference) - 1.0)"),
        ("k3: overflows", "torch.expm1((-difference).clamp(max=MAX_LOG_RATIO))", "torch.expm1(-difference)"),
        ("k3: flat above the bound", " + _beyond(-difference)", ""),
        ("ratio: overflows", "log_ratio.clamp(max=MAX_LOG_RATIO).exp()", "log_ratio.exp()"),
        ("ratio: flat above the bound", ".exp() + _beyond(log_ratio)", ".exp()"),
        (
            "ratio: bounded below too",
            "log_ratio.clamp(max=MAX_LOG_RATIO)",
            "log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)",
        ),
        ("ratio: a bound of ordinary ratios", "MAX_LOG_RATIO = 20.0", "MAX_LOG_RATIO = 10.0"),
        ("exact: 0 times infinity", "torch.where(impossible | unsupported, 0.0, log_p - log_q)", "log_p - log_q"),
        (
            "exact: finite without support",
            "torch.where(unsupported, torch.inf, log_p.exp() * difference)",
            "(log_p.exp() * difference)",
        ),
        ("exact: infinite where both are impossible", "& ~impossible", ""),
        ("exact: weighted by the reference", "log_p.exp() *", "log_q.exp() *"),
        ("exact: sign", "0.0, log_p - log_q)", "0.0, log_q - log_p)"),
        ("exact: reference at temperature 1", "scale_logits(ref_logits, temperature)", "scale_logits(ref_logits, 1.0)"),
        ("exact: policy at temperature 1", "scale_logits(logits, temperature)", "scale_logits(logits, 1.0)"),
        ("exact: mean for sum", "difference).sum(dim=-1)", "difference).mean(dim=-1)"),
        ("controller: no upper clip", "min(max(error, -0.2), 0.2)", "max(error, -0.2)"),
        ("controller: no lower clip", "min(max(error, -0.2), 0.2)", "min(error, 0.2)"),
        ("controller: absolute error", "kl / target - 1.0", "kl - target"),
        ("controller: number of samples", "error * num_samples / horizon", "error / horizon"),
        ("controller: sign", "(1.0 + error *", "(1.0 - error *"),
        ("controller: default target", "target: float | Tensor = 6.0", "target: float | Tensor = 5.0"),
    ),
    *mutants(
        "ops",
        (
            "sum: multiplies by the mask",
            "torch.where(mask, upcast(values), 0.0).sum()",
            "(upcast(values) * mask).sum()",
        ),
        (
            "sum: low precision kept",
            "torch.where(mask, upcast(values), 0.0).sum()",
            "torch.where(mask, values, 0.0).sum()",
        ),
        ("variance: low precision kept", "values = upcast(values)\n", "values = values\n"),
        (
            "whiten: low precision kept",
            "values = torch.where(mask, upcast(values), 0.0)",
            "values = torch.where(mask, values, 0.0)",
        ),
        ("entropy: 0 times infinity", "torch.where(scaled == -torch.inf, 0.0, scaled)", "scaled"),
        ("sum: mask ignored", "torch.where(mask, upcast(values), 0.0).sum()", "upcast(values).sum()"),
        ("mean: over everything", "/ mask.sum().clamp(min=1)", "/ mask.numel()"),
        ("mean: nothing is NaN", "/ mask.sum().clamp(min=1)", "/ mask.sum()"),
        ("variance: always biased", "(count - int(unbiased))", "count"),
        ("variance: always unbiased", "(count - int(unbiased))", "(count - 1)"),
        ("variance: nothing is NaN", "(count - int(unbiased)).clamp(min=1)", "(count - int(unbiased))"),
        ("whiten: no epsilon", "torch.rsqrt(variance + _VARIANCE_EPS)", "torch.rsqrt(variance)"),
        ("whiten: larger epsilon", "_VARIANCE_EPS = 1e-8", "_VARIANCE_EPS = 1e-5"),
        ("whiten: by the variance", "torch.rsqrt(variance + _VARIANCE_EPS)", "(variance + _VARIANCE_EPS).reciprocal()"),
        ("whiten: mean not taken off", "(values - mean) * torch.rsqrt", "values * torch.rsqrt"),
        (
            "whiten: shift inverted",
            "whitened if shift_mean else whitened + mean",
            "whitened + mean if shift_mean else whitened",
        ),
        ("whiten: always biased", "masked_var(values, mask, unbiased=unbiased)", "masked_var(values, mask)"),
        (
            "whiten: masked positions kept",
            "torch.where(mask, whitened if shift_mean else whitened + mean, 0.0)",
            "whitened if shift_mean else whitened + mean",
        ),
        (
            "whiten: mean returned at masked positions",
            "whitened if shift_mean else whitened + mean, 0.0)",
            "whitened if shift_mean else whitened + mean, mean)",
        ),
        (
            "log-probs: not normalised",
            "target_logits(scaled, targets) - torch.logsumexp(scaled, dim=-1)",
            "target_logits(scaled, targets)",
        ),
        (
            "log-probs: sign of the normaliser",
            "target_logits(scaled, targets) - torch.logsumexp(scaled, dim=-1)",
            "target_logits(scaled, targets) + torch.logsumexp(scaled, dim=-1)",
        ),
        (
            "log-probs: normaliser at temperature 1",
            "target_logits(scaled, targets) - torch.logsumexp(scaled,",
            "target_logits(scaled, targets) - torch.logsumexp(logits,",
        ),
        (
            "log-probs: logit at temperature 1",
            "return target_logits(scaled, targets) - ",
            "return target_logits(logits, targets) - ",
        ),
        (
            "log-probs: overflow",
            "target_logits(scaled, targets) - torch.logsumexp(scaled, dim=-1)",
            "target_logits(scaled, targets) - scaled.exp().sum(dim=-1).log()",
        ),
        ("entropy: sign", "torch.logsumexp(scaled, dim=-1) - (torch", "torch.logsumexp(scaled, dim=-1) + (torch"),
        ("entropy: weights at temperature 1", "torch.softmax(scaled, dim=-1)", "torch.softmax(logits, dim=-1)"),
        ("entropy: logits at temperature 1", "* possible).sum(dim=-1)", "* logits).sum(dim=-1)"),
        ("entropy: no normaliser", "torch.logsumexp(scaled, dim=-1) - (torch", "-(torch"),
        ("temperature: multiplied", "wide / temperature", "wide * temperature"),
        ("temperature: low precision kept", "else x.float()", "else x"),
        ("temperature: zero allowed", "temperature > 0", "temperature >= 0"),
        ("metrics: count kept", ' if name != "count"}', "}"),
        ("accuracy: of the others", ">= scaled.amax(dim=-1, keepdim=True)", "< scaled.amax(dim=-1, keepdim=True)"),
        ("accuracy: ties do not count", ">= scaled.amax(dim=-1, keepdim=True)", "> scaled.amax(dim=-1, keepdim=True)"),
        ("metrics: count of 0", 'torch.where(sums["count"] == 0, 1, sums["count"])', 'sums["count"]'),
    ),
    *mutants(
        "kernels.compiled_ops",
        ("another token", "token == targets.int().unsqueeze(-1)", "token > targets.int().unsqueeze(-1)"),
    ),
    *mutants(
        "experience",
        (
            "scores: clip after the penalty",
            "return clipped - missing_eos_penalty * (~ended).to(scores.dtype)",
            "return (scores - missing_eos_penalty * (~ended).to(scores.dtype)).clamp(-clip, clip)",
        ),
        ("scores: the ended are penalised", "(~ended).to", "ended.to"),
        ("scores: penalty is a prize", "return clipped - missing", "return clipped + missing"),
        ("scores: clipped above only", "torch.clamp(scores, -clip, clip)", "torch.clamp(scores, max=clip)"),
        ("KL of masked tokens", "kl = torch.where(mask, kl, 0.0)", "kl = kl.nan_to_num(0.0, 0.0, 0.0)"),
        ("KL twice", "penalty = 0.0 if kl_in_loss else kl_coef", "penalty = kl_coef"),
        ("KL nowhere", "penalty = 0.0 if kl_in_loss else kl_coef", "penalty = 0.0"),
        ("KL arguments swapped", "kl_estimate(log_probs, ref_log_probs,", "kl_estimate(ref_log_probs, log_probs,"),
        ("rewards whitened to mean 0", "whiten(rewards, mask, shift_mean=False)", "whiten(rewards, mask)"),
        (
            "rewards whitened without mask",
            "whiten(rewards, mask, shift_mean=False)",
            "whiten(rewards, shift_mean=False)",
        ),
        ("rewards always whitened", "if whiten_rewards:", "if True:"),
        ("estimator: values for rewards", "        rewards=rewards,", "        rewards=values,"),
        ("estimator: gamma and lambda swapped", "gamma=gamma,\n        lam=lam,", "gamma=lam,\n        lam=gamma,"),
        (
            "estimator: bootstrap value dropped",
            "=None if bootstrap_value is None else bootstrap_value.detach()",
            "=None",
        ),
        ("estimator: groups dropped", "groups=groups", "groups=None"),
        ("estimator: masked advantages kept", "torch.where(mask, upcast(advantages), 0.0)", "upcast(advantages)"),
        (
            "estimator: low precision kept",
            "torch.where(mask, upcast(advantages), 0.0)",
            "torch.where(mask, advantages, 0.0)",
        ),
        ("estimator: shape unchecked", "check_same_shape(function, mask=mask, advantages=advantages)", "pass"),
        ("estimator: critic unchecked", "(x is not None) == estimator.needs_critic", "True"),
        ("inputs differentiated", "upcast(x.detach()) for x in", "upcast(x) for x in"),
        ("inputs of low precision", "(upcast(x.detach()) for x in", "(x.detach() for x in"),
        ("bootstrap value differentiated", "else bootstrap_value.detach()", "else bootstrap_value"),
        ("non-score reward: sign", "non_score = -penalty", "non_score = penalty"),
        ("non-score reward: with the KL in the loss", "non_score = -penalty", "non_score = -kl_coef"),
        ("metric: KL per token", '"objective/kl": kl.sum(dim=-1).mean()', '"objective/kl": kl.mean()'),
        ("metric: entropy sign", "-torch.where(mask, log_probs, 0.0)", "torch.where(mask, log_probs, 0.0)"),
        ("metric: rlhf reward", "(scores + non_score).mean()", "(scores - non_score).mean()"),
        ("metric: mean of values unmasked", "masked_mean(values, mask)", "values.mean()"),
        ("metric: unexplained for explained", "1.0 - unexplained}", "unexplained}"),
        (
            "metric: explained variance of the values",
            "masked_var(returns, mask).clamp",
            "masked_var(values, mask).clamp",
        ),
        (
            "metric: length of everything",
            "mask.sum(dim=-1).float().mean()",
            "torch.ones_like(mask).sum(dim=-1).float().mean()",
        ),
        ("advantages never whitened", "whiten(advantages, mask) if whiten_advantages else advantages", "advantages"),
        ("advantages whitened without mask", "whiten(advantages, mask) if", "whiten(advantages) if"),
        ("advantages whitened unbiased", "whiten(advantages, mask) if", "whiten(advantages, mask, unbiased=True) if"),
        ("advantages keep their mean", "whiten(advantages, mask) if", "whiten(advantages, mask, shift_mean=False) if"),
    ),
    *mutants(
        "optim",
        ("mu: gradient not weighted", "m * b1 + g * (1.0 - b1)", "m * b1 + g"),
        ("mu: decay missing", "m * b1 + g * (1.0 - b1)", "m + g * (1.0 - b1)"),
        ("nu: gradient not squared", "g * g * (1.0 - b2)", "g.abs() * (1.0 - b2)"),
        ("nu: b1 for b2", "v * b2 + g * g * (1.0 - b2)", "v * b1 + g * g * (1.0 - b1)"),
        ("mean not corrected", "rate / (1.0 - b1 ** step.double())", "rate"),
        ("root not corrected", "(1.0 - b2 ** step.double()).sqrt()", "torch.ones_like(rate)"),
        ("root corrected without root", "(1.0 - b2 ** step.double()).sqrt()", "1.0 - b2 ** step.double()"),
        ("correction one step late", "1.0 - b2 ** step.double()", "1.0 - b2 ** (step + 1).double()"),
        ("rate of the next step", "rate = schedule(state.step) if", "rate = schedule(state.step + 1) if"),
        (
            "rate: the caller's ignored",
            "schedule(state.step) if learning_rate is None else learning_rate",
            "schedule(state.step)",
        ),
        (
            "step not counted",
            "hyperparameters), AdamState(step, mu, nu)",
            "hyperparameters), AdamState(state.step, mu, nu)",
        ),
        ("state swapped", "hyperparameters), AdamState(step, mu, nu)", "hyperparameters), AdamState(step, nu, mu)"),
        ("decay without rate", "1.0 - rate * (decay * factor)", "1.0 - decay * factor"),
        ("decay: sign", "1.0 - rate * (decay * factor)", "1.0 + rate * (decay * factor)"),
        ("decay: lr_multiplier ignored", "rate * (decay * factor)", "rate * decay"),
        ("decay of everything", "weight_decay if decays else 0.0", "weight_decay"),
        ("decay: vectors too", "leaf.ndim >= 2", "leaf.ndim >= 1"),
        ("decay: mask ignored", "(weight_decay_mask or _is_matrix)", "_is_matrix"),
        ("lr_multiplier: records ignore it", "(lr_multiplier or _ones)", "_ones"),
        ("lr_multiplier 0: signs of zeros", "if factor == 0:", "if False:"),
        (
            "hyperparameters of whole leaves ignored",
            "leaf_hyperparameters(params) if hyperparameters is None else hyperparameters",
            "leaf_hyperparameters(params)",
        ),
        ("step: lr_multiplier ignored", "(step_size * factor)", "step_size"),
        ("step: sign", "decayed - m /", "decayed + m /"),
        ("step: epsilon in the root", "(v.sqrt() / root_scale + eps)", "((v + eps).sqrt() / root_scale)"),
        ("step: epsilon corrected", "(v.sqrt() / root_scale + eps)", "((v.sqrt() + eps) / root_scale)"),
        ("step: no root", "(v.sqrt() / root_scale + eps)", "(v / root_scale + eps)"),
        ("default b2", "b2: float = 0.999", "b2: float = 0.99"),
        ("b1 of 1 allowed", "(b1 < 1)", "(b1 <= 1)"),
        ("clip: enlarges", "(max_norm / (norm + 1e-6)).clamp(max=1.0)", "max_norm / (norm + 1e-6)"),
        ("clip: without 1e-6", "return (max_norm / (norm + 1e-6))", "return (max_norm / norm)"),
        ("clip: inverted", "return (max_norm / (norm + 1e-6))", "return ((norm + 1e-6) / max_norm)"),
        ("clip: norm given is ignored", "global_norm(grads) if norm is None else norm", "global_norm(grads)"),
    ),
    *mutants(
        "kernels.fused_adamw",
        (
            "rate of the next step",
            "float(record.learning_rate(state.step))",
            "float(record.learning_rate(state.step + 1))",
        ),
        ("rate: the caller's ignored", " if learning_rate is None else learning_rate", ""),
        ("step of the next", "[step.float().to(", "[(step + 1).float().to("),
        ("step not counted", "state._replace(step=step)", "state"),
        ("lr_multiplier ignored", "lr=rate * record.lr_multiplier", "lr=rate"),
        ("lr_multiplier 0: signs of zeros", "[leaf.clone() for leaf in p]", "list(p)"),
        ("decay ignored", "weight_decay=record.weight_decay", "weight_decay=0.0"),
        ("epsilon", "eps=record.eps,", "eps=0.0,"),
        ("gradient not scaled", "grad_scale=divisor", "grad_scale=None"),
        ("gradient scaled the other way", "torch.tensor(1.0 / scale,", "torch.tensor(scale,"),
        ("moments exchanged", "state.mu[name], state.nu[name])", "state.nu[name], state.mu[name])"),
        ("any record is taken", "isinstance(record, AdamWHyperparameters)", "True"),
    ),
    *mutants(
        "random",
        (
            "key: words swapped",
            "[_signed(seed >> 32), _signed(seed & (_WORD - 1))]",
            "[_signed(seed & (_WORD - 1)), _signed(seed >> 32)]",
        ),
        ("key: high word lost", "_signed(seed >> 32)", "0"),
        ("key: more than 64 bits", "0 <= seed < _WORD**2", "0 <= seed"),
        ("fold_in: among the positions", "_FOLD = -(1 << 31)", "_FOLD = 0"),
        ("split: from 1", "torch.arange(num,", "torch.arange(1, num + 1,"),
        ("hash: rotation", "(13, 15, 26, 6)", "(13, 15, 26, 7)"),
        ("hash: parity", "0x1BD11BDA", "0x1BD11BDB"),
        ("hash: 16 rounds", "range(5)", "range(4)"),
        ("hash: injection", "+ (group + 1)\n", "+ group\n"),
        ("hash: sign bits rotated in", " & ((1 << distance) - 1))", ")"),
        ("position: high word lost", "(data >> 32).int()", "(data >> 63).int()"),
        ("uniform_at: words exchanged", "high, low = bits(key, position)", "low, high = bits(key, position)"),
        ("uniform_at: first word alone", "((low.long() >> 11) & ((1 << 21) - 1))", "0"),
        ("uniform: low bits", "(word >> 9) & 0x7FFFFF", "word & 0x7FFFFF"),
        ("uniform: up to 2", ".float() * 2.0**-23", ".float() * 2.0**-22"),
        (
            "block: positions start again",
            "torch.arange(start, min(start + _BLOCK, n),",
            "torch.arange(0, min(_BLOCK, n - start),",
        ),
        ("block: overlap", "range(0, max(n, 1), _BLOCK)", "range(0, max(n, 1), _BLOCK - 1)"),
        ("normal: radius", "torch.sqrt(-2.0 *", "torch.sqrt(-1.0 *"),
        ("normal: half the circle", "2.0 * math.pi * _unit", "math.pi * _unit"),
        ("normal: cosine twice", "radius * torch.sin(angle)", "radius * torch.cos(angle)"),
        ("permutation: low words alone", "high.long() * _WORD +", "high.long() * 0 +"),
        ("permutation: of the words", "return torch.argsort(", "return torch.add(0, "),
    ),
    *mutants(
        "tree",
        ("alignment", "ALIGNMENT = 64", "ALIGNMENT = 32"),
        ("chunk", "CHUNK = 4096", "CHUNK = 8192"),
        (
            "named_leaves: unsorted",
            "return dict(sorted(named.items()))",
            "return named",
        ),
        ("with_leaves: unknown names", "if missing or unknown:", "if missing:"),
        ("cast: integers too", "leaf.to(dtype) if leaf.is_floating_point() else leaf", "leaf.to(dtype)"),
        ("all_finite: one is enough", "torch.isfinite(leaf).all()", "torch.isfinite(leaf).any()"),
        ("tree_sum: one after the other", "partial[-1][0] == size", "partial[-1][0] >= size"),
        (
            "tree_sum: rest from the left",
            "while partial:\n        _, left = partial.pop()",
            "while partial:\n        _, left = partial.pop(0)",
        ),
        ("layout: not aligned", "_round_up(leaf.numel(), ALIGNMENT)", "leaf.numel()"),
        ("layout: not padded", "size=_round_up(size, CHUNK)", "size=size"),
        ("layout: rounded down", "-(-n // multiple) * multiple", "n // multiple * multiple"),
        ("flatten: structure unchecked", "spec != layout.spec or [", "["),
        ("flatten: shapes unchecked", "[leaf.shape for leaf in in_order] != shapes", "len(in_order) != len(shapes)"),
        ("flatten: gaps not zero", "part.new_zeros(end", "part.new_ones(end"),
        ("unflatten: copies", ".view(shape)", ".view(shape).clone()"),
        ("unflatten: in sorted order", "[views[index] for index in layout.order]", "views"),
        ("chunked_squared_norms: norms", "dim=1).double().square()", "dim=1).double()"),
        ("global_norm: squared", ".sum().sqrt()", ".sum()"),
    ),
    *mutants(
        "schedules",
        ("warm-up: from 0", "(step.double() + 1.0)", "step.double()"),
        ("warm-up: one shorter", "/ (warmup_steps + 1.0)", "/ max(warmup_steps, 1.0)"),
        ("warm-up: never ends", ").clamp(max=1.0)", ")"),
        ("fall: during the warm-up", "(step.double() - warmup_steps) /", "step.double() /"),
        ("fall: past the end", ".clamp(0.0, 1.0)", ".clamp(min=0.0)"),
        ("fall: too slow", "/ (total_steps - warmup_steps)", "/ total_steps"),
        ("linear: to 0", "value + (final - value) * progress", "value - value * progress"),
        ("cosine: to 0", "final + (value - final) * 0.5", "value * 0.5"),
        ("cosine: rises", "1.0 + torch.cos", "1.0 - torch.cos"),
        ("cosine: whole wave", "torch.cos(math.pi * progress)", "torch.cos(2.0 * math.pi * progress)"),
        ("check: nothing but warm-up", "0 <= warmup_steps < total_steps", "0 <= warmup_steps <= total_steps"),
    ),
    *mutants(
        "models.heads",
        ("reward: std", "(n_embd + 1) ** 0.5", "n_embd**0.5"),
        ("value: not zero", '"weight": torch.zeros(1, n_embd)', '"weight": torch.ones(1, n_embd)'),
        ("critic: mean added", "-mean * weight / std", "mean * weight / std"),
        ("critic: mean not scaled", "-mean * weight / std", "-mean"),
        ("critic: std ignored", 'head["weight"] * weight / std', 'head["weight"] * weight'),
        ("apply: low precision", 'torch.promote_types(head["weight"].dtype, torch.float32)', 'head["weight"].dtype'),
        ("apply: bias ignored", 'if "bias" in head else scalar', 'if "offset" in head else scalar'),
    ),
    *mutants(
        "statistics",
        ("ranks: ties are the last", "(equal.double().sum(dim=-1) + 1.0) / 2.0", "equal.double().sum(dim=-1)"),
        ("ranks: NaN is a number", "torch.where(undefined, torch.nan,", "torch.where(False & undefined, torch.nan,"),
        ("correlation: covariance", "/ (x.square().sum() * y.square().sum()).sqrt()", "/ x.numel()"),
        (
            "correlation: no root",
            "(x.square().sum() * y.square().sum()).sqrt()",
            "(x.square().sum() * y.square().sum())",
        ),
        ("accuracy: ties lose", "0.5 * (chosen == rejected)", "0.0 * (chosen == rejected)"),
        ("margin: sign", "(chosen - rejected).mean()", "(rejected - chosen).mean()"),
        ("minimum of the chosen", "scores.min()", "chosen.min()"),
        (
            "lengths swapped",
            "torch.cat([chosen_lengths, rejected_lengths])",
            "torch.cat([rejected_lengths, chosen_lengths])",
        ),
        ("interval: 2 for 1.96", "1.96 *", "2.0 *"),
        ("interval: biased", "values.std()", "values.std(correction=0)"),
        ("interval: of one value", "values.numel() ** 0.5", "1"),
        ("interval: in float32", "values = values.double()", "values = values.float()"),
        ("interval: one value is enough", "values.numel() < 2", "values.numel() < 1"),
        ("reliability: not of the preferred", "torch.sigmoid(margins.abs())", "torch.sigmoid(margins)"),
        (
            "reliability: upper edge in the next bin",
            "torch.bucketize(confidence, edges)",
            "torch.bucketize(confidence, edges, right=True)",
        ),
        ("reliability: ties are right", "0.5 * (margins == 0)", "1.0 * (margins == 0)"),
        ("reliability: bins over [0, 1]", "torch.linspace(0.5, 1.0, bins + 1", "torch.linspace(0.0, 1.0, bins + 1"),
        ("calibration: gaps cancel", "gaps.abs().sum()", "gaps.sum().abs()"),
        ("calibration: mean of bins", "gaps.abs().sum() / max(len(margins), 1)", "gaps.abs().mean()"),
        ("repetition: share of the distinct", "1.0 - len(set(grams)) / len(grams)", "len(set(grams)) / len(grams)"),
        ("diversity: sole counts tokens", "== 1 for gram in set(text)", "== 1 for gram in text"),
        ("diversity: holders by occurrence", "in grams for gram in set(text)", "in grams for gram in text"),
        ("n-grams: the last is missing", "range(len(tokens) - n + 1)", "range(len(tokens) - n)"),
    ),
    *mutants(
        "evaluate.measures",
        (
            "log-probs at temperature 1",
            "log_probs = token_log_probs(logits, targets, temperature=temperature)\n        ref_log_probs =",
            "log_probs = token_log_probs(logits, targets)\n        ref_log_probs =",
        ),
        ("entropy at temperature 1", "entropy(logits, temperature=temperature)", "entropy(logits)"),
        ("KL turned around", "exact_kl(logits, ref_logits,", "exact_kl(ref_logits, logits,"),
        ("reference in the model's shape", '"reference": reference}', '"reference": config}'),
        ("predictors of another model", "at_predictors(models[name]", 'at_predictors(models["model"]'),
        ("reward models left out", "reward_scores(frozen, batch, reward_models,", "reward_scores(frozen, batch, (),"),
    ),
    *mutants(
        "kernels.recomputation",
        (
            "gradients of another argument",
            "for place in range(len(leaves)))",
            "for place in reversed(range(len(leaves))))",
        ),
        ("gradient of the output ignored", "(output * gradient).sum()", "output.sum()"),
        ("one output alone", "functools.reduce(torch.add, sums)", "sums[-1]"),
        ("everything kept", "return _Remat.apply(function, structure, *leaves)", "return function(*arguments)"),
        ("chunks: one more", "torch.split(column, size)", "torch.split(column, size + 1)"),
        ("chunks: never", "len(columns[0]) <= size", "True"),
        ("chunks: kept", "again = remat(lambda function: function, function)", "again = function"),
    ),
    *mutants(
        "models.attention",
        ("attention sees what comes", "device=device).tril()", "device=device).tril(1)"),
        ("attention misses itself", "device=device).tril()", "device=device).tril(-1)"),
        ("segments: later ones too", "segments[:, :, None] == segments", "segments[:, :, None] >= segments"),
        (
            "segments swapped",
            "causal(segments.shape[1], segments.device) & (",
            "causal(segments.shape[1], segments.device).T & (",
        ),
        ("no scale", "(products * q.shape[-1] ** -0.5 + bias)", "(products + bias)"),
        ("no mask", "(products * q.shape[-1] ** -0.5 + bias)", "(products * q.shape[-1] ** -0.5)"),
        ("causal bias for all", "if bias is None else bias\n    k, v", "if True else bias\n    k, v"),
        (
            "one query: no scale",
            "(scores * q.shape[-1] ** -0.5 + bias[:, None, None])",
            "(scores + bias[:, None, None])",
        ),
        (
            "one query: no mask",
            "(scores * q.shape[-1] ** -0.5 + bias[:, None, None])",
            "(scores * q.shape[-1] ** -0.5)",
        ),
        ("prompts: keys into other rows", "cache.keys[layer][rows,", "cache.keys[layer][rows.flip(0),"),
        ("prompts: values of another", "= v[source]", "= v[source.flip(0)]"),
        (
            "shared keys: in another order",
            "x.repeat_interleave(n_head // x.shape[1], dim=1)",
            "x.repeat(1, n_head // x.shape[1], 1, 1)",
        ),
        (
            "one query, shared keys: in another order",
            "q.view(len(q), keys.shape[1], -1, q.shape[-1])",
            "q.view(len(q), -1, keys.shape[1], q.shape[-1]).transpose(1, 2)",
        ),
        ("decode: written one further", "values[rows, :, lengths] =", "values[rows, :, lengths + 1] ="),
    ),
    *mutants(
        "kernels.fused_attention",
        (
            "compiled: no scale",
            "(q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5",
            "(q @ k.transpose(-1, -2)).float()",
        ),
        ("compiled: no mask", "q.shape[-1] ** -0.5 + bias\n", "q.shape[-1] ** -0.5\n"),
        ("compiled: not divided", " / weights.float().sum(-1, keepdim=True)", ""),
        ("compiled: the gradient of exp", "gradient.float() * exp.float()", "gradient.float()"),
        ("compiled, one query: no scale", "(scores * q.shape[-1] ** -0.5 + bias[:, None])", "(scores + bias[:, None])"),
        ("compiled, one query: sum over slots", "keys.to(wide)).sum(-2)", "keys.to(wide)).sum(-2).flip(-1)"),
        ("fused: no mask", "attn_mask=bias, is_causal=bias is None", "is_causal=True"),
        (
            "compiled: shared keys in another order",
            "x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)",
            "x.repeat(1, q.shape[1] // x.shape[1], 1, 1)",
        ),
        (
            "differentiated twice: the fused pass",
            "if not torch.is_grad_enabled() and not is_transformed():",
            "if True:",
        ),
        ("under transforms: the fused form", "if reference_needed(q, k, v):", "if False:"),
    ),
    *mutants(
        "models.sequences",
        ("join: a place too late", "step < 0, place", "step <= 0, place"),
        ("join: prompts of one length", "width + step", "width + place - width"),
        ("join: padding of prompts kept", "torch.where(inside, tokens, 0)", "tokens"),
        ("join: mask of the padding", ", mask & inside", ", mask"),
    ),
    *mutants(
        "models.gpt2",
        ("norms swapped", 'layer_norm(x, p["ln_2"], eps=eps)', 'layer_norm(x, p["ln_1"], eps=eps)'),
        ("attention: no residual", "x = x + drop(affine(attended_BTD", "x = drop(affine(attended_BTD"),
        ("no final norm", 'return layer_norm(x, params["ln_f"], eps=eps)', "return x"),
        ("no positions", ' + gather_rows(params["wpe"]["weight"], positions)', ""),
    ),
    *mutants(
        "models.transformer",
        ("prefill: state of the padding", "hidden_UTD[every, lengths - 1]", "hidden_UTD[every, -1]"),
        (
            "decode: sees one slot more",
            "device=tokens.device) > lengths[:, None]",
            "device=tokens.device) > lengths[:, None] + 1",
        ),
        ("decode: not itself", "device=tokens.device) > lengths[:, None]", "device=tokens.device) >= lengths[:, None]"),
        (
            "decode: position of another",
            "lengths[:, None], config, attend, _keep)[:, 0]",
            "lengths[:, None] * 0, config, attend, _keep)[:, 0]",
        ),
    ),
    *mutants(
        "models.rope",
        ("turned the other way", "a * rotation.cos - b * rotation.sin", "a * rotation.cos + b * rotation.sin"),
        ("one half turned the other way", "+ a * rotation.sin)", "- a * rotation.sin)"),
        ("wavelengths of the whole width", "dtype=torch.float32) / width)", "dtype=torch.float32) / (2 * width))"),
        ("llama3: every wave longer", "torch.lerp(lowered, frequencies, kept.clamp(0, 1))", "lowered"),
        ("llama3: beyond both ends", "kept.clamp(0, 1)", "kept"),
        ("linear: never", "lowered = frequencies / scaling.factor", "lowered = frequencies"),
    ),
    *mutants(
        "models.llama",
        (
            "norms swapped",
            'rms_norm(x, p["post_attention_layernorm"], eps=eps)',
            'rms_norm(x, p["input_layernorm"], eps=eps)',
        ),
        ("keys not rotated", "rotate(k, rotation), v", "k, v"),
        ("norm of keys is that of queries", 'rms_norm(k, p["k_norm"]', 'rms_norm(k, p["q_norm"]'),
        ("rotated before the norm", "if config.qk_norm:", "if False:"),
        ("gate and up swapped", "swiglu(gate, up)", "swiglu(up, gate)"),
        ("attention: no residual", "x = x + linear(attended_BTNH", "x = linear(attended_BTNH"),
        (
            "decoding: widths swapped",
            "(config.n_head, config.kv_heads, config.kv_heads)",
            "(config.kv_heads, config.kv_heads, config.n_head)",
        ),
    ),
    *mutants(
        "models.gpt_neox",
        ("never parallel", "x if config.use_parallel_residual else attended", "attended"),
        ("always parallel", "x if config.use_parallel_residual else attended", "x"),
        (
            "queries, keys and values apart",
            "heads.view(*x.shape[:2], config.n_head, -1).chunk(3, dim=-1)",
            "heads.view(*x.shape[:2], 3, config.n_head, -1).unbind(2)",
        ),
        ("gelu: tanh form", "F.gelu(linear(", 'functools.partial(F.gelu, approximate="tanh")(linear('),
    ),
    *mutants(
        "models.output_layer",
        ("always the embedding", "name = NAME if NAME in params else embedding", "name = embedding"),
    ),
    *mutants(
        "models.initial_parameters",
        ("init: residual std", "/ (2 * n_layer) ** 0.5", "/ n_layer ** 0.5"),
    ),
    *mutants(
        "models.gpt2_parameters",
        ("embeddings rounded", ' | {"wte": params["wte"], "wpe": params["wpe"]}', ""),
    ),
    *mutants(
        "models.layers",
        ("gelu: exact form", 'approximate="tanh"', 'approximate="none"'),
        ("rms norm: no eps", 'p["weight"], eps)\n\n\ndef swiglu', 'p["weight"], 0.0)\n\n\ndef swiglu'),
        ("linear: no bias", 'F.linear(x, p["weight"], p.get("bias"))', 'F.linear(x, p["weight"])'),
    ),
    *mutants(
        "data.chat_tokens",
        ("learnt: end of turn is not", "return places[-1] + 1\n", "return places[-1]\n"),
        ("learnt: what others wrote", "end = 0 if number % 2 else", "end = 0 if not number % 2 else"),
        ("specials of contents are taken", "return pattern.sub(lambda match: match[0] + mark, value)", "return value"),
        (
            "boundary: without the beginning of an answer",
            "turns[:number], whole, add_generation_prompt=True",
            "turns[:number], whole",
        ),
        ("prefix: not checked", "if not whole.startswith(text):", "if False:"),
        ("pair: the prompt ends with the first answer", "boundary if shares_prompt else spans[0][0]", "spans[0][0]"),
        ("turns of the prompt are learnt", "if number >= first and turn", "if turn"),
    ),
    *mutants("models.forward", ("left padding counted", "(real.cumsum(dim=1) - 1)", "real.cumsum(dim=1)")),
    *mutants(
        "train.sft",
        (
            "sft: predictors ignored",
            "gather_rows(hidden, batch.predictors), batch.targets",
            "hidden[: len(batch.targets)], batch.targets",
        ),
    ),
    *mutants(
        "train.reward",
        ("reward: mask left out", "batch.mask, margin=batch.margin", "None, margin=batch.margin"),
        ("reward: margin left out", "margin=batch.margin, centre_coef", "centre_coef"),
    ),
    *mutants(
        "train.ppo_objective",
        (
            "ppo: log-probs at temperature 1",
            "log_probs = token_log_probs(logits, targets, temperature=temperature)",
            "log_probs = token_log_probs(logits, targets)",
        ),
        (
            "ppo: entropy sign",
            "loss - entropy_coef * _weighted",
            "loss + entropy_coef * _weighted",
        ),
        (
            "ppo: entropy without gradient",
            "entropy(logits if differentiate_entropy else logits.detach()",
            "entropy(logits.detach()",
        ),
        ("ppo: KL sign", "loss + batch.kl_coef * kl", "loss - batch.kl_coef * kl"),
        ("ppo: KL unweighted", "loss + batch.kl_coef * kl", "loss + kl"),
        (
            "ppo: value_coef on the policy",
            "return policy_coef * loss, metrics, outputs.hidden",
            "return value_coef * loss, metrics, outputs.hidden",
        ),
        (
            "ppo: exact KL turned around",
            "exact_kl(logits, ref_logits, temperature",
            "exact_kl(ref_logits, logits, temperature",
        ),
        (
            "ppo: reference's hidden from the policy",
            "columns.append(at_predictors(reference,",
            "columns.append(at_predictors(policy,",
        ),
    ),
    *mutants(
        "models.scoring",
        ("score: reference is the policy", 'look(frozen["reference"], batch)', 'look(params["policy"], batch)'),
        (
            "score: at temperature 1",
            "(token_log_probs(logits, targets, temperature=temperature),)",
            "(token_log_probs(logits, targets),)",
        ),
        (
            "score: reward at the first",
            "gather_rows(hidden, batch.last)).unsqueeze",
            "gather_rows(hidden, batch.last * 0)).unsqueeze",
        ),
        (
            "score: bootstrap value at the first",
            "apply_head(head, gather_rows(hidden, batch.last))",
            "apply_head(head, gather_rows(hidden, batch.last * 0))",
        ),
        (
            "score: critic's values dropped",
            "values = apply_head(head, gather_rows(hidden, batch.predictors))",
            "apply_head(head, gather_rows(hidden, batch.predictors))",
        ),
    ),
    *mutants(
        "execution.update",
        ("limits apart: of all together", "math.inf) if isinstance", "1.0) if isinstance"),
        ("norms of sums, not of means", ".sum().sqrt() * scale for", ".sum().sqrt() for"),
        ("factors squared", "gradient[low:high].mul_(factor)", "gradient[low:high].mul_(factor * factor)"),
        ("a shard taken for the whole", "(min(max(bound - start, 0)", "(min(max(bound, 0)"),
        ("every model has the first limit", "limits[name]))", "limits[next(iter(limits))]))"),
        (
            "models begin at the last leaf",
            'starts.setdefault(name.partition(".")[0], offset)',
            'starts.__setitem__(name.partition(".")[0], offset)',
        ),
    ),
    *mutants(
        "execution.gradients",
        ("a shared parameter's gradient is overwritten", "buffer.add_(leaf.grad)", "buffer.copy_(leaf.grad)"),
        ("gradients of one leaf are kept", "leaf.grad, empty = None, False", "empty = False"),
    ),
    *mutants(
        "sampling",
        (
            "top-p: one token fewer",
            "before >= top_p).scatter(-1, order, before >= top_p)",
            "before >= top_p).scatter(-1, order, before + probs >= top_p)",
        ),
        ("top-k: one more", "logits.topk(top_k, dim=-1)", "logits.topk(top_k + 1, dim=-1)"),
        ("draw: a block without weight", "(ends <= threshold)", "(ends < threshold)"),
        ("draw: a token without weight", "(inside <= rest)", "(inside < rest)"),
        ("draw: float32 exponentials", "fill=-torch.inf).double()", "fill=-torch.inf).float()"),
        ("draw: weight of the blocks before", "(threshold - F.pad", "(threshold + 0 * F.pad"),
    ),
    *mutants(
        "models.decode_state",
        ("log-probs of the filtered", "token_log_probs(logits, token)", "token_log_probs(filtered, token)"),
        ("stop tokens ignored", "(token[:, None] == stops).any(1) | (state.step == last)", "state.step == last"),
        ("min_new_tokens: one fewer", "state.step < min_new_tokens", "state.step + 1 < min_new_tokens"),
        ("temperature ignored", "scale_logits(raw, temperature)", "scale_logits(raw, 1.0)"),
        (
            "uniforms of another step",
            "uniforms[state.completion, state.step]",
            "uniforms[state.completion, state.step * 0]",
        ),
        ("a refilled row goes on counting", "state.step.index_fill(0, row, 0)", "state.step"),
        ("a refilled row keeps its state", "state.hidden.index_copy(0, row, hidden)", "state.hidden"),
        ("prompts mixed up", "source=prompt)", "source=prompt.flip(0))"),
        ("other rows are kept", "index = torch.tensor(rows,", "index = torch.tensor(rows[::-1],"),
        ("value of no head", "zeros if value_head is None else", "zeros if True else"),
    ),
    *mutants(
        "models.decoding",
        ("left padding: one further", "(place + first[:, None]).clamp", "(place + first[:, None] + 1).clamp"),
    ),
]


def main(arguments: list[str]) -> int:
    modules = dict.fromkeys(mutant.module for mutant in MUTANTS)
    if unknown := [argument for argument in arguments if argument not in modules]:
        print(f"no mutants of {unknown}, expected some of {list(modules)}")
        return 2
    chosen = [mutant for mutant in MUTANTS if not arguments or mutant.module in arguments]
    misplaced = [mutant for mutant in chosen if source(mutant).count(mutant.old) != 1]
    for mutant in misplaced:
        print(f"{mutant.module}.py, {mutant.name}: {mutant.old!r} occurs {source(mutant).count(mutant.old)} times")
    import_heavy_modules()
    failing = 0
    for mutant, test in outcomes(Mutant("unchanged", module, "", "") for module in arguments or modules):
        failing += bool(test)
        print(f"{mutant.module + '.py':<15} unchanged: {test or 'passes'}", flush=True)
    killed = 0
    print(f"{'file':<15} {'mutant':<42} killed by")
    for mutant, test in outcomes(mutant for mutant in chosen if mutant not in misplaced):
        killed += test.startswith("test_")
        print(f"{mutant.module + '.py':<15} {mutant.name:<42} {test or 'SURVIVED'}", flush=True)
    print(f"{killed} of {len(chosen)} mutants killed")
    return 1 if failing or killed < len(chosen) else 0


def source(mutant: Mutant) -> str:
    return file_of(mutant).read_text(encoding="utf-8")


def file_of(mutant: Mutant) -> Path:
    return (ROOT / "rlhf").joinpath(*mutant.module.split(".")).with_suffix(".py")


def import_heavy_modules() -> None:
    """Once, for all children. What is imported here must not import rlhf."""
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(ROOT / "tests"))
    import laws  # noqa: F401 (its hypothesis profile is the parent of the one below)
    import oracles  # noqa: F401
    import tokenizers  # noqa: F401 (conftest.py)
    import torch._dynamo.testing
    from hypothesis import Phase, settings

    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    settings.register_profile("mutants", parent=settings.get_profile("rlhf"), phases=[Phase.explicit, Phase.generate])
    settings.load_profile("mutants")  # a failure is enough: no smaller one is looked for
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # none is needed, and loading them takes longer than most tests
    gc.freeze()  # pytest collects garbage at its end: not what is imported here
    assert "rlhf" not in sys.modules


def outcomes(selected: Iterable[Mutant]) -> Iterator[tuple[Mutant, str]]:
    """(mutant, first failing test, or "" if all pass) in the order in which children end."""
    waiting = iter(selected)
    running: dict[int, Mutant] = {}
    with tempfile.TemporaryDirectory() as folder:
        while True:
            while len(running) < WORKERS and (mutant := next(waiting, None)):
                sys.stdout.flush()
                child = os.fork()
                if child == 0:
                    run(mutant, Path(folder) / str(os.getpid()))
                running[child] = mutant
            if not running:
                return
            child, status = os.wait()
            answer = Path(folder) / str(child)
            yield running.pop(child), answer.read_text() if status == 0 else f"error: child ended with {status}"


def run(mutant: Mutant, answer: Path) -> None:
    """In a child: execute the mutant, run its tests in silence, write down what fails first, and end."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    try:
        load(mutant)
        answer.write_text(first_failure(mutant.module))
    except BaseException as error:  # whatever it is, the parent has to hear of it
        answer.write_text(f"error: {error!r}")
    finally:
        os._exit(0)


def first_failure(module: str) -> str:
    failures: list[str] = []

    def note(report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.failed:
            failures.append(report.nodeid.rpartition("::")[2] if report.when != "collect" else "error: not collected")

    plugin = ModuleType("first_failure")
    plugin.pytest_runtest_logreport = plugin.pytest_collectreport = note
    names = TESTS.get(module, module.rpartition(".")[2]).split()
    tests = [str(ROOT / "tests" / f"test_{name}.py") for name in names]
    options = ["-x", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}"]
    code = pytest.main([*tests, *options], plugins=[plugin])
    return failures[0] if failures else "" if code == 0 else f"error: pytest ended with {code}"


def load(mutant: Mutant) -> None:
    """Put `rlhf.<module>`, executed from the changed text, where every later import finds it."""
    name = f"rlhf.{mutant.module}"
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin == str(file_of(mutant))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    package, _, last = name.rpartition(".")
    setattr(importlib.import_module(package), last, module)  # as the import of a submodule does
    text = source(mutant)
    exec(compile(text.replace(mutant.old, mutant.new) if mutant.old else text, spec.origin, "exec"), module.__dict__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
