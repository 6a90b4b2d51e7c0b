"""One job in the generator: its tokens, pages and slot, and what its text has come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from lorayard.shared.job import SamplingParams

from ..cache.page import chain
from ..text.stream import TextStream
from .event import Event, Handle
from .mask import Mask
from .sampler import Draw
from .stop import StopScanner

if TYPE_CHECKING:
    from ..lora.peft import Lora


@dataclass(frozen=True)
class Request:
    """What a job asks for, checked. loras: (adapter, scale), sorted by name. stop_ids: with the model's end ids."""

    prompt: tuple[int, ...]
    max_tokens: int
    min_tokens: int
    sampling: SamplingParams
    seed: int
    sample: int
    loras: tuple[tuple[Lora, float], ...]
    stop_strings: tuple[str, ...]
    stop_ids: frozenset[int]
    slot: int | None

    @cached_property
    def adapters(self) -> tuple[Lora, ...]:
        """The combination that a slot must hold; empty for the base."""
        return tuple(lora for lora, _ in self.loras)

    @cached_property
    def salt(self) -> bytes:
        """Where the keys of this job's pages start: K/V depends on the adapters' bytes and on the exact scales."""
        return "".join(f"{lora.digest}*{scale!r}+" for lora, scale in self.loras).encode()

    @cached_property
    def prefix_keys(self) -> list[bytes]:
        """Keys of the full pages that need not be computed if they are known; the last token always is."""
        return chain(self.salt, self.prompt[:-1])


@dataclass(eq=False, slots=True)
class Generation:
    """A job on its way. computed: how many of token_ids have their K/V in the cache."""

    handle: Handle
    request: Request
    stream: TextStream
    token_ids: list[int]
    scanner: StopScanner
    computed: int = 0
    pages: tuple[int, ...] = ()
    slot: int | None = None
    skips: int = 0
    texts: list[str] = field(default_factory=list)

    @property
    def new_tokens(self) -> int:
        """Tokens drawn so far."""
        return len(self.token_ids) - len(self.request.prompt)

    @property
    def draw(self) -> Draw:
        """What the sampler needs for the next token. Until min_tokens are there, nothing that stops may come."""
        request = self.request
        mask = Mask.of(request.sampling)
        mask = mask.without(request.stop_ids) if self.new_tokens < request.min_tokens else mask
        return Draw(request.sampling, self.token_ids, len(request.prompt), request.seed, request.sample, 0, mask)

    def accept(self, token: int) -> Event:
        """Take the next token; the event is the last one if the job ends with it."""
        self.token_ids.append(token)
        stopped = token in self.request.stop_ids
        text = "" if stopped else self.scanner.push(self.stream.push([token]))
        ended = stopped or self.scanner.match is not None or self.new_tokens == self.request.max_tokens
        if not ended:
            self.texts.append(text)
            return Event(self.handle, text, (token,))
        text += self._flush()
        match = self.scanner.match if self.scanner.match is not None else token if stopped else None
        return self.end("length" if match is None else "stop", text, (token,), match)

    def cancel(self) -> Event:
        """The last event of a job that is no longer wanted."""
        return self.end("cancelled", self._flush())

    def end(
        self, finish: str, text: str = "", token_ids: Sequence[int] = (), stop_match: str | int | None = None,
        error: Exception | None = None,
    ) -> Event:  # fmt: skip
        """The last event."""
        self.texts.append(text)
        full, prompt = "".join(self.texts), len(self.request.prompt)
        return Event(
            self.handle, text, tuple(token_ids), True, finish, stop_match, full, prompt, self.new_tokens, error
        )

    def _flush(self) -> str:
        """All that is held back, up to a stop string."""
        if self.scanner.match is not None:
            return ""
        text = self.scanner.push(self.stream.finish())
        return text if self.scanner.match is not None else text + self.scanner.finish()
