"""Random hostile templates: doublings, huge ranges and pads, deep nesting, recursion of macros, wide filters."""

from __future__ import annotations

import random
from typing import Any

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!\n" * 5},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "f", "arguments": {"a": [1, 2.5, None]}}}],
    },
    {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image"}]},
]
TOOLS: list[dict[str, Any]] = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {}}}}]
NUMBERS = "0 1 2 -1 3 7 64 999 10**5 10**9 10**18 2**62 9**9 1e308 0.5 true false none -10**9".split()
NAMES = "a b n messages messages[0].content messages[1].content loop tools bos_token nothing ns.x".split()
FILTERS = """abs capitalize center(W) count default(E) dictsort first float format(E) indent(W) int items join(E) last
    length list lower map('upper') map(attribute='role') max min reject replace('a',E) reverse round(W) select
    selectattr('role') safe sort sort(attribute='role') string sum title tojson tojson(indent=W) trim unique upper
    map('center',W) nothing batch(W) slice(W) attr('__class__') indent(W,true,true) tojson(separators=(E,E))
    sum(start=E) groupby('role') d(E)""".split()
METHODS = """upper() lower() split('a') split() rsplit(E,W) replace('a',E) replace('',E) join(E) strip() ljust(W)
    rjust(W) center(W) zfill(W) format(E,E) items() keys() values() get(E) splitlines() count('a') find(E) title()
    index(E) startswith(E) append(E) pop() update(E) encode() __class__ format_map(E) expandtabs(W)""".split()
OPERATORS = "+ - * / // % ** ~ and or == != < <= in".split() + ["not in", "if E else", "is", "|"]
TESTS = "defined none string mapping iterable odd divisibleby(W) sameas(E) in(E) number eq(E) nothing".split()
REPEATED = """
    {% set a = a ~ a %}
    {% set a = a + a %}
    {% set b = [b, b] %}
    {% set b = (b, b) %}
    {% set b = b + b %}
    {% set b = {'a': b, 'b': b} %}
    {% set a = a.replace('a', a) %}
    {% set a = a.join([a, a]) %}
    {{ a }}{{ b }}
    {% set a = a | tojson %}
    {% set b = b | list * 2 %}
    {% set ns.x = ns.x ~ ns.x %}
    {% set a = a | indent(64) %}
    {% set a = '%s%s' % (a, a) %}
    {% set a = '{0}{0}{0}'.format(a) %}
    {% set a = a | center(a | length * 2) %}
    {% set a %}{{ a }}{{ a }}{% endset %}
    {% set n = (n or 2) ** 2 %}
    {% set n = (n or 9) * 999999 %}
    {% set a = b | string %}{% set b = [a, b] %}
    {% set a = a | upper | lower | title %}
    {{ b == b }}
    {% set b = messages | map(attribute='content') | list + b %}
    {% set a = a | replace('a', 'aa') %}
    {% set a = ('ß' ~ a) | upper %}
    {% set a = b | join(a) %}
    {% set b = b | sort %}
    {% set b = [b] %}
    {% macro f(x) %}{{ x }}{{ f(x ~ x) }}{% endmacro %}{{ f('a') }}
    {% for x in range(99) %}
    {% if a %}
    {{ a
""".strip().splitlines()
NESTED = [
    ("(", ")"), ("{{ (", ") }}"), ("{{ [", "] }}"), ("{% if 1 %}", "{% endif %}"), ("{{ -", "1 }}"),
    ("{% for i in [1, 2] %}", "{% endfor %}"), ("{% set x %}", "{% endset %}"), ("{{ not ", " }}"),
    ("{{ {'a': ", "} }}"),
    ("{% filter upper %}", "{% endfilter %}"), ("{% macro f() %}", "{% endmacro %}"),
    ("{% call f() %}", "{% endcall %}"),
    ("{% generation %}", "{% endgeneration %}"), ("{{ a[", "] }}"), ("{{ a | upper", " }}"),
]  # fmt: skip
STATEMENTS = """
    {% for i in VALUE %}INNER{% else %}x{% endfor %}
    {% for i in range(NUMBER) %}INNER{% endfor %}
    {% for i in messages if VALUE %}INNER{{ loop.cycle(1, 2) }}{{ loop.changed(i) }}{% endfor %}
    {% for k, v in VALUE | items %}{% break %}INNER{% endfor %}
    {% for i in VALUE recursive %}{{ loop(i) }}{% endfor %}
    {% if VALUE %}INNER{% elif VALUE %}y{% else %}INNER{% endif %}
    {% set a = VALUE %}INNER
    {% set a %}INNER{% endset %}
    {% set ns.x = VALUE %}INNER
    {% macro f(a, b=VALUE) %}INNER{{ caller() }}{% endmacro %}{% call f(VALUE) %}INNER{% endcall %}
    {% macro g(n) %}{% if n %}{{ g(n - 1) }}{{ g(n - 1) }}INNER{% endif %}{% endmacro %}{{ g(NUMBER) }}
    {% filter FILTER %}INNER{% endfilter %}
    {% with a = VALUE %}INNER{% endwith %}
    {% generation %}INNER{% endgeneration %}
    {{ raise_exception(VALUE) }}INNER
    {{ strftime_now(VALUE) }}INNER
    {{ namespace(VALUE) }}
    {{ VALUE }}INNER
""".strip().splitlines()


def random_template(draw: random.Random) -> str:
    """One template, often with a statement repeated until it would be too much."""
    parts = [statement(draw, draw.randrange(1, 4)) for _ in range(draw.randrange(1, 5))]
    if draw.randrange(3) == 0:
        parts.append(draw.choice(REPEATED) * draw.choice([3, 40, 400, 2000]))
    if draw.randrange(10) == 0:
        depth = draw.choice([10, 60, 200, 3000])
        opening, closing = draw.choice(NESTED)
        parts.append(opening * depth + draw.choice(["1", ""]) + closing * depth)
    draw.shuffle(parts)
    return "{% set a = 'aaaaaaaa' %}{% set b = [1, 'x'] %}{% set ns = namespace(x='aa') %}" + "".join(parts)


def statement(draw: random.Random, depth: int) -> str:
    """A statement with others within."""
    if depth <= 0:
        return "{{ " + expression(draw, 3) + " }}"
    inner = "".join(statement(draw, depth - 1) for _ in range(draw.randrange(1, 3)))
    value = expression(draw, 2)
    filter = filled(draw, draw.choice(FILTERS), 1)
    made = draw.choice(STATEMENTS).replace("VALUE", value).replace("NUMBER", draw.choice(NUMBERS))
    return made.replace("FILTER", filter).replace("INNER", inner)


def expression(draw: random.Random, depth: int) -> str:
    """An expression, seldom a sensible one."""
    if depth <= 0:
        return draw.choice([*NUMBERS, *NAMES, "'a'", "'%s'", "'%9d'", "'{}'", "''", "[]", "{}", "'aaaa!'", "i", "k"])
    left, right = expression(draw, depth - 1), expression(draw, depth - 1)
    kind = draw.randrange(8)
    if kind == 0:
        return f"({left} | {filled(draw, draw.choice(FILTERS), depth - 1)})"
    if kind == 1:
        return f"({left}).{filled(draw, draw.choice(METHODS), depth - 1)}"
    if kind == 2:
        return f"({left} is {filled(draw, draw.choice(TESTS), depth - 1)})"
    if kind == 3:
        return draw.choice(["[{}, {}]", "{{'a': {}, 'b': {}}}", "({}, {})", "{}[{}]", "{}[:{}]", "{}[::{}]"]).format(
            left, right
        )
    if kind == 4:
        return f"range({left}, {draw.choice(NUMBERS)})"
    if kind == 5:
        return f"({left} * {draw.choice(NUMBERS)})"
    return f"({left} {draw.choice(OPERATORS).replace('E', right)} {right})"


def filled(draw: random.Random, pattern: str, depth: int) -> str:
    """A filter, method or test with arguments: W a number, E any expression."""
    name, opening, arguments = pattern.partition("(")
    arguments = arguments.replace("W", draw.choice(NUMBERS)).replace("E", expression(draw, depth))
    return name + opening + arguments
