"""What makes a record valid, and what each refusal says."""

import json
from pathlib import Path

import pytest

from rlhf.data.records import Record
from rlhf.data.schema import DEMONSTRATIONS, PREFERENCES, PROMPTS, check_record
from rlhf.errors import UserError

FILE = Path("some/file.json")
GOOD = {
    "demonstrations": (DEMONSTRATIONS, {"prompt": "p", "completion": "c"}),
    "preferences": (PREFERENCES, {"prompt": "p", "chosen": "c", "rejected": "r"}),
    "prompts": (PROMPTS, {"prompt": "p"}),
}
EVERY_KEY = [(kind, key) for kind, (schema, _) in GOOD.items() for key in schema.keys]
EVERY_ANSWER = [(kind, key) for kind, key in EVERY_KEY if key != "prompt"]


def refusal(kind: str, fields: dict) -> str:
    with pytest.raises(UserError) as caught:
        check_record(FILE, Record(7, 31, fields), GOOD[kind][0])
    message = str(caught.value)
    assert message.startswith("some/file.json: record 7 (line 31)")
    return message


@pytest.mark.parametrize("kind", GOOD)
def test_check_record_takes_good_records_and_any_other_column(kind):
    schema, fields = GOOD[kind]
    check_record(FILE, Record(1, 1, fields), schema)
    check_record(FILE, Record(1, 1, {"id": None, "n": [{}], "\ud800": "\ud800", "text": ""} | fields), schema)


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize("prompt", ["", " ", "\n"])
def test_check_record_takes_an_empty_prompt(kind, prompt):
    schema, fields = GOOD[kind]
    check_record(FILE, Record(1, 1, fields | {"prompt": prompt}), schema)


@pytest.mark.parametrize(("kind", "key"), EVERY_KEY)
def test_check_record_names_a_missing_key_and_what_is_there(kind, key):
    fields = {name: text for name, text in GOOD[kind][1].items() if name != key} | {"zebra": 1}
    message = refusal(kind, fields)
    assert f"no key {key!r}" in message
    assert "'zebra'" in message
    for needed in GOOD[kind][0].keys:
        assert f"{needed!r}" in message


@pytest.mark.parametrize(
    ("kind", "key", "spelt"),
    [
        ("demonstrations", "prompt", "promt"),
        ("demonstrations", "prompt", "Prompt"),
        ("demonstrations", "prompt", "prompts"),
        ("demonstrations", "completion", "completions"),
        ("demonstrations", "completion", "compleiton"),
        ("preferences", "chosen", "choosen"),
        ("preferences", "rejected", "rejcted"),
        ("preferences", "rejected", "reject"),
        ("prompts", "prompt", "promp t"),
    ],
)
def test_check_record_names_the_nearest_spelling(kind, key, spelt):
    fields = {spelt if name == key else name: text for name, text in GOOD[kind][1].items()}
    message = refusal(kind, fields)
    assert f"no key {key!r}" in message
    assert f"{spelt!r} looks like a misspelling of it" in message


def test_check_record_does_not_take_a_key_in_use_for_a_misspelling():
    assert "misspelling" not in refusal("preferences", {"prompt": "p", "chosen": "c"})


@pytest.mark.parametrize("value", [0, 1.5, True, ["c"], {"text": "c"}], ids=repr)
@pytest.mark.parametrize(("kind", "key"), EVERY_KEY)
def test_check_record_refuses_another_type(kind, key, value):
    message = refusal(kind, GOOD[kind][1] | {key: value})
    assert f"{key!r} must be a text" in message
    assert type(value).__name__ in message


@pytest.mark.parametrize(
    ("value", "remedy"), [(3, "write it in double quotes"), (["p"], "each record needs one text")], ids=repr
)
def test_check_record_says_how_to_give_a_text(value, remedy):
    assert refusal("prompts", {"prompt": value}).endswith(remedy)


@pytest.mark.parametrize(
    ("fields", "pieces"),
    [
        ({"messages": [{"role": "user", "content": "hi"}]}, ("'messages' is a chat", "'prompt' and 'completion'")),
        (
            {"id": 1, "conversations": [{"from": "human", "value": "hi"}]},
            ("'conversations' is a chat", "needs 'role' and"),
        ),
        ({"version": 1, "data": [GOOD["prompts"][1]]}, ("records seem to be in the list 'data'", "alone as the file")),
        ({"prompt": {"0": "a", "1": "b"}}, ("must be a text, got dict", "orient='records', lines=True")),
        ({"data": [], "tags": ["a"]}, ("found 'data', 'tags'",)),
    ],
    ids=["chat", "ShareGPT", "list below", "pandas", "other lists"],
)
def test_check_record_says_what_it_recognises(fields, pieces):
    message = refusal("demonstrations", fields)
    for piece in pieces:
        assert piece in message


@pytest.mark.parametrize(("kind", "key"), EVERY_KEY)
def test_check_record_refuses_null(kind, key):
    message = refusal(kind, GOOD[kind][1] | {key: None})
    assert f"{key!r} is null; fill it in" in message


def test_check_record_shortens_a_long_value():
    assert len(refusal("prompts", {"prompt": ["x" * 10_000]})) < 300


@pytest.mark.parametrize("text", ["", " ", "\n", "\t\r\n ", "\u00a0", "\u3000\u2003"], ids=ascii)
@pytest.mark.parametrize(("kind", "key"), EVERY_ANSWER)
def test_check_record_refuses_an_answer_without_a_character(kind, key, text):
    message = refusal(kind, GOOD[kind][1] | {key: text})
    assert f"{key!r} is {'only white space' if text else 'empty'}" in message
    assert "remove the record" in message


@pytest.mark.parametrize("surrogate", [chr(0xD800), chr(0xDFFF)], ids=ascii)
@pytest.mark.parametrize(("kind", "key"), EVERY_KEY)
def test_check_record_refuses_a_lone_surrogate(kind, key, surrogate):
    message = refusal(kind, GOOD[kind][1] | {key: f"ab{surrogate}c"})
    assert f"{key!r} has the lone surrogate \\u{ord(surrogate):04x}" in message
    assert "remove it" in message
    message.encode()  # or printing it would fail


def test_check_record_takes_a_pair_of_surrogates():
    check_record(FILE, Record(1, 1, json.loads('{"prompt": "\\ud834\\udd1e"}')), PROMPTS)


def test_check_record_knows_the_other_kinds_of_file():
    message = refusal("preferences", GOOD["demonstrations"][1])
    assert "looks like demonstrations" in message
    assert "--sft-data" in message
    message = refusal("demonstrations", GOOD["preferences"][1])
    assert "looks like preference pairs" in message
    assert "--preference-data" in message


@pytest.mark.parametrize("margin", [0, 3, -1.5, 1e-30])
def test_check_record_takes_a_margin(margin):
    check_record(FILE, Record(1, 1, GOOD["preferences"][1] | {"margin": margin}), PREFERENCES)


@pytest.mark.parametrize("margin", [None, "1", True, [1.0], {}], ids=repr)
def test_check_record_refuses_a_margin_that_is_no_number(margin):
    message = refusal("preferences", GOOD["preferences"][1] | {"margin": margin})
    assert "'margin' must be a number" in message
    assert "leave the key out" in message
    check_record(FILE, Record(1, 1, GOOD["demonstrations"][1] | {"margin": margin}), DEMONSTRATIONS)


@pytest.mark.parametrize("text", ["1e400", "-1e400", "1e39", "1" + "0" * 400], ids=["inf", "-inf", "1e39", "10^400"])
def test_check_record_refuses_a_margin_beyond_float32(text):
    """JSON has no literal for infinity, but 1e400 is one all the same, and the loss computes in float32."""
    message = refusal("preferences", GOOD["preferences"][1] | {"margin": json.loads(text)})
    assert "'margin' must be" in message
    assert len(message) < 300
