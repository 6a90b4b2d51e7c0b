"""What a chat template can call by name: functions, methods, filters and tests. A name that is not here does not exist.

Each takes the budget first. The meaning is Jinja's.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from jinja2 import Undefined
from jinja2.filters import do_title

from .budget import Budget, MessagesRefused, TemplateFault
from .operations import (
    Operation,
    compare,
    indent,
    items_of,
    join,
    number,
    pairs_of,
    pick,
    replace,
    split,
    split_lines,
    text_of,
    to_json,
)


def strftime_now(budget: Budget, pattern: str) -> str:
    """The local date and time; plain conversions only, without widths."""
    if len(pattern) > 64 or not re.fullmatch(r"(?:[^%]|%[aAbBdeHIjmMpSyYZ%])*", pattern):
        raise TemplateFault(f"strftime_now does not take {pattern[:64]!r}")
    return time.strftime(pattern)


def number_range(budget: Budget, *bounds: int) -> list[int]:
    """Whole numbers as of Python's range."""
    numbers = range(*bounds)
    budget.elements(len(numbers))
    return list(numbers)


def raise_exception(budget: Budget, message: Any) -> None:
    """What templates call to refuse messages."""
    raise MessagesRefused(text_of(budget, message)[:500])


GLOBALS: dict[str, Operation] = {
    "range": number_range,
    "dict": lambda budget, **values: values,
    "raise_exception": raise_exception,
    "strftime_now": strftime_now,
}


def _plain(method: Callable[..., Any]) -> Operation:
    """A method of text whose result is no longer than what it is given (or twice that)."""

    def call(budget: Budget, text: str, *args: Any) -> Any:
        for value in (text, *args):
            budget.weigh(value)
        return method(text, *args)

    return call


_PLAIN_METHODS = """capitalize count endswith find index isalnum isalpha isdigit islower isspace isupper lower lstrip
    partition removeprefix removesuffix rfind rpartition rstrip startswith strip swapcase title upper""".split()


def _get(budget: Budget, value: dict[Any, Any], key: Any, default: Any = None) -> Any:
    budget.weigh(key)
    return value.get(key, default)


METHODS: dict[type, dict[str, Operation]] = {
    str: {
        **{name: _plain(getattr(str, name)) for name in _PLAIN_METHODS},
        "join": lambda budget, text, values: join(budget, values, text),
        "replace": replace,
        "split": split,
        "rsplit": partial(split, last=True),
        "splitlines": split_lines,
    },
    dict: {
        "get": _get,
        "items": pairs_of,
        "keys": items_of,
        "values": lambda budget, value: [held for _, held in pairs_of(budget, value)],
    },
    list: {"count": _plain(list.count), "index": _plain(list.index)},
}
"""Methods by the type they belong to: none changes its object."""


def _ordered(budget: Budget, values: Any, reverse: bool = False, case: bool = False, attribute: Any = None) -> Any:
    budget.weigh(values)

    def key(value: Any) -> Any:
        picked = pick(value, attribute)
        return picked.lower() if isinstance(picked, str) and not case else picked

    return sorted(items_of(budget, values), key=key, reverse=reverse)


def _by_key(budget: Budget, value: dict[Any, Any], case: bool = False, by: str = "key", reverse: bool = False) -> Any:
    return _ordered(budget, pairs_of(budget, value), reverse, case, 0 if by == "key" else 1)


def _unique(budget: Budget, values: Any, case: bool = False, attribute: Any = None) -> list[Any]:
    budget.weigh(values)
    seen: dict[Any, Any] = {}
    for value in items_of(budget, values):
        picked = pick(value, attribute)
        seen.setdefault(picked.lower() if isinstance(picked, str) and not case else picked, value)
    return list(seen.values())


def _default(budget: Budget, value: Any, default: Any = "", falsy: bool = False) -> Any:
    return default if isinstance(value, Undefined) or (falsy and not value) else value


def _converted(kind: Callable[[Any], Any], fallback: Any) -> Operation:
    def call(budget: Budget, value: Any, default: Any = fallback) -> Any:
        try:
            return number(kind(value[:32] if isinstance(value, str) else value))
        except (TypeError, ValueError, OverflowError, TemplateFault):
            return default

    return call


def _text_filter(method: Callable[..., str]) -> Operation:
    return lambda budget, value, *args: method(text_of(budget, value), *args)


def _title(budget: Budget, value: Any) -> str:
    text = text_of(budget, value)
    budget.elements(len(text))
    return do_title(text)


def _edge(position: int) -> Operation:
    def call(budget: Budget, values: Any) -> Any:
        held = items_of(budget, values)
        return held[position] if held else Undefined(f"the {'last' if position else 'first'} element of nothing")

    return call


def _extreme(position: int) -> Operation:
    return lambda budget, values: _edge(position)(budget, _ordered(budget, values))


FILTERS: dict[str, Operation] = {
    "abs": lambda budget, value: abs(number(value)),
    "capitalize": _text_filter(str.capitalize),
    "count": lambda budget, value: len(value),
    "d": _default,
    "default": _default,
    "dictsort": _by_key,
    "first": _edge(0),
    "float": _converted(float, 0.0),
    "indent": indent,
    "int": _converted(int, 0),
    "items": pairs_of,
    "join": join,
    "last": _edge(-1),
    "length": lambda budget, value: len(value),
    "list": items_of,
    "lower": _text_filter(str.lower),
    "max": _extreme(-1),
    "min": _extreme(0),
    "replace": replace,
    "reverse": lambda budget, value: value[::-1] if isinstance(value, str) else items_of(budget, value)[::-1],
    "safe": lambda budget, value: text_of(budget, value),
    "sort": _ordered,
    "string": text_of,
    "sum": lambda budget, values, attribute=None, start=0: number(
        start + sum(number(pick(value, attribute)) for value in items_of(budget, values))
    ),
    "title": _title,
    "tojson": to_json,
    "trim": _text_filter(str.strip),
    "unique": _unique,
    "upper": _text_filter(str.upper),
}
"""Filters by name; `map`, `select` and their kin, which call others by name, are the interpreter's."""

TESTS: dict[str, Operation] = {
    "boolean": lambda budget, value: isinstance(value, bool),
    "defined": lambda budget, value: not isinstance(value, Undefined),
    "divisibleby": lambda budget, value, by: number(value) % number(by) == 0,
    "even": lambda budget, value: number(value) % 2 == 0,
    "false": lambda budget, value: value is False,
    "float": lambda budget, value: isinstance(value, float),
    "integer": lambda budget, value: isinstance(value, int) and not isinstance(value, bool),
    "iterable": lambda budget, value: isinstance(value, str | list | tuple | dict | Undefined),
    "lower": lambda budget, value: text_of(budget, value).islower(),
    "mapping": lambda budget, value: isinstance(value, dict),
    "none": lambda budget, value: value is None,
    "number": lambda budget, value: isinstance(value, int | float),
    "odd": lambda budget, value: number(value) % 2 == 1,
    "sameas": lambda budget, value, other: value is other,
    "sequence": lambda budget, value: isinstance(value, str | list | tuple | dict | Undefined),
    "string": lambda budget, value: isinstance(value, str),
    "true": lambda budget, value: value is True,
    "undefined": lambda budget, value: isinstance(value, Undefined),
    "upper": lambda budget, value: text_of(budget, value).isupper(),
}


def _comparison(name: str) -> Operation:
    return lambda budget, left, right: compare(budget, name, left, right)


_SPELLINGS = {"eq": "== equalto", "ne": "!=", "lt": "< lessthan", "lteq": "<= le", "gt": "> greaterthan",
              "gteq": ">= ge", "in": ""}  # fmt: skip
for _name, _spelled in _SPELLINGS.items():
    TESTS |= {spelling: _comparison(_name) for spelling in (_name, *_spelled.split())}
