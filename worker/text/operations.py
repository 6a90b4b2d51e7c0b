"""Operators, and the operations on text and lists that chat templates use, each paying before it makes anything large.

The meaning is Jinja's, with `tojson` as Hugging Face defines it for chat templates (plain JSON, not escaped for HTML).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from jinja2 import Undefined

from .budget import Budget, TemplateFault

Operation = Callable[..., Any]
MAX_INT = 1 << 63


def number(value: Any) -> Any:
    """The value if it is a number of at most 64 bits."""
    if not isinstance(value, int | float) or (isinstance(value, int) and abs(value) > MAX_INT):
        raise TemplateFault(f"arithmetic needs numbers of at most 64 bits, not a {type(value).__name__}")
    return value


def add(budget: Budget, left: Any, right: Any) -> Any:
    """Sum of numbers, or two texts or lists joined."""
    if isinstance(left, str) and isinstance(right, str):
        budget.spend(len(left) + len(right))
        return left + right
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        budget.elements(len(left) + len(right))
        return [*left, *right]
    return number(number(left) + number(right))


def multiply(budget: Budget, left: Any, right: Any) -> Any:
    """Product of numbers, or a text or list repeated."""
    if isinstance(right, str | list | tuple):
        left, right = right, left
    if isinstance(left, str | list | tuple):
        budget.elements(len(left) * max(number(right), 0))
        return left * right
    return number(number(left) * number(right))


def power(budget: Budget, left: Any, right: Any) -> Any:
    """A number to a power of at most 64."""
    if abs(number(right)) > 64 or abs(number(left)) > 1 << 32:
        raise TemplateFault("a power with numbers this large is not allowed")
    return number(left**right)


def modulo(budget: Budget, left: Any, right: Any) -> Any:
    """Remainder of numbers, or a text with `%s` and the like filled in."""
    if isinstance(left, str):
        return format_percent(budget, left, *(right if isinstance(right, tuple) else (right,)))
    return number(number(left) % number(right))


def format_percent(budget: Budget, text: Any, *values: Any, **named: Any) -> str:
    """Python's `%`, with `%s`, `%d`, `%i`, `%f` and at most two digits of width and of precision."""
    text = text_of(budget, text)
    rest = re.sub(r"%(?:\(\w{1,32}\))?-?\d{0,2}(?:\.\d{1,2})?[sdif]|%%", "", text)
    if "%" in rest:
        raise TemplateFault(f"a format may have %s, %d, %i and %f, not {text[:60]!r}")
    for value in (*values, *named.values()):
        text_of(budget, value)
        budget.spend(100 * text.count("%"))
    longest = max([len(str(value)) for value in (*values, *named.values())], default=0)
    budget.spend(longest * text.count("%"))
    return str(text % (named or values))


def format_fields(budget: Budget, text: str, *values: Any, **named: Any) -> str:
    """`text.format(...)` with fields `{}`, `{0}` and `{name}`, without attributes and formats."""
    if not re.fullmatch(r"(?:[^{}]|\{\{|\}\}|\{\w{0,32}\})*+", text):
        raise TemplateFault(f"format takes fields such as {{}} and {{name}}, not {text[:60]!r}")
    longest = max([len(text_of(budget, value)) for value in (*values, *named.values())], default=0)
    budget.spend(len(text) + longest * text.count("{"))
    return text.format(*values, **named)


BINARY: dict[str, Operation] = {
    "Add": add,
    "Sub": lambda budget, left, right: number(number(left) - number(right)),
    "Mul": multiply,
    "Div": lambda budget, left, right: number(number(left) / number(right)),
    "FloorDiv": lambda budget, left, right: number(number(left) // number(right)),
    "Mod": modulo,
    "Pow": power,
}
"""Operators by the name of their node."""

COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "eq": lambda left, right: left == right,
    "ne": lambda left, right: left != right,
    "lt": lambda left, right: left < right,
    "lteq": lambda left, right: left <= right,
    "gt": lambda left, right: left > right,
    "gteq": lambda left, right: left >= right,
    "in": lambda left, right: left in right,
    "notin": lambda left, right: left not in right,
}


def compare(budget: Budget, name: str, left: Any, right: Any) -> Any:
    """The comparison `name` of two values, both weighed first."""
    budget.weigh(left)
    budget.weigh(right)
    return COMPARE[name](left, right)


class Lazy(list[Any]):
    """What Jinja makes one element at a time, as `map` and `select` do: true even if empty, without a length and an
    index, and gone when it was read.
    """

    def __bool__(self) -> bool:
        return True


def items_of(budget: Budget, value: Any) -> list[Any]:
    """What a loop over `value` sees: elements, characters or keys; nothing for an undefined value."""
    if isinstance(value, Undefined):
        return []
    if not isinstance(value, str | list | tuple | dict):
        raise TemplateFault(f"a {type(value).__name__} is not a list")
    budget.elements(len(value))
    items = list(value)
    if isinstance(value, Lazy):
        value.clear()
    return items


def eager(value: Any) -> Any:
    """The value, if it is one that has a length and can be printed."""
    if isinstance(value, Lazy):
        raise TemplateFault("what a filter makes one by one must be made a list first")
    return value


def text_of(budget: Budget, value: Any) -> str:
    """The value as it is printed."""
    if isinstance(value, str):
        budget.spend(len(value))
        return value
    if isinstance(eager(value), list | tuple | dict):
        budget.weigh(value, indent=8)
    elif not isinstance(value, int | float | Undefined | None):
        raise TemplateFault(f"a {type(value).__name__} cannot be printed")
    return str(value)


def join(budget: Budget, value: Any, d: Any = "", attribute: Any = None) -> str:
    """The printed values with a separator `d` between them."""
    parts = [text_of(budget, pick(item, attribute)) for item in items_of(budget, value)]
    separator = text_of(budget, d)
    budget.spend((len(separator) + 1) * len(parts))
    return separator.join(parts)


def pick(value: Any, attribute: Any) -> Any:
    """A map's value under a dotted name, or a list's element; the value itself if no attribute is named."""
    if attribute is None:
        return value
    for part in attribute.split(".") if isinstance(attribute, str) else [attribute]:
        try:
            value = value[int(part) if str(part).isdigit() else part]
        except (LookupError, TypeError):
            return Undefined(obj=value, name=str(part))
    return value


def replace(budget: Budget, text: Any, old: Any, new: Any, count: int | None = None) -> str:
    """The text with `old` replaced."""
    text, old, new = text_of(budget, text), text_of(budget, old), text_of(budget, new)
    budget.spend(len(text) + text.count(old) * len(new))
    return str(text.replace(old, new, -1 if count is None else count))


def split(budget: Budget, text: str, sep: str | None = None, maxsplit: int = -1, last: bool = False) -> list[str]:
    """The text in parts; with a limit, cut at the first separators, or at the last ones."""
    budget.elements(1 + (text.count(sep) if sep else len(text) // 2))
    budget.spend(len(text))
    return text.rsplit(sep, maxsplit) if last else text.split(sep, maxsplit)


def split_lines(budget: Budget, text: str) -> list[str]:
    """The lines of the text."""
    budget.elements(len(text))
    return text.splitlines()


def pairs_of(budget: Budget, value: Any) -> list[tuple[Any, Any]]:
    """The (key, value) pairs of a map; none for an undefined value."""
    return [] if isinstance(value, Undefined) else [(key, value[key]) for key in items_of(budget, value)]


def indent(budget: Budget, text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """The lines of the text moved right; the first one and blank ones only if asked."""
    if isinstance(width, int) and not 0 <= width <= 64:
        raise TemplateFault("indent takes a width of 0 to 64")
    text, margin = text_of(budget, text), " " * width if isinstance(width, int) else str(width)
    lines = str(text + "\n").splitlines()
    budget.spend(len(text) + len(lines) * (len(margin) + 4))
    moved = [margin + line if line or blank else line for line in lines[1:]]
    return "\n".join([margin + lines[0] if first else lines[0], *moved])


def to_json(
    budget: Budget, value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
    sort_keys: bool = False,
) -> str:  # fmt: skip
    """The value as JSON."""
    if indent is not None and not 0 <= indent <= 16:
        raise TemplateFault("tojson indents by 0 to 16")
    if any(len(separator) > 8 for separator in separators or ()):
        raise TemplateFault("tojson takes separators of at most 8 characters")
    budget.weigh(eager(value), indent=8 + (indent or 0))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
