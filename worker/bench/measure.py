"""Runs workloads and takes the time."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

from lorayard.shared.errors import LorayardError
from lorayard.shared.job import SamplingParams

from ..cache.storage import Cache
from ..generate.generator import Generator
from ..lora.peft import Lora
from ..models.model import Model
from ..text.tokenizer import Tokenizer
from .shapes import adapters, write_adapter
from .workloads import Row

GREEDY = SamplingParams(temperature=0)


@dataclass(slots=True)
class Engine:
    """A loaded model with what is needed to make generators for it. loras: made when a row first needs them."""

    model: Model
    cache: Cache
    tokenizer: Tokenizer
    max_batch: int
    chunk: int
    loras: list[Lora] = field(default_factory=list)
    _serial: int = 0

    def generator(self, row: Row) -> Generator:
        """One with an empty cache, for the row."""
        most = min(row.sequences, self.max_batch)
        return Generator(self.model, self.cache, self.tokenizer, most, row.slots, self.chunk, seed=0)

    def sets(self, row: Row) -> list[list[Lora]]:
        """Each request's LoRA set."""
        if len(self.loras) < row.adapters:
            self.loras = adapters(self.model, row.adapters)
        return [[self.loras[i % row.adapters]] if row.adapters else [] for i in range(row.sequences)]

    def prompts(self, row: Row) -> list[list[int]]:
        """Random prompts that no call gave before; those of one adapter begin alike, if the row says so."""
        self._serial += 1
        random = torch.Generator().manual_seed(self._serial)
        size = (row.sequences, row.prompt)
        ids = torch.randint(3, min(self.model.config.vocab_size, self.tokenizer.vocab_size), size, generator=random)
        if row.shared:
            ids[:, : row.shared] = ids[torch.arange(row.sequences) % max(1, row.adapters), : row.shared]
        return ids.tolist()

    def synchronise(self) -> None:
        """Wait for every GPU."""
        for device in {device for device in self.model.layer_devices if device.type == "cuda"}:
            torch.cuda.synchronize(device)


def start(engine: Engine, generator: Generator, row: Row, new: int) -> None:
    """Queue all requests of the row with exactly `new` tokens each."""
    least = new if engine.tokenizer.eos_ids else 0
    for prompt, loras in zip(engine.prompts(row), engine.sets(row), strict=True):
        generator.enqueue(prompt, max_tokens=new, min_tokens=least, sampling=GREEDY, loras=loras)


def wall(engine: Engine, generator: Generator, row: Row, new: int) -> float:
    """Seconds until all requests of the row have their `new` tokens."""
    engine.sets(row)
    engine.synchronise()
    begin = time.perf_counter()
    start(engine, generator, row, new)
    told = 0
    while generator.busy:
        for event in generator.iterate():
            if event.error is not None:
                raise event.error
            told += event.new_tokens if event.finished else 0
    engine.synchronise()
    seconds = time.perf_counter() - begin
    if told != new * row.sequences:
        raise LorayardError(f"{row.workload} {row.label}: {told} new tokens where {new * row.sequences} were asked for")
    return seconds


def measure(engine: Engine, row: Row, repeats: int) -> dict[str, float]:
    """Medians of the repeats, after a warm-up of the same sizes.

    out: new tokens a second over all. prefill: tokens of prompts a second when one new token is asked for. decode: new
    tokens after the first ones a second, the time of the prompts taken out: n (N - 1) / (wall(N) - wall(1)).
    """
    generator = engine.generator(row)
    wall(engine, generator, row, min(row.new, 8))
    walls = [wall(engine, generator, row, row.new) for _ in range(repeats)]
    whole = median(walls)
    firsts = walls if row.new == 1 else [wall(engine, generator, row, 1) for _ in range(repeats)]
    first, n = median(firsts), row.sequences
    found = {
        "wall_s": whole, "spread": (max(walls) - min(walls)) / whole, "out": n * row.new / whole, "first_s": first,
        "prefill": n * row.prompt / first,
    }  # fmt: skip
    if row.new > 1 and whole > first:
        decode = n * (row.new - 1) / (whole - first)
        found |= {"decode": decode, "ms_step": 1e3 * min(n, engine.max_batch) / decode}
    return found


def cold_load(engine: Engine, repeats: int) -> float:
    """Median ms from an adapter's folder, in the page cache, to its slot."""
    bank = engine.generator(Row("W6", "", "", slots=1)).bank
    with tempfile.TemporaryDirectory() as folder:
        path = write_adapter(Path(folder) / "cold", engine.model)
        Lora.from_directory(engine.model, path)
        return _median_ms(engine, repeats, lambda i: bank.place((Lora.from_directory(engine.model, path, 1.5 + i),)))


def swap(engine: Engine, repeats: int) -> float:
    """Median ms to put an adapter that is in the host's memory into a slot where another one is."""
    bank = engine.generator(Row("W6", "", "", slots=1)).bank
    loras: Sequence[Lora] = adapters(engine.model, 2)
    bank.place((loras[1],))
    return _median_ms(engine, repeats + 1, lambda i: bank.place((loras[i % 2],)))


def _median_ms(engine: Engine, repeats: int, run: Callable[[int], object]) -> float:
    """Of calls with 0, 1 and so on, each until the GPU is done."""
    times = []
    for i in range(repeats):
        engine.synchronise()
        begin = time.perf_counter()
        run(i)
        engine.synchronise()
        times.append(1e3 * (time.perf_counter() - begin))
    return median(times)
