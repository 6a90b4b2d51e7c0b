"""The order of the tokens' numbers in shared memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lorayard.kernels.arranged import arrange, new_image

from ..case import Case, Real


def image_of(x: torch.Tensor) -> torch.Tensor:
    """What the image of x [T, K] holds for its tokens, [K/64, T, 64] in float64."""
    tokens, width = x.shape
    columns = x.double().view(tokens, width // 64, 4, 4, 2, 2)  # lane, word, half of operand A, number
    value = columns.permute(1, 0, 3, 4, 2, 5).reshape(width // 64, tokens, 8, 8)
    place = torch.arange(8, device=x.device) ^ (torch.arange(tokens, device=x.device) % 8)[:, None]
    return value.gather(2, place[None, :, :, None].expand_as(value)).reshape(width // 64, tokens, 64)


def make(tokens: int, width: int, order: torch.Tensor | None, device: str) -> Case:
    """A case with random numbers."""
    x = torch.randn(tokens, width, device=device).half()
    image = new_image(x).fill_(torch.nan)
    value = image_of(x if order is None else x[:, order])
    moved = 2 * x.nbytes
    return Case(f"{tokens} x {width}", [arrange(x, order, image)], [(image[:, :tokens], value)], 1e-9, bytes=moved)


def odd(device: str) -> Iterator[Case]:
    yield make(21, 192, None, device)
    yield make(5, 128, torch.randperm(128, device=device), device)


def real(device: str) -> Iterator[Real]:
    yield "64 tokens", lambda: make(64, 4096, None, device)
