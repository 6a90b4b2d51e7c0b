"""Builds what the model is given from the spans of a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..lora.bank import LoraBank
from ..models.batch import Batch, LoraRows
from .scheduler import Span


def build_batch(spans: Sequence[Span], bank: LoraBank) -> Batch:
    """The spans one after another; logits are wanted of each complete span's last token."""
    sizes = torch.tensor([span.end - span.start for span in spans])
    ends = sizes.cumsum(0)
    longest = max(len(span.generation.pages) for span in spans)
    pages = [[*span.generation.pages, *[0] * (longest - len(span.generation.pages))] for span in spans]
    return Batch(
        token_ids=torch.tensor([id for span in spans for id in span.generation.token_ids[span.start : span.end]]),
        positions=torch.tensor([position for span in spans for position in range(span.start, span.end)]),
        sequence=torch.arange(len(spans)).repeat_interleave(sizes),
        page_table=torch.tensor(pages),
        logit_rows=ends[torch.tensor([span.complete for span in spans])] - 1,
        loras=_lora_rows(spans, (ends - sizes).tolist(), bank),
    )


def _lora_rows(spans: Sequence[Span], starts: Sequence[int], bank: LoraBank) -> tuple[LoraRows, ...]:
    """One entry for each slot in use, whatever the scales of its rows."""
    used: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for span, start in zip(spans, starts, strict=True):
        slot, size = span.generation.slot, span.end - span.start
        if slot is not None:
            scales = bank.rank_scales(slot, tuple(scale for _, scale in span.generation.request.loras))
            used.setdefault(slot, []).append((torch.arange(start, start + size), scales.expand(size, -1)))
    return tuple(
        LoraRows(slot, torch.cat([rows for rows, _ in parts]), torch.cat([scales for _, scales in parts]))
        for slot, parts in sorted(used.items())
    )
