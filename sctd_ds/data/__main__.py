"""Command line: `python -m sctd_ds.data build my.txt --out data/my`, then `python -m sctd_ds.data show data/my`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sctd_ds.data import DataError, PackedData, build, load


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sctd_ds.data", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    defaults = build.__kwdefaults__ or {}

    make = commands.add_parser("build", help="tokenize and pack text", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    make.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help=".txt, .jsonl, .json (also .gz) or .parquet; a folder of them; a Hub data set owner/name[:config]; or "
        "python-docs[:2MB], English text from the Python installation",
    )
    make.add_argument("--out", type=Path, required=True, help="folder to write; it appears complete or not at all")
    make.add_argument(
        "--tokenizer", help="folder or name of an existing tokenizer; without it, WordPiece is trained on the text"
    )
    make.add_argument("--vocab-size", type=int, default=defaults["vocab_size"], help="of a trained tokenizer")
    make.add_argument(
        "--cased",
        dest="lowercase",
        action="store_false",
        default=argparse.SUPPRESS,  # the help would show that of `lowercase`
        help="a trained tokenizer keeps case and accents",
    )
    make.add_argument("--seq-length", type=int, default=defaults["seq_length"], help="tokens per row, special ones included")
    make.add_argument(
        "--validation-fraction",
        type=float,
        default=defaults["validation_fraction"],
        help="share of the tokens held out, by document; at least one row",
    )
    make.add_argument("--seed", type=int, default=defaults["seed"], help="decides which documents are held out")
    make.add_argument("--text-column", default=defaults["text_column"], help="the column of a record that holds the text")
    make.add_argument(
        "--num-proc", type=int, default=defaults["num_proc"], help="processes that tokenize; one already uses all cores"
    )
    make.add_argument("--overwrite", action="store_true", help="replace a data set built earlier at --out")

    show = commands.add_parser("show", help="describe a built data set", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    show.add_argument("path", type=Path, metavar="DIR", help="a built data set")
    show.add_argument("--rows", type=int, default=3, help="training rows to decode")
    show.add_argument("--verify", action="store_true", help="check every file's SHA-256")
    return parser


def _describe(data: PackedData) -> str:
    meta = data.meta
    lines = [
        f"{data.path}  (fingerprint {meta.fingerprint[:16]})",
        f"  sources     {', '.join(meta.sources)}: {meta.documents:,} documents",
        f"  train       {meta.train_rows:,} rows of {meta.seq_length}, {meta.train_tokens:,} tokens",
        f"  validation  {meta.validation_rows:,} rows, {meta.validation_tokens:,} tokens",
        f"  vocabulary  {meta.vocab_size:,} entries, {meta.unknown_share:.3%} of the tokens unknown",
    ]
    wanted = meta.settings["vocab_size"]
    if wanted is not None and meta.vocab_size < wanted:
        lines.append(f"              ({wanted:,} were requested; this text supports no more)")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 0 when done, 2 with one line on stderr for a DataError."""
    options = vars(_parser().parse_args(arguments))
    try:
        if options.pop("command") == "build":
            print(_describe(load(build(options.pop("sources"), options.pop("out"), **options))))
        else:
            data = load(options["path"], verify=options["verify"])
            print(_describe(data))
            for index in range(min(options["rows"], len(data.train))):
                print(f"\nrow {index}: {data.tokenizer.decode(data.train[index]['input_ids'])}")
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
