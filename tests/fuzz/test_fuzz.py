"""Bad input of every kind: refused in a sentence within a second and 200 MB, never a crash, never a hang.

LORAYARD_NIGHTLY=1 runs twenty times as many. FUZZ_SEED=N repeats a run; a failure names the command for its one case.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from .areas import model_and_adapter

ROOT = Path(__file__).parent.parent.parent
NIGHTLY = bool(os.environ.get("LORAYARD_NIGHTLY"))
COUNTS = {"wire": 2800, "config": 1480, "templates": 300, "tokenizers": 300, "formats": 1000, "weights": 60,
          "adapters": 60}  # fmt: skip
"""Cases in `make test`; a twentieth of those of a night."""
AT_ONCE = 5000
"""Cases of one child; its memory is limited over all of them."""


def run(area: str, seed: int, first: int, count: int, folder: Path) -> None:
    """Run cases in a child process, and fail with the command that repeats the one at fault."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1",
                                "MALLOC_ARENA_MAX": "1"}  # fmt: skip
    command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz.child", area, str(seed), str(first), str(count)]
    (folder / f"{area}.case").write_text("none, while preparing them,")
    child = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=3600)
    if child.returncode:
        case = (folder / f"{area}.case").read_text().strip()
        ending = f"ended by signal {-child.returncode}" if child.returncode < 0 else ""
        again = f"python -m tests.fuzz.child {area} {seed} {case} 1"
        pytest.fail(f"{child.stderr[-6000:]}\n{ending}\nagain: {again}", pytrace=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the children work, with the valid model and adapter that they share."""
    folder = tmp_path_factory.mktemp("fuzz")
    model_and_adapter(folder)
    return folder


@pytest.mark.timeout(7200 if NIGHTLY else 300)
@pytest.mark.parametrize("area", COUNTS)
def test_bad_input_is_refused(area: str, folder: Path) -> None:
    seed = int(os.environ.get("FUZZ_SEED") or (random.randrange(1 << 32) if NIGHTLY else 1))
    sys.stdout.write(f"FUZZ_SEED={seed}\n")
    count = COUNTS[area] * (20 if NIGHTLY else 1)
    for first in range(0, count, AT_ONCE):
        run(area, seed, first, min(AT_ONCE, count - first), folder)


def test_there_are_enough_cases() -> None:
    assert sum(COUNTS.values()) >= 5000 and 20 * sum(COUNTS.values()) >= 100_000
