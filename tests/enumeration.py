"""A policy whose completions can all be listed: up to three tokens of three, of which one ends the completion."""

import itertools

import torch

END, LENGTH, VOCABULARY = 2, 3, 3


def _completions():
    found = []
    for length in range(1, LENGTH + 1):
        for start in itertools.product((0, 1), repeat=length - 1):
            last = range(VOCABULARY) if length == LENGTH else (END,)
            found += [(*start, token) for token in last]
    return found


COMPLETIONS = _completions()
"""All 15, as tuples of tokens."""
MASK = torch.tensor([[t < len(y) for t in range(LENGTH)] for y in COMPLETIONS])
PREFIXES = sorted({y[:t] for y in COMPLETIONS for t in range(len(y))})
"""The states in which a token is drawn, each a row of a table of logits."""
_ROWS = torch.tensor([[PREFIXES.index(y[:t]) if t < len(y) else 0 for t in range(LENGTH)] for y in COMPLETIONS])
_TOKENS = torch.tensor([[y[t] if t < len(y) else 0 for t in range(LENGTH)] for y in COMPLETIONS])


def log_probs(table):
    """[15, 3] nats: the log-prob of each token of each completion, 0 after its end, from logits [prefixes, 3]."""
    return torch.where(MASK, torch.log_softmax(table, dim=-1)[_ROWS, _TOKENS], 0.0)


def tilted(table, rewards, beta):
    """The table of log-probs of pi_ref exp(r / beta) / Z, from the mass of the completions with each prefix."""
    weights = log_probs(table).sum(1).exp() * torch.exp(rewards / beta)
    mass = {
        prefix: sum(w for y, w in zip(COMPLETIONS, weights, strict=True) if y[: len(prefix)] == prefix)
        for prefix in {y[:t] for y in COMPLETIONS for t in range(len(y) + 1)}
    }
    return torch.stack(
        [
            torch.stack([(mass[(*prefix, token)] / mass[prefix]).log() for token in range(VOCABULARY)])
            for prefix in PREFIXES
        ]
    )
