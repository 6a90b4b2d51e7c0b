"""What the model is given from the spans of a step, and what its logits come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ..lora.bank import LoraBank
from ..models.batch import Batch, LoraRows
from .event import TokenLogprobs
from .logprobs import token_logprobs
from .sampler import Choice, sample
from .scheduler import Span


def build_batch(spans: Sequence[Span], bank: LoraBank) -> Batch:
    """The spans one after another, with the logits that each wants."""
    sizes = torch.tensor([span.end - span.start for span in spans])
    ends = sizes.cumsum(0)
    starts = (ends - sizes).tolist()
    wanted = [start + at - span.start for span, start in zip(spans, starts, strict=True) for at in span.wanted]
    longest = max(len(span.generation.pages) for span in spans)
    pages = [[*span.generation.pages, *[0] * (longest - len(span.generation.pages))] for span in spans]
    return Batch(
        token_ids=torch.tensor([id for span in spans for id in _known(span)]),
        positions=torch.tensor([position for span in spans for position in range(span.start, span.end)]),
        sequence=torch.arange(len(spans)).repeat_interleave(sizes),
        page_table=torch.tensor(pages),
        logit_rows=torch.tensor(wanted, dtype=torch.int64),
        loras=_lora_rows(spans, starts, bank),
    )


def _known(span: Span) -> list[int]:
    """The span's tokens, 0 in the place of one that only the device knows."""
    return [*span.generation.token_ids[span.start : span.end], *([0] if span.unknown else ())]


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


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a span's logits come to. choice: None if there is no token to choose, or the span is not complete.

    logprobs: of the choice, prompt: of the prompt's tokens after those of the span; both if asked for.
    """

    choice: Choice | None
    logprobs: TokenLogprobs | None
    prompt: list[TokenLogprobs]


def outcomes(logits: Tensor, spans: Sequence[Span], vocab_size: int) -> list[Outcome]:
    """One for each span, from the logits [L, V] of all that they want. The logits are altered."""
    ends = list(accumulate(len(span.wanted) for span in spans))
    prompts = [
        _prompt_logprobs(logits[end - len(span.wanted) : end], span, vocab_size)
        for span, end in zip(spans, ends, strict=True)
    ]
    ready = [(span.generation, end - 1) for span, end in zip(spans, ends, strict=True) if span.complete]
    rows = logits if len(ready) == len(logits) else logits[torch.tensor([row for _, row in ready], dtype=torch.int64)]
    raw = [
        row.clone() if each.request.logprobs is not None else None for (each, _), row in zip(ready, rows, strict=True)
    ]
    choices = sample(rows, [each.draw for each, _ in ready], vocab_size)
    told = iter([
        (choice, _logprobs(row, choice, each.request.logprobs, vocab_size))
        for (each, _), row, choice in zip(ready, raw, choices, strict=True)
    ])  # fmt: skip
    return [
        Outcome(*(next(told) if span.complete else (None, None)), prompt)
        for span, prompt in zip(spans, prompts, strict=True)
    ]


def _logprobs(row: Tensor | None, choice: Choice | None, count: int | None, vocab_size: int) -> TokenLogprobs | None:
    """Of the token that was chosen from logits [V]."""
    if row is None or choice is None or count is None:
        return None
    return token_logprobs(row[None], [choice.token], count, vocab_size)[0]


def _prompt_logprobs(block: Tensor, span: Span, vocab_size: int) -> list[TokenLogprobs]:
    """Of the tokens of the prompt that follow the span's, in order."""
    request = span.generation.request
    following = request.prompt[span.start + 1 : span.end + 1]
    if request.prompt_logprobs is None or not following:
        return []
    return token_logprobs(block[: len(following)], following, request.prompt_logprobs, vocab_size)
