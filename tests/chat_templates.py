"""Chat templates in the manner of well-known models, conversations for them, and tokenizer folders that have both."""

import json
from pathlib import Path

from rlhf.io.chat_template import NAMED_TEMPLATES
from rlhf.io.tokenizer import EOS, PAD, Tokenizer

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]

QWEN = """{%- if tools %}{{- '<|im_start|>system\\nTools: ' }}{{- tools | tojson }}{{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=0) %}
{%- for message in messages %}
    {%- if message.role == 'system' and loop.first %}
        {%- continue %}
    {%- endif %}
    {%- set ns.last = loop.index %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- elif message.tool_calls %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for call in message.tool_calls %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA = """{{- bos_token }}
{%- set today = strftime_now("%Y") %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nYear: ' + today + '\\n\\n' + system_message + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
STRICT = """{% if messages[0]['role'] != 'user' %}{{ raise_exception('The user comes first') }}{% endif %}
{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate user/assistant') }}
{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' ~ message['content'] ~ ' [/INST]' }}
{% else %}{{ ' ' ~ message['content'] ~ eos_token }}
{% endif %}
{% endfor %}"""
MARKED = """{% for message in messages %}
{{- '<|im_start|>' ~ message.role ~ '\\n' -}}
{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{{ '<|im_end|>' }}{% endgeneration %}
{% else %}{{ message.content }}{{ '<|im_end|>' }}{% endif %}
{{- '\\n' -}}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
TEMPLATES = NAMED_TEMPLATES | {"qwen": QWEN, "llama": LLAMA, "strict": STRICT, "marked": MARKED}


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def said(content: str) -> dict:
    return {"role": "assistant", "content": content}


def system(content: str) -> dict:
    return {"role": "system", "content": content}


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "é<&>"}}}
CONVERSATIONS = {
    "one turn": [user("Hello")],
    "answer": [user("Hello"), said("Hi there!")],
    "two rounds": [user("Hello"), said("Hi."), user("And?"), said("Bye.")],
    "open": [user("Hello"), said("Hi."), user("And?")],
    "system": [system("Be brief."), user("Why?"), said("Because.")],
    "empty system": [system(""), user("Why?"), said("Because.")],
    "empty question": [user(""), said("Nothing was asked.")],
    "empty answer": [user("Say nothing"), said("")],
    "users in a row": [user("One"), user("Two"), said("Three")],
    "answers in a row": [user("Go"), said("One"), said("Two")],
    "assistant first": [said("How may I help?"), user("So")],
    "tool": [user("1 + 2?"), said("I add."), {"role": "tool", "name": "add", "content": "3"}, said("3.")],
    "tool call": [user("?"), {"role": "assistant", "content": "", "tool_calls": [CALL]}, user("!"), said("ok")],
    "another role": [{"role": "developer", "content": "Be kind."}, user("Hi"), said("Hi")],
    "unicode": [user("naïve café 日本語 العربية 𝄞"), said("👩‍👩‍👧 ok\u2028fine")],
    "spaces": [user("  leading and trailing  "), said("\ttabbed ")],
    "line ends": [user("a\n\nb\r\nc\n"), said("1.\n2.\n")],
    "markup": [user("<b>&amp;\"'</b> {{ 7 * 7 }} {% if x %}"), said("{# no #} \\n \\\\")],
    "further keys": [{"role": "user", "name": "Ann", "weight": 0, "content": "Hi"}, said("Hi Ann")],
    "long": [turn for number in range(12) for turn in (user(f"question {number}"), said(f"answer {number} " * 9))],
}


def write_tokenizer(
    folder: Path, template: str | None, *, eos: str = "<|im_end|>", bos: str = "<|begin_of_text|>"
) -> Path:
    """Write a tokenizer folder with a chat template."""
    trained = Tokenizer.train(["the quick brown fox jumps over the lazy dog, question answer number"] * 3, 320)
    trained._backend.add_special_tokens(SPECIAL)
    folder.mkdir(exist_ok=True)
    trained._backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "pad_token": PAD}
    settings |= {"bos_token": "<|begin_of_text|>", "unk_token": EOS, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder
