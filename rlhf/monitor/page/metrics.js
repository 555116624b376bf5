"use strict";
// What each metric is called, measured in, means, and looks like when all is well; and which charts ask which question.

const METRICS = new Map(Object.entries({
  "objective/scores": ["Score", "reward units per completion", "Mean reward of the completions, as PPO is rewarded: normalised, clipped, with the penalty for completions that do not end.", "Rises, fast at first, then levels off."],
  "objective/rlhf_reward": ["Score minus KL penalty", "reward units per completion", "What PPO maximises: the score less kl_coef times the KL.", "Rises. If the score rises and this falls, the policy pays more in KL than it gains."],
  "objective/non_score_reward": ["KL penalty", "reward units per completion", "Minus kl_coef times the KL to the reference.", "A small part of the score; falls slowly."],
  "objective/kl": ["KL to the reference", "nats per completion", "How far the policy has moved from the SFT model, summed over each completion's tokens and estimated from them.", "0 at first, then a slow rise to a few nats. Clearly negative or growing without end: look at kl_coef and the learning rate."],
  "objective/kl_coef": ["KL coefficient", "reward units per nat", "The price of one nat of KL.", "Constant, or following kl_target with --ppo.kl-adaptive."],
  "objective/entropy": ["Surprise of its own completions", "nats per completion", "Minus the log-probability of the completions, summed over their tokens: an estimate of the policy's entropy.", "Falls slowly. A collapse means that it says one thing only."],
  "policy/entropy_avg": ["Entropy", "nats per token", "Spread of the policy's next-token distribution.", "Falls slowly; near 0 nothing is left to explore."],
  "val/explained_variance": ["Explained variance", "fraction of the returns’ variance", "1 − Var(return − value) / Var(return). 0 is no better than always guessing the mean.", "Rises above 0 within some iterations, towards 0.5 and more. Below 0 the value function does harm.", { high: 1 }],
  "val/mean": ["Mean value", "reward units", "Mean of the value function over tokens.", "Follows the score."],
  "val/clipfrac_avg": ["Value clip fraction", "share of tokens", "Tokens whose value update was clipped.", "Mostly below 0.2.", { low: 0 }],
  "val/ratio": ["Probability ratio", "new over old probability", "Mean of new over old probability of the sampled tokens during the updates.", "Stays within a few hundredths of 1."],
  "val/ratio_first": ["Before the first update", "new over old probability", "The same on the first minibatch, when nothing has been updated.", "Exactly 1; anything else is a defect."],
  "loss/value_avg": ["Value loss", "squared reward units", "Half the squared error of the value function, clipped.", "Falls, with the score's jumps.", { low: 0 }],
  "loss/policy_avg": ["Policy loss", "", "PPO's clipped surrogate.", "Small, around 0; its level says little."],
  "loss/kl_avg": ["KL loss", "nats per token", "The KL penalty, where it is in the loss instead of the reward.", "Small."],
  "policy/approxkl_avg": ["KL of the update", "nats per token", "How far the updates move the policy from the one that wrote the batch: half the mean squared log-ratio.", "Below about 0.02. Above 0.1: lower the learning rate or the epochs.", { low: 0 }],
  "policy/clipfrac_avg": ["Clip fraction", "share of tokens", "Tokens whose ratio left 1 ± clip_eps, so that they no longer count.", "Between 0 and 0.2. Above 0.3 the updates are too large.", { low: 0 }],
  "policy/updates": ["Updates", "per iteration", "Optimiser steps made in the iteration; fewer where target_kl stopped it.", "Constant.", { low: 0 }],
  "grad_norm": ["Gradient norm", "before clipping", "Norm of the whole gradient.", "Steady; spikes are clipped to max_grad_norm.", { low: 0 }],
  "lr": ["Learning rate", "", "Rate of this step, by the schedule.", "As configured.", { low: 0 }],
  "response_length/mean": ["Length", "tokens per completion", "Tokens of a completion, its end-of-text included.", "Steady, or drifting for a reason. A steady climb with the score often means that the reward likes long answers.", { low: 0 }],
  "response_length/ended": ["Ended by themselves", "share of completions", "Completions that ended with an end-of-text instead of at max_new_tokens.", "Near 1.", { low: 0, high: 1 }],
  "perf/tokens_per_s": ["Throughput", "tokens per second", "Prompt and completion tokens per second of the step.", "Steady. A drop: other load, longer texts, or a worker lost.", { low: 0 }],
  "timing_s/step": ["Time per step", "seconds", "Wall-clock time of the whole step.", "Steady.", { low: 0 }],
  "timing_s/generate": ["generate", "seconds", "Writing the completions.", "Usually the largest part with long completions.", { low: 0 }],
  "timing_s/score": ["score", "seconds", "Reward, reference and value model over the completions.", "Less than the update.", { low: 0 }],
  "timing_s/update": ["update", "seconds", "The epochs of minibatch updates.", "Grows with num_epochs.", { low: 0 }],
  "fault/restarts": ["Processes replaced", "per step", "Workers or servers that were lost and replaced.", "None.", { low: 0 }],
  "fault/recovery_s": ["Time to recover", "seconds", "What replacing them took.", "Seconds.", { low: 0 }],
  "loss/sft": ["Loss, training", "nats per token", "Cross-entropy on the demonstrations' completions.", "Falls, then levels off.", { low: 0 }],
  "eval/loss": ["Loss, held-out", "nats per token", "Cross-entropy on records that are not trained on.", "Falls. Rising while the training loss falls: over-fitting.", { low: 0 }],
  "eval/perplexity": ["Perplexity, held-out", "e to the loss", "How many tokens the model wavers between, on average.", "Falls; 1 would be certainty."],
  "sft/accuracy": ["Accuracy, training", "share of tokens", "Tokens predicted exactly.", "Rises.", { low: 0, high: 1 }],
  "eval/accuracy": ["Accuracy, held-out", "share of tokens", "Held-out tokens predicted exactly.", "Rises.", { low: 0, high: 1 }],
  "loss/reward": ["Loss", "nats per pair", "Minus log σ(margin). log 2 = 0.69 is a coin.", "Falls below 0.69.", { low: 0 }],
  "reward/accuracy": ["Accuracy, this batch", "share of pairs", "Pairs whose chosen completion gets the higher reward.", "Well above 0.5, which is a coin.", { low: 0, high: 1 }],
  "eval/reward/accuracy": ["Accuracy, held-out", "share of pairs", "The same on held-out pairs.", "Above 0.6; annotators agree with each other on some 0.7 to 0.8.", { low: 0, high: 1 }],
  "eval/reward/pairs": ["Held-out pairs", "pairs", "How many pairs the held-out figures are of.", "Some hundreds: with 100, the accuracy of a coin is between 0.4 and 0.6.", { low: 0 }],
  "train/reward/accuracy": ["Accuracy, training records", "share of pairs", "The same on records that were trained on.", "A little above held-out; far above is over-fitting.", { low: 0, high: 1 }],
  "reward/margin": ["Margin, this batch", "reward units", "Reward of the chosen minus the rejected completion.", "Rises above 0."],
  "eval/reward/margin": ["Margin, held-out", "reward units", "The same on held-out pairs.", "Above 0."],
  "train/reward/margin": ["Margin, training records", "reward units", "The same on records that were trained on.", "Above 0."],
  "eval/reward/min": ["Lowest", "reward units", "The lowest reward given to a held-out completion.", ""],
  "eval/reward/mean": ["Mean", "reward units", "The mean reward of held-out completions.", "Steady; centre_coef keeps it near 0."],
  "eval/reward/max": ["Highest", "reward units", "The highest reward given to a held-out completion.", "Well apart from the lowest: a model that cannot tell gives all the same."],
  "train/reward/min": ["Lowest", "reward units", "The lowest reward given to a completion that was trained on.", ""],
  "train/reward/mean": ["Mean", "reward units", "The mean reward of completions that were trained on.", "Steady."],
  "train/reward/max": ["Highest", "reward units", "The highest reward given to a completion that was trained on.", "Well apart from the lowest."],
  "eval/reward/length_correlation": ["Reward with length, held-out", "correlation", "Correlation of the reward with the length of the completion.", "Near 0. Near 1 the model rewards length.", { low: -1, high: 1 }],
  "train/reward/length_correlation": ["Reward with length, training", "correlation", "The same on records that were trained on.", "Near 0.", { low: -1, high: 1 }],
}).map(([name, [label, unit, what, good, range]]) => [name, { label, unit, what, good, ...range }]));

/** What is known of a metric; of one that this page has never heard of, its name. */
function describe(name) {
  const known = METRICS.get(name);
  if (known) return known;
  const [kind, ...rest] = name.split("/");
  const source = rest.join("/");
  if (kind === "gold") return { label: `Gold score: ${source}`, unit: "units of the source", what: "A score that is watched and never optimised.", good: "Rises with the score. Falling while the score rises: over-optimisation." };
  if (kind === "reward" && source) return { label: `Reward: ${source}`, unit: "units of the source", what: "One source of the reward, as it came, before weights and normalisation.", good: "Rises." };
  if (kind === "timing_s") return { label: source, unit: "seconds", what: "Wall-clock time.", good: "Steady.", low: 0 };
  return { label: name, unit: "", what: "A metric of this run.", good: "" };
}

/** Questions in order, each with its charts; a chart is a list of metrics or patterns, drawn into one frame. */
const QUESTIONS = [
  ["Is the loss falling?", [["loss/sft", "eval/loss"], ["sft/accuracy", "eval/accuracy"], ["eval/perplexity"], ["loss/reward"]]],
  ["Does the reward model tell good from bad?", [["reward/accuracy", "eval/reward/accuracy", "train/reward/accuracy"], ["reward/margin", "eval/reward/margin", "train/reward/margin"], ["eval/reward/length_correlation", "train/reward/length_correlation"], ["eval/reward/min", "eval/reward/mean", "eval/reward/max"], ["train/reward/min", "train/reward/mean", "train/reward/max"]]],
  ["Is the reward rising?", [["objective/scores", "objective/rlhf_reward"], [/^reward\/(?!accuracy$|margin$)/], [/^gold\//]]],
  ["How far from the reference?", [["objective/kl"], ["objective/non_score_reward"], ["objective/kl_coef"]]],
  ["Is it over-optimised?", ["over-optimisation"]],
  ["Is the value function learning?", [["val/explained_variance"], ["loss/value_avg"], ["val/mean"], ["val/clipfrac_avg"]]],
  ["Are the updates sound?", [["policy/approxkl_avg"], ["policy/clipfrac_avg"], ["val/ratio", "val/ratio_first"], ["policy/entropy_avg"], ["objective/entropy"], ["loss/policy_avg"], ["loss/kl_avg"], ["grad_norm"], ["lr"], ["policy/updates"]]],
  ["How long are the completions?", [["response_length/mean"], ["response_length/ended"]]],
  ["Where does the time go?", [["timing_s/generate", "timing_s/score", "timing_s/update"], ["timing_s/step"], ["perf/tokens_per_s"], ["fault/restarts"], ["fault/recovery_s"]]],
];

/** Titles of charts with several metrics, by their first one, where its own will not do. */
const TITLES = new Map([
  ["timing_s/generate", "Parts of the step"],
  ["eval/reward/min", "Rewards of held-out completions"],
  ["train/reward/min", "Rewards of training completions"],
  ["reward/accuracy", "Accuracy"],
  ["reward/margin", "Margin"],
  ["eval/reward/length_correlation", "Correlation of reward with length"],
  ["sft/accuracy", "Accuracy"],
  ["loss/sft", "Loss"],
]);

/** [question, charts] for the metrics that are there; whatever no question asks for comes last. */
function questionsFor(names) {
  const left = new Set(names);
  const chosen = [];
  for (const [question, charts] of QUESTIONS) {
    const found = [];
    for (const wanted of charts) {
      if (wanted === "over-optimisation") {
        if (names.includes("objective/kl") && names.includes("objective/scores")) found.push(wanted);
        continue;
      }
      const metrics = wanted.flatMap((one) => (one instanceof RegExp ? [...left].filter((name) => one.test(name)) : left.has(one) ? [one] : []));
      metrics.forEach((name) => left.delete(name));
      if (metrics.length) found.push(metrics);
    }
    if (found.length) chosen.push([question, found]);
  }
  if (left.size) chosen.push(["Everything else", [...left].map((name) => [name])]);
  return chosen;
}
