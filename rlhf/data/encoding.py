"""Records as token ids: texts are encoded as they are, conversations by the tokenizer's chat template."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rlhf.config import DataConfig
from rlhf.data.chat_tokens import check_template, cut_chat, encode_pieces
from rlhf.data.data_files import Record, Source
from rlhf.data.schema import DEMONSTRATIONS, Schema
from rlhf.errors import UserError
from rlhf.io.chat_template import load_template
from rlhf.io.tokenizer import Tokenizer


class EncodedRecord(NamedTuple):
    """A record and its token ids."""

    record: Record
    prompt: list[int]
    """Token ids of the prompt, at least one."""
    answers: list[list[int]]
    """Token ids of each answer, without the token that ends it."""
    learnt: list[bool] | None
    """For each token of a demonstration's answer, True if it is learnt; None if all are."""


def chat_tokenizer(tokenizer: Tokenizer, settings: DataConfig) -> Tokenizer:
    """Return the tokenizer with the chat template that the settings name; unchanged if they name none.

    Raises:
        UserError: there is no such template, or it is not valid.
    """
    if settings.template is None:
        return tokenizer
    try:
        return tokenizer.with_template(load_template(settings.template))
    except ValueError as error:
        raise UserError(f"--data.template {settings.template}: {error}") from error


def holds_conversations(record: Record) -> bool:
    """Return whether a checked record has lists of messages instead of texts."""
    return not isinstance(record.fields["prompt"], str)


def encode_records(
    records: Sequence[Record], schema: Schema, tokenizer: Tokenizer, source: Source
) -> Iterator[EncodedRecord]:
    """Yield checked records with their token ids.

    Args:
        records: the records, all of texts or all of conversations.
        schema: kind of the records.
        tokenizer: tokenizer of the model that reads them.
        source: files of the records, for errors.

    Raises:
        UserError: the tokenizer has no chat template for conversations, or it cannot write one of them.
    """
    if records and holds_conversations(records[0]):
        check_template(tokenizer, source)
        yield from _encode_conversations(records, schema, tokenizer, source)
        return
    encoded = iter(tokenizer.encode([record.fields[key] for record in records for key in schema.keys]))
    for record in records:
        prompt = tokenizer.begin(next(encoded))
        yield EncodedRecord(record, prompt, [next(encoded) for _ in schema.answers] or [[]], None)


def _encode_conversations(
    records: Sequence[Record], schema: Schema, tokenizer: Tokenizer, source: Source
) -> Iterator[EncodedRecord]:
    pieces = []
    for record in records:
        answers = [record.fields[key] for key in schema.answers] or [[]]
        try:
            for answer in answers:
                shares_prompt = len(answers) > 1
                pieces.append(cut_chat(tokenizer, record.fields["prompt"], answer, shares_prompt=shares_prompt))
        except ValueError as error:
            raise UserError(f"{record.path or source}: {record.where}: {error}") from error
    encoded = iter(encode_pieces(tokenizer, pieces))
    for record in records:
        chats = [next(encoded) for _ in schema.answers or [""]]
        learnt = chats[0].learnt if schema is DEMONSTRATIONS else None
        yield EncodedRecord(record, chats[0].prompt or [tokenizer.eos_id], [chat.answer for chat in chats], learnt)
