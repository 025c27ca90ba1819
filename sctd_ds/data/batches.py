"""Micro-batches from packed rows: masking, the global sample order, and a run's position in it.

Everything here is a pure function of (seed, epoch, row): no generator advances from batch to batch. So the number of
workers, the world size and accumulation do not change the data, and a resumed run continues at any position at once.

Shapes: B micro-batch, S tokens of a row, N rows of a split.
"""

from __future__ import annotations

import collections
import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch

from sctd_ds.data.files import DataError

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

MicroBatch = dict[str, torch.Tensor]
"""`input_ids` and `labels`, int64 [B, S]; and `attention_mask`, int64 [B, S], only if a row is padded."""
Sample = tuple[int, int]  # (epoch, row)

IGNORED = -100  # label of a position that is not predicted, the default ignore_index of torch's cross-entropy
_ORDER, _MASKS = 0, 1  # separate random streams


def _random_words(stream: int, seed: int, epoch: int, sample: int, count: int) -> np.ndarray:
    """`count` uint64 words at the counter (sample, epoch) of the Philox stream (seed, stream).

    These are raw words, not draws from numpy's distributions, which may change between numpy versions.
    """
    philox = np.random.Philox(
        key=np.array([seed, stream], dtype=np.uint64), counter=np.array([0, sample, epoch, 0], dtype=np.uint64)
    )
    return philox.random_raw(count)


class Masker:
    """BERT's masked-LM corruption of rows, each a function of (seed, epoch, sample) only.

    Of the chosen tokens 80 % become [MASK], 10 % a random word, 10 % stay: the rule of transformers'
    `DataCollatorForLanguageModeling`, with three differences. The row's length fixes the number of chosen tokens
    (`labels_per_row`), so shapes are static; a random word is never a special token; and the pattern does not
    depend on earlier rows. Special tokens, including [UNK] and the separators inside a row, are never chosen.

    Args:
        tokenizer: any tokenizer with mask and pad tokens; the masker reads only its ids.
        seed: non-negative.
        mlm_probability: share of a row's tokens to predict, in (0, 1).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int, mlm_probability: float = 0.15):
        if not 0 < mlm_probability < 1:
            raise ValueError(f"mlm_probability must lie between 0 and 1 (both excluded), got {mlm_probability}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        if tokenizer.mask_token_id is None or tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer lacks a mask or a pad token: masked-LM training needs both")
        self.seed = seed
        self.mlm_probability = mlm_probability
        self.mask_id: int = tokenizer.mask_token_id
        self.pad_id: int = tokenizer.pad_token_id
        ids = np.array(sorted(tokenizer.get_vocab().values()))
        self._words = ids[~np.isin(ids, tokenizer.all_special_ids)]
        self._is_word = np.zeros(ids.max() + 1, dtype=bool)
        self._is_word[self._words] = True

    def labels_per_row(self, length: int) -> int:
        """Number of predicted positions in a row with `length` real tokens, [CLS] and [SEP] included.

        Separators between documents count as tokens here, although they are never chosen, so that all full
        rows have the same number. Only a row with fewer words than this (nearly all [UNK]) gets fewer labels.
        """
        return max(1, round(self.mlm_probability * (length - 2)))

    def __call__(self, input_ids: np.ndarray, samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
        """Corrupt rows: input_ids [B, S] and the (epoch, sample) of each -> corrupted ids and labels, int64 [B, S].

        Labels are the original ids where a token is predicted and -100 elsewhere. Raises DataError for an id that is not of
        the tokenizer.
        """
        ids = np.array(input_ids, dtype=np.int64)
        if ids.min() < 0 or ids.max() >= len(self._is_word):
            row, place = np.argwhere((ids < 0) | (ids >= len(self._is_word)))[0]
            raise DataError(
                f"row {samples[row][1]} of the data holds the id {ids[row, place]}, and the tokenizer's go from 0 to "
                f"{len(self._is_word) - 1}: the data are damaged, or were built with another tokenizer; build them again"
            )
        labels = np.full_like(ids, IGNORED)
        candidate = self._is_word[ids]
        lengths = np.count_nonzero(ids != self.pad_id, axis=1)
        wanted = [self.labels_per_row(int(length)) for length in lengths]
        counts = np.minimum(wanted, np.count_nonzero(candidate, axis=1))

        seq_length, most = ids.shape[1], max(wanted)
        words = np.stack([_random_words(_MASKS, self.seed, *sample, seq_length + 2 * most) for sample in samples])
        # The draws of a row must not depend on the other rows of the batch: keys by position, the rest by rank.
        keys, fates, replacements = words[:, :seq_length], words[:, seq_length::2], words[:, seq_length + 1 :: 2]
        positions = np.argsort(np.where(candidate, keys, np.uint64(2**64 - 1)), axis=1)[:, :most]
        row, rank = np.nonzero(np.arange(positions.shape[1]) < counts[:, None])
        chosen = row, positions[row, rank]

        fate = (fates[row, rank] >> np.uint64(11)) * 2.0**-53  # uniform in [0, 1)
        random_word = self._words[replacements[row, rank] % np.uint64(len(self._words))]
        labels[chosen] = ids[chosen]
        ids[chosen] = np.where(fate < 0.8, self.mask_id, np.where(fate < 0.9, random_word, ids[chosen]))
        return ids, labels

    def reseeded(self, seed: int) -> Masker:
        """The same masker with another seed."""
        masker = copy.copy(self)
        masker.seed = seed
        return masker


def _collate(rows: datasets.Dataset, masker: Masker, samples: Sequence[Sample]) -> MicroBatch:
    ids = rows[[row for _, row in samples]]["input_ids"]
    corrupted, labels = masker(ids, samples)
    batch = {"input_ids": torch.from_numpy(corrupted), "labels": torch.from_numpy(labels)}
    real = ids != masker.pad_id
    if not real.all():
        batch["attention_mask"] = torch.from_numpy(real.astype(np.int64))
    return batch


class Loader:
    """Endless iterator over this rank's micro-batches, resumable from one integer.

    Optimizer step t takes the global samples [t * G, (t + 1) * G) with G = micro_batch * accumulation * world,
    so a step sees the same samples for every split of the same G. Each epoch visits every row once, in a new
    random order; a micro-batch may span two epochs, so no row is dropped.

    A micro-batch has an `attention_mask` only if one of its rows is padded, so attention over full rows needs no mask.
    Memory is pinned if there is a CUDA device. The loader does not use the global random generators.

    Args:
        rows: a dataset whose rows hold `input_ids` of one length, e.g. `load(path).train`.
        masker: corrupts the rows; its seed and `seed` may differ.
        rank, world: this process, and the number of processes.
        seed: of the order, non-negative.
        num_workers: threads that prepare micro-batches ahead; they change speed only. Threads suffice, as numpy does
            the work; processes would fork beside CUDA and would receive the signals that tell the trainer to save.
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
        self._rows, self._masker = rows.with_format("numpy", columns=["input_ids"]), masker
        self._num_workers = num_workers
        self._workers = ThreadPoolExecutor(num_workers, thread_name_prefix="data") if num_workers else None
        self._ahead: collections.deque[Future[MicroBatch]] = collections.deque()
        # A micro-batch may span two epochs.
        self._order = functools.lru_cache(maxsize=2)(functools.partial(_epoch_order, seed, len(rows)))
        self.load_state_dict({"position": start})

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> MicroBatch:
        if self._workers is None:
            batch = self._prepare(self._taken)
        else:
            while len(self._ahead) <= 2 * self._num_workers:
                self._ahead.append(self._workers.submit(self._prepare, self._taken + len(self._ahead)))
            batch = self._ahead.popleft().result()
        self._taken += 1
        if not torch.cuda.is_available():
            return batch
        # A worker thread must not pin: it would open a context on GPU 0, whichever GPU this rank uses.
        return {name: tensor.pin_memory() for name, tensor in batch.items()}

    @property
    def position(self) -> int:
        """Samples, over all ranks, that finished steps have consumed; the last micro-batch finishes a step."""
        return self._start + self._taken // self.accumulation * self.samples_per_step

    @property
    def sample_ids(self) -> list[Sample]:
        """(epoch, row) of each row of the last micro-batch; empty before the first."""
        return self._samples(self._taken - 1) if self._taken else []

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from a saved position, whatever the batch sizes of the run that saved it."""
        if state["position"] < 0:
            raise ValueError(f"the data position must not be negative, got {state['position']}")
        self._start, self._taken = state["position"], 0
        self._ahead.clear()

    def rows_of(self, samples: range) -> list[Sample]:
        """(epoch, row) of samples by their numbers in the global order, as positions count them."""
        numbers = (divmod(n, len(self._rows)) for n in samples)
        return [(epoch, int(self._order(epoch)[n])) for epoch, n in numbers]

    def _samples(self, index: int) -> list[Sample]:
        """Samples of this rank's micro-batch number `index` since `_start`, adjacent in the global order."""
        step, part = divmod(index, self.accumulation)
        first = self._start + step * self.samples_per_step + (part * self.world + self.rank) * self.micro_batch
        return self.rows_of(range(first, first + self.micro_batch))

    def _prepare(self, index: int) -> MicroBatch:
        return _collate(self._rows, self._masker, self._samples(index))


def _epoch_order(seed: int, count: int, epoch: int) -> np.ndarray:
    """The order of `count` rows in one epoch."""
    return np.argsort(_random_words(_ORDER, seed, epoch, 0, count), kind="stable")


def validation_batches(
    rows: datasets.Dataset,
    masker: Masker,
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    max_batches: int | None = None,
) -> Iterator[MicroBatch]:
    """This rank's share of the first `max_batches` batches (None: all) of a validation split, in the rows' order.

    `max_batches` counts over all ranks, so every world size sees the same rows. Ranks take turns: their numbers of
    batches differ by at most one, and the last batch may be short, so reduce sums and counts, not means. Masks are
    those of epoch 0 and seed 0, whatever the run's seed, so losses of different runs refer to the same masked text.
    """
    if batch_size < 1 or not 0 <= rank < world:
        raise ValueError(f"expected batch_size >= 1 and 0 <= rank < world, got {batch_size=}, {rank=}, {world=}")
    rows, masker = rows.with_format("numpy", columns=["input_ids"]), masker.reseeded(0)
    starts = range(0, len(rows), batch_size)[:max_batches]
    for first in starts[rank::world]:
        yield _collate(rows, masker, [(0, row) for row in range(first, min(first + batch_size, len(rows)))])
