"""What a chat template may spend. Templates come with models from anywhere, and see what clients send."""

from __future__ import annotations

from typing import Any

from jinja2 import Undefined

STEPS = 250_000
"""Nodes that one rendering may evaluate: a conversation of thousands of messages needs fewer."""
TEXT = 8_000_000
"""Characters that one rendering may read and write, besides 32 for each character of its messages."""
ELEMENT = 16
"""What an element of a list or map costs, in characters."""
MAX_DEPTH = 64
"""Nesting of lists, maps and macro calls."""


class TemplateFault(Exception):
    """The template cannot render these messages; the text says why."""


class MessagesRefused(TemplateFault):
    """The template itself refuses these messages."""


class OverBudget(TemplateFault):
    """The template spent more than it may."""


class Budget:
    """Counts down while a template renders; every operation pays before it runs."""

    def __init__(self, variables: dict[str, Any]) -> None:
        self._steps = STEPS
        self._text = 1 << 62
        self.weigh(variables)
        self._text = TEXT + 32 * ((1 << 62) - self._text)

    def step(self) -> None:
        """Pay for one node."""
        self._steps -= 1
        if self._steps < 0:
            raise OverBudget(f"it takes more than {STEPS} steps")

    def spend(self, characters: int) -> None:
        """Pay for reading or writing so many characters."""
        self._text -= characters
        if self._text < 0:
            raise OverBudget("it reads or writes more text than the messages justify")

    def elements(self, count: int) -> None:
        """Pay for so many elements of a list."""
        self.spend(count * ELEMENT)

    def weigh(self, value: Any, indent: int = 0, depth: int = 0) -> None:
        """Pay for all that `value` holds, printed with `indent` spaces a level. Shared parts count each time."""
        if depth > MAX_DEPTH:
            raise OverBudget(f"it nests lists or maps deeper than {MAX_DEPTH}")
        self.spend(ELEMENT + indent * depth + (len(value) if isinstance(value, str) else 0))
        if isinstance(value, dict):
            for key, held in value.items():
                self.weigh(key, 0, depth + 1)
                self.weigh(held, indent, depth + 1)
        elif isinstance(value, list | tuple):
            for held in value:
                self.weigh(held, indent, depth + 1)
        elif depth and not isinstance(value, str | int | float | Undefined | None):
            raise TemplateFault(f"a list or map cannot hold a {type(value).__name__}")
