"""The method in other training loops: the Hugging Face Trainer, and loops written with Accelerate.

Without ScTD's engine, the loop must report when an optimizer step begins and when it was applied: through `StepClock`, with
Accelerate or by hand, or through `ScTDCallback` in the Trainer. Both work with and without DeepSpeed.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from sctd_ds.adapters.special_tokens import of_tokenizer
from sctd_ds.config import ConfigError, ScTDConfig, sctd_block
from sctd_ds.method.convert import convert, importance, set_mode, state_of
from sctd_ds.method.schedule import Mode, dropping_phase, step_mode

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


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
    docs/recipes.md. Raises ValueError for settings of the Trainer that do not work with token dropping.
    """

    def __init__(self, config: ScTDConfig | Mapping[str, Any] | None = None) -> None:
        self._config = config if config is None or isinstance(config, ScTDConfig) else ScTDConfig(**config)
        self.clock: StepClock | None = None

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
        self.clock.end(skipped=bool(getattr(parts["optimizer"], "step_was_skipped", False)))

    def state(self) -> dict[str, Any]:
        """The content of trainer_state.json: settings, step count and table."""
        config = None if self._config is None else self._config.model_dump()
        attributes = {} if self.clock is None else {"saved": _encode(self.clock.state_dict())}
        return {"args": {"config": config}, "attributes": attributes}

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
