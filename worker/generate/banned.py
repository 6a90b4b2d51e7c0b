"""Banned strings in text that comes token by token, with the tokens held back that may begin one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .event import TokenLogprobs
from .stop import overlap


@dataclass(frozen=True, slots=True)
class Said:
    """A token with the text that came with it, its logprobs if wanted, and mirostat's mu before it."""

    token: int
    text: str
    mu: float
    logprobs: TokenLogprobs | None


class BannedStrings:
    """Finds strings, in any case of letters, and says which tokens to take back."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = [_folded(string) for string in strings]
        self.held: list[Said] = []

    def push(self, said: Said) -> list[Said]:
        """Hold a token; returns those from the token on with which a banned string began, which are not said then."""
        self.held.append(said)
        text = self._text()
        begin = min((text.find(string) for string in self._strings if string in text), default=None)
        return [] if begin is None else self._split(self._before(begin))

    def release(self, all: bool = False) -> list[Said]:
        """The tokens whose text can belong to no banned string any more."""
        text = self._text()
        free = len(text) - max((overlap(text, string) for string in self._strings), default=0)
        released, count = self.held, len(self.held) if all else self._before(free)
        self.held = self._split(count)
        return released[:count]

    def _text(self) -> str:
        return _folded("".join(said.text for said in self.held))

    def _before(self, place: int) -> int:
        """How many of the held tokens come before the one with the character at `place`; all, if there is none."""
        for index, said in enumerate(self.held):
            place -= len(said.text)
            if place < 0:
                return index
        return len(self.held)

    def _split(self, count: int) -> list[Said]:
        """Keep the first tokens; returns the others."""
        self.held, rest = self.held[:count], self.held[count:]
        return rest


def _folded(text: str) -> str:
    """In lower case, each character one character as before."""
    return "".join(low if len(low := character.lower()) == 1 else character for character in text)
