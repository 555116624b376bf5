"""What the pure core should compute: float64 NumPy with explicit loops, written from the papers.

Nothing here imports rlhf or torch, and nothing is vectorised: a formula is one loop over tokens that count. A mask is
obeyed by skipping, so that what lies under it is never even read.
"""

import math

import numpy as np

VARIANCE_EPS = 1e-8
_U32 = 0xFFFFFFFF


# Randomness. Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 4.2.


def threefry(key, counter):
    """Threefry-2x32-20 on Python integers: two key words and two counter words -> two words, all unsigned."""
    parity = key[0] ^ key[1] ^ 0x1BD11BDA
    schedule = (key[0], key[1], parity)
    x0, x1 = (counter[0] + key[0]) & _U32, (counter[1] + key[1]) & _U32
    rotations = (13, 15, 26, 6, 17, 29, 16, 24)
    for number in range(20):
        rotation = rotations[number % 8]
        x0 = (x0 + x1) & _U32
        x1 = ((x1 << rotation) | (x1 >> (32 - rotation))) & _U32
        x1 ^= x0
        if number % 4 == 3:
            injection = number // 4 + 1
            x0 = (x0 + schedule[injection % 3]) & _U32
            x1 = (x1 + schedule[(injection + 1) % 3] + injection) & _U32
    return x0, x1


def words(key, position):
    """The two words at a 64-bit position: its high and its low half are the counter."""
    return threefry(key, (position >> 32 & _U32, position & _U32))


def uniform(key, count):
    """The upper 23 bits of the first word at positions 0..count-1, as a fraction."""
    return np.array([(words(key, position)[0] >> 9) / 2**23 for position in range(count)])


def normal_pair(key, position):
    """Box and Muller 1958: r (cos a, sin a), r^2 = -2 log(1 - u), a = 2 pi v. One position gives a pair."""
    u, v = ((word >> 9) / 2**23 for word in words(key, position))
    radius = math.sqrt(-2.0 * math.log(1.0 - u))
    return radius * math.cos(2.0 * math.pi * v), radius * math.sin(2.0 * math.pi * v)


def permutation(key, count):
    """0..count-1 in the order of their words, read as one signed 64-bit number."""

    def rank(position):
        first, second = words(key, position)
        return (first - 2**32 if first >= 2**31 else first) * 2**32 + second

    return sorted(range(count), key=rank)


# Masked statistics.


def _kept(values, mask):
    return [float(value) for value, keep in zip(np.ravel(values), np.ravel(mask), strict=True) if keep]


def masked_sum(values, mask):
    return math.fsum(_kept(values, mask))


def masked_mean(values, mask):
    kept = _kept(values, mask)
    return math.fsum(kept) / len(kept) if kept else 0.0


def masked_var(values, mask, *, unbiased=False):
    kept = _kept(values, mask)
    mean = masked_mean(values, mask)
    return math.fsum((value - mean) ** 2 for value in kept) / max(len(kept) - unbiased, 1)


def whiten(values, mask, *, shift_mean=True, unbiased=False):
    """Ziegler et al. 2019, `whiten` of lm-human-preferences: (x - mean) / sqrt(var + 1e-8) [+ mean]."""
    mean, variance = masked_mean(values, mask), masked_var(values, mask, unbiased=unbiased)
    whitened = np.zeros(values.shape)
    for index in np.ndindex(values.shape):
        if mask[index]:
            whitened[index] = (values[index] - mean) / math.sqrt(variance + VARIANCE_EPS)
            whitened[index] += 0.0 if shift_mean else mean
    return whitened


# Distributions over a vocabulary.


def log_softmax(logits, temperature):
    """[V] by the definition, shifted by the largest logit so that nothing overflows."""
    scaled = [float(logit) / temperature for logit in logits]
    top = max(scaled)
    log_total = top + math.log(math.fsum(math.exp(logit - top) for logit in scaled))
    return [logit - log_total for logit in scaled]


def token_log_probs(logits, targets, *, temperature=1.0):
    chosen = np.zeros(targets.shape)
    for index in np.ndindex(targets.shape):
        chosen[index] = log_softmax(logits[index], temperature)[targets[index]]
    return chosen


def entropy(logits, *, temperature=1.0):
    """Shannon: - sum_v p_v log p_v."""
    values = np.zeros(logits.shape[:-1])
    for index in np.ndindex(values.shape):
        values[index] = -math.fsum(math.exp(log_p) * log_p for log_p in log_softmax(logits[index], temperature))
    return values


def exact_kl(logits, ref_logits, *, temperature=1.0):
    """Kullback and Leibler 1951: sum_v p_v (log p_v - log q_v)."""
    values = np.zeros(logits.shape[:-1])
    for index in np.ndindex(values.shape):
        log_ps, log_qs = log_softmax(logits[index], temperature), log_softmax(ref_logits[index], temperature)
        values[index] = math.fsum(math.exp(p) * (p - q) for p, q in zip(log_ps, log_qs, strict=True))
    return values


def kl_estimate(log_probs, ref_log_probs, *, estimator):
    """Schulman 2020, "Approximating KL Divergence": k1 = -log r, k2 = (log r)^2 / 2, k3 = r - 1 - log r, r = q / p."""
    values = np.zeros(log_probs.shape)
    for index in np.ndindex(values.shape):
        log_r = float(ref_log_probs[index]) - float(log_probs[index])
        values[index] = {"k1": -log_r, "k2": log_r**2 / 2, "k3": math.expm1(log_r) - log_r}[estimator]
    return values


def adaptive_kl_coef(kl_coef, kl, *, num_samples, target, horizon):
    """Ziegler et al. 2019, section 2.2: beta (1 + K e), e = clip((KL - target) / target, -0.2, 0.2)."""
    error = (kl - target) / target
    if error > 0.2:
        error = 0.2
    elif error < -0.2:
        error = -0.2
    return kl_coef * (1 + error * num_samples / horizon)


# From scores to advantages.


def positions(mask):
    """Where the tokens of each row are; what lies between them is never read."""
    return [[t for t, keep in enumerate(row) if keep] for row in mask]


def token_rewards(scores, kl, mask, *, kl_coef):
    """Ziegler et al. 2019, eq. 2: R = r(x, y) - beta log(pi / rho), the score on the last token."""
    rewards = np.zeros(kl.shape)
    for row, tokens in enumerate(positions(mask)):
        for t in tokens:
            rewards[row, t] = -kl_coef * kl[row, t]
        if tokens:
            rewards[row, tokens[-1]] += scores[row]
    return rewards


def gae(rewards, values, mask, *, gamma, lam, bootstrap_value=None):
    """Schulman et al. 2016, eq. 16, as the sum it is: A_t = sum_l (gamma lam)^l delta_{t+l}."""
    advantages, returns = np.zeros(rewards.shape), np.zeros(rewards.shape)
    for row, tokens in enumerate(positions(mask)):
        after = 0.0 if bootstrap_value is None else bootstrap_value[row]
        for now, t in enumerate(tokens):
            for later in range(now, len(tokens)):
                following = values[row, tokens[later + 1]] if later + 1 < len(tokens) else after
                delta = rewards[row, tokens[later]] + gamma * following - values[row, tokens[later]]
                advantages[row, t] += (gamma * lam) ** (later - now) * delta
            returns[row, t] = advantages[row, t] + values[row, t]
    return advantages, returns


def discounted_returns(rewards, mask, *, gamma):
    """Sutton and Barto 2018, eq. 3.8: G_t = sum_l gamma^l R_{t+l}."""
    returns = np.zeros(rewards.shape)
    for row, tokens in enumerate(positions(mask)):
        for now, t in enumerate(tokens):
            returns[row, t] = math.fsum(gamma**n * rewards[row, later] for n, later in enumerate(tokens[now:]))
    return returns


# Losses: (sum over what counts, metric sums).


def _sigmoid(x):
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def _softplus(x):
    """log(1 + e^x) = -log sigmoid(-x), without overflow."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sft_loss(log_probs, mask):
    """Ouyang et al. 2022: maximum likelihood of the completion."""
    loss = -math.fsum(_kept(log_probs, mask))
    return loss, {"loss/sft_sum": loss, "count": int(np.sum(mask))}


def reward_loss(chosen, rejected, mask, *, margin=None, centre_coef=0.0):
    """Ouyang et al. 2022, eq. 1; margin of Touvron et al. 2023, eq. 2; centring of Eisenstein et al. 2023."""
    loss = accuracy = gap = 0.0
    for pair in np.ndindex(chosen.shape):
        if not mask[pair]:
            continue
        difference = float(chosen[pair]) - float(rejected[pair])
        required = difference - (0.0 if margin is None else float(margin[pair]))
        loss += _softplus(-required) + centre_coef * (float(chosen[pair]) + float(rejected[pair])) ** 2
        accuracy += 1.0 if difference > 0 else 0.5 if difference == 0 else 0.0
        gap += difference
    return loss, {
        "loss/reward_sum": loss,
        "reward/accuracy_sum": accuracy,
        "reward/margin_sum": gap,
        "count": int(np.sum(mask)),
    }


def reward_gradient(difference):
    """d/dc of -log sigmoid(c - r): -sigmoid(-(c - r))."""
    return -_sigmoid(-difference)


def ppo_policy_loss(log_probs, old_log_probs, advantages, mask, *, clip_eps, dual_clip=None):
    """Schulman et al. 2017, eq. 7; dual clip of Ye et al. 2020, eq. 5."""
    loss = clipped_tokens = approxkl = ratios = 0.0
    for token in np.ndindex(mask.shape):
        if not mask[token]:
            continue
        log_ratio, advantage = float(log_probs[token]) - float(old_log_probs[token]), float(advantages[token])
        ratio = math.exp(log_ratio)
        clipped_ratio = min(max(ratio, 1 - clip_eps), 1 + clip_eps)
        objective = min(ratio * advantage, clipped_ratio * advantage)
        clipped_tokens += clipped_ratio * advantage < ratio * advantage
        if dual_clip is not None and advantage < 0:
            objective = max(objective, dual_clip * advantage)
        loss -= objective
        approxkl += log_ratio**2 / 2
        ratios += ratio
    return loss, {
        "loss/policy_avg_sum": loss,
        "policy/clipfrac_avg_sum": clipped_tokens,
        "policy/approxkl_avg_sum": approxkl,
        "val/ratio_sum": ratios,
        "count": int(np.sum(mask)),
    }


def ppo_value_loss(values, old_values, returns, mask, *, value_clip_eps):
    """OpenAI baselines, ppo2/model.py: half the mean of the larger of the two squared errors; here the sum."""
    loss = clipped_tokens = 0.0
    for token in np.ndindex(mask.shape):
        if not mask[token]:
            continue
        value, old_value, target = float(values[token]), float(old_values[token]), float(returns[token])
        within = min(max(value, old_value - value_clip_eps), old_value + value_clip_eps)
        loss += 0.5 * max((value - target) ** 2, (within - target) ** 2)
        clipped_tokens += (within - target) ** 2 > (value - target) ** 2
    return loss, {"loss/value_avg_sum": loss, "val/clipfrac_avg_sum": clipped_tokens, "count": int(np.sum(mask))}


# Experience.


def postprocess_scores(scores, ended, *, missing_eos_penalty, clip):
    """Stiennon et al. 2020: what did not end by itself is worse by a constant."""
    return np.array(
        [
            min(max(float(score), -clip), clip) - (0.0 if done else missing_eos_penalty)
            for score, done in zip(scores, ended, strict=True)
        ]
    )


def experience(
    scores,
    log_probs,
    values,
    kl,
    mask,
    *,
    kl_coef,
    kl_in_loss,
    gamma,
    lam,
    whiten_rewards,
    whiten_advantages,
    bootstrap_value=None,
):
    """Ziegler et al. 2019, section 2: (advantages, returns, metrics) from a batch and its KL per token."""
    penalty = 0.0 if kl_in_loss else kl_coef
    rewards = token_rewards(scores, kl, mask, kl_coef=penalty)
    if whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam, bootstrap_value=bootstrap_value)
    row_kl = [masked_sum(kl[row], mask[row]) for row in range(len(scores))]
    surprise = [-masked_sum(log_probs[row], mask[row]) for row in range(len(scores))]
    total = [float(score) - penalty * nats for score, nats in zip(scores, row_kl, strict=True)]
    metrics = {
        "objective/kl": np.mean(row_kl),
        "objective/entropy": np.mean(surprise),
        "objective/scores": np.mean(scores),
        "objective/non_score_reward": -penalty * np.mean(row_kl),
        "objective/rlhf_reward": np.mean(total),
        "val/mean": masked_mean(values, mask),
        "val/explained_variance": 1 - masked_var(returns - values, mask) / max(masked_var(returns, mask), 1e-8),
        "response_length/mean": np.mean([len(tokens) for tokens in positions(mask)]),
    }
    return whiten(advantages, mask) if whiten_advantages else advantages, returns, metrics


# Optimisation.


def adamw(param, grads, rates, *, b1, b2, eps, weight_decay):
    """Loshchilov and Hutter 2019, algorithm 2, on one number, over all its gradients."""
    mean = square = 0.0
    for count, (grad, rate) in enumerate(zip(grads, rates, strict=True), start=1):
        mean = b1 * mean + (1 - b1) * grad
        square = b2 * square + (1 - b2) * grad**2
        corrected_mean, corrected_square = mean / (1 - b1**count), square / (1 - b2**count)
        param -= rate * (corrected_mean / (math.sqrt(corrected_square) + eps) + weight_decay * param)
    return param


def warmed(rate, step, warmup_steps):
    """The linear warm-up of update `step` (from 0): it would start at 0 one update earlier."""
    return rate * (step + 1) / (warmup_steps + 1) if step < warmup_steps else rate


def linear(step, *, value, total_steps, warmup_steps, final):
    done = min(max(step - warmup_steps, 0) / (total_steps - warmup_steps), 1.0)
    return warmed((1 - done) * value + done * final, step, warmup_steps)


def cosine(step, *, value, total_steps, warmup_steps, final):
    """Loshchilov and Hutter 2017, eq. 5: eta_min + (eta_max - eta_min) (1 + cos(pi T_cur / T_i)) / 2."""
    done = min(max(step - warmup_steps, 0) / (total_steps - warmup_steps), 1.0)
    return warmed(final + (value - final) * (1 + math.cos(math.pi * done)) / 2, step, warmup_steps)


# Trees and figures.


def tree_sum(terms):
    """sum(0..M) = sum(0..P) + sum(P..M), P the largest power of two below M; keeps the terms' own precision."""
    if len(terms) == 1:
        return terms[0]
    power = 1
    while 2 * power < len(terms):
        power *= 2
    return tree_sum(terms[:power]) + tree_sum(terms[power:])


def correlation(x, y):
    """Pearson 1895."""
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    joint = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return joint / math.sqrt(math.fsum((a - mean_x) ** 2 for a in x) * math.fsum((b - mean_y) ** 2 for b in y))


def mean_interval(values):
    """Mean and 1.96 standard errors; the variance is divided by n - 1 (Student 1908)."""
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, 1.96 * math.sqrt(variance / len(values))
