"""What DoRA, biases and replaced weights do to the rows of one slot. A row's bits do not depend on the others."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lorayard.kernels.linear import linear

from ..models.adapters import Change


def change_output(change: Change, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """y [T, N] of a linear for its input x [T, K] -> the same, changed. scale: float32 [T, 1], of the offset."""
    if change.weight is not None:
        y = linear(x, change.weight)
    if change.tokens is not None:
        token_ids, rows = change.tokens
        y = y.index_copy(1, token_ids, linear(x, rows))
    return _shift(change, y, scale)


def change_embedded(change: Change, token_ids: Tensor, h: Tensor, scale: Tensor) -> Tensor:
    """h [T, N] of an embedding for token_ids [T] -> the same, changed."""
    if change.weight is not None:
        h = functional.embedding(token_ids, change.weight)
    if change.tokens is not None:
        replaced, rows = change.tokens
        same = token_ids[:, None] == replaced
        h = torch.where(same.any(1, keepdim=True), rows[same.int().argmax(1)], h)
    return _shift(change, h, scale)


def _shift(change: Change, y: Tensor, scale: Tensor) -> Tensor:
    if change.gain is None and change.offset is None:
        return y
    out = y.float() if change.gain is None else y * change.gain
    if change.offset is not None:
        out = out + scale * change.offset
    return out.to(y.dtype)
