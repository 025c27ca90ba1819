"""Attack a small run of pretrain.py from all sides, and count what held.

    make torture                                          # ten minutes
    make torture ARGS="--hours 8 --seed 3 --only kills"   # one kind; kills:17 repeats one attack

An attack is a function of a yard and a seeded generator. It returns in peace if the run held: it went on to the end where an
undisturbed run ends, bit for bit, or was refused in words. Otherwise it raises `Broken`, with the way in which it broke.

A run of one process is forked from a server that has imported what it needs, so a kill takes seconds, and imports, which
write nothing, are not attacked.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import psutil
import torch.utils.cpp_extension

from helpers import ROOT, mutations
from helpers.launch import free_port, launch_command, launch_environment, run_pretrain
from helpers.runs import assert_same_end, build_small_data, settings, write_settings
from sctd_ds import data
from sctd_ds.config import ConfigError
from sctd_ds.data import DataError
from sctd_ds.engine import checkpoint
from sctd_ds.run import job, metrics

WAYS = ("hang", "traceback", "silent")
"""How a run breaks: it does not end; it ends in a traceback; it takes what is damaged for good, or ends elsewhere."""
PATIENCE = 300
"""Seconds in which any launch and any build ends, also on a busy machine."""
REFUSED = 2
"""Exit status of pretrain.py for bad input."""

Attack = Callable[["Yard", random.Random], None]
ATTACKS: dict[str, tuple[Attack, int]] = {}
"""By kind: the attack, and how many of it take a turn."""


class Broken(Exception):
    """The run broke, in one of `WAYS`."""

    def __init__(self, way: str, what: str) -> None:
        super().__init__(what)
        self.way = way


def attack(repeat: int = 1) -> Callable[[Attack], Attack]:
    """Register a function under its name as a kind of attack."""

    def register(function: Attack) -> Attack:
        ATTACKS[function.__name__] = (function, repeat)
        return function

    return register


@dataclass
class Launch:
    """A started launch."""

    process: subprocess.Popen[bytes] | ForkServerProcess
    log: Path
    port: str

    def tree(self) -> list[psutil.Process]:
        """The processes of the launch that are alive."""
        with contextlib.suppress(psutil.NoSuchProcess):
            top = psutil.Process(self.process.pid)
            return [top, *top.children(recursive=True)]
        return []

    def status(self, seconds: float = 0) -> int | None:
        """Exit status, if the launch ends in so many seconds."""
        if isinstance(self.process, ForkServerProcess):
            self.process.join(seconds)
            return self.process.exitcode
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(seconds)
        return None

    def wait(self) -> tuple[int, str]:
        """Exit status and output. Raises Broken for a launch that does not end."""
        status = self.status(PATIENCE)
        if status is None:
            raise Broken("hang", f"did not end within {PATIENCE} s: {self.text()[-200:]}")
        return status, self.text()

    def text(self) -> str:
        return self.log.read_text(errors="replace")


class Yard:
    """A folder with small data, the settings of a small run, and that run undisturbed; and every process that was started."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.launches = folder, list[Launch]()
        self._known: dict[int, psutil.Process] = {}
        self.data = build_small_data(folder)
        self.file = write_settings(folder / "mini.json", pretrain={"steps": 8, "validation_every": 3})
        self.extensions = folder / "extensions"  # a kill during a compilation must not lock that of others
        compiled = Path(torch.utils.cpp_extension._get_build_directory("deepspeed_shm_comm", verbose=False)).parent
        shutil.copytree(compiled, self.extensions, ignore=shutil.ignore_patterns("lock"))
        leaks = "ignore::UserWarning:multiprocessing.resource_tracker"  # which names what a killed process left
        os.environ.update(launch_environment(), TORCH_EXTENSIONS_DIR=str(self.extensions), PYTHONWARNINGS=leaks)
        self._server = multiprocessing.get_context("forkserver")
        self._server.set_forkserver_preload(["helpers.launch", "sctd_ds.pretrain"])
        self.whole = folder / "whole"
        status, text = self.start(self.whole).wait()
        assert status == 0, text[-3000:]

    def start(self, output: Path, *arguments: object, ranks: int = 0) -> Launch:
        """Start the run in `output`: one rank without a launcher, or `ranks` of them with one."""
        common = ["--deepspeed_config", self.file, "--data", self.data, "--output", output, *arguments]
        log = self.folder / f"launch_{len(self.launches)}.log"
        if ranks:
            command = launch_command(ROOT / "pretrain.py", *common, ranks=ranks)
            port = command[command.index("--master_port") + 1]
            environment = {**launch_environment(), "PYTHONUNBUFFERED": "1"}
            with log.open("wb") as file:
                how = {"stdout": file, "stderr": subprocess.STDOUT, "cwd": self.folder, "env": environment}
                process = subprocess.Popen(command, start_new_session=True, **how)
        else:
            port = str(free_port())
            process = self._server.Process(target=run_pretrain, args=(common, log, self.folder, port))
            process.start()
        self.launches.append(Launch(process, log, port))
        return self.launches[-1]

    def finish(self, output: Path, *arguments: object, ranks: int = 0) -> None:
        """Start the run again: it must end where the undisturbed one did. Raises Broken."""
        status, text = self.start(output, *arguments, ranks=ranks).wait()
        if status != 0:
            raise Broken(broken_by(text), f"the same command ended with {status}: {text[-300:]}")
        if ranks < 2:  # two ranks round otherwise
            try:
                assert_same_end(self.whole, output)
            except AssertionError as error:
                raise Broken("silent", f"ended elsewhere than the undisturbed run: {str(error)[:200]}") from None

    def stopped_run(self, output: Path, step: int) -> list[Path]:
        """The undisturbed run as it was after `step`; returns its checkpoints."""
        shutil.copytree(self.whole / "checkpoints", output / "checkpoints")
        for saved in checkpoint.kept(output / "checkpoints")[step:]:
            shutil.rmtree(saved)
        shutil.copy(self.whole / "metrics.jsonl", output)
        return checkpoint.kept(output / "checkpoints")

    def remember(self) -> None:
        """Note the processes of all launches, to end them even when their parents are gone."""
        for launch in self.launches:
            self._known |= {process.pid: process for process in launch.tree()}

    def close(self) -> None:
        """End what was started, and only that; its shared memory goes with it."""
        self.remember()
        for process in self._known.values():
            with contextlib.suppress(psutil.NoSuchProcess):  # psutil tells a process from a later one with its number
                process.kill()
        for launch in self.launches:
            launch.status(PATIENCE)
            for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_{launch.port}_*"):
                left.unlink()
        self.launches.clear()
        self._known.clear()


def broken_by(text: str) -> str:
    return "traceback" if "Traceback" in text else "silent"


def expect_words(status: int, text: str, *allowed: int) -> None:
    """Raises Broken unless a launch ended with one of these statuses, and in words."""
    if "Traceback" in text:
        raise Broken("traceback", text[text.index("Traceback") :][-300:])
    if status not in allowed:
        raise Broken("silent", f"ended with {status} instead of {allowed}: {text[-300:]}")


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """Broken for what this process itself does not end."""

    def ring(number: int, frame: object) -> None:
        raise Broken("hang", f"did not end within {PATIENCE} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def damage(file: Path, random_: random.Random) -> str:
    """Change a file as a disk, a copy or a person does; returns how."""
    content = bytearray(file.read_bytes())
    at = random_.randrange(max(len(content), 1))
    how = random_.choice(["flip", "flip", "flip", "cut", "append", "empty", "zeros", "delete"])
    if how == "delete":
        file.unlink()
        return f"{file.name}: deleted"
    if how == "flip" and content:
        content[at] ^= 1 << random_.randrange(8)
    elif how == "zeros" and any(content[at : at + 512]):
        content[at : at + 512] = bytes(len(content[at : at + 512]))
    elif how == "cut":
        del content[at:]
    elif how == "empty":
        content.clear()
    else:
        content += random_.randbytes(1 + at % 100)
    file.write_bytes(content)
    return f"{file.name}: {how} at {at}"


# Attacks without a launch


@attack(repeat=50)
def configurations(yard: Yard, random_: random.Random) -> None:
    """A damaged configuration is loaded or refused in one line."""
    files = [json.loads(file.read_text()) for file in sorted((ROOT / "ds_configs").glob("*.json"))]
    shipped = random_.choice([settings(), *files])
    shipped["pretrain"]["model"] = random_.choice(["bert-base", settings()["pretrain"]["model"]])
    config, change = mutations.mutated(shipped, random_, random_.choice([1, 1, 2, 3]))
    file = yard.folder / "damaged.json"
    file.write_text(mutations.as_text(config))
    try:
        job.load(file, world_size=shipped["pretrain"].get("stages", 1))
    except ConfigError as error:
        if "\n" in str(error):
            raise Broken("traceback", f"{change}: several lines: {error}") from None


@attack(repeat=20)
def files(yard: Yard, random_: random.Random) -> None:
    """A checkpoint with a damaged, missing, foreign or swapped file is not taken for good."""
    folder = yard.folder / "checkpoint"
    shutil.copytree(checkpoint.kept(yard.whole / "checkpoints")[-1], folder)
    try:
        names = sorted(folder.iterdir())
        one, other = random_.sample(names, 2)
        how = random_.randrange(8)
        if how == 0:
            (folder / one.name.replace("0", "7")).write_bytes(random_.randbytes(100))
            what = f"{one.name.replace('0', '7')}: foreign"
        elif how == 1:
            content = one.read_bytes()
            one.write_bytes(other.read_bytes())
            other.write_bytes(content)
            what = f"{one.name} and {other.name}: swapped"
        else:
            what = damage(one, random_)
        same = all(_parsed(file) == _parsed(yard_file) for file, yard_file in _pairs(folder, yard))
        if not same and checkpoint.verify(folder) is None:
            raise Broken("silent", f"{what}: verified")
    finally:
        shutil.rmtree(folder)


def _pairs(folder: Path, yard: Yard) -> list[tuple[Path, Path]]:
    original = checkpoint.kept(yard.whole / "checkpoints")[-1]
    return [(folder / name, original / name) for name in {path.name for at in (folder, original) for path in at.iterdir()}]


def _parsed(file: Path) -> object:
    """What a file says: a space more in a JSON file is no damage."""
    if not file.exists():
        return None
    with contextlib.suppress(ValueError, RecursionError):
        if file.name == checkpoint.manifest(file.parent).name:
            return json.loads(file.read_bytes())
    return file.read_bytes()


@attack(repeat=20)
def metrics_file(yard: Yard, random_: random.Random) -> None:
    """Damaged metrics are read as far as they can be, or refused in words."""
    copy = yard.folder / "metrics.jsonl"
    shutil.copy(yard.whole / "metrics.jsonl", copy)
    what = damage(copy, random_)
    count = len((yard.whole / "metrics.jsonl").read_bytes().splitlines())
    if len(metrics.read(copy)) > count + 1:
        raise Broken("silent", f"{what}: more records than were written")


@attack(repeat=10)
def data_files(yard: Yard, random_: random.Random) -> None:
    """Damaged training data are refused."""
    folder = yard.folder / "data"
    shutil.copytree(yard.data, folder)
    try:
        listed = [folder / name for name in json.loads((folder / "meta.json").read_text())["files"]]
        what = damage(random_.choice(listed), random_)
        with contextlib.suppress(DataError):
            data.load(folder, seq_length=32, verify=True)
            raise Broken("silent", f"{what}: loaded")
    finally:
        shutil.rmtree(folder)


TEXTS: list[Callable[[Path, random.Random], object]] = [
    lambda path, random_: path.with_suffix(".txt").write_bytes(random_.randbytes(random_.randrange(20_000))),
    lambda path, random_: path.with_suffix(".txt").write_bytes(b"\0" * random_.randrange(5000)),
    lambda path, random_: path.with_suffix(".txt").write_text("word " * 200_000),
    lambda path, random_: path.with_suffix(".txt").write_text("x" * 1_000_000),
    lambda path, random_: path.with_suffix(".txt").write_text("\ufeff\u202e\u0301" * 3000 + "\n" * 1000),
    lambda path, random_: path.with_suffix(".txt.gz").write_bytes(b"\x1f\x8b" + random_.randbytes(500)),
    lambda path, random_: path.with_suffix(".parquet").write_bytes(b"PAR1" + random_.randbytes(500) + b"PAR1"),
    lambda path, random_: path.with_suffix(".jsonl").write_text('{"text": ' + "9" * 5000 + "}\n"),
    lambda path, random_: path.with_suffix(".jsonl").write_text("[" * 100_000 + "\n"),
    lambda path, random_: path.with_suffix(".jsonl").write_text('{"text": null}\n{"txt": "a"}\n3\n"\\ud800"\n'),
    lambda path, random_: path.with_suffix(".json").write_bytes(random_.randbytes(200)),
    lambda path, random_: os.mkfifo(path.with_suffix(".txt")),
    lambda path, random_: path.with_suffix(".txt").symlink_to(path.with_suffix(".txt")),
    lambda path, random_: (path / "loop").symlink_to(path) if not path.mkdir() else None,
    lambda path, random_: path.with_suffix(".txt").touch(),
]
"""Writers of files that are no good text."""


@attack(repeat=3)
def texts(yard: Yard, random_: random.Random) -> None:
    """Bad text is packed, or refused in words, and nothing half-built stays."""
    folder = yard.folder / "texts"
    folder.mkdir()
    try:
        for number, write in enumerate(random_.sample(TEXTS, 2)):
            write(folder / f"bad{number}", random_)
        source = random_.choice([folder, *folder.iterdir()])
        with contextlib.suppress(DataError):
            data.build([str(source)], yard.folder / "built_of_bad", vocab_size=300, seq_length=32)
        if list(yard.folder.glob(".built_of_bad*")):
            raise Broken("silent", "a half-built data set stayed")
    finally:
        shutil.rmtree(folder)
        shutil.rmtree(yard.folder / "built_of_bad", ignore_errors=True)


# Attacks on launches


@attack()
def kills(yard: Yard, random_: random.Random) -> None:
    """SIGKILL to all ranks at any moment, up to three times; the same command goes on to the same end."""
    output = yard.folder / "run"
    stages = (
        "checkpoints/partial-*",
        "checkpoints/step_*",
        "metrics.jsonl",
        "checkpoints/latest",
        "report.json",
        "model/*",
        "never",
    )
    for _ in range(random_.randint(1, 3)):
        launch, stage, later = yard.start(output), random_.choice(stages), random_.expovariate(4)
        wait_for(lambda stage=stage: list(output.glob(stage)), launch, random_.uniform(0, 30))
        time.sleep(later)
        yard.remember()
        for process in launch.tree():
            process.kill()
        launch.wait()
    yard.finish(output)
    left = [*(output / "checkpoints").glob("partial-*"), *output.rglob("*.part*")]
    if left:
        raise Broken("silent", f"left behind: {left[0].name}")


def wait_for(happened: Callable[[], object], launch: Launch, seconds: float) -> None:
    """Wait until something happened, the launch ended or the time is over."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not happened() and launch.status() is None:
        time.sleep(0.002)


@attack()
def damaged_runs(yard: Yard, random_: random.Random) -> None:
    """A run whose newest checkpoint or metrics are damaged goes on from an older one to the same end."""
    output = yard.folder / "run"
    newest = yard.stopped_run(output, step=random_.randint(2, 6))[-1]
    what = damage(random_.choice([*newest.iterdir(), output / "metrics.jsonl"]), random_)
    if what.startswith("metrics"):
        status, text = yard.start(output).wait()
        expect_words(status, f"{what}: {text}", 0, REFUSED)
    else:
        yard.finish(output)


class _Touch:
    """An object whose pickle creates a file when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


@attack()
def pickles(yard: Yard, random_: random.Random) -> None:
    """A checkpoint of somebody else, complete with its manifest, runs no code when it is loaded."""
    output, marker = yard.folder / "run", yard.folder / "executed"
    newest = yard.stopped_run(output, step=4)[-1]
    victim = random_.choice(sorted(newest.glob("*.pt")))
    content = torch.load(victim, weights_only=False) if random_.random() < 0.5 else {}
    torch.save({**content, "extra": _Touch(marker)}, victim) if random_.random() < 0.7 else victim.write_bytes(
        pickle.dumps(_Touch(marker))
    )
    listed = checkpoint.manifest(newest)
    entries = json.loads(listed.read_text())
    entries[victim.name] = [victim.stat().st_size, sha256(victim.read_bytes()).hexdigest()]
    listed.write_text(json.dumps(entries))
    start_from = random_.random() < 0.5
    status, text = yard.start(*([yard.folder / "other", "--start-from", newest] if start_from else [output])).wait()
    if marker.exists():
        marker.unlink()
        raise Broken("silent", f"the pickle in {victim.name} was executed ({'--start-from' if start_from else 'resume'})")
    unread = start_from and "random" in victim.name  # a new layout draws new random numbers
    expect_words(status, text, 0 if unread else REFUSED)


@attack()
def full_disks(yard: Yard, random_: random.Random) -> None:
    """From some moment writes fail beyond some size of a file, as on a full disk: the run stops in words, and goes on where
    there is room."""
    output = yard.folder / "run"
    stage, limit = random_.choice(["metrics.jsonl", "checkpoints/step_*4", "report.json"]), random_.choice([20_000, 100_000])
    launch = yard.start(output)  # its log stays below the limit
    wait_for(lambda: list(output.glob(stage)), launch, PATIENCE)
    with contextlib.suppress(ProcessLookupError):  # it has ended
        resource.prlimit(launch.process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    status, text = launch.wait()
    expect_words(status, text, REFUSED, 0)
    yard.finish(output)


@attack()
def signals(yard: Yard, random_: random.Random) -> None:
    """A signal to any process of a launch ends all of them, and the same command goes on."""
    output, ranks = yard.folder / "run", random_.randint(1, 2)
    launch = yard.start(output, ranks=ranks)
    wait_for(lambda: list(output.glob("checkpoints/step_*")), launch, PATIENCE)
    yard.remember()
    tree = launch.tree()
    if not tree:
        raise Broken("silent", f"the run ended before its signal: {launch.text()[-300:]}")
    victim, number = random_.choice(tree), random_.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
    what = f"{number.name} to process {tree.index(victim)} of {len(tree)}"
    with contextlib.suppress(psutil.NoSuchProcess):
        victim.send_signal(number)
    _, alive = psutil.wait_procs(tree, timeout=PATIENCE)
    if alive:
        raise Broken("hang", f"{what}: {len(alive)} processes trained on")
    yard.finish(output, ranks=ranks)


@attack()
def two_runs(yard: Yard, random_: random.Random) -> None:
    """Of two runs in one folder, one trains to the end and the other is refused."""
    output = yard.folder / "run"
    first = yard.start(output)
    time.sleep(random_.choice([0, 0, random_.uniform(0, 10)]))
    second = yard.start(output)
    ended = [first.wait(), second.wait()]
    for status, text in ended:
        expect_words(status, text, 0, REFUSED)
    yard.finish(output)


@attack()
def two_nodes(yard: Yard, random_: random.Random) -> None:
    """Two nodes that do not share the run's folder are refused."""
    import test_nodes

    folders = [yard.folder / "node_a", yard.folder / "node_b"]
    for folder in folders:
        folder.mkdir()
        shutil.copy(yard.file, folder / "mini.json")
    for status, text in test_nodes.launch(folders, "--data", yard.data, "--output", "run"):
        expect_words(status, text, REFUSED)


# The campaign


def fight(yard: Yard, name: str, number: int, seed: int) -> Broken | None:
    """One attack; how the run broke, or None."""
    function, repeat = ATTACKS[name]
    try:
        with time_limit() if repeat > 1 else contextlib.nullcontext():  # launches have limits of their own
            function(yard, random.Random(f"{seed} {name} {number}"))
    except Broken as broken:
        return broken
    except subprocess.TimeoutExpired as error:
        return Broken("hang", str(error))
    except Exception as error:  # of the code under attack, in this process
        return Broken("traceback", f"{type(error).__name__}: {error} {traceback.format_exc().splitlines()[-3].strip()}")
    finally:
        yard.close()
        for left in ("run", "other", "node_a", "node_b"):
            shutil.rmtree(yard.folder / left, ignore_errors=True)
    return None


def table(counts: dict[str, Counter]) -> str:
    columns = ("tried", "held", *WAYS)
    lines = [f"{'kind':<16}" + "".join(f"{column:>11}" for column in columns)]
    for name, count in counts.items():
        row = {**count, "held": count["tried"] - sum(count[way] for way in WAYS)}
        lines.append(f"{name:<16}" + "".join(f"{row.get(column, 0):>11}" for column in columns))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns 1 if anything broke."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--hours", type=float, default=0)
    parser.add_argument("--attacks", type=int, metavar="N", help="so many of each kind, instead of a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=list(ATTACKS), metavar="KIND", help=f"of {', '.join(ATTACKS)}")
    given = parser.parse_args(arguments)
    deadline = time.monotonic() + (3600 * given.hours or 60 * given.minutes)
    plan = {kind.partition(":")[0]: int(kind.partition(":")[2] or -1) for kind in given.only}
    if not plan.keys() <= ATTACKS.keys():
        parser.error(f"unknown kind; known: {', '.join(ATTACKS)}")
    counts = {kind: Counter() for kind in plan}
    logging.disable(logging.WARNING)  # of the code under attack, about the attacks
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # which ends what was started, too
    with tempfile.TemporaryDirectory(prefix="torture-", ignore_cleanup_errors=True) as folder:
        yard = Yard(Path(folder))
        try:
            for kind, number in _turns(plan, given.attacks, deadline):
                broken = fight(yard, kind, number, given.seed)
                counts[kind]["tried"] += 1
                if broken is not None:
                    counts[kind][broken.way] += 1
                    print(
                        f"{broken.way}: --seed {given.seed} --only {kind}:{number}: {' '.join(str(broken).split())}", flush=True
                    )
        finally:
            yard.close()
            print(table(counts))
    return int(any(count[way] for count in counts.values() for way in WAYS))


def _turns(plan: dict[str, int], attacks: int | None, deadline: float) -> Iterator[tuple[str, int]]:
    """Kinds take turns until the time is over, or each had so many attacks, or the one that was asked for."""
    done = Counter()
    while pending := [kind for kind, number in plan.items() if done[kind] < (1 if number >= 0 else attacks or sys.maxsize)]:
        for kind in pending:
            for _ in range(min(ATTACKS[kind][1], (attacks or sys.maxsize) - done[kind], 1 if plan[kind] >= 0 else sys.maxsize)):
                if not attacks and time.monotonic() > deadline:
                    return
                yield kind, plan[kind] if plan[kind] >= 0 else done[kind]
                done[kind] += 1


if __name__ == "__main__":
    sys.exit(main())
