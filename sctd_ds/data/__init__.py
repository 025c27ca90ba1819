"""Data for masked-LM pretraining: text in, full rows on disk, deterministic micro-batches out.

`sources` reads documents, `packed` packs them into rows, `batches` orders and masks the rows.
"""

from sctd_ds.data.batches import IGNORED, Loader, Masker, MicroBatch, validation_batches
from sctd_ds.data.packed import Meta, PackedData, build, check, check_tokenizer, load, prepare, unigram_loss
from sctd_ds.data.sources import DataError

__all__ = [
    "IGNORED",
    "DataError",
    "Loader",
    "Masker",
    "Meta",
    "MicroBatch",
    "PackedData",
    "build",
    "check",
    "check_tokenizer",
    "load",
    "prepare",
    "unigram_loss",
    "validation_batches",
]
