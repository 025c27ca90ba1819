"""What a run reports while it trains. `METRICS` says what there is; log lines, metrics.jsonl, DeepSpeed's monitors, the final
report and its figure all read this table.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import statistics
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args

from tqdm import tqdm

from sctd_ds.method.schedule import Mode
from sctd_ds.run import output
from sctd_ds.run.output import OutputError

logger = logging.getLogger(__name__)

Event = Literal["train", "validation"]
SLOW_SAVE = 20
"""Seconds of a save, beyond which a stop may not end within the 30 that a launcher leaves its ranks: a step precedes it."""

Record = dict[str, Any]
"""A line of metrics.jsonl: "event", "step", in a training step its "mode", and values by the name of their metric."""


@dataclass(frozen=True)
class Metric:
    """A number that is recorded at every event of its type."""

    name: str
    """Its key in metrics.jsonl. The monitors get Train/NAME or Validation/NAME."""
    label: str
    """Its name in log lines, in the report and in the figure."""
    format: str
    monitored: bool = True
    shown: Literal["mean", "last"] | None = None
    """In log lines and in the report's text. A training log line has the mean over its steps, or the last step's value."""
    drawn: Literal["loss", "scores"] | None = None
    """The panel of the figure that has a curve of it."""
    always: bool = False
    """Whether every record of its event has it: a line of metrics.jsonl that lacks it is damaged."""


METRICS: dict[Event, tuple[Metric, ...]] = {
    "train": (
        Metric("loss", "loss", "{:.3f}", shown="mean", drawn="loss", always=True),
        Metric("ce_drop", "cross-entropy with dropping", "{:.3f}"),
        Metric("ce_full", "cross-entropy", "{:.3f}"),
        Metric("ce_sentence", "sentence loss", "{:.3f}"),
        Metric("kl_last", "KL at layer l", "{:.2e}"),
        Metric("kl_previous", "KL at layer l-1", "{:.2e}"),
        Metric("step_ms", "ms per step", "{:.0f}", shown="mean", always=True),
        Metric("lr", "lr", "{:.2e}", shown="last"),
        Metric("grad_norm", "gradient norm", "{:.2f}"),
        Metric("loss_scale", "loss scale", "{:.0f}"),
        Metric("tokens_per_s", "tokens/s", "{:,.0f}"),
        Metric("skipped_steps", "skipped steps", "{}", monitored=False),
        Metric("kept_token_share", "kept tokens", "{:.0%}", monitored=False),
    ),
    "validation": (
        Metric("loss_full", "loss", "{:.4f}", shown="last", drawn="loss", always=True),
        Metric("loss_15", "loss at 15 % masks", "{:.4f}", shown="last", drawn="loss"),
        Metric("loss_drop", "loss with dropping", "{:.4f}", shown="last", drawn="loss"),
        Metric("gap", "gap", "{:+.4f}", shown="last"),
        Metric("kl_last", "KL at layer l", "{:.2e}", shown="last"),
        Metric("kl_previous", "KL at layer l-1", "{:.2e}"),
        Metric("cosine_last", "cosine at layer l", "{:.4f}", shown="last"),
        Metric("cosine_previous", "cosine at layer l-1", "{:.4f}"),
        Metric("tense", "probe of tense", "{:.1f} %", shown="last", drawn="scores"),
        Metric("number", "probe of number", "{:.1f} %", shown="last", drawn="scores"),
    ),
}
"""Every metric, by event. A value may be None or absent where it does not apply, for example "ce_full" in a drop step."""


def text(event: Event, values: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> str:
    """The values that are shown: "loss 6.270, ms per step 270". before: earlier values, as in "loss 6.270 -> 5.808"."""
    parts = []
    for metric in METRICS[event]:
        if metric.shown is not None and values.get(metric.name) is not None:
            value = metric.format.format(values[metric.name])
            if before and before.get(metric.name) is not None:
                value = f"{metric.format.format(before[metric.name])} -> {value}"
            parts.append(f"{metric.label} {value}")
    return ", ".join(parts)


class Spikes:
    """Which losses of training are spikes, as a learning rate that is too high or a damaged row makes them.

    A step's loss is one if it lies above the highest of the last `WINDOW` steps of its mode, by more than these steps differ
    among themselves (the highest less the lowest). A mode's first `WINDOW` steps are none. A spike counts in the window after
    it, so a loss that stays high is told once.
    """

    WINDOW = 100

    def __init__(self, records: Sequence[Record] = ()) -> None:
        """records: of the steps before."""
        self._last: dict[str, deque[float]] = {}
        for record in of("train", records):
            self.range_before(record["mode"], record["loss"])

    def range_before(self, mode: str, loss: float) -> tuple[float, float] | None:
        """Take the next step's loss. If it is a spike: the lowest and the highest loss of the steps that it stands out from."""
        last = self._last.setdefault(mode, deque(maxlen=self.WINDOW))
        low, high, full = min(last, default=loss), max(last, default=loss), len(last) == self.WINDOW
        last.append(loss)
        return (low, high) if full and loss - high > high - low else None


class Metrics:
    """Writes `metrics.jsonl` and the monitors on rank 0 and shows progress; does nothing on other ranks.

    start, total: the run's steps before the next and at its end. every: steps per log line. batch: rows per step, over all
    ranks. keep: the run in this folder is continued at step `start`, so its records up to there stay; otherwise the folder's
    former records are deleted. All methods raise OutputError where a file cannot be written.
    """

    def __init__(
        self, folder: Path, *, start: int, total: int, every: int, batch: int, keep: bool, monitor: Any, rank: int
    ) -> None:
        self.path = folder / "metrics.jsonl"
        self._every, self._total, self._batch, self._monitor = every, total, batch, monitor
        self._active = rank == 0
        if not self._active:
            return
        with output.errors(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            before = _forget_after(self.path, start if keep else -1)
            self._spikes = Spikes(before)
            self._validations: list[float] = [record["loss_full"] for record in of("validation", before)]
            self._file = self.path.open("a", encoding="utf-8")
        self._recent: list[Record] = []
        # A terminal gets a bar; a log file gets lines, because a bar would fill it with control characters.
        self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty())

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._active:
            return
        self._bar.close()
        try:
            with output.errors(self.path):
                self._file.close()
        except OutputError as error:
            if kind is None:
                raise
            logger.error("%s", error)  # beside the error that ends the run, and must not be hidden

    def train(self, step: int, mode: str, values: Mapping[str, Any], samples: int) -> None:
        """Record one optimizer step. values: by metric. samples: rows that the whole run has seen."""
        self._record("train", {"step": step, "mode": mode}, values)
        if not self._active:
            return
        self._recent.append(dict(values))
        self._tell_spike(step, mode, values["loss"], samples)
        self._bar.update()
        self._bar.set_postfix_str(f"{mode}, {text('train', values)}")
        if step % self._every == 0 or step == self._total:
            self._flush()
            if self._bar.disable:
                ms = statistics.fmean(values["step_ms"] for values in self._recent)
                left = _duration((self._total - step) * ms / 1000)
                logger.info("step %d/%d: %s, about %s left", step, self._total, text("train", _over(self._recent)), left)
            self._recent.clear()

    def validation(self, step: int, values: Mapping[str, Any]) -> None:
        """Record a validation. Arguments as in `train`."""
        self._record("validation", {"step": step}, values)
        if not self._active:
            return
        self._flush()
        self._validations.append(values["loss_full"])
        self._say(f"validation at step {step}: {text('validation', values)}")

    def validations_without_gain(self) -> int:
        """How many validations there were since that of the lowest loss. On rank 0 only."""
        losses = [loss if math.isfinite(loss) else math.inf for loss in self._validations]
        return len(losses) - 1 - losses.index(min(losses)) if losses else 0

    def show(self, step: int, title: str, lines: Sequence[str]) -> None:
        """Lines for a person to read: in the log, and in TensorBoard as text."""
        if not self._active:
            return
        for line in lines:
            self._say(f"{title} at step {step}: {line}")
        if self._monitor is not None and getattr(self._monitor.tb_monitor, "summary_writer", None) is not None:
            with output.errors("a monitor (tensorboard, wandb, csv_monitor)"):
                self._monitor.tb_monitor.summary_writer.add_text(title, "\n\n".join(lines), step)

    def saved(self, checkpoint: Path, seconds: float) -> None:
        """Say what a save cost, and where it is too slow for the usual way to stop a run."""
        if not self._active:
            return
        size = sum(file.stat().st_size for file in checkpoint.iterdir())
        self._say(f"saved {checkpoint.name}: {size / 1e6:,.1f} MB in {seconds:.1f} s")
        if seconds > SLOW_SAVE:
            self._say(
                f"a save takes {seconds:.0f} s, and the launcher kills its ranks 30 s after Ctrl-C or SIGTERM: stop this run "
                "by `kill` of the process `deepspeed` alone, which sets no limit (docs/reliability.md)"
            )

    def flush(self) -> None:
        """Write what was recorded to the disk."""
        if self._active:
            self._flush()
            with output.errors(self.path):
                os.fsync(self._file.fileno())

    def _flush(self) -> None:
        with output.errors(self.path):
            self._file.flush()

    def _tell_spike(self, step: int, mode: str, loss: float, samples: int) -> None:
        """Log a loss that is a spike, and change nothing. samples: as in `train`."""
        before = self._spikes.range_before(mode, loss)
        if before is not None:
            logger.warning(
                "step %d: the loss %.3f is a spike, the %d %s steps before had %.3f to %.3f; its samples are %d to %d of the "
                "run, whose rows data.Loader.rows_of names",
                *(step, loss, Spikes.WINDOW, mode, *before, samples - self._batch, samples - 1),
            )

    def _say(self, line: str) -> None:
        if self._bar.disable:
            logger.info("%s", line)
        else:
            self._bar.write(line, file=sys.stderr)

    def _record(self, event: Event, head: Record, values: Mapping[str, Any]) -> None:
        known = METRICS[event]
        for name in values:
            if name not in {metric.name for metric in known}:
                raise ValueError(f'"{name}" is not in sctd_ds.run.metrics.METRICS["{event}"]: add a line for it')
        if not self._active:
            return
        record = {metric.name: values[metric.name] for metric in known if metric.name in values}
        with output.errors(self.path):
            self._file.write(json.dumps({"event": event, **head, **record}) + "\n")
        if self._monitor is not None and self._monitor.enabled:
            shown = [metric.name for metric in known if metric.monitored and record.get(metric.name) is not None]
            with output.errors("a monitor (tensorboard, wandb, csv_monitor)"):
                self._monitor.write_events([(f"{event.title()}/{name}", record[name], head["step"]) for name in shown])


def take_monitor(engine: Any, settings: Mapping[str, Any]) -> Any:
    """DeepSpeed's monitors (TensorBoard, W&B, CSV), told the run's settings, for `Metrics` to write to.

    settings: by dotted key. The engine itself writes no more to them: its x axis is samples where ours is steps, of which W&B
    accepts one, and what it would write is in METRICS.
    """
    monitor, engine.monitor = engine.monitor, SimpleNamespace(enabled=False)
    plain = {key: value if isinstance(value, (int, float, str)) else json.dumps(value) for key, value in settings.items()}
    if monitor.tb_monitor is not None:
        rows = "".join(f"| {key} | {value} |\n" for key, value in plain.items())
        monitor.tb_monitor.summary_writer.add_text("settings", f"| key | value |\n|---|---|\n{rows}")
    if monitor.wandb_monitor is not None:
        import wandb

        wandb.config.update(plain, allow_val_change=True)  # a run that W&B resumes has other values of what may change
    if monitor.csv_monitor is not None:
        Path(monitor.csv_monitor.log_dir, "settings.json").write_text(json.dumps(plain, indent=1), encoding="utf-8")
    return monitor


def read(path: Path) -> list[Record]:
    """The records of a metrics.jsonl. Damaged lines are left out, with a warning; so is a last line that a kill cut off.

    Raises OutputError for a file that cannot be read.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[list[Record], list[int]]:
    """`read`, and the numbers of the damaged lines."""
    with output.errors(path):
        *lines, cut_off = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    found = [_record(line) for line in lines]
    damaged = [number for number, record in enumerate(found, start=1) if record is None]
    if damaged:
        numbers = ", ".join(map(str, damaged[:10])) + (", ..." if len(damaged) > 10 else "")
        logger.warning("%s: %d damaged lines are left out (%s)", path, len(damaged), numbers)
    return [record for record in (*found, _record(cut_off)) if record is not None], damaged


def _record(line: bytes) -> Record | None:
    """The record in a line, if it is one that `Metrics` wrote."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or content.get("event") not in list(METRICS) or type(content.get("step")) is not int:
        return None
    # Earlier versions called the mode "kind".
    record = {"mode" if key == "kind" else key: value for key, value in content.items()}
    values = [(record.get(metric.name), metric.always) for metric in METRICS[record["event"]]]
    numbers = all(type(value) in (int, float) or (value is None and not always) for value, always in values)
    return record if numbers and (record["event"] != "train" or record.get("mode") in get_args(Mode)) else None


def of(event: Event, records: Sequence[Record]) -> list[Record]:
    """The records of one event."""
    return [record for record in records if record["event"] == event]


@dataclass(frozen=True)
class Point:
    """A validation along a run, and what the training steps before it cost."""

    record: Record
    operations: float
    """Floating-point operations."""
    seconds: float
    """Each step counts with the median time of its mode, because stalls of the machine are no property of a method."""


def curve(records: Sequence[Record], flops: Mapping[str, float], batch: int) -> list[Point]:
    """The validations of a run. flops: operations of one sequence by mode. batch: sequences of a step."""
    median = step_ms(of("train", records))
    operations = seconds = 0.0
    points = []
    for record in records:
        if record["event"] == "train":
            operations += batch * flops[record["mode"]]
            seconds += median[record["mode"]] / 1000
        else:
            points.append(Point(record, operations, seconds))
    return points


def step_ms(train: Sequence[Record]) -> dict[str, float]:
    """Median step time by mode, without each mode's first step, which warms up."""
    times: dict[str, list[float]] = {}
    for record in train:
        times.setdefault(record["mode"], []).append(record["step_ms"])
    return {mode: statistics.median(ms[1:] or ms) for mode, ms in times.items()}


def _over(records: Sequence[Record]) -> Record:
    """The log line's values over several training steps: means or last values, as each metric says."""
    values = {}
    for metric in METRICS["train"]:
        known = [record[metric.name] for record in records if record.get(metric.name) is not None]
        if known and metric.shown is not None:
            values[metric.name] = statistics.fmean(known) if metric.shown == "mean" else known[-1]
    return values


def _forget_after(path: Path, step: int) -> list[Record]:
    """Drop records beyond `step`: the run resumes there and will write them again. Returns those that stay.

    A file with damaged lines is kept beside the new one.
    """
    records, damaged = _read(path)
    kept = [record for record in records if record["step"] <= step]
    if path.exists():
        if damaged:
            shutil.copyfile(path, path.with_name("metrics.damaged.jsonl"))
        with output.replacing(path) as partial:
            partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    return kept


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"
