"""Chat templates: rendered as transformers does, never under the clock of the day, and with no argument in vain."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest

from shared.config import load_config
from shared.errors import ConfigError
from shared.tokenizer.template import PROBES, ChatTemplate

SETTINGS = {"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|eot_id|>"}, "add_bos_token": True}

# LLaMA 3's construction: 3.2 asks the clock where no `date_string` is given, 3.1 and 3.3 have a date of their own.
CLOCK_BRANCH = """
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}"""
FIXED_BRANCH = """
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}"""
LLAMA_3 = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}%s
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
LLAMA_3_CLOCK = LLAMA_3.replace("%s", CLOCK_BRANCH)
LLAMA_3_FIXED = LLAMA_3.replace("%s", FIXED_BRANCH)
NO_PIN = "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}{{ m.content }}{% endfor %}"
SYSTEM_ONLY = "{% for m in messages %}{% if m.role == 'system' %}{{ strftime_now('%H') }}{% endif %}{% endfor %}"


def probe(source: str, **arguments: Any) -> dict[str, str]:
    return ChatTemplate(source, SETTINGS, arguments).probe


def test_a_template_that_reads_the_clock_is_refused_with_its_pin() -> None:
    today = datetime.datetime.now().strftime("%d %b %Y")
    with pytest.raises(ConfigError, match=rf"'{today}' now.*collect.template_arguments: \{{date_string: {today}\}}.*"):
        probe(LLAMA_3_CLOCK)
    assert "Today Date: 26 Jul 2024" in probe(LLAMA_3_CLOCK, date_string="26 Jul 2024")["user"]
    assert probe(LLAMA_3_FIXED) == probe(LLAMA_3_CLOCK, date_string="26 Jul 2024")


def test_a_template_without_a_pin_gets_its_clock_stopped() -> None:
    iso = datetime.date.today().isoformat()
    with pytest.raises(ConfigError, match=rf"collect.template_arguments: \{{strftime_now: {iso}\}}"):
        probe(NO_PIN)
    assert probe(NO_PIN, strftime_now="2024-07-26")["user"].startswith("2024-07-26Why")
    assert probe(NO_PIN, strftime_now=datetime.date(2024, 7, 26)) == probe(NO_PIN, strftime_now="2024-07-26")
    with pytest.raises(ConfigError, match=r"strftime_now is 'July', expected a date such as 2024-07-26"):
        probe(NO_PIN, strftime_now="July")


def test_the_clock_is_found_in_every_branch() -> None:
    template = ChatTemplate(SYSTEM_ONLY, SETTINGS)
    assert template.render(PROBES["user"]) == ""
    with pytest.raises(ConfigError, match="writes the clock's time"):
        _ = template.probe
    # Where no probe leads, the conversation itself is the probe.
    rare = "{% if messages | length > 5 %}{{ strftime_now('%Y') }}{% endif %}"
    assert ChatTemplate(rare, SETTINGS).probe["user"] == ""
    with pytest.raises(ConfigError, match="writes the clock's time"):
        ChatTemplate(rare, SETTINGS).render(PROBES["turns"] * 2)


def test_reading_the_clock_and_writing_nothing_of_it_is_fine() -> None:
    assert probe("{% set unused = strftime_now('%Y') %}{{ messages[0].role }}")["user"] == "user"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"date_strin": "26 Jul 2024"}, r"'date_strin' .*is not used .*did you mean 'date_string'\?"),
        ({"thinking": True}, r"'thinking' .*is not used .*it uses custom_tools, date_string"),
        ({"messages": []}, r"'messages' .*is not used"),
        ({"add_generation_prompt": False}, r"'add_generation_prompt' .*is not used"),
        ({"strftime_now": "2024-07-26"}, r"'strftime_now' .*is not used"),
    ],
)
def test_an_argument_that_the_template_does_not_use_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        probe(LLAMA_3_FIXED, **arguments)


def test_the_production_config_pins_the_date_of_both_kinds_of_template() -> None:
    config = load_config(Path(__file__).parents[3] / "configs" / "llama-3.3-70b.yaml")
    arguments = config.collect.template_arguments
    assert probe(LLAMA_3_CLOCK, **arguments) == probe(LLAMA_3_FIXED, **arguments)


def test_a_template_that_is_not_jinja_is_named() -> None:
    with pytest.raises(ConfigError, match=r"chat template is not valid, line 2"):
        ChatTemplate("\n{% if %}", SETTINGS)


def test_the_text_is_that_of_transformers() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    sources = [
        LLAMA_3_FIXED,
        "{% if tools is not none %}tools{% endif %}{{ {'é': '<b>'} | tojson }}{{ pad_token }}|{{ eos_token }}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n{% if loop.first %}{% continue %}"
        "{% endif %}\n  {%- set x = 1 %}\n{% endfor %}",
        "{{ raise_exception('no') if messages[0].role == 'system' else 'yes' }}",
    ]
    for source in sources:
        for name, turns in PROBES.items():
            ours = ChatTemplate(source, SETTINGS).probe[name]
            tokens = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
            try:
                (theirs,), _ = render_jinja_template(
                    [turns], chat_template=source, add_generation_prompt=True, **tokens
                )
            except Exception as error:
                theirs = f"refused: {error}"
            assert ours == theirs
