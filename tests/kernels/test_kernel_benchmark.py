"""The benchmark: its checks, the bytes that it counts, and what it says where it cannot measure."""

import csv
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers.kernels import DEVICE

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the benchmarks are run from the repository, never installed

from benchmarks import harness, kernels
from sctd_ds.run import environment

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in subtract:RuntimeWarning")

CASES = {
    case.op: case
    for case in (
        *kernels.sequence_cases(2, 12, 64, torch.float16, None),
        *kernels.vocabulary_cases(1, 20, torch.float16),
        *kernels.index_cases(2, 12),
    )
}
ENVIRONMENT = environment.Environment("Some GPU 80GB", "abc", "2", "3", "13", "3.12", "2026-01-01")


def inputs_of(case):
    inputs = case.inputs()
    upstream = torch.randn(case.providers["torch"](*inputs).shape, device=DEVICE) if case.arguments else None
    return inputs, upstream


@pytest.mark.parametrize("op", CASES)
def test_our_kernels_pass_the_check(op):
    case = CASES[op]
    complaints, error = kernels.check(case, case.providers["ours"], *inputs_of(case))
    assert not any(complaints) and error < 1e-2


@pytest.mark.parametrize("op", CASES)
def test_a_wrong_output_is_refused(op):
    case = CASES[op]

    def wrong(*arguments):
        output = case.providers["torch"](*arguments)
        output = list(output) if isinstance(output, tuple) else [output]
        output[-1] = output[-1] + 1
        return tuple(output) if len(output) > 1 else output[0]

    complaints, error = kernels.check(case, wrong, *inputs_of(case))
    assert complaints[0] and error > 1e-3


@pytest.mark.parametrize("op", [op for op, case in CASES.items() if case.arguments])
def test_a_wrong_gradient_is_refused_but_its_output_is_not(op):
    case = CASES[op]

    def wrong(*arguments):
        output = case.providers["torch"](*arguments)
        return output * 2 - output.detach()

    output_complaint, gradient_complaint = kernels.check(case, wrong, *inputs_of(case))[0]
    assert gradient_complaint and not output_complaint


@pytest.mark.parametrize("op", ["gather_tokens", "merge_tokens", "softmax_kl", "token_cross_entropy"])
def test_floors_count_each_tensor_once(op):
    """Forward: every input row that the output depends on, and the output. Backward: the same for the gradients."""
    case = CASES[op]
    inputs, _ = inputs_of(case)
    output = case.providers["torch"](*inputs)
    size = {"x": inputs[0].nbytes, "z": output.nbytes, "y": inputs[1].nbytes}
    expected = {
        "gather_tokens": (2 * size["z"], size["z"] + size["x"]),
        "merge_tokens": (2 * size["z"], size["z"] + size["x"] + size["y"]),
        "softmax_kl": (size["x"] + size["y"], size["x"] + 2 * size["y"]),
        "token_cross_entropy": (size["x"], 2 * size["x"]),
    }[op]
    assert (case.moved["forward"], case.moved["backward"]) == expected


def test_a_refused_row_shows_no_figure(tmp_path):
    case = replace(CASES["gather_tokens"], shape={"B": 64, "S": 512, "D": 1024})
    row = {"op": case.op, **case.shape, "N": "", "dtype": "bfloat16", "mode": "forward", "host_microseconds": 9.0}
    rows = [
        {**row, "provider": "ours", "microseconds": 20.0, "share_of_copy": 0.9, "check": "passed"},
        {**row, "provider": "torch", "microseconds": 30.0, "share_of_copy": 0.6, "check": "passed"},
        {**row, "provider": "random-LTD", "microseconds": "", "share_of_copy": "", "check": "wrong by 1.0e+00"},
    ]
    (line,) = kernels.table_lines(case, rows, kernels.MODES)
    assert line.endswith("20.0 us  90%, host 9.0 us | torch 30.0 1.50x | random-LTD REFUSED: wrong by 1.0e+00")
    kernels.plot(tmp_path / "kernels.png", rows, ENVIRONMENT, kernels.FULL.headline)
    assert (tmp_path / "kernels.png").stat().st_size > 1000
    harness.write_csv(tmp_path / "deep" / "kernels.csv", rows, ENVIRONMENT)
    written = list(csv.DictReader((tmp_path / "deep" / "kernels.csv").open()))
    assert [line["microseconds"] for line in written] == ["20.0", "30.0", ""] and written[0]["commit"] == "abc"
    assert ENVIRONMENT.folder_name == "some-gpu-80gb"


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU measures")
def test_without_a_gpu_nothing_is_claimed(capsys):
    assert kernels.main(["--quick"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12 and all(line.endswith("not measured") for line in lines[1:])
    assert any("merge_tokens" in line and "134.22 MB" in line and "44.7 us" in line for line in lines)


def test_an_implementation_that_fails_costs_no_other_figure(monkeypatch):
    """It fails in its forward, or only where it is differentiated, after its output was checked."""

    def broken(*inputs):
        raise RuntimeError("out of resources: shared memory")

    case = CASES["gather_tokens"]
    case = replace(case, providers={"torch": case.providers["torch"], "broken": broken, "ours": case.providers["torch"]})
    monkeypatch.setattr(kernels.harness, "MAX_CALLS", 2)
    rows = list(kernels.measure(case, bandwidth=1e12))
    assert [(row["provider"], row["mode"]) for row in rows] == [(p, m) for p in case.providers for m in kernels.MODES]
    for row in rows:
        failed = row["provider"] == "broken"
        assert row["check"] == ("failed: RuntimeError: out of resources: shared memory" if failed else "passed")
        assert (row["microseconds"] == "") == failed
    assert "broken failed: RuntimeError" in "".join(kernels.table_lines(case, rows, kernels.MODES))


def test_small_cases_use_many_sets_of_inputs():
    assert harness.input_sets(2**30) == 1
    assert harness.input_sets(2**26) * 2**26 >= harness.CACHE_BYTES
    assert harness.input_sets(1) == 32
