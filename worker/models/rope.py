"""The angles of rotary position embedding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import Llama3Scaling, ModelConfig


def frequencies(config: ModelConfig) -> Tensor:
    """Radians a position of each pair of a head's numbers, float32 [head_dim / 2]."""
    dim = config.head_dim
    base = config.rope_theta * config.rope_alpha ** (dim / max(dim - 2, 1))
    plain = 1.0 / base ** (torch.arange(0, dim, 2).float() / dim)
    return _llama3(plain, config.rope_scaling) if config.rope_scaling else plain


def turns(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [T, D/2], of the angles at positions int64 [T]."""
    angles = positions[:, None] * frequencies
    return angles.cos(), angles.sin()


def _llama3(plain: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Frequencies of Llama 3.1: kept when short of wave, divided by factor when long, blended between."""
    wave = 2 * math.pi / plain
    blend = (scaling.original / wave - scaling.low) / (scaling.high - scaling.low)
    blend = blend.clamp(0, 1)
    return (1 - blend) * plain / scaling.factor + blend * plain
