"""Every command in README and docs: its program, its options and its files exist, and the cheap ones run."""

import argparse
import importlib
import itertools
import pkgutil
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import ROOT
from sctd_ds.__main__ import COMMANDS
from sctd_ds.run import settings

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LAUNCHERS = {"deepspeed", "torchrun", "accelerate", "srun"}
MADE = ("runs/", "data/", "my.txt", "more.jsonl", "corpus/", "text.txt", "deepspeed_config.json", "hosts")
"""Beginnings of paths that a reader has, or that an earlier command makes."""


def blocks(page: Path) -> Iterator[str]:
    """The lines of ```bash blocks, and commands of ours within the text."""
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL):
        yield from block.replace("\\\n", " ").splitlines()
    yield from re.findall(
        r"`((?:python -m (?:sctd_ds|benchmarks)|sctd|deepspeed|torchrun|accelerate launch|srun) [^`]*)`", text
    )


def commands() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for line in blocks(page):
            words = " ".join(shlex.split(line, comments=True))
            if words and "..." not in words:
                yield f"{page.name}: {words}", words


COMMANDS_OF_PAGES = sorted(set(commands()))


class Parsed(Exception):
    """The options of a command were understood."""


@pytest.fixture
def parser_stops(monkeypatch):
    """Make the first complete parse end the program."""
    parse = argparse.ArgumentParser.parse_args

    def stop(self, args=None, namespace=None):
        found = parse(self, args, namespace)
        if self.prog != "sctd":  # that one hands the options on
            raise Parsed(found)
        return found

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)


def target(words: list[str]) -> tuple[str, list[str]] | None:
    """The function that a command calls, as "module:function", and its arguments; None for a program that is not ours."""
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    words = ["python" if word == "python3" else word for word in words]
    if words[0] in LAUNCHERS:
        ours = next((i for i, word in enumerate(words) if word in ("pretrain.py", "sctd_ds", "sctd")), None)
        assert ours is not None, f"a launcher without a program: {words}"
        words = words[ours:]
        if words[0] == "sctd_ds":
            words = ["sctd", *words[1:]]
    if words[0] == "pretrain.py" or words[:2] == ["python", "pretrain.py"]:
        return COMMANDS["pretrain"][0], words[words.index("pretrain.py") + 1 :]
    if words[0] == "sctd":
        return "sctd_ds.__main__:main", words[1:]
    if words[:2] == ["python", "-m"] and words[2] != "pip":
        module = words[2]
        if pkgutil.resolve_name(module).__spec__.submodule_search_locations is not None:
            module += ".__main__"
        return f"{module}:main", words[3:]
    return None


@pytest.mark.parametrize(("name", "command"), COMMANDS_OF_PAGES, ids=[name for name, _ in COMMANDS_OF_PAGES])
def test_a_documented_command_is_understood(name, command, parser_stops, monkeypatch, capsys):
    words = command.split()
    called = target(words)
    if called is None:
        assert known_program(words), f"{name}: say in this test what `{words[0]}` is"
        return
    function, arguments = called
    if "|" in arguments:
        arguments = arguments[: arguments.index("|")]
    with pytest.raises((Parsed, SystemExit)) as ended:
        entry = pkgutil.resolve_name(function)
        entry(arguments)
    if isinstance(ended.value, SystemExit):
        assert ended.value.code == 0 and "--help" in arguments, capsys.readouterr().err
        return
    options = vars(ended.value.args[0])
    if config := options.get("deepspeed_config"):
        made = config.startswith(MADE)
        assert made or Path(ROOT / config).is_file() or config in settings.shipped(), config


def known_program(words: list[str]) -> bool:
    """Whether a command is one of others' programs that needs no check, or names what we have."""
    if words[0] == "make":
        return words[1] in re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    words = words[2:] if words[:2] == ["python3", "-m"] else words
    if words[0] == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = itertools.chain.from_iterable(re.findall(r"\[([\w,]+)\]", word)[0].split(",") for word in words if "[" in word)
        return words[1] == "install" and set(named) <= set(extras)
    if words[0] in ("sbatch", "bash"):
        return (ROOT / words[1]).is_file()
    if words[0].endswith(".sh"):
        return (ROOT / words[0]).is_file()
    return words[0] in ("export", "git", "cd", "pre-commit")


def test_links_to_files_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.mark.parametrize("file", sorted((ROOT / "examples").iterdir()), ids=lambda file: file.name)
def test_examples_are_in_order(file):
    """The script parses, and the Dockerfile copies and starts what there is."""
    if file.suffix == ".sbatch":
        subprocess.run(["bash", "-n", file], check=True)
        return
    text = file.read_text()
    for sources in re.findall(r"^COPY (.*) \S+$", text, flags=re.MULTILINE):
        assert all((ROOT / source).exists() for source in sources.split()), sources
    (start,) = re.findall(r"^CMD \[(.*)\]$", text, flags=re.MULTILINE)
    program, name, *_ = (word.strip(' "') for word in start.split(","))
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert importlib.import_module(scripts[program].partition(":")[0]) and name in COMMANDS
