"""Which tokens may come next: the one place where bias, allowed and banned tokens, and whatever else forbids, act."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorayard.shared.job import SamplingParams


@dataclass(frozen=True, slots=True)
class Mask:
    """allowed: the only ids that may come, None for all. blocked: ids that may not. bias: added to logits."""

    allowed: frozenset[int] | None = None
    blocked: frozenset[int] = frozenset()
    bias: tuple[tuple[int, float], ...] = ()

    @classmethod
    def of(cls, params: SamplingParams) -> Mask:
        """What a request asks for, whatever has been said."""
        allowed = None if params.allowed_tokens is None else frozenset(params.allowed_tokens)
        return cls(allowed, frozenset(params.banned_tokens), params.logit_bias)

    def only(self, ids: Iterable[int]) -> Mask:
        """Narrowed to `ids`."""
        return replace(self, allowed=frozenset(ids) if self.allowed is None else self.allowed.intersection(ids))

    def without(self, ids: Iterable[int]) -> Mask:
        """With `ids` blocked too."""
        return replace(self, blocked=self.blocked.union(ids))

    def apply(self, row: Tensor) -> Tensor:
        """logits + bias; -inf where a token may not come. row: float32 [V]; the same tensor if nothing changes."""
        if self == Mask():
            return row
        row = row.clone()
        if self.bias:
            ids, values = zip(*self.bias, strict=True)
            row.index_add_(0, _tensor(ids, row), torch.tensor(values, dtype=row.dtype, device=row.device))
        if self.allowed is not None:
            kept = _tensor(sorted(self.allowed), row)
            row = torch.full_like(row, -torch.inf).scatter_(0, kept, row[kept])
        if self.blocked:
            row[_tensor(sorted(self.blocked), row)] = -torch.inf
        return row


def _tensor(ids: Iterable[int], row: Tensor) -> Tensor:
    return torch.tensor(list(ids), dtype=torch.int64, device=row.device)
