"""adapter_model.bin: torch's zip of a pickle and raw numbers, read without ever unpickling.

A pickle is a program for a small stack machine. This one runs the few instructions that a dict of tensors needs and
only ever makes dicts, tuples, numbers, texts and `Place`s.
"""

from __future__ import annotations

import math
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorayard.shared.errors import AdapterError

from ..linear.tensors import Entry

DTYPES = {"HalfStorage": "F16", "BFloat16Storage": "BF16", "FloatStorage": "F32", "DoubleStorage": "F64",
          "LongStorage": "I64", "IntStorage": "I32", "CharStorage": "I8"}  # fmt: skip
TORCH = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
MAX_PICKLE = MAX_DIRECTORY = 1 << 19
MAX_STEPS = 120_000
"""Bytes of the pickle and of the archive's list of files, instructions of the pickle: enough for 3,000 tensors."""
MARK: Any = object()
BROKEN = (OSError, EOFError, ValueError, zipfile.BadZipFile, NotImplementedError, struct.error, RuntimeError)
"""What zipfile raises for archives that are malformed or encrypted, and we for what tensors do not need."""
PUSH = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINFLOAT"}
CONSTANTS: dict[str, Callable[[], Any]] = {
    "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "NONE": lambda: None, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict,
    "EMPTY_LIST": list, "MARK": lambda: MARK,
}  # fmt: skip


class _Name(str):
    """A class or function that the pickle names, as `module name`."""


@dataclass(frozen=True, slots=True)
class _Storage:
    """Numbers of one file of the archive."""

    dtype: str
    key: str
    size: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a storage a tensor's numbers are."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class BinFile:
    """The tensors of an adapter_model.bin by name. Raises AdapterError for all that is not a dict of plain tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            _check_directory(path)
            self._archive = zipfile.ZipFile(path)
            self._found = self._places()
        except BROKEN as reason:
            raise self._error(str(reason)[:120]) from None
        self.entries = {name: Entry(path, place.storage.dtype, place.shape) for name, place in self._found.items()}

    def read(self, name: str) -> Tensor:
        """The tensor, in the CPU's memory."""
        place = self._found[name]
        storage, dtype = place.storage, TORCH[place.storage.dtype]
        try:
            data = self._stored(f"data/{storage.key}", storage.size * dtype.itemsize)
        except BROKEN as reason:
            raise self._error(f"{name}: {str(reason)[:120]}") from None
        numbers = torch.frombuffer(bytearray(data), dtype=dtype)
        return torch.as_strided(numbers, place.shape, place.strides, place.offset).contiguous()

    def _places(self) -> dict[str, Place]:
        self._infos: dict[str, zipfile.ZipInfo] = {}
        for info in self._archive.infolist():
            last = info.filename.partition("/")[2]  # below the archive's one folder
            if self._infos.setdefault(last, info) is not info:
                raise ValueError(f"it has two files {last[:80]}")
        if "byteorder" in self._infos and self._stored("byteorder", 6) != b"little":
            raise ValueError("its numbers are not little-endian")
        found = _run(self._stored("data.pkl"))
        if not isinstance(found, dict):
            raise ValueError("it holds no dict of tensors")
        for name, place in found.items():
            if not isinstance(place, Place) or not _inside(place):
                raise ValueError(f"{name[:80]} is no plain tensor")
        return found

    def _stored(self, last: str, size: int | None = None) -> bytes:
        """The bytes of a file of the archive, which must be uncompressed and, if given, of that size."""
        info = self._infos.get(last)
        if info is None:
            raise ValueError(f"it has no file {last[:80]}")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ValueError(f"{last} is compressed")
        if info.file_size > MAX_PICKLE if size is None else info.file_size != size:
            raise ValueError(f"{last} has {info.file_size} bytes, expected {MAX_PICKLE if size is None else size}")
        return self._archive.read(info)

    def _error(self, what: str) -> AdapterError:
        return AdapterError(
            f"{self.path} is not a plain file of tensors: {' '.join(what.split())}; in a Python that has peft, "
            "PeftModel.from_pretrained(BASE, ADAPTER).save_pretrained(NEW) writes it as safetensors"
        )


def _check_directory(path: Path) -> None:
    """Refuse a list of files that zipfile would make objects of for minutes; it reads the whole list at once.

    An archive ends with the end of its directory (22 bytes), and torch's with zip64's record and locator before it.
    """
    with path.open("rb") as file:
        total = file.seek(0, 2)
        file.seek(max(0, total - 98))
        tail = file.read(98).rjust(98)
    if tail[76:80] != b"PK\5\6":
        raise zipfile.BadZipFile("it is no zip file, or there is something behind its end")
    size = int.from_bytes(tail[88:92], "little")
    if tail[56:60] == b"PK\6\7":
        if tail[:4] != b"PK\6\6" or int.from_bytes(tail[64:72], "little") != total - 98:
            raise zipfile.BadZipFile("its zip64 record is not where it should be")
        size = max(size, int.from_bytes(tail[40:48], "little"))
    if size > MAX_DIRECTORY:
        raise ValueError(f"its list of files has {size} bytes, more than {MAX_DIRECTORY}")


def _inside(place: Place) -> bool:
    """Whether every number of the tensor is in its storage."""
    numbers = (place.offset, *place.shape, *place.strides)
    if any(type(number) is not int or number < 0 for number in numbers) or len(place.shape) != len(place.strides):
        return False
    last = sum((size - 1) * stride for size, stride in zip(place.shape, place.strides, strict=True))
    return math.prod(place.shape) > 0 and place.offset + last < place.storage.size


def _run(program: bytes) -> Any:
    """What a pickle makes. Raises ValueError for an instruction or a name that tensors do not need."""
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    try:
        for opcode, argument, _ in islice(pickletools.genops(program), MAX_STEPS):
            name = opcode.name
            if name == "STOP":
                return stack.pop()
            if name in PUSH:
                stack.append(argument)
            elif name in CONSTANTS:
                stack.append(CONSTANTS[name]())
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name == "GLOBAL":
                stack.append(_Name(argument))
            elif name != "PROTO":
                _combine(name, stack)
    except (IndexError, KeyError, TypeError, AttributeError):
        raise ValueError("its pickle is malformed") from None
    raise ValueError(f"its pickle has no end, or more than {MAX_STEPS:,} instructions")


def _combine(name: str, stack: list[Any]) -> None:
    """Run an instruction that takes values from the stack and puts one back."""
    match name:
        case "TUPLE":
            stack.append(tuple(_to_mark(stack)))
        case "TUPLE1" | "TUPLE2" | "TUPLE3":
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        case "SETITEM":
            value, key = stack.pop(), stack.pop()
            _fill(stack[-1], [key, value])
        case "SETITEMS":
            items = _to_mark(stack)
            _fill(stack[-1], items)
        case "BINPERSID":
            stack.append(_storage(stack.pop()))
        case "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_call(function, arguments))
        case "BUILD":  # a state_dict's _metadata
            stack.pop()
        case _:
            raise ValueError(f"its pickle has the instruction {name}")


def _to_mark(stack: list[Any]) -> list[Any]:
    at = next((i for i in range(len(stack) - 1, -1, -1) if stack[i] is MARK), None)
    if at is None:
        raise IndexError
    items = stack[at + 1 :]
    del stack[at:]
    return items


def _fill(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict) or not all(type(key) is str for key in items[::2]):
        raise ValueError("it holds no dict of tensors")
    target.update(zip(items[::2], items[1::2], strict=True))


def _storage(name: Any) -> _Storage:
    kind, storage, key, _, size = name
    if kind != "storage" or not isinstance(storage, _Name) or type(key) is not str or type(size) is not int:
        raise TypeError(name)
    dtype = DTYPES.get(storage.removeprefix("torch "))
    if dtype is None:
        raise ValueError(f"it has numbers of {storage[:60]}")
    return _Storage(dtype, key, size)


def _call(function: Any, arguments: Any) -> Any:
    if not isinstance(function, _Name):
        raise TypeError(function)
    match function:
        case "torch._utils _rebuild_tensor_v2" if isinstance(arguments[0], _Storage):
            storage, offset, shape, strides = arguments[:4]
            return Place(storage, offset, tuple(shape), tuple(strides))
        case "torch._utils _rebuild_parameter" if isinstance(arguments[0], Place):
            return arguments[0]
        case "collections OrderedDict" if arguments == ():
            return {}
    raise ValueError(f"its pickle calls {function[:60]!r}")
