"""A LoRA adapter from a PEFT folder, checked against the model and kept on the host."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lorayard.shared.errors import AdapterError, NotSupported, UsageError

from ..linear.tensors import Tensors
from ..models.adapters import Change
from ..models.batch import LoraRows
from ..models.loading import in_order
from ..models.model import Model
from .bank import LoraBank, check_set
from .config import INPUT, OUTPUT
from .contents import Contents
from .folders import known_digest, stamp
from .packed import Packed, by_device

ROWS = 1024
"""Rows of a weight that are dequantised to float32 at once for DoRA's norms."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Lora:
    """An adapter: for each module A [r, in] and B [out, r] on the CPU in the model's dtype, and other changes.

    lora_scaling * alpha / r is already inside B. digest: `folders.adapter_digest`, and another for each lora_scaling
    but 1, because pages and slots are told apart by it. alone: the feature for which it must be the only adapter of a
    set and at scale 1, or "": what it does is not a sum that can be scaled. packed: by device, what the tensors are
    views of, if the model is on GPUs.
    """

    name: str
    digest: str
    tensors: Mapping[str, tuple[Tensor, Tensor]]
    changes: Mapping[str, Change] = field(default_factory=dict)
    alone: str = ""
    packed: Mapping[torch.device, Packed] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of host memory."""
        halves = (half for pair in self.tensors.values() for half in pair)
        adding = [packed.numbers for packed in self.packed.values()] or list(halves)
        return sum(each.nbytes for each in (*adding, *(t for c in self.changes.values() for t in c.tensors())))

    def pack(self, model: Model) -> Lora:
        """The same in pinned memory, where a model on GPUs can copy it from at once."""
        devices = by_device(model, self.tensors)
        if any(device.type != "cuda" for device in devices):
            return self
        packed = {device: Packed.of((self,), modules, True) for device, modules in devices.items()}
        ranks = self.ranks
        tensors = {m: (a[: ranks[m]], b[:, : ranks[m]]) for each in packed.values() for m, (a, b) in each.items()}
        return replace(self, tensors=tensors, packed=packed)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank at each module."""
        return {module: len(a) for module, (a, _) in self.tensors.items()}

    @property
    def max_rank(self) -> int:
        """The largest rank at any module."""
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
        before = stamp(path)
        contents = Contents.of(path, model.config)
        digest = known_digest(path, before)
        if lora_scaling != 1:
            digest = hashlib.blake2b(f"{digest}*{float(lora_scaling)!r}".encode(), digest_size=16).hexdigest()
        tensors, changes, alone = _Reader(contents, model, lora_scaling).read()
        if stamp(path) != before:
            raise AdapterError(f"{path} changed while it was read; load it again")
        for note in contents.notes:
            log.warning("adapter %s: %s", path.name, note)
        return cls(path.name, digest, tensors, changes, alone).pack(model)

    def resident(self, model: Model, pairs: Sequence[tuple[Lora, float]], rows: Tensor) -> tuple[LoraBank, LoraRows]:
        """A bank that holds just the set `pairs`, this adapter among them, and its use by the tokens `rows`."""
        pairs = sorted(pairs, key=lambda pair: pair[0].name)
        check_set(pairs)
        bank = LoraBank(model, slots=1, max_rank=sum(lora.max_rank for lora, _ in pairs))
        slot = bank.place(tuple(lora for lora, _ in pairs))
        scales = bank.rank_scales(slot, tuple(scale for _, scale in pairs))
        return bank, LoraRows(slot, rows, scales.expand(len(rows), -1))


class _Reader:
    """Reads checked contents, module by module."""

    def __init__(self, contents: Contents, model: Model, lora_scaling: float) -> None:
        self.contents, self.config, self.model = contents, contents.config, model
        self.scalings = {m: lora_scaling * each for m, each in self.config.scalings(contents.ranks).items()}
        self.tensors: dict[str, tuple[Tensor, Tensor]] = {}
        self.changes: dict[str, Change] = {}

    def read(self) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Change], str]:
        """A and B, the other changes, and why the adapter must be alone, or ""."""
        modules = list(self.contents.modules)
        tasks = [partial(self._module, module) for module in modules]
        results = in_order(tasks) if isinstance(self.contents.weights, Tensors) else (task() for task in tasks)
        for module, (halves, change) in zip(modules, results, strict=True):
            if halves is not None:
                self.tensors[module] = halves
            if change.tensors():
                self.changes[module] = change
        if self.model.config.tied_head:
            self._tie()
        return self.tensors, self.changes, self._alone()

    def _module(self, module: str) -> tuple[tuple[Tensor, Tensor] | None, Change]:
        part, dtype, scaling = self.contents.read, self.model.dtype, self.scalings.get(module, 1.0)
        weight, tokens = self._weight(module), self._tokens(module)
        b, magnitude = part(module, "B"), part(module, "magnitude")
        a = part(module, "A", dtype if magnitude is None else torch.float32)
        halves = gain = offset = None
        if a is not None and b is not None:
            b = b * scaling
            if magnitude is not None:
                gain = magnitude / self._norms(module, weight, a, b)
                b = b * gain[:, None]
            halves = a.to(dtype), b.to(dtype)
        if (bias := part(module, "B.bias")) is not None:
            offset = bias * scaling
        if (moved := self._moved_bias(module, gain)) is not None:
            offset = moved if offset is None else offset + moved
        change = Change(weight, tokens, gain, offset)
        if not all(bool(each.isfinite().all()) for each in (*(halves or ()), *change.tensors())):
            raise AdapterError(f"{self.contents.file}: {module} has values that are not finite in {dtype}")
        return halves, change

    def _weight(self, module: str) -> Tensor | None:
        """A weight in the place of the base's; None if it is the same, as PEFT saves it beside a LoRA on it."""
        weight = self.contents.read(module, "weight")
        if weight is None:
            return None
        weight = weight.to(self.model.dtype)
        if module not in self.config.saved:
            if torch.equal(weight, self._base(module).to("cpu", weight.dtype)):
                return None
            if self.model.config.tied_head:
                raise NotSupported(
                    f"{self.contents.file} has another weight for {module}, which is both embedding and head of the "
                    "base; this version takes one from modules_to_save only"
                )
        return weight

    def _tokens(self, module: str) -> tuple[Tensor, Tensor] | None:
        rows = self.contents.read(module, "tokens")
        return None if rows is None else (torch.tensor(self.config.tokens[module]), rows.to(self.model.dtype))

    def _moved_bias(self, module: str, gain: Tensor | None) -> Tensor | None:
        """What gain * (W x + b) lacks for W x to be scaled alone and a trained bias, if there is one, in b's place."""
        linear, trained = self.model.linears.get(module), self.contents.read(module, "bias")
        if linear is None or linear.bias is None or (trained is None and gain is None):
            return None
        own = linear.bias.float().cpu()
        return (own if trained is None else trained) - (own if gain is None else gain * own)

    def _base(self, module: str) -> Tensor:
        """The base's weight as the checkpoint has it: [out, in] of a linear, [vocab, hidden] of the embedding."""
        if module == INPUT:
            return self.model.embedding
        linear = self.model.head if module == OUTPUT else self.model.linears[module]
        assert linear is not None
        return linear.dense()

    def _norms(self, module: str, weight: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        """float32 [out]: the L2 norms of the rows of W + B A, DoRA's (Liu 2024), over the dequantised base."""
        base = self._base(module) if weight is None else weight
        base = base.T if module == INPUT else base
        a, b = a.to(base.device), b.to(base.device)
        parts = [
            (base[start : start + ROWS].float() + b[start : start + ROWS] @ a).norm(dim=1)
            for start in range(0, len(base), ROWS)
        ]
        return torch.cat(parts).cpu()

    def _tie(self) -> None:
        """Replaced rows of an embedding are replaced in the head, too, where the two are one."""
        tokens = self.changes.get(INPUT, Change()).tokens
        if tokens is None or OUTPUT in self.changes:
            return
        if OUTPUT in self.tensors:
            raise NotSupported(f"{self.config.path}: trainable_token_indices and LoRA on a head that is the embedding")
        self.changes[OUTPUT] = Change(tokens=tokens)

    def _alone(self) -> str:
        changes = self.changes.values()
        reasons = {
            "use_dora": any(change.gain is not None for change in changes),
            "modules_to_save": any(change.weight is not None for change in changes),
            "trainable_token_indices": any(change.tokens is not None for change in changes),
            f"bias {self.config.bias}": any("bias" in parts for parts in self.contents.modules.values()),
        }
        return next((name for name, there in reasons.items() if there), "")
