"""Docstrings read as those of a manual: short sentences that begin with their subject, in British spelling."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for top in ("rlhf", "cli") for path in (ROOT / top).rglob("*.py"))
EDITED = sorted(
    {
        *(ROOT / "rlhf").glob("*.py"),
        *(path for path in (ROOT / "rlhf").glob("*/*.py") if path.parent.name not in ("models", "cli")),
        *(ROOT / "cli").glob("*.py"),
    }
)
"""Files whose arguments and errors, too, are described in full."""

_FRAGMENT = re.compile(r"(of|as|by|how|what|whether|where|same)\b", re.IGNORECASE)
_VAGUE = re.compile(
    rf"{_FRAGMENT.pattern}|(its|their|see|with|without|those|which|that|in|at|to|from|for|above|below)\b", re.IGNORECASE
)
"""Beginnings of a description that name no thing."""
_REFERENCE = re.compile(r"\b(Arguments|Raises|Returns|Errors)( and errors)? (are those |as )|[;,] see `")
"""References in place of a description."""
_AMERICAN = re.compile(
    r"\b((optimi|normali|initiali|generali|recogni|seriali|summari)z(e|ed|es|ing|ation)|optimizers?|tokeni[z](e|ed|ing)"
    r"|colors?|behaviors?|centers?|neighbors?)\b",
    re.IGNORECASE,
)
_QUOTED = re.compile(r"`[^`]*`|\"[^\"]*\"|>>>.*|^\s*\*{0,2}\w+: |https?:\S+|\w+[.(_=]\w*", re.MULTILINE)
"""Names in code, titles of papers, addresses, and the names of arguments keep their spelling."""


def strings_of(path: Path) -> list[str]:
    """Every docstring of a file, and every string under a name."""
    texts = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            texts += [
                statement.value.value
                for statement in node.body
                if isinstance(statement, ast.Expr)
                and isinstance(statement.value, ast.Constant)
                and isinstance(statement.value.value, str)
            ]
    return texts


def american(text: str) -> re.Match[str] | None:
    """The first American spelling, outside of names and titles."""
    return _AMERICAN.search(_QUOTED.sub("", text))


def sentences_of(text: str) -> list[str]:
    """The sentences of a docstring without its sections, equations and code."""
    prose = re.split(r"\n\s*(?:Examples?|Args|Returns|Yields|Raises|Usage):", text)[0]
    paragraphs = [part for part in re.split(r"\n\s*\n", prose) if not re.match(r"\s{4,}|\n", part)]
    return [
        sentence for part in paragraphs for sentence in re.split(r"(?<=[.!?])\s+", " ".join(part.split())) if sentence
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_docstring_begins_with_a_fragment(path):
    assert [text for text in strings_of(path) if _FRAGMENT.match(text.strip())] == []


@pytest.mark.parametrize("path", EDITED, ids=lambda path: str(path.relative_to(ROOT)))
def test_arguments_are_described_by_a_noun(path):
    arguments = [
        (name, text)
        for docstring in strings_of(path)
        for section in re.findall(r"Args:\n(.*?)(?:\n\s*\n|$)", docstring, re.DOTALL)
        for name, text in re.findall(r"^\s*(\*{0,2}\w+): (.*)", section, re.MULTILINE)
    ]
    assert [argument for argument in arguments if _VAGUE.match(argument[1])] == []


@pytest.mark.parametrize("path", EDITED, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_docstring_refers_to_another_for_its_arguments_or_errors(path):
    texts = strings_of(path)
    assert [match.group() for text in texts if (match := _REFERENCE.search(text))] == []
    errors = [
        description
        for text in texts
        for section in re.findall(r"Raises:\n(.*?)(?:\n\s*\n|$)", text, re.DOTALL)
        for description in re.findall(r"^\s*\w+(?:, \w+)*: (.*)", section, re.MULTILINE)
    ]
    assert [error for error in errors if re.match(r"(as|see|same|one)\b", error)] == []


def test_sentences_have_fewer_than_25_words_on_average():
    for top in ("rlhf", "cli"):
        sentences = [
            s for path in FILES if path.is_relative_to(ROOT / top) for t in strings_of(path) for s in sentences_of(t)
        ]
        assert len(sentences) > 100
        assert sum(len(sentence.split()) for sentence in sentences) / len(sentences) < 25


@pytest.mark.parametrize("path", EDITED, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_sentence_is_a_paragraph(path):
    assert [s for text in strings_of(path) for s in sentences_of(text) if len(s.split()) > 45] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_spelling_is_british(path):
    assert [match.group() for text in strings_of(path) if (match := american(text))] == []


def test_the_laws_find_what_they_forbid():
    assert _FRAGMENT.match("Of the policy.")
    assert _FRAGMENT.match("as in `step`.")
    assert not _FRAGMENT.match("Offset of the first element.")
    assert _VAGUE.match("its parameters.")
    assert not _VAGUE.match("input of the layer.")
    assert _REFERENCE.search("Return the text. Raises as `read`.")
    assert _REFERENCE.search("Return the text; see `read`.")
    assert american("The optimizer state.")
    assert not american("`rlhf.optim.Optimizer`, and normalize_reward, and the tokenizer")
    assert sentences_of("One two. Three four five.\n\n    an equation = 1\n\nArgs:\n    x: six.") == [
        "One two.",
        "Three four five.",
    ]
