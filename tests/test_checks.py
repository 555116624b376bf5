import pytest
import torch

from rlhf.checks import check_integer, check_mask, check_rank, check_same_shape, check_value


def test_checks_pass_what_fits():
    x = torch.zeros(2, 3)
    check_same_shape("f", x=x, y=torch.ones(2, 3, dtype=torch.int64))
    check_rank("f", 2, x=x)
    check_mask("f", x.bool(), x=x)
    check_integer("f", x=x.long())
    check_value("f", True, "anything", x=1)


def test_numbers_in_tensors_are_not_read():
    """So that vmap, grad and torch.compile can take hyperparameters."""
    check_value("f", torch.tensor(-1.0) > 0, "above 0", x=torch.tensor(-1.0))
    torch.vmap(lambda x: (check_value("f", (x >= 0) & (x <= 1), "in [0, 1]", x=x), x)[1])(torch.tensor([0.5, 2.0]))


@pytest.mark.parametrize(
    ("check", "error", "message"),
    [
        pytest.param(
            lambda: check_same_shape("f", x=torch.zeros(2, 3), y=torch.zeros(2, 3), z=torch.zeros(2, 4)),
            ValueError,
            "f: z has shape (2, 4), expected (2, 3) like x",
            id="same_shape",
        ),
        pytest.param(
            lambda: check_same_shape("f", x=torch.zeros(1, 3), y=torch.zeros(3)),
            ValueError,
            "f: y has shape (3,), expected (1, 3) like x",
            id="same_shape_broadcastable",
        ),
        pytest.param(
            lambda: check_rank("f", 2, x=torch.zeros(2, 3), y=torch.zeros(3)),
            ValueError,
            "f: y has shape (3,), expected 2 dimensions",
            id="rank",
        ),
        pytest.param(
            lambda: check_mask("f", torch.ones(3), x=torch.zeros(3)),
            TypeError,
            "f: mask has dtype torch.float32, expected torch.bool (True = counts)",
            id="mask_dtype",
        ),
        pytest.param(
            lambda: check_mask("f", torch.ones(3, dtype=torch.bool), x=torch.zeros(4), y=torch.zeros(4)),
            ValueError,
            "f: mask has shape (3,), expected (4,) like x",
            id="mask_shape",
        ),
        pytest.param(
            lambda: check_integer("f", x=torch.zeros(3, dtype=torch.int64), y=torch.zeros(3, dtype=torch.int32)),
            TypeError,
            "f: y has dtype torch.int32, expected torch.int64",
            id="integer",
        ),
        pytest.param(
            lambda: check_value("f", False, "above 0", rate=-1.5),
            ValueError,
            "f: rate is -1.5, expected above 0",
            id="value",
        ),
    ],
)
def test_checks_say_what_was_got_and_what_was_expected(check, error, message):
    with pytest.raises(error) as caught:
        check()
    assert str(caught.value) == message
