"""What an adapter folder holds, checked against its config and the base by the headers alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lorayard.shared.errors import AdapterError, NotSupported

from ..linear.linear import Shape
from ..linear.tensors import FLOATS, Entry, Tensors
from ..models.config import ModelConfig
from ..models.model import linear_shapes
from .config import INPUT, OUTPUT, AdapterConfig
from .folders import weights_file
from .packed import rank_class
from .pickled import BinFile
from .targets import short, targeted

NAME = r"(?:\.[A-Za-z0-9_-]+)?"
SPELLINGS = {
    "A": rf"lora_A{NAME}\.weight|lora_embedding_A{NAME}",
    "B": rf"lora_B{NAME}\.weight|lora_embedding_B{NAME}",
    "B.bias": rf"lora_B{NAME}\.bias",
    "magnitude": rf"lora_magnitude_vector{NAME}(?:\.weight)?",
    "tokens": rf"token_adapter\.trainable_tokens_delta{NAME}",
    "bias": r"(?:base_layer\.)?bias",
    "weight": rf"(?:base_layer\.|modules_to_save{NAME}\.)?weight",
}
"""Part of a module -> how PEFT ends its tensor's name today, did before (with the adapter's name), or trainers do."""
KEY = re.compile(r"(?:base_model\.model\.)?(.+?)\.(?:" + "|".join(f"({tail})" for tail in SPELLINGS.values()) + ")")


class Weights(Protocol):
    """The tensors of a file by name."""

    entries: dict[str, Entry]

    def read(self, name: str) -> Tensor:
        """The tensor, in the CPU's memory."""


@dataclass(frozen=True, slots=True)
class Contents:
    """modules: tensor names by module and part (see SPELLINGS). notes: what a person should know, a sentence each."""

    config: AdapterConfig
    file: Path
    weights: Weights
    shapes: Mapping[str, Shape]
    modules: dict[str, dict[str, str]]
    ranks: dict[str, int]
    notes: list[str]

    @classmethod
    def of(cls, path: Path, base: ModelConfig) -> Contents:
        """Raises AdapterError for a folder that is malformed or made for another base, NotSupported by name."""
        config, file = AdapterConfig.from_directory(path), weights_file(path)
        if base.tied_head:
            config = config.on_tied()
        weights: Weights = Tensors([file], AdapterError) if file.suffix == ".safetensors" else BinFile(file)
        shapes = {shape.name: shape for shape in linear_shapes(base)}
        shapes[INPUT] = Shape(INPUT, base.vocab_size, base.hidden_size)
        modules = _modules(file, weights, shapes)
        with_lora = [module for module, parts in modules.items() if parts.keys() & {"A", "B", "magnitude"}]
        if not with_lora:
            raise AdapterError(f"{file} holds no LoRA tensors")
        contents = cls(config, file, weights, shapes, modules, config.ranks(with_lora), [])
        contents._agree(targeted(config, list(shapes), base.tied_head))
        for module, parts in modules.items():
            contents._check_module(module, parts)
        return contents

    def read(self, module: str, part: str, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """The part of the module, if it is there."""
        name = self.modules[module].get(part)
        return None if name is None else self.weights.read(name).to(dtype)

    def slot_bytes(self, itemsize: int) -> int:
        """Bytes of the adapter alone in a slot, for weights of `itemsize`."""
        return sum(self.module_bytes(itemsize).values())

    def module_bytes(self, itemsize: int) -> dict[str, int]:
        """The same by module; gains and offsets are always float32."""
        rank, found = rank_class(max(self.ranks.values())), {}
        for module, parts in self.modules.items():
            shape = self.shapes[module]
            inputs, outputs = shape.in_features, shape.out_features
            size = rank * (inputs + outputs) * itemsize if "A" in parts else 0
            size += inputs * outputs * itemsize if "weight" in parts and module in self.config.saved else 0
            size += len(self.config.tokens.get(module, ())) * (self.shapes[OUTPUT].in_features * itemsize + 8)
            gain = "magnitude" in parts
            size += 4 * outputs * (gain + bool(parts.keys() & {"bias", "B.bias"} or (gain and shape.bias)))
            found[module] = size
        return found

    def features(self) -> list[str]:
        """What the adapter uses beyond A and B of the layers' linears, in the words of adapter_config.json."""
        parts = {part for found in self.modules.values() for part in found}
        config = self.config
        used = {
            "rank_pattern": bool(config.rank_pattern), "alpha_pattern": bool(config.alpha_pattern),
            "use_rslora": config.use_rslora, "use_dora": config.use_dora, "lora_bias": config.lora_bias,
            f"bias {config.bias}": "bias" in parts, "modules_to_save": bool(config.saved),
            "trainable_token_indices": bool(config.tokens), "embed_tokens": INPUT in self.ranks,
            "lm_head": OUTPUT in self.ranks,
        }  # fmt: skip
        return [name for name, there in used.items() if there]

    def _agree(self, targets: set[str]) -> None:
        """Tensors and config must speak of the same modules."""
        extra, missing = self.ranks.keys() - targets, targets - self.ranks.keys()
        if extra:
            raise AdapterError(f"{self.file} has LoRA for {short(extra)}, which adapter_config.json does not target")
        if missing and not self.config.starts_at_zero:
            raise AdapterError(
                f"{self.file} has no tensors for {short(missing)}, where init_lora_weights makes them random"
            )
        if missing:
            self.notes.append(f"{short(missing)}: targeted, but there are no tensors; no effect there, as in PEFT")
        whole = {module: "weight" for module in self.config.saved} | {module: "tokens" for module in self.config.tokens}
        for module, part in whole.items():
            if part not in self.modules.get(module, {}):
                key = "modules_to_save" if part == "weight" else "trainable_token_indices"
                raise AdapterError(f"{self.file} has no tensor for {module}, which {key} names")

    def _check_module(self, module: str, parts: dict[str, str]) -> None:
        wanted = self._wanted(module)
        for part, needed in wanted.items():
            if needed and part not in parts:
                raise AdapterError(f"{self.file}: {module} has no {_said(part)}")
        for part, name in parts.items():
            if part not in wanted:
                raise AdapterError(f"{self.file}: tensor {name} contradicts adapter_config.json or the base")
        shape, rank = self.shapes[module], self.ranks.get(module, 0)
        inputs, outputs = shape.in_features, shape.out_features
        rows, columns = (inputs, outputs) if module == INPUT else (outputs, inputs)
        expected = {
            "A": (rank, inputs), "B": (outputs, rank), "B.bias": (outputs,), "magnitude": (outputs,),
            "bias": (outputs,), "weight": (rows, columns), "tokens": (len(self.config.tokens.get(module, ())), columns),
        }  # fmt: skip
        for part, name in parts.items():
            entry = self.weights.entries[name]
            if entry.dtype not in FLOATS:
                raise NotSupported(f"{self.file}: {name} is {entry.dtype}; this version reads {', '.join(FLOATS)}")
            if entry.shape != expected[part]:
                raise AdapterError(
                    f"{self.file}: {name} has shape {list(entry.shape)}, expected {list(expected[part])}; "
                    "the adapter is for another base, or adapter_config.json has another rank"
                )
        if any(not 0 <= each < rows for each in self.config.tokens.get(module, ())):
            raise AdapterError(f"{self.config.path}: trainable_token_indices must be between 0 and {rows - 1}")

    def _wanted(self, module: str) -> dict[str, bool]:
        """The parts that the module may have, and whether it must."""
        config, wanted = self.config, dict[str, bool]()
        if module in self.ranks:
            wanted |= {"A": True, "B": True}
            wanted |= {"magnitude": True} if config.use_dora else {}
            wanted |= {"B.bias": True} if config.lora_bias else {}
        if module in config.tokens:
            return {"tokens": True}
        if config.bias == "all" or (config.bias == "lora_only" and module in self.ranks):
            wanted |= {"bias": False} if self.shapes[module].bias else {}
        return wanted | ({"weight": False} if module in (INPUT, OUTPUT) else {})


def _modules(file: Path, weights: Weights, shapes: Mapping[str, Shape]) -> dict[str, dict[str, str]]:
    """Every tensor's name by the module and the part of it that it is."""
    found: dict[str, dict[str, str]] = {}
    for name in weights.entries:
        match = KEY.fullmatch(name)
        part = match and next(part for part, tail in zip(SPELLINGS, match.groups()[1:], strict=True) if tail)
        if match is None or part is None or (part in ("weight", "tokens") and match[1] not in (INPUT, OUTPUT)):
            raise NotSupported(f"{file}: tensor {name[:200]} is none of those that this version knows")
        if match[1] not in shapes:
            raise AdapterError(f"{file}: the model has no linear {match[1][:200]}; the adapter is for another base")
        if found.setdefault(match[1], {}).setdefault(part, name) != name:
            raise NotSupported(f"{file}: {match[1]} has two adapters; this version reads one to a file")
    return found


def _said(part: str) -> str:
    return {"A": "lora_A", "B": "lora_B", "B.bias": "lora_B.bias", "magnitude": "lora_magnitude_vector"}.get(part, part)
