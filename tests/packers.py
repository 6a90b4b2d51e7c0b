"""Random weights packed into every format, with the exact weights that the packed ones mean: NumPy's own statement of
each format, which shares nothing with the engine."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Packed = tuple[dict[str, Tensor], dict[str, Any], np.ndarray]
"""Tensors by their last name, the `quantization_config` of a model of them, and the weight [N, K] in float32."""
Packer = Callable[[np.ndarray, np.random.Generator], Packed]
GROUP = 32


def stream(levels: np.ndarray, bits: int) -> np.ndarray:
    """[K, N] numbers of some bits -> int32 [K bits / 32, N]: one stream down each column, lowest bits first."""
    every = levels.astype(np.uint64)[:, None] >> np.arange(bits, dtype=np.uint64)[:, None] & np.uint64(1)
    words = every.reshape(-1, 32, levels.shape[1]) << np.arange(32, dtype=np.uint64)[:, None]
    return words.sum(1).astype(np.uint32).view(np.int32)


def floats(weight: np.ndarray, rng: np.random.Generator, dtype: torch.dtype = torch.float32) -> Packed:
    """Not packed, only rounded."""
    tensor = torch.from_numpy(weight).to(dtype)
    return {"weight": tensor}, {}, tensor.float().numpy()


def affine(
    weight: np.ndarray, group: np.ndarray, bits: int, zeros: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Levels [K, N], zero points within `zeros` and fp16 scales [G, N], and (level - zero) * scale [K, N]."""
    low, high = (np.stack([f(weight[group == g], axis=0) for g in range(group.max() + 1)]) for f in (np.min, np.max))
    scales = np.maximum((high - low) / (2**bits - 1), 1e-4).astype(np.float16)
    zero = np.clip(np.rint(-low / scales), *zeros).astype(np.int64)
    levels = np.clip(np.rint(weight / scales[group]) + zero[group], 0, 2**bits - 1).astype(np.int64)
    return levels, zero, scales, (levels - zero[group]).astype(np.float16) * scales[group]


def gptq(
    weight: np.ndarray,
    rng: np.random.Generator,
    bits: int = 4,
    v2: bool = False,
    symmetric: bool = False,
    act_order: bool = False,
    one_group: bool = False,
    g_idx: bool = True,
) -> Packed:
    """GPTQ as AutoGPTQ (v1: zero points are stored less one) or GPTQModel (v2) writes it."""
    inputs = weight.shape[1]
    group = np.zeros(inputs, np.int64) if one_group else np.arange(inputs) // GROUP
    if act_order:
        group = rng.permutation(group)
    middle, stored_less = 1 << bits - 1, 0 if v2 else 1
    zeros = (middle, middle) if symmetric else (stored_less, 2**bits - 1 + stored_less)
    levels, zero, scales, exact = affine(weight.T, group, bits, zeros)
    tensors = {
        "qweight": stream(levels, bits), "qzeros": np.ascontiguousarray(stream((zero - stored_less).T, bits).T),
        "scales": scales,
    } | ({"g_idx": group.astype(np.int32)} if g_idx else {})  # fmt: skip
    section = {
        "quant_method": "gptq", "bits": bits, "group_size": -1 if one_group else GROUP, "desc_act": act_order,
        "sym": symmetric, "checkpoint_format": "gptq_v2" if v2 else "gptq",
    }  # fmt: skip
    return _torch(tensors), section, exact.T.astype(np.float32)


def awq(weight: np.ndarray, rng: np.random.Generator) -> Packed:
    """AWQ as AutoAWQ's `gemm` writes it: eight outputs in a word, the even ones before the odd ones."""
    levels, zero, scales, exact = affine(weight.T, np.arange(weight.shape[1]) // GROUP, 4, (0, 15))

    def pack(numbers: np.ndarray) -> np.ndarray:
        eights = numbers.reshape(len(numbers), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]]
        return np.ascontiguousarray(stream(eights.reshape(numbers.shape).T, 4).T)

    tensors = {"qweight": pack(levels), "qzeros": pack(zero), "scales": scales}
    section = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    return _torch(tensors), section, exact.T.astype(np.float32)


def exl2(weight: np.ndarray, rng: np.random.Generator, rates: tuple[int, ...] = (8, 6, 5, 4, 3, 2)) -> Packed:
    """EXL2 as ExLlamaV2 writes it: rows in a random order, groups of 32 or 64 rows at some of the `rates`."""
    outputs, inputs = weight.shape
    order = rng.permutation(inputs)
    stored = np.pad(weight.T[order], ((0, 0), (0, -outputs % 32)))
    cuts = [0]
    while cuts[-1] < inputs:
        cuts.append(min(cuts[-1] + int(rng.choice([32, 64])), inputs))
    bits = sorted((int(rng.choice(rates)) for _ in cuts[1:]), reverse=True)
    groups: list[int] = []
    words: list[np.ndarray] = []
    codes, scale_max, exact = [], [], []
    for start, end, b in zip(cuts, cuts[1:], bits, strict=False):
        groups += [b, sum(map(len, words))]
        highest = np.abs(stored[start:end]).max(0) / 2 ** (b - 1)
        scale_max.append(np.float16(max(highest.max(), 1e-3)))
        code = np.clip(np.ceil(np.sqrt(256 * highest / scale_max[-1])) - 1, 0, 15).astype(np.int64)
        scale = np.float16(scale_max[-1] / np.float16(256)) * ((code + 1) ** 2).astype(np.float16)
        levels = np.clip(np.rint(stored[start:end] / np.maximum(scale, 1e-7)) + 2 ** (b - 1), 0, 2**b - 1).astype(int)
        exact.append((levels - 2 ** (b - 1)).astype(np.float16) * scale)
        words.append(stream(levels, b))
        codes.append(code)
    places = np.argsort(order)
    tensors = {
        "q_weight": np.concatenate(words), "q_scale": np.ascontiguousarray(stream(np.stack(codes).T, 4).T),
        "q_scale_max": np.array(scale_max), "q_groups": np.array(groups, np.int16),
        "q_invperm": places.astype(np.int32),
    }  # fmt: skip
    return (
        _torch(tensors),
        {"quant_method": "exl2", "bits": 4.0},
        np.concatenate(exact)[places, :outputs].T.astype("f4"),
    )


def _torch(tensors: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in tensors.items()}


PACKERS: dict[str, Packer] = {
    "fp32": floats,
    "fp16": partial(floats, dtype=torch.float16),
    "bf16": partial(floats, dtype=torch.bfloat16),
    "gptq-2bit": partial(gptq, bits=2),
    "gptq-3bit": partial(gptq, bits=3),
    "gptq-4bit": gptq,
    "gptq-8bit": partial(gptq, bits=8),
    "gptq-v2": partial(gptq, v2=True),
    "gptq-3bit-v2": partial(gptq, bits=3, v2=True),
    "gptq-symmetric": partial(gptq, symmetric=True),
    "gptq-actorder": partial(gptq, act_order=True),
    "gptq-3bit-actorder": partial(gptq, bits=3, act_order=True),
    "gptq-one-group": partial(gptq, one_group=True),
    "gptq-no-g_idx": partial(gptq, g_idx=False),
    "awq": awq,
    "exl2": exl2,
    **{f"exl2-{bits}bit": partial(exl2, rates=(bits,)) for bits in (2, 3, 4, 5, 6, 8)},
}
"""Every format and flavour. Sizes of the weight are multiples of 32, but for EXL2's outputs."""
MIXABLE = [name for name in PACKERS if "v2" not in name and "one-group" not in name]
"""Those that one `quantization_config` describes together."""


def pack_model(source: Path, packed: Path, exact: Path, flavours: Sequence[str], seed: int = 0) -> None:
    """From the float model in `source`: one with its linears packed, by one flavour or several of MIXABLE in turn, and
    one of float32 that has the weights that the packed ones mean."""
    rng, section = np.random.default_rng(seed), dict[str, Any]()
    tensors = load_file(source / "model.safetensors")
    floats = {name: tensor.float() for name, tensor in tensors.items()}
    linears = sorted(name for name in tensors if name.endswith(("proj.weight", "lm_head.weight")))
    for name, flavour in zip(linears, itertools.cycle(flavours), strict=False):
        parts, section, weight = PACKERS[flavour](floats[name].numpy(), rng)
        del tensors[name]
        tensors |= {f"{name.removesuffix('weight')}{part}": tensor.contiguous() for part, tensor in parts.items()}
        floats[name] = torch.from_numpy(np.ascontiguousarray(weight))
    if len(flavours) > 1:
        section = {"quant_method": "gptq", "group_size": GROUP}
    config = json.loads((source / "config.json").read_text()) | {"dtype": "float32"}
    for path, stored, extra in (packed, tensors, {"quantization_config": section}), (exact, floats, {}):
        path.mkdir()
        save_file(stored, path / "model.safetensors", {"format": "pt"})
        (path / "config.json").write_text(json.dumps(config | (extra if section else {})))
