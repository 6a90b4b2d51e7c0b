"""The figures of a worker that a monitor wants: jobs, tokens and waits, and what NVML says of its GPUs."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lorayard.shared.scripts import Value

log = logging.getLogger(__name__)

WAIT_BOUNDS_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Upper bounds of the buckets of the waits."""
RECENT, RECENT_S = 1024, 60.0
"""Percentiles are of so many waits at most, none older than this."""
EVERY_S = 1.0


class Figures:
    """Counters since the worker began. One thread writes; another may read."""

    def __init__(self) -> None:
        self.tokens = self.prompt_tokens = 0
        self.ended: Counter[str] = Counter()
        """Jobs by outcome: finished, failed, canceled, lost."""
        self._buckets = [0] * (len(WAIT_BOUNDS_S) + 1)
        self._wait_ms = 0
        self._recent: deque[tuple[float, int]] = deque(maxlen=RECENT)
        self._counted = (0, 0, time.monotonic())

    def waited(self, wait_ms: int) -> None:
        """A job was claimed so long after it was accepted."""
        self._buckets[bisect_left(WAIT_BOUNDS_S, wait_ms / 1000)] += 1
        self._wait_ms += wait_ms
        self._recent.append((time.monotonic(), wait_ms))

    def fields(self) -> dict[str, Value]:
        """Fields of yard:gpu:GPU; rates are since the call before."""
        (tokens, prompt_tokens, at), now = self._counted, time.monotonic()
        self._counted = self.tokens, self.prompt_tokens, now
        past = max(now - at, 1e-3)
        waits = sorted(wait for when, wait in list(self._recent) if when > now - RECENT_S)
        return {
            "tokens": self.tokens, "tokens_per_s": round((self.tokens - tokens) / past, 1),
            "prompt_tokens": self.prompt_tokens,
            "prompt_tokens_per_s": round((self.prompt_tokens - prompt_tokens) / past, 1),
            **{f"jobs_{outcome}": self.ended[outcome] for outcome in ("finished", "failed", "canceled", "lost")},
            "wait_bounds_s": json.dumps(WAIT_BOUNDS_S), "wait_buckets": json.dumps(self._buckets),
            "wait_sum_ms": self._wait_ms,
            **{f"wait_p{part}_ms": _percentile(waits, part) for part in (50, 95, 99)},
        }  # fmt: skip


def _percentile(waits: Sequence[int], part: int) -> Value:
    """The smallest wait that `part` per cent do not exceed; "" of none."""
    return waits[max(-(-len(waits) * part // 100) - 1, 0)] if waits else ""


class Sensors(threading.Thread):
    """Reads NVML once a second, in a thread of its own: a driver that hangs must not hold up the heart."""

    def __init__(self, uuids: Sequence[str]) -> None:
        super().__init__(name="sensors", daemon=True)
        self._uuids = uuids
        self.fields: Mapping[str, Value] = {}
        """The last reading, as fields of yard:gpu:GPU; empty before the first and where NVML does not answer."""

    def run(self) -> None:
        """Read until NVML fails, or for ever."""
        try:
            import pynvml

            pynvml.nvmlInit()
            handles = [pynvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in self._uuids]
            while True:
                self.fields = read_nvml(pynvml, handles)
                time.sleep(EVERY_S)
        except ModuleNotFoundError:
            log.info("no figures of the GPU: nvidia-ml-py is not installed: pip install 'lorayard[gpu]'")
        except Exception as error:  # NVML's errors; figures are not worth a worker
            log.warning("NVML answers no more, so the GPU's figures are missing: %s", error)
            self.fields = {}


def read_nvml(nvml: Any, handles: Sequence[Any]) -> dict[str, Value]:
    """A worker's GPUs as one: memory in bytes and power in watts are sums, per cent in use a mean, degrees the most.

    What a GPU does not tell, as power under virtualisation, is left out.
    """
    found: dict[str, Value] = {}
    memory = [nvml.nvmlDeviceGetMemoryInfo(handle) for handle in handles]
    found["vram_used"], found["vram_total"] = sum(one.used for one in memory), sum(one.total for one in memory)
    reads: dict[str, Callable[[Any], float]] = {
        "util_percent": lambda each: nvml.nvmlDeviceGetUtilizationRates(each).gpu,
        "temperature_c": lambda each: nvml.nvmlDeviceGetTemperature(each, nvml.NVML_TEMPERATURE_GPU),
        "power_w": lambda each: nvml.nvmlDeviceGetPowerUsage(each) / 1000,
    }
    for name, read in reads.items():
        try:
            values = [read(handle) for handle in handles]
        except nvml.NVMLError:
            continue
        mean = sum(values) / len(values)
        found[name] = round({"util_percent": mean, "temperature_c": max(values)}.get(name, sum(values)), 1)
    return found


def cuda_uuids(devices: str | tuple[str, ...]) -> list[str]:
    """UUIDs, as NVML writes them, of the GPUs that are named like `cuda:1`, else of all that this process sees."""
    import torch

    named = [
        int(index) for index in re.findall(r"cuda:(\d+)", " ".join([devices] if isinstance(devices, str) else devices))
    ] or range(torch.cuda.device_count())
    return [f"GPU-{torch.cuda.get_device_properties(at).uuid}" for at in named]
