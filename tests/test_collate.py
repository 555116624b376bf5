"""From records to micro-batches: every index checked by a loop over rows and columns that knows nothing of packing."""

import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf import random
from rlhf.batches import Rows
from rlhf.data.collate import (
    PackedCompletions,
    Prefetch,
    join_completions,
    pack_completions,
    pair_batches,
    ppo_batch,
    prompt_batches,
    token_batches,
    unpack_sequences,
    unpack_tokens,
)
from rlhf.data.dataset import load_dataset
from rlhf.data.schema import DEMONSTRATIONS, PREFERENCES

MAX_LENGTHS = [8, 13, 40]


def prompts_of(count: int) -> list[str]:
    """Small letters only, of many lengths; completions are in capitals, so that a token tells where it comes from."""
    return ["abc"[: n % 4] + "xy" * (n % 7) for n in range(count)]


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("demonstrations")
    records = [{"prompt": p, "completion": "AB"[: 1 + n % 2] * (1 + n % 5)} for n, p in enumerate(prompts_of(23))]
    (folder / "data.json").write_text(json.dumps(records))
    return load_dataset(folder / "data.json", DEMONSTRATIONS, tokenizer, folder / "cache")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("pairs")
    records = [
        {"prompt": p, "chosen": "C" * (1 + n % 6), "rejected": "R" * (1 + (n * 5) % 9), "margin": n / 4}
        for n, p in enumerate(prompts_of(19))
    ]
    (folder / "data.json").write_text(json.dumps(records))
    return load_dataset(folder / "data.json", PREFERENCES, tokenizer, folder / "cache")


def sequences_in(rows: Rows) -> dict[int, list[int]]:
    """Flat index of each sequence's first token -> its tokens, read off cell by cell."""
    found: dict[int, list[int]] = {}
    height, width = rows.tokens.shape
    for row in range(height):
        begin = 0
        for column in range(width):
            segment = int(rows.segments[row, column])
            if segment == 0:
                continue
            if column == 0 or int(rows.segments[row, column - 1]) != segment:
                begin = row * width + column
                found[begin] = []
            assert int(rows.positions[row, column]) == len(found[begin])
            found[begin].append(int(rows.tokens[row, column]))
    return found


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("loss_on", ["completion", "all"])
@pytest.mark.parametrize("max_length", MAX_LENGTHS)
def test_token_batches_predict_exactly_the_tokens_that_count(demonstrations, tokenizer, max_length, loss_on, rows):
    records = list(range(len(demonstrations)))
    batches = token_batches(
        demonstrations, records, max_length=max_length, rows=rows, loss_on=loss_on, key=random.key(1)
    )
    expected = Counter(tuple(demonstrations.sequences(r, max_length)[0].tokens.tolist()) for r in records)
    found: Counter = Counter()
    for batch in batches:
        assert batch.rows.tokens.shape[0] <= rows
        assert batch.mask.dtype == torch.bool
        assert len(batch.mask) >= 2  # one entry is followed by filling
        assert batch.mask.all() or batch.mask.tolist() == [True, False]
        predicted = dict(zip(batch.predictors[batch.mask].tolist(), batch.targets[batch.mask].tolist(), strict=True))
        assert len(predicted) == batch.mask.sum(), "a position predicts twice"
        wanted = {}
        for begin, tokens in sequences_in(batch.rows).items():
            found[tuple(tokens)] += 1
            for place in range(1, len(tokens)):
                text = tokenizer.decode([tokens[place]])
                is_answer = text.isupper() or (tokens[place] == tokenizer.eos_id)
                if loss_on == "all" or is_answer:
                    wanted[begin + place - 1] = tokens[place]
        assert predicted == wanted
    assert found == expected


def test_token_batches_have_keys_of_their_own(demonstrations):
    key = random.key(3)
    batches = token_batches(demonstrations, range(20), max_length=13, rows=1, loss_on="all", key=key)
    assert len(batches) > 3
    for number, batch in enumerate(batches):
        assert torch.equal(batch.key, random.fold_in(key, number))


def test_token_batches_of_no_records_are_none(demonstrations):
    assert token_batches(demonstrations, [], max_length=9, rows=2, loss_on="all", key=random.key(0)) == []


def test_ahead_gives_every_item_once_and_makes_at_most_one_before_it_is_asked_for():
    made = []
    items = Prefetch(made.append(number) or number for number in range(4))
    assert made == []
    for number in items:
        assert made == list(range(number + 1))
        items.prepare()
        items.prepare()
        assert made == list(range(min(number + 2, 4)))
    assert list(items) == []
    assert list(Prefetch(range(3))) == [0, 1, 2]


@pytest.mark.parametrize("max_length", [2, 3, 5])
def test_token_batches_of_cut_records_still_have_targets(demonstrations, max_length):
    batches = token_batches(
        demonstrations, range(23), max_length=max_length, rows=4, loss_on="completion", key=random.key(0)
    )
    for batch in batches:
        begins = sequences_in(batch.rows)
        assert all(1 < len(tokens) <= max_length for tokens in begins.values())
        assert len(batch.targets) >= len(begins)


@pytest.mark.parametrize("margins", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("max_length", MAX_LENGTHS)
def test_pair_batches_point_at_the_last_token_of_both_members(pairs, tokenizer, max_length, rows, margins):
    records = list(range(3, len(pairs)))
    batches = pair_batches(pairs, records, max_length=max_length, rows=rows, margins=margins)
    assert sorted(record for pack in batches for record in pack.records) == records
    for pack in batches:
        batch = pack.batch
        assert batch.rows.tokens.shape[0] <= max(2, rows)
        assert batch.mask.tolist() == [True] * len(pack.records) + [False] * (len(pack.records) == 1)
        batch = batch._replace(**{name: getattr(batch, name)[batch.mask] for name in ("chosen", "rejected", "margin")})
        ends = {begin + len(tokens) - 1: tokens for begin, tokens in sequences_in(batch.rows).items()}
        assert sorted(ends) == sorted(batch.chosen.tolist() + batch.rejected.tolist())
        for place, record in enumerate(pack.records):
            chosen, rejected = (member.tokens.tolist() for member in pairs.sequences(record, max_length))
            assert ends[int(batch.chosen[place])] == chosen
            assert ends[int(batch.rejected[place])] == rejected
            assert "R" not in tokenizer.decode(chosen)
            assert "C" not in tokenizer.decode(rejected)
            assert float(batch.margin[place]) == (record / 4 if margins else 0.0)


@pytest.mark.parametrize("rows", [1, 3, 50])
def test_prompt_batches_hold_every_prompt_with_its_key(rows):
    lengths = [3, 1, 7, 3, 2, 9, 1]
    prompts = [np.arange(1, length + 1) * 10 + number for number, length in enumerate(lengths)]
    keys = random.split(random.key(5), len(prompts))
    batches = prompt_batches(prompts, keys, rows=rows)
    order = [number for _, numbers in batches for number in numbers]
    assert sorted(order) == list(range(len(prompts)))
    assert [lengths[number] for number in order] == sorted(lengths)  # similar lengths stand together
    for batch, numbers in batches:
        assert 1 <= len(numbers) <= rows
        assert batch.prompts.dtype == batch.lengths.dtype == torch.int64
        assert batch.prompts.shape == (len(numbers), max(lengths[number] for number in numbers))
        for row, number in enumerate(numbers):
            assert int(batch.lengths[row]) == lengths[number]
            assert batch.prompts[row, : lengths[number]].tolist() == prompts[number].tolist()
            assert not batch.prompts[row, lengths[number] :].any()
            assert torch.equal(batch.keys[row], keys[number])


def test_prompt_batches_of_no_prompts_are_none():
    assert prompt_batches([], torch.zeros(0, 2, dtype=torch.int32), rows=3) == []


COUNT, STEPS = 11, 6
PROMPT_LENGTHS = [1 + (5 * number) % 7 for number in range(COUNT)]
ANSWER_LENGTHS = torch.tensor([1 + (3 * number) % STEPS for number in range(COUNT)])
PROMPTS = [np.arange(length) + 100 * (number + 1) for number, length in enumerate(PROMPT_LENGTHS)]
ANSWERS = torch.arange(COUNT)[:, None] * 100 + 10_000 + torch.arange(STEPS)
REAL = torch.arange(STEPS) < ANSWER_LENGTHS[:, None]


def packs_of(which, rows: int = 2, row_length: int = 13) -> list[PackedCompletions]:
    tokens = torch.where(REAL, ANSWERS, -1)  # what lies behind a completion's end must not be read
    joined = join_completions(PROMPTS, tokens, ANSWER_LENGTHS)
    return pack_completions(joined, which, rows=rows, row_length=row_length)


@pytest.mark.parametrize("rows", [1, 2, 20])
@pytest.mark.parametrize("which", [list(range(COUNT)), [7, 2, 9], [4], range(3, 6)], ids=str)
def test_pack_completions_predicts_every_completion_token(which, rows):
    packs = packs_of(which, rows)
    assert sorted(itertools.chain(*(pack.sequences.tolist() for pack in packs))) == sorted(which)
    for pack in packs:
        batch, wanted = pack.batch, {}
        assert batch.rows.tokens.shape[0] <= rows
        tokens, sequences = len(pack.cells), len(pack.sequences)
        assert batch.mask.tolist() == [True] * tokens + [False] * (len(batch.mask) - tokens)
        assert len(batch.predictors) == len(batch.targets) == len(batch.mask) == max(2, tokens)
        assert len(batch.last) == max(2, sequences)
        ends = []
        for begin, tokens in sequences_in(batch.rows).items():
            number = tokens[0] // 100 - 1
            ends.append((begin + len(tokens) - 1, number))
            answer = ANSWERS[number, : int(ANSWER_LENGTHS[number])].tolist()
            assert tokens == PROMPTS[number].tolist() + answer
            for step, token in enumerate(answer):
                wanted[begin + PROMPT_LENGTHS[number] + step - 1] = (token, number, step)
        predictors, targets = batch.predictors[batch.mask].tolist(), batch.targets[batch.mask].tolist()
        cells = [divmod(cell, STEPS) for cell in pack.cells.tolist()]
        listed = zip(predictors, targets, cells, strict=True)
        assert {predictor: (target, *cell) for predictor, target, cell in listed} == wanted
        assert len(predictors) == len(wanted)
        last = batch.last[:sequences].tolist()
        assert sorted(zip(last, pack.sequences.tolist(), strict=True)) == sorted(ends)


def test_unpack_tokens_puts_every_token_back():
    values = torch.where(REAL, torch.arange(COUNT * STEPS, dtype=torch.float64).view(COUNT, STEPS) + 1, torch.nan)
    packs = packs_of(range(COUNT))
    assert len(packs) > 2
    parts = [values.flatten()[pack.cells] for pack in packs]
    whole = unpack_tokens(packs, parts, (COUNT, STEPS))
    assert whole.dtype == torch.float64
    assert torch.equal(whole, torch.where(REAL, values, 0.0))


def test_unpack_tokens_leaves_what_was_not_packed_at_zero():
    which = [2, 5, 6]
    packs = packs_of(which)
    whole = unpack_tokens(packs, [torch.ones(len(pack.cells)) for pack in packs], (COUNT, STEPS))
    packed = torch.zeros(COUNT, dtype=torch.bool)
    packed[which] = True
    assert torch.equal(whole, (REAL & packed[:, None]).float())


@pytest.mark.parametrize("shape", [(COUNT,), (COUNT, 3)])
def test_unpack_sequences_puts_every_sequence_back(shape):
    values = torch.arange(math.prod(shape), dtype=torch.float64).view(shape)
    packs = packs_of(range(COUNT), rows=1)
    assert {len(pack.sequences) for pack in packs} >= {1, 2}  # a micro-batch of a single one is filled up
    filling = torch.full((1, *shape[1:]), torch.nan)
    parts = [torch.cat([values[pack.sequences], filling])[: len(pack.batch.last)] for pack in packs]
    assert torch.equal(unpack_sequences(packs, parts), values)


def test_ppo_batch_gathers_each_tokens_own_numbers():
    def array(offset: int) -> Tensor:
        values = torch.arange(COUNT * STEPS).view(COUNT, STEPS) / 7 + offset
        return torch.where(REAL, values, torch.nan)

    names = ("old_log_probs", "ref_log_probs", "old_values", "advantages", "returns")
    arrays = dict(zip(names, map(array, range(0, 500, 100)), strict=True))
    packs = packs_of([8, 1, 10, 3, 4])
    weights = torch.arange(COUNT) / 3.0
    batches = [ppo_batch(pack, **arrays, kl_coef=0.3, weights=weights) for pack in packs]
    for pack, batch in zip(packs, batches, strict=True):
        for name in ("rows", "predictors", "targets", "mask"):
            assert getattr(batch, name) is getattr(pack.batch, name)
        assert batch.kl_coef.shape == ()
        assert float(batch.kl_coef) == pytest.approx(0.3)
        owners = [cell // STEPS for cell in pack.cells.tolist()]
        assert batch.weights.tolist() == weights[owners].tolist()
        assert [int(pack.sequences[number]) for number in batch.sequences] == owners
        for name, values in arrays.items():
            expected = [values[divmod(cell, STEPS)] for cell in pack.cells.tolist()]
            assert torch.equal(getattr(batch, name), torch.stack(expected))
    for name, values in arrays.items():
        whole = unpack_tokens(packs, [getattr(batch, name) for batch in batches], (COUNT, STEPS))
        rows = [1, 3, 4, 8, 10]
        assert torch.equal(whole[rows], torch.where(REAL, values, 0.0)[rows])
