"""Texts that are there already, left out in the order in which they come: equal ones, or nearly equal ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from lorayard.shared.errors import UsageError

Row = Mapping[str, Any]
SHINGLE, HASHES = 3, 128
"""Words of a shingle; hash functions of a signature (MinHash, Broder 1997), which errs by about 1/sqrt(HASHES)."""


def distinct(rows: Iterable[Row], how: str, removed: list[str]) -> Iterator[Row]:
    """The rows whose text is not a duplicate of one before; row keys of the others go into `removed`.

    how: `exact`, or `minhash:0.9` for texts whose sets of shingles have at least that Jaccard similarity. Memory: 16
    bytes, or about 2 KiB, for each row that is kept. Raises UsageError.
    """
    is_known = _exact() if how == "exact" else _near(how)
    for row in rows:
        if is_known(row["text"]):
            removed.append(row["row_key"])
        else:
            yield row


def _exact() -> Callable[[str], bool]:
    seen: set[bytes] = set()

    def is_known(text: str) -> bool:
        digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()
        known = digest in seen
        seen.add(digest)
        return known

    return is_known


def _near(how: str) -> Callable[[str], bool]:
    method, _, asked = how.partition(":")
    try:
        threshold = float(asked)
    except ValueError:
        threshold = 0.0
    if method != "minhash" or not 0 < threshold <= 1:
        raise UsageError(f"--dedupe must be exact or minhash:SIMILARITY such as minhash:0.9, not {how!r}")
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=threshold, num_perm=HASHES)
    signatures: list[Any] = []

    def is_known(text: str) -> bool:
        words = text.lower().split()
        shingles = {" ".join(words[at : at + SHINGLE]) for at in range(max(len(words) - SHINGLE + 1, 1))}
        signature = MinHash(num_perm=HASHES)
        signature.update_batch([one.encode(errors="surrogatepass") for one in shingles])
        if any(signatures[at].jaccard(signature) >= threshold for at in index.query(signature)):
            return True
        index.insert(len(signatures), signature)
        signatures.append(signature)
        return False

    return is_known
