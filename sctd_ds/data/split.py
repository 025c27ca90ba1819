"""Which documents are held out for validation, and which are dropped as duplicates: from their keys and lengths alone.

A document's key is a hash of (seed, text). Documents are held out in the order of their keys, so equal texts are on the same
side. The parts' files are read again and again, one at a time: memory does not grow with the text, except for one byte per
document where duplicates are dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sctd_ds.data import parts
from sctd_ds.data.files import DataError

BINS = 1 << 16
SORTED = 1 << 23  # keys that are sorted at a time


@dataclass(frozen=True)
class HoldOut:
    """Documents with a key up to `last` are held out, first those of at most `short` tokens.

    `longer`: all of those are, and of the longer ones those with a key up to `last`.
    """

    short: int
    last: int
    longer: bool

    def __call__(self, keys: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Which documents are held out: bool [documents], of keys int64 and lengths uint32 [documents]."""
        is_short = lengths <= self.short
        return is_short | (keys <= self.last) if self.longer else is_short & (keys <= self.last)


def hold_out(files: Sequence[Path], dropped: Sequence[np.ndarray], fraction: float, seq_length: int) -> HoldOut:
    """Hold out `fraction` of all tokens, and at least one row. dropped: duplicates by file, bool [documents] or empty.

    Raises DataError where the text does not fill a row of each split.
    """

    def documents(longer: bool | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for file, gone in zip(files, dropped, strict=True):
            keys, lengths = parts.read(file, "keys", "lengths")
            chosen = ~gone if len(gone) else np.ones(len(keys), dtype=bool)
            if longer is not None:
                chosen &= (lengths > int(wanted)) == longer
            yield keys[chosen], lengths[chosen]

    total = count = 0
    for keys, lengths in documents():
        total, count = total + int(lengths.sum(dtype=np.int64)), count + len(keys)
    row = seq_length - 2
    wanted = max(fraction * total, row)
    found, held = None, 0
    for longer in (False, True):  # documents longer than the whole validation split come last
        sums = np.zeros(BINS)
        for keys, lengths in documents(longer):
            sums += np.bincount(_bin(keys), weights=lengths, minlength=BINS)
        tokens = int(sums.sum())
        if held + tokens < wanted:
            held += tokens
            continue
        which = int(np.searchsorted(np.cumsum(sums), wanted - held))
        held += int(sums[:which].sum())
        inside = [(keys[_bin(keys) == which], lengths[_bin(keys) == which]) for keys, lengths in documents(longer)]
        keys, lengths = (np.concatenate(arrays) for arrays in zip(*inside, strict=True))
        order = np.argsort(keys, kind="stable")
        last = keys[order[np.searchsorted(np.cumsum(lengths[order], dtype=np.int64), wanted - held)]]
        held += int(lengths[keys <= last].sum(dtype=np.int64))
        found = HoldOut(int(wanted), int(last), longer)
        break
    if found is None or total - held < row:
        raise DataError(
            f"too little text: {total} tokens in {count} documents do not fill one training and one validation row "
            f"of {seq_length}; give more text (blank lines separate documents), or a smaller seq_length"
        )
    return found


def _bin(keys: np.ndarray) -> np.ndarray:
    """Which of BINS ranges each key is in, in the order of the keys."""
    return (keys >> 48) + (BINS >> 1)


def duplicates(files: Sequence[Path]) -> list[np.ndarray]:
    """By file, which documents have the text of an earlier one: bool [documents]."""
    starts = np.cumsum([0, *(len(parts.read(file, "keys")[0]) for file in files)])
    dropped = np.zeros(starts[-1], dtype=bool)
    rounds = max(1, -(-len(dropped) // SORTED))
    for number in range(rounds):  # each sorts the keys of some bins, of all files
        keys, places = [], []
        for file, start in zip(files, starts[:-1], strict=True):
            (of_file,) = parts.read(file, "keys")
            here = np.flatnonzero(_bin(of_file) % rounds == number)
            keys.append(of_file[here])
            places.append(here + start)
        found, where = np.concatenate(keys), np.concatenate(places)
        order = np.argsort(found, kind="stable")
        dropped[where[order[np.flatnonzero(np.diff(found[order]) == 0) + 1]]] = True
    return np.split(dropped, starts[1:-1])
