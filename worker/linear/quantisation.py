"""What a model folder says of its packed tensors that the tensors do not tell."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorayard.shared.errors import ModelError, NotSupported

from ..files import JsonFile

METHODS = ("gptq", "awq", "exl2")
BESIDE = ("quantize_config.json", "quant_config.json")
"""Files that older tools wrote beside config.json, the second one AutoAWQ's."""


@dataclass(frozen=True, slots=True)
class Quantisation:
    """zero_offset: added to stored zero points, 1 in GPTQ's format v1 and 0 in v2. None: the tensors decide."""

    path: Path
    bits: int | None = None
    group_size: int | None = None
    act_order: bool = False
    zero_offset: int = 1

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
        if section.get("dynamic"):
            raise NotSupported(f"{file.path}: dynamic; this version reads models with one setting for all modules")
        offset = 0 if section.get("checkpoint_format") == "gptq_v2" else 1
        return cls(file.path, zero_offset=offset, **_fields(file, section))


def _fields(file: JsonFile, section: dict[str, Any]) -> dict[str, Any]:
    """The fields that hold for single modules too, under the name that each tool gives them."""
    fields: dict[str, Any] = {}
    for spelling, name in (
        ("bits", "bits"),
        ("w_bit", "bits"),
        ("group_size", "group_size"),
        ("q_group_size", "group_size"),
    ):
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
    method = section.get("quant_method", "gptq")
    if method not in METHODS:
        raise NotSupported(f"{file.path}: quantisation {str(method)[:40]!r}; this version reads {', '.join(METHODS)}")
    expected = {
        "gptq": {"checkpoint_format": ("gptq", "gptq_v2"), "pack_dtype": ("int32",), "is_marlin_format": (False,)},
        "awq": {"version": ("gemm", "GEMM"), "zero_point": (True,)},
        "exl2": {},
    }
    for name, values in expected[method].items():
        if section.get(name, values[0]) not in values:
            raise NotSupported(
                f"{file.path}: {method} with {name} {str(section[name])[:40]!r}; this version reads {values[0]}"
            )
