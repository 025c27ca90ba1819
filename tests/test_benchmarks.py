"""The step benchmark: it measures what it says, and survives missing devices, memory and time."""

from __future__ import annotations

import contextlib
import csv
import os
import statistics
import time
from functools import partial, partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import psutil
import pytest
import sctd_kernels
import torch
from deepspeed.ops.random_ltd import dropping_utils
from deepspeed.runtime.engine import DeepSpeedEngine

from benchmarks import gpu, kernels, operators, profiling, random_ltd, step_tables, steps, table5, train_step
from benchmarks.harness import MEASURED
from benchmarks.steps import ALIGN, BY_NAME, HUGGING_FACE, RANDOM_LTD, SEPARATE, VARIANTS, Case, Setup, Trainer
from benchmarks.train_step import Measured
from helpers import ROOT
from sctd_ds.adapters.huggingface import BertAdapter
from sctd_ds.engine.data_parallel import ScTDEngine
from sctd_ds.method.convert import state_of
from sctd_ds.method.encoder import Encoder
from sctd_ds.run import environment
from sctd_ds.run.probe import interleave, time_calls

CASE = Case("toy", 32, 4)
EAGER = [variant for variant in VARIANTS if variant.model in ("plain", "converted") and not variant.eager]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU; CI is one")


@pytest.fixture(autouse=True)
def random_ltd_is_loaded_anew() -> None:
    random_ltd.unavailable.cache_clear()


def make(setup: Setup, phase: str):
    return partial(train_step.make_trainer, "toy", setup, phase)


@pytest.fixture
def setup() -> Setup:
    return Setup(DEVICE, "fp32", compile=False)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_have_exactly_the_labels_of_pretraining():
    for batch in Case("toy", 512, 3).batches(torch.device("cpu"), count=2):
        labelled = batch["labels"] != -100
        assert labelled.sum(1).tolist() == [76] * 3
        assert not labelled[:, 0].any()
        assert (batch["input_ids"][labelled] == 3).all()
        assert (batch["labels"][labelled] >= 4).all()


def watch_lengths(trainer: Trainer) -> list[tuple[int, int]]:
    """A list that receives (rows, tokens) of every pass through a layer's feed-forward part."""
    lengths: list[tuple[int, int]] = []
    for layer in trainer.model.bert.encoder.layer:
        layer.intermediate.register_forward_hook(lambda module, inputs, output: lengths.append(tuple(inputs[0].shape[:2])))
    return lengths


@pytest.mark.parametrize("phase", ["bare", "engine"])
def test_each_variant_takes_the_step_that_it_promises(setup, phase):
    """Layers see the promised lengths, layer by layer and the full pass first, the engine has its class, and weights move."""
    trainer = Trainer("toy", setup)
    if phase == "engine":
        trainer.start_engine()
    batch = CASE.batches(setup.device)[0]
    lengths = watch_lengths(trainer)
    full, kept, read = (4, 32), (4, 16), (4, CASE.labels + 1)
    expected = {
        HUGGING_FACE: [full] * 4,
        "dense": [full] * 3 + [read],
        "drop": [full, kept, kept, read],
        ALIGN: [full, full, kept, full, kept, read, read],
        SEPARATE: [full, full, full, kept, full, kept, read, read],
        steps.DENSE_WHOLE: [full] * 4,
        steps.DROP_WHOLE: [full, kept, kept, full],
    }
    for name, wanted in expected.items():
        lengths.clear()
        before = trainer.model.bert.embeddings.word_embeddings.weight.detach().clone()
        trainer.choose(BY_NAME[name], CASE)
        trainer.step(batch)
        assert lengths == wanted, name
        moved = not torch.equal(before, trainer.model.bert.embeddings.word_embeddings.weight)
        assert moved == (phase == "engine")
        if phase == "engine":
            assert type(trainer.engine) is (DeepSpeedEngine if name == HUGGING_FACE else ScTDEngine)
    trainer.close()


class TorchOperators:
    """What random-LTD's CUDA operators do. indices: [B, K] int32."""

    @staticmethod
    def token_sort_(indices, length):
        return indices.copy_(indices.sort(dim=-1).values)

    @staticmethod
    def token_gather(x, indices, batch_first):
        return x.gather(1, indices.long()[..., None].expand(-1, -1, x.shape[2]))

    @staticmethod
    def token_scatter_(x, rows, indices, batch_first):
        return x.scatter_(1, indices.long()[..., None].expand(-1, -1, x.shape[2]), rows)


@pytest.fixture
def torch_operators(monkeypatch) -> None:
    builder = SimpleNamespace(load=lambda verbose=False: TorchOperators)
    monkeypatch.setattr(dropping_utils, "RandomLTDBuilder", lambda: builder)
    monkeypatch.setattr(dropping_utils, "random_ltd_module", None)


def test_random_ltd_drops_our_share_of_the_tokens_in_our_layers(setup, torch_operators):
    """DeepSpeed's own engine and wrappers run around the untouched model; variants before and after it are unaffected."""
    trainer = Trainer("toy", setup)
    trainer.start_engine()
    assert trainer.missing(BY_NAME[RANDOM_LTD]) is None
    layers, lengths = trainer.model.bert.encoder.layer, watch_lengths(trainer)
    names = list(trainer.model.state_dict())
    changed: list[list[int]] = []
    trainer.choose(BY_NAME[RANDOM_LTD], CASE)
    for layer in trainer.model.bert.encoder.layer:
        layer.register_forward_hook(lambda _, inputs, output: changed.append((inputs[0] != output).any(-1).sum(1).tolist()))
    for case, full, kept in ((CASE, (4, 32), (4, 16)), (Case("toy", 64, 2), (2, 64), (2, 32)), (CASE, (4, 32), (4, 16))):
        batch = case.batches(setup.device)[0]
        for name, wanted in ((HUGGING_FACE, [full] * 4), (RANDOM_LTD, [full, kept, kept, full]), ("dense", [full] * 3)):
            before = [p.detach().clone() for p in trainer.model.parameters()]
            trainer.choose(BY_NAME[name], case)
            lengths.clear(), changed.clear()
            trainer.step(batch)
            assert lengths[: len(wanted)] == wanted, name
            assert all(not torch.equal(old, new) for old, new in zip(before, trainer.model.parameters(), strict=True))
            # Tokens that a layer drops leave it as they came.
            assert changed == ([[length] * rows for rows, length in wanted] if name == RANDOM_LTD else [])
    trainer.choose(BY_NAME["drop"], CASE)
    assert trainer.model.bert.encoder.layer is layers
    assert list(trainer.model.state_dict()) == names
    trainer.close()


def test_random_ltd_is_measured_beside_the_others(setup, torch_operators):
    chosen = [BY_NAME[name] for name in (HUGGING_FACE, RANDOM_LTD, "dense")]
    results = train_step.measure(make(setup, "engine"), CASE, chosen, steps=4)
    rows = {row["variant"]: row for row in train_step.step_rows(CASE, "engine", setup, results)}
    assert rows[RANDOM_LTD]["ratio"] == pytest.approx(rows[RANDOM_LTD]["ms"] / rows[HUGGING_FACE]["ms"])


def test_where_random_ltd_cannot_be_compiled_its_row_says_why(setup, monkeypatch):
    def load(verbose: bool = False) -> None:
        raise OSError("CUDA_HOME does not exist, unable to compile CUDA op(s)\nmore")

    monkeypatch.setattr(dropping_utils, "RandomLTDBuilder", lambda: SimpleNamespace(load=load))
    chosen = [BY_NAME[name] for name in (RANDOM_LTD, "dense")]
    found = {phase: train_step.measure(make(setup, phase), CASE, chosen, steps=4) for phase in ("bare", "engine")}
    wanted = "not measured: random-LTD's CUDA operators: CUDA_HOME does not exist, unable to compile CUDA op(s)"
    assert found["engine"][RANDOM_LTD] == Measured(status=wanted)
    assert found["bare"][RANDOM_LTD].status == "not measured: random-LTD works inside DeepSpeed's engine only"
    assert all(len(results["dense"].ms) == 4 for results in found.values())


@without_gpu
def test_the_kernels_are_compared_without_random_ltd_where_it_cannot_run(capsys):
    assert kernels.load_random_ltd() is None
    assert capsys.readouterr().out.startswith("random-LTD is left out: random-LTD's CUDA operators: ")


def test_the_kernels_are_compared_with_random_ltd_where_it_runs(torch_operators):
    assert kernels.load_random_ltd() is dropping_utils
    assert dropping_utils.random_ltd_module is TorchOperators


def test_every_row_of_a_spread_step_is_aligned_once_per_interval(setup):
    trainer = Trainer("toy", setup)
    trainer.choose(BY_NAME["spread"], CASE)
    aligned = 0
    for batch in CASE.batches(setup.device, count=10):
        trainer.step(batch)
        aligned += "kl_last" in state_of(trainer.model).parts
    assert aligned == CASE.batch
    trainer.close()


def test_figures_follow_from_the_times(setup):
    ms = {
        HUGGING_FACE: 40.0,
        RANDOM_LTD: 32.0,
        "dense": 20.0,
        "drop": 15.0,
        ALIGN: 26.0,
        SEPARATE: 35.0,
        "spread": 16.0,
        steps.DENSE_WHOLE: 24.0,
        steps.DROP_WHOLE: 18.0,
    }
    case = Case("large", 512, 64)
    rows = train_step.step_rows(case, "engine", setup, {name: Measured([value] * 5) for name, value in ms.items()})
    by_name = {row["variant"]: row for row in rows}
    assert by_name["drop"]["ratio"] == by_name[steps.DROP_WHOLE]["ratio"] == 0.75
    # GFLOP forward of a layer of BERT-large at 512 tokens, counted by hand: on all tokens, on the kept ones, its keys and
    # values on all and the rest on [CLS] and 76 labelled ones; and of the head on these and on all.
    whole, kept, last, head, head_on_all = 13.959, 6.711, 3.947, 4.905, 33.08
    dense, cross = 23 * whole + last + head, 8.053
    drop = dense - 12 * whole + cross + 11 * kept
    assert by_name["drop"]["ideal_ratio"] == pytest.approx(drop / dense, abs=1e-3)
    assert by_name["drop"]["saving_reached"] == pytest.approx(0.25 / (1 - drop / dense), abs=5e-3)
    dense_whole = 24 * whole + head
    drop_whole = dense_whole - 12 * whole + cross + 11 * kept
    assert by_name[steps.DROP_WHOLE]["ideal_ratio"] == pytest.approx(drop_whole / dense_whole, abs=1e-3)
    assert by_name[RANDOM_LTD]["ratio"] == 0.8
    random_ltd = (12 * (whole + kept) + head_on_all) / (24 * whole + head_on_all)
    assert by_name[RANDOM_LTD]["ideal_ratio"] == pytest.approx(random_ltd, abs=1e-3)
    assert by_name["drop"]["sequences_per_s"] == pytest.approx(64 / 0.015)
    assert by_name["drop"]["speed_against_huggingface"] == pytest.approx(40 / 15)
    # Backward is twice forward; TFLOP/s of 64 sequences.
    assert by_name["dense"]["model_tflops"] == pytest.approx(64 / 0.020 * 3e-3 * dense, rel=2e-3)
    assert by_name[steps.DENSE_WHOLE]["model_tflops"] == pytest.approx(64 / 0.024 * 1.020, rel=2e-3)
    assert by_name[HUGGING_FACE]["model_tflops"] == pytest.approx(64 / 0.040 * 1.104, rel=2e-3)
    averages = {row["variant"]: row for row in train_step.average_rows(case, "engine", setup, rows)}
    assert averages["sctd Fi=10"]["ratio"] == pytest.approx((0.9 * 15 + 0.1 * 26) / 20)
    align = drop + 12 * whole + last + head  # 11 layers are shared
    assert averages["sctd Fi=10"]["ideal_ratio"] == pytest.approx((0.9 * drop + 0.1 * align) / dense, abs=1e-3)
    separate = averages["sctd Fi=5, separate prefix"]
    assert separate["ideal_ratio"] == pytest.approx((0.8 * drop + 0.2 * (drop + dense)) / dense, abs=1e-3)
    assert averages["sctd Fi=10"]["speed_against_huggingface"] == pytest.approx(40 / (0.9 * 15 + 0.1 * 26))


def test_turns_alternate_and_every_call_is_timed():
    """The warm-up does not count, and a turn's calls keep their order."""
    order: list[str] = []

    def turn(name: str, seconds: float) -> list:
        order.append(name)
        return [partial(time.sleep, seconds), partial(order.append, f"end of {name}")]

    timed = interleave({"short": partial(turn, "short", 0.0), "long": partial(turn, "long", 0.02)}, rounds=2, warmup=1)
    assert order == ["short", "end of short", "long", "end of long"] * 3
    assert [len(each.ms) for each in timed.values()] == [2, 2]
    assert all(slept >= 20 > end for slept, end in timed["long"].ms)
    if DEVICE.type == "cpu":  # a process that waits does no work
        assert all(slept < 20 for slept, _ in timed["long"].work_ms)
    assert (timed["long"].peak_bytes is None) == (DEVICE.type == "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_times_are_of_the_device_and_peaks_of_the_turn():
    def work() -> None:
        x = torch.empty(2**28, dtype=torch.uint8, device="cuda")
        for _ in range(100):
            x.add_(1)

    work()
    (first, second), _, peak = time_calls([work, lambda: None])
    assert first > 100 * 2**28 / 8e12 * 1e3 > second  # no memory is faster than 8 TB/s
    assert 2**28 <= peak - torch.cuda.memory_allocated() < 2**29


@without_gpu
def test_command_writes_what_it_measured_and_table5_reads_it(tmp_path, capsys):
    common = ["--cases", "toy:32:4,large:512:64", "--steps", "4", "--out", str(tmp_path), "--note", "A busy day."]
    assert train_step.main(common) == 0
    printed = capsys.readouterr().out
    assert "No GPU" in printed
    assert "large S=512 B=64: not measured (no GPU)" in printed
    (folder,) = tmp_path.iterdir()
    assert (folder / "train_step.png").stat().st_size > 10_000
    rows = read(folder / "train_step.csv")
    measured = [row for row in rows if row["status"] == "measured"]
    assert {(row["phase"], row["variant"]) for row in measured} == {(p, v.name) for p in ("bare", "engine") for v in EAGER}
    assert all(float(row["ms_p20"]) <= float(row["ms_p80"]) and row["torch"] == torch.__version__ for row in measured)
    assert {row["status"] for row in rows if row["model"] == "large"} == {"not measured (no GPU)"}
    text = (folder / "train_step.md").read_text()
    assert "A busy day." in text and "**large, 512 tokens, 64 rows, fp32**: not measured (no GPU)" in text
    for row in measured:
        assert f"| {row['variant']} | {float(row['ms']):.1f} | " in text
    assert "| random-LTD | not measured: random-LTD's CUDA operators: " in text

    assert table5.main(["--model", "toy", "--length", "32", "--out", str(tmp_path)]) == 0
    ms = {row["variant"]: float(row["ms"]) for row in measured if row["phase"] == "engine"}
    first, second, *_ = read(folder / "table5.csv")
    assert float(first["paper"]) == pytest.approx(0.215, abs=1e-3)
    assert float(first["shared_measured"]) == pytest.approx(1 - ms["drop"] / ms["dense"], abs=1e-4)
    mixed = (4 * ms["drop"] + ms[ALIGN]) / 5
    assert second["method"] == "sctd Fi=5"
    assert float(second["shared_measured"]) == pytest.approx(1 - mixed / ms["dense"], abs=1e-4)


@without_gpu
def test_table5_says_not_measured_where_there_is_no_gpu(tmp_path, capsys):
    assert table5.main(["--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("sctd Fi=10"))
    assert line.split() == ["sctd", "Fi=10", "13.8%", "16.0%", "not", "measured", "20.6%", "not", "measured"]


def fail_in(variant: str, error: Exception, after: int = 0):
    """A `Trainer.step` that raises when `variant` has taken `after` steps."""
    taken, step = [], Trainer.step

    def failing(self: Trainer, batch: dict) -> None:
        if self.variant.name == variant:
            taken.append(1)
            if len(taken) > after:
                raise error
        step(self, batch)

    return failing


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "failed: out of memory"),
        (
            RuntimeError("CUDA error: an illegal memory access\nmore"),
            "failed: RuntimeError: CUDA error: an illegal memory access",
        ),
    ],
)
def test_a_variant_that_fails_costs_one_row(setup, monkeypatch, error, status):
    """The others are measured with a new trainer: an engine that was left in the middle of a step is of no use."""
    monkeypatch.setattr(Trainer, "step", fail_in(ALIGN, error))
    made = []

    def make_and_count() -> Trainer:
        made.append(make(setup, "engine")())
        return made[-1]

    results = train_step.measure(make_and_count, CASE, EAGER, steps=4)
    assert {name: result.status for name, result in results.items() if result.status != MEASURED} == {ALIGN: status}
    assert all(len(result.ms) == 4 for name, result in results.items() if name != ALIGN)
    assert len(made) == 2
    assert status in step_tables.table(train_step.step_rows(CASE, "engine", setup, results))


def test_figures_from_before_the_device_was_lost_are_kept(setup, monkeypatch):
    """After the first round every step fails, and so does a new trainer."""
    monkeypatch.setattr(Trainer, "step", fail_in("drop", RuntimeError("the device is lost"), after=3 + train_step.BURST))
    trainers = iter([make(setup, "bare")()])

    def make_once() -> Trainer:
        for trainer in trainers:
            return trainer
        raise RuntimeError("no device")

    variants = [BY_NAME[name] for name in ("dense", "drop")]
    results = train_step.measure(make_once, CASE, variants, steps=2 * train_step.BURST)
    assert {name: len(result.ms) for name, result in results.items()} == {"dense": train_step.BURST, "drop": train_step.BURST}
    assert results["drop"].status == "failed: RuntimeError: the device is lost"
    assert results["dense"].status == "failed: RuntimeError: no device"


def test_the_exit_status_tells_of_a_failure(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Trainer, "step", fail_in("drop", ValueError("no such luck")))
    arguments = ["--cases", "toy:32:4", "--variants", "drop", "--steps", "4", "--no-engine", "--out", str(tmp_path)]
    assert train_step.main(arguments) == 1
    assert "toy S=32 B=4, bare, drop: failed: ValueError: no such luck" in capsys.readouterr().out
    (written,) = tmp_path.glob("*/train_step.csv")
    assert [(row["variant"], row["status"]) for row in read(written)] == [
        ("dense", MEASURED),
        ("drop", "failed: ValueError: no such luck"),
    ]


def test_several_accumulations_are_measured_in_one_call(tmp_path):
    """Micro-batches per step: table5 takes the accumulation at which dense steps are fastest per sequence."""
    arguments = ["--cases", "toy:32:4", "--variants", "drop", "--steps", "4", "--engine", "--accumulation", "3", "1"]
    assert train_step.main([*arguments, "--out", str(tmp_path)]) == 0
    (written,) = tmp_path.glob("*/train_step.csv")
    rows = read(written)
    assert [(row["accumulation"], row["variant"]) for row in rows] == [(n, v) for n in "31" for v in ("dense", "drop")]
    for row in rows:
        assert float(row["sequences_per_s"]) == pytest.approx(4 * int(row["accumulation"]) / float(row["ms"]) * 1e3, rel=1e-4)
    best = max(rows[::2], key=lambda row: float(row["sequences_per_s"]))
    assert {row["accumulation"] for row in table5.at_best_speed(rows)} == {best["accumulation"]}


def test_an_eager_variant_runs_no_compiled_graph(monkeypatch):
    ran: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Any:
        def run(*arguments: Any) -> Any:
            ran.append("graph")
            return graph.forward(*arguments)

        return run

    monkeypatch.setattr(Encoder, "compile", partialmethod(Encoder.compile, backend=backend))
    trainer = Trainer("toy", Setup(DEVICE, "fp32", compile=True))
    (batch,) = CASE.batches(DEVICE, count=1)
    for name, compiled in (("drop", True), ("drop, eager", False), ("drop", True)):
        ran.clear()
        trainer.choose(BY_NAME[name], CASE)
        trainer.step(batch)
        assert bool(ran) == compiled, name
    trainer.close()


def test_a_one_pass_variant_runs_its_operators_and_no_other_does(monkeypatch, setup):
    operators = {name: Mock(wraps=getattr(sctd_kernels, name)) for name in ("linear_gelu", "layer_norm")}
    for name, operator in operators.items():
        monkeypatch.setattr(sctd_kernels, name, operator)
    trainer = Trainer("toy", setup)
    (batch,) = CASE.batches(DEVICE, count=1)
    for name, called in (("drop", False), ("drop, one pass", True), ("dense", False)):
        for operator in operators.values():
            operator.reset_mock()
        trainer.choose(BY_NAME[name], CASE)
        trainer.step(batch)
        assert [operator.called for operator in operators.values()] == [called] * 2, name
    trainer.choose(BY_NAME["drop, one pass"], CASE)
    trainer.close()
    assert not BertAdapter.one_pass_backward


def test_a_few_slow_steps_do_not_keep_the_figure_from_being_drawn(setup, tmp_path):
    """The mean of "spread" then lies above its 80th percentile."""
    results = {"dense": Measured([1.0] * 10), "spread": Measured([1.0] * 9 + [90.0])}
    rows = train_step.step_rows(CASE, "bare", setup, results)
    assert rows[1]["ms"] > rows[1]["ms_p80"]
    step_tables.plot(tmp_path / "figure.png", rows, "title")
    assert (tmp_path / "figure.png").stat().st_size > 5_000


def test_time_budget_leaves_rows_that_say_so(setup, tmp_path):
    rows = train_step.run([CASE], setup, stages=[("bare", 1)], variants=EAGER, steps=4, folder=tmp_path, budget_s=0)
    assert {row["status"] for row in rows} == {"not measured (time budget)"}
    assert len(read(tmp_path / "train_step.csv")) == len(EAGER)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--models", "huge"], 'unknown model "huge"'),
        (["--lengths", "1024"], "expected 8 to 512 tokens"),
        (["--cases", "large:512"], "expected --cases model:length:batch"),
        (["--variants", "dence"], 'unknown variant "dence"'),
    ],
)
def test_wrong_options_are_named(options, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        train_step.main([*options, "--out", str(tmp_path)])


def device_event(
    name: str, start: float, length: float, correlation: int, operator: int | None = None, cat: str = "kernel"
) -> dict:
    arguments = {"correlation": correlation, "External id": operator}
    return {"cat": cat, "name": name, "ts": start, "dur": length, "args": arguments}


def test_profile_sorts_device_time_by_category_of_work():
    """Two steps of 50 us in a trace as torch.profiler writes it; the device idles 20 us and two streams overlap for 10 us."""

    def launch(correlation: int, at: float) -> dict:
        return {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": at, "dur": 1, "args": {"correlation": correlation}}

    def operator(number: int, dims: list) -> dict:
        return {"cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 5, "args": {"External id": number, "Input Dims": dims}}

    events = [
        {"cat": "user_annotation", "name": profiling.UPDATE, "ts": 60, "dur": 10, "args": {}},
        operator(1, [[128, 32], [32, 96]]),  # 128 rows, no vocabulary of 1000: an encoder layer
        operator(2, [[12, 32], [32, 32]]),  # the head's 12 labelled rows
        operator(3, [[12, 32], [32, 1000]]),  # the vocabulary
        *(launch(i, i) for i in range(1, 9)),
        launch(9, 65),
        device_event("nvjet_hsh_128x256", 100, 10, 1, 1),
        device_event("nvjet_hsh_64x64", 110, 10, 2, 2),
        device_event("sm90_xmma_gemm", 120, 10, 3, 3),
        device_event("void pytorch_flash::flash_fwd_kernel<cutlass::half_t>", 130, 10, 4),
        device_event("triton_per_fused_native_layer_norm", 140, 10, 5),
        device_event("take_rows_kernel", 150, 10, 6),
        device_event("ncclDevKernel_AllReduce", 155, 15, 7),
        device_event("Memcpy DtoD", 170, 10, 8, cat="gpu_memcpy"),
        device_event("triton_per_fused_native_layer_norm", 190, 10, 9),  # in the update
        {"cat": "kernel", "name": "cross_entropy_kernel", "ts": 180, "dur": 0, "args": {}},
    ]
    found = profiling.break_down(events, steps=2, head_rows=12, vocabulary=1000)
    assert found.wall == pytest.approx(0.05)
    assert found.gaps == pytest.approx(0.005)
    assert {name: round(ms * 2e3) for name, ms in found.categories.items()} == {
        "GEMM": 10,
        "attention": 10,
        "communication": 15,
        "copy and fill": 10,
        profiling.HEAD: 20,
        profiling.METHOD: 10,
        profiling.OPTIMIZER: 10,
        profiling.ELEMENTWISE: 10,
    }
    assert found.kernels[0] == ("triton_per_fused_native_layer_norm", pytest.approx(0.01), 1.0)
    text = found.text()
    assert "gaps (device idle)" in text and "10.0%" in text
    with pytest.raises(ValueError, match="no device activity"):
        profiling.break_down(events[:5], steps=1, head_rows=1, vocabulary=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_profile_accounts_for_a_real_step():
    trainer = Trainer("toy", Setup(torch.device("cuda"), "fp16", compile=False))
    trainer.start_engine()
    trainer.choose(BY_NAME["drop"], CASE)
    batch = CASE.batches(torch.device("cuda"))[0]
    found = profiling.profile_steps(lambda: trainer.step(batch), head_rows=4 * CASE.labels, vocabulary=96)
    trainer.close()
    assert {"GEMM", "head and loss", profiling.OPTIMIZER} <= found.categories.keys()
    assert sum(found.categories.values()) >= 0.99 * (found.wall - found.gaps) > 0


def test_percentiles_are_of_the_steps():
    values = [float(i) for i in range(1, 12)]
    assert train_step.quantiles(values) == (3.0, 9.0)
    assert statistics.median(values) == 6.0


@pytest.fixture
def parts(monkeypatch, tmp_path) -> dict[str, gpu.Part]:
    """Parts of `benchmarks.gpu` that pass, fail and hang, as if there were a GPU. The second hangs in a child of its own."""
    python = (gpu.PYTHON, "-c")
    hangs = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    launcher = (
        f"import subprocess, time; p = subprocess.Popen([{gpu.PYTHON!r}, '-c', {hangs!r}], stdout=subprocess.PIPE); "
        "p.stdout.readline(); print(p.pid, flush=True); time.sleep(600)"
    )
    made = {
        "fails": gpu.Part("", 1, (*python, "print('why'); raise SystemExit(3)")),
        "hangs": gpu.Part("", 0.1, (*python, launcher)),
        "passes": gpu.Part("", 1, (*python, "import benchmarks, sctd_kernels; print('a figure', {case!r})", "{profile}")),
        "long": gpu.Part("", 20, (*python, "print('long')")),
    }
    monkeypatch.setattr(gpu, "PARTS", made)
    monkeypatch.setattr(gpu, "GRACE_S", 1.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.Environment, "collect", lambda: SimpleNamespace(device="X", torch="1", triton="2", commit="3"))
    return made


def test_parts_that_fail_or_hang_stop_no_other_and_are_named(tmp_path, parts, capsys):
    assert gpu.main(["--out", str(tmp_path), "--plan", "15"]) == 1
    out = capsys.readouterr().out
    assert "=== fails: failed with status 3" in out and "why" in out and "a figure" in out
    assert "1 of 3 passed; look at fails, hangs" in out
    assert gpu.State(tmp_path / "state.json").results["hangs"].startswith("cut off after 0.1 min")
    pid = int((tmp_path / "logs" / "hangs.log").read_text().splitlines()[0])
    deadline = time.monotonic() + 10
    with contextlib.suppress(psutil.NoSuchProcess):
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:  # an orphan that nobody has reaped is as dead
            assert time.monotonic() < deadline, "what the part had started lives on"
            time.sleep(0.05)


def test_a_call_continues_where_the_last_one_ended(tmp_path, parts, monkeypatch, capsys):
    """A call ends before a part that does not fit, the next goes on, and --only runs a part again, by number too."""
    monkeypatch.setitem(parts, "hangs", parts["passes"])
    ran = []
    monkeypatch.setattr(
        gpu, "run_part", lambda command, log, seconds: ran.append(log.stem) or (log.write_text("-") and gpu.PASSED)
    )
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    call = ["--out", str(tmp_path), "--plan", "15", "--minutes", "2"]
    assert gpu.main(call) == 0
    assert ran == ["fails"]
    assert "hangs          comes next" in capsys.readouterr().out
    gpu.main(call), gpu.main(call), gpu.main(call)
    assert ran == ["fails", "hangs", "passes"]
    gpu.main([*call, "--only", "1", "passes"])
    assert ran == ["fails", "hangs", "passes", "fails"]
    gpu.main(["--out", str(tmp_path), "--plan", "1.1"])  # 80 seconds of it are used
    assert ran[4:] == []
    with pytest.raises(SystemExit, match='unknown part "5"'):
        gpu.main(["--only", "5"])


@without_gpu
def test_gpu_parts_say_what_they_need(capsys):
    assert gpu.main([]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("sizes", [gpu.AT_FULL_SIZE, gpu.REHEARSED], ids=["full size", "rehearsed"])
def test_gpu_parts_are_commands_that_exist(sizes, tmp_path):
    for part in gpu.PARTS.values():
        words = part.words(tmp_path, sizes)
        module = words[words.index("-m") + 1]
        assert module in ("pytest", "deepspeed.launcher.runner") or (ROOT / f"{module.replace('.', '/')}.py").is_file()
        files = [word for word in words[1:] if word.endswith((".json", ".py")) or word.startswith("tests/")]
        assert all((ROOT / file.partition("::")[0]).exists() for file in files), files
        if "--variants" in words:
            train_step.parse_variants(words[words.index("--variants") + 1])


@pytest.mark.parametrize(
    ("name", "main"), [("steps", train_step.main), ("engine-16", train_step.main), ("table5", table5.main)]
)
def test_the_rehearsal_of_a_part_writes_its_figures(name, main, tmp_path):
    words = gpu.PARTS[name].words(tmp_path, gpu.REHEARSED)
    assert main([*words[words.index("-m") + 2 :], "--steps", "4"]) == 0
    assert list(tmp_path.glob("**/train_step.csv"))


@without_gpu
def test_a_rehearsal_takes_the_path_of_the_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "environ", {**os.environ})
    assert gpu.main(["--rehearse", "--only", "operators", "deterministic", "--out", str(tmp_path)]) == 0
    assert "2 of 2 passed" in capsys.readouterr().out
    (written,) = tmp_path.glob("operators/*/attention.csv")
    rows = read(written)
    assert {row["backend"] for row in rows} == set(operators.BACKENDS)
    assert {row["shape"] for row in rows} == {"S,S", "K,S", "K,K", "R,S"}
    by_hand = [row for row in rows if row["backend"] == "math"]
    assert {row["status"] for row in by_hand} == {MEASURED}
    assert all(
        0.05 < float(row["dropped"]) < 0.15 and float(row["scale"]) == pytest.approx(1 / 0.9, abs=1e-3)
        for row in by_hand
        if "dropout" in row["how"]
    )
    (written,) = tmp_path.glob("deterministic/*/train_step.csv")
    assert {row["deterministic"] for row in read(written)} == {"True"}


def test_an_attention_that_drops_another_share_or_is_wrong_is_seen(monkeypatch):
    """As a backend that rounds the dropout to sixteenths, and one whose gradients are not finite."""
    attention = operators.Attention("S,S", 4, 2, 32, 32, 16, dropout=0.1)
    attend = torch.nn.functional.scaled_dot_product_attention
    rounded = lambda *inputs, attn_mask, dropout_p: attend(*inputs, attn_mask=attn_mask, dropout_p=round(dropout_p * 16) / 16)  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", rounded)
    torch.manual_seed(0)
    dropped, scale = operators.dropout_of(attention, torch.float32)
    assert dropped == pytest.approx(0.125, abs=0.03) and scale == pytest.approx(16 / 14, abs=1e-4)
    broken = lambda *inputs, attn_mask, dropout_p: attend(*inputs) * float("nan")  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", broken)
    row = operators.attention_row(attention, "torch", torch.float32)
    assert row["error"] == float("inf")


def test_a_backend_that_fails_is_a_row(monkeypatch):
    def fail(*inputs, **options):
        raise RuntimeError("CUDA error: misaligned address")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fail)
    row = operators.attention_row(operators.Attention("S,S", 1, 1, 4, 4, 4), "torch", torch.float32)
    assert row["status"] == "failed: RuntimeError: CUDA error: misaligned address" and row["both_us"] == ""
    assert "misaligned" in operators.attention_line([row])


def test_without_git_the_commit_is_unknown_or_given(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("SCTD_COMMIT", raising=False)
    assert environment.commit() == "unknown"
    monkeypatch.setenv("SCTD_COMMIT", "abc1234")
    assert environment.commit() == "abc1234"
