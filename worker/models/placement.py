"""Which device holds which part of a model, planned before anything is allocated."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

from lorayard.shared.errors import ModelError, UsageError

Devices = str | Sequence[str] | Mapping[str, str]
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
USABLE = 0.9
"""Share of a GPU's free memory that a model and its cache may take when no limit is given."""


def budgets(devices: Devices) -> list[tuple[torch.device, int | None]]:
    """Devices in order with the bytes each may give; None is no limit.

    `devices`: "auto" (every GPU, or the CPU), a device, a list of devices, or limits such as {"cuda:0": "20GiB"}.
    """
    if devices == "auto":
        devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or "cpu"
    if isinstance(devices, str):
        devices = [devices]
    if not devices:
        raise UsageError("devices names no device")
    if isinstance(devices, Mapping):
        return [(_device(name), _bytes(limit)) for name, limit in devices.items()]
    return [(device, _free(device)) for device in map(_device, devices)]


def place(sizes: Sequence[int], limits: Sequence[tuple[torch.device, int | None]]) -> list[torch.device]:
    """A device for each part, in order: a device is filled before the next one is begun. Raises ModelError."""
    placed: list[torch.device] = []
    for device, limit in limits:
        room = sum(sizes) if limit is None else limit
        while len(placed) < len(sizes) and sizes[len(placed)] <= room:
            room -= sizes[len(placed)]
            placed.append(device)
    if len(placed) < len(sizes):
        have = ", ".join(f"{device} {(limit or 0) / 2**30:.2f} GiB" for device, limit in limits)
        raise ModelError(
            f"model and cache need {sum(sizes) / 2**30:.2f} GiB, the devices give {have}; "
            "make the cache smaller or name more devices"
        )
    return placed


def _device(name: str) -> torch.device:
    if name == "cpu":
        return torch.device("cpu")
    match = re.fullmatch(r"cuda(?::(\d{1,3}))?", name)
    if not match:
        raise UsageError(f"device {name!r} must be cpu, cuda or cuda:N")
    index = int(match[1] or 0)
    if index >= torch.cuda.device_count():
        raise UsageError(f"there is no device {name}: torch sees {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", index)


def _bytes(limit: str) -> int:
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?) ?([KMG]?i?B?)", str(limit), re.IGNORECASE)
    unit = match and match[2].upper()
    if not match or unit not in UNITS:
        raise UsageError(f"a device's limit must be a size such as 20GiB, not {limit!r}")
    return int(float(match[1]) * UNITS[unit])


def _free(device: torch.device) -> int | None:
    return int(torch.cuda.mem_get_info(device)[0] * USABLE) if device.type == "cuda" else None
