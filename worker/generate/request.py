"""What a job asks for, checked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from lorayard.shared.errors import AdapterError, Refused, UsageError
from lorayard.shared.job import MAX_LOGPROBS, MAX_SAMPLES, SamplingParams

from ..cache.page import chain, root
from ..cache.storage import PAGE
from ..lora.bank import check_set
from ..lora.peft import Lora
from .mask import Mask

SHORT = 16
"""Fewer tokens than these are computed again rather than copied or waited for."""

LoraUse = Lora | tuple[Lora, float]
LoraUses = tuple[tuple[Lora, float], ...]


@dataclass(frozen=True)
class Request:
    """What one sample of a job asks for.

    prompt: the tokens to go on from. healing: the tokens of which the first new one is, standing for the `healed` token
    that the prompt ended with; empty without healing. loras: (adapter, scale), sorted by name. stop_ids: with the
    model's end ids. breakers, ignored: ids that DRY and XTC leave alone. deadline: by time.monotonic().
    """

    prompt: tuple[int, ...]
    max_tokens: int
    min_tokens: int
    sampling: SamplingParams
    seed: int
    sample: int
    loras: LoraUses
    stop_strings: tuple[str, ...]
    stop_ids: frozenset[int]
    slot: int | None
    logprobs: int | None
    prompt_logprobs: int | None
    banned_strings: tuple[str, ...]
    healing: frozenset[int]
    healed: str
    breakers: frozenset[int]
    ignored: frozenset[int]
    deadline: float | None

    @cached_property
    def prompt_tokens(self) -> int:
        """With the token that is healed."""
        return len(self.prompt) + bool(self.healing)

    @cached_property
    def mask(self) -> Mask:
        """What may come whatever has been said."""
        return Mask.of(self.sampling)

    @cached_property
    def early_mask(self) -> Mask:
        """What may come until min_tokens are there: nothing that stops."""
        return self.mask.without(self.stop_ids)

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
        """Keys of the full pages that need not be computed if they are known.

        The last token always is, and with prompt_logprobs all are.
        """
        return self._keys if self.prompt_logprobs is None else []

    @cached_property
    def _keys(self) -> list[bytes]:
        return chain(self.salt, self.prompt[:-1])

    @cached_property
    def tail(self) -> tuple[bytes, tuple[int, ...]]:
        """(what stands for the prompt's full pages, the tokens after them but the last one)."""
        return self.parent(self._keys, len(self._keys)), self.prompt[len(self._keys) * PAGE : -1]

    @cached_property
    def digest(self) -> bytes:
        """Stands for the whole prompt but its last token; empty if its tail can be or need be copied from nowhere."""
        parent, tail = self.tail
        shared = len(tail) >= SHORT and self.prompt_logprobs is None
        return b"".join([parent, *(id.to_bytes(8) for id in tail)]) if shared else b""

    def parent(self, keys: Sequence[bytes], index: int) -> bytes:
        """What the page at `index` comes after."""
        return keys[index - 1] if index else root(self.salt)


@dataclass(frozen=True, slots=True)
class Limits:
    """What requests are held against. vocab_size: the model's, max_rank and slots: the bank's."""

    vocab_size: int
    capacity: int
    max_rank: int
    slots: int

    def check(self, request: Request, samples: int) -> None:
        """Raises Refused or UsageError."""
        if not 1 <= samples <= MAX_SAMPLES:
            raise Refused("bad_field", f"n must be between 1 and {MAX_SAMPLES}, not {samples}")
        if not request.prompt:
            raise Refused("no_prompt", "the prompt has no tokens")
        for field, ids in request.sampling.token_fields().items():
            self.check_ids(field, ids)
        for name, count in (("logprobs", request.logprobs), ("prompt_logprobs", request.prompt_logprobs)):
            if count is not None and not 0 <= count <= MAX_LOGPROBS:
                raise Refused("bad_field", f"{name} must be between 0 and {MAX_LOGPROBS}, not {count}")
        if request.max_tokens < 1 or not 0 <= request.min_tokens <= request.max_tokens:
            raise Refused("bad_field", "max_tokens must be at least 1 and min_tokens between 0 and max_tokens")
        if request.prompt_tokens + request.max_tokens > self.capacity:
            raise Refused(
                "too_large",
                f"the prompt has {request.prompt_tokens} tokens and max_tokens is {request.max_tokens}; together they "
                f"may be at most {self.capacity}",
            )
        if request.slot is not None and not 0 <= request.slot < self.slots:
            raise UsageError(f"there is no slot {request.slot}; the bank has {self.slots}")

    def check_ids(self, field: str, ids: Iterable[int]) -> None:
        """Raises Refused("bad_field") for an id that the model does not have."""
        wrong = next((id for id in ids if type(id) is not int or not 0 <= id < self.vocab_size), None)
        if wrong is not None:
            raise Refused("bad_field", f"{field}: {wrong!r} is not a token id from 0 to {self.vocab_size - 1}")

    def lora_set(self, loras: Sequence[LoraUse]) -> LoraUses:
        """(adapter, scale) sorted by name, all that can be known to be wrong refused."""
        uses = [use if isinstance(use, tuple) else (use, 1.0) for use in loras]
        uses.sort(key=lambda use: use[0].name)
        names = [lora.name for lora, _ in uses]
        if len(set(names)) < len(names):
            raise AdapterError(f"a LoRA set names an adapter twice: {', '.join(names)}")
        if not all(math.isfinite(scale) for _, scale in uses):
            raise Refused("bad_adapter", f"the scales of {', '.join(names)} must be finite numbers")
        check_set(uses)
        rank = sum(lora.max_rank for lora, _ in uses)
        if rank > self.max_rank:
            raise AdapterError(f"the ranks of {', '.join(names)} sum to {rank}; a slot holds {self.max_rank}")
        return tuple((lora, float(scale)) for lora, scale in uses)


def texts(field: str, values: Sequence[str | int]) -> tuple[str, ...]:
    """The strings among the values. Raises Refused("bad_field") unless it is a list of strings with characters."""
    if isinstance(values, str) or "" in values:
        raise Refused("bad_field", f"{field} must be a list of token ids and of strings that are not empty")
    return tuple(value for value in values if isinstance(value, str))
