"""Pieces of a completion, token by token: they join to the text whatever the tokens are."""

from hypothesis import given, settings
from hypothesis import strategies as st


@settings(deadline=None, max_examples=60)
@given(text=st.text(max_size=40))
def test_pieces_join_to_the_text(tokenizer, text):
    (tokens,) = tokenizer.encode([text])
    tokens = [*tokens, tokenizer.eos_id]
    pieces = tokenizer.pieces(tokens)
    assert len(pieces) == len(tokens)
    assert "".join(pieces) == tokenizer.decode(tokens) == text
    assert pieces[-1] == ""  # the end-of-text token


@settings(deadline=None, max_examples=100)
@given(tokens=st.lists(st.integers(0, 299), max_size=30))
def test_pieces_of_any_tokens_join_to_what_they_decode_to(tokenizer, tokens):
    pieces = tokenizer.pieces(tokens)
    assert len(pieces) == len(tokens)
    assert "".join(pieces) == tokenizer.decode(tokens)


def test_a_character_over_several_tokens_belongs_to_the_last(tokenizer):
    (tokens,) = tokenizer.encode(["a𝄞b"])
    assert tokenizer.pieces(tokens) == ["a", "", "", "", "𝄞", "b"]
