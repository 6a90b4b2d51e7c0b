"""Steps from logits to the probabilities of the draw.

After `soften`, each step maps the probabilities [n] of the tokens that are left, float64, summing to 1, in descending
order of logits (among equals, of lower ids first), to new ones that sum to 1; 0 drops a token. At least one is kept.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def soften(row: Tensor, temperature: float = 1.0, smoothing: float = 0.0, curve: float = 1.0) -> Tensor:
    """Probabilities float64 [V] of logits: softmax(l / temperature).

    With smoothing f > 0 and d = l - max l: softmax of (-k f d^2 + s f d^3) / temperature, k = (3 - curve) / 2 and
    s = (curve - 1) / 2 (quadratic sampling and its curve, kalomaze 2024; curve 1 is ExLlamaV2's smoothing factor).
    """
    distance = row.double() - row.max()
    if smoothing:
        k, s = (3 - curve) / 2, (curve - 1) / 2
        distance = torch.where(distance == -torch.inf, distance, smoothing * distance**2 * (s * distance - k))
    return (distance / temperature).softmax(0)


def top_k(p: Tensor, k: int) -> Tensor:
    """The k likeliest."""
    return _renormalised(p * (torch.arange(len(p), device=p.device) < k))


def top_p(p: Tensor, share: float) -> Tensor:
    """The smallest set of the likeliest whose probability reaches `share` (nucleus, Holtzman 2019)."""
    return _renormalised(p * (p.cumsum(0) - p < share))


def top_a(p: Tensor, a: float) -> Tensor:
    """Those with p >= a max(p)^2 (BlinkDL, RWKV-LM 2022)."""
    return _at_least(p, a * float(p.max()) ** 2)


def min_p(p: Tensor, share: float) -> Tensor:
    """Those with p >= share max(p) (Nguyen 2024)."""
    return _at_least(p, share * float(p.max()))


def tail_free(p: Tensor, z: float) -> Tensor:
    """The likeliest up to where the curvature of the sorted probabilities has given z of its sum (Bricken 2019).

    d_i = |p_i - 2 p_(i+1) + p_(i+2)|, normalised; i is the first index where the sum of d_0..d_i exceeds z: 0..i are
    kept. Fewer than three tokens, or a straight line, stay as they are.
    """
    curvature = (p[:-2] - 2 * p[1:-1] + p[2:]).abs()
    if len(p) < 3 or float(curvature.sum()) == 0:
        return p
    inside = int(((curvature / curvature.sum()).cumsum(0) <= z).sum())
    return p if inside == len(curvature) else top_k(p, inside + 1)


def typical(p: Tensor, share: float) -> Tensor:
    """Locally typical sampling (Meister 2022).

    The smallest set of tokens whose surprise -ln p is nearest to the entropy and whose probability reaches `share`.
    """
    surprise = -p.log()
    order = (surprise - (p * surprise).sum()).abs().argsort(stable=True)
    kept = p[order].cumsum(0) - p[order] < share
    return _renormalised(p * torch.zeros_like(kept).scatter(0, order, kept))


def mirostat_cut(p: Tensor, mu: float) -> Tensor:
    """Those whose surprise -log2 p is at most mu, or the likeliest (Mirostat 2, Basu 2021, algorithm 2)."""
    return _at_least(p, min(2.0 ** -max(mu, 0.0), float(p.max())))


def next_mu(mu: float, probability: float, tau: float, eta: float) -> float:
    """Mirostat's mu after a token was drawn with this probability: mu - eta (-log2 p - tau); it begins as 2 tau."""
    return mu - eta * (-math.log2(probability) - tau)


def sharpen(p: Tensor, temperature: float) -> Tensor:
    """p^(1 / temperature), normalised: a temperature after the filters."""
    return (p.log() / max(temperature, TINY)).softmax(0)


def dynamic_temperature(p: Tensor, low: float, high: float, exponent: float) -> Tensor:
    """`sharpen` with a temperature between low and high by the entropy of p (kalomaze 2023; ExLlamaV2).

    T = low + (high - low) (H / ln n)^exponent, H = - sum p ln p, of the n tokens that are left.
    """
    if len(p) == 1:
        return p
    entropy = float(torch.special.entr(p).sum()) / math.log(len(p))
    return sharpen(p, low + (high - low) * min(max(entropy, 0.0), 1.0) ** exponent)


def xtc(p: Tensor, probability: float, threshold: float, ignored: Tensor) -> Tensor:
    """Exclude top choices (p-e-w 2024), as the distribution that its coin gives: no draw of its own is needed.

    X are the tokens with p >= threshold, without the `ignored` ones (bool [n]). If there are several, with
    `probability` q all of X but the least likely are dropped. So with x the sum of those dropped, they come with
    p (1 - q) and all others with p (1 + q x / (1 - x)).
    """
    members = (p >= threshold) & ~ignored
    if int(members.sum()) < 2:
        return p
    least = len(p) - 1 - torch.where(members, p, torch.inf).flip(0).argmin()
    dropped = members & (torch.arange(len(p), device=p.device) != least)
    rest = float((p * ~dropped).sum())
    others = p * (1 + probability * (1 - rest) / rest)
    return _renormalised(torch.where(dropped, p * (1 - probability), others))


def skewed(number: float, skew: float) -> float:
    """The uniform number u of the draw as u^exp(-skew), over tokens in descending order of p (ExLlamaV2)."""
    return float(number ** math.exp(-skew))


TINY = 1e-9
"""The lowest temperature of `sharpen`."""


def _at_least(p: Tensor, limit: float) -> Tensor:
    return _renormalised(p * (p >= limit))


def _renormalised(p: Tensor) -> Tensor:
    return p / p.sum()
