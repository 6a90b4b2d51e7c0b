"""The yard for Prometheus: names in base units, labels bounded however many adapters there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from ..snapshot import GpuSeen, Snapshot

MOST_ADAPTERS = 20
"""Lanes, and slots over all GPUs, that have a series: those with the oldest heads, and with the most jobs."""

GAUGES: Mapping[str, tuple[str, Callable[[GpuSeen], float]]] = {
    "jobs_queued": ("Jobs in the queue of a GPU.", lambda gpu: gpu.queued),
    "jobs_running": ("Jobs in flight on a GPU.", lambda gpu: gpu.running),
    "seats": ("Jobs that a GPU runs at once.", lambda gpu: gpu.seats),
    "gpu_up": ("1 if a live worker serves the GPU.", lambda gpu: int(gpu.state == "ready")),
}
FIGURES = {
    "gpu_memory_used_bytes": ("Memory in use on a worker's GPUs.", "vram_used", 1.0),
    "gpu_memory_size_bytes": ("Memory of a worker's GPUs.", "vram_total", 1.0),
    "gpu_utilization_ratio": ("Part of the time in which kernels ran.", "util_percent", 0.01),
    "gpu_temperature_celsius": ("Temperature of a worker's hottest GPU.", "temperature_c", 1.0),
    "gpu_power_watts": ("Power that a worker's GPUs draw.", "power_w", 1.0),
    "engine_still_seconds": ("Time since the engine last began a step.", "still_s", 1.0),
}
"""Name -> (help, name among the figures of a GPU, factor)."""
COUNTERS = {
    "generated_tokens": ("Tokens generated on a GPU.", "tokens"),
    "prompt_tokens": ("Tokens of prompts taken by a GPU.", "prompt_tokens"),
}
OUTCOMES = ("finished", "failed", "canceled", "lost")


def exposition(seen: Snapshot | None) -> bytes:
    """The text that Prometheus scrapes. None: the yard could not be looked at."""
    registry = CollectorRegistry()
    registry.register(_Yard(seen))
    return generate_latest(registry)


class _Yard(Collector):
    def __init__(self, seen: Snapshot | None) -> None:
        self.seen = seen

    def collect(self) -> Iterator[Metric]:
        yield _gauge("redis_up", "1 if the yard's Redis answered the last look.", int(self.seen is not None))
        if self.seen is not None:
            yield from _yard(self.seen)
            yield from _lanes(self.seen)
            yield from _gpus(self.seen.gpus)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"lorayard_{name}", text, value=value)


def _by(name: str, text: str, label: str, rows: Iterable[tuple[str, float]]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"lorayard_{name}", text, labels=[label])
    for key, value in rows:
        family.add_metric([key], value)
    return family


def _yard(seen: Snapshot) -> Iterator[Metric]:
    said = {name: seen.info.get(name, "") for name in ("model", "base_digest", "version", "wire_version")}
    yield InfoMetricFamily("lorayard_model", "The base that the yard serves.", value=said)
    yield _by("jobs", "Jobs of a class that are accepted and not final.", "class", seen.depth.items())
    yield _gauge("intake_entries", "Entries that no dispatcher has accepted yet.", seen.unread)
    yield _gauge("intake_lag_seconds", "Age of the oldest entry not accepted yet.", seen.lag_s)
    yield _gauge("dead_entries", "Refused entries that are kept.", seen.refused)
    yield _gauge("adapters", "Adapters that jobs may name.", seen.adapters)
    if seen.memory >= 0:
        yield _gauge("redis_memory_used_bytes", "Memory that Redis uses.", seen.memory)
        yield _gauge("redis_memory_max_bytes", "Memory that Redis may use, 0 if unbounded.", seen.memory_limit)


def _lanes(seen: Snapshot) -> Iterator[Metric]:
    yield _gauge("lanes", "Lanes in which jobs wait.", seen.lanes_in_all)
    yield _gauge("lane_oldest_seconds", "Age of the oldest job that waits in a lane.",
                 max((lane.age_s for lane in seen.lanes), default=0.0))  # fmt: skip
    rows = [(lane.name, float(lane.jobs)) for lane in seen.lanes[:MOST_ADAPTERS]]
    yield _by("lane_jobs", "Jobs that wait in the lanes with the oldest heads.", "lane", rows)


def _gpus(gpus: Iterable[GpuSeen]) -> Iterator[Metric]:
    gpus = list(gpus)
    live = [gpu for gpu in gpus if gpu.state != "no worker"]
    for name, (text, read) in GAUGES.items():
        yield _by(name, text, "gpu", ((gpu.name, read(gpu)) for gpu in gpus))
    yield _by("heartbeat_age_seconds", "Time since the last heartbeat.", "gpu",
              ((gpu.name, gpu.beat_age_s) for gpu in live))  # fmt: skip
    for name, (text, figure, factor) in FIGURES.items():
        rows = ((gpu.name, gpu.figures[figure] * factor) for gpu in live if figure in gpu.figures)
        yield _by(name, text, "gpu", rows)
    for name, (text, figure) in COUNTERS.items():
        counter = CounterMetricFamily(f"lorayard_{name}", text, labels=["gpu"])
        for gpu in live:
            counter.add_metric([gpu.name], gpu.figures.get(figure, 0.0))
        yield counter
    yield from _work(live)


def _work(live: list[GpuSeen]) -> Iterator[Metric]:
    swaps = CounterMetricFamily("lorayard_adapter_swaps", "Slots that took another set.", labels=["gpu"])
    jobs = CounterMetricFamily("lorayard_worker_jobs", "Jobs that left a worker.", labels=["gpu", "outcome"])
    waits = HistogramMetricFamily("lorayard_queue_wait_seconds", "From accepted to claimed.", labels=["gpu"])
    for gpu in live:
        swaps.add_metric([gpu.name], gpu.swaps)
        for outcome in OUTCOMES:
            jobs.add_metric([gpu.name, outcome], gpu.figures.get(f"jobs_{outcome}", 0.0))
        if gpu.wait_buckets and len(gpu.wait_buckets) == len(gpu.wait_bounds_s) + 1:
            waits.add_metric([gpu.name], _cumulative(gpu), gpu.figures.get("wait_sum_ms", 0.0) / 1000)
    yield from (swaps, jobs, waits)
    slots = GaugeMetricFamily("lorayard_slot_jobs", "Jobs of a slot's set.", labels=["gpu", "adapters", "state"])
    every = [(gpu.name, slot) for gpu in live for slot in gpu.slots]
    for name, slot in sorted(every, key=lambda each: -each[1].jobs)[:MOST_ADAPTERS]:
        slots.add_metric([name, slot.combination, slot.state], slot.jobs)
    yield slots


def _cumulative(gpu: GpuSeen) -> list[tuple[str, float]]:
    total, rows = 0, []
    for bound, count in zip([*map(str, gpu.wait_bounds_s), "+Inf"], gpu.wait_buckets, strict=True):
        total += count
        rows.append((bound, float(total)))
    return rows
