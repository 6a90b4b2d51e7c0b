"""Regular expressions of hostile configs, matched in bounded time: Python's own matcher may take for ever."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from typing import Any

from lorayard.shared.errors import NotSupported

MAX_LENGTH, MAX_STEPS = 20_000, 500_000
"""Characters of a pattern, and characters of names that it may be compared with in all."""
CLASSES: dict[str, Callable[[str], bool]] = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_NOT_DIGIT": lambda c: not c.isdecimal(),
    "CATEGORY_WORD": lambda c: c.isalnum() or c == "_",
    "CATEGORY_NOT_WORD": lambda c: not (c.isalnum() or c == "_"),
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_NOT_SPACE": lambda c: not c.isspace(),
}
Places = frozenset[int]


class Pattern:
    """A pattern in Python's notation, without look-around, back references and flags.

    `fullmatch` holds the set of all places where a match of each part may end, so it never goes back. Raises
    NotSupported, in the words of `where`, for what it does not do and when all calls together take more than `steps`.
    """

    def __init__(self, text: str, where: str, steps: int = MAX_STEPS) -> None:
        self.text, self.where, self._left = text, where, steps
        if len(text) > MAX_LENGTH:
            raise self._refusal(f"has {len(text)} characters; this version takes {MAX_LENGTH}")
        try:
            self._tree = import_module("re._parser").parse(text)
        except (re.error, OverflowError, RecursionError) as reason:
            raise self._refusal(f"is no regular expression: {str(reason)[:80]}") from None
        if self._tree.state.flags != re.UNICODE:
            raise self._refusal("has flags, which this version does not do")

    def fullmatch(self, name: str) -> bool:
        """Whether the whole name, a single line, matches."""
        return self._ends(name, frozenset([0]))

    def _ends(self, name: str, starts: Places) -> bool:
        try:
            return len(name) in self._sequence(self._tree, name, starts)
        except RecursionError:
            raise self._refusal("is nested too deeply") from None

    def fullmatch_end(self, name: str) -> bool:
        """Whether the whole name matches, or what follows one of its dots."""
        if re.fullmatch(r"[\w.]+", self.text):  # the many of a rank_pattern; a dot stands for any character
            before, end = name[: -len(self.text)], name[-len(self.text) :]
            same = len(end) == len(self.text) and all(a in (b, ".") for a, b in zip(self.text, end, strict=True))
            return same and (not before or before.endswith("."))
        return self._ends(name, frozenset([0, *(i + 1 for i, c in enumerate(name) if c == ".")]))

    def _refusal(self, what: str) -> NotSupported:
        return NotSupported(f"{self.where}: pattern {self.text[:60]!r} {what}")

    def _sequence(self, items: Any, name: str, starts: Places) -> Places:
        for op, argument in items:
            self._left -= 1 + len(starts)
            if self._left < 0:
                raise self._refusal("takes too long to match")
            step = getattr(self, f"_{str(op).lower()}", None)
            if step is None:
                raise self._refusal(f"uses {str(op).lower().replace('_', ' ')}, which this version does not do")
            starts = step(argument, name, starts)
            if not starts:
                break
        return starts

    def _literal(self, code: int, name: str, starts: Places) -> Places:
        return self._one(lambda c: ord(c) == code, name, starts)

    def _not_literal(self, code: int, name: str, starts: Places) -> Places:
        return self._one(lambda c: ord(c) != code, name, starts)

    def _any(self, _: None, name: str, starts: Places) -> Places:
        return self._one(lambda c: c != "\n", name, starts)

    def _in(self, members: Any, name: str, starts: Places) -> Places:
        self._left -= len(members) * len(starts)
        return self._one(lambda c: _belongs(members, c), name, starts)

    def _one(self, fits: Callable[[str], bool], name: str, starts: Places) -> Places:
        return frozenset(start + 1 for start in starts if start < len(name) and fits(name[start]))

    def _branch(self, argument: Any, name: str, starts: Places) -> Places:
        return frozenset().union(*(self._sequence(items, name, starts) for items in argument[1]))

    def _subpattern(self, argument: Any, name: str, starts: Places) -> Places:
        _, added, removed, items = argument
        if added or removed:
            raise self._refusal("has flags, which this version does not do")
        return self._sequence(items, name, starts)

    def _max_repeat(self, argument: Any, name: str, starts: Places) -> Places:
        least, most, items = argument
        ends, fresh, count = frozenset[int](), starts, 0
        if least == 0:
            ends = starts
        while fresh and count < most:
            count += 1
            reached = self._sequence(items, name, fresh)
            if count < least:
                fresh = reached
            else:
                fresh, ends = reached - ends, ends | reached
        return ends

    _min_repeat = _max_repeat

    def _at(self, place: Any, name: str, starts: Places) -> Places:
        edges = {"AT_BEGINNING": 0, "AT_BEGINNING_STRING": 0, "AT_END": len(name), "AT_END_STRING": len(name)}
        if str(place) not in edges:
            raise self._refusal(f"uses {str(place).lower().replace('_', ' ')}, which this version does not do")
        return starts & {edges[str(place)]}


def _belongs(members: Any, c: str) -> bool:
    """Whether a character is in [...], as the parser tells its members."""
    negate = bool(members) and str(members[0][0]) == "NEGATE"
    for op, argument in members[negate:]:
        match str(op):
            case "LITERAL":
                found = ord(c) == argument
            case "RANGE":
                found = argument[0] <= ord(c) <= argument[1]
            case _:
                found = CLASSES[str(argument)](c)
        if found:
            return not negate
    return negate
