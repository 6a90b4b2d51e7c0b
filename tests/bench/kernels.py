"""Speed of every kernel at the sizes of an 8B Llama: microseconds in a replayed graph with a cold L2 cache.

    python tests/bench/kernels.py [NAME ...]

A kernel's figure holds all launches of its case: q4_mid's those that arrange the tokens and add the parts too.
`floor` is what reading the bytes at the measured bandwidth or the multiplications would take at least.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from lorayard.kernels.launch import launch
from tests.kernels.case import NAMES, Case, cases_of

COLD = 320 << 20
"""Bytes of inputs before they come again, several times the L2 cache."""
FLOPS = 790e12
"""fp16 products of an H100 or H200 a second, as measured with torch."""


def bandwidth() -> float:
    """Bytes that a kernel of torch reads and writes in a second."""
    source = torch.ones(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (replay([lambda: torch.neg(source, out=target)] * 4) * 1e-6)


def replay(steps: list[Callable[[], object]], repeats: int = 7) -> float:
    """Median microseconds of a step in a graph of all of them."""
    for step in steps[:2]:
        step()
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        for step in steps:
            step()
    times = []
    for _ in range(repeats + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(steps))
    return median(times[2:])


def run(case: Case) -> None:
    """All its launches."""
    for each in case.launches:
        launch(each)


def time(make, least: int = 24) -> tuple[float, Case]:
    """Microseconds of a case whose inputs rotate."""
    cases, taken = [], 0
    for made in count(1):
        cases.append(make())
        taken += cases[-1].bytes
        if taken > COLD or made == 48:
            break
    steps = [partial(run, case) for case in cases]
    return replay(steps * -(-least // len(steps))), cases[0]


def main() -> None:
    """Print a table."""
    speed = bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {speed / 1e12:.2f} TB/s")  # noqa: T201
    print(f"{'kernel':<44}{'us':>9}{'floor':>9}{'part':>7}")  # noqa: T201
    for name in sys.argv[1:] or NAMES:
        for title, make in cases_of(name).real("cuda"):
            taken, case = time(make)
            floor = max(case.bytes / speed, case.operations / FLOPS) * 1e6
            print(f"{name + ': ' + title:<44}{taken:>9.2f}{floor:>9.2f}{floor / taken:>7.0%}", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
