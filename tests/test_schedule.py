"""Which step aligns, and which layer sees what."""

import pytest

from sctd_ds import ConfigError, ScTDConfig
from sctd_ds.method.plan import LayerPlan, kept_tokens
from sctd_ds.method.schedule import aligned_rows, step_mode


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


def test_spread_aligns_every_row_once_per_interval():
    config = ScTDConfig(interval=4, align_schedule="spread")
    for t in range(1, 9):
        assert list(aligned_rows(config, t, 10)) == [r for r in range(10) if (r + t) % 4 == 0]
    assert list(aligned_rows(config, None, 3)) == [0, 1, 2]
