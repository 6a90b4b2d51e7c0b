"""Where the time of a decode step goes, by the profiler of torch."""

from __future__ import annotations

import time
from collections import defaultdict

from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from lorayard.shared.errors import UsageError

from ..generate.generator import Generator, Handle
from .measure import Engine, start, wall
from .workloads import Row

STEPS, NAME = 16, 70


def profile_steps(engine: Engine, row: Row) -> list[dict[str, float | str]]:
    """The kernels of a decode step of the row, the longest first, with calls and microseconds of a step.

    The first line is the whole step, as it takes without the profiler; `share` is a line's part of it. Kernels that
    overlap count each for its own time, so that all together may have more than the step.
    """
    if row.new < 4 * STEPS:
        raise UsageError(f"--profile needs answers of {4 * STEPS} tokens; those of {row.workload} have {row.new}")
    generator = engine.generator(row)
    wall(engine, generator, row, 2)
    start(engine, generator, row, row.new)
    begun: set[Handle] = set()
    while len(begun) < min(row.sequences, engine.max_batch):
        begun |= {event.handle for event in generator.iterate()}
    step = _us(engine, generator)
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as found:
        _us(engine, generator)
    kernels = _kernels(found, step)
    busy = sum(float(line["us"]) for line in kernels)
    return [{"kernel": "a step", "calls": 1, "us": step, "share": 1.0},
            {"kernel": "all kernels", "calls": sum(float(line["calls"]) for line in kernels), "us": busy,
             "share": busy / step}, *kernels]  # fmt: skip


def _us(engine: Engine, generator: Generator) -> float:
    """Microseconds of one of STEPS steps."""
    engine.synchronise()
    begin = time.perf_counter()
    for _ in range(STEPS):
        generator.iterate()
    engine.synchronise()
    return 1e6 * (time.perf_counter() - begin) / STEPS


def _kernels(found: profile, step: float) -> list[dict[str, float | str]]:
    """One line for each name that ran on the GPU."""
    times = defaultdict[str, list[float]](list)
    for event in found.events() or ():
        if event.device_type == DeviceType.CUDA:
            name = event.name.removeprefix("void ").replace("at::native::", "")[:NAME]
            times[name].append(event.time_range.elapsed_us())
    lines: list[dict[str, float | str]] = [
        {"kernel": name, "calls": len(each) / STEPS, "us": sum(each) / STEPS, "share": sum(each) / STEPS / step}
        for name, each in times.items()
    ]
    return sorted(lines, key=lambda line: -float(line["us"]))
