"""The step benchmark: what it measures is what it says, and it comes through missing devices, memory and time."""

from __future__ import annotations

import csv
import statistics
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from benchmarks import profiling, table5, train_step
from benchmarks.train_step import HUGGING_FACE, VARIANTS, Case, Measured, Setup, Trainer
from sctd_ds.encoder import state_of
from sctd_ds.engine import ScTDEngine

TOY = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 96}
CASE = Case("small", 32, 4)
BY_NAME = {variant.name: variant for variant in VARIANTS}
EAGER = [variant for variant in VARIANTS if variant.name != train_step.HUGGING_FACE_COMPILED]


@pytest.fixture(autouse=True)
def toy(monkeypatch) -> None:
    monkeypatch.setitem(train_step.MODELS, "small", TOY)


@pytest.fixture
def setup() -> Setup:
    return Setup(torch.device("cpu"), "fp32", compile=False)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_have_exactly_the_labels_of_pretraining():
    for batch in Case("small", 512, 3).batches(torch.device("cpu"), count=2):
        labelled = batch["labels"] != -100
        assert labelled.sum(1).tolist() == [76] * 3
        assert not labelled[:, 0].any()
        assert (batch["input_ids"][labelled] == 3).all()
        assert (batch["labels"][labelled] >= 4).all()


@pytest.mark.parametrize("phase", ["bare", "engine"])
def test_each_variant_takes_its_own_kind_of_step(setup, phase, monkeypatch):
    """Layers see the lengths that the variant promises, under the engine class that it promises, and gradients flow."""
    trainer = Trainer("small", setup)
    if phase == "engine":
        trainer.start_engine()
    batch = CASE.batches(setup.device)[0]
    lengths: list[tuple[int, int]] = []
    for layer in trainer.model.bert.encoder.layer:
        layer.intermediate.register_forward_hook(lambda module, inputs, output: lengths.append(tuple(inputs[0].shape[:2])))
    full, kept = (4, 32), (4, 16)
    expected = {
        HUGGING_FACE: [full] * 4,
        "dense": [full] * 4,
        "drop": [full, kept, kept, full],
        train_step.ALIGN: [full, kept, kept, full, *[full] * 3],
        train_step.SEPARATE: [full, kept, kept, full, *[full] * 4],
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


def test_every_row_of_a_spread_step_is_aligned_once_per_interval(setup):
    trainer = Trainer("small", setup)
    trainer.choose(BY_NAME["spread"], CASE)
    aligned = 0
    for batch in CASE.batches(setup.device, count=10):
        trainer.step(batch)
        aligned += "kl_last" in state_of(trainer.model).parts
    assert aligned == CASE.batch
    trainer.close()


def test_figures_follow_from_the_times(setup):
    ms = {HUGGING_FACE: 40.0, "dense": 20.0, "drop": 15.0, train_step.ALIGN: 26.0, train_step.SEPARATE: 35.0, "spread": 16.0}
    case = Case("large", 512, 64)
    rows = train_step.step_rows(case, "engine", setup, {name: Measured([value] * 5) for name, value in ms.items()})
    by_name = {row["variant"]: row for row in rows}
    assert by_name["drop"]["ratio"] == 0.75
    assert by_name["drop"]["ideal_ratio"] == pytest.approx(1 - 0.252, abs=1e-3)  # DESIGN section 6
    assert by_name["drop"]["saving_reached"] == pytest.approx(0.25 / 0.252, abs=5e-3)
    assert by_name["drop"]["sequences_per_s"] == pytest.approx(64 / 0.015)
    assert by_name["drop"]["speed_against_huggingface"] == pytest.approx(40 / 15)
    # One sequence of dense BERT-large is 1020 GFLOP with the head on 76 labelled rows.
    assert by_name["dense"]["model_tflops"] == pytest.approx(64 / 0.020 * 1.020, rel=2e-3)
    assert by_name[HUGGING_FACE]["model_tflops"] == pytest.approx(64 / 0.040 * 1.104, rel=2e-3)
    averages = {row["variant"]: row for row in train_step.average_rows(case, "engine", setup, rows)}
    assert averages["sctd Fi=10"]["ratio"] == pytest.approx((0.9 * 15 + 0.1 * 26) / 20)
    assert averages["sctd Fi=10"]["ideal_ratio"] == pytest.approx(1 - 0.197, abs=1e-3)
    assert averages["sctd Fi=5, separate prefix"]["ideal_ratio"] == pytest.approx(1 - 0.052, abs=1e-3)
    assert averages["sctd Fi=10"]["speed_against_huggingface"] == pytest.approx(40 / (0.9 * 15 + 0.1 * 26))


def test_command_writes_what_it_measured_and_table5_reads_it(tmp_path, capsys):
    common = ["--cases", "small:32:4,large:512:64", "--steps", "4", "--out", str(tmp_path)]
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

    assert table5.main(["--model", "small", "--length", "32", "--out", str(tmp_path)]) == 0
    ms = {row["variant"]: float(row["ms"]) for row in measured if row["phase"] == "engine"}
    first, second, *_ = read(folder / "table5.csv")
    assert float(first["paper"]) == pytest.approx(0.215, abs=1e-3)
    assert float(first["shared_measured"]) == pytest.approx(1 - ms["drop"] / ms["dense"], abs=1e-4)
    mixed = (4 * ms["drop"] + ms[train_step.ALIGN]) / 5
    assert second["method"] == "sctd Fi=5"
    assert float(second["shared_measured"]) == pytest.approx(1 - mixed / ms["dense"], abs=1e-4)


def test_table5_says_not_measured_where_there_is_no_gpu(tmp_path, capsys):
    assert table5.main(["--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("sctd Fi=10"))
    assert line.split() == ["sctd", "Fi=10", "13.8%", "15.2%", "not", "measured", "19.7%", "not", "measured"]


def test_running_out_of_memory_costs_one_row(setup, monkeypatch):
    """The variant is named, the engine is renewed, and the others are measured."""
    taken = Trainer.step

    def step(self: Trainer, batch: dict) -> None:
        if self.variant.name == train_step.ALIGN:
            raise torch.OutOfMemoryError("CUDA out of memory")
        taken(self, batch)

    monkeypatch.setattr(Trainer, "step", step)
    trainer = Trainer("small", setup)
    trainer.start_engine()
    first = trainer.engine
    results, trainer = train_step.measure_surviving(trainer, lambda: Trainer("small", setup), CASE, EAGER, steps=4)
    assert {name for name, result in results.items() if result.status == "out of memory"} == {train_step.ALIGN}
    assert all(len(result.ms) == 4 for name, result in results.items() if name != train_step.ALIGN)
    assert trainer.engine is not None and trainer.engine is not first
    rows = train_step.step_rows(CASE, "engine", setup, results)
    assert "out of memory" in train_step.table(rows)
    trainer.close()


def test_time_budget_leaves_rows_that_say_so(setup, tmp_path):
    rows = train_step.run([CASE], setup, phases=["bare"], variants=EAGER, steps=4, folder=tmp_path, budget_s=0)
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


def test_profile_sorts_device_time_by_kind_of_work():
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
    ]  # fmt: skip
    found = profiling.break_down(events, steps=2, head_rows=12, vocabulary=1000)
    assert found.wall == pytest.approx(0.05)
    assert found.gaps == pytest.approx(0.005)
    assert {name: round(ms * 2e3) for name, ms in found.categories.items()} == {
        "GEMM": 10, "head and loss": 20, "attention": 10, profiling.ELEMENTWISE: 10, "selection, routing, KL, table": 10,
        "communication": 15, "copy and fill": 10, profiling.OPTIMIZER: 10,
    }  # fmt: skip
    assert found.kernels[0] == ("triton_per_fused_native_layer_norm", pytest.approx(0.01), 1.0)
    text = found.text()
    assert "gaps (device idle)" in text and "10.0%" in text
    with pytest.raises(ValueError, match="no device activity"):
        profiling.break_down(events[:5], steps=1, head_rows=1, vocabulary=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_profile_accounts_for_a_real_step():
    trainer = Trainer("small", Setup(torch.device("cuda"), "fp16", compile=False))
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
