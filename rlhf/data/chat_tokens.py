r"""Conversations as tokens: the prompt, the answer, and which of the answer's tokens are learnt.

The chat template renders the whole conversation as one text, from its own words and the contents of the messages.

**Special tokens.** A special token's text that the template writes, such as `<|im_end|>`, becomes that token. The same
text in a message stays text. To tell the two apart, a mark is inserted into every such text inside a message
before rendering, and removed afterwards. The mark is a character that Unicode reserves for internal use and that no
message contains. Other messages are rendered unchanged, so templates that strip or search them work as in
`transformers`.

**Boundaries.** The text is cut where the assistant's turns begin and end, and each piece is encoded by itself, because
generation, too, encodes the prompt before it draws the answer's tokens. A turn begins after the text that the template
adds with `add_generation_prompt`. It ends with its end-of-turn token, the last special token that only white space
follows. If a template marks the assistant's text by `{% generation %}`, the boundaries are those marks. Otherwise they
are found by rendering prefixes of the conversation, and a template is refused if a rendered prefix is not the beginning
of the whole text.
"""

import itertools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from rlhf.data.conversations import Message
from rlhf.errors import UserError
from rlhf.io.chat_template import ChatTemplate, unused_mark
from rlhf.io.tokenizer import Tokenizer

TEMPLATE_FLAG = "--data.template chatml, --data.template plain, or a file with a Jinja template"


class ChatTokens(NamedTuple):
    """A conversation as token ids."""

    prompt: list[int]
    answer: list[int]
    """Token ids after the prompt, without the token that ends the last turn."""
    learnt: list[bool]
    """For each token of `answer`, True if the assistant wrote it."""


class ChatPieces(NamedTuple):
    """A conversation as texts that are encoded each by itself."""

    texts: list[str]
    """The prompt, then in turn the texts that the assistant did not write and those that it wrote, then the rest."""
    mark: str
    """The character inside special tokens that are plain text; empty if there are none."""

    @property
    def last(self) -> int:
        """Return the number of the last text that the assistant wrote; 0 if there is only a prompt."""
        return max(0, len(self.texts) - 2)


def encode_chat(
    tokenizer: Tokenizer, prompt: Sequence[Message], answer: Sequence[Message], *, shares_prompt: bool = False
) -> ChatTokens:
    """Return a conversation as token ids, cut into the pieces of `cut_chat`.

    Args:
        tokenizer: tokenizer with a chat template.
        prompt: turns that the model reads.
        answer: turns that follow the prompt.
        shares_prompt: True gives every answer to a prompt the same prompt tokens.

    Raises:
        ValueError: the template refuses the conversation, or cannot be cut at the assistant's turns.
    """
    return encode_pieces(tokenizer, [cut_chat(tokenizer, prompt, answer, shares_prompt=shares_prompt)])[0]


def encode_pieces(tokenizer: Tokenizer, chats: Sequence[ChatPieces]) -> list[ChatTokens]:
    """Return the token ids of conversations that `cut_chat` has cut, all encoded together."""
    encoded = iter(tokenizer.encode_rendered([text for chat in chats if not chat.mark for text in chat.texts]))
    found = []
    for chat in chats:
        marked = chat.mark != ""
        tokens = tokenizer.encode_rendered(chat.texts, chat.mark) if marked else [next(encoded) for _ in chat.texts]
        found.append(_joined(tokenizer, chat, tokens))
    return found


def cut_chat(
    tokenizer: Tokenizer, prompt: Sequence[Message], answer: Sequence[Message], *, shares_prompt: bool = False
) -> ChatPieces:
    """Return a conversation as the texts of its pieces.

    Args:
        tokenizer: tokenizer with a chat template.
        prompt: turns that the model reads.
        answer: turns that follow the prompt, of which those of the assistant are learnt. If empty, the prompt ends with
            the text that precedes an answer.
        shares_prompt: True puts the boundary of `prompt` and `answer` at the end of the prompt's turns, so that every
            answer has the same prompt. False counts all tokens before the first learnt one as the prompt.

    Raises:
        ValueError: the template refuses the conversation, or cannot be cut at the assistant's turns.
    """
    template = tokenizer.chat_template
    assert template is not None, "checked by check_template"
    turns, mark = _marked([*prompt, *answer], tokenizer.special_tokens)
    count = len(prompt)
    if not answer:
        return ChatPieces([template.render(turns, add_generation_prompt=True).text], mark)
    last = max(number for number, turn in enumerate(turns) if turn["role"] == "assistant") + 1
    whole = template.render(turns[:last])
    spans = whole.spans if template.marks_generation else _turn_spans(template, turns[:last], count, whole.text)
    boundary = 0
    if count and (shares_prompt or template.marks_generation):
        is_answered = turns[count]["role"] == "assistant"
        boundary = len(_prefix(template, turns[:count], whole.text, add_generation_prompt=is_answered))
    spans = [span for span in spans if span[0] >= boundary]
    if not spans:
        raise ValueError("the chat template writes no turn of the assistant")
    return ChatPieces(_cut(whole.text, spans, boundary if shares_prompt else spans[0][0]), mark)


def check_template(tokenizer: Tokenizer, source: object) -> None:
    """Raise UserError if a tokenizer has no chat template for the conversations in `source`."""
    if tokenizer.chat_template is None:
        raise UserError(f"{source}: holds conversations, but the tokenizer has no chat template; add {TEMPLATE_FLAG}")


def _turn_spans(template: ChatTemplate, turns: Sequence[Message], first: int, whole: str) -> list[tuple[int, int]]:
    """Return the ranges of the assistant's turns from `first` on, by rendering the text before and after each turn."""
    spans = []
    for number, turn in enumerate(turns):
        if number >= first and turn["role"] == "assistant":
            start = len(_prefix(template, turns[:number], whole, add_generation_prompt=True))
            end = len(_prefix(template, turns[: number + 1], whole))
            spans.append((start, end))
    return spans


def _prefix(
    template: ChatTemplate, turns: Sequence[Message], whole: str, *, add_generation_prompt: bool = False
) -> str:
    text = template.render(turns, add_generation_prompt=add_generation_prompt).text
    if not whole.startswith(text):
        after = f"its first {len(turns)} turns" + (" and the beginning of an answer" if add_generation_prompt else "")
        raise ValueError(
            f"the chat template writes {after} otherwise alone than in the whole conversation, so that the assistant's "
            "turns cannot be told apart; enclose them by {% generation %} in the template (--data.template FILE)"
        )
    return text


def _cut(text: str, spans: Sequence[tuple[int, int]], boundary: int) -> list[str]:
    """Return the texts of `ChatPieces`."""
    edges = [0, boundary, *(place for span in spans for place in span), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(edges)]


def _joined(tokenizer: Tokenizer, chat: ChatPieces, encoded: Sequence[list[int]]) -> ChatTokens:
    """Return the tokens of the pieces, without those after the end of the last turn."""
    answer: list[int] = []
    learnt: list[bool] = []
    for number in range(1, chat.last + 1):
        tokens = encoded[number]
        end = 0 if number % 2 else _turn_end(tokenizer, tokens)  # the assistant wrote every second piece
        kept = tokens[:end] if number == chat.last else tokens
        answer += kept
        learnt += [True] * end + [False] * (len(kept) - end)
    if answer and answer[-1] == tokenizer.end_of_turn_id:
        return ChatTokens(encoded[0], answer[:-1], learnt[:-1])
    return ChatTokens(encoded[0], answer, learnt)


def _turn_end(tokenizer: Tokenizer, tokens: Sequence[int]) -> int:
    """Return the number of tokens of a turn up to its last special token, if only white space follows; else all."""
    places = [number for number, token in enumerate(tokens) if token in tokenizer.special_ids]
    if places and not tokenizer.decode(tokens[places[-1] + 1 :]).strip():
        return places[-1] + 1
    return len(tokens)


def _marked(turns: Sequence[Message], special: Sequence[str]) -> tuple[list[Message], str]:
    """Return the turns with a mark in every special token's text, and the mark; unchanged turns if they have none."""
    texts = list(_texts(list(turns)))
    names = "|".join(map(re.escape, special)) or r"(?!)"
    pattern = re.compile(f"(?=(?:{names}))(.)", re.DOTALL)  # the first character of each, also where they overlap
    reserved = any("\ufdd0" <= character <= "\ufdef" for text in texts for character in text)
    if not reserved and not any(pattern.search(text) for text in texts):
        return list(turns), ""
    mark = unused_mark(texts)
    if not mark:
        raise ValueError("the messages hold every one of the characters U+FDD2 to U+FDEF, one of which is needed")
    if any(character in text for text in texts for character in "\ufdd0\ufdd1"):
        raise ValueError("a message holds U+FDD0 or U+FDD1, which are not text characters; remove them")

    def change(value: Any, key: str = "") -> Any:
        if isinstance(value, str) and key != "role":
            return pattern.sub(lambda match: match[0] + mark, value)
        if isinstance(value, dict):
            return {name: change(item, name) for name, item in value.items()}
        return [change(item) for item in value] if isinstance(value, list) else value

    return [change(turn) for turn in turns], mark


def _texts(value: Any) -> itertools.chain[str]:
    """Return every text in a value."""
    if isinstance(value, str):
        return itertools.chain([value])
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return itertools.chain.from_iterable(map(_texts, inner))
