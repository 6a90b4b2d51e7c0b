"""The next token of each row of logits, drawn where the logits are."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .launch import Kernel, Launch, launch, require, usable

MAX_BANNED = 8
ROW = np.dtype(
    [
        ("number", "f8"), ("temperature", "f4"), ("top_p", "f4"), ("min_p", "f4"), ("top_k", "i4"), ("seat", "i4"),
        ("unused", "i4"), ("banned", "i4", MAX_BANNED),
    ]
)  # fmt: skip
"""How a row is drawn: the uniform number in [0, 1), the settings of its request, where in `drawn` its token goes (-1:
nowhere), and ids that may not come (-1: none). Temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 keep all."""
WORDS = ROW.itemsize // 4
CHUNK, MOST_CHUNKS = 8192, 32
KINDS = {torch.float16: (0, 0), torch.bfloat16: (0, 1), torch.float32: (1, 0)}


def fits(logits: Tensor, vocab_size: int) -> bool:
    """Whether the kernels take logits [L, V] like these."""
    shaped = logits.dtype in KINDS and logits.is_contiguous() and logits.numel() > 0
    return usable(logits) and shaped and takes(vocab_size)


def takes(vocab_size: int) -> bool:
    """Whether the kernels draw from so many tokens."""
    return vocab_size <= CHUNK * MOST_CHUNKS


def draw(
    logits: Tensor, rows: Tensor, vocab_size: int, tokens: Tensor, probabilities: Tensor, drawn: Tensor | None = None
) -> None:
    """tokens int64 [L], each of its row of logits [L, V]; -1 where that holds NaN or infinity or allows nothing.

    Temperature, softmax, top_k, top_p, min_p, then the first id up to which the probabilities of what is left, in the
    order of ids, exceed the row's number. rows: ROW as int32 [L, 16]. probabilities float32 [L]: in that draw, 1 if
    greedy. drawn: int64 [seats]. Ids from `vocab_size` on never come. Logits that `fits` takes.
    """
    chunks = -(-vocab_size // CHUNK)
    highest, sums = (torch.empty(len(logits), chunks, dtype=torch.int64, device=logits.device) for _ in range(2))
    launch(scan(logits, rows, highest, sums, vocab_size))
    launch(choose(logits, rows, highest, sums, vocab_size, tokens, probabilities, drawn))


def scan(logits: Tensor, rows: Tensor, highest: Tensor, sums: Tensor, vocab_size: int) -> Launch:
    """The launch of sample_scan.cu: highest and sums int64 [L, chunks]."""
    _check(logits, rows, highest, sums, vocab_size)
    length, width = logits.shape
    grid = (highest.shape[1], length, 1)
    return Launch(_kernel("sample_scan", logits), grid, 256, (logits, rows, highest, sums, width, vocab_size))


def choose(
    logits: Tensor, rows: Tensor, highest: Tensor, sums: Tensor, vocab_size: int, tokens: Tensor,
    probabilities: Tensor, drawn: Tensor | None,
) -> Launch:  # fmt: skip
    """The launch of sample_draw.cu, after that of sample_scan.cu."""
    _check(logits, rows, highest, sums, vocab_size)
    length, width = logits.shape
    require("tokens", tokens, torch.int64, length, like=logits)
    require("probabilities", probabilities, torch.float32, length, like=logits)
    if drawn is not None:
        require("drawn", drawn, torch.int64, len(drawn), like=logits)
    arguments = logits, rows, highest, sums, tokens, probabilities, drawn, width, vocab_size, highest.shape[1]
    return Launch(_kernel("sample_draw", logits), (length, 1, 1), 1024, arguments)


def _check(logits: Tensor, rows: Tensor, highest: Tensor, sums: Tensor, vocab_size: int) -> None:
    length, width = logits.shape
    if not 0 < vocab_size <= width or not takes(vocab_size) or logits.dtype not in KINDS:
        raise ValueError(f"logits are {logits.dtype} {list(logits.shape)}, of which {vocab_size} cannot be drawn from")
    require("logits", logits, logits.dtype, length, width)
    require("rows", rows, torch.int32, length, WORDS, like=logits)
    for name, each in (("highest", highest), ("sums", sums)):
        require(name, each, torch.int64, length, -(-vocab_size // CHUNK), like=logits)


def _kernel(name: str, logits: Tensor) -> Kernel:
    wide, bfloat = KINDS[logits.dtype]
    aligned = int(logits.shape[1] % 8 == 0)
    return Kernel(name, (("FLOAT32", wide), ("BFLOAT", bfloat), ("ALIGNED", aligned)))
