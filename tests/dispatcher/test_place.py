"""The placement policy, scenario by scenario."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from lorayard.dispatcher.place import (
    CHUNK,
    HOLD_MS,
    Action,
    Assign,
    Close,
    Gpu,
    Lane,
    Open,
    Slot,
    YardView,
    homeless,
    place,
)

NOW = 100_000
OLD = NOW - HOLD_MS  # long enough in service, long enough homeless


def gpu(name: str = "g", room: int = 8, seats: int = 4, slots: tuple[Slot, ...] = (), **load: int) -> Gpu:
    return Gpu(name, room, seats, slots, load)


def only(adapters: str, of: Gpu) -> Gpu:
    """The same GPU on a host that holds only these adapters."""
    return replace(of, adapters=adapters.split())


def lane(combination: str, jobs: int = 1, cls: str = "normal", head_ms: int = NOW) -> Lane:
    return Lane(cls, combination, jobs, head_ms)


def moves(
    gpus: list[Gpu], lanes: list[Lane], since: Mapping[str, int] | None = None, owed: Mapping[str, int] | None = None
) -> list[Action]:
    return place(YardView(tuple(gpus), tuple(lanes), since or {}, owed or {}), NOW)


def a(combination: str, most: int, at: str = "g", cls: str = "normal") -> Assign:
    return Assign(cls, combination, at, most)


EMPTY, CLOSING_X = Slot(), Slot("x", closing=True, since_ms=OLD)
X, Y = Slot("x", since_ms=OLD), Slot("y", since_ms=OLD)

SCENARIOS: dict[str, tuple[list[Gpu], list[Lane], dict[str, int], list[Action]]] = {
    "nothing waits": ([gpu(slots=(X,))], [], {}, []),
    "no GPU": ([], [lane("x"), lane("base")], {"x": OLD}, []),
    "an open slot is fed": ([gpu(slots=(X,), x=1)], [lane("x", 3)], {}, [a("x", 3)]),
    "at most the room": ([gpu(slots=(X,), room=2, x=1)], [lane("x", 3)], {}, [a("x", 2)]),
    "a free slot is opened and fed": ([gpu(slots=(EMPTY,))], [lane("x", 2)], {}, [Open("g", 0, "x"), a("x", 2)]),
    "an unused slot before one that another may want back": (
        [gpu(slots=(Y, EMPTY))], [lane("x")], {}, [Open("g", 1, "x"), a("x", 1)]),
    "a drained and unwanted slot is taken at once": (
        [gpu(slots=(Y,))], [lane("x")], {}, [Open("g", 0, "x"), a("x", 1)]),
    "a drained slot that is wanted is not": (
        [gpu(slots=(Y,))], [lane("x"), lane("y")], {}, [a("y", 1)]),
    "the base needs no slot and goes to the idlest GPU": (
        [gpu("g", x=3), gpu("h", x=1)], [lane("base", 2)], {}, [a("base", 2, "h")]),
    "the base without any slot in the yard": ([gpu(slots=())], [lane("base")], {}, [a("base", 1)]),
    "homeless for less than T: nothing is closed": (
        [gpu(slots=(Y,), y=1)], [lane("x")], {"x": OLD + 1}, []),
    "homeless for T: the slot longest in service is closed": (
        [gpu(slots=(Slot("y", since_ms=OLD), Slot("z", since_ms=OLD - 1)), y=1, z=1)], [lane("x")], {"x": OLD},
        [Close("g", 1, "z")]),
    "a slot less than T/2 in service is not closed": (
        [gpu(slots=(Slot("y", since_ms=NOW - HOLD_MS // 2 + 1),), y=1)], [lane("x")], {"x": OLD}, []),
    "a slot that has had no job yet is not closed": (
        [gpu(slots=(Y,), room=0)], [lane("x"), lane("y")], {"x": OLD}, []),
    "one slot closes for one lane": (
        [gpu(slots=(CLOSING_X, Y), x=1, y=1)], [lane("z")], {"z": OLD}, []),
    "at most a quarter of the slots close at once": (
        [gpu(slots=tuple(Slot(f"y{at}", since_ms=OLD) for at in range(8)), **{f"y{at}": 1 for at in range(8)})],
        [lane("p"), lane("q"), lane("r")], {"p": OLD, "q": OLD, "r": OLD}, [Close("g", 0, "y0"), Close("g", 1, "y1")]),
    "a drained closing slot goes to who has been homeless longest": (
        [gpu(slots=(CLOSING_X,))], [lane("y"), lane("z")], {"y": OLD, "z": OLD - 1}, [Open("g", 0, "z"), a("z", 1)]),
    "the closed lane itself comes after who waits for the slot": (
        [gpu(slots=(CLOSING_X,), x=1)], [lane("x", head_ms=0), lane("z")], {"x": NOW, "z": OLD}, []),
    "a closing slot that nobody else wants any more is opened again": (
        [gpu(slots=(CLOSING_X,), x=1)], [lane("x", 2)], {"x": NOW}, [Open("g", 0, "x"), a("x", 2)]),
    "urgent lanes are housed first": (
        [gpu(slots=(EMPTY,))], [lane("x", head_ms=0), lane("y", cls="urgent")], {"x": OLD + 1, "y": NOW},
        [Open("g", 0, "y"), a("y", 1, cls="urgent")]),
    "but not before who has waited for T": (
        [gpu(slots=(EMPTY,))], [lane("x"), lane("y", cls="urgent")], {"x": OLD, "y": NOW},
        [Open("g", 0, "x"), a("x", 1)]),
    "classes are fed by urgency": (
        [gpu(slots=(X,), room=3, x=1)], [lane("x", 2, "batch", 0), lane("x", 2, "urgent"), lane("x", 2)], {},
        [a("x", 2, cls="urgent"), a("x", 1)]),
    "in a class the oldest head is fed first": (
        [gpu(slots=(X, Y), room=1, x=1, y=1)], [lane("x", head_ms=2), lane("y", head_ms=1)], {}, [a("y", 1)]),
    "in chunks, so that one lane does not take all": (
        [gpu(slots=(X, Y), room=CHUNK + 2, x=1, y=1)], [lane("x", 99, head_ms=1), lane("y", 99, head_ms=2)], {},
        [a("x", CHUNK), a("y", 2)]),
    "a home without any job is fed first, whatever its class": (
        [gpu(slots=(X, Y), room=2, x=5)], [lane("x", 9, "urgent", 1), lane("y", 9, "batch", 2)], {},
        [a("y", 1, cls="batch"), a("x", 1, cls="urgent")]),
    "jobs go to the less loaded of two homes": (
        [gpu("g", slots=(X,), x=3), gpu("h", slots=(X,), x=1)], [lane("x", 2)], {}, [a("x", 2, "h")]),
    "a lane whose home is full gets a second one": (
        [gpu("g", 0, slots=(X,), x=8), gpu("h", slots=(EMPTY,))], [lane("x", 3)], {},
        [Open("h", 0, "x"), a("x", 3, "h")]),
    "a homeless one is housed where every seat is taken": (
        [gpu(slots=(Y, EMPTY), y=6)], [lane("x")], {}, [Open("g", 1, "x"), a("x", 1)]),
    "before it queues where no seat is free": (
        [gpu("g", slots=(X,), x=3), gpu("h", slots=(EMPTY,))], [lane("x", 3)], {},
        [Open("h", 0, "x"), a("x", 1, "g"), a("x", 2, "h")]),
    "not while a seat at home is free": (
        [gpu("g", slots=(X,), x=1), gpu("h", slots=(EMPTY,))], [lane("x", 3)], {}, [a("x", 3, "g")]),
    "and it queues when no seat is free elsewhere": (
        [gpu("g", slots=(X,), x=4), gpu("h", slots=(EMPTY, Y), y=4)], [lane("x", 3)], {}, [a("x", 3, "g")]),
    "but takes nobody's": (
        [gpu("g", 0, slots=(X,), x=8), gpu("h", slots=(Y,), y=1)], [lane("x", 3)], {}, []),
    "and not after a homeless one": (
        [gpu("g", 0, slots=(X,), x=8), gpu("h", slots=(EMPTY,))], [lane("x", 3, head_ms=0), lane("z")], {},
        [Open("h", 0, "z"), a("z", 1, "h")]),
    "a combination goes where its adapters are": (
        [only("y", gpu("g", slots=(EMPTY,))), only("x", gpu("h", slots=(EMPTY,))), only("x y", gpu("i", slots=(Y,)))],
        [lane("x+y")], {}, [Open("i", 0, "x+y"), a("x+y", 1, "i")]),
    "and nowhere if no host has all of them": (
        [only("x", gpu("g", slots=(EMPTY,))), only("y", gpu("h", slots=(EMPTY,)))], [lane("x+y")], {"x+y": OLD}, []),
    "the base runs everywhere": ([only("", gpu())], [lane("base")], {}, [a("base", 1)]),
    "a slot is closed only where it helps": (
        [only("y", gpu("g", slots=(Slot("y", since_ms=0),), y=1)), only("x y", gpu("h", slots=(Y,), y=1))],
        [lane("x")], {"x": OLD}, [Close("h", 0, "y")]),
    "a closing slot elsewhere does not count": (
        [only("y", gpu("g", slots=(CLOSING_X,), x=1)), only("z y", gpu("h", slots=(Y,), y=1))], [lane("z")],
        {"z": OLD}, [Close("h", 0, "y")]),
    "an open slot whose host lost the bytes is closed and fed no more": (
        [only("y", gpu("g", slots=(X, Y), x=1, y=1))], [lane("x", 2), lane("y", 2)], {},
        [Close("g", 0, "x"), a("y", 2)]),
    "and taken over when it has drained": (
        [only("y", gpu("g", slots=(X,)))], [lane("x"), lane("y")], {},
        [Close("g", 0, "x"), Open("g", 0, "y"), a("y", 1)]),
    "its jobs move to a host that has them": (
        [only("y", gpu("g", slots=(X,), x=1)), only("x", gpu("h", slots=(EMPTY,)))], [lane("x", 2)], {},
        [Close("g", 0, "x"), Open("h", 0, "x"), a("x", 2, "h")]),
    "it is not taken back before the bytes are": (
        [only("y", gpu("g", slots=(CLOSING_X,), x=1))], [lane("x")], {"x": OLD}, []),
    "nor spread to": (
        [gpu("g", 0, slots=(X,), x=8), only("y", gpu("h", slots=(EMPTY,)))], [lane("x", 3)], {}, []),
}  # fmt: skip


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(name: str) -> None:
    gpus, lanes, since, expected = SCENARIOS[name]
    assert moves(gpus, lanes, since) == expected


def test_a_class_that_is_owed_its_tenth_goes_first() -> None:
    lanes = [lane("x", 9, "urgent", 1), lane("x", 9, "batch", 2)]
    full = [gpu(slots=(X,), room=3, x=4)]
    assert moves(full, lanes, owed={"batch": 1}) == [a("x", 1, cls="batch"), a("x", 2, cls="urgent")]


def test_homeless_is_who_has_no_open_slot() -> None:
    view = YardView((gpu(slots=(CLOSING_X, Y)),), (lane("x"), lane("y"), lane("z"), lane("base")))
    assert homeless(view) == {"x", "z"}


def test_no_policy_move_depends_on_the_order_of_lanes() -> None:
    lanes = [lane("x", 3, head_ms=1), lane("y", 3, head_ms=2), lane("z", 3, "urgent", 3), lane("base", 2, head_ms=4)]
    gpus = [gpu("g", slots=(X, EMPTY), x=1), gpu("h", slots=(EMPTY,))]
    assert len({tuple(moves(gpus, order)) for order in (lanes, lanes[::-1], lanes[2:] + lanes[:2])}) == 1
