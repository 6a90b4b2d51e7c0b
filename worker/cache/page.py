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
    """One page. users: how many sequences hold it. key: what it holds when full and published, else None."""

    users: int = 0
    key: bytes | None = None


@dataclass(frozen=True, slots=True)
class Reservation:
    """The pages of one sequence in order. reused: how many of them hold its first tokens already."""

    pages: tuple[int, ...]
    reused: int


def chain(salt: bytes, token_ids: Sequence[int]) -> list[bytes]:
    """The key of every full page of a sequence.

    A key is blake2b over the key before it and the page's ids, so it stands for all tokens up to its end; the first
    one starts from `salt`, which must differ wherever the same tokens give other K/V (LoRA sets and their scales).
    """
    key = hashlib.blake2b(salt, digest_size=16).digest()
    keys = []
    for start in range(0, len(token_ids) - PAGE + 1, PAGE):
        ids = array("q", token_ids[start : start + PAGE]).tobytes()
        key = hashlib.blake2b(key + ids, digest_size=16).digest()
        keys.append(key)
    return keys


class PageTable:
    """Hands out pages. Released full pages keep what they hold until, longest unused first, they are needed."""

    def __init__(self, pages: int) -> None:
        self._pages = [Page() for _ in range(pages)]
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(pages))
        self._known: dict[bytes, int] = {}

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

    def release(self, pages: Sequence[int]) -> None:
        """Give a sequence's pages back. Of its full pages the last is reused first, as it needs those before it."""
        for index in reversed(pages):
            page = self._pages[index]
            page.users -= 1
            if not page.users:
                self._free[index] = None
                self._free.move_to_end(index, last=page.key is not None)

    def check_integrity(self) -> None:
        """Assert that every page is either held or free, and that known keys and pages agree."""
        for index, page in enumerate(self._pages):
            assert page.users >= 0, f"page {index} was released too often"
            assert (page.users == 0) == (index in self._free), f"page {index} has {page.users} users"
            assert page.key is None or self._known[page.key] == index, f"page {index} is known under a wrong key"
        assert all(self._pages[index].key == key for key, index in self._known.items()), "a key names a page without it"

    def _take(self) -> int:
        index, _ = self._free.popitem(last=False)
        page = self._pages[index]
        if page.key is not None:
            del self._known[page.key]
            page.key = None
        return index
