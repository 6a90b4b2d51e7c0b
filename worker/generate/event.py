"""What a caller holds and hears of a job."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Handle:
    """A job of one generator, whatever number of samples it has."""

    serial: int


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """ln of a token's probability, and (id, ln p) of the likeliest tokens in its place, likeliest first.

    The probabilities are the model's own (softmax of its logits), before anything that sampling does.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Event:
    """News of one sample of a job after a step; `iterate` gives those of a sample in order, and none without news.

    text, token_ids: what is new; nothing that was told is ever taken back. An id that stops the sample is among the
    ids, not in the text. Text that may be the beginning of a stop string, or of a character, comes with a later event
    than its ids; text that may be the beginning of a banned string is held back with its ids. The id that healed the
    prompt's end is not among the ids, what it adds to the prompt's text is in the text.
    logprobs: one for each of token_ids, if asked for.

    A sample has one event with `finished`, its last; the job has ended when each of its samples has had one. Then:
    finish: `stop` (with the string or id in stop_match), `length`, `cancelled` or `error` (with the error).
    full_text: all text of the sample. new_tokens: how many ids were told. prompt_logprobs: of sample 0, one for each
    token of the prompt but the first (and but the last one, if it was healed), if asked for.
    """

    handle: Handle
    text: str
    token_ids: tuple[int, ...] = ()
    sample: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()
    finished: bool = False
    finish: str | None = None
    stop_match: str | int | None = None
    full_text: str | None = None
    prompt_tokens: int = 0
    new_tokens: int = 0
    error: Exception | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
