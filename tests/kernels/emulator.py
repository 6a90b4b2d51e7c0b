"""Runs the launches of kernels/*.cu on the CPU: see emulator.h."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from lorayard.kernels.launch import FOLDER, Kernel, Launch

HERE = Path(__file__).parent
COMPILER = "g++"


def available() -> bool:
    """Whether kernels can be compiled here."""
    return shutil.which(COMPILER) is not None


def run(launch: Launch, seed: int = 0) -> None:
    """Run a launch whose tensors are on the CPU; `seed` draws the order of threads, 0 for their own."""
    size = (ctypes.c_uint * 4)(*launch.grid, launch.threads)
    _library(launch.kernel).run(size, launch.pack(), ctypes.c_size_t(launch.shared), ctypes.c_uint(seed))


@cache
def _library(kernel: Kernel) -> Any:
    """Compiled once for these sources; the libraries lie among the temporary files."""
    sources = [FOLDER / f"{kernel.name}.cu", *sorted(FOLDER.glob("*.cuh")), *sorted(HERE.glob("*.h"))]
    facts = "\0".join([str(kernel), *(path.read_text() for path in sources)])
    folder = Path(tempfile.gettempdir()) / "lorayard-emulator"
    path = folder / f"{kernel.name}-{hashlib.sha256(facts.encode()).hexdigest()[:32]}.so"
    if not path.exists():
        folder.mkdir(mode=0o700, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".so") as file:
            _compile(kernel, Path(file.name))
            shutil.copy(file.name, f"{path}.new")
            Path(f"{path}.new").replace(path)
    return ctypes.CDLL(str(path))


def _compile(kernel: Kernel, output: Path) -> None:
    options = ["-x", "c++", "-std=c++20", "-O1", "-w", "-fPIC", "-shared", "-DEMULATED", f"-DKERNEL={kernel.name}"]
    options += [f'-DKERNEL_FILE="{FOLDER / kernel.name}.cu"', f"-I{HERE}", f"-I{FOLDER}"]
    options += [f"-D{name}={value}" for name, value in kernel.macros]
    subprocess.run([COMPILER, *options, str(HERE / "emulator.h"), "-o", str(output)], check=True, timeout=120)
