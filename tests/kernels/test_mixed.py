"""The layout of mixed widths on real models, and how matrices are joined."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

from lorayard.kernels import linear_mixed, mixed

from ..worker.test_vectors import VECTORS, packed
from . import emulator
from .cases.mixed_decode import exl2, gptq

EXL2 = ["exl2-2.6bpw-h6", "exl2-4.25bpw-h6", "qwen2/exl2-4.25bpw-h6"]


def dequantised(weights: mixed.Mixed) -> torch.Tensor:
    """fp16 [N, K] by the kernel."""
    stored = torch.full((len(weights.words) * 16, weights.columns), torch.nan, dtype=torch.float16)
    emulator.run(linear_mixed.widen(weights, stored))
    position = weights.position()
    return stored[: weights.outputs] if position is None else stored[: weights.outputs, position]


@pytest.mark.skipif(not emulator.available(), reason="no compiler for the emulator")
@pytest.mark.parametrize("name", EXL2)
def test_weights_of_exllamav2_have_their_digests(name):
    digests = json.loads((VECTORS / name / "sha256.json").read_text())
    assert len(digests) == 15
    for linear, digest in digests.items():
        weight = dequantised(packed(name, linear).pack())  # type: ignore[attr-defined]
        assert hashlib.sha256(weight.contiguous().numpy().tobytes()).hexdigest() == digest, linear


def test_linears_of_one_input_are_joined_where_their_columns_are_stored_alike(monkeypatch):
    name = "model.layers.0.self_attn"
    parts = [packed("exl2-4.25bpw-h6", f"{name}.{each}_proj").pack() for each in "qkv"]  # type: ignore[attr-defined]
    joined = mixed.join(parts)
    assert joined.outputs == sum(each.outputs for each in parts)
    assert torch.equal(joined.words, torch.cat([each.words for each in parts]))
    assert mixed.join([parts[0], packed("exl2-4.25bpw-h6", f"{name}.o_proj").pack()]) is None, "another order"  # type: ignore[attr-defined]
    groups = [(4, 128), (3, 64)]
    tensors = exl2(192, groups, "cpu")
    whole = mixed.pack_exl2(*tensors, 192)
    monkeypatch.setattr(mixed, "SLICE", 64)
    sliced = mixed.pack_exl2(*tensors, 192)
    assert torch.equal(whole.words, sliced.words) and torch.equal(whole.scales, sliced.scales)
    assert mixed.join([mixed.pack_exl2(*exl2(96, groups, "cpu"), 96)] * 2) is None, "blocks that are not whole"  # type: ignore[list-item]


def test_what_does_not_fit_is_left_to_torch():
    words, zeros, scales, group = gptq(8, 128, 64, 32, True, True, "cpu")
    assert mixed.pack_gptq(words, zeros, scales.float(), group) is None, "scales of 32 bits"
    group[0] = 1
    assert mixed.pack_gptq(words, zeros, scales, group) is None, "a group that is not in sixteens"
