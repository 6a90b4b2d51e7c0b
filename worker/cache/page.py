"""Which pages of the cache belong to whom, and which full ones can be used again."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from .storage import PAGE


@dataclass(slots=True)
class Page:
    """One page. users: how many sequences hold it. key: what it holds when full and published, else None.

    parent, ids: the tokens that it begins with, after the pages that `parent` stands for; None if that is not known.
    """

    users: int = 0
    key: bytes | None = None
    parent: bytes | None = None
    ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Reservation:
    """The pages of one sequence in order. reused: how many of them hold its first tokens already."""

    pages: tuple[int, ...]
    reused: int


def root(salt: bytes) -> bytes:
    """What stands for no tokens. `salt` must differ wherever the same tokens give other K/V (LoRA sets and scales)."""
    return hashlib.blake2b(salt, digest_size=16).digest()


def chain(salt: bytes, token_ids: Sequence[int]) -> list[bytes]:
    """The key of every full page of a sequence.

    A key is blake2b over the key before it and the page's ids, so it stands for all tokens up to its end; the first
    one starts from the root.
    """
    keys, key = [], root(salt)
    for start in range(0, len(token_ids) - PAGE + 1, PAGE):
        key = _next_key(key, token_ids[start : start + PAGE])
        keys.append(key)
    return keys


def _next_key(key: bytes, ids: Sequence[int]) -> bytes:
    return hashlib.blake2b(key + array("q", ids).tobytes(), digest_size=16).digest()


class PageTable:
    """Hands out pages. Released full pages keep what they hold until, longest unused first, they are needed."""

    def __init__(self, pages: int) -> None:
        self._pages = [Page() for _ in range(pages)]
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(pages))
        self._known: dict[bytes, int] = {}
        self._children: dict[bytes, dict[int, None]] = {}

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    @property
    def known(self) -> int:
        """Full pages that can be used again."""
        return len(self._known)

    def knows(self, key: bytes) -> bool:
        """Whether a full page with this key can be used again."""
        return key in self._known

    def reserve(self, count: int, keys: Sequence[bytes]) -> Reservation | None:
        """`count` pages for a sequence whose first pages have `keys`; None if there are too few free ones.

        The leading keys that are known cost no computing; those that somebody holds cost no page either.
        """
        reused = []
        for key in keys:
            if key not in self._known:
                break
            reused.append(self._known[key])
        fresh = count - len(reused)
        if fresh + sum(page in self._free for page in reused) > len(self._free):
            return None
        for page in reused:
            self._free.pop(page, None)
        pages = (*reused, *(self._take() for _ in range(fresh)))
        for page in pages:
            self._pages[page].users += 1
        return Reservation(pages, len(reused))

    def publish(self, page: int, key: bytes) -> None:
        """Say that a held page is full and holds what `key` stands for. The first page of a key stays the known one."""
        if self._known.setdefault(key, page) == page:
            self._pages[page].key = key

    def note(self, page: int, parent: bytes, ids: Sequence[int]) -> None:
        """Say what a held page begins with, for good: these tokens, after those that `parent` stands for."""
        self._forget(page)
        self._pages[page].parent, self._pages[page].ids = parent, tuple(ids)
        self._children.setdefault(parent, {})[page] = None

    def alike(self, parent: bytes, ids: Sequence[int]) -> tuple[int, int]:
        """(the page after `parent` that has most of its first tokens in common with `ids`, how many)."""
        found = [(_common(self._pages[page].ids, ids), page) for page in self._children.get(parent, ())]
        common, page = max(found, default=(0, 0))
        return page, common

    def release(self, pages: Sequence[int]) -> None:
        """Give a sequence's pages back. Of its full pages the last is reused first, as it needs those before it."""
        for index in reversed(pages):
            page = self._pages[index]
            page.users -= 1
            if not page.users:
                self._free[index] = None
                self._free.move_to_end(index, last=page.key is not None or page.parent is not None)

    def check_integrity(self) -> None:
        """Assert that every page is either held or free, and that keys, notes and pages agree."""
        for index, page in enumerate(self._pages):
            assert page.users >= 0, f"page {index} was released too often"
            assert (page.users == 0) == (index in self._free), f"page {index} has {page.users} users"
            assert page.key is None or self._known[page.key] == index, f"page {index} is known under a wrong key"
            if page.parent is not None:
                assert index in self._children[page.parent] and 0 < len(page.ids) <= PAGE, f"page {index} is misnoted"
                full = page.key is not None and len(page.ids) == PAGE
                assert not full or _next_key(page.parent, page.ids) == page.key, f"page {index} has another key"
        assert all(self._pages[index].key == key for key, index in self._known.items()), "a key names a page without it"
        noted = [(index, parent) for parent, pages in self._children.items() for index in pages]
        assert all(self._pages[index].parent == parent for index, parent in noted), "a note names a page without it"

    def _take(self) -> int:
        index, _ = self._free.popitem(last=False)
        page = self._pages[index]
        if page.key is not None:
            del self._known[page.key]
            page.key = None
        self._forget(index)
        return index

    def _forget(self, index: int) -> None:
        page = self._pages[index]
        if page.parent is not None:
            del self._children[page.parent][index]
            if not self._children[page.parent]:
                del self._children[page.parent]
            page.parent, page.ids = None, ()


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first items are the same."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
