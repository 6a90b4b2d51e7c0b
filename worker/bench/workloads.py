"""The workloads by name, and what others reach on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..cache.storage import PAGE

DECODE, OUT, PREFILL, MS = "decode", "out", "prefill", "ms"
"""What a row is judged by: tokens a second without the prompts, of all answers over all time, of prompts; ms."""


@dataclass(frozen=True, slots=True)
class Row:
    """Requests that are made at once: `sequences` prompts of `prompt` tokens, each answered with `new` ones.

    adapters: request i has adapter i % adapters; 0 is none. shared: first tokens that prompts of one adapter have in
    common. slots: of adapters that are resident at a time. figure: what counts.
    """

    workload: str
    label: str
    figure: str
    sequences: int = 1
    prompt: int = 512
    new: int = 256
    adapters: int = 0
    shared: int = 0
    slots: int = 1

    def smaller(self, share: int) -> Row:
        """A `share`th of sequences, adapters, slots and tokens; at least two of what is not one."""

        def part(count: int) -> int:
            return min(count, max(2, count // share))

        return replace(
            self, sequences=part(self.sequences), prompt=part(self.prompt), adapters=part(self.adapters),
            new=part(self.new), shared=self.shared // share, slots=part(self.slots),
        )  # fmt: skip

    def pages(self, max_batch: int) -> int:
        """Pages of the cache that the requests of a batch take."""
        return min(self.sequences, max_batch) * -(-(self.prompt + self.new) // PAGE)


ROWS = (
    Row("W1", "no LoRA", DECODE),
    Row("W1", "one LoRA", DECODE, adapters=1),
    Row("W2", "no LoRA", DECODE, 64),
    Row("W2", "one LoRA", DECODE, 64, adapters=1),
    Row("W2", "64 LoRAs", DECODE, 64, adapters=64, slots=64),
    Row("W3", "no LoRA", DECODE, 256),
    Row("W3", "64 LoRAs", DECODE, 256, adapters=64, slots=64),
    Row("W4", "32 slots", OUT, 1024, 256, 128, adapters=32, shared=128, slots=32),
    Row("W4", "4 slots", OUT, 1024, 256, 128, adapters=32, shared=128, slots=4),
    Row("W5", "no LoRA", PREFILL, 16, 2048, 1),
    Row("W5", "16 LoRAs", PREFILL, 16, 2048, 1, adapters=16, slots=16),
    READY := Row("W6", "start to ready", MS),
    COLD := Row("W6", "adapter cold load", MS, adapters=1),
    Row("W6", "adapter swap", MS, adapters=1),
)
WORKLOADS = tuple(dict.fromkeys(row.workload for row in ROWS))


@dataclass(frozen=True, slots=True)
class Others:
    """vLLM 0.26 on one H200, and what this project is to reach, in the row's figure; None is not known."""

    vllm: float | None
    first: float | None = None
    goal: float | None = None


OTHERS: Mapping[tuple[str, str], tuple[Others, ...]] = {
    ("llama-8b", "gptq4"): (
        Others(306.8, 525, 690), Others(182.0, 480, 670),
        Others(9713, 9800, 17000), Others(7911, 9300, 16500), Others(1893, 7000, 12000),
        Others(18655, 15000, 22000), Others(6044, 12000, 19000),
        Others(9512, 10000, 14000), Others(7866, 8500, 12000),
        Others(44976, 42000, 49000), Others(23048, 38000, 46000),
        Others(49000, 10000, 3000), Others(90, 20, 8), Others(11.2, 3, 2),
    ),
    ("llama-8b", "bf16"): (
        Others(203.7), Others(128.6), Others(9415), Others(6232), Others(1886), Others(17954), Others(6112),
        Others(None), Others(None), Others(42230), Others(23050), Others(49000), Others(None), Others(None),
    ),
}  # fmt: skip
"""By shape and format, in the order of ROWS."""


def others(row: Row, shape: str | None, format: str | None) -> Others | None:
    """What is known for a row of ROWS on this model."""
    known = OTHERS.get((shape or "", format or ""))
    return known[ROWS.index(row)] if known else None
