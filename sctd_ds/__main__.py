"""The command `sctd`, which is also `python -m sctd_ds`."""

from __future__ import annotations

import argparse
import logging
import pkgutil
import sys
from collections.abc import Sequence

from sctd_ds import __version__

COMMANDS = {
    "pretrain": ("sctd_ds.pretrain:run_and_report", "pretrain a BERT, or continue from one"),
    "data": ("sctd_ds.data.__main__:main", "build training data from text, and describe it"),
    "compare": ("sctd_ds.compare:main", "finished runs side by side"),
    "eval": ("sctd_ds.eval.__main__:main", "fine-tune, probe and compare pretrained models"),
    "push": ("sctd_ds.integrations.hub:main", "upload a run's model to the Hugging Face Hub"),
    "doctor": ("sctd_ds.doctor:main", "what is wrong with a DeepSpeed JSON file, and a repaired copy"),
}
"""Functions of arguments that return an exit status, imported when they are used; and what they do."""

UNDERSTOOD = (
    "Setting accelerator to CPU.",  # a run says in its first line what it trains on
    "Attempting to get learning rate from scheduler before it has started",  # as DeepSpeed itself does in its constructors
)
"""Beginnings of DeepSpeed's warnings that ask nobody to do anything."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items())
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("sctd", description=f"{__doc__}\n\n{listed}", formatter_class=as_written)
    parser.add_argument("--version", action="version", version=f"sctd_ds {__version__}")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # `deepspeed --module sctd_ds` puts it first
    parser.add_argument(
        "command", choices=COMMANDS, metavar="COMMAND", help="one of these; COMMAND --help describes its options"
    )
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="...", help="of the command")
    given = parser.parse_args(arguments)
    logging.getLogger("DeepSpeed").addFilter(lambda record: not record.getMessage().startswith(UNDERSTOOD))
    return pkgutil.resolve_name(COMMANDS[given.command][0])(given.options)


if __name__ == "__main__":
    sys.exit(main())
