"""From packed rows to micro-batches: masking, the global sample order, and where a run stands in it.

Everything here is a pure function of (seed, epoch, row): no generator is advanced from batch to batch. That is why
worker count, world size and accumulation change nothing, and why a resumed run starts at once, wherever it stopped.

Shapes: B micro-batch, S tokens of a row, N rows of a split.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

Batch = dict[str, torch.Tensor]

IGNORED = -100  # the label of a position that is not predicted, as torch's cross entropy wants it
_ORDER, _MASKS = 0, 1  # random streams that must not meet


def _random_words(stream: int, seed: int, epoch: int, sample: int, count: int) -> np.ndarray:
    """`count` uint64 words at the counter (sample, epoch) of the Philox stream (seed, stream).

    The raw words are used, not numpy's distributions: those may change between numpy versions, and a resumed run must
    not.
    """
    philox = np.random.Philox(
        key=np.array([seed, stream], dtype=np.uint64), counter=np.array([0, sample, epoch, 0], dtype=np.uint64)
    )
    return philox.random_raw(count)


class Masker:
    """BERT's masked-LM corruption of one row, as a function of (seed, epoch, sample) only.

    Of the chosen tokens 80 % become [MASK], 10 % a random word, 10 % stay: the rule of transformers'
    `DataCollatorForLanguageModeling`, with three differences. The number of chosen tokens is fixed by the row's length
    (`labels_per_row`), so that shapes are static; a random word is never a special token; and the pattern does not
    depend on what was masked before. Special tokens (separators inside the row and [UNK] included) are never chosen.

    Args:
        tokenizer: any tokenizer with mask and pad tokens; only its ids are read.
        seed: non-negative.
        mlm_probability: share of a row's tokens that is predicted, in (0, 1).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int, mlm_probability: float = 0.15):
        if not 0 < mlm_probability < 1:
            raise ValueError(f"mlm_probability must lie between 0 and 1 (both excluded), got {mlm_probability}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        if tokenizer.mask_token_id is None or tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no mask or no pad token: masked-LM training needs both")
        self.seed = seed
        self.mlm_probability = mlm_probability
        self.mask_id: int = tokenizer.mask_token_id
        self.pad_id: int = tokenizer.pad_token_id
        ids = np.array(sorted(tokenizer.get_vocab().values()))
        self._words = ids[~np.isin(ids, tokenizer.all_special_ids)]
        self._is_word = np.zeros(ids.max() + 1, dtype=bool)
        self._is_word[self._words] = True

    def labels_per_row(self, length: int) -> int:
        """How many positions of a row with `length` real tokens, [CLS] and [SEP] included, are predicted.

        Separators between documents count as tokens here, though they are never chosen: otherwise full rows would
        differ. Only a row with fewer words than this (nearly all [UNK]) gets fewer.
        """
        return max(1, round(self.mlm_probability * (length - 2)))

    def __call__(self, input_ids: np.ndarray, epoch: int, sample: int) -> tuple[np.ndarray, np.ndarray]:
        """Corrupt one row: input_ids [S] -> corrupted ids and labels, int64 [S]; labels are -100 where not predicted."""
        ids = np.array(input_ids, dtype=np.int64)
        labels = np.full_like(ids, IGNORED)
        candidates = np.flatnonzero(self._is_word[ids])
        count = min(self.labels_per_row(np.count_nonzero(ids != self.pad_id)), len(candidates))

        words = _random_words(_MASKS, self.seed, epoch, sample, len(candidates) + 2 * count)
        rank, fate, replacement = np.split(words, [len(candidates), len(candidates) + count])
        chosen = candidates[np.argsort(rank, kind="stable")[:count]]
        fate = (fate >> np.uint64(11)) * 2.0**-53  # uniform in [0, 1)

        labels[chosen] = ids[chosen]
        random_word = self._words[replacement % np.uint64(len(self._words))]
        ids[chosen] = np.where(fate < 0.8, self.mask_id, np.where(fate < 0.9, random_word, ids[chosen]))
        return ids, labels

    def reseeded(self, seed: int) -> Masker:
        """The same masker with another seed."""
        twin = object.__new__(Masker)
        twin.__dict__.update(self.__dict__, seed=seed)
        return twin


class _MicroBatches(torch.utils.data.Dataset):
    """The endless global sample order, read as `self[offset]`: the micro-batch of the samples offset .. offset + B - 1.

    Sample n is row order(n // N)[n % N]; each epoch is a new permutation of all rows, so a batch may span two epochs.
    """

    def __init__(self, rows: datasets.Dataset, masker: Masker, size: int, seed: int, shuffle: bool):
        self.rows = rows.with_format("numpy", columns=["input_ids"])
        self.masker, self.size, self.seed, self.shuffle = masker, size, seed, shuffle
        self._orders: dict[int, np.ndarray] = {}

    def samples(self, offset: int) -> list[tuple[int, int]]:
        """(epoch, row) of each sample of the micro-batch."""
        return [
            (n // len(self.rows), int(self._order(n // len(self.rows))[n % len(self.rows)]))
            for n in range(offset, offset + self.size)
        ]

    def __getitem__(self, offset: int) -> Batch:
        return _collate(self.rows, self.masker, self.samples(offset))

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            n = len(self.rows)
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = (
                np.argsort(_random_words(_ORDER, self.seed, epoch, 0, n), kind="stable") if self.shuffle else np.arange(n)
            )
        return self._orders[epoch]


def _collate(rows: datasets.Dataset, masker: Masker, samples: list[tuple[int, int]]) -> Batch:
    ids = rows[[row for _, row in samples]]["input_ids"]
    corrupted, labels = np.empty(ids.shape, np.int64), np.empty(ids.shape, np.int64)
    for i, (epoch, sample) in enumerate(samples):
        corrupted[i], labels[i] = masker(ids[i], epoch, sample)
    batch = {"input_ids": torch.from_numpy(corrupted), "labels": torch.from_numpy(labels)}
    real = ids != masker.pad_id
    if not real.all():
        batch["attention_mask"] = torch.from_numpy(real.astype(np.int64))
    return batch


def _ignore_signals(_worker: int) -> None:
    """Ctrl-C and SIGTERM are the trainer's business: workers live on while it saves, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Loader:
    """Endless iterator over this rank's micro-batches, resumable from one integer.

    Optimizer step t takes the global samples [t * G, (t + 1) * G) with G = micro_batch * accumulation * world, so a
    step sees the same samples for every split of the same G. No sample is lost at an epoch's end.

    A micro-batch holds `input_ids` and `labels` (int64 [B, S]) and, only if one of its rows is padded, `attention_mask`
    (int64 [B, S]): full rows keep attention without a mask. Memory is pinned where there is a CUDA device. The global
    torch generator is left alone.

    Args:
        rows: a dataset whose rows hold `input_ids` of one length, e.g. `load(path).train`.
        masker: corrupts the rows; its seed and `seed` may differ.
        rank, world: this process, and how many there are.
        seed: of the order, non-negative.
        shuffle: False keeps the rows' own order in every epoch.
        num_workers: processes that prepare batches ahead; they change speed only.
        start: position to start from.

    Raises:
        ValueError: no rows, a size below 1, a rank outside the world, a negative seed or position.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        masker: Masker,
        *,
        micro_batch: int,
        accumulation: int,
        rank: int,
        world: int,
        seed: int,
        shuffle: bool = True,
        num_workers: int = 0,
        start: int = 0,
    ):
        if len(rows) == 0:
            raise ValueError("the data set has no rows to train on")
        for name, value, least in (
            ("micro_batch", micro_batch, 1),
            ("accumulation", accumulation, 1),
            ("world", world, 1),
            ("seed", seed, 0),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0 <= rank < world:
            raise ValueError(f"rank must lie in [0, {world}), got {rank}")
        self.micro_batch, self.accumulation, self.rank, self.world = micro_batch, accumulation, rank, world
        self.samples_per_step = micro_batch * accumulation * world
        self._batches = _MicroBatches(rows, masker, micro_batch, seed, shuffle)
        self._num_workers = num_workers
        self.load_state_dict({"position": start})

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = iter(
                torch.utils.data.DataLoader(
                    self._batches,
                    sampler=self._offsets(0),
                    batch_size=None,
                    num_workers=self._num_workers,
                    pin_memory=torch.cuda.is_available(),
                    worker_init_fn=_ignore_signals if self._num_workers else None,
                    generator=torch.Generator(),  # else DataLoader draws a seed from the global one, and dropout changes
                )
            )
        batch = next(self._iterator)
        self._taken += 1
        return batch

    @property
    def position(self) -> int:
        """Samples, over all ranks, that finished steps have consumed; a step is finished with its last micro-batch."""
        return self._start + self._taken // self.accumulation * self.samples_per_step

    @property
    def sample_ids(self) -> list[tuple[int, int]]:
        """(epoch, row) of each row of the last micro-batch; empty before the first."""
        return self._batches.samples(next(self._offsets(self._taken - 1))) if self._taken else []

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from a saved position, whatever the batch sizes of the run that saved it."""
        if state["position"] < 0:
            raise ValueError(f"the data position must not be negative, got {state['position']}")
        self._start, self._taken = state["position"], 0
        self._iterator: Iterator[Batch] | None = None

    def _offsets(self, first: int) -> Iterator[int]:
        """Global sample number at which each of this rank's micro-batches begins, from the `first` since `start` on."""
        for micro_step in itertools.count(first):
            step, part = divmod(micro_step, self.accumulation)
            yield self._start + step * self.samples_per_step + (part * self.world + self.rank) * self.micro_batch


def validation_batches(
    rows: datasets.Dataset,
    masker: Masker,
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    max_batches: int | None = None,
) -> Iterator[Batch]:
    """This rank's share of the first `max_batches` batches of a validation split (all of them: None), in the rows' order.

    `max_batches` counts over all ranks, so every world size sees the same rows. Ranks take turns: their numbers of
    batches differ by at most one, and the last batch may be short, so reduce sums and counts, not means. Masks are
    those of epoch 0 and seed 0, whatever the run's seed: losses of different runs are of the same text with the same
    gaps.
    """
    if batch_size < 1 or not 0 <= rank < world:
        raise ValueError(f"expected batch_size >= 1 and 0 <= rank < world, got {batch_size=}, {rank=}, {world=}")
    rows, masker = rows.with_format("numpy", columns=["input_ids"]), masker.reseeded(0)
    starts = range(0, len(rows), batch_size)[:max_batches]
    for first in starts[rank::world]:
        yield _collate(rows, masker, [(0, row) for row in range(first, min(first + batch_size, len(rows)))])
