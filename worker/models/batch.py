"""What one forward of the model is given."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class LoraRows:
    """The rows of a batch that use one slot.

    slot: index in the LoRA bank. rows: int64 [n], ascending. scales: float32 [n, R], the job's own scale of each
    stacked rank, as LoraBank.rank_scales gives it (the adapter's own alpha / r is already inside B).
    """

    slot: int
    rows: torch.Tensor
    scales: torch.Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Prefill chunks and decode tokens of S sequences, T tokens in all, each sequence's tokens contiguous and in order.

    token_ids, positions: int64 [T]. sequence: int64 [T], the row of `page_table` that a token belongs to.
    page_table: int64 [S, P], physical pages of 256 tokens in order, padded with 0. logit_rows: int64 [L], the tokens
    whose logits are wanted. loras: one entry per slot in use; rows of no entry run the base model.
    Tensors live on the CPU; the model moves them.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    sequence: torch.Tensor
    page_table: torch.Tensor
    logit_rows: torch.Tensor
    loras: tuple[LoraRows, ...] = ()

    def logit_loras(self) -> tuple[LoraRows, ...]:
        """`loras` among the tokens of logit_rows: rows are numbered as the logits are."""
        uses = []
        for use in self.loras:
            place = torch.full((len(self.token_ids),), -1)
            place[use.rows] = torch.arange(len(use.rows))
            found = place[self.logit_rows]
            rows = (found >= 0).nonzero().flatten()
            if len(rows):
                uses.append(LoraRows(use.slot, rows, use.scales[found[rows]]))
        return tuple(uses)
