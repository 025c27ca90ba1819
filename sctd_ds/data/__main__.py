"""Command line: `python -m sctd_ds.data build my.txt --out data/my`, then `python -m sctd_ds.data show data/my`."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from sctd_ds.data import DataError, PackedData, build, load, merge
from sctd_ds.data.sources import size_of


def _size(text: str) -> int:
    try:
        return size_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _share(text: str) -> tuple[int, int]:
    try:
        number, _, count = text.partition("/")
        return int(number), int(count)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected I/N, such as 1/4, got {text!r}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sctd_ds.data", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    defaults = build.__kwdefaults__ or {}

    make = commands.add_parser(
        "build",
        help="tokenize and pack text",
        description="Tokenize and pack text. A build that was killed goes on when the same command is given again.",
    )
    make.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help=".txt, .jsonl, .json, .csv, .tsv (also .gz, .zst, .xz), .parquet, .arrow; a folder of them; a URL of either; a "
        "Hub data set owner/name[:config]; - for standard input, -.jsonl for another type than text; or python-docs[:2MB], "
        "English text from the Python installation. A table with input_ids instead of text is taken as tokenized",
    )
    make.add_argument("--out", type=Path, required=True, help="folder to write; it appears complete or not at all")
    make.add_argument("--tokenizer", help="folder or name of a tokenizer; without it, WordPiece is trained on a sample")
    make.add_argument(
        "--vocab-size", type=int, default=defaults["vocab_size"], help="of a trained tokenizer (default: %(default)s)"
    )
    make.add_argument("--cased", dest="lowercase", action="store_false", help="a trained tokenizer keeps case and accents")
    make.add_argument(
        "--tokenizer-sample",
        type=_size,
        default=defaults["tokenizer_sample"],
        metavar="SIZE",
        help="text, chosen by the seed, that a tokenizer is trained on (default: 1GB)",
    )
    make.add_argument(
        "--seq-length",
        type=int,
        default=defaults["seq_length"],
        help="tokens per row, [CLS] and [SEP] included (default: %(default)s)",
    )
    make.add_argument(
        "--validation-fraction",
        type=float,
        default=defaults["validation_fraction"],
        help="share of the tokens held out, by document; at least one row (default: %(default)s)",
    )
    make.add_argument(
        "--seed", type=int, default=defaults["seed"], help="decides what is held out and the sample (default: %(default)s)"
    )
    make.add_argument(
        "--text-column",
        default=defaults["text_column"],
        help="the column of a record that holds the text (default: %(default)s)",
    )
    make.add_argument("--dedup", action="store_true", help="drop documents whose text was there before, and count them")
    make.add_argument(
        "--shard", type=_share, metavar="I/N", help="the I-th of N shares, for as many machines; then `merge` the folders"
    )

    join = commands.add_parser("merge", help="make one data set of all shares of a build")
    join.add_argument("shares", nargs="+", type=Path, metavar="DIR", help="what `build --shard` wrote")
    join.add_argument("--out", type=Path, required=True, help="folder to write; it appears complete or not at all")
    for command in (make, join):
        command.add_argument("--num-proc", type=int, help="processes; they change speed only (default: one per core)")
        command.add_argument("--overwrite", action="store_true", help="replace a data set built earlier at --out")

    show = commands.add_parser("show", help="describe a built data set")
    show.add_argument("path", type=Path, metavar="DIR", help="a built data set")
    show.add_argument("--rows", type=int, default=3, help="training rows to decode (default: %(default)s)")
    show.add_argument("--verify", action="store_true", help="check every file's SHA-256")
    return parser


def _describe(data: PackedData) -> str:
    meta = data.meta
    duplicates = f" ({meta.duplicates:,} duplicates dropped)" if meta.settings.get("dedup") else ""
    lines = [
        f"{data.path}  (fingerprint {meta.fingerprint[:16]})",
        f"  sources     {', '.join(meta.sources)}: {meta.documents:,} documents{duplicates}",
        f"  train       {meta.train_rows:,} rows of {meta.seq_length}, {meta.train_tokens:,} tokens",
        f"  validation  {meta.validation_rows:,} rows, {meta.validation_tokens:,} tokens",
        f"  vocabulary  {meta.vocab_size:,} entries, {meta.unknown_share:.3%} of the tokens unknown",
    ]
    wanted = meta.settings["vocab_size"]
    if wanted is not None and meta.vocab_size < wanted:
        lines.append(f"              ({wanted:,} were requested; this text supports no more)")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 0 when done, 2 with one line on stderr for a DataError, 130 after Ctrl-C."""
    options = vars(_parser().parse_args(arguments))
    command = options.pop("command")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        if command == "build":
            out = build(options.pop("sources"), options.pop("out"), **options)
            share = options["shard"]
            print(f"{out}: share {share[0]} of {share[1]}" if share else _describe(load(out)))
        elif command == "merge":
            print(_describe(load(merge(options.pop("shares"), options.pop("out"), **options))))
        else:
            data = load(options["path"], verify=options["verify"])
            print(_describe(data))
            for index in range(min(options["rows"], len(data.train))):
                print(f"\nrow {index}: {data.tokenizer.decode(data.train[index]['input_ids'])}")
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
