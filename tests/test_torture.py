"""The campaign of `make torture`, in its short form: the kinds of attack that need no launch."""

import subprocess
import sys

import pytest

import torture
from helpers import ROOT
from helpers.launch import launch_environment

QUICK = ["configurations", "files", "metrics_file", "data_files", "texts"]


def test_nothing_breaks_without_launches(tmp_path):
    command = [sys.executable, ROOT / "tests" / "torture.py", "--attacks", "30", "--only", *QUICK]
    environment = {**launch_environment(), "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    rows = [line.split() for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert rows[-len(QUICK) :] == [[kind, "30", "30", "0", "0", "0"] for kind in QUICK]
    assert not list(tmp_path.glob("torture-*"))


class Yard:
    folder = torture.ROOT / "nowhere"

    def close(self):
        """Nothing was started."""


@pytest.mark.parametrize(
    ("error", "way"),
    [
        (torture.Broken("silent", "verified"), "silent"),
        (KeyError("x"), "traceback"),
        (AssertionError(), "traceback"),
        (None, None),
    ],
)
def test_how_an_attack_ended_is_counted(monkeypatch, error, way):
    def act(yard, random_):
        if error is not None:
            raise error

    monkeypatch.setitem(torture.ATTACKS, "act", (act, 1))
    broken = torture.fight(Yard(), "act", 0, seed=0)
    assert (broken and broken.way) == way


def test_an_attack_that_does_not_end_is_a_hang(monkeypatch):
    monkeypatch.setitem(torture.ATTACKS, "act", (lambda yard, random_: torture.time.sleep(60), 2))
    monkeypatch.setattr(torture, "PATIENCE", 1)
    assert torture.fight(Yard(), "act", 0, seed=0).way == "hang"


def test_an_attack_is_repeated_by_its_number(monkeypatch):
    drawn = []
    monkeypatch.setitem(torture.ATTACKS, "act", (lambda yard, random_: drawn.append(random_.random()), 3))
    for kind, number in [*torture._turns({"act": -1}, 4, 0), *torture._turns({"act": 2}, None, float("inf"))]:
        torture.fight(Yard(), kind, number, seed=5)
    assert len(drawn) == 5 and drawn[4] == drawn[2] and len(set(drawn)) == 4


def test_kinds_take_turns_until_the_time_is_over(monkeypatch):
    monkeypatch.setattr(torture, "ATTACKS", {"a": (None, 2), "b": (None, 1)})
    assert list(torture._turns({"a": -1, "b": -1}, 3, 0)) == [("a", 0), ("a", 1), ("b", 0), ("a", 2), ("b", 1), ("b", 2)]
    clock = iter(range(100))
    monkeypatch.setattr(torture.time, "monotonic", lambda: next(clock))
    assert list(torture._turns({"a": -1, "b": -1}, None, 3)) == [("a", 0), ("a", 1), ("b", 0), ("a", 2)]
