r"""Conversations of every form come to the columns that texts have, and what is wrong is refused by its place."""

import json
from pathlib import Path

import pytest
from chat_templates import MARKED, TEMPLATES, said, system, user, write_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data.collate import token_batches
from rlhf.data.conversations import as_completion, as_text, to_columns
from rlhf.data.dataset import load_dataset, texts
from rlhf.data.schema import DEMONSTRATIONS, PREFERENCES, PROMPTS, read_checked
from rlhf.errors import UserError
from rlhf.io.tokenizer import Tokenizer
from rlhf.random import key as new_key

PAIR, DEMO = ("chosen", "rejected"), ("completion",)
ASK, GOOD, BAD = user("hi"), said("hello"), said("go away")


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> Tokenizer:
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("chat") / "marked", MARKED))


def written(folder: Path, records: list[dict]) -> Path:
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"prompt": "hi", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"prompt": "hi", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [ASK], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"prompt": None, "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nAssistant: go away"},
    ],
    ids=["explicit", "implicit", "UltraFeedback", "text prompt", "repeated", "null prompt", "HH"],
)
def test_pairs_of_every_form_are_the_same_pair(fields):
    found = to_columns({"id": 7} | fields, PAIR)
    assert found == {"id": 7, "prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}
    assert to_columns({"id": 7} | fields, ())["prompt"] == [ASK]


TURNS = st.lists(st.sampled_from([ASK, GOOD, BAD, user("and"), system("s")]), max_size=4)


@given(shared=TURNS, first=TURNS, second=TURNS)
def test_the_implicit_prompt_is_the_longest_common_beginning(shared, first, second):
    chosen, rejected = [*shared, *first, GOOD], [*shared, *second, BAD]
    common = 0
    while common < min(len(chosen), len(rejected)) - 1 and chosen[common] == rejected[common]:
        common += 1
    if common == 0:
        with pytest.raises(ValueError, match="begin with different turns"):
            to_columns({"chosen": chosen, "rejected": rejected}, PAIR)
        return
    found = to_columns({"chosen": chosen, "rejected": rejected}, PAIR)
    assert found["prompt"] + found["chosen"] == chosen
    assert found["prompt"] + found["rejected"] == rejected
    assert len(found["prompt"]) == common >= len(shared)


def test_hh_texts_keep_every_character_of_their_turns():
    text = "\n\nHuman:  two spaces\n\nHuman lines\n\n\n\nAssistant: a\n\nb: Human: x\n\nHuman: c\n\nAssistant: d "
    found = to_columns({"chosen": text, "rejected": text[:-2] + "e"}, PAIR)
    assert [turn["role"] for turn in found["prompt"]] == ["user", "assistant", "user"]
    again = "".join(f"\n\n{'Human' if t['role'] == 'user' else 'Assistant'}: {t['content']}" for t in found["prompt"])
    assert again + f"\n\nAssistant: {found['chosen'][0]['content']}" == text


def test_messages_are_learnt_whole_and_asked_up_to_the_last_answer():
    fields = {"messages": [ASK, GOOD, user("and"), BAD], "n": 1}
    assert to_columns(fields, DEMO) == {"n": 1, "prompt": [], "completion": fields["messages"]}
    assert to_columns(fields, ()) == {"n": 1, "prompt": fields["messages"][:3]}
    assert to_columns({"prompt": "hi"} | fields, ())["prompt"] == fields["messages"][:3]


@pytest.mark.parametrize("answers", [(), DEMO, PAIR])
@pytest.mark.parametrize(
    "fields", [{"prompt": "a", "completion": "b", "chosen": "c", "rejected": "d"}, {"messages": 3}]
)
def test_texts_and_what_is_no_conversation_stay_as_they_are(fields, answers):
    assert to_columns(fields, answers) == fields


BAD_RECORDS = {
    "no content": (PROMPTS, {"prompt": [{"role": "user"}]}, "'prompt': turn 1 (user) has no 'content'"),
    "list content": (PROMPTS, {"prompt": [ASK | {"content": [{"type": "text"}]}]}, "turn 1 (user) has a list as"),
    "role": (PROMPTS, {"prompt": [{"role": 3, "content": "a"}]}, "turn 1 has the role 3"),
    "answered": (PROMPTS, {"prompt": [ASK, GOOD]}, "ends with the assistant's turn"),
    "not answered": (DEMONSTRATIONS, {"messages": [ASK]}, "no turn of the role 'assistant' (but user)"),
    "other role": (DEMONSTRATIONS, {"messages": [ASK, {"role": "gpt", "content": "a"}]}, "(but user, gpt)"),
    "empty answer": (DEMONSTRATIONS, {"messages": [ASK, said(" ")]}, "the assistant's last turn is empty"),
    "open pair": (PREFERENCES, {"chosen": [ASK, GOOD], "rejected": [ASK, BAD, ASK]}, "'rejected': ends with a turn of"),
    "two prompts": (PREFERENCES, {"chosen": [user("a"), GOOD], "rejected": [ASK, BAD]}, "begin with different turns"),
    "mixed": (PREFERENCES, {"prompt": [ASK], "chosen": "a", "rejected": "b"}, "give all as texts or all as lists"),
    "surrogate": (PROMPTS, {"prompt": [user("\udc80")]}, "'prompt' has the lone surrogate \\udc80"),
    "ShareGPT": (DEMONSTRATIONS, {"messages": [{"from": "human", "value": "a"}]}, "needs 'role' and 'content'"),
    "written list": (DEMONSTRATIONS, {"messages": "[{'role': 'user'"}, "'messages' is a list of messages written as a"),
    "written prompt": (PROMPTS, {"prompt": '[{"content": "a"}]'}, "'prompt' is a list of messages written as a text"),
    "no messages": (PROMPTS, {"prompt": []}, "'prompt' must be a text, got list"),
}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_bad_conversations_are_refused_by_file_record_column_and_remedy(tmp_path, case):
    schema, fields, piece = BAD_RECORDS[case]
    path = written(tmp_path, [fields])
    with pytest.raises(UserError) as caught:
        list(read_checked(path, schema))
    assert str(caught.value).startswith(f"{path}: record 1 (line 1)")
    assert piece in str(caught.value)


def test_texts_and_conversations_in_one_file_are_refused(tmp_path):
    path = written(tmp_path, [{"prompt": "a"}, {"prompt": [ASK]}])
    with pytest.raises(UserError, match=r"record 2 \(line 1\) has conversations, but the first record has texts"):
        list(read_checked(path, PROMPTS))


def test_conversations_without_a_template_are_refused_with_the_flag(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"the tokenizer has no chat template; add --data\.template"):
        load_dataset(written(tmp_path, [{"prompt": [ASK]}]), PROMPTS, tokenizer, tmp_path / "cache")


def test_what_the_template_refuses_is_named_by_its_record(tmp_path, chat):
    strict = chat.with_template("{{ raise_exception('never') if messages[0].content == 'b' }}{{ messages[0].content }}")
    with pytest.raises(UserError, match=r"data\.json: record 2 \(line 1\): the chat template refuses .*\(never\)"):
        load_dataset(written(tmp_path, [{"prompt": [user("a")]}, {"prompt": [user("b")]}]), PROMPTS, strict, tmp_path)


def test_only_the_turns_of_the_assistant_are_targets(tmp_path, chat):
    messages = [system("s"), ASK, GOOD, user("and"), said("more of it")]
    dataset = load_dataset(written(tmp_path, [{"messages": messages}] * 2), DEMONSTRATIONS, chat, tmp_path / "cache")
    assert dataset.end_id == chat.end_of_turn_id
    for max_length, expected in ((200, "hello<|im_end|>more of it<|im_end|>"), (45, None)):
        (batch,) = token_batches(dataset, [0], max_length=max_length, rows=1, loss_on="completion", key=new_key(0))
        targets = batch.targets[batch.mask].tolist()
        flat = batch.rows.tokens.flatten()
        assert flat[batch.predictors[batch.mask] + 1].tolist() == targets
        learnt = chat._backend.decode(targets, skip_special_tokens=False)
        if expected is None:
            assert len(targets) > 0
            assert "hello<|im_end|>more of it<|im_end|>".startswith(learnt)
        else:
            assert learnt == expected
    (whole,) = token_batches(dataset, [0], max_length=200, rows=1, loss_on="all", key=new_key(0))
    assert int(whole.mask.sum()) == len(dataset.sequences(0, 200)[0].tokens) - 1


def test_a_pair_of_conversations_is_two_answers_behind_one_prompt(tmp_path, chat):
    records = [{"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, {"chosen": [ASK, GOOD], "rejected": [ASK, GOOD]}]
    dataset = load_dataset(written(tmp_path, records), PREFERENCES, chat, tmp_path / "cache")
    assert (len(dataset), dataset.dropped) == (1, 1)
    tokens = [sequence.tokens.tolist() for sequence in dataset.sequences(0, 99)]
    written_texts = [chat._backend.decode(row, skip_special_tokens=False) for row in tokens]
    prompt = chat.chat_template.render([ASK], add_generation_prompt=True).text
    assert written_texts == [f"{prompt}hello<|im_end|>", f"{prompt}go away<|im_end|>"]


def test_the_plain_template_writes_hh_texts_as_they_are(tmp_path, tokenizer):
    plain = tokenizer.with_template(TEMPLATES["plain"])
    text = "\n\nHuman: hi\n\nAssistant: hello"
    dataset = load_dataset(
        written(tmp_path, [{"chosen": text, "rejected": text + "!"}]), PREFERENCES, plain, tmp_path / "cache"
    )
    (chosen, rejected) = dataset.sequences(0, 99)
    assert plain.decode(chosen.tokens) == text
    assert plain.decode(rejected.tokens) == f"{text}!"
    assert plain.decode(chosen.tokens[: chosen.prompt]) == "\n\nHuman: hi\n\nAssistant:"
    assert chosen.tokens[-1] == plain.eos_id


def test_hh_data_as_published_give_the_tokens_of_the_same_texts_cut_by_hand(tmp_path, tokenizer, shared_data):
    """Where there is one question: between turns the template puts the token that ends the assistant's."""
    cut = json.loads((shared_data / "hh_helpful_pref_test.json").read_text())
    cut = [pair for pair in cut if pair["prompt"].count("\n\nHuman:") == 1 and pair["prompt"].endswith("Assistant:")]
    assert len(cut) > 30
    published = [{name: pair["prompt"] + pair[name] for name in PAIR} for pair in cut]
    plain = tokenizer.with_template(TEMPLATES["plain"])
    expected = load_dataset(written(tmp_path, cut), PREFERENCES, tokenizer, tmp_path / "cache")
    found = load_dataset(written(tmp_path, published), PREFERENCES, plain, tmp_path / "cache")
    assert len(found) == len(expected)
    for record in range(len(found)):
        for ours, theirs in zip(found.sequences(record, 9999), expected.sequences(record, 9999), strict=True):
            assert ours.tokens.tolist() == theirs.tokens.tolist()
            assert ours.prompt == theirs.prompt


def test_a_tokenizer_learns_from_the_contents(tmp_path):
    path = written(tmp_path, [{"messages": [system("s"), ASK, GOOD]}])
    assert list(texts(path, DEMONSTRATIONS)) == ["s", "hi", "hello"]


def test_completions_have_the_form_of_their_prompts():
    assert as_completion("a", "b") == "b"
    assert as_completion([ASK], "b") == [said("b")]
    assert as_text([ASK, GOOD]) == "user: hi\n\nassistant: hello"
