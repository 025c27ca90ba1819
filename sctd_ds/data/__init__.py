"""Data for masked-LM pretraining: text in, full rows on disk, deterministic micro-batches out.

files        the files of a source, on disk or behind a URL
readers      documents of a piece of a file, by its type
python_docs  English text from the Python installation
sources      what a source's name means, cut into pieces
tokenizer    loading, training, and encoding fast
parts        pieces tokenized together, a checked file each
split        which documents are held out or dropped
rows         parts packed into files of rows
workers      processes, and progress
store        a built data set on disk, and reading it
build        the whole, in one go or in shares of several machines
batches      order and masks of rows
"""

from sctd_ds.data.batches import IGNORED, Loader, Masker, MicroBatch, validation_batches
from sctd_ds.data.builder import build, check, merge, prepare
from sctd_ds.data.files import DataError
from sctd_ds.data.store import Meta, PackedData, check_tokenizer, load, unigram_loss

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
    "merge",
    "prepare",
    "unigram_loss",
    "validation_batches",
]
