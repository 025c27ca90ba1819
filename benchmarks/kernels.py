"""The kernels against torch, torch.compile and DeepSpeed's random-LTD: `python -m benchmarks.kernels [--quick]`.

Every operator has a floor: the time to move the bytes that it must move, at the bandwidth with
which the same card copies memory, measured in the same run. A time is printed only for an
implementation whose outputs and gradients pass a check against the float64 reference on the
same input; one that fails gets a row that says so. Without a GPU the table has bytes and floors,
and states that nothing was measured.

The table shows S = 512; all rows go to `results/<device>/kernels.csv`, the shares of copy
bandwidth at B=64, S=512, D=1024 to `kernels.png`. torch.compile needs seconds per shape, so it
is measured at S = 512 only. The backward of random-LTD's scatter fails the check: it does not
zero the kept rows' gradient, which is right only together with its gather.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sctd_kernels
import torch
from sctd_kernels import reference
from torch import Tensor
from torch._functorch import config as functorch_config

from benchmarks import harness
from benchmarks.harness import DEVICE, failure, has_failed

PROVIDERS = ("ours", "torch", "torch.compile", "random-LTD")
MODES = ("forward", "backward", "both")
# A rehearsal on a CPU times the torch twin: Triton's interpreter would take minutes.
BACKEND = "triton" if DEVICE.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1" else "torch"
ASSUMED_BANDWIDTH = 3.0e12  # bytes per second, for floors without a GPU: an H100's
VOCABULARY = 30522
LABELLED = 0.15  # of the tokens


@dataclass(frozen=True)
class Sweep:
    """The shapes to measure: every length with every batch, width and dtype. The first of each is the headline's."""

    lengths: tuple[int, ...]
    batches: tuple[int, ...]
    widths: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]

    @property
    def headline(self) -> dict[str, int]:
        return {"B": self.batches[0], "S": self.lengths[0], "D": self.widths[0]}


FULL = Sweep((512, 128, 2048), (64, 16), (1024, 768), (torch.bfloat16, torch.float16))
QUICK = Sweep((512,), (64,), (1024,), (torch.bfloat16,))
REHEARSAL = Sweep((512,), (1,), (32,), (torch.bfloat16,))


@dataclass(frozen=True)
class Case:
    """One operator at one shape: its inputs, its implementations, and the bytes that it must move."""

    op: str
    shape: dict[str, int]
    dtype: torch.dtype
    inputs: Callable[[], tuple[Any, ...]]
    arguments: tuple[int, ...]
    """Indices of the differentiated inputs; none: forward only."""
    providers: dict[str, Callable[..., Any]]
    moved: dict[str, int]
    """Mode -> bytes."""
    exact: bool = True
    """True compares bit for bit (copies and indices), False with a tolerance from torch's own error (arithmetic)."""
    truth: Callable[..., Any] | None = None
    """The formula in float64, if the reference does not take float64."""

    @property
    def name(self) -> str:
        sizes = " ".join(f"{key}={value}" for key, value in self.shape.items())
        return f"{self.op:20} {sizes:22} {str(self.dtype).removeprefix('torch.'):8}"


def routing(B: int, S: int) -> tuple[Tensor, Tensor]:
    """Half of the tokens, chosen at random."""
    ids = torch.randint(VOCABULARY, (B, S), device=DEVICE)
    return sctd_kernels.select_tokens(torch.rand(VOCABULARY, device=DEVICE), ids, S // 2)


def our_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: function(*arguments, backend=BACKEND)


def providers(name: str, ltd: Callable[..., Any] | None = None) -> dict[str, Callable[..., Any]]:
    in_torch = getattr(reference, name)
    found = {"ours": our_kernel(getattr(sctd_kernels, name)), "torch": in_torch, "torch.compile": in_torch}
    return found if ltd is None else {**found, "random-LTD": ltd}


def sequence_cases(B: int, S: int, D: int, dtype: torch.dtype, random_ltd: Any) -> Iterator[Case]:
    """Routing and divergence: the operations on [B, S, D]."""
    K = S // 2
    shape, item = {"B": B, "S": S, "D": D}, dtype.itemsize
    full, kept_rows = B * S * D * item, B * K * D * item

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, dtype=dtype, device=DEVICE).requires_grad_()

    gather = merge = None
    if random_ltd is not None:
        gather = lambda x, kept, slot: random_ltd.GatherTokens.apply(x, kept, True)[1]  # noqa: E731
        merge = lambda x, y, kept, slot: random_ltd.ScatterTokens.apply(x, y, kept, True)  # noqa: E731
    yield Case(
        "gather_tokens",
        shape,
        dtype,
        inputs=lambda: (random(B, S, D), *routing(B, S)),
        arguments=(0,),
        providers=providers("gather_tokens", gather),
        moved={"forward": 2 * kept_rows, "backward": kept_rows + full},
    )
    yield Case(
        "merge_tokens",
        shape,
        dtype,
        inputs=lambda: (random(B, S, D), random(B, K, D), *routing(B, S)),
        arguments=(0, 1),
        providers=providers("merge_tokens", merge),
        moved={"forward": 2 * full, "backward": 2 * full + kept_rows},
    )
    yield Case(
        "softmax_kl",
        shape,
        dtype,
        inputs=lambda: (random(B * K, D).detach(), random(B * K, D)),
        arguments=(1,),
        providers=providers("softmax_kl"),
        moved={"forward": 2 * kept_rows, "backward": 3 * kept_rows},
        exact=False,
    )


def vocabulary_cases(B: int, S: int, dtype: torch.dtype) -> Iterator[Case]:
    """The masked-LM head's loss, on labelled rows."""
    N, V = round(B * S * LABELLED), VOCABULARY
    logits = N * V * dtype.itemsize
    yield Case(
        "token_cross_entropy",
        {"N": N, "V": V},
        dtype,
        inputs=lambda: (
            torch.randn(N, V, dtype=dtype, device=DEVICE).requires_grad_(),
            torch.randint(V, (N,), device=DEVICE),
        ),
        arguments=(0,),
        providers=providers("token_cross_entropy"),
        moved={"forward": logits, "backward": 2 * logits},
        exact=False,
    )


def index_cases(B: int, S: int) -> Iterator[Case]:
    """Selection and importance: they move a few hundred kilobytes, so the launch dominates their time."""
    N, V = round(B * S * LABELLED), VOCABULARY
    yield Case(
        "select_tokens",
        {"B": B, "S": S},
        torch.float32,
        inputs=lambda: (torch.rand(V, device=DEVICE), torch.randint(V, (B, S), device=DEVICE), S // 2),
        arguments=(),
        providers=providers("select_tokens"),
        moved={"forward": B * S * (8 + 4 + 4) + B * S // 2 * 4},
    )

    def record(function: Callable[..., None]) -> Callable[..., Tensor]:
        def recorded(stats, labels, losses):
            function(stats, labels, losses)
            return stats

        return recorded

    def update(function: Callable[..., None]) -> Callable[..., Tensor]:
        def updated(scores, stats):
            function(scores, stats, 0.995)
            return scores

        return updated

    yield Case(
        "record_losses",
        {"N": N, "V": V},
        torch.float32,
        inputs=lambda: (
            torch.zeros(2, V, dtype=torch.float64, device=DEVICE),
            torch.randint(V, (N,), device=DEVICE),
            torch.rand(N, device=DEVICE) * 10,
        ),
        arguments=(),
        providers={name: record(function) for name, function in providers("record_losses").items()},
        moved={"forward": N * (8 + 4 + 4 * 8)},
    )
    yield Case(
        "update_scores",
        {"V": V},
        torch.float32,
        inputs=lambda: (torch.full((V,), 10.0, device=DEVICE), torch.ones(2, V, dtype=torch.float64, device=DEVICE)),
        arguments=(),
        providers={name: update(function) for name, function in providers("update_scores").items()},
        moved={"forward": V * (8 + 8 + 4 + 4)},
        exact=False,
        truth=lambda scores, stats: 0.995 * scores + 0.005 * stats[0] / stats[1],
    )


def cases(sweep: Sweep, random_ltd: Any) -> Iterator[Case]:
    for S, B in itertools.product(sweep.lengths, sweep.batches):
        yield from index_cases(B, S)
        for dtype in sweep.dtypes:
            if S == 512:
                yield from vocabulary_cases(B, S, dtype)
            for D in sweep.widths:
                yield from sequence_cases(B, S, D, dtype, random_ltd)


def results_of(case: Case, function: Callable[..., Any], inputs: Sequence[Any], upstream: Tensor | None) -> list[Tensor]:
    """Outputs and gradients. Without gradients, the function gets copies of the inputs, as it may write in place."""
    if not case.arguments:
        output = function(*(x.clone() if isinstance(x, Tensor) else x for x in inputs))
        return list(output) if isinstance(output, tuple) else [output]
    output = function(*inputs)
    return [output, *torch.autograd.grad(output, [inputs[i] for i in case.arguments], upstream.to(output.dtype))]


def errors_of(results: Sequence[Tensor], truths: Sequence[Tensor]) -> list[float]:
    """The largest error of each result, relative to the largest number in the truth."""
    errors = []
    for x, truth in zip(results, truths, strict=True):
        error = (x.double() - truth).abs().max() / truth.abs().max().clamp(min=1e-30)
        errors.append(error.nan_to_num(nan=float("inf")).item())
    return errors


def check(case: Case, function: Callable[..., Any], inputs: Sequence[Any], upstream: Tensor | None) -> tuple[list[str], float]:
    """(complaints about the output and about the gradients, empty if they are right; largest relative error).

    Copies and indices must equal the reference's; other results may have twice the error of
    torch's, against the reference in float64.
    """

    def widen(x: Any) -> Any:
        is_float = isinstance(x, Tensor) and x.is_floating_point()
        return x.detach().double().requires_grad_(x.requires_grad) if is_float else x

    in_torch = case.providers["torch"]
    expected = results_of(case, in_torch, inputs, upstream)
    results = results_of(case, function, inputs, upstream)
    if case.exact:
        errors = [0.0 if torch.equal(x, y) else float("inf") for x, y in zip(results, expected, strict=True)]
        limits = [0.0] * len(errors)
    else:
        wide = [widen(x) for x in inputs]
        truths = [t.detach() for t in results_of(case, case.truth or in_torch, wide, upstream)]
        errors = errors_of(results, truths)
        limits = [2 * error + 1e-6 for error in errors_of(expected, truths)]
    complaints = ["" if error <= limit else f"wrong by {error:.1e}" for error, limit in zip(errors, limits, strict=True)]
    if not case.arguments:
        return ["".join(complaints)], max(errors)
    return [complaints[0], "".join(complaints[1:])], max(errors)


def calls_of(case: Case, function: Callable[..., Any], sets: Sequence[Sequence[Any]], upstream: Tensor | None, mode: str):
    """One call per set of inputs. This must run on the stream that will time the calls."""

    def gradients(output: Tensor, inputs: Sequence[Any], retain_graph: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, [inputs[i] for i in case.arguments], upstream, retain_graph=retain_graph)

    if mode == "forward":
        return [lambda inputs=inputs: function(*inputs) for inputs in sets]
    if mode == "backward":
        outputs = [function(*inputs) for inputs in sets]
        return [lambda o=output, i=inputs: gradients(o, i, True) for output, inputs in zip(outputs, sets, strict=True)]
    return [lambda inputs=inputs: gradients(function(*inputs), inputs, False) for inputs in sets]


def measure(case: Case, bandwidth: float) -> Iterator[dict[str, Any]]:
    """A row for each provider and mode."""
    moved = dict(case.moved)
    if case.arguments:
        moved["both"] = sum(case.moved.values())
    for provider, function in case.providers.items():
        if provider == "torch.compile":
            if case.shape.get("S", 512) != 512:
                continue
            torch._dynamo.reset()
            function = torch.compile(function, fullgraph=True, dynamic=False)
        rows = [
            {
                "op": case.op,
                **{key: case.shape.get(key, "") for key in ("B", "S", "D", "N", "V")},
                "dtype": str(case.dtype).removeprefix("torch."),
                "mode": mode,
                "provider": provider,
                "microseconds": "",
                "p20": "",
                "p80": "",
                "bytes": moved[mode],
                "GB_per_s": "",
                "share_of_copy": "",
                "host_microseconds": "",
                "peak_MiB": "",
                "relative_error": "",
                "check": "",
            }
            for mode in moved
        ]
        try:
            fill(rows, case, function, bandwidth)
        except Exception as error:  # whatever it is, the other figures are worth having
            status = failure(error)
            for row in rows:
                row["check"] = row["check"] or status
        yield from rows


def fill(rows: Sequence[dict[str, Any]], case: Case, function: Callable[..., Any], bandwidth: float) -> None:
    """Check one implementation and measure it: a row for each mode."""
    torch.manual_seed(0)
    stream = harness.new_stream()
    harness.synchronize()
    with torch.cuda.stream(stream):
        sets = [case.inputs() for _ in range(harness.input_sets(case.moved["forward"]))]
        upstream = None
        if case.arguments:
            output = case.providers["torch"](*sets[0])
            upstream = torch.randn(output.shape, device=DEVICE).to(output.dtype)
            del output
        complaints, error = check(case, function, sets[0], upstream)
    for row in rows:
        complaint = complaints[0] if row["mode"] == "forward" else "".join(complaints)
        if not complaint:
            with torch.cuda.stream(stream):
                calls = calls_of(case, function, sets, upstream, row["mode"])
            row |= figures(calls, stream, row["bytes"], bandwidth, with_host=row["mode"] == "forward")
            del calls
        row |= {"relative_error": f"{error:.2e}", "check": complaint or "passed"}


def figures(calls: Sequence[Callable], stream: Any, moved: int, bandwidth: float, with_host: bool) -> dict[str, Any]:
    """The measured columns of a row. moved: bytes per call; with_host: also measure the host's time."""
    with torch.cuda.stream(stream):
        peak = harness.peak_bytes(calls[0])
        host = harness.host_microseconds(calls[0]) if with_host else None
    timing = harness.time_calls(calls, stream)
    rate = moved / timing.median * 1e6
    return {
        "microseconds": round(timing.median, 2),
        "p20": round(timing.p20, 2),
        "p80": round(timing.p80, 2),
        "GB_per_s": round(rate / 1e9, 1),
        "share_of_copy": round(rate / bandwidth, 3),
        "host_microseconds": "" if host is None else round(host, 1),
        "peak_MiB": round(peak / 2**20, 1),
    }


def table_lines(case: Case, rows: Sequence[dict[str, Any]], modes: Sequence[str]) -> Iterator[str]:
    """One line per mode: time and share of copy bandwidth of our kernel, then the others' times and their ratios to it."""
    for mode in modes:
        cells = []
        ours = None
        for row in rows:
            if row["mode"] != mode:
                continue
            if row["check"] != "passed":
                cells.append(f"{row['provider']} {'' if has_failed(row['check']) else 'REFUSED: '}{row['check']}")
            elif row["provider"] == "ours":
                ours = row["microseconds"]
                host = f", host {row['host_microseconds']} us" if row["host_microseconds"] != "" else ""
                cells.append(f"{ours:7.1f} us {row['share_of_copy']:4.0%}{host}")
            else:
                ratio = f" {row['microseconds'] / ours:.2f}x" if ours else ""
                cells.append(f"{row['provider']} {row['microseconds']:.1f}{ratio}")
        if cells:
            yield f"{case.name} {mode:8} " + " | ".join(cells)


def plot(path: Path, rows: Sequence[dict[str, Any]], environment: harness.Environment, headline: dict[str, int]) -> None:
    """Share of copy bandwidth at one shape, in bfloat16."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def is_shown(row: dict[str, Any]) -> bool:
        labelled = round(headline["B"] * headline["S"] * LABELLED)
        has_shape = all(row[key] == size for key, size in headline.items()) or row["N"] == labelled
        return has_shape and row["dtype"] == "bfloat16" and row["check"] == "passed" and row["mode"] != "both"

    chosen = [row for row in rows if is_shown(row)]
    bars = list(dict.fromkeys((row["op"], row["mode"]) for row in chosen))
    figure, axes = pyplot.subplots(figsize=(10, 0.6 * len(bars) + 1.5), layout="constrained")
    for i, provider in enumerate(PROVIDERS):
        share = {(row["op"], row["mode"]): row["share_of_copy"] for row in chosen if row["provider"] == provider}
        present = [n for n, bar in enumerate(bars) if bar in share]
        axes.barh([n + 0.2 * (i - 1.5) for n in present], [share[bars[n]] for n in present], 0.2, label=provider)
    axes.set_yticks(range(len(bars)), [f"{op}, {mode}" for op, mode in bars])
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("necessary bytes per second, as a share of copy bandwidth")
    shape = ", ".join(f"{key}={size}" for key, size in headline.items())
    axes.set_title(f"{shape}, bfloat16 — {environment.device}, torch {environment.torch}, {environment.commit}")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def load_random_ltd() -> Any:
    """DeepSpeed's module of random-LTD operators, or None with the reason printed."""
    try:
        from benchmarks import random_ltd
    except ImportError as error:  # only this comparison needs DeepSpeed and transformers
        reason: str | None = str(error)
    else:
        reason = random_ltd.unavailable()
    if reason is None:
        return random_ltd.dropping_utils
    print(f"random-LTD is left out: {reason}")
    return None


def print_floors(sweep: Sweep) -> None:
    print(f"No CUDA device: necessary bytes, and their time at {ASSUMED_BANDWIDTH / 1e12:.1f} TB/s (about an H100)")
    for case in cases(sweep, None):
        if case.shape.get("S", 512) == 512:
            for mode, moved in case.moved.items():
                floor = moved / ASSUMED_BANDWIDTH * 1e6
                print(f"{case.name} {mode:8} {moved / 1e6:9.2f} MB  floor {floor:7.1f} us  not measured")


def run(sweep: Sweep, folder: Path, modes: Sequence[str]) -> list[dict[str, Any]]:
    """Measure every case and print it; the CSV is written after each."""
    functorch_config.donated_buffer = False  # allows repeated calls of a compiled backward
    environment = harness.Environment.collect()
    bandwidth = harness.copy_bandwidth(2**20 if sweep is REHEARSAL else 2**29)
    print(
        f"{environment.device}, copy {bandwidth / 1e12:.2f} TB/s, torch {environment.torch}, triton {environment.triton},"
        f" commit {environment.commit}\nours: us per call, share of copy bandwidth | others: us, times ours"
    )
    folder /= environment.folder_name
    rows: list[dict[str, Any]] = []
    for case in cases(sweep, load_random_ltd()):
        measured = list(measure(case, bandwidth))
        rows += [{**row, "copy_GB_per_s": round(bandwidth / 1e9, 1)} for row in measured]
        if case.shape.get("S", 512) == 512:
            print("\n".join(table_lines(case, measured, modes)), flush=True)
        harness.write_csv(folder / "kernels.csv", rows, environment)
        torch.cuda.empty_cache()
    plot(folder / "kernels.png", rows, environment, sweep.headline)
    print(f"{len(rows)} rows in {folder / 'kernels.csv'}")
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.splitlines()[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="only B=64, S=512, D=1024 in bfloat16")
    size.add_argument(
        "--rehearse",
        action="store_true",
        help="one tiny shape, to see that everything runs: on a CPU with our kernels' torch twins; the times mean nothing",
    )
    parser.add_argument("--output", type=Path, default=harness.RESULTS, help="folder for <device>/kernels.csv and .png")
    options = parser.parse_args(arguments)
    sweep = QUICK if options.quick else REHEARSAL if options.rehearse else FULL
    if DEVICE.type == "cpu" and not options.rehearse:
        print_floors(sweep)
        return 0
    rows = run(sweep, options.output, MODES if options.quick else MODES[:2])
    wrong = {row["op"] for row in rows if row["provider"] == "ours" and row["check"] != "passed"}
    failed = {f"{row['provider']} {row['op']}" for row in rows if has_failed(row["check"])}
    if wrong:
        print(f"our kernels failed their check, so no time is printed: {', '.join(sorted(wrong))}", file=sys.stderr)
    if failed:
        print(f"no figure: {', '.join(sorted(failed))}", file=sys.stderr)
    return 1 if wrong or failed else 0


if __name__ == "__main__":
    sys.exit(main())
