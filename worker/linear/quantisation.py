"""What a model folder says of its packed tensors that the tensors do not tell."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorayard.shared.errors import ModelError, NotSupported

from ..files import JsonFile
from ..pattern import Pattern

LAYOUTS = ("gptq", "gptq_v2")
READ: dict[str, dict[str, tuple[Any, ...]]] = {
    "gptq": {"checkpoint_format": LAYOUTS, "format": LAYOUTS, "pack_dtype": ("int32",), "is_marlin_format": (False,),
             "adapter": ("none",), "rotation": ("none",)},
    "awq": {"version": ("gemm", "GEMM"), "zero_point": (True,)},
    "exl2": {},
}  # fmt: skip
"""The methods, with the fields that would change what the tensors mean and their values that are read."""
BESIDE = ("quantize_config.json", "quant_config.json")
"""Files that older tools wrote beside config.json, the second one AutoAWQ's."""
SPELLINGS = (("bits", "bits"), ("w_bit", "bits"), ("group_size", "group_size"), ("q_group_size", "group_size"))
MAX_STEPS = 1 << 24
"""Work that a pattern of `dynamic` may cost."""


@dataclass(frozen=True, slots=True)
class Quantisation:
    """zero_offset: added to stored zero points, 1 in GPTQ's format v1 and 0 in v2. None: the tensors decide.

    rules: GPTQModel's `dynamic`, each a pattern that a module's name begins with and what holds there; the first
    that fits counts, and None says that the module is not packed. Their other fields say how the weights were found.
    """

    path: Path
    bits: int | None = None
    group_size: int | None = None
    act_order: bool = False
    zero_offset: int = 1
    rules: tuple[tuple[Pattern, dict[str, Any] | None], ...] = ()

    @classmethod
    def of(cls, file: JsonFile) -> Quantisation:
        """From config.json's `quantization_config`, or a file beside it; a model of floats has neither.

        Raises ModelError or NotSupported, naming the file and the field.
        """
        section = file.get("quantization_config", dict, {})
        for name in BESIDE:
            beside = file.path.with_name(name)
            if not section and beside.is_file():
                file = JsonFile(beside, ModelError)
                section = {"quant_method": "awq", **file.data} if "w_bit" in file.data else file.data
        _refuse_other_methods(file, section)
        if section.get("quant_method") == "exl2":
            return cls(file.path)
        rules = file.get("dynamic", dict, {}, section)
        offset = 0 if "gptq_v2" in (section.get("checkpoint_format"), section.get("format")) else 1
        return cls(
            file.path,
            zero_offset=offset,
            rules=tuple(_rule(file, text, fields) for text, fields in rules.items()),
            **_fields(file, section),
        )

    def at(self, name: str) -> Quantisation | None:
        """What holds for the module `name`; None if it should not be packed."""
        for pattern, fields in self.rules:
            if pattern.fullmatch(name):
                return None if fields is None else replace(self, **fields)
        return self


def _fields(file: JsonFile, section: dict[str, Any]) -> dict[str, Any]:
    """The fields that hold for single modules too, under the name that each tool gives them."""
    fields: dict[str, Any] = {}
    for spelling, name in SPELLINGS:
        if section.get(spelling) is not None:
            fields[name] = file.get(spelling, int, within=section)
    if section.get("desc_act") is not None:
        fields["act_order"] = file.get("desc_act", bool, within=section)
    if fields.get("bits", 4) not in (2, 3, 4, 8):
        raise NotSupported(f"{file.path}: bits {str(fields['bits'])[:20]}; this version reads 2, 3, 4 and 8")
    size = fields.get("group_size", -1)
    if size != -1 and not 1 <= size <= 1 << 30:
        raise ModelError(f"{file.path}: group_size must be positive, or -1 for one group, not {str(size)[:20]}")
    return fields


def _refuse_other_methods(file: JsonFile, section: dict[str, Any]) -> None:
    method = str(section.get("quant_method", "gptq"))
    if method not in READ:
        raise NotSupported(f"{file.path}: quantisation {method[:40]!r}; this version reads {', '.join(READ)}")
    for name, values in READ[method].items():
        if section.get(name) is not None and section[name] not in values:
            raise NotSupported(
                f"{file.path}: {method} with {name} {str(section[name])[:40]!r}; this version reads {values[0]!r}"
            )


def _rule(file: JsonFile, text: str, fields: Any) -> tuple[Pattern, dict[str, Any] | None]:
    sign, _, rest = text.partition(":")
    pattern = Pattern(f"(?:{rest if sign in ('+', '-') else text}).*", f"{file.path}: dynamic", MAX_STEPS)
    if sign == "-":
        return pattern, None
    if not isinstance(fields, dict):
        raise ModelError(f"{file.path}: dynamic must give an object for {text[:60]!r}")
    return pattern, _fields(file, fields)
