"""Names of devices, and what each may give, as a person writes them. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from lorayard.shared.errors import UsageError

Devices = str | Sequence[str] | Mapping[str, str]
"""`auto`, or devices in order, each with a limit or without: "cuda:0,cuda:1", ["cuda:0=20GiB"], {"cuda:0": "20GiB"}."""
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
NAME = re.compile(r"(cpu|cuda)(?::(\d{1,2}))?")


def named(devices: Devices) -> list[tuple[str, int | None]]:
    """Devices in order with the bytes that each may give, None where nothing is said. Raises UsageError.

    The CPU may be there several times, also as cpu:0, cpu:1 and so on: one memory in several shares.
    """
    if isinstance(devices, str):
        devices = devices.split(",")
    pairs = devices.items() if isinstance(devices, Mapping) else [_pair(text) for text in devices]
    found = [(_name(name), None if limit is None else size(limit)) for name, limit in pairs]
    if not found:
        raise UsageError("devices names no device")
    gpus = [name for name, _ in found if not name.startswith("cpu")]
    if len(set(gpus)) < len(gpus):
        raise UsageError(f"devices names a GPU twice: {', '.join(gpus)}")
    return found


def limited(names: Sequence[str], sizes: str) -> list[str]:
    """Devices with a limit each, from `--gpu-split`: their GiB in order, such as 20,20. Raises UsageError."""
    parts = sizes.split(",")
    for part in parts:
        if not re.fullmatch(r"\d{1,6}(\.\d{1,3})?", part):
            raise UsageError(f"--gpu-split must be GiB of each GPU in order, such as 20,20, not {sizes!r}")
    if len(parts) != len(names):
        raise UsageError(f"--gpu-split has {len(parts)} sizes for {len(names)} devices: {', '.join(names)}")
    return [f"{name}={part}GiB" for name, part in zip(names, parts, strict=True)]


def over(devices: str, sizes: str | None) -> Devices:
    """What `--devices` and `--gpu-split` mean together for one model; without names, the first GPUs."""
    if sizes is None:
        return devices
    count = sizes.count(",") + 1
    return limited([f"cuda:{i}" for i in range(count)] if devices == "auto" else devices.split(","), sizes)


def size(text: str) -> int:
    """Bytes of a size such as 20GiB or 512MB. Raises UsageError."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?) ?([KMG]?i?B?)", str(text), re.IGNORECASE)
    unit = match and match[2].upper()
    if not match or unit not in UNITS:
        raise UsageError(f"a device's limit must be a size such as 20GiB, not {text!r}")
    return int(float(match[1]) * UNITS[unit])


def _pair(text: str) -> tuple[str, str | None]:
    name, equals, limit = text.partition("=")
    return name.strip(), limit if equals else None


def _name(name: str) -> str:
    """The same with an index, which only `cpu` may lack."""
    match = NAME.fullmatch(name)
    if not match:
        raise UsageError(f"device {name!r} must be cpu, cuda or cuda:N")
    if match[1] == "cpu":
        return name
    return f"cuda:{int(match[2] or 0)}"
