"""The Hugging Face Trainer and Accelerate: schedule by optimizer steps, table with the checkpoints, exact resume."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
import torch.distributed as dist
import transformers
from accelerate.state import AcceleratorState
from packaging.version import Version
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset
from transformers import BertForMaskedLM, Trainer, TrainerCallback, TrainingArguments

import sctd_ds
from helpers import ROOT
from helpers.bert import small_bert
from helpers.scenarios import run_scenarios, scenario
from sctd_ds.integrations.callback import LOGGED
from sctd_ds.integrations.export import read_importance

VOCABULARY, LENGTH, KEPT_IDS = 64, 16, [1, 2, 3, 4]
METHOD = {"interval": 3, "keep_token_ids": KEPT_IDS, "kl_weight": 4.0}
DEEPSPEED = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
    "zero_optimization": {"stage": 2},
    "steps_per_print": 1000000000,
    "sctd": METHOD,
}
MODES = ["drop", "drop", "align", "drop", "drop", "align", "drop"]
TWICE = [mode for mode in MODES for _ in range(2)]  # two micro-batches a step


class Text(Dataset):
    """Masked rows; how many tokens are masked differs from row to row."""

    def __init__(self, rows: int = 48) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows = []
        for row in range(rows):
            ids = 5 + (torch.rand(LENGTH, generator=generator) ** 4 * (VOCABULARY - 5)).long()
            chosen = torch.randperm(LENGTH, generator=generator)[: 1 + row % 4]
            labels = torch.full_like(ids, -100)
            labels[chosen], ids[chosen] = ids[chosen], 4
            self.rows.append({"input_ids": ids, "labels": labels})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


class Watch(TrainerCallback):
    """What the model was set to in each optimizer step."""

    def __init__(self) -> None:
        self.modes: list[str] = []

    def on_substep_end(self, args, state, control, model, **parts) -> None:
        if hasattr(model, "_sctd"):
            self.modes.append(model._sctd.mode)

    def on_optimizer_step(self, args, state, control, model, **parts) -> None:
        if hasattr(model, "_sctd"):
            self.modes.append(model._sctd.mode)


@dataclass
class Run:
    """One training run."""

    losses: list[float]
    modes: list[str]
    scores: torch.Tensor
    weights: list[torch.Tensor]
    applied: int
    logs: list[dict[str, float]]
    trainer: Trainer


def model(dropout: float = 0.1) -> BertForMaskedLM:
    dropouts = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return small_bert(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **dropouts)


def train(
    folder: Path,
    *,
    config: Any = METHOD,
    steps: int = 7,
    resume: Path | None = None,
    dropout: float = 0.1,
    callback: bool = True,
    rows: int = 4,
    accumulation: int = 2,
    collator: Any = None,
    **arguments: Any,
) -> Run:
    """A Trainer's run in `folder`, which saves after step 4, or continues from the checkpoint `resume`."""
    settings = TrainingArguments(
        str(folder),
        use_cpu=True,
        max_steps=steps,
        learning_rate=1e-2,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        lr_scheduler_type="constant",
        save_steps=4,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        seed=3,
        dataloader_num_workers=0,
        **arguments,
    )
    watch = Watch()
    callbacks = [sctd_ds.ScTDCallback(config), watch] if callback else [watch]
    trainer = Trainer(model(dropout), settings, collator, train_dataset=Text(), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    plain = trainer.accelerator.unwrap_model(trainer.model)
    weights = [p.detach().clone() for p in plain.parameters()]
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses = [entry["loss"] for entry in logs]
    if not callback:
        return Run(losses, watch.modes, torch.empty(0), weights, 0, logs, trainer)
    # A Trainer that restores callbacks made a new one.
    clock = next(c.clock for c in trainer.callback_handler.callbacks if isinstance(c, sctd_ds.ScTDCallback))
    return Run(losses, watch.modes, sctd_ds.importance(plain).scores.clone(), weights, clock.applied_steps, logs, trainer)


def accelerate_loop(accelerator: accelerate.Accelerator, steps: int, folder: Path | None = None) -> dict[str, Any]:
    """As in docs/recipes.md, with micro-batches of two rows; saved in `folder` after step 4, or resumed where it was."""
    bert = sctd_ds.convert(model(), sctd_ds.ScTDConfig(**METHOD))
    clock = sctd_ds.StepClock(bert)
    optimizer = torch.optim.AdamW(bert.parameters(), lr=1e-2)
    loader = DataLoader(Text(56), batch_size=2, generator=torch.Generator())  # its iterator leaves dropout's random state alone
    bert, optimizer, loader = accelerator.prepare(bert, optimizer, loader)
    accelerator.register_for_checkpointing(clock)
    modes, micro_batches = [], accelerator.gradient_accumulation_steps
    resume = folder is not None and folder.exists()
    if resume:
        accelerator.load_state(str(folder))
        loader = accelerator.skip_first_batches(loader, clock.applied_steps * micro_batches)
    for batch in loader:
        with clock.accumulate(accelerator, bert) as mode:
            modes.append(mode)
            accelerator.backward(bert(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        if folder is not None and not resume and len(modes) == 4 * micro_batches:
            accelerator.save_state(str(folder))
        if clock.applied_steps == steps:
            break
    plain = accelerator.unwrap_model(bert)
    weights = [p.detach().clone() for p in plain.parameters()]
    return {"modes": modes, "scores": sctd_ds.importance(plain).scores, "weights": weights, "applied": clock.applied_steps}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Seven steps without a stop, in this process, and their folder."""
    folder = tmp_path_factory.mktemp("trainer")
    return train(folder), folder


def assert_same(one, other):
    assert torch.equal(one.scores, other.scores)
    assert all(map(torch.equal, one.weights, other.weights))


def test_schedule_counts_optimizer_steps(whole):
    run, _ = whole
    assert run.modes == TWICE and run.applied == 7
    assert run.losses[-1] < run.losses[0]
    assert (run.scores != 10.0).sum() > len(KEPT_IDS)


class Reporter(TrainerCallback):
    """Stands for TensorBoard's or W&B's, which `report_to` puts before the user's callbacks."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs, **parts) -> None:
        self.logs.append(dict(logs))


def test_reporters_see_the_method_in_what_the_trainer_logs(tmp_path):
    """Two rows with 1 and 2 labels a micro-batch: means over micro-batches, and over the steps between two logs."""
    settings = TrainingArguments(
        str(tmp_path), use_cpu=True, max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=2,
        report_to=[], disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    reporter, callback = Reporter(), sctd_ds.ScTDCallback({**METHOD, "dense_start": 1})
    bert = model()
    trainer = Trainer(bert, settings, train_dataset=Text(), callbacks=[reporter, callback])
    callback.set_trainer(trainer)
    seen: list[dict[str, float]] = []
    bert.register_forward_hook(lambda module, *_: seen.append(dict(module._sctd.parts, mode=module._sctd.mode)))
    trainer.train()
    names = {"ce_drop", "ce_full", "kl_last", "kl_previous", "kept_token_share"}
    training = [logs for logs in reporter.logs if "loss" in logs]
    assert [logs["mode"] for logs in training] == [1.0, 1.0, 2.0]  # of steps 2, 4 and 6; 1 is dense, 3 and 6 align
    assert [names & logs.keys() for logs in training] == [names - {"kl_last", "kl_previous"}, names, names]
    for logs, forwards in zip(training, (seen[:4], seen[4:8], seen[8:]), strict=True):
        for name in names & logs.keys() - {"kept_token_share"}:
            values = [float(parts[name]) for parts in forwards if name in parts]
            assert values and logs[name] == pytest.approx(sum(values) / len(values)), name
    assert [logs["kept_token_share"] for logs in training] == [0.75, 0.5, 0.5]
    recorded = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(logs.items() <= entry.items() for logs, entry in zip(training, recorded, strict=True))


@pytest.mark.parametrize("best", [False, True], ids=["last", "best"])
def test_the_table_lies_beside_every_model_that_is_saved(tmp_path, best):
    """In checkpoint folders, and where save_model() writes: the table of the model that the Trainer ends with."""
    settings = TrainingArguments(
        str(tmp_path), use_cpu=True, max_steps=4, per_device_train_batch_size=4, save_steps=2, report_to=[], disable_tqdm=True,
        **({"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss",
            "greater_is_better": True, "learning_rate": 1e-2} if best else {}),
    )  # fmt: skip
    bert = model()
    trainer = Trainer(bert, settings, train_dataset=Text(), eval_dataset=Text(4), callbacks=[sctd_ds.ScTDCallback(METHOD)])
    trainer.train()
    trainer.save_model()
    first, last, final = (read_importance(tmp_path / name) for name in ("checkpoint-2", "checkpoint-4", "."))
    assert first.policy == "loss" and first.drop_ratio == 0.5 and not torch.equal(first.scores, last.scores)
    assert torch.equal(last.scores, sctd_ds.importance(bert).scores)
    assert trainer.state.best_global_step in (None, 2)
    assert torch.equal(final.scores, (first if best else last).scores)
    saved = load_file(tmp_path / ("checkpoint-2" if best else "checkpoint-4") / "model.safetensors")
    assert all(torch.equal(saved[name], weight) for name, weight in load_file(tmp_path / "model.safetensors").items())


def test_dense_phases_count_from_the_trainers_steps(tmp_path):
    run = train(tmp_path, config={**METHOD, "dense_start": 0.3, "dense_finish": 1})
    assert run.modes == [mode for mode in ["dense", "dense", *MODES[2:6], "dense"] for _ in range(2)]
    with pytest.raises(sctd_ds.ConfigError, match="make all 7 steps dense"):
        train(tmp_path / "none", config={**METHOD, "dense_start": 7})
    loop = sctd_ds.StepClock(sctd_ds.convert(model(), sctd_ds.ScTDConfig(**METHOD, dense_start=0.5)))
    with pytest.raises(sctd_ds.ConfigError, match=re.escape("set sctd.total_steps")):
        loop.begin()


@pytest.mark.parametrize("restore", [False, True], ids=["given", "restored-by-the-trainer"])
def test_resuming_continues_exactly(whole, restore):
    run, folder = whole
    resumed = train(folder, resume=folder / "checkpoint-4", restore_callback_states_from_checkpoint=restore)
    assert resumed.applied == 7 and resumed.modes == TWICE[8:]
    assert_same(resumed, run)
    assert resumed.losses[-3:] == run.losses[-3:]


@pytest.mark.parametrize("callback", [False, True], ids=["plain", "sctd"])
def test_random_masks_differ_after_a_resume_as_the_docs_say(tmp_path, callback):
    """A Trainer that draws the same masks again would fail this: then docs/recipes.md may promise more."""

    def collate(rows):
        ids = torch.stack([row["input_ids"] for row in rows])
        chosen = torch.rand(ids.shape) < 0.3
        return {"input_ids": ids.masked_fill(chosen, 4), "labels": ids.masked_fill(~chosen, -100)}

    settings = {"callback": callback, "collator": collate}
    whole = train(tmp_path, **settings)
    resumed = train(tmp_path, resume=tmp_path / "checkpoint-4", **settings)
    assert not all(map(torch.equal, whole.weights, resumed.weights))
    if callback:  # the schedule continues all the same
        assert resumed.modes == TWICE[8:] and resumed.applied == 7


def test_a_checkpoint_holds_the_table_to_the_bit_and_plain_weights(whole):
    run, folder = whole
    stored = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())["stateful_callbacks"]["ScTDCallback"]
    assert stored["args"]["config"]["interval"] == METHOD["interval"]
    assert stored["attributes"]["saved"]["applied_steps"] == 4
    loaded = type(run.trainer.model).from_pretrained(folder / "checkpoint-7")
    assert all(map(torch.equal, loaded.parameters(), run.weights))


def test_a_dense_checkpoint_continues_with_a_new_table(tmp_path, caplog):
    train(tmp_path, callback=False, steps=4)
    run = train(tmp_path, resume=tmp_path / "checkpoint-4")
    assert "holds no importance table" in caplog.text
    assert run.applied == 7 and run.modes == TWICE[8:]


def test_dense_steps_are_the_trainers_own(tmp_path):
    """With one micro-batch a step, where nothing has to be weighted."""
    method = {"method": "dense", "keep_token_ids": KEPT_IDS}
    with_callback = train(tmp_path / "with", config=method, dropout=0.0, accumulation=1)
    without = train(tmp_path / "without", callback=False, dropout=0.0, accumulation=1)
    assert with_callback.losses == pytest.approx(without.losses, rel=1e-3)
    for a, b in zip(with_callback.weights, without.weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


def test_accumulation_weights_tokens_and_not_micro_batches(tmp_path):
    """One step over four rows of different numbers of labels: alike in one micro-batch and in two."""
    two = train(tmp_path / "two", dropout=0.0, steps=1, rows=2, accumulation=2)
    one = train(tmp_path / "one", dropout=0.0, steps=1, rows=4, accumulation=1)
    assert two.losses == pytest.approx(one.losses, rel=1e-4)
    torch.testing.assert_close(two.scores, one.scores, rtol=1e-5, atol=1e-5)


def test_our_loss_is_per_labelled_token_and_hugging_faces_grows_with_accumulation(tmp_path):
    """As docs/recipes.md says; a Trainer that mends it would fail this."""
    ours, theirs = (
        train(tmp_path / name, config={"method": "dense", "keep_token_ids": KEPT_IDS}, callback=with_ours, dropout=0.0, steps=1,
              rows=2, accumulation=4)
        for name, with_ours in (("ours", True), ("theirs", False))
    )  # fmt: skip
    assert theirs.losses == pytest.approx([4 * ours.losses[0]], rel=1e-2)  # 1-2 and 3-4 labels: micro-batches weigh alike there
    assert ours.losses == pytest.approx([math.log(VOCABULARY)], rel=0.05)


def test_special_tokens_come_from_the_tokenizer(tmp_path):
    tokenizer = SimpleNamespace(unk_token_id=7, cls_token_id=8, sep_token_id=9, mask_token_id=None)
    callback = sctd_ds.ScTDCallback(sctd_ds.ScTDConfig())
    bert = model()
    callback.on_init_end(SimpleNamespace(deepspeed=None), None, None, model=bert, processing_class=tokenizer)
    scores = sctd_ds.importance(bert).scores
    assert (scores == 1e4).nonzero().flatten().tolist() == [7, 8, 9]


def test_a_skipped_step_is_forgotten_and_not_counted():
    bert = sctd_ds.convert(model(), sctd_ds.ScTDConfig(**METHOD))
    clock, rows = sctd_ds.StepClock(bert), Text().rows[:4]
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    modes = []
    for skipped in (False, True, False, True, False):
        modes.append(clock.begin())
        before = sctd_ds.importance(bert).scores.clone()
        bert(**batch).loss.backward()
        clock.end(skipped=skipped)
        assert torch.equal(before, sctd_ds.importance(bert).scores) == skipped
    assert modes == ["drop", "drop", "drop", "align", "align"] and clock.applied_steps == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"n_gpu": 2, "label_smoothing_factor": 0.0}, "DataParallel"),
        ({"n_gpu": 0, "label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    ],
)
def test_trainer_settings_that_cannot_work(arguments, words):
    callback = sctd_ds.ScTDCallback(METHOD)
    callback.on_init_end(SimpleNamespace(deepspeed=None), None, None, model=model())
    with pytest.raises(ValueError, match=words):
        callback.on_train_begin(SimpleNamespace(**arguments), SimpleNamespace(global_step=0), None, model=None)


def test_settings_must_come_from_somewhere():
    with pytest.raises(ValueError, match="ScTDCallback"):
        sctd_ds.ScTDCallback().on_init_end(SimpleNamespace(deepspeed={"zero_optimization": {}}), None, None, model=model())
    with pytest.raises(ValueError, match="intervall"):
        sctd_ds.ScTDCallback({"intervall": 3})


def accelerator(**options):
    AcceleratorState._reset_state(reset_partial_state=True)  # another test's, without bf16
    return accelerate.Accelerator(cpu=True, **options)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_an_accelerate_loop_saves_and_resumes_exactly(tmp_path, micro_batches):
    """bf16, so that Accelerate wraps the forward of the converted model."""
    options = {"mixed_precision": "bf16", "gradient_accumulation_steps": micro_batches}
    whole = accelerate_loop(accelerator(**options), 7, tmp_path / "state")
    resumed = accelerate_loop(accelerator(**options), 7, tmp_path / "state")
    modes = [mode for mode in MODES for _ in range(micro_batches)]
    assert whole["modes"] == modes and resumed["modes"] == modes[4 * micro_batches :]
    assert whole["applied"] == resumed["applied"] == 7
    assert torch.equal(whole["scores"], resumed["scores"]) and all(map(torch.equal, whole["weights"], resumed["weights"]))
    assert whole["scores"].dtype == torch.float32 and len(whole["scores"]) == VOCABULARY


def test_the_documented_accelerate_loop_counts_optimizer_steps():
    """46 micro-batches, four to a step: eleven steps, and a twelfth of the two that are left. Beside them, the same by hand."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8"), re.DOTALL)
    (loop,) = [block for block in blocks if "StepClock" in block]
    bert, modes = model(dropout=0.0), []
    bert.register_forward_pre_hook(lambda module, _: modes.append(module._sctd.mode))
    names = {"sctd_ds": sctd_ds, "model": bert, "accelerator": accelerator(gradient_accumulation_steps=4)}
    names["optimizer"] = torch.optim.SGD(bert.parameters(), lr=0.1)
    names["loader"] = DataLoader(Text(), batch_size=1, sampler=range(46))
    exec(loop, names)
    steps = ["drop"] * 9 + ["align", "drop", "drop"]
    assert modes == [mode for mode in steps for _ in range(4)][:46] and names["clock"].applied_steps == 12

    plain, rows = sctd_ds.convert(model(dropout=0.0), sctd_ds.ScTDConfig()), Text().rows
    clock, optimizer = sctd_ds.StepClock(plain), torch.optim.SGD(plain.parameters(), lr=0.1)
    for first in range(0, 46, 4):
        clock.begin()
        for row in rows[first : min(first + 4, 46)]:
            (plain(**{key: value[None] for key, value in row.items()}).loss / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.end()
    torch.testing.assert_close(sctd_ds.importance(bert).scores, sctd_ds.importance(plain).scores)
    for one, other in zip(bert.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_step_that_accelerate_skipped_is_not_counted(monkeypatch):
    """Nor is one in whose micro-batch something failed."""
    made = accelerator(gradient_accumulation_steps=2)
    bert = sctd_ds.convert(model(), sctd_ds.ScTDConfig(**METHOD))
    clock, row = sctd_ds.StepClock(bert), {key: value[None] for key, value in Text().rows[3].items()}
    before = sctd_ds.importance(bert).scores.clone()
    for skipped, applied in ((True, 0), (False, 1)):
        monkeypatch.setattr(accelerate.Accelerator, "optimizer_step_was_skipped", skipped)
        for _ in range(2):
            assert torch.equal(before, sctd_ds.importance(bert).scores)
            with clock.accumulate(made, bert):
                bert(**row)
        assert clock.applied_steps == applied and torch.equal(before, sctd_ds.importance(bert).scores) == skipped
    for _ in range(2):
        with pytest.raises(RuntimeError, match="stop"), clock.accumulate(made, bert):
            raise RuntimeError("stop")
    assert clock.applied_steps == 1


# Two ranks, with and without DeepSpeed. The launch does what comes before DeepSpeed first: Accelerate keeps its state.


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The scenarios of this file on two ranks."""
    if Version(transformers.__version__) < Version("5.18"):
        pytest.skip("this Trainer cannot resume on several CPU ranks")
    folder = tmp_path_factory.mktemp("launched")
    (folder / "ds.json").write_text(json.dumps(DEEPSPEED))
    return run_scenarios(__name__, folder, ranks=2)


def results_of(run: Run) -> dict[str, Any]:
    return {name: value for name, value in vars(run).items() if name != "trainer"}


@scenario
def plain(here):
    return results_of(train(here.folder / "plain", rows=2))


@scenario
def plain_resumed(here):
    return results_of(train(here.folder / "plain", rows=2, resume=here.folder / "plain" / "checkpoint-4"))


@scenario
def with_accelerate(here):
    return accelerate_loop(accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2), steps=7)


@scenario
def with_deepspeed(here):
    run = train(here.folder / "deepspeed", rows=2, config=None, deepspeed=str(here.folder / "ds.json"))
    return {**results_of(run), "stage": run.trainer.deepspeed.zero_optimization_stage(), "world": dist.get_world_size()}


@scenario
def with_deepspeed_resumed(here):
    stopped = here.folder / "deepspeed" / "checkpoint-4"
    return results_of(
        train(here.folder / "deepspeed", rows=2, config=None, deepspeed=str(here.folder / "ds.json"), resume=stopped)
    )


@pytest.mark.parametrize("way", [plain, with_deepspeed])
def test_on_two_ranks(ranks, way):
    table = ranks[0](way)["scores"]
    assert (table != 10.0).sum() > len(KEPT_IDS)
    for rank in ranks:
        run = rank(way)
        assert run["modes"] == TWICE and run["applied"] == 7
        assert torch.equal(run["scores"], table)
        assert rank(with_deepspeed)["world"] == rank(with_deepspeed)["stage"] == 2
        assert len(run["logs"]) == 7
        for one, other in zip(run["logs"], ranks[0](way)["logs"], strict=True):  # means over the ranks, whose rows differ
            assert "ce_drop" in one and all(one[name] == other[name] for name in LOGGED if name in one)


def test_an_accelerate_loop_on_two_ranks_learns_one_table(ranks):
    first = ranks[0](with_accelerate)
    assert (first["scores"] != 10.0).sum() > len(KEPT_IDS)
    for rank in ranks:
        run = rank(with_accelerate)
        assert run["modes"] == TWICE and run["applied"] == 7
        assert torch.equal(run["scores"], first["scores"])
        assert all(map(torch.equal, run["weights"], first["weights"]))


@pytest.mark.parametrize(("way", "resumed"), [(plain, plain_resumed), (with_deepspeed, with_deepspeed_resumed)])
def test_resuming_on_two_ranks_continues_exactly(ranks, way, resumed):
    for rank in ranks:
        assert rank(resumed)["modes"] == TWICE[8:] and rank(resumed)["applied"] == 7
        assert torch.equal(rank(way)["scores"], rank(resumed)["scores"])
        assert all(map(torch.equal, rank(way)["weights"], rank(resumed)["weights"]))


def test_deepspeed_or_not_is_the_same_training(ranks):
    assert ranks[0](plain)["losses"] == pytest.approx(ranks[0](with_deepspeed)["losses"], rel=2e-2)
