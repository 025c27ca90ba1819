"""What a run reports while it trains: one JSON line per step, DeepSpeed's monitors, and a bar or a log line."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)

MONITORED = ("loss", "ce_drop", "ce_full", "kl_last", "kl_previous", "lr", "grad_norm", "loss_scale", "step_ms", "tokens_per_s")


class Metrics:
    """Writes `metrics.jsonl` on rank 0 and shows progress; does nothing on other ranks.

    Every record has "step" and "event": "train" (one per optimizer step) or "validation". keep: the run in this folder is
    continued at step `start`, and its records up to there stay; without it those of an earlier run make room.
    """

    def __init__(self, folder: Path, *, start: int, total: int, every: int, keep: bool, monitor: Any, rank: int) -> None:
        self.path = folder / "metrics.jsonl"
        self._every, self._total, self._monitor = every, total, monitor
        self._active = rank == 0
        if not self._active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        _forget_after(self.path, start if keep else -1)
        self._file = self.path.open("a", encoding="utf-8")
        self._recent: list[dict[str, Any]] = []
        # A terminal gets a bar; a log file gets lines, because a bar would fill it with control characters.
        self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty())

    def train(self, record: dict[str, Any], samples: int) -> None:
        """Record one optimizer step. samples: rows seen by the whole run, the monitors' x axis."""
        if not self._active:
            return
        self._write("train", record)
        step = record["step"]
        if self._monitor is not None and self._monitor.enabled:
            self._monitor.write_events([(f"Train/{k}", record[k], samples) for k in MONITORED if record.get(k) is not None])
        self._recent.append(record)
        self._bar.update()
        self._bar.set_postfix_str(f"{record['kind']} loss {record['loss']:.3f}  {record['step_ms']:.0f} ms")
        if step % self._every == 0 or step == self._total:
            self._file.flush()
            if self._bar.disable:
                loss, ms = (sum(r[key] for r in self._recent) / len(self._recent) for key in ("loss", "step_ms"))
                logger.info("step %d/%d  loss %.3f  %.0f ms/step  lr %.2e  about %s left", step, self._total, loss, ms,
                            record["lr"], _duration((self._total - step) * ms / 1000))  # fmt: skip
            self._recent.clear()

    def validation(self, step: int, values: dict[str, float], samples: int) -> None:
        """Record a validation."""
        if not self._active:
            return
        self._write("validation", {"step": step, **values})
        self._file.flush()
        if self._monitor is not None and self._monitor.enabled:
            self._monitor.write_events([(f"Validation/{name}", value, samples) for name, value in values.items()])
        text = f"validation at step {step}: loss {values['loss_full']:.4f}"
        if "loss_drop" in values:
            text += (f", with dropping {values['loss_drop']:.4f} (gap {values['gap']:+.4f}), drift of [CLS]: "
                     f"KL {values['kl_last']:.2e}, cosine {values['cosine_last']:.4f}")  # fmt: skip
        self.say(text)

    def say(self, text: str) -> None:
        """A line above the bar, or in the log."""
        if not self._active:
            return
        if self._bar.disable:
            logger.info("%s", text)
        else:
            self._bar.write(text, file=sys.stderr)

    def flush(self) -> None:
        """Bring what was recorded to the disk."""
        if self._active:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush everything; may be called twice."""
        if self._active:
            self._bar.close()
            self._file.close()

    def _write(self, event: str, record: dict[str, Any]) -> None:
        self._file.write(json.dumps({"event": event, **record}) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line that was cut off by a kill is left out."""
    records = []
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number + 1 < len(lines):
                raise
    return records


def _forget_after(path: Path, step: int) -> None:
    """Drop records beyond `step`: the run resumes there and will write them again."""
    kept = [record for record in read(path) if record["step"] <= step]
    if path.exists():
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        partial.replace(path)


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"
