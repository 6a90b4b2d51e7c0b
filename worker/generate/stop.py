"""Stop strings in text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopScanner:
    """Finds the stop string that is complete first, holding back text that may be the beginning of one.

    Of several that end at the same character the longest counts. So the outcome does not depend on where the text was
    cut into pieces. `match` is the string that was found; the text before it has been returned, the rest is dropped.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = sorted(strings, key=len, reverse=True)
        self._held = ""
        self.match: str | None = None

    def push(self, text: str) -> str:
        """The text that is now known not to belong to a stop string."""
        assert self.match is None
        text, self._held = self._held + text, ""
        found = [(text.find(string) + len(string), string) for string in self._strings if string in text]
        if found:
            end, self.match = min(found, key=lambda match: match[0])
            return text[: end - len(self.match)]
        held = max((overlap(text, string) for string in self._strings), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What is still held back, when no more text comes."""
        text, self._held = self._held, ""
        return text


def overlap(text: str, string: str) -> int:
    """Length of the longest end of `text` that begins `string` without being all of it."""
    for length in range(min(len(text), len(string) - 1), 0, -1):
        if text.endswith(string[:length]):
            return length
    return 0
