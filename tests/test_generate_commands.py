"""rlhf-generate's commands, and the template that a model remembers."""

import pytest
from rlhf.cli.generate_commands import change_setting, describe_settings

from rlhf.data.prompt_template import common_template, frame
from rlhf.errors import UserError
from rlhf.generate.generate_config import GenerateConfig


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("/temperature 0.5", "temperature", 0.5),
        ("/top-k 7", "top_k", 7),
        ("/top_p 0.9", "top_p", 0.9),
        ("/max-new-tokens 9", "max_new_tokens", 9),
        ("/samples 2", "samples", 2),
        ("/greedy on", "greedy", True),
        ("/template Q: {prompt} A:", "template", "Q: {prompt} A:"),
    ],
)
def test_a_command_changes_one_setting(line, name, value):
    changed = change_setting(GenerateConfig(), line)
    assert getattr(changed, name) == value
    assert repr(value) in describe_settings(changed)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/hlep", "/hlep: no such command; /help lists them"),
        ("/temperature hot", "expected a number"),
        ("/top-k 1.5", "expected a whole number"),
        ("/temperature -1", "must be above 0"),
        ("/greedy maybe", "expected on or off"),
        ("/template x", "has no {prompt}"),
        ("/output x", "no such command"),
    ],
)
def test_what_is_wrong_with_a_command_is_told(line, message):
    with pytest.raises(UserError, match=message.replace("{", r"\{")):
        change_setting(GenerateConfig(), line)


def test_a_template_is_what_all_prompts_share():
    prompts = [f"Customer: item {n} broke.\nAgent:" for n in range(20)]
    assert common_template(prompts) == "Customer: item {prompt} broke.\nAgent:"
    assert common_template(prompts[:5]) == "{prompt}", "what few prompts share may be chance"
    assert common_template([f"the{n}" for n in range(20)]) == "{prompt}", "parts of words are not shared"
    assert common_template([f"{n} film" for n in range(20)]) == "{prompt} film"
    for prompt in prompts:
        assert frame(common_template(prompts), prompt) == prompt
    assert frame(common_template(prompts), "7") == prompts[7]
    assert frame("{prompt}", "x") == "x"
