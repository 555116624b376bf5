"""Weights of tokens: the mean that each is meant to be, however the batch is split."""

import pytest
import torch
from laws import assert_close, floats, prefix_mask

from rlhf.losses import sft_loss
from rlhf.ops import mean_metrics
from rlhf.tree import tree_sum
from rlhf.weighting import loss_weights

LENGTHS = torch.tensor([3, 1, 5, 2])
MASK = prefix_mask(LENGTHS, 5)
LOG_PROBS = -floats(1, 4, 5).abs()
EXPECTED = {
    "token": (-LOG_PROBS)[MASK].mean(),
    "sequence": torch.stack([-row[:n].mean() for row, n in zip(LOG_PROBS, LENGTHS, strict=True)]).mean(),
    "constant": torch.stack([-row[:n].sum() / 8 for row, n in zip(LOG_PROBS, LENGTHS, strict=True)]).mean(),
}


def options(per):
    return {"per": per, "length": 8 if per == "constant" else None}


@pytest.mark.parametrize("per", EXPECTED)
@pytest.mark.parametrize("split", [[[0, 1, 2, 3]], [[2], [0, 3], [1]], [[3], [2], [1], [0]]], ids=str)
def test_the_loss_is_the_mean_that_is_asked_for_in_any_split(per, split):
    weights = loss_weights(LENGTHS, **options(per)).double()[:, None]

    def part(rows):
        return sft_loss(LOG_PROBS[rows], mask=MASK[rows], weights=weights[rows])[1]

    assert_close(mean_metrics(tree_sum([part(rows) for rows in split]))["loss/sft"], EXPECTED[per], 1e-6)


def test_per_token_is_exactly_one_and_an_empty_sequence_has_no_weight():
    assert loss_weights(LENGTHS).tolist() == [1.0] * 4
    assert loss_weights(torch.tensor([2, 0]), per="sequence").tolist() == [0.5, 0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"per": "batch"}, "per is batch, expected token, sequence or constant"),
        ({"per": "constant"}, "length is None, expected above 0"),
        ({"per": "constant", "length": 0}, "length is 0, expected above 0"),
        ({"per": "token", "length": 5}, "length is 5, expected None"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        loss_weights(LENGTHS, **arguments)
