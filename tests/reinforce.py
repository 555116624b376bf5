"""A throw-away estimator, as a user writes one: REINFORCE, the baseline the mean of the prompt's other completions."""

from rlhf.estimators import AdvantageEstimate, Estimator, RewardedCompletions, register_estimator


def leave_one_out(completions: RewardedCompletions) -> AdvantageEstimate:
    """Source: Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740, eq. 8, with the KL in the reward."""
    groups, returns = completions.groups, completions.rewards.sum(dim=-1)
    same = (groups[:, None] == groups).to(returns.dtype)
    others = same @ returns - returns
    advantages = returns - others / (same.sum(dim=1) - 1)
    return AdvantageEstimate(advantages.unsqueeze(-1).expand(completions.mask.shape))


REINFORCE = Estimator("reinforce", leave_one_out, needs_critic=False)
register_estimator(REINFORCE)
