"""Runs cases of one area, each within a second of CPU time and 200 MB: `python -m tests.fuzz.child AREA SEED FIRST N`.

A case that is refused, or is fine, passes. Any other exception ends the run with its traceback; a crash or a hang ends
the process. AREA.case in the working folder holds the number of the case that was running.
"""

from __future__ import annotations

import importlib
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from lorayard.shared.errors import LorayardError

SECONDS = 1.0
MEMORY = 200 << 20
Case = Callable[[], object]
Area = Callable[[Path], Callable[[random.Random], Case]]
"""Given a folder to write into: what makes a case of a random generator. Only the case itself runs under the limits."""


def limit_memory() -> None:
    """From now on this process gets 200 MB and no more, so what a case takes is that at most."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def run_case(case: Case) -> str | None:
    """What is wrong, or None. A hang is ended by the system's timers, whatever code it is in."""
    signal.setitimer(signal.ITIMER_PROF, 3 * SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 60)
    start = time.process_time()
    try:
        case()
    except LorayardError as error:
        if "\n" in str(error) or len(str(error)) > 1000:
            return f"the refusal is no sentence: {str(error)[:2000]!r}"
    except BaseException:
        return traceback.format_exc()[-6000:]
    finally:
        took = time.process_time() - start
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    return f"it took {took:.1f} seconds" if took > SECONDS else None


def main() -> None:
    area, (seed, first, count) = sys.argv[1], map(int, sys.argv[2:5])
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    make = getattr(importlib.import_module(f"{__package__}.areas"), area)(Path.cwd())
    for number in range(5):  # what is loaded once, whatever the case
        run_case(make(random.Random(f"{area} warm {number}")))
    limit_memory()
    with open(f"{area}.case", "wb", buffering=0) as cases:
        for number in range(first, first + count):
            os.pwrite(cases.fileno(), b"%12d" % number, 0)
            case = make(random.Random(f"{area} {seed} {number}"))
            wrong = run_case(case)
            if wrong:
                sys.exit(f"{wrong}\ncase {number}")


if __name__ == "__main__":
    main()
