"""From a job to what the engine takes: token ids, adapters, a number of tokens. Never on the engine's thread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorayard.shared.errors import Refused
from lorayard.shared.job import Job

from .adapters import AdapterLibrary

if TYPE_CHECKING:
    from ..lora.peft import Lora
    from ..text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Prepared:
    """A job ready for `Generator.enqueue`, which checks it. `loras` holds (adapter, the job's own scale)."""

    token_ids: list[int]
    loras: tuple[tuple[Lora, float], ...]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Preparer:
    """`capacity` is the most tokens, prompt and new ones together, that one job may have."""

    tokenizer: Tokenizer
    library: AdapterLibrary
    capacity: int

    def __call__(self, job: Job) -> Prepared:
        """Raises Refused, too, for what the engine would refuse after a look at every id of a long prompt."""
        token_ids = self._tokens(job)
        room = self.capacity - len(token_ids)
        if room < (job.max_tokens or 1):
            raise Refused(
                "too_large",
                f"the prompt has {len(token_ids)} tokens and max_tokens is {job.max_tokens or 1}; together they may be "
                f"at most {self.capacity}",
            )
        loras = tuple(
            (self.library.get(name, digest), scale)
            for (name, scale), digest in zip(job.lora.adapters, job.digests, strict=True)
        )
        return Prepared(token_ids, loras, job.max_tokens or min(DEFAULT_MAX_TOKENS, room))

    def _tokens(self, job: Job) -> list[int]:
        if job.tokens is not None:
            return list(job.tokens)
        if job.messages is not None:
            return self.tokenizer.encode_chat(job.messages, most=self.capacity)
        assert job.prompt is not None
        return self.tokenizer.encode_batch([job.prompt], job.add_bos, self.capacity)[0]
