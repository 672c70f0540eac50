"""A template from elsewhere reaches for nothing but what it is given, and ends."""

import pytest

from llm.errors import UserError
from llm.tokenizers.chat import sandbox
from llm.tokenizers.chat.render import Renderer

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def rendered(source: str) -> str:
    return Renderer(source, "the chat template t.jinja", {"bos_token": "<s>"}).render(MESSAGES)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ ''.__class__ }}", "reaches for .__class__"),
        ("{{ ''['__class__'] }}", "reaches for .__class__"),
        ("{{ messages|map(attribute='__class__')|list }}", "reaches for .__class__"),
        ("{{ messages|attr('append') }}", "No filter named 'attr'"),
        ("{{ messages.append }}", "reaches for .append of a list"),
        ("{{ messages[0].update({}) }}", "reaches for .update of a mapping"),
        ("{{ ''.format }}", "reaches for .format of a text"),
        ("{{ raise_exception.__globals__ }}", "reaches for .__globals__"),
        ("{{ self.__init__ }}", "reaches for .__init__"),
        ("{% set n = namespace(__class__=1) %}", "reaches for .__class__"),
        ("{% include 'other' %}", "fails on the conversation"),
        ("{{ lipsum() }}", "'lipsum' is undefined"),
        ("{{ raise_exception('only questions') }}", "refuses the conversation: only questions"),
        ("{{ strftime_now('%999999999d') }}", "a date in an unusual form"),
        ("{{ messages[0].content.x.y }}", "refuses the conversation"),
        ("{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}", "has a recursive loop"),
    ],
)
def test_what_a_template_must_not_do_is_refused_in_one_line_that_names_it(source: str, reason: str) -> None:
    with pytest.raises(UserError) as refused:
        rendered(source)
    line = str(refused.value)
    assert line.startswith("the chat template t.jinja") and reason in line and "\n" not in line


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(9) %}{% endfor %}{% endfor %}"
        "{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ range(1000000000)|list }}",
        "{{ 'a' * 1000000000 }}",
        "{{ [0] * 1000000000 }}",
        "{{ 9 ** 9 ** 9 ** 9 }}",
        "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x.replace('a', n.x) %}{% endfor %}",
        "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x|replace('a', n.x) %}{% endfor %}",
        "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = [n.x, n.x]|join %}{% endfor %}",
        "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set x %}{{ n.x }}{{ n.x }}{% endset %}"
        "{% set n.x = x %}{% endfor %}",
    ],
)
def test_a_template_without_an_end_or_a_bound_is_refused(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MOST_STEPS", 20_000)  # the same way to the end, in less time
    monkeypatch.setattr(sandbox, "MOST_CHARACTERS", 1 << 20)
    with pytest.raises(UserError, match="the chat template t.jinja"):
        rendered(source)


def test_what_chat_templates_use_is_there() -> None:
    source = """{%- set ns = namespace(n=0) %}
    {%- for m in messages if m.role != 'system' %}
        {%- set ns.n = ns.n + 1 %}
        {{- m['content'].strip().split('i')[0] | trim }}{{ loop.index0 }}{{ ',' if not loop.last }}
        {%- if loop.first %}{% continue %}{% endif %}
    {%- endfor %}
    {{- ns.n }}{{ {'a': '<é>'} | tojson }}{{ messages[::-1][0].role }}{{ bos_token }}
    {%- if tools is not none %}no{% endif %}
    {%- generation %}{{ dict(a=1).items() | list }}{% endgeneration %}"""
    assert rendered(source) == "h0,yo12" + '{"a": "<é>"}' + "assistant<s>[('a', 1)]"
