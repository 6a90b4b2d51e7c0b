"""What a heartbeat says of jobs, waits and sensors."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

from lorayard.shared.job import Job
from lorayard.worker.queue.figures import WAIT_BOUNDS_S, Figures, read_nvml

from .conftest import GPU, Bench, FakeEngine


def test_waits_are_counted_in_their_buckets_and_percentiles_are_nearest_ranks() -> None:
    figures = Figures()
    assert figures.fields()["wait_p99_ms"] == ""
    for wait_ms in range(1, 101):
        figures.waited(wait_ms)
    figures.waited(10**9)
    said = figures.fields()
    buckets = json.loads(str(said["wait_buckets"]))
    assert len(buckets) == len(WAIT_BOUNDS_S) + 1 and sum(buckets) == 101
    assert buckets[:3] == [10, 40, 50] and buckets[-1] == 1
    assert (said["wait_p50_ms"], said["wait_p95_ms"], said["wait_p99_ms"]) == (51, 96, 100)
    assert said["wait_sum_ms"] == 5050 + 10**9


class Nvml:
    """Two GPUs, the second of which does not tell its power."""

    NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        pass

    def nvmlDeviceGetMemoryInfo(self, at: int) -> Any:
        return SimpleNamespace(used=10 + at, total=100)

    def nvmlDeviceGetUtilizationRates(self, at: int) -> Any:
        return SimpleNamespace(gpu=(90, 45)[at])

    def nvmlDeviceGetTemperature(self, at: int, _: int) -> int:
        return (50, 70)[at]

    def nvmlDeviceGetPowerUsage(self, at: int) -> int:
        if at:
            raise self.NVMLError
        return 300_000


def test_gpus_of_a_worker_are_told_as_one() -> None:
    both = {"vram_used": 21, "vram_total": 200, "util_percent": 67.5, "temperature_c": 70}
    assert read_nvml(Nvml(), [0, 1]) == both
    assert read_nvml(Nvml(), [0])["power_w"] == 300.0


def test_a_heartbeat_carries_them(bench: Bench) -> None:
    engine = FakeEngine(poison=7)
    engine.gate.set()
    worker = bench.worker(engine)
    worker.sensors = lambda: {"power_w": 3}
    bench.submit(Job("good", tokens=(1, 2, 3)))
    bench.submit(Job("bad", tokens=(1, 7, 3)))
    bench.final("good")
    bench.final("bad")
    worker.heart.beat()
    said = bench.redis.hgetall(bench.keys.gpu(GPU))
    numbers = {name: float(said[name.encode()]) for name in
               ("tokens", "prompt_tokens", "jobs_finished", "jobs_failed", "power_w")}  # fmt: skip
    assert numbers == {"tokens": 5, "prompt_tokens": 6, "jobs_finished": 1, "jobs_failed": 1, "power_w": 3}
    assert said[b"loading"] == b"[]" and sum(json.loads(said[b"wait_buckets"])) == 2
