"""Log-probabilities of tokens under the model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .event import TokenLogprobs


def token_logprobs(logits: Tensor, ids: Sequence[int], count: int, vocab_size: int) -> list[TokenLogprobs]:
    """For each row of logits [L, V] and the token of `ids` that took its place, with the `count` likeliest.

    Ids from `vocab_size` on have no token and no probability.
    """
    table = logits[:, :vocab_size].float().log_softmax(-1)
    values, best = table.topk(min(count, vocab_size))
    own = table[range(len(ids)), list(ids)].tolist()
    tops = zip(best.tolist(), values.tolist(), strict=True)
    return [
        TokenLogprobs(id, logprob, tuple(zip(*top, strict=True)))
        for id, logprob, top in zip(ids, own, tops, strict=True)
    ]
