"""Duplicates are left out, the first of each stays, and what differs enough stays."""

from __future__ import annotations

import random

import pytest

from lorayard.dispatcher.corpus.dedupe import distinct
from lorayard.shared.errors import UsageError


def kept(texts: list[str], how: str) -> list[int]:
    removed: list[str] = []
    rows = [{"row_key": str(at), "text": text} for at, text in enumerate(texts)]
    left = [int(row["row_key"]) for row in distinct(rows, how, removed)]
    assert sorted([*left, *map(int, removed)]) == list(range(len(texts)))
    return left


def test_exact() -> None:
    assert kept(["a", "A", "a", "", "", "a "], "exact") == [0, 1, 3, 5]


def jaccard(one: str, other: str) -> float:
    """Of the sets of three words, by its definition."""
    a, b = ({tuple(words[at : at + 3]) for at in range(len(words) - 2)} for words in (one.split(), other.split()))
    return len(a & b) / len(a | b)


def test_minhash_as_jaccard_says() -> None:
    pytest.importorskip("datasketch")
    draw = random.Random(1)
    base = [f"w{draw.randrange(5000)}" for _ in range(200)]
    near, far = base.copy(), base.copy()
    near[100] = "changed"
    far[::4] = ["changed"] * 50
    texts = [" ".join(words) for words in (base, near, far, base[:100] * 2)]
    assert jaccard(texts[0], texts[1]) > 0.95 and all(jaccard(texts[0], one) < 0.6 for one in texts[2:])
    assert kept([*texts, texts[0].upper(), "", "x", ""], "minhash:0.9") == [0, 2, 3, 5, 6]


@pytest.mark.parametrize("how", ["minhash", "minhash:2", "minhash:x", "fuzzy:0.9"])
def test_what_it_does_not_know(how: str) -> None:
    with pytest.raises(UsageError, match="must be exact or minhash:SIMILARITY"):
        kept(["a"], how)
