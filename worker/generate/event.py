"""What a caller holds and hears of a job."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Handle:
    """A job of one generator."""

    serial: int


@dataclass(frozen=True, slots=True)
class Event:
    """News of a job after a step.

    text, token_ids: what is new. An id that stops the job is among the ids, not in the text; text that may be the
    beginning of a stop string, or of a character, comes with a later event. The rest is set when `finished`:
    finish: `stop` (with the string or id in stop_match), `length`, `cancelled` or `error` (with the error).
    full_text: all text of the job.
    """

    handle: Handle
    text: str
    token_ids: tuple[int, ...] = ()
    finished: bool = False
    finish: str | None = None
    stop_match: str | int | None = None
    full_text: str | None = None
    prompt_tokens: int = 0
    new_tokens: int = 0
    error: Exception | None = None
