"""Run under the launcher: the Hugging Face Trainer with ScTDCallback, with and without DeepSpeed, stopped and resumed.

trainer_scenarios.py FOLDER; writes FOLDER/rank{R}.pt for test_trainer.py. `Run` and `train` serve that file, too.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainerCallback, TrainingArguments

import sctd_ds

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
    trainer: Trainer


def model(dropout: float = 0.1) -> BertForMaskedLM:
    torch.manual_seed(0)
    return BertForMaskedLM(
        BertConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64,
                   max_position_embeddings=LENGTH, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    )  # fmt: skip


def train(folder: Path, *, config: Any = METHOD, steps: int = 7, resume: Path | None = None, dropout: float = 0.1,
          callback: bool = True, rows: int = 4, accumulation: int = 2, collator: Any = None,
          **arguments: Any) -> Run:  # fmt: skip
    settings = TrainingArguments(
        str(folder), use_cpu=True, max_steps=steps, learning_rate=1e-2, per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation, lr_scheduler_type="constant", save_steps=4, logging_steps=1,
        report_to=[], disable_tqdm=True, seed=3, dataloader_num_workers=0, **arguments,
    )  # fmt: skip
    watch = Watch()
    ours = [sctd_ds.ScTDCallback(config)] if callback else []
    trainer = Trainer(model(dropout), settings, collator, train_dataset=Text(), callbacks=[*ours, watch])
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    plain = trainer.accelerator.unwrap_model(trainer.model)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if not callback:
        return Run(losses, watch.modes, torch.empty(0), [p.detach().clone() for p in plain.parameters()], 0, trainer)
    # A Trainer that restores callbacks made a new one.
    clock = next(c.clock for c in trainer.callback_handler.callbacks if isinstance(c, sctd_ds.ScTDCallback))
    scores = sctd_ds.importance(plain).scores.clone()
    return Run(losses, watch.modes, scores, [p.detach().clone() for p in plain.parameters()], clock.applied_steps, trainer)


def accelerate_loop(accelerator: accelerate.Accelerator, steps: int, folder: Path | None = None) -> dict[str, Any]:
    """As in docs/recipes.md, with micro-batches of two rows; saved in `folder` after step 4, or resumed where it was."""
    bert = sctd_ds.convert(model(), sctd_ds.ScTDConfig(**METHOD))
    clock = sctd_ds.StepClock(bert)
    optimizer = torch.optim.AdamW(bert.parameters(), lr=1e-2)
    loader = DataLoader(Text(56), batch_size=2, generator=torch.Generator())  # its iterator leaves dropout's random state alone
    bert, optimizer, loader = accelerator.prepare(bert, optimizer, loader)
    accelerator.register_for_checkpointing(clock)
    modes, resume, micro_batches = [], folder is not None and folder.exists(), accelerator.gradient_accumulation_steps
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


def report(run: Run) -> dict[str, Any]:
    return {"losses": run.losses, "modes": run.modes, "scores": run.scores, "weights": run.weights, "applied": run.applied}


def main() -> None:
    folder = Path(next(a for a in sys.argv[1:] if not a.startswith("--local_rank")))
    (folder / "ds.json").write_text(json.dumps(DEEPSPEED))
    results = {}
    results["plain"] = report(train(folder / "plain", rows=2))
    results["plain resumed"] = report(train(folder / "plain", rows=2, resume=folder / "plain" / "checkpoint-4"))
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    results["accelerate"] = accelerate_loop(accelerator, steps=7)
    deepspeed = {"config": None, "rows": 2, "deepspeed": str(folder / "ds.json")}
    whole = train(folder / "ds", **deepspeed)
    results["deepspeed"] = report(whole)
    results["deepspeed engine"] = {"stage": whole.trainer.deepspeed.zero_optimization_stage()}
    results["deepspeed resumed"] = report(train(folder / "ds", resume=folder / "ds" / "checkpoint-4", **deepspeed))
    results["world"] = dist.get_world_size()
    torch.save(results, folder / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main()
