# ruff: noqa: E501  (a template is one line)
"""Chat templates: equal to transformers where they are honest, bounded where they are not."""

from __future__ import annotations

import resource
import threading
import time
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lorayard.demo import BASE
from lorayard.shared.errors import ModelError, Refused
from lorayard.worker.text.template import ChatTemplate
from lorayard.worker.text.tokenizer import Tokenizer
from lorayard.worker.text.trial import checked_template

TOKENS = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
SYSTEM, USER, ASSISTANT = (
    ("system", "  Be brief.\n"),
    ("user", "What is {{ len }}? 'é' \"q\"\n"),
    ("assistant", " A function. "),
)
TALKS = [[USER], [SYSTEM, USER], [USER, ASSISTANT, USER], [SYSTEM, USER, ASSISTANT, USER, ASSISTANT, USER]]
HI: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def reference() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(BASE)


SNIPPETS = [
    "{% for m in messages if m.role != 'x' %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{% else %}none{% endfor %}",
    "{% set x = 1 %}{% for m in messages %}{{ x }}{% set x = x + 1 %}{% endfor %}{{ x }}",
    "{% set ns = namespace(n=0, t='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{% macro say(m, sep='|') %}{{ m.content|trim }}{{ sep }}{% endmacro %}{{ say(messages[0]) }}{{ say(messages[0], sep='-') }}",
    "{% macro box() %}[{{ caller() }}]{% endmacro %}{% call box() %}x{% endcall %}",
    "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ {'a': [1, 2.5, none, true]} | tojson }}",
    "{{ messages[::-1][0].content }}{{ messages[-1]['role'] }}{{ messages[9] is defined }}{{ nothing }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join(' + ') }}",
    "{{ ['b', 'A', 'c'] | sort | join }}{{ {'b': 1, 'a': 2} | dictsort }}{{ [3, 1] | max }}{{ [1, 1] | unique | list }}",
    "{{ 'one two'.split(' ')[1].upper() }}{{ 'x' ~ 1 ~ none }}{{ 'abc'[1:] }}{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 5 }}{{ '-' * 3 }}",
    "{{ 'a' if false }}{{ 'yes' if messages and not none else 'no' }}{{ 'x' in 'xyz' }}{{ 1 < 2 < 3 }}",
    "{% set body %}  {{ messages[0].content }} {% endset %}{{ body | trim | length }}{% filter upper %}abc{% endfilter %}",
    "{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}={{ v }};{% endfor %}{% with a = 1 %}{{ a }}{% endwith %}{{ a }}",
    "{% for i in range(10) %}{% if i == 3 %}{% continue %}{% elif i > 5 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "{% generation %}{% set q = 1 %}x{{ q }}{% endgeneration %}{{ q }}",
    "{{ 'a\nb\n\nc' | indent(2) }}{{ 'a b' | title }}{{ ' x ' | trim }}{{ 'aXa' | replace('a', 'bb') }}{{ '5' | int + 1 }}",
    "{%- if tools is not none and tools is defined %}t{% endif -%}  {{ bos_token }}\n  {%- set y = 3 %}\n\n{{ y is odd }}",
    "{{ [1, [2, 'x']] }}{{ (1,) }}{{ {'k': 'v'} }}{{ 1.5 }}{{ true }}{{ messages[0].get('name', 'no') }}{{ [1] + [2] }}",
    "{{ messages | length }}{{ messages | rejectattr('name', 'defined') | list | length }}{{ [0, 1] | select | first }}",
    "{{ 'abc' | first }}{{ [] | last }}{{ none | default('d') }}{{ '' | default('d', true) }}{{ [1, 2] | sum }}",
]  # fmt: skip


@pytest.mark.parametrize("source", SNIPPETS)
def test_jinja_means_what_it_means_elsewhere(reference: PreTrainedTokenizerFast, source: str) -> None:
    messages = [{"role": role, "content": content} for role, content in TALKS[-1]]
    expected = reference.apply_chat_template(messages, chat_template=source, tokenize=False)
    assert ChatTemplate(source, TOKENS).render(messages, False) == expected


DOUBLE = "{% set a = a ~ a %}" * 40
HOSTILE = {
    "repeat": "{{ 'a' * 10**9 }}",
    "repeat list": "{{ [0] * 10**9 }}",
    "huge power": "{{ 9 ** 9 ** 9 }}",
    "many powers": "{{ 2 ** 60 ** 1 * 2 ** 60 }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "format": "{{ '%1000000000d' | format(1) }}",
    "format method": "{{ '{:1000000000d}'.format(1) }}",
    "centre": "{{ 'a' | center(10**9) }}",
    "adjust": "{{ 'a'.ljust(10**9) }}",
    "range": "{{ range(10**12) | list }}",
    "nested loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}",
    "loops that print": "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "doubling": "{% set a = 'aaaaaaaaaa' %}" + DOUBLE + "{{ a }}",
    "doubling by sum": "{% set a = 'aaaaaaaaaa' %}" + "{% set a = a + a %}" * 40,
    "doubling by replace": "{% set a = 'aaaaaaaaaa' %}" + "{% set a = a.replace('a', a) %}" * 40,
    "doubling by join": "{% set a = 'aaaaaaaaaa' %}" + "{% set a = a.join([a, a, a]) %}" * 40,
    "doubling in a namespace": "{% set n = namespace(a='aa') %}{% for i in range(60) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
    "shared lists": "{% set a = [1] %}" + "{% set a = [a, a, a, a] %}" * 40 + "{{ a }}",
    "shared lists compared": "{% set a = (1,) %}{% set b = (1,) %}" + "{% set a = (a, a) %}{% set b = (b, b) %}" * 40 + "{{ a == b }}",
    "shared lists as key": "{% set a = (1,) %}" + "{% set a = (a, a) %}" * 40 + "{{ {a: 1} }}",
    "shared lists as json": "{% set a = [1] %}" + "{% set a = [a, a, a, a] %}" * 30 + "{{ a | tojson }}",
    "wide json": "{{ [1] | tojson(indent=10**9) }}",
    "wide separators": "{{ [1, 1] | tojson(separators=('x' * 1000000, ':')) }}",
    "wide indent": "{{ ('a\n' * 1000) | indent(10**9) }}",
    "batch": "{{ [1] | batch(10**9, 'x') | list }}",
    "slice": "{{ [1] | slice(10**9) | list }}",
    "lipsum": "{{ lipsum(n=10**9) }}",
    "cycler": "{% set c = cycler(1, 2) %}{% for i in range(10**6) %}{{ c.next() }}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "branching recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for a in [[1]] recursive %}{{ loop([a]) }}{% endfor %}",
    "brackets": "{{ " + "(" * 30000 + "1" + ")" * 30000 + " }}",
    "lists": "{{ " + "[" * 30000 + "]" * 30000 + " }}",
    "long sum": "{{ " + "1 + " * 15000 + "1 }}",
    "nested ifs": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "long chain": "{{ a" + ".b" * 30000 + " }}",
    "huge number": "{{ " + "9" * 60000 + " }}",
    "huge source": "x" * 200_000,
    "class": "{{ ''.__class__.__mro__ }}",
    "class by item": "{{ ''['__class__']['__mro__'] }}",
    "class by attr": "{{ '' | attr('__class__') }}",
    "class by map": "{{ [''] | map(attribute='__class__') | first | length + ''['__class__'].x }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "self": "{{ self.__init__ }}",
    "loop internals": "{% for a in [1] %}{{ loop.__init__ }}{% endfor %}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% from 'x' import y %}",
    "extends": "{% extends 'x' %}",
    "mutation": "{{ messages.append(1) }}",
    "clock": "{{ strftime_now('%1000000000d') }}",
    "round": "{{ 1 | round(-10**9) }}",
    "round up": "{{ 1 | round(10**9, 'ceil') }}",
    "unknown filter": "{{ 'a' | nothing }}",
    "unclosed": "{% if x",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_refused_at_once(name: str) -> None:
    """Rendered in this process, without the child that a folder's template meets first."""
    before, start = peak_kib(), time.process_time()
    with pytest.raises((ModelError, Refused)):
        ChatTemplate(HOSTILE[name], TOKENS).render(HI)
    assert time.process_time() - start < 2
    assert peak_kib() - before < 200_000


@pytest.mark.parametrize("name", ["repeat", "nested loops", "cycler", "class", "lists", "unclosed"])
def test_a_hostile_template_does_not_load(name: str) -> None:
    with pytest.raises(ModelError, match="chat template"):
        checked_template(HOSTILE[name], TOKENS)


def test_a_bomb_for_later_is_refused_in_a_thread() -> None:
    source = "{% if messages | length > 4 %}{% for i in range(9999) %}{% for j in range(9999) %}x{% endfor %}{% endfor %}{% endif %}"
    template = checked_template(source, TOKENS)
    caught: list[Refused] = []

    def render() -> None:
        try:
            template.render(HI * 5)
        except Refused as refusal:
            caught.append(refusal)

    threads = [threading.Thread(target=render) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [refusal.code for refusal in caught] == ["bad_field"] * 3
    assert template.render(HI) == ""


def test_long_conversations_fit() -> None:
    template = Tokenizer.from_directory(BASE)
    talk = [{"role": "user", "content": "x" * 300}, {"role": "assistant", "content": "y" * 300}] * 1500
    assert len(template.render(talk)) > 900_000


def test_a_template_that_refuses_some_messages_loads() -> None:
    source = "{% if messages[0].role != 'system' %}{{ raise_exception('a system message is needed') }}{% endif %}ok"
    template = checked_template(source, TOKENS)
    with pytest.raises(Refused, match="a system message is needed"):
        template.render(HI)


@pytest.mark.parametrize(
    "messages, code",
    [
        ([], "no_prompt"),
        ("Hi", "bad_field"),
        ([1], "bad_field"),
        ([{"content": "a"}], "bad_field"),
        ([{"role": None, "content": "a"}], "bad_field"),
        ([{"role": "user", "content": b"a"}], "bad_field"),
        ([{"role": "user", "content": [{"text": object()}]}], "bad_field"),
        ([{"role": "user", "content": "a", 3: "b"}], "bad_field"),
    ],
)
def test_malformed_messages_are_refused(messages: Any, code: str) -> None:
    with pytest.raises(Refused) as caught:
        ChatTemplate("x", TOKENS).render(messages)
    assert caught.value.code == code


def peak_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
