"""Tokens drawn with every filter: the settings and numbers lie between those where another token would come."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from lorayard.kernels import sample

from ..case import Case, Real, poisoned

FILTERS = ("greedy", "plain", "top_k", "top_p", "min_p", "top_k top_p", "top_k top_p min_p", "top_p min_p", "top_k 1")


def between(values: np.ndarray, at: int) -> float:
    """A number between one of the descending values and the next that is less."""
    lower = values[values < values[at]]
    return float((values[at] + (lower[0] if len(lower) else 0)) / 2)


def expect(logits: np.ndarray, row: np.void, filters: str, random: np.random.Generator) -> tuple[int, float]:
    """Set the row's filters and number; the token [and its probability] that must come of them."""
    if not abs(logits.max()) < np.inf or row["temperature"] == 0:
        return (int(logits.argmax()) if abs(logits.max()) < np.inf else -1), 1.0
    ids = np.argsort(-logits, kind="stable")
    p = np.exp((logits[ids] - logits.max()) / np.float64(row["temperature"]))
    ids, p = ids[p > 2.0**-30], p[p > 2.0**-30]
    if "top_k" in filters:
        row["top_k"] = 1 if filters == "top_k 1" else random.integers(2, 60)
        ids, p = ids[: row["top_k"]], p[: row["top_k"]]
    if "top_p" in filters:
        mass = p / (p.sum() if "top_k" in filters else np.exp((logits - logits.max()) / row["temperature"]).sum())
        last = random.integers(len(p)) if len(p) < 99 else int((mass.cumsum() < random.choice([0.1, 0.8])).sum())
        row["top_p"] = min(mass[:last].sum() + mass[last] / 2, 0.999)
        ids, p = ids[: last + 1], p[: last + 1]
    if "min_p" in filters:
        row["min_p"] = between(p, random.integers(min(len(p), 50)))
        ids, p = ids[p > row["min_p"]], p[p > row["min_p"]]
    order = ids.argsort()
    ids, p = ids[order], p[order] / p.sum()
    place = random.choice(len(p), p=p) if random.integers(2) else int(p.argmax())
    row["number"] = p[:place].sum() + p[place] / 2
    return int(ids[place]), float(p[place])


def make(logits: Tensor, settings: list[tuple[str, float]], vocab_size: int, banned: int = 0) -> Case:
    """A case with (filters, temperature) for each row, the likeliest `banned` of which may not come."""
    random = np.random.default_rng(torch.randint(1 << 30, ()).item())
    length, device = len(settings), logits.device
    rows = np.zeros(length, sample.ROW)
    rows["top_p"], rows["banned"], rows["seat"] = 1, -1, [-1, *range(length - 1, 0, -1)]
    expected = []
    for row, values, (filters, temperature) in zip(rows, logits.double().cpu().numpy(), settings, strict=True):
        row["temperature"] = 0 if filters == "greedy" else temperature
        row["banned"][:banned] = np.argsort(-values[:vocab_size], kind="stable")[:banned]
        allowed = values[:vocab_size].copy()
        allowed[row["banned"][:banned]] = -np.inf
        expected.append(expect(allowed, row, filters, random))
    words = torch.from_numpy(rows.view(np.int32).reshape(length, -1)).to(device)
    chunks = -(-vocab_size // sample.CHUNK)
    launches, outputs = [], []
    for first in (0, length - 1):
        n = length - first
        parts = [torch.full((n, chunks), -7, dtype=torch.int64, device=device) for _ in range(2)]
        tokens = torch.full((n + 1,), -7, dtype=torch.int64, device=device)[:n]
        drawn, p = torch.full_like(tokens, -7).repeat(length), poisoned(n, dtype=torch.float32, device=str(device))
        own = (logits[first:].clone(), words[first:].clone())
        launches += [sample.scan(*own, *parts, vocab_size),  # type: ignore[call-arg]
                     sample.choose(*own, *parts, vocab_size, tokens, p, drawn if not first else None)]  # type: ignore[call-arg]  # fmt: skip
        outputs.append((tokens, p, drawn))
    (tokens, p, drawn), (alone, p_alone, _) = outputs
    wanted = torch.tensor([token for token, _ in expected], device=device)
    same = [(tokens, wanted), (drawn[1:length], wanted[1:].flip(0)), (tokens[-1:], alone), (p[-1:], p_alone)]
    probabilities = torch.tensor([value for _, value in expected], dtype=torch.float64, device=device)
    title = f"{length} x {logits.shape[1]}, {logits.dtype}, {settings[-1][0]}"
    return Case(title, launches, [(p, probabilities)], 1e-3, same)


def odd(device: str) -> Iterator[Case]:
    wide = torch.randn(9, 8201, device=device) * 3
    yield make(wide, [(filters, 0.7) for filters in FILTERS], 8199, 2)
    yield make((torch.randn(4, 2400, device=device) * 2).half(), [(filters, 1.0) for filters in FILTERS[1::2]], 2397)
    yield make((torch.randn(2, 8208, device=device) * 2).bfloat16(), [("top_p", 1.5), ("min_p", 1.0)], 8205, 8)
    flat = torch.randn(4, 8300, device=device).round() / 64
    yield make(flat, [("plain", 1.0), ("top_p", 1.0), ("top_k", 1.0), ("top_k top_p", 100.0)], 8300)
    steep = (torch.randn(3, 800, device=device) * 20).half()
    steep[:, 100:700] = -torch.inf
    yield make(steep, [("plain", 0.01), ("top_p", 1.0), ("top_k", 2.0)], 793)
    broken = torch.randn(6, 40, device=device)
    broken[0, 3], broken[1, 5], broken[2], broken[3, 7] = torch.nan, torch.inf, -torch.inf, -torch.nan
    settings = [("plain", 1.0), ("greedy", 0.0), ("top_p", 1.0), ("top_k", 1.0), ("greedy", 0.0), ("plain", 1.0)]
    yield make(broken, settings, 40)


def speed(length: int, filters: str, device: str) -> Case:
    """Rows of which a few tokens have most of the mass, as a language model's have."""
    logits = (torch.randn(length, 128256, device=device) * 2.2).half()
    logits.scatter_add_(
        1, torch.randint(128000, (length, 40), device=device), 9 * torch.rand(length, 40, device=device).half()
    )
    rows = np.zeros(length, sample.ROW)
    rows["temperature"], rows["top_p"], rows["banned"], rows["seat"], rows["number"] = 1, 1, -1, -1, 0.7
    name, value = {"greedy": ("temperature", 0), "plain": ("temperature", 0.8), "top_p 0.9": ("top_p", 0.9),
                   "top_k 50": ("top_k", 50), "min_p 0.05": ("min_p", 0.05)}[filters]  # fmt: skip
    rows[name] = value
    words = torch.from_numpy(rows.view(np.int32).reshape(length, -1)).to(device)
    parts = [torch.empty(length, 16, dtype=torch.int64, device=device) for _ in range(2)]
    tokens, p = torch.empty(length, dtype=torch.int64, device=device), torch.empty(length, device=device)
    launches = [
        sample.scan(logits, words, *parts, 128256),  # type: ignore[call-arg]
        sample.choose(logits, words, *parts, 128256, tokens, p, None),  # type: ignore[call-arg]
    ]
    return Case(filters, launches, [], bytes=logits.nbytes)


def real(device: str) -> Iterator[Real]:
    for length in (1, 64, 256):
        for filters in ("greedy", "plain", "top_p 0.9", "top_k 50", "min_p 0.05"):
            yield f"{length} rows, {filters}", lambda n=length, name=filters: speed(n, name, device)
