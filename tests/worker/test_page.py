"""The page table against a plain model of it, and what makes a page's key."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from lorayard.worker.cache.page import PageTable, chain
from lorayard.worker.cache.storage import PAGE


def keys(*names: str) -> list[bytes]:
    return [name.encode() for name in names]


def test_a_key_stands_for_all_tokens_before_it() -> None:
    ids = list(range(3 * PAGE + 5))
    whole = chain(b"a", ids)
    assert len(whole) == 3 and len(set(whole)) == 3
    assert chain(b"a", ids[: 2 * PAGE + 255]) == whole[:2]
    changed = chain(b"a", [7, *ids[1:]])
    assert not set(changed) & set(whole)
    last = chain(b"a", [*ids[:-6], 7])
    assert last[:2] == whole[:2] and last[2] != whole[2]
    assert not set(chain(b"b", ids)) & set(whole)
    assert chain(b"a", ids[: PAGE - 1]) == []


def test_known_pages_are_used_again_and_shared() -> None:
    table = PageTable(4)
    first = table.reserve(3, keys("x", "y"))
    assert first is not None and first.reused == 0
    table.publish(first.pages[0], b"x")
    table.publish(first.pages[1], b"y")
    second = table.reserve(3, keys("x", "y"))
    assert second is not None and second.reused == 2 and second.pages[:2] == first.pages[:2] and table.free == 0
    assert table.reserve(3, keys("x", "y")) is None and table.free == 0
    table.release(first.pages)
    assert table.free == 1
    table.release(second.pages)
    table.check_integrity()
    third = table.reserve(2, keys("x", "other", "y"))
    assert third is not None and third.reused == 1


def test_only_leading_pages_count() -> None:
    table = PageTable(2)
    held = table.reserve(1, [])
    assert held is not None
    table.publish(held.pages[0], b"y")
    other = table.reserve(1, keys("x", "y"))
    assert other is not None and other.reused == 0


def test_the_longest_unused_page_is_forgotten_first_and_the_end_of_a_text_before_its_beginning() -> None:
    table = PageTable(4)
    for pair in (("a0", "a1"), ("b0", "b1")):
        held = table.reserve(2, [])
        assert held is not None
        for page, key in zip(held.pages, keys(*pair), strict=True):
            table.publish(page, key)
        table.release(held.pages)
    taken = table.reserve(1, [])
    assert taken is not None
    kept = table.reserve(2, keys("b0", "b1"))
    assert kept is not None and kept.reused == 2
    table.release(kept.pages)
    again = table.reserve(1, keys("a0", "a1"))
    assert again is not None and again.reused == 1


def test_the_page_that_begins_most_alike_is_found_until_it_is_taken() -> None:
    table = PageTable(3)
    held = table.reserve(3, [])
    assert held is not None
    for page, ids in zip(held.pages, ([1, 2, 3], [1, 2, 4, 5], [7]), strict=True):
        table.note(page, b"p", ids)
    assert table.alike(b"p", [1, 2, 4, 6]) == (held.pages[1], 3)
    assert table.alike(b"p", [7, 8]) == (held.pages[2], 1)
    assert table.alike(b"p", [9])[1] == table.alike(b"q", [1, 2])[1] == 0
    table.note(held.pages[1], b"q", [1, 2])
    assert table.alike(b"p", [1, 2, 4, 6])[1] == 2 and table.alike(b"q", [1, 2, 4]) == (held.pages[1], 2)
    table.release(held.pages)
    table.check_integrity()
    assert table.alike(b"p", [7, 8])[1] == 1, "a released page still holds it"
    taken = table.reserve(3, [])
    assert taken is not None and table.alike(b"p", [7, 8])[1] == table.alike(b"q", [1])[1] == 0
    table.check_integrity()


def test_pages_that_hold_nothing_known_go_first() -> None:
    table = PageTable(2)
    held = table.reserve(2, [])
    assert held is not None
    table.publish(held.pages[0], b"x")
    table.release(held.pages)
    fresh = table.reserve(1, [])
    assert fresh is not None and table.known == 1


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_use_keeps_the_table_whole(data: st.DataObject) -> None:
    """Random reservations, publications and releases: no page has two owners unless both asked for what it holds."""
    table = PageTable(data.draw(st.integers(1, 8)))
    total = table.free
    held: list[tuple[tuple[int, ...], list[bytes]]] = []
    for _ in range(data.draw(st.integers(1, 25))):
        if held and data.draw(st.booleans()):
            table.release(held.pop(data.draw(st.integers(0, len(held) - 1)))[0])
        else:
            text = [key.encode() for key in data.draw(st.lists(st.sampled_from("abc"), max_size=4))]
            wanted = [b"".join(text[: i + 1]) for i in range(len(text))]
            count = len(wanted) + data.draw(st.integers(1, 2))
            before = table.free
            reservation = table.reserve(count, wanted)
            if reservation is None:
                assert table.free == before
                continue
            fresh = set(reservation.pages[reservation.reused :])
            assert not fresh & {page for pages, _ in held for page in pages}
            for page, key in zip(reservation.pages, wanted, strict=False):
                table.publish(page, key)
            ids = data.draw(st.lists(st.sampled_from([1, 2]), min_size=1, max_size=5))
            table.note(reservation.pages[-1], data.draw(st.sampled_from([b"p", b"q"])), ids)
            _, common = table.alike(b"p", ids)
            assert 0 <= common <= len(ids)
            held.append((reservation.pages, wanted))
        table.check_integrity()
        assert table.free == total - len({page for pages, _ in held for page in pages})
