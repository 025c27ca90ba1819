"""The method in other training loops: the Hugging Face Trainer, and loops written with Accelerate.

Without ScTD's engine, the loop must report when an optimizer step begins and when it was applied: through `StepClock`, with
Accelerate or by hand, or through `ScTDCallback` in the Trainer. Both work with and without DeepSpeed.
"""

from __future__ import annotations

import base64
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sctd_ds.config import ConfigError, ScTDConfig, sctd_block
from sctd_ds.integrations.export import IMPORTANCE, write_importance
from sctd_ds.method.convert import convert, importance, set_mode, state_of
from sctd_ds.method.objective import PARTS
from sctd_ds.method.schedule import MODES, Mode, dropping_phase, step_mode
from sctd_ds.method.state import of_tokenizer

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import Trainer

logger = logging.getLogger(__name__)

LOGGED = (*(part for part in PARTS if part != "loss"), "kept_token_share")
"""Means that `ScTDCallback` logs, beside the loss that the Trainer logs itself."""


class StepClock:
    """Counts the applied optimizer steps of a converted model, sets the mode of each, and updates the importance table.

        clock = sctd_ds.StepClock(model)               # after sctd_ds.convert(model, config)
        accelerator.register_for_checkpointing(clock)  # saved and restored with the rest
        for batch in loader:
            with clock.accumulate(accelerator, model): # in place of accelerator.accumulate(model)
                ...                                    # forward, backward, optimizer.step(), optimizer.zero_grad()

    A loop without Accelerate calls `begin` and `end` itself, on every rank, once per optimizer step, not per micro-batch.
    """

    def __init__(self, model: nn.Module) -> None:
        state_of(model)  # refuses a model that is not converted
        self._model = model
        self.applied_steps = 0

    @contextmanager
    def accumulate(self, accelerator: Accelerator, *models: Any) -> Iterator[Mode]:
        """`accelerator.accumulate(*models)` around one micro-batch, optimizer.step() included; yields the step's mode.

        The step ends when Accelerate lets the optimizer step: after gradient_accumulation_steps
        micro-batches, or at the end of the data.
        """
        with accelerator.accumulate(*models):
            yield self.begin()
            if accelerator.sync_gradients:
                self.end(skipped=accelerator.optimizer_step_was_skipped)

    def count_to(self, total_steps: int) -> None:
        """Tell the method how many optimizer steps the run has, from which dense phases may count.

        Raises ConfigError where the dense phases leave no step to drop tokens in.
        """
        state = state_of(self._model)
        state.config = state.config.model_copy(update={"total_steps": total_steps})
        dropping_phase(state.config)

    def begin(self) -> Mode:
        """Set the model to the mode of the next optimizer step, and return this mode."""
        step = self.applied_steps + 1
        mode = step_mode(state_of(self._model).config, step)
        set_mode(self._model, mode, step)
        return mode

    def end(self, skipped: bool = False) -> None:
        """Finish an optimizer step: update the table over all ranks, or discard a step that was skipped (fp16 overflow)."""
        table = importance(self._model)
        if skipped:
            table.discard()
            return
        table.update()
        self.applied_steps += 1

    def state_dict(self) -> dict[str, Any]:
        """The number of applied steps and the importance table."""
        return {"applied_steps": self.applied_steps, "importance": importance(self._model).state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`."""
        self.applied_steps = int(state["applied_steps"])
        importance(self._model).load_state_dict(state["importance"])


class ScTDCallback(TrainerCallback, ExportableState):
    """Train with ScTD in the Hugging Face Trainer: `Trainer(..., callbacks=[sctd_ds.ScTDCallback(config)])`.

    config: the method; None takes the "sctd" block of the DeepSpeed configuration in the training arguments. With
    keep_token_ids="auto" the ids come from the Trainer's processing_class, if it has one.

    The Trainer's constructor converts the model. The checkpoint's trainer_state.json holds step count and table, so
    resume_from_checkpoint continues as exactly as the Trainer itself; a collator that draws random masks does not, see
    docs/recipes.md. Each checkpoint folder also gets the table as a file, which `pretrain.model` and the evaluation read.

    To what the Trainer logs about training it adds "mode" (of the last step: its index in "dense", "drop", "align") and, as
    means over all ranks since the last log, the parts of the objective and "kept_token_share": 1 in dense steps, elsewhere the
    share of the tokens that the middle layers see. `set_trainer` shows these to TensorBoard, W&B and their like.

    Raises ValueError for settings of the Trainer that do not work with token dropping.
    """

    def __init__(self, config: ScTDConfig | Mapping[str, Any] | None = None) -> None:
        self._config = config if config is None or isinstance(config, ScTDConfig) else ScTDConfig(**config)
        self.clock: StepClock | None = None
        self._noted: dict[str, tuple[Tensor | float, int]] = {}
        """By name, the sum over the micro-batches since the last log that had it, on the device, and their number."""

    def set_trainer(self, trainer: Trainer) -> None:
        """Be the first of the Trainer's callbacks. Each adds to what the next ones log, and TensorBoard's, W&B's and their like
        would come before this one, as `report_to` puts them in front of the user's own.

        restore_callback_states_from_checkpoint undoes this: leave it off, the state is restored without it.
        """
        callbacks = trainer.callback_handler.callbacks
        if self not in callbacks:
            raise ConfigError("set_trainer: this callback is not among the Trainer's; pass it in callbacks=[...] first")
        callbacks.remove(self)
        callbacks.insert(0, self)

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """Convert the model."""
        self._start(args, parts["model"], parts.get("processing_class"))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """Check the Trainer's settings, and restore step count and table from the checkpoint that it resumes."""
        # A Trainer that restores callbacks from a checkpoint creates a new one, which received no on_init_end.
        clock = self.clock or self._start(args, parts["model"], parts.get("processing_class"))
        if args.n_gpu > 1:
            raise ConfigError(
                f"the Trainer would replicate the model on {args.n_gpu} GPUs in one process (DataParallel), and replicas "
                "cannot fill one importance table: start one process per GPU (deepspeed, torchrun or accelerate launch)"
            )
        if args.label_smoothing_factor:
            raise ConfigError(
                "label_smoothing_factor computes the loss outside the model, from logits that a training forward with token "
                "dropping does not have: set it to 0"
            )
        clock.count_to(state.max_steps)
        # The Trainer's constructor fills this with states by class name, and saving expects an entry for each callback.
        callbacks = cast(dict[str, Any], state.stateful_callbacks)
        saved = callbacks.setdefault(type(self).__name__, {})
        if not state.global_step:
            return
        saved = saved[-1] if isinstance(saved, list) else saved
        if "saved" not in saved.get("attributes", {}):
            logger.warning("the checkpoint holds no importance table (from a dense run?): the table starts from scratch")
            clock.applied_steps = state.global_step
            return
        clock.load_state_dict(_decode(saved["attributes"]["saved"]))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """Set the optimizer step's mode."""
        assert self.clock is not None
        self.clock.begin()

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """Update the importance table."""
        assert self.clock is not None
        self._note(parts["model"])
        self.clock.end(skipped=bool(getattr(parts["optimizer"], "step_was_skipped", False)))

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """Note what a micro-batch's forward found."""
        self._note(parts["model"])

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """Add the method's values to those of training. Every rank calls."""
        logs = parts["logs"]
        if "loss" not in logs or not self._noted:  # an evaluation's, or the summary of the run
            return
        values = {"mode": float(MODES.index(state_of(parts["model"]).mode)), **self._take_means(args.device)}
        logs.update(values)
        state.log_history[-1].update(values)  # the Trainer has stored a copy

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """Write the importance table into the checkpoint's folder."""
        folder = Path(str(args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        if args.should_save and folder.is_dir():  # a search of hyperparameters saves elsewhere
            write_importance(parts["model"], folder)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """Write the importance table where `trainer.save_model()` writes the model by default."""
        if not args.should_save:
            return
        folder = Path(str(args.output_dir))
        best = Path(state.best_model_checkpoint or folder, IMPORTANCE)
        if args.load_best_model_at_end and best.is_file():
            shutil.copyfile(best, folder / IMPORTANCE)
        else:
            write_importance(parts["model"], folder)

    def state(self) -> dict[str, Any]:
        """The content of trainer_state.json: settings, step count and table."""
        config = None if self._config is None else self._config.model_dump()
        attributes = {} if self.clock is None else {"saved": _encode(self.clock.state_dict())}
        return {"args": {"config": config}, "attributes": attributes}

    def _note(self, model: nn.Module) -> None:
        """Add what the last forward found."""
        method = state_of(model)
        found: dict[str, Tensor | float] = {
            **method.parts,
            "kept_token_share": 1.0 if method.mode == "dense" else method.kept_share,
        }
        for name, value in found.items():
            total, count = self._noted.get(name, (0.0, 0))
            self._noted[name] = total + value, count + 1

    def _take_means(self, device: torch.device) -> dict[str, float]:
        """The means of what was noted, over all ranks; the device is read once. Every rank calls."""
        sums, counts = zip(*(self._noted.get(name, (0.0, 0)) for name in LOGGED), strict=True)
        self._noted.clear()
        totals = torch.stack([torch.stack([torch.as_tensor(x, device=device).float() for x in row]) for row in (sums, counts)])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(totals)
        return {name: total / count for name, total, count in zip(LOGGED, *totals.tolist(), strict=True) if count}

    def _start(self, args: TrainingArguments, model: nn.Module, tokenizer: Any) -> StepClock:
        config = self._config
        if config is None:
            block = sctd_block(args.deepspeed) if args.deepspeed else None
            if block is None:
                raise ConfigError(
                    'no ScTD settings: pass ScTDCallback(config), or add an "sctd" block to the DeepSpeed configuration of the '
                    "training arguments"
                )
            config = ScTDConfig(**block)
        if tokenizer is not None:
            config = of_tokenizer(config, tokenizer)
        self._config = config
        self.clock = StepClock(convert(model, config))
        if args.deepspeed:
            from sctd_ds.engine.ranks import release_shared_memory

            release_shared_memory()
        return self.clock


def _encode(value: Any) -> Any:
    """JSON for nested dicts with tensors: dtype, and bytes in base64, which preserves every bit of an fp32 table."""
    if isinstance(value, Tensor):
        array = value.numpy()
        return {"dtype": str(array.dtype), "base64": base64.b64encode(array.tobytes()).decode("ascii")}
    if isinstance(value, dict):
        return {key: _encode(inner) for key, inner in value.items()}
    return value


def _decode(value: Any) -> Any:
    """The inverse of `_encode`."""
    if not isinstance(value, dict):
        return value
    if value.keys() == {"dtype", "base64"}:
        return torch.from_numpy(np.frombuffer(base64.b64decode(value["base64"]), value["dtype"]).copy())
    return {key: _decode(inner) for key, inner in value.items()}
