"""Stop strings: where the text is cut must not matter, and nothing is lost."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorayard.worker.generate.stop import StopScanner


@pytest.mark.parametrize(
    "strings, pieces, text, match",
    [
        ([], ["abc"], "abc", None),
        (["END"], ["one E", "N", "D two"], "one ", "END"),
        (["END"], ["one EN", "E", "ND"], "one EN", "END"),
        (["END"], ["one EN"], "one EN", None),
        (["b", "abc"], ["abc"], "a", "b"),
        (["bc", "abc"], ["abc"], "", "abc"),
        (["aab"], ["aaa", "ab"], "aa", "aab"),
        (["\n"], ["a", "\n", "b"], "a", "\n"),
        (["日本"], ["x日", "日本語"], "x日", "日本"),
    ],
)
def test_examples(strings: list[str], pieces: list[str], text: str, match: str | None) -> None:
    assert scan(strings, pieces) == (text, match)


@settings(max_examples=400, deadline=None)
@given(
    strings=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    pieces=st.lists(st.text("abc", max_size=5), max_size=8),
)
def test_cutting_does_not_matter(strings: list[str], pieces: list[str]) -> None:
    whole = "".join(pieces)
    assert scan(strings, pieces) == scan(strings, list(whole)) == plainly(strings, whole)


@settings(max_examples=200, deadline=None)
@given(
    strings=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3), text=st.text("abc", max_size=20)
)
def test_no_more_is_held_than_could_be_a_stop_string(strings: list[str], text: str) -> None:
    scanner, out = StopScanner(strings), ""
    for at, character in enumerate(text):
        out += scanner.push(character)
        if scanner.match:
            return
        held = text[len(out) : at + 1]
        assert not held or any(string.startswith(held) for string in strings)


def scan(strings: list[str], pieces: list[str]) -> tuple[str, str | None]:
    scanner, text = StopScanner(strings), ""
    for piece in pieces:
        text += scanner.push(piece)
        if scanner.match is not None:
            return text, scanner.match
    return text + scanner.finish(), None


def plainly(strings: list[str], text: str) -> tuple[str, str | None]:
    """The definition: the string that is complete first; the longest of those that end there."""
    for end in range(len(text) + 1):
        ending = [string for string in strings if text[:end].endswith(string)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None
