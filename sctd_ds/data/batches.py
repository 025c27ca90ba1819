"""From packed rows to micro-batches: masking, the global sample order, and where a run stands in it.

Everything here is a pure function of (seed, epoch, row): no generator is advanced from batch to batch. That is why
worker count, world size and accumulation change nothing, and why a resumed run starts at once, wherever it stopped.

Shapes: B micro-batch, S tokens of a row, N rows of a split.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

Batch = dict[str, torch.Tensor]
Sample = tuple[int, int]  # (epoch, row)

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
    """BERT's masked-LM corruption of rows, each a function of (seed, epoch, sample) only.

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

        Separators between documents count as tokens here, though they are never chosen: otherwise full rows would differ.
        Only a row with fewer words than this (nearly all [UNK]) gets fewer.
        """
        return max(1, round(self.mlm_probability * (length - 2)))

    def __call__(self, input_ids: np.ndarray, samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
        """Corrupt rows: input_ids [B, S] and the (epoch, sample) of each -> corrupted ids and labels, int64 [B, S].

        Labels are the original ids where a token is predicted and -100 elsewhere.
        """
        ids = np.array(input_ids, dtype=np.int64)
        labels = np.full_like(ids, IGNORED)
        candidate = self._is_word[ids]
        lengths = np.count_nonzero(ids != self.pad_id, axis=1)
        wanted = [self.labels_per_row(int(length)) for length in lengths]
        counts = np.minimum(wanted, np.count_nonzero(candidate, axis=1))

        seq_length, most = ids.shape[1], max(wanted)
        words = np.stack([_random_words(_MASKS, self.seed, *sample, seq_length + 2 * most) for sample in samples])
        # The draws of a row must not depend on its companions in the batch: keys by position, the rest by rank.
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
        twin = object.__new__(Masker)
        twin.__dict__.update(self.__dict__, seed=seed)
        return twin


def _collate(rows: datasets.Dataset, masker: Masker, samples: Sequence[Sample]) -> Batch:
    ids = rows[[row for _, row in samples]]["input_ids"]
    corrupted, labels = masker(ids, samples)
    batch = {"input_ids": torch.from_numpy(corrupted), "labels": torch.from_numpy(labels)}
    real = ids != masker.pad_id
    if not real.all():
        batch["attention_mask"] = torch.from_numpy(real.astype(np.int64))
    return batch


class Loader:
    """Endless iterator over this rank's micro-batches, resumable from one integer.

    Optimizer step t takes the global samples [t * G, (t + 1) * G) with G = micro_batch * accumulation * world, so a
    step sees the same samples for every split of the same G. No sample is lost at an epoch's end.

    A micro-batch holds `input_ids` and `labels` (int64 [B, S]) and, only if one of its rows is padded, `attention_mask`
    (int64 [B, S]): full rows keep attention without a mask. Memory is pinned where there is a CUDA device. The global
    generators are left alone.

    Args:
        rows: a dataset whose rows hold `input_ids` of one length, e.g. `load(path).train`.
        masker: corrupts the rows; its seed and `seed` may differ.
        rank, world: this process, and how many there are.
        seed: of the order, non-negative.
        shuffle: False keeps the rows' own order in every epoch.
        num_workers: threads that prepare batches ahead; they change speed only. Threads, because numpy does the work, and
            because processes would be forked beside CUDA and would get the signals that tell the trainer to save.
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
        self._rows, self._masker = rows.with_format("numpy", columns=["input_ids"]), masker
        self._num_workers = num_workers
        self._workers = ThreadPoolExecutor(num_workers, thread_name_prefix="data") if num_workers else None
        self._ahead: collections.deque[Future[Batch]] = collections.deque()

        @functools.lru_cache(maxsize=2)  # a batch may span two epochs
        def order(epoch: int) -> np.ndarray:
            count = len(rows)
            if not shuffle:
                return np.arange(count)
            return np.argsort(_random_words(_ORDER, seed, epoch, 0, count), kind="stable")

        self._order = order
        self.load_state_dict({"position": start})

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        if self._workers is None:
            batch = self._prepare(self._taken)
        else:
            while len(self._ahead) <= 2 * self._num_workers:
                self._ahead.append(self._workers.submit(self._prepare, self._taken + len(self._ahead)))
            batch = self._ahead.popleft().result()
        self._taken += 1
        # Pinned here, as a worker thread would open a context on GPU 0, whatever this rank's GPU is.
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if torch.cuda.is_available() else batch

    @property
    def position(self) -> int:
        """Samples, over all ranks, that finished steps have consumed; a step is finished with its last micro-batch."""
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

    def _samples(self, index: int) -> list[Sample]:
        """Samples of this rank's micro-batch number `index` since `_start`, neighbours in the global order."""
        step, part = divmod(index, self.accumulation)
        first = self._start + step * self.samples_per_step + (part * self.world + self.rank) * self.micro_batch
        numbers = (divmod(n, len(self._rows)) for n in range(first, first + self.micro_batch))
        return [(epoch, int(self._order(epoch)[n])) for epoch, n in numbers]

    def _prepare(self, index: int) -> Batch:
        return _collate(self._rows, self._masker, self._samples(index))


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
