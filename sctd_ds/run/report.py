"""What a run reports when it ends: report.json, report.png, the model card, and a few lines a person understands."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from sctd_ds.method.flops import Shape, flops_saved, sequence_flops
from sctd_ds.method.plan import kept_tokens
from sctd_ds.method.schedule import MODES
from sctd_ds.run import metrics
from sctd_ds.run.probe import HUGGING_FACE, Probe
from sctd_ds.run.settings import RunConfig

# Dense 16-bit matrix peak in FLOP/s by a part of the device's name, the first that fits; from the vendors' data sheets.
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
              "A10": 125e12, "V100": 125e12, "T4": 65e12}  # fmt: skip


def environment() -> dict[str, str]:
    """Device and versions, for every recorded figure."""
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    packages = ("torch", "triton", "deepspeed", "transformers", "datasets", "sctd_ds")
    versions = {package: _version(package) for package in packages}
    device = (
        f"CPU ({platform.machine()}, {torch.get_num_threads()} threads per rank)" if on_cpu else torch.cuda.get_device_name()
    )
    return {"device": device, "python": platform.python_version(), **versions}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # on the path, but not installed
        return "unknown"


def build(run: RunConfig, shape: Shape, probe: Probe | None, folder: Path) -> dict[str, Any]:
    """Everything known about a finished run. Fractions are savings of time or operations against a baseline's step."""
    records = metrics.read(folder / "metrics.jsonl")
    train = [r for r in records if r["event"] == "train"]
    validation = [r for r in records if r["event"] == "validation"]
    env = environment()
    flops: dict[str, float] = {
        mode: sequence_flops(shape, run.sctd, mode) for mode in (("dense",) if run.sctd.method == "dense" else MODES)
    }
    report: dict[str, Any] = {
        "name": run.name,
        "method": run.sctd.method,
        "steps": train[-1]["step"] if train else 0,
        "loss": {"first": train[0]["loss"], "last": train[-1]["loss"]} if train else {},
        "trained_model": run.pretrain.trained_model,
        "validation": validation[-1] if validation else {},
        "validation_before": next((r for r in validation if r["step"] == 0), {}),
        "flops_saved": flops_saved(shape, run.sctd),
        "flops_per_sequence": flops,
        "kept_token_share": 1.0
        if run.sctd.method == "dense"
        else kept_tokens(shape.length, run.sctd.drop_ratio) / shape.length,
        "run_step_ms": _step_ms(train),
        "samples_per_s": None,
        "tokens_per_s": None,
        "time_saved": None,
        "time_saved_against_huggingface": None,
        "step_ms": {},
        "mfu": None,
        "peak_memory_bytes": None,
        "environment": env,
        "ranks": run.ranks,
        "stages": run.pretrain.stages,
        "micro_batches": run.accumulation,
        "bubble_share": None,
        "global_batch": run.global_batch,
        "seq_length": shape.length,
    }
    if train:
        # The median step of each kind, as often as the run took it: start-up and saving do not count.
        kinds = [record["kind"] for record in train]
        report["samples_per_s"] = run.global_batch / statistics.fmean(report["run_step_ms"][kind] for kind in kinds) * 1000
        report["tokens_per_s"] = report["samples_per_s"] * shape.length
        peak = next((value for name, value in PEAK_FLOPS.items() if name in env["device"]), None)
        if peak:
            done = statistics.fmean(flops[kind] for kind in kinds) * report["samples_per_s"] / run.ranks
            report["mfu"] = done / peak
    if get_accelerator().device_name() != "cpu":
        report["peak_memory_bytes"] = get_accelerator().max_memory_allocated()
    if probe is not None:
        report["step_ms"] = probe.step_ms
        report["probe"] = probe.to_json()
        report["time_saved"] = probe.time_saved(run)
        if HUGGING_FACE in probe.step_ms:
            report["time_saved_against_huggingface"] = probe.time_saved(run, HUGGING_FACE)
        if probe.bubble_share:
            report["bubble_share"] = probe.bubble_share
    return report


def write(report: Mapping[str, Any], folder: Path) -> None:
    """report.json and report.png."""
    (folder / "report.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
    _plot(report, metrics.read(folder / "metrics.jsonl"), folder / "report.png")


def text(report: Mapping[str, Any], folder: Path) -> str:
    """The report for a person."""
    lines = [f"{report['name']}: {report['steps']} steps, method {report['method']}, on {report['environment']['device']}"]
    if report["loss"]:
        lines.append(f"  training loss    {report['loss']['first']:.3f} -> {report['loss']['last']:.3f}")
    validation = report["validation"]
    if validation:
        before = f"{report['validation_before']['loss_full']:.3f} -> " if report["validation_before"] else ""
        line = f"  validation loss  {before}{validation['loss_full']:.3f}"
        if "loss_drop" in validation:
            line += f" with all tokens, {validation['loss_drop']:.3f} with half of them dropped in the middle layers"
            line = line.replace("half of them", f"{1 - report['kept_token_share']:.0%}")
        lines.append(line)
    lines += saving_text(report)
    if report["samples_per_s"]:
        lines.append(f"  speed            {report['samples_per_s']:,.1f} sequences/s, {report['tokens_per_s']:,.0f} tokens/s"
                     + (f", {report['mfu']:.0%} of the device's peak" if report["mfu"] else ""))  # fmt: skip
    lines.append(f"  model            {folder / 'model'}   (AutoModelForMaskedLM.from_pretrained loads it)")
    lines.append(f"  details          {folder / 'report.json'}, {folder / 'report.png'}, {folder / 'metrics.jsonl'}")
    return "\n".join(lines)


def saving_text(report: Mapping[str, Any]) -> list[str]:
    """The lines about time: one step of each kind, and the average saving."""
    if not report["step_ms"]:
        return ["  time saved       not measured (pretrain.probe_steps is 0)"]
    names = {HUGGING_FACE: "untouched Hugging Face"}
    kinds = ", ".join(f"{names.get(kind, kind)} {ms:.0f} ms" for kind, ms in report["step_ms"].items())
    lines = [f"  one step         {kinds}"]
    if report["method"] != "dense":
        expected = f"(its operations say {report['flops_saved']:.1%})"
        line = f"  time saved       {report['time_saved']:.1%} against our dense step {expected}"
        if report["time_saved_against_huggingface"] is not None:
            line += f", {report['time_saved_against_huggingface']:.1%} against untouched Hugging Face"
        lines.append(line)
    if report["bubble_share"]:
        stages, micro = report["stages"], report["micro_batches"]
        shares = ", ".join(f"{kind} {share:.0%}" for kind, share in report["bubble_share"].items())
        lines.append(f"  bubble           {shares} of a step; even stages and free messages would leave "
                     f"{(stages - 1) / (micro + stages - 1):.0%} ({stages} stages, {micro} micro-batches)")  # fmt: skip
    return lines


def card(report: Mapping[str, Any], run: RunConfig, data: Mapping[str, Any]) -> str:
    """The exported model's README."""
    sctd = run.sctd
    how = {
        "dense": "plain masked-language-model pretraining",
        "token_drop": f"token dropping ({sctd.drop_ratio:.0%} of the tokens skip the middle layers)",
        "sctd": f"token dropping with semantic-consistent learning (ScTD; {sctd.drop_ratio:.0%} of the tokens skip the middle "
        f"layers, both passes are aligned with interval {sctd.interval}, kl_weight {sctd.kl_weight})",
    }[sctd.method]
    validation = report["validation"].get("loss_full")
    started = f"| going on from | {report['trained_model']} |\n" if report["trained_model"] else ""
    return f"""---
library_name: transformers
pipeline_tag: fill-mask
---
# {run.name}

A BERT masked language model, pretrained with sctd_ds {report["environment"]["sctd_ds"]} by {how}.
Loaded from here it is a plain BERT that sees every token in every layer.

| | |
|---|---|
| steps x batch | {report["steps"]} x {run.global_batch} sequences of {run.pretrain.seq_length} tokens |
{started}| training text | {", ".join(str(s) for s in data.get("sources", []))} |
| validation loss (masked LM, all tokens) | {"not measured" if validation is None else f"{validation:.4f}"} |
| time saved against a dense step | {"not measured" if report["time_saved"] is None else f"{report['time_saved']:.1%}"} |
| device | {report["environment"]["device"]} |
"""


def _step_ms(train: list[dict[str, Any]]) -> dict[str, float]:
    """Median of the run's own step times by kind, without each kind's first (warm-up) steps."""
    times: dict[str, list[float]] = {}
    for record in train:
        times.setdefault(record["kind"], []).append(record["step_ms"])
    return {kind: statistics.median(values[1:] or values) for kind, values in times.items()}


def _plot(report: Mapping[str, Any], records: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    train = [r for r in records if r["event"] == "train"]
    validation = [r for r in records if r["event"] == "validation"]
    figure = Figure(figsize=(13, 4), layout="constrained")
    loss, steps, saving = figure.subplots(1, 3)
    loss.plot([r["step"] for r in train], [r["loss"] for r in train], lw=0.8, alpha=0.6, label="training")
    for key, label in (("loss_full", "validation, all tokens"), ("loss_drop", "validation, dropped")):
        points = [(r["step"], r[key]) for r in validation if key in r]
        if points:
            loss.plot(*zip(*points, strict=True), marker="o", ms=3, label=label)
    loss.set(title="Loss", xlabel="step", ylabel="nats per masked token")
    loss.legend(fontsize=8)
    kinds = sorted({r["kind"] for r in train})
    for kind in kinds:
        steps.plot([r["step"] for r in train if r["kind"] == kind], [r["step_ms"] for r in train if r["kind"] == kind],
                   ".", ms=3, label=kind)  # fmt: skip
    if "dense" in report["step_ms"] and "dense" not in kinds:
        steps.axhline(report["step_ms"]["dense"], color="k", lw=1, ls="--", label="dense (measured at start-up)")
    steps.set(title="Step time by kind", xlabel="step", ylabel="ms", ylim=(0, None))
    if kinds:
        steps.legend(fontsize=8)
    bars = {"operations": report["flops_saved"], "time, against\nour dense": report["time_saved"],
            "time, against\nHugging Face": report["time_saved_against_huggingface"]}  # fmt: skip
    known = {label: 100 * value for label, value in bars.items() if value is not None}
    drawn = saving.bar(list(known), list(known.values()), color=["tab:gray", "tab:blue", "tab:green"][: len(known)])
    saving.bar_label(drawn, fmt="%.1f %%")
    saving.margins(y=0.15)
    saving.set(title="Saved per step, on average", ylabel="%")
    figure.savefig(path, dpi=130)
