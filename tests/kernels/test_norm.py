"""The residual's sum and its norm in one call."""

from __future__ import annotations

import pytest
import torch

from lorayard.kernels.rms_norm import add_norm, rms_norm


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_sum_and_its_norm_have_the_bits_of_both_steps(dtype):
    h, weight = torch.randn(5, 72), torch.randn(72).to(dtype)
    delta = torch.randn(5, 72).to(dtype)
    for stream in (h, h.to(dtype)):
        total, normal = add_norm(delta, stream, weight, 1e-5, dtype)
        assert torch.equal(total, stream + delta) and total.dtype == stream.dtype
        assert torch.equal(normal, rms_norm(stream + delta, weight, 1e-5, dtype)) and normal.dtype == dtype
