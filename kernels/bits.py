"""Numbers of 2 to 8 bits in 32-bit words: a stream without gaps, lowest bits first, as GPTQ and EXL2 store it."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def unpack(words: Tensor, bits: int) -> Tensor:
    """int32 [R, N], one stream down each column -> uint8 [32 R / bits, N].

    A stream closes with every `unit` words, which hold `count` numbers; so R must be a multiple of `unit`.
    """
    unit, count = bits // math.gcd(bits, 32), 32 // math.gcd(bits, 32)
    blocks, mask = words.unflatten(0, (-1, unit)), (1 << bits) - 1
    numbers = torch.empty(len(blocks), count, words.shape[1], dtype=torch.uint8, device=words.device)
    for i in range(count):
        word, shift = divmod(i * bits, 32)
        number = blocks[:, word] >> shift
        if shift + bits > 32:  # the rest is in the next word; the sign has filled the place it goes to
            number = number & (1 << 32 - shift) - 1 | blocks[:, word + 1] << 32 - shift
        numbers[:, i] = number & mask
    return numbers.flatten(0, 1)


def unpack_rows(words: Tensor, bits: int) -> Tensor:
    """int32 [R, C], one stream along each row -> uint8 [R, 32 C / bits]."""
    return unpack(words.T, bits).T
