"""Data for masked-LM pretraining: text in, full rows on disk, deterministic micro-batches out.

`sources` reads documents, `packed` packs them into rows, `batches` masks and orders the rows.
"""

from sctd_ds.data.batches import Batch, Loader, Masker, validation_batches
from sctd_ds.data.packed import Meta, PackedData, build, check_tokenizer, load, prepare
from sctd_ds.data.sources import DataError

__all__ = [
    "Batch",
    "DataError",
    "Loader",
    "Masker",
    "Meta",
    "PackedData",
    "build",
    "check_tokenizer",
    "load",
    "prepare",
    "validation_batches",
]
