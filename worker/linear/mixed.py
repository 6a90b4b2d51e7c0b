"""EXL2, and GPTQ of other than 4 bits, as the GPU keeps them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorayard.kernels.linear_mixed import dense, linear_mixed
from lorayard.kernels.mixed import Mixed

from .linear import Packed


@dataclass(frozen=True, slots=True)
class MixedTensors:
    """Numbers of mixed widths, laid out for kernels.linear_mixed."""

    packed: Mixed

    @property
    def words(self) -> Tensor:
        """The packed numbers."""
        return self.packed.words

    def to(self, device: torch.device) -> Packed:
        """The same on `device`, a GPU too."""
        return MixedTensors(self.packed.to(device))

    def dequantise(self) -> Tensor:
        """[K, N] in fp16."""
        return dense(self.packed)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, K] -> [T, N]."""
        return linear_mixed(x, self.packed, bias)
