"""What a run leaves behind when it ends: the exported model with its card, report.json, report.png, and a few lines."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from sctd_ds.data import PackedData, unigram_loss
from sctd_ds.integrations.export import export
from sctd_ds.integrations.hub import model_card
from sctd_ds.method.convert import state_of
from sctd_ds.method.flops import Shape, flops_saved, sequence_flops
from sctd_ds.method.plan import kept_tokens
from sctd_ds.method.schedule import dense_phases, mode_shares, modes
from sctd_ds.run import metrics, output, samples
from sctd_ds.run.environment import Environment, peak_flops, versions
from sctd_ds.run.metrics import METRICS, Event, Record
from sctd_ds.run.probe import HUGGING_FACE, Probe
from sctd_ds.run.samples import Sample
from sctd_ds.run.settings import RunConfig


@dataclass(frozen=True)
class Report:
    """Everything known about a run, under the keys of report.json. None: not measured, or not known.

    Savings are shares of a dense step's operations or time, averaged over all steps of the run's schedule.
    """

    name: str
    architecture: str | None
    """The model's family: "BERT", "RoBERTa" or "ModernBERT"; None before it is built."""
    method: str
    steps: int
    planned_steps: int
    """More than `steps` where the validation loss stopped falling (pretrain.early_stopping)."""
    loss: dict[str, float]
    """The "first" and the "last" step's."""
    trained_model: str | None
    """The model that the run started from; None: a new one."""
    validation: Record
    """The last one."""
    validated_on: dict[str, Any]
    """What decides whether losses of two runs compare: the data's fingerprint, its held-out rows, their length and masks."""
    validation_before: Record
    """That of a trained model, before the first step."""
    unigram_loss: float | None
    """Validation loss of a model that knows no more than how frequent words are; see `data.unigram_loss`."""
    samples: list[Sample]
    """Masked text, and the words of the model before and after training; none of a pipeline."""
    flops_saved: float
    flops_per_sequence: dict[str, float]
    """By mode."""
    kept_token_share: float
    mode_shares: dict[str, float]
    """Share of the run's steps by mode, by its schedule."""
    dense_phases: list[tuple[int, int]]
    """First and last step of each dense phase of a run that drops tokens at other times."""
    run_step_ms: dict[str, float]
    """By mode, the median of the run's own steps without the first."""
    samples_per_s: float | None
    """Rows, over all ranks."""
    tokens_per_s: float | None
    time_saved: float | None
    time_saved_against_huggingface: float | None
    step_ms: dict[str, float]
    """By mode, as measured side by side at start-up; see `probe.Probe`."""
    mfu: float | None
    """Operations per second of a rank, as a share of its device's peak."""
    peak_memory_bytes: int | None
    environment: dict[str, str]
    ranks: int
    stages: int
    micro_batches: int
    bubble_share: dict[str, float] | None
    global_batch: int
    seq_length: int
    probe: dict[str, Any] | None
    """All of `probe.Probe`."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def build(
    run: RunConfig,
    shape: Shape,
    probe: Probe | None,
    records: Sequence[Record] = (),
    packed: PackedData | None = None,
    read: Sequence[Sample] = (),
    architecture: str | None = None,
) -> Report:
    """The report of a run with these records and samples on this data; without any, what its settings and the probe say."""
    train, validation = metrics.of("train", records), metrics.of("validation", records)
    device_type = get_accelerator().device_name()
    environment = Environment.collect(device_type)
    flops: dict[str, float] = {mode: sequence_flops(shape, run.sctd, mode) for mode in modes(run.sctd)}
    # Speed is that of each mode's median step, taken as often as in the run: start-up and saving do not count.
    taken, step_ms = [record["mode"] for record in train], metrics.step_ms(train)
    speed = 1000 * run.global_batch / statistics.fmean(step_ms[mode] for mode in taken) if taken else None
    peak = peak_flops(environment.device)
    return Report(
        name=run.name,
        architecture=architecture,
        method=run.sctd.method,
        steps=train[-1]["step"] if train else 0,
        planned_steps=run.pretrain.steps,
        loss={"first": train[0]["loss"], "last": train[-1]["loss"]} if train else {},
        trained_model=run.pretrain.trained_model,
        validation=validation[-1] if validation else {},
        validated_on=_validated_on(run, packed) if packed else {},
        validation_before=next((record for record in validation if record["step"] == 0), {}),
        unigram_loss=unigram_loss(packed, run.pretrain.validation_rows) if packed else None,
        samples=list(read),
        flops_saved=flops_saved(shape, run.sctd),
        flops_per_sequence=flops,
        kept_token_share=kept_share(run),
        mode_shares={mode: share for mode, share in mode_shares(run.sctd).items() if share},
        dense_phases=dense_phases(run.sctd),
        run_step_ms=step_ms,
        samples_per_s=speed,
        tokens_per_s=speed * shape.length if speed else None,
        time_saved=probe.time_saved(run) if probe else None,
        time_saved_against_huggingface=probe.time_saved(run, against=HUGGING_FACE) if probe else None,
        step_ms=probe.step_ms if probe else {},
        mfu=statistics.fmean(flops[mode] for mode in taken) * speed / run.ranks / peak if speed and peak else None,
        peak_memory_bytes=None if device_type == "cpu" else get_accelerator().max_memory_allocated(),
        environment={**asdict(environment), **versions("deepspeed", "transformers", "datasets", "sctd_ds")},
        ranks=run.ranks,
        stages=run.pretrain.stages,
        micro_batches=run.accumulation,
        bubble_share=(probe.bubble_share or None) if probe else None,
        global_batch=run.global_batch,
        seq_length=shape.length,
        probe=probe.to_json() if probe else None,
    )


def _validated_on(run: RunConfig, packed: PackedData) -> dict[str, Any]:
    rows = min(len(packed.validation), math.ceil(run.pretrain.validation_rows / run.micro_batch) * run.micro_batch)
    return {
        "fingerprint": packed.meta.fingerprint,
        "rows": rows,
        "seq_length": run.pretrain.seq_length,
        "mlm_probability": run.pretrain.mlm_probability,
    }


def kept_share(run: RunConfig) -> float:
    """Share of the tokens that the middle layers see in a step that drops tokens."""
    length = run.pretrain.seq_length
    return 1.0 if run.sctd.method == "dense" else kept_tokens(length, run.sctd.drop_ratio) / length


def finish(engine: Any, run: RunConfig, packed: PackedData, shape: Shape, probe: Probe | None, folder: Path) -> None:
    """Export the model, write the report and print it. Every rank calls. Raises OutputError for what cannot be written."""
    tokenizer = packed.tokenizer
    tokenizer.model_max_length = max(tokenizer.model_max_length, run.pretrain.seq_length)
    if dist.get_rank() > 0:
        export(engine, folder / "model")
        return
    records = metrics.read(folder / "metrics.jsonl")
    read = samples.read(engine.module, packed, folder) if run.pretrain.stages == 1 else []
    report = build(run, shape, probe, records, packed, read, state_of(engine.module).adapter.family)
    content = report.to_json()
    with output.errors(folder / "model"):
        export(engine, folder / "model", tokenizer, str(model_card(content, run.sctd, packed.meta.sources)))
    with output.replacing(folder / "report.json") as partial:
        partial.write_text(json.dumps(content, indent=2), encoding="utf-8")
    with output.replacing(folder / "report.png") as partial:
        plot(report, records, partial)
    print(text(report, folder))


def text(report: Report, folder: Path) -> str:
    """The report for a person."""
    steps = f"{report.steps} steps"
    if report.steps < report.planned_steps:
        steps += f" of {report.planned_steps} (the validation loss fell no more: pretrain.early_stopping)"
    lines = [f"{report.name}: {steps}, method {report.method}, on {report.environment['device']}"]
    if report.loss:
        lines.append(
            f"  training         {metrics.text('train', {'loss': report.loss['last']}, {'loss': report.loss['first']})}"
        )
    if report.validation:
        lines.append(f"  validation       {metrics.text('validation', report.validation, report.validation_before)}")
    if report.unigram_loss is not None and report.validation:
        gain = report.unigram_loss - report.validation["loss_full"]
        lines.append(f"  word frequencies loss {report.unigram_loss:.4f}, so the model has learned {gain:.2f} nats beyond them")
    lines += saving_lines(report)
    if report.samples_per_s:
        speed = f"{report.samples_per_s:,.1f} sequences/s, {report.tokens_per_s:,.0f} tokens/s"
        share = f", {report.mfu:.0%} of the device's peak" if report.mfu else ""
        lines.append(f"  speed            {speed}{share}")
    lines.append(f"  model            {folder / 'model'}   (AutoModelForMaskedLM.from_pretrained loads it)")
    lines.append(f"  details          {folder / 'report.json'}, {folder / 'report.png'}, {folder / 'metrics.jsonl'}")
    for sample in report.samples:
        lines.append("  masked text      " + str(sample).replace("\n", "\n" + " " * 19))
    return "\n".join(lines)


def saving_lines(report: Report) -> list[str]:
    """The lines about time: one step of each mode, and the average saving."""
    if not report.step_ms:
        return ["  time saved       not measured (pretrain.probe_steps is 0)"]
    names: dict[str, str] = {HUGGING_FACE: "untouched Hugging Face"}
    times = ", ".join(f"{names.get(mode, mode)} {ms:.0f} ms" for mode, ms in report.step_ms.items())
    lines = [f"  one step         {times}"]
    if report.method != "dense":
        line = (
            f"  time saved       {report.time_saved:.1%} against our dense step (its operations say {report.flops_saved:.1%})"
        )
        if report.time_saved_against_huggingface is not None:
            line += f", {report.time_saved_against_huggingface:.1%} against untouched Hugging Face"
        lines.append(line)
        if report.dense_phases:
            shares = ", ".join(f"{share:.0%} {mode}" for mode, share in report.mode_shares.items())
            lines.append(f"  schedule         {shares} steps, over which the time saved is averaged")
    if report.bubble_share:
        shares = ", ".join(f"{mode} {share:.0%}" for mode, share in report.bubble_share.items())
        ideal = (report.stages - 1) / (report.micro_batches + report.stages - 1)
        lines.append(
            f"  bubble           {shares} of a step; even stages and free messages would leave {ideal:.0%} "
            f"({report.stages} stages, {report.micro_batches} micro-batches)"
        )
    return lines


def plot(report: Report, records: Sequence[Record], path: Path) -> None:
    """Losses, the saving, learning rate, gradient norm and step times by mode, with dense phases shaded."""
    from matplotlib.figure import Figure

    rows: list[Any] = [["loss", "loss", "saving"], ["rate", "norm", "times"]]
    if any(record.get(metric.name) is not None for metric in _drawn("validation", "scores") for record in records):
        rows.append(["scores"] * 3)
    figure = Figure(figsize=(13, 3.75 * len(rows)), layout="constrained")
    panels = figure.subplot_mosaic(rows)
    _plot_losses(panels["loss"], report, records)
    if "scores" in panels:
        _plot_scores(panels["scores"], records)
    _plot_saving(panels["saving"], report)
    train = metrics.of("train", records)
    panels["rate"].plot(*_points(train, "lr"))
    panels["rate"].set(title="Learning rate", xlabel="step", ylim=(0, None))
    panels["norm"].plot(*_points(train, "grad_norm"), lw=0.8)
    panels["norm"].set(title="Gradient norm before clipping", xlabel="step", ylim=(0, _most(_points(train, "grad_norm")[1])))
    _plot_times(panels["times"], report, train)
    for name in panels.keys() - {"saving"}:
        for number, (first, last) in enumerate(report.dense_phases):
            panels[name].axvspan(first - 0.5, last + 0.5, color="0.92", zorder=0, label=None if number else "dense phase")
        if panels[name].get_legend_handles_labels()[0]:
            panels[name].legend(fontsize=8)
    figure.savefig(path, dpi=130)


def _plot_losses(panel: Any, report: Report, records: Sequence[Record]) -> None:
    """Every drawn metric; training's also as a running mean."""
    styles: dict[Event, dict[str, Any]] = {"train": {"lw": 0.6, "alpha": 0.4}, "validation": {"marker": "o", "ms": 3}}
    drawn: list[float] = []
    for event, style in styles.items():
        for metric in _drawn(event, "loss"):
            steps, values = _points(metrics.of(event, records), metric.name)
            if not values:
                continue
            (line,) = panel.plot(steps, values, label=f"{event}: {metric.label}", **style)
            drawn += values
            if event == "train" and (window := len(values) // 40) > 1:
                smooth = np.convolve(values, np.full(window, 1 / window), "valid")
                middle = steps[window // 2 :][: len(smooth)]
                panel.plot(middle, smooth, color=line.get_color(), label=f"{metric.label}, mean of {window} steps")
    if report.unigram_loss is not None:
        panel.axhline(report.unigram_loss, color="k", lw=1, ls="--", label="word frequencies alone")
    if drawn:
        panel.set_ylim(min(drawn) - 0.05 * (_most(drawn) - min(drawn)), _most(drawn))
    panel.set(title="Loss", xlabel="step", ylabel="nats per masked token")


def _plot_scores(panel: Any, records: Sequence[Record]) -> None:
    for metric in _drawn("validation", "scores"):
        panel.plot(*_points(metrics.of("validation", records), metric.name), marker="o", ms=3, label=metric.label)
    panel.set(title="Scores", xlabel="step", ylabel="%")


def _drawn(event: Event, panel: str) -> list[metrics.Metric]:
    return [metric for metric in METRICS[event] if metric.drawn == panel]


def _plot_times(panel: Any, report: Report, train: Sequence[Record]) -> None:
    most = 0.0 if report.run_step_ms else 1.0
    for mode in report.run_step_ms:
        steps, ms = _points([record for record in train if record["mode"] == mode], "step_ms")
        panel.plot(steps, ms, ".", ms=3, label=mode)
        most = max(most, _most(ms))
    if "dense" in report.step_ms and "dense" not in report.run_step_ms:
        panel.axhline(report.step_ms["dense"], color="k", lw=1, ls="--", label="dense (measured at start-up)")
        most = max(most, 1.1 * report.step_ms["dense"])
    panel.set(title="Step time by mode", xlabel="step", ylabel="ms", ylim=(0, most))


def _plot_saving(panel: Any, report: Report) -> None:
    bars = {
        "operations": report.flops_saved,
        "time, against\nour dense": report.time_saved,
        "time, against\nHugging Face": report.time_saved_against_huggingface,
    }
    known = {label: 100 * share for label, share in bars.items() if share is not None}
    drawn = panel.bar(list(known), list(known.values()), color=["tab:gray", "tab:blue", "tab:green"][: len(known)])
    panel.bar_label(drawn, fmt="%.1f %%")
    panel.margins(y=0.15)
    panel.set(title="Saved per step, on average", ylabel="%")


def _points(records: Sequence[Record], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric where it is known and finite."""
    known = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    finite = [(step, value) for step, value in known if math.isfinite(value)]
    return [step for step, _ in finite], [value for _, value in finite]


def _most(values: Sequence[float]) -> float:
    """The upper end of an axis, which leaves the highest twentieth out where it would flatten the rest."""
    if not values:
        return 1.0
    high = float(np.quantile(values, 0.95))
    return min(1.05 * max(values), 1.5 * high)
