"""What a chat template can call by name: functions, methods, filters and tests. A name that is not here does not exist.

Each takes the budget first. The meaning is Jinja's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Any

from jinja2 import Undefined
from jinja2.filters import do_title

from .budget import Budget, MessagesRefused, TemplateFault
from .operations import (
    Lazy,
    Operation,
    compare,
    eager,
    format_fields,
    format_percent,
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
    if len(pattern) > 64 or not re.fullmatch(r"(?:[^%]|%-?[aAbBcdDefFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ%])*", pattern):
        raise TemplateFault(f"strftime_now does not take {pattern[:64]!r}")
    return datetime.now().strftime(pattern)


def number_range(budget: Budget, *bounds: int) -> list[int]:
    """Whole numbers as of Python's range."""
    numbers = range(*bounds)
    budget.elements(len(numbers))
    return list(numbers)


def raise_exception(budget: Budget, message: Any) -> None:
    """What templates call to refuse messages."""
    raise MessagesRefused(text_of(budget, message)[:500])


def to_dict(budget: Budget, given: Any = (), **values: Any) -> dict[Any, Any]:
    """A new map of a map or of pairs, and of names."""
    budget.weigh([given, values])
    return dict(given, **values)


GLOBALS: dict[str, Operation] = {
    "range": number_range,
    "dict": to_dict,
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


_PLAIN_METHODS = """capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit
    isidentifier islower isnumeric isprintable isspace istitle isupper lower lstrip partition removeprefix
    removesuffix rfind rpartition rstrip startswith strip swapcase title upper""".split()


def _padded(method: Callable[..., str]) -> Operation:
    """A method of text that fills it up to a width."""

    def call(budget: Budget, text: Any, width: int = 80, *fill: str) -> str:
        budget.elements(width)
        return method(text_of(budget, text), width, *fill)

    return call


def _get(budget: Budget, value: dict[Any, Any], key: Any, default: Any = None) -> Any:
    budget.weigh(key)
    return value.get(key, default)


METHODS: dict[type, dict[str, Operation]] = {
    str: {
        **{name: _plain(getattr(str, name)) for name in _PLAIN_METHODS},
        **{name: _padded(getattr(str, name)) for name in ("center", "ljust", "rjust", "zfill")},
        "format": format_fields,
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
    tuple: {"count": _plain(tuple.count), "index": _plain(tuple.index)},
}
"""Methods by the type they belong to: none changes its object."""


def _sort_key(case_sensitive: bool, attribute: Any) -> Callable[[Any], Any]:
    def key(value: Any) -> Any:
        picked = pick(value, attribute)
        return picked.lower() if isinstance(picked, str) and not case_sensitive else picked

    return key


def _ordered(
    budget: Budget, value: Any, reverse: bool = False, case_sensitive: bool = False, attribute: Any = None
) -> list[Any]:
    budget.weigh(value)
    return sorted(items_of(budget, value), key=_sort_key(case_sensitive, attribute), reverse=reverse)


def _by_key(
    budget: Budget, value: dict[Any, Any], case_sensitive: bool = False, by: str = "key", reverse: bool = False
) -> list[Any]:
    return _ordered(budget, pairs_of(budget, value), reverse, case_sensitive, 0 if by == "key" else 1)


def _unique(budget: Budget, value: Any, case_sensitive: bool = False, attribute: Any = None) -> list[Any]:
    budget.weigh(value)
    seen: dict[Any, Any] = {}
    key = _sort_key(case_sensitive, attribute)
    for item in items_of(budget, value):
        seen.setdefault(key(item), item)
    return Lazy(seen.values())


def _default(budget: Budget, value: Any, default_value: Any = "", boolean: bool = False) -> Any:
    return default_value if isinstance(value, Undefined) or (boolean and not value) else value


def _to_int(budget: Budget, value: Any, default: Any = 0, base: int = 10) -> Any:
    short = value[:32] if isinstance(value, str) else value
    try:
        return number(int(short, base) if isinstance(short, str) else int(short))
    except (TypeError, ValueError):
        try:
            return number(int(float(short)))
        except (TypeError, ValueError, OverflowError):
            return default


def _to_float(budget: Budget, value: Any, default: Any = 0.0) -> Any:
    try:
        return float(value[:32] if isinstance(value, str) else value)
    except (TypeError, ValueError):
        return default


def _rounded(budget: Budget, value: Any, precision: int = 0, method: str = "common") -> Any:
    if abs(number(precision)) > 64:
        raise TemplateFault("round takes a precision of at most 64 digits")
    number(value)
    if method == "common":
        return round(value, precision)
    return float(getattr(math, {"ceil": "ceil", "floor": "floor"}[method])(value * 10**precision) / 10**precision)


def _text_filter(method: Callable[..., str]) -> Operation:
    return lambda budget, value, *args, **named: method(text_of(budget, value), *args, **named)


def _title(budget: Budget, value: Any) -> str:
    text = text_of(budget, value)
    budget.elements(len(text))
    return do_title(text)


def _edge(position: int) -> Operation:
    def call(budget: Budget, values: Any) -> Any:
        if isinstance(values, Lazy) and position == 0 and len(values):
            return values.pop(0)
        held = items_of(budget, values)
        return held[position] if held else Undefined(f"the {'last' if position else 'first'} element of nothing")

    return call


def _extreme(position: int) -> Operation:
    def call(budget: Budget, value: Any, case_sensitive: bool = False, attribute: Any = None) -> Any:
        ordered = _ordered(budget, value, position != 0, case_sensitive, attribute)  # of equal ones, the first
        return _edge(0)(budget, ordered)

    return call


FILTERS: dict[str, Operation] = {
    "abs": lambda budget, value: abs(number(value)),
    "capitalize": _text_filter(str.capitalize),
    "center": _padded(str.center),
    "count": lambda budget, value: len(eager(value)),
    "d": _default,
    "default": _default,
    "dictsort": _by_key,
    "first": _edge(0),
    "float": _to_float,
    "format": format_percent,
    "indent": indent,
    "int": _to_int,
    "items": lambda budget, value: Lazy(pairs_of(budget, value)),
    "join": join,
    "last": _edge(-1),
    "length": lambda budget, value: len(eager(value)),
    "list": items_of,
    "lower": _text_filter(str.lower),
    "max": _extreme(-1),
    "min": _extreme(0),
    "replace": replace,
    "reverse": lambda budget, value: value[::-1] if isinstance(value, str) else Lazy(items_of(budget, value)[::-1]),
    "round": _rounded,
    "safe": lambda budget, value: text_of(budget, value),
    "sort": _ordered,
    "string": text_of,
    "sum": lambda budget, value, attribute=None, start=0: number(
        number(start) + sum(number(pick(item, attribute)) for item in items_of(budget, value))
    ),
    "title": _title,
    "tojson": to_json,
    "trim": lambda budget, value, chars=None: text_of(budget, value).strip(chars),
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
