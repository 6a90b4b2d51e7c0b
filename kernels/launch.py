"""CUDA kernels: compiled by NVRTC for the GPU at hand, kept on disk, launched on torch's stream.

kernels/NAME.cu holds one function of its name; its macros are its sizes. What launches it asks `usable` first.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import stat
import struct
import tempfile
import warnings
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).parent
OLDEST = (8, 0)
"""Compute capability that every kernel needs at least."""
Argument = Tensor | int | float | None


@dataclass(frozen=True, slots=True)
class Kernel:
    """The function of kernels/`name`.cu for certain sizes; `hopper` if it needs sm_90a."""

    name: str
    macros: tuple[tuple[str, int], ...]
    hopper: bool = False


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel with its grid, threads of a block, arguments and bytes of dynamic shared memory.

    A Tensor goes as its address, None as a null pointer, an int as int32 and a float as float32.
    """

    kernel: Kernel
    grid: tuple[int, int, int]
    threads: int
    arguments: tuple[Argument, ...]
    shared: int = 0

    def pack(self) -> ctypes.Array[ctypes.c_void_p]:
        """Addresses of the arguments, as the driver wants them; the array keeps them alive."""
        kinds = "".join([_KINDS.get(type(each), "P") for each in self.arguments])
        values = [each.data_ptr() if isinstance(each, Tensor) else each or 0 for each in self.arguments]
        layout, offsets = _layout(kinds)
        memory = ctypes.create_string_buffer(layout.pack(*values), layout.size)
        begin = ctypes.addressof(memory)
        packed = (ctypes.c_void_p * len(values))(*[begin + offset for offset in offsets])
        packed.memory = memory  # type: ignore[attr-defined]
        return packed


_KINDS: dict[type, str] = {int: "i", float: "f"}
"""Of arguments that are no addresses, as `struct` names them."""


@cache
def _layout(kinds: str) -> tuple[struct.Struct, list[int]]:
    """How arguments of these kinds lie in memory, and where each begins."""
    ends = [struct.calcsize(kinds[: i + 1]) for i in range(len(kinds))]
    return struct.Struct(kinds), [end - struct.calcsize(kind) for end, kind in zip(ends, kinds, strict=True)]


def require(name: str, tensor: Tensor, dtype: torch.dtype, *shape: int, like: Tensor | None = None) -> None:
    """Raise ValueError unless `tensor` is contiguous, of this dtype and shape, and on the device of `like`."""
    expected = f"{str(dtype).removeprefix('torch.')} {list(shape)}"
    if tensor.dtype != dtype or tensor.shape != shape:
        raise ValueError(f"{name} must be {expected}, but is {tensor.dtype} {list(tensor.shape)}")
    if not tensor.is_contiguous() or tensor.data_ptr() % 16:
        raise ValueError(f"{name} must be contiguous and begin at a multiple of 16 bytes; pass a copy")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, but the other tensors are on {like.device}")


def usable(tensor: Tensor, hopper: bool = False) -> bool:
    """Whether kernels run where `tensor` is; never if LORAYARD_KERNELS is `torch`. `hopper`: those of sm_90a."""
    if not tensor.is_cuda or os.environ.get("LORAYARD_KERNELS") == "torch":
        return False
    capability = _capability(tensor.device.index)
    return (capability[0] == 9 if hopper else capability >= OLDEST) and _has_cupy()


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@cache
def _has_cupy() -> bool:
    found = importlib.util.find_spec("cupy") is not None
    if not found:
        warnings.warn(
            "cupy is not installed, so torch does the kernels' work, slowly: install lorayard[gpu]", stacklevel=2
        )
    return found


def launch(what: Launch) -> None:
    """Run a kernel on the current stream of the device where its first tensor is.

    On Hopper and later it may begin before the kernel in front has ended: it waits for that one itself.
    """
    index = next(each.get_device() for each in what.arguments if isinstance(each, Tensor))
    if torch._C._cuda_getDevice() != index:
        with torch.cuda.device(index):
            launch(what)
        return
    function = _function(what.kernel, index, what.shared)
    stream = torch._C._cuda_getCurrentRawStream(index)
    config = _config(what.grid, what.threads, what.shared, index, stream)
    status = _driver().cuLaunchKernelEx(ctypes.byref(config), function, what.pack(), None)
    if status:
        raise RuntimeError(f"{what.kernel.name} could not be launched on GPU {index}: CUDA driver error {status}")


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int * 16)]


class _Config(ctypes.Structure):
    """CUlaunchConfig: grid and block, bytes of shared memory, stream, attributes."""

    _fields_ = [
        ("size", ctypes.c_uint * 6),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


@lru_cache(1 << 14)
def _config(grid: tuple[int, int, int], threads: int, shared: int, index: int, stream: int) -> _Config:
    """Never changed once made, so that threads may share it."""
    overlap = _Attribute(id=6, value=(ctypes.c_int * 16)(1))  # programmatic stream serialisation
    overlaps = int(_capability(index) >= (9, 0))
    return _Config((ctypes.c_uint * 6)(*grid, threads, 1, 1), shared, stream, ctypes.pointer(overlap), overlaps)


@cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


@cache
def _function(kernel: Kernel, index: int, shared: int) -> ctypes.c_void_p:
    """Load the kernel on a device, which must be the current one."""
    import cupy

    major, minor = _capability(index)
    with cupy.cuda.Device(index):
        module = cupy.RawModule(path=str(_cubin(kernel, f"sm_{major}{minor}{'a' * (major == 9)}")))
        function = module.get_function(kernel.name)
        if shared > 48 << 10:
            function.max_dynamic_shared_size_bytes = shared
        pointer = ctypes.c_void_p(function.kernel.ptr)
    _modules.append((module, function))  # the pointer lives as long as they do
    return pointer


_modules: list[Any] = []


def _cubin(kernel: Kernel, architecture: str) -> Path:
    """The compiled kernel's file, made where it is missing."""
    from cupy.cuda import nvrtc

    sources = [(FOLDER / f"{kernel.name}.cu"), *sorted(FOLDER.glob("*.cuh"))]
    facts = [architecture, str(kernel), str(nvrtc.getVersion()), *(path.read_text() for path in sources)]
    digest = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:32]
    path = _cache_folder() / f"{kernel.name}-{digest}.cubin"
    if not path.exists():
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(compile_kernel(kernel, architecture)[0])
        Path(file.name).replace(path)
    return path


def compile_kernel(kernel: Kernel, architecture: str) -> tuple[bytes, str]:
    """The cubin and the compiler's log, which tells registers and spills. Needs no GPU. RuntimeError with the log."""
    from cupy.cuda import nvrtc

    options = [f"-arch={architecture}", "-std=c++17", f"-I{FOLDER}", "-lineinfo", "--ptxas-options=-v"]
    options += [f"-D{name}={value}" for name, value in kernel.macros]
    source = (FOLDER / f"{kernel.name}.cu").read_text()
    program = nvrtc.createProgram(source, f"{kernel.name}.cu", (), ())
    try:
        nvrtc.compileProgram(program, options)
        return nvrtc.getCUBIN(program), nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program)
        raise RuntimeError(f"{kernel} does not compile for {architecture}: {error}\n{log}") from error
    finally:
        nvrtc.destroyProgram(program)


@cache
def _cache_folder() -> Path:
    """A folder that nobody else can write: the user's cache, or one for this process alone."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "lorayard" / "kernels"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.stat()
        safe = facts.st_uid == os.getuid() and not facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    except OSError:
        safe = False
    if safe and os.access(folder, os.W_OK):
        return folder
    warnings.warn(f"{folder} is no folder that only this user can write, so kernels are compiled anew", stacklevel=2)
    return Path(tempfile.mkdtemp(prefix="lorayard-kernels-"))
