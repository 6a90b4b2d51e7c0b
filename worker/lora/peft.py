"""A LoRA adapter from a PEFT folder, checked against the model and kept on the host."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorayard.shared.errors import AdapterError, NotSupported, UsageError

from ..linear.tensors import FLOATS, Tensors
from ..models.batch import LoraRows
from ..models.model import Model
from .bank import LoraBank
from .config import AdapterConfig
from .folders import adapter_digest, stamp, weights_file

KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.[A-Za-z0-9_-]+)?\.weight")
"""lora_A.weight as PEFT saves it, or lora_A.NAME.weight as some trainers do."""


@dataclass(frozen=True, slots=True, eq=False)
class Lora:
    """An adapter: for each linear A [r, in] and B [out, r] on the CPU in the model's dtype.

    lora_scaling * alpha / r is already inside B. digest: `folders.adapter_digest`, and another for each lora_scaling
    but 1, because pages and slots are told apart by it.
    """

    name: str
    digest: str
    tensors: dict[str, tuple[Tensor, Tensor]]

    @property
    def ranks(self) -> dict[str, int]:
        """Rank at each linear."""
        return {module: len(a) for module, (a, _) in self.tensors.items()}

    @property
    def max_rank(self) -> int:
        """The largest rank at any linear."""
        return max(self.ranks.values())

    @classmethod
    def from_directory(cls, model: Model, path: str | Path, lora_scaling: float = 1.0) -> Lora:
        """Read a PEFT folder for a loaded model.

        Raises AdapterError for a file that is malformed or made for another base, NotSupported naming what this
        version does not do; both before anything is given to the model.
        """
        path = Path(path).resolve()
        if not model.linears:
            raise UsageError("load the model before its adapters")
        if isinstance(lora_scaling, bool) or not math.isfinite(lora_scaling):
            raise UsageError(f"lora_scaling must be a finite number, not {lora_scaling!r}")
        config, before = AdapterConfig.from_directory(path), stamp(path)
        digest = adapter_digest(path)
        if lora_scaling != 1:
            digest = hashlib.blake2b(f"{digest}*{float(lora_scaling)!r}".encode(), digest_size=16).hexdigest()
        file = weights_file(path)
        halves = _safetensors(file, model, config) if file.suffix == ".safetensors" else _bin(file, model, config)
        tensors = {}
        for module, (a, b) in halves.items():
            b = b.float() * (lora_scaling * config.scaling(module))
            tensors[module] = (a.to(model.dtype), b.to(model.dtype))
            if not all(bool(half.isfinite().all()) for half in tensors[module]):
                raise AdapterError(f"{file}: {module} has values that are not finite in {model.dtype}")
        if stamp(path) != before:
            raise AdapterError(f"{path} changed while it was read; load it again")
        return cls(path.name, digest, tensors)

    def resident(self, model: Model, pairs: Sequence[tuple[Lora, float]], rows: Tensor) -> tuple[LoraBank, LoraRows]:
        """A bank that holds just the set `pairs`, this adapter among them, and its use by the tokens `rows`."""
        pairs = sorted(pairs, key=lambda pair: pair[0].name)
        bank = LoraBank(model, slots=1, max_rank=sum(lora.max_rank for lora, _ in pairs))
        slot = bank.place(tuple(lora for lora, _ in pairs))
        scales = bank.rank_scales(slot, tuple(scale for _, scale in pairs))
        return bank, LoraRows(slot, rows, scales.expand(len(rows), -1))


def _safetensors(file: Path, model: Model, config: AdapterConfig) -> dict[str, tuple[Tensor, Tensor]]:
    tensors = Tensors([file], AdapterError)
    names = _pairs(file, {name: entry.shape for name, entry in tensors.entries.items()}, model, config)
    for name, entry in tensors.entries.items():
        tensors.require(name, entry.shape, FLOATS)
    return {module: (tensors.read(a), tensors.read(b)) for module, (a, b) in names.items()}


def _bin(file: Path, model: Model, config: AdapterConfig) -> dict[str, tuple[Tensor, Tensor]]:
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as reason:
        cause = next(iter(str(reason).splitlines()), type(reason).__name__)
        raise AdapterError(f"{file} is not a plain file of tensors: {cause[:120]}") from None
    if not isinstance(tensors, dict) or not all(map(_is_plain, tensors.values())):
        raise AdapterError(f"{file} must map names to tensors of {', '.join(FLOATS)}")
    names = _pairs(file, {str(name): tuple(tensor.shape) for name, tensor in tensors.items()}, model, config)
    return {module: (tensors[a], tensors[b]) for module, (a, b) in names.items()}


def _is_plain(value: object) -> bool:
    kinds = (torch.float16, torch.bfloat16, torch.float32)
    return isinstance(value, Tensor) and value.layout == torch.strided and value.dtype in kinds


def _pairs(
    file: Path, shapes: dict[str, tuple[int, ...]], model: Model, config: AdapterConfig
) -> dict[str, tuple[str, str]]:
    """The tensor names of A and B for each linear, every name accounted for and every shape checked."""
    found: dict[str, dict[str, str]] = {}
    for name in shapes:
        match = KEY.fullmatch(name)
        module = match[1] if match else name
        if match is None or module.rpartition(".")[2] in ("lm_head", "embed_tokens"):
            raise NotSupported(f"{file}: tensor {name}; this version does lora_A and lora_B of the layers' linears")
        if module not in model.linears:
            raise AdapterError(f"{file}: the model has no linear {module}; the adapter is for another base")
        if found.setdefault(module, {}).setdefault(match[2], name) != name:
            raise NotSupported(f"{file}: {module} has two adapters; this version reads one to a file")
    if not found:
        raise AdapterError(f"{file} holds no LoRA tensors")
    for module, halves in found.items():
        linear, rank = model.linears[module], config.rank(module)
        for half, shape in (("A", (rank, linear.in_features)), ("B", (linear.out_features, rank))):
            if half not in halves:
                raise AdapterError(f"{file}: {module} has no lora_{half}")
            if shapes[halves[half]] != shape:
                raise AdapterError(
                    f"{file}: {halves[half]} has shape {list(shapes[halves[half]])}, expected {list(shape)}; "
                    "the adapter is for another base, or adapter_config.json has another rank"
                )
    return {module: (halves["A"], halves["B"]) for module, halves in found.items()}
