"""Queries turned, keys and values written into pages, both as parts of one projection."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lorayard.kernels.pool import FloatPool, QuantisedPool
from lorayard.kernels.rope import rope
from lorayard.kernels.rope_append import append

from ..case import Case, Real, poisoned

PAGE = 256


def make(
    tokens: int,
    heads: tuple[int, int],
    dim: int,
    turned: int,
    dtype: torch.dtype,
    device: str,
    kind: torch.dtype | tuple[int, int] = torch.float16,
) -> Case:
    """A case with numbers beyond fp16's range and NaN among the values; `kind`: dtype or bits of the pools."""
    wide = torch.randn(tokens, heads[0] + 2 * heads[1], dim, device=device).to(dtype)
    wide[0, -1, 0], wide[0, -1, 1] = torch.nan, torch.inf
    q, k, v = wide.split((heads[0], heads[1], heads[1]), 1)
    angle = torch.rand(tokens, turned, device=device) * 6
    shape, where = (tokens, heads[1], PAGE, dim), torch.device(device)
    bits = kind if isinstance(kind, tuple) else None
    pools = (
        [QuantisedPool(shape, each, where) for each in bits] if bits else [FloatPool(shape, kind, where) for _ in "kv"]
    )
    place = torch.randperm(tokens, device=device), torch.randint(PAGE, (tokens,), device=device)
    out = poisoned(tokens, heads[0], dim, dtype=dtype, device=device)
    launches = [append(q, k, v, (angle.cos(), angle.sin()), tuple(pools), place, out)]
    title = f"{tokens} tokens, {heads}, {dim}, {kind}"
    tolerance = 4e-3 if torch.bfloat16 in (dtype, kind) else 4e-4
    if bits:
        written = [QuantisedPool(shape, each, where) for each in bits]
        for pool, x in zip(written, (rope(k, angle.cos(), angle.sin()), v), strict=True):
            pool.write(x, *place)
        exact = zip(
            pools[device != "cpu" :], written[device != "cpu" :], strict=True
        )  # a GPU turns k with other roundings
        same = [pair for one, other in exact for pair in ((one.codes, other.codes), (one.scales, other.scales))]  # type: ignore[attr-defined]
        return Case(title, launches, [(out, turn(q, angle))], tolerance, same, wide.nbytes)
    written = [_Cells(pool.values, place) for pool in pools]
    value = v.double().nan_to_num(0.0, posinf=65504.0)
    expected = [(out, turn(q, angle)), (written[0], turn(k, angle)), (written[1], value)]
    return Case(title, launches, expected, tolerance, bytes=wide.nbytes * 2)


class _Cells:
    """What a launch will have written into a pool."""

    def __init__(self, pool: torch.Tensor, place: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.pool, self.place = pool, place

    def double(self) -> torch.Tensor:
        return self.pool[self.place[0], :, self.place[1]].double()


def turn(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Rotary embedding in float64."""
    size = angle.shape[1]
    cosine, sine, wide = angle.cos().double()[:, None], angle.sin().double()[:, None], x.double()
    low, high, rest = wide[..., :size], wide[..., size : 2 * size], wide[..., 2 * size :]
    return torch.cat([low * cosine - high * sine, high * cosine + low * sine, rest], -1)


def odd(device: str) -> Iterator[Case]:
    yield make(3, (6, 2), 64, 32, torch.float16, device)
    yield make(2, (3, 1), 80, 16, torch.bfloat16, device)
    yield make(2, (3, 1), 80, 40, torch.bfloat16, device, torch.bfloat16)
    yield make(5, (4, 2), 64, 32, torch.float16, device, (8, 4))
    yield make(3, (2, 1), 128, 64, torch.bfloat16, device, (4, 8))


def real(device: str) -> Iterator[Real]:
    for tokens in (1, 64, 256):
        yield f"{tokens} tokens", lambda n=tokens: make(n, (32, 8), 128, 64, torch.float16, device)
    yield "64 tokens, codes of 4", lambda: make(64, (32, 8), 128, 64, torch.float16, device, (4, 4))
