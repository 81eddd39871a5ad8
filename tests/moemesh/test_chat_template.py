from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from moemesh.chat_template import ChatTemplate, ChatTemplateError, load_chat_template
from moemesh.tokenizer import load_tokenizer
from tests.moemesh.tiny_tokenizer import CHAT_TEMPLATE, write_tokenizer

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <b>&\u00e9 "},
    {"role": "assistant", "content": " Hello there "},
]
TEMPLATES = {
    "tiny": CHAT_TEMPLATE,
    "blocks": "{% for m in messages %}\n    {% if m.role == 'user' %}\n U:{{ m.content }}\n  {% endif %}\n{% endfor %}",
    "tojson": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ messages | map(attribute='role')|join }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content | trim }}{% endgeneration %}{% endfor %}",
    "loop controls": "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "dict": "{{ dict(a=1)['a'] }}{{ dict([('b', 2)]).b }}{% if tools is none %}no tools{% endif %}",
    "variable": "{{ thinking if thinking is defined else 'off' }}{{ bos_token }}{{ messages[2]['content'] }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("generation_prompt", [False, True])
def test_renders_as_transformers_does(name: str, generation_prompt: bool) -> None:
    special: dict[str, Any] = {"bos_token": "<bos>", "eos_token": "<eos>"}
    expected = render_jinja_template(
        [MESSAGES], chat_template=TEMPLATES[name], add_generation_prompt=generation_prompt, thinking="on", **special
    )[0]
    template = ChatTemplate(TEMPLATES[name], special_tokens=special)
    ours = template.render(MESSAGES, add_generation_prompt=generation_prompt, variables={"thinking": "on"})
    assert ours == expected[0]


@pytest.mark.parametrize("name", ["tiny", "generation", "variable"])
@pytest.mark.parametrize("content", [" Hello there ", [{"type": "text", "text": "a"}, {"type": "text", "text": "b "}]])
def test_continues_the_final_message_as_transformers_does(name: str, content: Any) -> None:
    messages = [*MESSAGES[:2], {"role": "assistant", "content": content}]
    if isinstance(content, list):
        source = "{% for m in messages %}{% for c in m.content if c.text %}{{ c.text | trim }}{% endfor %}{% endfor %}."
    else:
        source = TEMPLATES[name]
    special: dict[str, Any] = {"bos_token": "<bos>", "eos_token": "<eos>"}
    expected = render_jinja_template([messages], chat_template=source, continue_final_message=True, **special)[0]
    template = ChatTemplate(source, special_tokens=special)
    assert template.render(messages, add_generation_prompt=False, continue_final_message=True) == expected[0]


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([], "needs a message"),
        ([{"role": "user"}], "needs text"),
        ([{"role": "user", "content": "x"}], "does not show"),
    ],
)
def test_what_cannot_be_continued(messages: list[dict[str, Any]], text: str) -> None:
    with pytest.raises(ChatTemplateError, match=text):
        ChatTemplate("fixed").render(messages, continue_final_message=True)


def test_the_time_is_the_callers() -> None:
    template = ChatTemplate("{{ strftime_now('%Y-%m-%d') }}", now=lambda: datetime(2026, 3, 4))
    assert template.render([]) == "2026-03-04"


ATTACKS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{{ raise_exception.__globals__.os }}",
    "{{ dict.__globals__.os }}",
    "{{ namespace.__init__.__globals__ }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ namespace(__x=1) }}",
    "{{ range(100000000) }}",
    "{{ self.__init__.__globals__ }}",
    "{{ lipsum.__globals__.os }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ '{0.__class__}'.format(1) | length + none }}",
    "{% include 'x' %}",
]


@pytest.mark.parametrize("source", ATTACKS)
def test_the_sandbox_holds(source: str) -> None:
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source).render(MESSAGES)


def test_a_refusal_is_the_templates_own_words() -> None:
    with pytest.raises(ChatTemplateError, match="no such role: tool"):
        ChatTemplate(CHAT_TEMPLATE).render([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize("source", ["{{ 1 // 0 }}", "{{ messages[0].content + 1 }}", "{{ 5 | join }}"])
def test_what_a_template_trips_over_is_told_without_internals(source: str) -> None:
    with pytest.raises(ChatTemplateError, match="cannot render the messages"):
        ChatTemplate(source).render(MESSAGES)


def test_reserved_variables_are_refused() -> None:
    for name in ("messages", "chat_template", "tools"):
        with pytest.raises(ChatTemplateError, match=name):
            ChatTemplate("x").render([], variables={name: 1})


def test_a_malformed_template_is_refused_at_load() -> None:
    with pytest.raises(ChatTemplateError, match="malformed"):
        ChatTemplate("{% for %}")


def test_messages_are_not_changed() -> None:
    messages = [{"role": "assistant", "content": "a"}]
    ChatTemplate("{{ messages[0].content }}").render(messages, continue_final_message=True)
    assert messages == [{"role": "assistant", "content": "a"}]


def test_where_a_template_comes_from(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path, None) is None
    write_tokenizer(
        tmp_path, chat_template=[{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    )
    found = load_chat_template(tmp_path, load_tokenizer(tmp_path))
    assert found is not None
    assert found.source == "d"
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}j")
    found = load_chat_template(tmp_path, load_tokenizer(tmp_path))
    assert found is not None
    assert found.render([]) == "<bos>j"


@pytest.mark.parametrize("value", [3, [1], [{"name": "other", "template": "x"}], {"default": 5}])
def test_a_template_of_another_type_is_refused(tmp_path: Path, value: object) -> None:
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"chat_template": value}))
    with pytest.raises(ChatTemplateError, match="chat_template"):
        load_chat_template(tmp_path, load_tokenizer(tmp_path))


def test_a_folder_whose_config_has_no_template_has_none(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path, load_tokenizer(write_tokenizer(tmp_path, chat_template=None))) is None
