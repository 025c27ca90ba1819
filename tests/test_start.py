"""The first hour: any launcher or none, bad input refused within seconds, the package by itself, what a run shows."""

import itertools
import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure
from transformers import BertConfig, BertForMaskedLM

import sctd_ds.__main__ as command
from helpers import ROOT
from helpers.launch import free_port, launch_environment
from helpers.runs import settings as run_settings
from helpers.runs import write_settings
from sctd_ds import ConfigError, data, pretrain
from sctd_ds.engine import place, ranks
from sctd_ds.method.flops import Shape
from sctd_ds.run import job, metrics, probe, report, samples, settings

# Where a process finds out which of how many it is


def found(**environment: str) -> place.Place:
    """The place in this environment, which keeps what was found out."""
    place_found = place.find(environment)
    found.environment = environment
    return place_found


def test_a_process_that_nobody_numbered_is_a_run_of_one():
    here = found(PATH="/bin", MASTER_PORT="1234")
    assert (here.rank, here.world, here.local_rank, here.launched) == (0, 1, 0, False)
    assert {key: found.environment[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")} == {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1234",  # the user's
    }


SLURM = {"SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}


def test_a_task_of_slurm_finds_its_place_and_the_first_host():
    here = found(**SLURM, SLURM_JOB_NODELIST="gpu[003-004,009],login1")
    assert (here.rank, here.world, here.local_rank, here.launched) == (5, 8, 1, False)
    assert (found.environment["MASTER_ADDR"], found.environment["MASTER_PORT"]) == ("gpu003", "23456")
    assert here.note == "Slurm: 8 tasks meet at gpu003:23456"


def test_a_step_on_some_of_the_job_s_hosts_meets_on_the_first_of_these():
    found(**SLURM, SLURM_JOB_NODELIST="a[1-4]", SLURM_STEP_NODELIST="a[3-4]")
    assert found.environment["MASTER_ADDR"] == "a3"


def test_the_user_s_address_wins_over_slurm_s():
    found(**SLURM, SLURM_JOB_NODELIST="a1", MASTER_ADDR="10.0.0.1", MASTER_PORT="29500")
    assert (found.environment["MASTER_ADDR"], found.environment["MASTER_PORT"]) == ("10.0.0.1", "29500")


def test_a_batch_script_without_srun_is_told_what_it_waits_for():
    here = found(**{**SLURM, "SLURM_PROCID": "0"} | {"SLURM_JOB_NODELIST": "a1"})
    assert "srun" not in here.note
    batch = {key: value for key, value in SLURM.items() if key != "SLURM_STEP_ID"}
    assert "srun did not start this one" in found(**batch, SLURM_JOB_NODELIST="a1").note


def test_a_task_that_sees_one_gpu_takes_that(monkeypatch):
    monkeypatch.setattr(place.torch.cuda, "device_count", lambda: 1)
    assert found(**SLURM, SLURM_JOB_NODELIST="a1").local_rank == 0


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("login1", "login1"), ("a,b", "a"), ("gpu[7,9-12]", "gpu7"), ("r[0-1]n[02-07]", "r0n02"), ("n[1-2]-ib,x", "n1-ib")],
)
def test_first_host_of_a_node_list(nodes, first):
    assert place.first_host(nodes) == first


def test_a_launcher_wins_over_the_scheduler_around_it():
    here = found(**SLURM, RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="h", MASTER_PORT="1")
    assert (here.rank, here.world, here.launched) == (1, 2, True)


def test_a_container_for_each_process_needs_no_local_rank():
    assert found(RANK="1", WORLD_SIZE="2", MASTER_ADDR="h", MASTER_PORT="1").local_rank == 0


def test_mpirun_s_numbers_count_inside_of_slurm_s_tasks():
    mpi = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    here = found(**SLURM, **mpi, MASTER_ADDR="h", MASTER_PORT="1")
    assert (here.rank, here.world, here.local_rank) == (3, 4, 1)
    with pytest.raises(ConfigError, match="rank 3 of 4, and nothing says where rank 0 is: set MASTER_ADDR"):
        found(**mpi)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set and RANK is not"),
        ({"RANK": "zero", "WORLD_SIZE": "2"}, 'RANK="zero"'),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "nothing says where rank 0 is"),
    ],
)
def test_half_an_environment_is_an_error(environment, message):
    with pytest.raises(ConfigError, match=message):
        found(**environment)


def test_deepspeed_starts_without_compiling_its_operator(monkeypatch):
    backend = sys.modules["deepspeed.comm.torch"]
    before, during = backend.build_shm_op, []
    monkeypatch.setattr(ranks.deepspeed, "init_distributed", lambda **_: during.append(backend.build_shm_op()))
    ranks.init_distributed()
    assert during == [None] and backend.build_shm_op is before


# Real starts. Writing a control needs configuration, data and ranks that know each other, and no model.

PYTHON = sys.executable
SCTD = f"{PYTHON} -m sctd_ds pretrain"
DEEPSPEED = f"{PYTHON} -m deepspeed.launcher.runner --master_port {{port}}"
STARTS = {
    "nothing": (1, SCTD),
    "script": (1, f"{PYTHON} pretrain.py"),
    "deepspeed": (2, f"{DEEPSPEED} --num_gpus 2 --module sctd_ds pretrain"),
    "hostfile": (
        2,
        f"{DEEPSPEED} --hostfile {{hosts}} --no_ssh --node_rank 0 --master_addr 127.0.0.1 --module sctd_ds pretrain",
    ),
    "torchrun": (2, f"{PYTHON} -m torch.distributed.run --nproc_per_node 2 --master_port {{port}} -m sctd_ds pretrain"),
    "accelerate": (
        2,
        f"{PYTHON} -m accelerate.commands.launch --multi_gpu --num_machines 1 --num_processes 2 --main_process_port {{port}} "
        "-m sctd_ds pretrain",
    ),
    "sbatch": (2, "bash examples/pretrain.sbatch"),
}
"""By launcher: the ranks that it starts, and the command."""

SRUN = f"""#!/bin/bash
# A stand-in: two tasks with the variables that Slurm gives them. Its status is that of the worst, as srun's.
export SLURM_STEP_ID=0 SLURM_NTASKS=2 SLURM_JOB_NODELIST=localhost
[ "$1 $2 $3" = "--kill-on-bad-exit=1 sctd pretrain" ] || exit 99
shift 3
SLURM_PROCID=1 SLURM_LOCALID=1 {SCTD} "$@" & other=$!
SLURM_PROCID=0 SLURM_LOCALID=0 {SCTD} "$@" || status=$?
wait $other || status=$?
exit "${{status:-0}}"
"""


@pytest.fixture(scope="module")
def started(small_data, tmp_path_factory):
    """Starts pretrain with `--write-control` as STARTS says; returns what ended, and the file."""
    folder = tmp_path_factory.mktemp("start")
    config = write_settings(folder / "mini.json", pretrain={"data": str(small_data)})
    (folder / "hosts").write_text("localhost slots=2\n")
    (folder / "srun").write_text(SRUN)
    (folder / "scontrol").write_text(f'#!/bin/bash\necho "$@" >> {folder / "requeued"}\n')
    for name in ("srun", "scontrol"):
        (folder / name).chmod(0o755)

    def start(how: str, *more: str) -> tuple[subprocess.CompletedProcess, Path]:
        control = folder / f"{how}{len(more)}.json"
        words = shlex.split(STARTS[how][1].format(port=free_port(), hosts=folder / "hosts"))
        words += ["--deepspeed_config", str(config), "--write-control", str(control), *more]
        slurm = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": str(free_port())} if how == "sbatch" else {}
        environment = {**launch_environment(), **slurm}
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
        return done, control

    start.folder = folder
    return start


@pytest.mark.parametrize("how", STARTS)
def test_every_start_of_the_documentation_finds_its_ranks(started, how):
    done, control = started(how)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    written = json.loads(control.read_text())
    assert written["train_micro_batch_size_per_gpu"] == 8 // 2 // STARTS[how][0]  # 8 rows in 2 micro-batches
    if how in ("nothing", "script"):  # no launcher, which has something to say itself
        assert "WARNING" not in done.stdout + done.stderr, done.stdout + done.stderr


def test_bad_input_is_said_once_for_the_ranks_of_a_machine_and_is_no_reason_to_requeue(started):
    done, control = started("sbatch", "--data", "/nowhere/my")
    assert done.returncode == 2 and not control.exists()
    assert done.stderr.count("/nowhere/my: no such file or folder") == 1 and "Traceback" not in done.stderr
    assert not (started.folder / "requeued").exists()


def test_the_sbatch_file_requeues_a_run_that_a_signal_stopped(tmp_path):
    for name, text in (("srun", "exit 143"), ("scontrol", f"echo $* > {tmp_path / 'requeued'}")):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "77"}
    done = subprocess.run(["bash", "examples/pretrain.sbatch"], cwd=ROOT, env=environment, check=False)
    assert done.returncode == 143 and (tmp_path / "requeued").read_text() == "requeue 77\n"


# Cheap checks come first


@pytest.fixture
def refused(small_data, tmp_path, monkeypatch, capsys):
    """Runs pretrain where ranks must not meet; returns what it says."""

    def start(*more: str, **changes) -> str:
        config = write_settings(tmp_path / "mini.json", **{"pretrain": {"data": str(small_data)}, **changes})
        monkeypatch.setattr(ranks, "init_distributed", lambda: pytest.fail("ranks meet before the input is checked"))
        assert pretrain.run_and_report(["--deepspeed_config", str(config), "--output", str(tmp_path / "run"), *more]) == 2
        return capsys.readouterr().err

    start.folder = tmp_path
    return start


def test_missing_data_says_how_to_build_it_and_what_works_at_once(refused, monkeypatch):
    monkeypatch.chdir(refused.folder)  # as in a fresh clone, there is no folder "data": this is no name of a Hub data set
    said = refused("--data", "data/my")
    assert said.startswith("pretrain: data/my: no such file or folder")
    assert "`python -m sctd_ds.data build my.txt --out data/my`" in said and "`--data python-docs`" in said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--set", "sctd.intervall=3"], "did you mean"),
        (["--set", "pretrain.seq_length=64"], "built for seq_length 32"),
        (["--set", "train_batch_size=800"], "fewer than one batch of 800"),
        (["--set", "pretrain.tokenizer=/nowhere/tokenizer", "--data", "README.md"], "README.md: unknown file type"),
        (["--set", "pretrain.tokenizer=/nowhere/tokenizer", "--data", "python-docs:1KB"], "cannot be loaded as a tokenizer"),
        (["--set", "pretrain.model=/nowhere/model"], "no such folder"),
        (["--output", "README.md/run"], "README.md/run: the run cannot write there"),
        (["--deepspeed_config", "lagre"], "lagre: no such configuration file; by name there are adapt, base,"),
    ],
)
def test_bad_input_ends_before_ranks_meet(refused, more, said):
    assert said in refused(*more)
    assert not (refused.folder / "run").exists()


def test_a_model_folder_without_weights_is_refused_first(refused, small_data):
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    folder = refused.folder / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", **sizes}))
    (folder / "importance.safetensors").touch()  # a table is no model
    assert "has no weights" in refused("--set", f"pretrain.model={folder}")


# The package by itself


def test_shipped_configurations_have_names_and_a_file_of_the_same_name_wins(tmp_path, monkeypatch):
    assert set(settings.shipped()) == {"tiny", "base", "base_fast", "base_pipeline", "large", "adapt", "modern"}
    monkeypatch.chdir(tmp_path)
    assert job.load("tiny").name == "tiny" and job.load("tiny").sctd.interval == 10
    write_settings(tmp_path / "tiny")
    assert job.load("tiny").sctd.interval == 4


@pytest.mark.parametrize("name", sorted(command.COMMANDS))
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["--local_rank=0", name, "--help"])
    assert ended.value.code == 0 and "usage:" in capsys.readouterr().out


def test_the_command_returns_the_status_of_what_it_runs(tmp_path, capsys):
    assert command.main(["data", "show", str(tmp_path)]) == 2
    assert "not a built data set" in capsys.readouterr().err


# What the demo shows


def test_unigram_loss_is_that_of_the_training_frequencies(small_data):
    packed = data.load(small_data)
    words = set(packed.tokenizer.get_vocab().values()) - set(packed.tokenizer.all_special_ids)
    counts = dict.fromkeys(words, 1)
    for token in itertools.chain.from_iterable(packed.train["input_ids"]):
        if token in counts:
            counts[token] += 1
    held_out = [token for token in itertools.chain.from_iterable(packed.validation["input_ids"]) if token in counts]
    expected = -sum(math.log(counts[token] / sum(counts.values())) for token in held_out) / len(held_out)
    assert data.unigram_loss(packed, 10**6) == pytest.approx(expected)
    assert data.unigram_loss(packed, 1) != pytest.approx(expected)  # the rows that a run validates on


def test_samples_have_the_model_s_words_before_and_after(small_data, tmp_path):
    packed, sizes = data.load(small_data), {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    model = BertForMaskedLM(BertConfig(**sizes, intermediate_size=64, vocab_size=320)).train()
    state = torch.get_rng_state()
    samples.remember(model, packed, tmp_path)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        model.cls.predictions.bias[packed.tokenizer.convert_tokens_to_ids("k")] = 1e4
    for sample in samples.read(model, packed, tmp_path):
        masks = sample.text.count("[MASK]")
        assert masks == len(sample.answers) == len(sample.before) == len(sample.after) > 0
        assert set(sample.after) == {"k"} != set(sample.before)
        assert "[CLS]" not in sample.text and f"text: {sample.answers[0]}" in str(sample)


@pytest.mark.parametrize("content", ["", "{", "[1]", '[{"text": 1}]', "null"])
def test_damaged_samples_cost_a_warning(small_data, tmp_path, caplog, content):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 320}
    packed, model = data.load(small_data), BertForMaskedLM(BertConfig(**sizes))
    (tmp_path / samples.FILE).write_text(content)
    assert all(sample.after and not sample.before for sample in samples.read(model, packed, tmp_path))
    assert f"{samples.FILE} is damaged" in caplog.text


def test_a_busy_machine_does_not_change_the_saving():
    """One round's dense step met another process; the ratio of every other round is right."""
    rounds = {"dense": [10.0, 90.0, 10.0], "drop": [7.0, 7.0, 7.0], "align": [12.0, 108.0, 12.0]}
    assert probe._relative_to_dense(10.0, rounds) == pytest.approx({"dense": 10.0, "drop": 7.0, "align": 12.0})


def test_an_outlier_does_not_flatten_the_figure(tmp_path, monkeypatch):
    """A spike of the loss, a stall of the machine and a gradient that is not finite, in a hundred steps."""
    records = [
        {"event": "train", "step": t, "mode": "drop", "loss": 5.0, "lr": 1e-3, "grad_norm": 1.0, "step_ms": 100.0}
        for t in range(1, 101)
    ]
    records[50] |= {"loss": 500.0, "step_ms": 60_000.0, "grad_norm": float("inf")}
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    shape = Shape(layers=4, hidden=32, intermediate=64, vocabulary=300, length=32, labels=4)
    report.plot(report.build(job.load(run_settings()), shape, None, records), records, tmp_path / "report.png")
    panels = {panel.get_title(): panel for panel in figures[0].axes}
    assert panels["Loss"].get_ylim()[1] < 10 and panels["Step time by mode"].get_ylim()[1] < 200
    assert panels["Gradient norm before clipping"].get_ylim()[1] < 2
    assert "loss, mean of 2 steps" in [line.get_label() for line in panels["Loss"].lines]


# Monitors


def test_monitors_get_steps_and_settings_and_nothing_from_the_engine(small_data, tmp_path):
    """DeepSpeed's own CSV monitor, and stand-ins for the two that are other packages."""
    where = {"enabled": True, "output_path": str(tmp_path), "job_name": "csv"}
    config = write_settings(
        tmp_path / "mini.json", csv_monitor=where, pretrain={"data": str(small_data), "steps": 3, "save_every": 0}
    )
    assert pretrain.main(["--deepspeed_config", str(config), "--output", str(tmp_path / "run")]) == 0
    rows = (tmp_path / "csv" / "Train_loss.csv").read_text().splitlines()
    assert rows[0] == "step,loss" and [row.split(",")[0] for row in rows[1:]] == ["1", "2", "3"]
    assert not list((tmp_path / "csv").glob("Train_Samples*"))
    assert json.loads((tmp_path / "csv" / "settings.json").read_text())["sctd.interval"] == 4


def test_w_and_b_and_tensorboard_are_told_the_settings(monkeypatch):
    told: dict = {}
    stand_in = SimpleNamespace(config=SimpleNamespace(update=lambda values, **_: told.update(values)))
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    writer = SimpleNamespace(add_text=lambda tag, text: told.update({tag: text}))
    monitor = SimpleNamespace(
        enabled=True, wandb_monitor=object(), tb_monitor=SimpleNamespace(summary_writer=writer), csv_monitor=None
    )
    engine = SimpleNamespace(monitor=monitor)
    assert metrics.take_monitor(engine, {"sctd.interval": 4, "optimizer.params.betas": [0.9, 0.98]}) is monitor
    assert not engine.monitor.enabled
    assert told["sctd.interval"] == 4 and told["optimizer.params.betas"] == "[0.9, 0.98]"
    assert "| sctd.interval | 4 |" in told["settings"]


def test_text_is_shown_in_the_log_and_in_tensorboard(tmp_path, caplog):
    told: list = []
    writer = SimpleNamespace(add_text=lambda *values: told.append(values))
    monitor = SimpleNamespace(enabled=True, tb_monitor=SimpleNamespace(summary_writer=writer))
    with caplog.at_level("INFO"):
        for rank, shown in ((1, None), (0, SimpleNamespace(enabled=True, tb_monitor=None)), (0, monitor)):
            common = {"start": 0, "total": 9, "every": 1, "batch": 8, "keep": False}
            with metrics.Metrics(tmp_path, **common, monitor=shown, rank=rank) as recorded:
                recorded.show(3, "masked text", ["a [MASK]", "b [MASK]"])
    assert caplog.messages == ["masked text at step 3: a [MASK]", "masked text at step 3: b [MASK]"] * 2
    assert told == [("masked text", "a [MASK]\n\nb [MASK]", 3)]
