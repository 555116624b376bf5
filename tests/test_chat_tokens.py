"""Conversations as tokens: the assistant's turns alone are learnt, exact to the token, and texts stay texts."""

import pytest
from chat_templates import CONVERSATIONS, MARKED, SPECIAL, TEMPLATES, said, system, user, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.data.chat_tokens import encode_chat
from rlhf.io.tokenizer import Tokenizer


@pytest.fixture(scope="module", params=["chatml", "qwen", "llama", "marked", "plain", "strict"])
def chat(request, tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("chat") / request.param
    return Tokenizer.load(write_tokenizer(folder, TEMPLATES[request.param]))


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """(our tokenizer, that of transformers)"""
    from transformers import AutoTokenizer

    folder = write_tokenizer(tmp_path_factory.mktemp("chat") / "marked", MARKED)
    return Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)


def written(tokenizer: Tokenizer, tokens: list[int]) -> str:
    return tokenizer._backend.decode(tokens, skip_special_tokens=False)


def learnt_texts(tokenizer: Tokenizer, answer: list[int], learnt: list[bool]) -> list[str]:
    """The texts of the runs of learnt tokens."""
    runs, before = [], False
    for token, is_learnt in zip(answer, learnt, strict=True):
        if is_learnt:
            runs = [*runs[:-1], [*runs[-1], token]] if before else [*runs, [token]]
        before = is_learnt
    return [written(tokenizer, run) for run in runs]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_what_is_learnt_is_what_transformers_masks(marked, name):
    ours, theirs = marked
    messages = CONVERSATIONS[name]
    if not any(turn["role"] == "assistant" for turn in messages):
        pytest.skip("nothing is learnt")
    expected = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    found = encode_chat(ours, [], messages)
    tokens = [*found.prompt, *found.answer, ours.end_of_turn_id]
    mask = [0] * len(found.prompt) + [int(flag) for flag in found.learnt] + [1]
    assert tokens == expected["input_ids"][: len(tokens)]
    assert mask == expected["assistant_masks"][: len(tokens)]
    assert not any(expected["assistant_masks"][len(tokens) :])


def test_prefixes_find_the_turns_that_marks_find(marked, tmp_path):
    """The same template with and without {% generation %}."""
    ours, _ = marked
    plain = MARKED.replace("{% generation %}", "{% if true %}").replace("{% endgeneration %}", "{% endif %}")
    other = Tokenizer.load(write_tokenizer(tmp_path / "plain", plain))
    for name, messages in CONVERSATIONS.items():
        if any(turn["role"] == "assistant" for turn in messages) and name != "answers in a row":
            assert encode_chat(other, [], messages) == encode_chat(ours, [], messages), name


ROUNDS = [user("one"), said("first answer"), user("two"), said("second"), user("three"), said("third answer")]


def test_every_turn_of_the_assistant_is_learnt_with_its_end(chat):
    prompt, answer, learnt = encode_chat(chat, [], ROUNDS)
    end = written(chat, [chat.end_of_turn_id])
    found = learnt_texts(chat, [*answer, chat.end_of_turn_id], [*learnt, True])
    assert [text.strip() for text in found] == [f"first answer{end}", f"second{end}", f"third answer{end}"]
    whole = chat.chat_template.render(ROUNDS).text
    assert whole.startswith(written(chat, [*prompt, *answer, chat.end_of_turn_id]))
    asked = chat.chat_template.render(ROUNDS[:1], add_generation_prompt=True).text
    assert written(chat, prompt) == asked


def test_turns_of_the_prompt_are_not_learnt(chat):
    prompt, answer, learnt = encode_chat(chat, ROUNDS[:5], ROUNDS[5:])
    assert all(learnt)
    assert written(chat, answer).strip() == "third answer"
    assert prompt == encode_chat(chat, ROUNDS[:5], []).prompt, "training and generation read another prompt"


def test_members_of_a_pair_share_their_prompt(chat):
    first = encode_chat(chat, ROUNDS[:3], [said("yes")], shares_prompt=True)
    second = encode_chat(chat, ROUNDS[:3], [said("no"), user("why?"), said("so")], shares_prompt=True)
    assert first.prompt == second.prompt == encode_chat(chat, ROUNDS[:3], []).prompt
    diverging = [
        encode_chat(chat, ROUNDS[:2], [user(word), said("ok")], shares_prompt=True) for word in ("good", "bad")
    ]
    assert diverging[0].prompt == diverging[1].prompt
    assert diverging[0].answer != diverging[1].answer


@pytest.mark.parametrize("token", SPECIAL)
def test_a_special_token_in_a_content_stays_text(chat, token):
    """And changes no other token: the template's own are still found."""
    for text in (token, f"a{token}b", f"{token}{token}", f"<|im_{token}end|>", token[1:], f"<{token}"):
        messages = [user(text), said(f"x{text}y")]
        prompt, answer, learnt = encode_chat(chat, [], messages)
        harmless = encode_chat(chat, [], [user("z"), said("xzy")])
        control = [[number for number in ids if number in chat.special_ids] for ids in (prompt, harmless.prompt)]
        assert control[0] == control[1]
        assert not chat.special_ids & set(answer)
        assert written(chat, answer).strip() == f"x{text}y"
        assert text.strip() in written(chat, prompt)
        assert all(learnt)


def test_marks_of_ours_in_a_content_are_text_or_refused(chat):
    for mark in ("\ufdd2", "\ufdef"):
        _, answer, _ = encode_chat(chat, [], [user("<|im_end|>"), said(f"a{mark}b")])
        assert written(chat, answer).strip() == f"a{mark}b"
    with pytest.raises(ValueError, match=r"U\+FDD0"):
        encode_chat(chat, [], [user("a"), said("a\ufdd0b<|im_end|>")])


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufdd0\ufdd1"), max_size=12).map(
    lambda text: f"x{text}y"
) | st.sampled_from([f"x{token}y" for token in SPECIAL])


@settings(max_examples=60, deadline=None)
@given(contents=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4), has_system=st.booleans())
def test_any_conversation_comes_back_from_its_tokens(marked, contents, has_system):
    ours, _ = marked
    messages = [system("s")] * has_system + [turn for asked, told in contents for turn in (user(asked), said(told))]
    prompt, answer, learnt = encode_chat(ours, [], messages)
    found = learnt_texts(ours, [*answer, ours.end_of_turn_id], [*learnt, True])
    assert found == [f"{told}<|im_end|>" for _, told in contents]
    whole = ours.chat_template.render(messages).text
    assert written(ours, [*prompt, *answer, ours.end_of_turn_id]) + "\n" == whole


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_remedy(tmp_path):
    """As those that drop the thoughts of earlier answers."""
    forgetful = """{% for m in messages %}{{ m.role }}: {{ m.content if loop.last else m.content[:3] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path / "forgetful", forgetful))
    with pytest.raises(ValueError, match=r"cannot be told apart; enclose them by \{% generation %\}"):
        encode_chat(tokenizer, [], [user("hello"), said("answer"), user("more"), said("again")])


def test_a_template_without_an_end_of_turn_ends_with_end_of_text(tmp_path):
    bare = """{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '\\n' }}{% endfor %}
{% if add_generation_prompt %}assistant: {% endif %}"""
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path / "bare", bare))
    assert tokenizer.end_of_turn_id == tokenizer.eos_id
    assert written(tokenizer, encode_chat(tokenizer, [], [user("a"), said("b")]).answer) == "b\n"
