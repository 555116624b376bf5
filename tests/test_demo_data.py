"""The embedded example: the same bytes everywhere, valid data, and a judge that says what its docstring says."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.data.dataset import load_dataset, texts
from rlhf.data.demo_data import ITEMS, EmbeddedFiles, gold_score, write_embedded
from rlhf.data.schema import DEMONSTRATIONS, PREFERENCES, PROMPTS
from rlhf.errors import UserError


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> EmbeddedFiles:
    return write_embedded(tmp_path_factory.mktemp("embedded") / "new" / "folder", size=1500)


@pytest.fixture(scope="module")
def data(files: EmbeddedFiles) -> dict[str, list[dict]]:
    return {name: json.loads(path.read_text()) for name, path in files._asdict().items()}


def digests(files: EmbeddedFiles) -> list[str]:
    return [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in files]


def test_the_same_seed_gives_the_same_bytes_in_every_process(tmp_path):
    here = digests(write_embedded(tmp_path / "here", seed=7, size=40))
    assert digests(write_embedded(tmp_path / "here", seed=7, size=40)) == here  # over what is there
    program = (
        "from pathlib import Path; from rlhf.data.demo_data import *; write_embedded(Path('there'), seed=7, size=40)"
    )
    environment = os.environ | {"PYTHONHASHSEED": "12345"}
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, cwd=tmp_path, env=environment)
    there = EmbeddedFiles(*(tmp_path / "there" / f"{name}.json" for name in EmbeddedFiles._fields))
    assert digests(there) == here
    assert not set(digests(write_embedded(tmp_path / "other", seed=8, size=40))) & set(here)


def test_a_file_of_the_users_is_not_overwritten(tmp_path):
    mine = tmp_path / "prompts.json"
    mine.write_text('[{"prompt": "mine"}]')
    with pytest.raises(UserError, match=r"prompts\.json: already exists, and is not what the example would write"):
        write_embedded(tmp_path, size=40)
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.json"]
    assert mine.read_text() == '[{"prompt": "mine"}]'


def test_every_file_is_valid_data_of_its_kind(files, data, tokenizer, tmp_path):
    for path, schema in (
        (files.demonstrations, DEMONSTRATIONS),
        (files.preferences, PREFERENCES),
        (files.prompts, PROMPTS),
        (files.heldout_prompts, PROMPTS),
    ):
        assert len(list(texts(path, schema))) == len(data[path.stem]) * len(schema.keys)
    assert len(data["demonstrations"]) == len(data["preferences"]) == 1500
    assert load_dataset(files.preferences, PREFERENCES, tokenizer, tmp_path).dropped == 0


def test_held_out_prompts_are_new(data):
    heldout = {record["prompt"] for record in data["heldout_prompts"]}
    assert len(heldout) == len(data["heldout_prompts"]) >= 100
    for name in ("demonstrations", "preferences", "prompts"):
        assert not heldout & {record["prompt"] for record in data[name]}, name
    assert len({record["prompt"] for record in data["prompts"]}) == len(data["prompts"])


def test_nothing_was_trained_on_the_items_with_the_problems_of_the_held_out_prompts(data):
    """As the docstring of `EmbeddedFiles.heldout_prompts` says."""

    def case(prompt: str) -> str:
        item = next(item for item in ITEMS if f" {item} " in prompt)
        return prompt[prompt.index(f" {item} ") :]  # the item and its problem, without the opening

    heldout = {case(record["prompt"]) for record in data["heldout_prompts"]}
    for name in ("demonstrations", "preferences", "prompts"):
        assert not heldout & {case(record["prompt"]) for record in data[name]}, name


def test_prompts_name_the_item_that_their_column_says(data):
    for name in ("prompts", "heldout_prompts"):
        for record in data[name]:
            assert record.keys() == {"prompt", "item"}
            assert record["item"] in ITEMS
            assert f" {record['item']} " in record["prompt"]
            assert sum(f" {item} " in record["prompt"] for item in ITEMS) == 1


def test_demonstrations_are_of_mixed_quality(data):
    scores = gold_score(*zip(*((r["prompt"], r["completion"]) for r in data["demonstrations"]), strict=True))
    assert min(scores) < 0
    assert max(scores) == 4
    assert -0.5 < sum(scores) / len(scores) < 2.5


def test_preferences_follow_the_judge_but_not_always(data):
    pairs = data["preferences"]
    prompts = [pair["prompt"] for pair in pairs]
    chosen, rejected = (gold_score(prompts, [pair[key] for pair in pairs]) for key in ("chosen", "rejected"))
    decided = [c > r for c, r in zip(chosen, rejected, strict=True) if c != r]
    assert 0.8 < sum(decided) / len(decided) < 0.99
    assert any(c == r for c, r in zip(chosen, rejected, strict=True))


PROMPT = "Customer: My tea arrived late.\nAgent:"


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        (" I am sorry about your tea. We will refund you in full. Have a lovely day.", 4),
        (" Sorry that your tea arrived late. We will repair it for free. Thank you for your patience.", 4),
        (" WE APOLOGISE for the TEA. We will send you a new one today. We are glad to help.", 4),
        (" I am sorry about your tea.", 2),  # an apology, the item
        (" I am sorry about your lamp.", 0),  # an apology, somebody else's item
        (" We will refund you in full.", 1),
        (" We will refund you in full. We will refund you in full.", 0),  # a repeated sentence
        (" We will refund you in full", 0),  # an unfinished sentence
        (" That is not my problem.", -1),
        (" That is not my problem. Nothing can be done. I am busy now.", -3),
        (" These things happen. These things happen.", -3),  # two phrases and a repetition
        ("", -1),
        (" Teapots and steam.", 0),  # whole words count
        (" lamp kettle scarf.", -3),
    ],
)
def test_gold_score_counts_points(reply, score):
    assert gold_score([PROMPT], [reply]) == [score]


def test_gold_score_has_the_signature_of_a_reward_function():
    scores = gold_score(prompts=[PROMPT] * 2, completions=[" I am sorry.", ""], item=["tea", "tea"], other=[1, 2])
    assert scores == [1.0, -1.0]
    assert all(type(score) is float for score in scores)
    assert gold_score([], []) == []
    with pytest.raises(ValueError, match="shorter"):
        gold_score([PROMPT], [])


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="cannot be written"):
            write_embedded(folder, size=2)
