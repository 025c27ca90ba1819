"""Which step aligns, and which layer sees what."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sctd_ds import ConfigError, ScTDConfig
from sctd_ds.method.plan import LayerPlan, kept_tokens
from sctd_ds.method.schedule import aligned_rows, mean_cost, mode_shares, step_mode


@pytest.mark.parametrize(
    ("layers", "full", "cross", "kept", "last"),
    [(4, [0], 1, [2], 3), (7, [0, 1], 2, [3, 4, 5], 6), (12, [0, 1, 2, 3, 4], 5, [6, 7, 8, 9, 10], 11)],
)
def test_layer_plan(layers, full, cross, kept, last):
    plan = LayerPlan(layers)
    assert (list(plan.full), plan.cross, list(plan.kept), plan.last) == (full, cross, kept, last)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_too_few_layers(layers):
    with pytest.raises(ConfigError, match="at least 4"):
        LayerPlan(layers)


def test_kept_tokens_rounds_the_dropped_down():
    assert [kept_tokens(s, 0.5) for s in (512, 17, 1)] == [256, 9, 1] and kept_tokens(10, 0.0) == 10


def test_steps_are_counted_from_one():
    modes = [step_mode(ScTDConfig(interval=3), t) for t in range(1, 8)]
    assert modes == ["drop", "drop", "align", "drop", "drop", "align", "drop"]
    assert step_mode(ScTDConfig(interval=1), 1) == "align"
    assert step_mode(ScTDConfig(method="token_drop", interval=1), 1) == "drop"
    assert step_mode(ScTDConfig(method="dense"), 10) == "dense"


def test_dense_phases_are_counted_in_steps_or_as_a_share_of_the_run():
    wanted = ["dense"] * 2 + ["align", "drop", "drop", "align", "drop"] + ["dense"] * 3
    for start, finish in ((2, 3), (0.2, 0.3), (0.15, 3)):  # 0.15 of 10 is rounded to 2
        config = ScTDConfig(interval=3, dense_start=start, dense_finish=finish, total_steps=10)
        assert [step_mode(config, t) for t in range(1, 11)] == wanted
    spread = ScTDConfig(interval=3, align_schedule="spread", dense_start=2)
    assert [step_mode(spread, t) for t in range(1, 5)] == ["dense", "dense", "align", "align"]
    assert step_mode(ScTDConfig(method="token_drop", dense_start=1), 1) == "dense"


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"dense_start": 0.1}, "sctd.dense_start=0.1 counts from the number of steps of the run"),
        ({"dense_finish": 5}, "sctd.dense_finish=5 counts from the number of steps of the run"),
        ({"dense_start": 0.6, "dense_finish": 0.4, "total_steps": 10}, "make all 10 steps dense"),
        ({"dense_start": 12, "total_steps": 10}, "make all 10 steps dense"),
        ({"dense_start": 1.5}, "expected a whole number of optimizer steps, or a share"),
        ({"dense_finish": 1.0}, "expected a whole number of optimizer steps, or a share"),
        ({"dense_start": True}, "expected a whole number of optimizer steps, or a share"),
        ({"dense_start": -1}, "greater than or equal to 0"),
    ],
)
def test_a_dense_phase_that_cannot_be_counted_is_refused(method, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        step_mode(ScTDConfig(**method), 1)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_shares_of_the_modes_are_those_of_the_steps(data):
    total, interval = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 7))
    start = data.draw(st.integers(0, total - 1))
    config = ScTDConfig(
        method=data.draw(st.sampled_from(["sctd", "token_drop", "dense"])),
        align_schedule=data.draw(st.sampled_from(["interval", "spread"])),
        interval=interval,
        dense_start=start,
        dense_finish=data.draw(st.integers(0, total - start - 1)),
        total_steps=total,
    )
    taken = [step_mode(config, t) for t in range(1, total + 1)]
    shares = {mode: taken.count(mode) / total for mode in ("dense", "drop", "align")}
    assert mode_shares(config) == pytest.approx(shares)
    cost = {"dense": 3.0, "drop": 2.0, "align": 5.0}
    assert mean_cost(config, cost) == pytest.approx(sum(cost[mode] for mode in taken) / total)


def test_spread_aligns_every_row_once_per_interval():
    config = ScTDConfig(interval=4, align_schedule="spread")
    for t in range(1, 9):
        assert list(aligned_rows(config, t, 10)) == [r for r in range(10) if (r + t) % 4 == 0]
    assert list(aligned_rows(config, None, 3)) == [0, 1, 2]
