"""Chat templates write what transformers writes, on twenty conversations, and refuse what it refuses."""

import json
import os
import re
from pathlib import Path

import jinja2
import pytest
from chat_templates import CONVERSATIONS, TEMPLATES, user, write_tokenizer

from rlhf.config import DataConfig
from rlhf.data.chat_tokens import encode_chat
from rlhf.data.encoding import chat_tokenizer
from rlhf.errors import UserError
from rlhf.io.chat_template import ChatTemplate, load_template
from rlhf.io.model_folder import _stopping
from rlhf.io.tokenizer import Tokenizer


@pytest.fixture(scope="module", params=TEMPLATES)
def both(request, tmp_path_factory):
    """(our tokenizer, that of transformers)"""
    from transformers import AutoTokenizer

    folder = write_tokenizer(tmp_path_factory.mktemp("chat") / request.param, TEMPLATES[request.param])
    return Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)


def same(ours: Tokenizer, theirs) -> int:
    """Compare texts and tokens of every conversation, with and without the generation prompt; count those written."""
    written = 0
    for name, messages in CONVERSATIONS.items():
        for ending in (False, True):
            try:
                expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=ending)
            except (jinja2.TemplateError, TypeError) as error:
                problem = re.escape(f"refuses the conversation ({error})")
                expected = None
            if expected is None:
                with pytest.raises(ValueError, match=problem):
                    ours.chat_template.render(messages, add_generation_prompt=ending)
                continue
            written += 1
            assert ours.chat_template.render(messages, add_generation_prompt=ending).text == expected, name
            ids = theirs.apply_chat_template(messages, return_dict=False, add_generation_prompt=ending)
            assert ours.encode_rendered([expected]) == [ids], name
            if ending and messages[-1]["role"] != "assistant":
                assert encode_chat(ours, messages, []).prompt == ids
    return written


def test_every_conversation_is_written_as_transformers_writes_it(both):
    assert len(CONVERSATIONS) == 20
    assert same(*both) >= (18 if "raise_exception" in both[0].chat_template.source else 40)


def test_smollm2_is_written_as_transformers_writes_it():
    from transformers import AutoTokenizer

    folder = smollm2()
    assert same(Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)) == 40


def smollm2() -> Path:
    """The folder that ../shared/models/smollm2.py makes; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("RLHF_SMOLLM2", "/tmp/smollm2"))
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"SmolLM2 absent: {folder} (set RLHF_SMOLLM2)")
    return folder


def test_the_template_of_older_folders_stands_in_their_settings(tmp_path):
    folder = write_tokenizer(tmp_path / "old", None)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for template in ("A", [{"name": "tool_use", "template": "B"}, {"name": "default", "template": "A"}]):
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
        read = Tokenizer.load(folder)
        assert read.chat_template.source == "A"
        changed = read.with_template("C")
        changed.save(tmp_path)
        assert Tokenizer.load(tmp_path).chat_template.source == "C"
        assert "chat_template" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
        assert read.chat_template.source == "A"


def test_a_template_that_is_not_valid_is_told_and_texts_are_read_without(tmp_path):
    read = Tokenizer.load(write_tokenizer(tmp_path / "bad", "{% for %}"))
    assert read.chat_template is None
    assert any("not a valid chat template" in note for note in read.notes)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({}) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['os'] }}",
    ],
)
def test_templates_run_in_a_sandbox(attack):
    with pytest.raises(ValueError, match="refuses"):
        ChatTemplate(attack, {}).render([user("a")])


def test_load_template_takes_names_and_files(tmp_path):
    assert load_template("plain") == TEMPLATES["plain"]
    (tmp_path / "mine.jinja").write_text("{{ messages }}")
    assert load_template(str(tmp_path / "mine.jinja")) == "{{ messages }}"
    with pytest.raises(UserError, match=r"--data\.template chatlm: no such template; there are chatml, plain"):
        load_template("chatlm")
    with pytest.raises(UserError, match="no such file"):
        load_template(str(tmp_path / "other.jinja"))


def test_the_turn_of_every_template_ends_with_its_own_token(both):
    ours, _ = both
    name = next(name for name, template in TEMPLATES.items() if template == ours.chat_template.source)
    end = {"llama": "<|eot_id|>"}.get(name, "<|im_end|>")
    assert ours.end_of_turn_id == ours._backend.token_to_id(end)
    assert ours.end_of_turn_id in ours.stop_ids


def test_a_template_whose_tokens_the_vocabulary_lacks_is_refused_with_its_flag(tokenizer):
    with pytest.raises(UserError) as caught:
        chat_tokenizer(tokenizer, DataConfig(template="chatml"))
    assert "--data.template chatml: the template writes <|im_start|>, which is not a token" in str(caught.value)
    assert chat_tokenizer(tokenizer, DataConfig(template="plain")).chat_template.source == TEMPLATES["plain"]
    assert chat_tokenizer(tokenizer, DataConfig()) is tokenizer


def test_generation_settings_stop_at_the_end_of_a_turn(tmp_path):
    """Whoever generates with transformers would run past it otherwise."""
    texts = Tokenizer.load(write_tokenizer(tmp_path / "base", None, eos="<|eot_id|>"))
    chat = texts.with_template(TEMPLATES["marked"])
    assert chat.end_of_turn_id != chat.eos_id == texts.end_of_turn_id
    assert chat.stop_ids == (*texts.stop_ids, chat.end_of_turn_id)
    before = {"eos_token_id": 3, "top_k": 5}
    assert _stopping(before, texts) is before
    assert _stopping(before, chat) == {"eos_token_id": [3, chat.end_of_turn_id], "top_k": 5}
    assert _stopping({}, chat) == {"eos_token_id": [chat.end_of_turn_id]}
    assert _stopping({"eos_token_id": [chat.end_of_turn_id]}, chat) == {"eos_token_id": [chat.end_of_turn_id]}
