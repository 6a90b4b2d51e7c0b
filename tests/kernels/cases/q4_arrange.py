"""The order of the tokens' numbers in shared memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lorayard.kernels import linear_q4

from ..case import Case, Real, poisoned


def make(tokens: int, width: int, tile: int, order: torch.Tensor | None, device: str) -> Case:
    """A case whose tiles have `tile` tokens."""
    x = torch.randn(tokens, width, device=device).half()
    tiles = -(-tokens // tile)
    image = poisoned(tiles, width // 64, tile, 64, device=device)
    filled = torch.zeros(tiles * tile, width, dtype=torch.float64, device=device)
    filled[:tokens] = (x if order is None else x[:, order]).double()
    columns = filled.view(tiles, tile, width // 64, 4, 4, 2, 2)  # lane, word, half of operand A, number
    value = columns.permute(0, 2, 1, 4, 5, 3, 6).reshape(tiles, width // 64, tile, 8, 8)
    place = torch.arange(8, device=device) ^ (torch.arange(tile, device=device) % 8)[:, None]
    value = value.gather(3, place[None, None, :, :, None].expand_as(value)).view(image.shape)
    launches = [linear_q4.arrange(x, order, tile, image)]
    return Case(f"{tokens} x {width}", launches, [(image, value)], 1e-9, bytes=x.nbytes + image.nbytes)


def odd(device: str) -> Iterator[Case]:
    yield make(21, 192, 16, None, device)
    yield make(5, 128, 32, torch.randperm(128, device=device), device)


def real(device: str) -> Iterator[Real]:
    yield "64 tokens", lambda: make(64, 4096, 64, None, device)
