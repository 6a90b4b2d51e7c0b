"""Quantised tensors refused in one sentence that names file and tensor, by the headers wherever they can tell."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lorayard.shared.errors import LorayardError, ModelError, NotSupported
from lorayard.worker.files import JsonFile
from lorayard.worker.linear import formats
from lorayard.worker.linear.linear import Shape
from lorayard.worker.linear.quantisation import Quantisation
from lorayard.worker.linear.tensors import Tensors

from ..packers import PACKERS

Change = Callable[[dict[str, Tensor]], Any]
N, K = 64, 128
FILE = "w.safetensors"


def put(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    """Change one tensor."""
    return lambda t: t.update({name: change(t[name]).contiguous()})


def fill(name: str, at: int, value: float) -> Change:
    """Change one number."""
    return lambda t: t[name].view(-1)[at].fill_(value)


def drop(name: str) -> Change:
    return lambda t: t.pop(name)


def cut(t: Tensor) -> Tensor:
    return t[:-1]


HEADERS: list[tuple[str, Change, type[LorayardError], str]] = [
    ("gptq-4bit", put("qweight", cut), ModelError, "m.qweight has shape [15, 64], expected [16, 64]"),
    ("gptq-4bit", put("qweight", lambda t: t[:, :-8]), ModelError, "m.qweight has shape [16, 56], expected [16, 64]"),
    ("gptq-4bit", put("qweight", lambda t: t.flatten()), ModelError, "m.qweight has shape [1024]"),
    ("gptq-4bit", put("qweight", lambda t: t[0, 0]), ModelError, "m.qweight has shape []"),
    ("gptq-4bit", put("qweight", lambda t: t.long()), NotSupported, "m.qweight is I64"),
    ("gptq-8bit", put("scales", cut), ModelError, "m.scales has shape [3, 64], expected [4, 64]"),
    ("gptq-8bit", put("scales", lambda t: t.double()), NotSupported, "m.scales is F64"),
    ("gptq-8bit", put("scales", lambda t: t.int()), NotSupported, "m.scales is I32"),
    ("gptq-8bit", drop("scales"), ModelError, "m.scales is missing"),
    ("gptq-3bit", put("qzeros", lambda t: t[:, :-1]), ModelError, "m.qzeros has shape [4, 5], expected [4, 6]"),
    ("gptq-3bit", drop("qzeros"), ModelError, "m.qzeros is missing"),
    ("gptq-actorder", drop("g_idx"), ModelError, "m.g_idx is missing"),
    ("gptq-actorder", put("g_idx", cut), ModelError, "m.g_idx has shape [127], expected [128]"),
    ("gptq-actorder", put("g_idx", lambda t: t.float()), NotSupported, "m.g_idx is F32"),
    ("gptq-2bit", put("qweight", lambda t: torch.cat([t, t])), ModelError, "has numbers of 4 bits, where config.json"),
    ("awq", put("qzeros", cut), ModelError, "m.qzeros has shape [3, 8], expected [4, 8]"),
    ("awq", put("scales", lambda t: t[:, :-1]), ModelError, "m.scales has shape [4, 63], expected [4, 64]"),
    ("awq", put("qweight", lambda t: t.half()), NotSupported, "m.qweight is F16"),
    ("awq", drop("qzeros"), ModelError, "m.qzeros is missing"),
    ("exl2", put("q_weight", lambda t: t[:, :-1]), ModelError, "m.q_weight has shape"),
    ("exl2", put("q_weight", lambda t: t[:4]), ModelError, "m.q_weight has shape [4, 64], expected [8, 64]"),
    ("exl2", put("q_weight", lambda t: t.repeat(9, 1)), ModelError, "expected [32, 64]"),
    ("exl2", put("q_weight", lambda t: t.float()), NotSupported, "m.q_weight is F32"),
    ("exl2", put("q_scale", lambda t: t[:, :-1]), ModelError, "m.q_scale has shape"),
    ("exl2", put("q_scale_max", lambda t: t[None]), ModelError, "m.q_scale_max has shape"),
    ("exl2", put("q_scale_max", lambda t: t.float()), NotSupported, "m.q_scale_max is F32"),
    ("exl2", put("q_groups", cut), ModelError, "m.q_groups has shape"),
    ("exl2", put("q_groups", lambda t: t.int()), NotSupported, "m.q_groups is I32"),
    ("exl2", put("q_invperm", cut), ModelError, "m.q_invperm has shape [127], expected [128]"),
    ("exl2", lambda t: t.update(q_perm=t["q_invperm"][1:].clone()), ModelError, "m.q_perm has shape [127]"),
    ("exl2", drop("q_groups"), ModelError, "m.q_groups is missing"),
    ("exl2", drop("q_scale_max"), ModelError, "m.q_scale_max is missing"),
    ("exl2", drop("q_scale"), ModelError, "m.q_scale is missing"),
    ("exl2", drop("q_invperm"), ModelError, "m.q_invperm is missing"),
    ("fp16", put("weight", lambda t: t.T), ModelError, "m.weight has shape [128, 64], expected [64, 128]"),
    ("fp16", put("weight", lambda t: t.to(torch.float8_e5m2)), NotSupported, "m.weight is F8_E5M2"),
    ("fp16", drop("weight"), ModelError, "m.weight is missing"),
]
VALUES: list[tuple[str, Change, str]] = [
    ("gptq-4bit", fill("g_idx", 5, 4), "m.g_idx names groups outside 0 to 3"),
    ("gptq-4bit", fill("g_idx", 0, -1), "m.g_idx names groups outside 0 to 3"),
    ("gptq-4bit", fill("scales", 9, float("nan")), "m.scales holds numbers that are not finite"),
    ("gptq-4bit", put("scales", lambda t: t.float() * 1e9 + 1e9), ""),
    ("gptq-4bit", put("scales", lambda t: (t.float() + 1e6).bfloat16()), "m.scales holds numbers that are not finite"),
    ("awq", fill("scales", 0, float("inf")), "m.scales holds numbers that are not finite"),
    ("exl2", fill("q_scale_max", 0, float("nan")), "m.q_scale_max holds numbers that are not finite"),
    ("exl2", fill("q_invperm", 3, 128), "m.q_invperm is no permutation of 0 to 127"),
    ("exl2", fill("q_invperm", 3, -1), "m.q_invperm is no permutation"),
    ("exl2", lambda t: t["q_invperm"][:2].fill_(1), "m.q_invperm is no permutation"),
    ("exl2", lambda t: t.update(q_perm=t["q_invperm"].clone()), "m.q_perm is not the inverse of m.q_invperm"),
    ("exl2", lambda t: t.update(q_perm=t["q_invperm"] * 0), "m.q_perm is no permutation"),
    ("exl2", fill("q_groups", 0, 7), "m.q_groups has a group of 7 bits"),
    ("exl2", fill("q_groups", 0, 0), "m.q_groups has a group of 0 bits"),
    ("exl2", fill("q_groups", 1, 1), "m.q_groups"),
    ("exl2", fill("q_groups", 3, 0), "m.q_groups has a group of"),
    ("exl2", fill("q_groups", 3, -1), "m.q_groups has a group of"),
    ("exl2-4bit", fill("q_groups", 0, 2), "m.q_groups does not make 128 rows"),
]


def opened(name: str, change: Change, path: Path) -> tuple[Tensors, Quantisation]:
    """A file of the linear `m` [N, K], changed, and what config.json says of it."""
    rng = np.random.default_rng(1)
    tensors, section, _ = PACKERS[name](rng.normal(size=(N, K)).astype(np.float32), rng)
    change(tensors)
    save_file({f"m.{part}": tensor for part, tensor in tensors.items()}, path / FILE)
    (path / "config.json").write_text(json.dumps({"quantization_config": section}))
    return Tensors([path / FILE], ModelError), Quantisation.of(JsonFile(path / "config.json", ModelError))


@pytest.mark.parametrize(("name", "change", "error", "words"), HEADERS)
def test_what_headers_tell(name: str, change: Change, error: type[LorayardError], words: str, tmp_path: Path) -> None:
    tensors, how = opened(name, change, tmp_path)
    with pytest.raises(error) as raised:
        formats.check(tensors, Shape("m", K, N), how)
    message = str(raised.value)
    assert words in message and "\n" not in message and (FILE in message or "missing" in message), message


@pytest.mark.parametrize(("name", "change", "words"), VALUES)
def test_what_numbers_tell(name: str, change: Change, words: str, tmp_path: Path) -> None:
    tensors, how = opened(name, change, tmp_path)
    formats.check(tensors, Shape("m", K, N), how)
    if not words:  # large, but fp32 holds it
        assert formats.read(tensors, Shape("m", K, N), how, torch.device("cpu"), torch.float32).dense().isfinite().all()
        return
    with pytest.raises(ModelError) as raised:
        formats.read(tensors, Shape("m", K, N), how, torch.device("cpu"), torch.float32)
    assert words in str(raised.value) and FILE in str(raised.value), str(raised.value)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [("gptq-4bit", (60, 64), "60 by 64 numbers of 4 bits"), ("gptq-4bit", (128, 60), "128 by 60 numbers of 4 bits"),
     ("exl2", (100, 64), "100 rows"), ("exl2", (1 << 17, 64), "131072 rows"), ("awq", (12, 64), "12 by 64")],
)  # fmt: skip
def test_sizes_that_a_format_cannot_have(name: str, shape: tuple[int, int], words: str, tmp_path: Path) -> None:
    change = put("qweight", lambda t: t.new_zeros(shape[0], shape[1] // 8)) if name == "awq" else lambda t: None
    tensors, how = opened(name, change, tmp_path)
    with pytest.raises(NotSupported, match=words):
        formats.check(tensors, Shape("m", *shape), how)


A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
RAW: dict[str, tuple[str, int]] = {
    "past the end": (json.dumps({"a": A | {"shape": [4], "data_offsets": [0, 16]}}), 8),
    "a hole": (json.dumps({"a": A | {"data_offsets": [8, 16]}}), 16),
    "shared bytes": (json.dumps({"a": A, "b": A | {"shape": [1], "data_offsets": [4, 8]}}), 8),
    "too few bytes for its shape": (json.dumps({"a": A | {"shape": [3]}}), 8),
    "bytes of no tensor": (json.dumps({"a": A}), 100),
    "an absurd size": (json.dumps({"a": A | {"shape": [1 << 62, 1 << 62]}}), 8),
    "a size below zero": (json.dumps({"a": A | {"shape": [-2]}}), 8),
    "backwards": (json.dumps({"a": A | {"data_offsets": [8, 0]}}), 8),
    "an unknown dtype": (json.dumps({"a": A | {"dtype": "F99"}}), 8),
    "no offsets": (json.dumps({"a": {"dtype": "F32", "shape": [2]}}), 8),
    "a name twice": (f'{{"a": {json.dumps(A)}, "a": {json.dumps(A)}}}', 8),
    "a list": ("[]", 0),
    "no object": ('{"a": 3}', 0),
    "nested": ('{"a":' * 50_000, 0),
    "half a character": ('{"\\ud800": ' + json.dumps(A) + "}", 8),
    "a long header": ('{"__metadata__": {"a": "' + "x" * (5 << 20) + '"}}', 0),
}


@pytest.mark.parametrize("name", RAW)
def test_headers_that_lie(name: str, tmp_path: Path) -> None:
    header, data = RAW[name]
    (tmp_path / FILE).write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(data))
    tracemalloc.start()
    with pytest.raises(ModelError) as raised:
        Tensors([tmp_path / FILE], ModelError)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    message = str(raised.value)
    assert f"{FILE} is not a whole safetensors file" in message and len(message) < 500 and peak < 50 << 20


def test_a_header_longer_than_any_file(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(struct.pack("<Q", (1 << 64) - 1) + b"{}")
    with pytest.raises(ModelError, match="a header of 18446744073709551615 bytes is too long"):
        Tensors([tmp_path / FILE], ModelError)
