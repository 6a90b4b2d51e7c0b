"""What a model, its cache and its LoRA slots take, and what to change when that is too much."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from lorayard.kernels.attention import TILE
from lorayard.kernels.paged_attention import MOST, SPLIT

from ..cache.storage import PAGE, TYPES, page_bytes
from .config import ModelConfig
from .placement import Budget, Part, Plan, plan

SMALLER = ("q8", "q6", "q4")
"""Types of cache, the largest first, that are proposed where a larger one does not fit."""
MORE_DEVICES = 64
CHUNK, SEATS = 512, 64
"""Prompt tokens and jobs of a step that the workspace is reckoned for."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What a user asks for beside the model."""

    cache_tokens: int = 0
    cache_dtype: str = "fp16"
    slots: int = 0

    @property
    def pages(self) -> int:
        """Whole pages that hold the tokens."""
        return -(-self.cache_tokens // PAGE)


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes of the embedding, each layer and the head, in this order.

    weights: of each part. formats: of all weights by format. slot: of one LoRA slot at each part. workspace: an
    estimate of what a step's largest temporaries take on each GPU. The cache is in the layers alone.
    """

    weights: tuple[int, ...]
    formats: Mapping[str, int]
    slot: tuple[int, ...]
    kv_heads: int
    head_dim: int
    workspace: int

    def parts(self, wish: Wish) -> list[Part]:
        """Every part with its share of what is wished for."""
        layers, pages = len(self.weights) - 2, wish.pages
        page = page_bytes(TYPES[wish.cache_dtype], self.kv_heads, self.head_dim)
        names = ["embedding", *(f"layer {i}" for i in range(layers)), "head"]
        cache = [0, *([pages * page] * layers), 0]
        slots = [each * wish.slots for each in self.slot]
        return list(map(Part, names, self.weights, cache, slots))

    def plan(self, wish: Wish, budgets: Sequence[Budget]) -> Plan:
        """Where everything goes."""
        return plan(self.parts(wish), budgets, self.workspace)


def workspace(config: ModelConfig, itemsize: int) -> int:
    """An estimate of a step's largest temporaries on a GPU: activations, a dequantised linear, the logits and their
    copies, and what attention takes. That is blocks of keys and values that torch reads as float32, or those of a
    longest text, gathered for its prompt, with what kernels add up for seats that read as many; whichever is more.
    """
    rows, tiles = CHUNK + SEATS, CHUNK // TILE + SEATS
    queries, wide = config.num_heads * config.head_dim, max(config.intermediate_size, config.hidden_size)
    activations = rows * itemsize * (4 * config.hidden_size + 3 * queries + 3 * config.intermediate_size)
    keys = 2 * tiles * config.num_kv_heads * PAGE * config.head_dim * (4 + itemsize)
    scores = 4 * tiles * TILE * config.num_heads * (3 * PAGE + 3 * config.head_dim)
    gathered = 2 * config.max_seq_len * config.num_kv_heads * config.head_dim * itemsize
    partial = min(MOST, 4 * SEATS * config.num_heads * -(-config.max_seq_len // SPLIT) * (config.head_dim + 2))
    dequantised = 4 * itemsize * wide * config.hidden_size
    return activations + max(keys + scores, gathered + partial) + dequantised + 3 * 4 * SEATS * config.vocab_size


def advice(needs: Needs, wish: Wish, budgets: Sequence[Budget]) -> list[str]:
    """What to change, each by itself, so that a wish that does not fit does; never empty."""

    def fits(**changes: object) -> bool:
        return needs.plan(replace(wish, **changes), budgets).fits  # type: ignore[arg-type]

    said = []
    if pages := _most(wish.pages - 1, lambda count: fits(cache_tokens=count * PAGE)):
        said.append(f"--cache-tokens {pages * PAGE}")
    if smaller := next((dtype for dtype in _smaller(needs, wish) if fits(cache_dtype=dtype)), None):
        said.append(f"--cache-dtype {smaller}")
    if slots := _most(wish.slots - 1, lambda count: fits(slots=count)):
        said.append(f"--slots {slots}")
    least = [wish.cache_dtype, *_smaller(needs, wish)][-1]
    if not said:
        pages = _most(wish.pages, lambda count: fits(cache_tokens=count * PAGE, cache_dtype=least, slots=1))
        said += [f"--cache-dtype {least} --slots 1 --cache-tokens {pages * PAGE}"] if pages else []
    for count in range(1, MORE_DEVICES + 1):
        if needs.plan(wish, [*budgets, *[budgets[-1]] * count]).fits:
            said.append(f"{count} more device{'s' * (count > 1)} with as much room as {budgets[-1].device}")
            break
    return said or ["larger devices, or a model that is quantised to fewer bits"]


def _smaller(needs: Needs, wish: Wish) -> Iterator[str]:
    """Types of cache that take less than the one wished for, the largest first."""
    size = TYPES[wish.cache_dtype].bytes(needs.head_dim)
    for name in SMALLER:
        if TYPES[name].takes(needs.head_dim) and TYPES[name].bytes(needs.head_dim) < size:
            yield name


def _most(count: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `count` that fits, 0 if none does."""
    low, high = 0, max(0, count)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
