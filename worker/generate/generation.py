"""One sample of a job in the generator: its tokens, pages and slot, and what its text has come to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lorayard.shared.errors import Refused

from ..text.stream import TextStream
from .banned import BannedStrings, Said
from .event import Event, Handle, TokenLogprobs
from .mask import Mask
from .request import Request
from .sampler import Choice, Draw
from .stop import StopScanner

MAX_REWINDS = 1000
"""How often banned strings may take text back before the job is given up."""


@dataclass(eq=False, slots=True)
class Generation:
    """A sample on its way. token_ids: prompt and drawn ones, `computed` of which have their K/V in the cache.

    published: how many of its pages are known or have been published. prompt_logprobs: so far.
    """

    handle: Handle
    request: Request
    new_stream: Callable[[], TextStream]
    token_ids: list[int] = field(init=False)
    computed: int = 0
    pages: tuple[int, ...] = ()
    published: int = 0
    slot: int | None = None
    seat: int = -1
    """Its place in the batch while it runs."""
    pending: int = 0
    """1 while a token has been drawn on the device and is not known here yet."""
    skips: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    _stream: TextStream = field(init=False)
    _healed: int = field(init=False)
    """Characters still to come that the prompt had already."""
    _scanner: StopScanner = field(init=False)
    _banned: BannedStrings = field(init=False)
    _mu: float = field(init=False)
    _rewinds: int = 0
    _tried: dict[int, frozenset[int]] = field(default_factory=dict)
    """Position -> tokens with which a banned string began there."""
    _texts: list[str] = field(default_factory=list)
    _told: int = 0
    _healing_told: bool = False

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt)
        self._stream, self._healed = self.new_stream(), len(self.request.healed)
        self._scanner = StopScanner(self.request.stop_strings)
        self._banned = BannedStrings(self.request.banned_strings)
        self._mu = 2 * self.request.sampling.mirostat_tau

    @property
    def new_tokens(self) -> int:
        """Tokens drawn so far; -1 before the one that heals the prompt."""
        return len(self.token_ids) - self.request.prompt_tokens

    @property
    def length(self) -> int:
        """Tokens, with one that is not known here yet."""
        return len(self.token_ids) + self.pending

    @property
    def sated(self) -> bool:
        """Whether the token that is pending is the last one there can be."""
        return bool(self.pending) and self.new_tokens + self.pending >= self.request.max_tokens

    @property
    def plain(self) -> bool:
        """Whether nothing needs to be known of a token before the next one is drawn."""
        request = self.request
        return request.logprobs is None and request.prompt_logprobs is None and not request.banned_strings

    @property
    def settled(self) -> int:
        """How many tokens will never be taken back, nor, as the last one before such, be computed again."""
        return len(self.token_ids) - len(self._banned.held) - bool(self.request.banned_strings)

    @property
    def draw(self) -> Draw:
        """What the sampler needs for the next token. Until min_tokens are there, nothing that stops may come."""
        request, position = self.request, self.length
        mask = request.mask
        if self.new_tokens < 0:
            mask = Mask(request.healing)
        elif self.new_tokens + self.pending < request.min_tokens:
            mask = request.early_mask
        if position in self._tried:
            mask = mask.without(self._tried[position])
        return Draw(
            request.sampling, self.token_ids, request.prompt_tokens, request.seed, request.sample, self._rewinds, mask,
            self._mu, request.breakers, request.ignored, self.pending,
        )  # fmt: skip

    def accept(self, choice: Choice, logprobs: TokenLogprobs | None = None) -> Event | None:
        """Take the next token: what is new, if anything may be told. The event is the last one if the job ends."""
        request, token, self.pending = self.request, choice.token, 0
        self.token_ids.append(token)
        stopped = token in request.stop_ids and self.new_tokens > 0
        said = Said(token, "" if stopped else self._push(token), self._mu, logprobs)
        self._mu = choice.mu
        if request.banned_strings and (taken_back := self._banned.push(said)):
            return self._rewind(taken_back)
        ended = stopped or self.new_tokens == request.max_tokens
        news = self._banned.release(all=ended) if request.banned_strings else [said]
        text = self._scan(news)
        if self._scanner.match is not None:
            news += self._banned.release(all=True)
        elif not ended:
            return self._event(text, news)
        else:
            text += self._flush()
        match = self._scanner.match if self._scanner.match is not None else token if stopped else None
        return self.end("length" if match is None else "stop", text, news, match)

    def cancel(self) -> Event:
        """The last event of a job that is no longer wanted."""
        news = self._banned.release(all=True)
        text = self._scan(news)
        return self.end("cancelled", text + self._flush(), news)

    def end(
        self, finish: str, text: str = "", news: Sequence[Said] = (), stop_match: str | int | None = None,
        error: Exception | None = None,
    ) -> Event:  # fmt: skip
        """The last event."""
        ids, logprobs = self._tell(text, news)
        wanted = self.request.prompt_logprobs is not None
        return Event(
            self.handle, text, ids, self.request.sample, logprobs, True, finish, stop_match, "".join(self._texts),
            self.request.prompt_tokens, self._told, error, tuple(self.prompt_logprobs) if wanted else None,
        )  # fmt: skip

    def _event(self, text: str, news: Sequence[Said]) -> Event | None:
        ids, logprobs = self._tell(text, news)
        return Event(self.handle, text, ids, self.request.sample, logprobs) if ids or text else None

    def _tell(self, text: str, news: Sequence[Said]) -> tuple[tuple[int, ...], tuple[TokenLogprobs, ...]]:
        """Note what is told; the token that heals the prompt is not among the new ones."""
        if self.request.healing and news and not self._healing_told:
            news, self._healing_told = news[1:], True
        self._texts.append(text)
        self._told += len(news)
        return tuple(said.token for said in news), tuple(said.logprobs for said in news if said.logprobs is not None)

    def _push(self, token: int) -> str:
        """The text that the token completes, without what the prompt had of it."""
        text = self._stream.push([token])
        new, self._healed = text[self._healed :], max(0, self._healed - len(text))
        return new

    def _scan(self, news: Sequence[Said]) -> str:
        """The text of tokens as far as it belongs to no stop string."""
        return self._scanner.push("".join(said.text for said in news))

    def _flush(self) -> str:
        """All that is held back, up to a stop string."""
        if self._scanner.match is not None:
            return ""
        text = self._scanner.push(self._stream.finish()[self._healed :])
        return text if self._scanner.match is not None else text + self._scanner.finish()

    def _rewind(self, taken_back: Sequence[Said]) -> Event | None:
        """Go on from before these tokens with another one than the first; the text stream is read in anew."""
        if self._rewinds == MAX_REWINDS:
            error = Refused("bad_field", f"banned_strings took text back {MAX_REWINDS} times; nothing else would come")
            return self.end("error", error=error)
        first, position = taken_back[0], len(self.token_ids) - len(taken_back)
        del self.token_ids[position:]
        self.computed = position - 1
        self._mu = first.mu
        self._rewinds += 1
        self._tried = {place: ids for place, ids in self._tried.items() if place <= position}
        self._tried[position] = self._tried.get(position, frozenset()) | {first.token}
        self._stream, self._healed = self.new_stream(), len(self.request.healed)
        for token in self.token_ids[len(self.request.prompt) :]:
            self._push(token)
        return None
