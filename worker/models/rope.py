"""The angles of rotary position embedding for each position of a model."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import Llama3Scaling, ModelConfig


def tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [max_seq_len, head_dim / 2]."""
    dim = config.head_dim
    base = config.rope_theta * config.rope_alpha ** (dim / max(dim - 2, 1))
    frequencies = 1.0 / base ** (torch.arange(0, dim, 2).float() / dim)
    if config.rope_scaling:
        frequencies = _llama3(frequencies, config.rope_scaling)
    angles = torch.arange(config.max_seq_len).float()[:, None] * frequencies
    return angles.cos(), angles.sin()


def _llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Frequencies of Llama 3.1: kept when short of wave, divided by factor when long, blended between."""
    wave = 2 * math.pi / frequencies
    blend = (scaling.original / wave - scaling.low) / (scaling.high - scaling.low)
    blend = blend.clamp(0, 1)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies
