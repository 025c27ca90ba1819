"""The method inside DeepSpeed: `initialize`, and an engine that adds to DeepSpeed's what a schedule of steps needs.

Nothing of DeepSpeed is edited. `deepspeed.initialize` builds its engine; that object then becomes a ScTDEngine, which
extends four methods: forward (choose the step's mode), _take_model_step (check the loss on all ranks, apply, sync the
importance table), save_checkpoint and load_checkpoint (the table, and every rank's random state). All but the first are
shared with the pipeline's engine, in StepLogic.
"""

from __future__ import annotations

import logging
import math
import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from sctd_ds.config import ConfigError, ScTDConfig, check_top_level, read_json, sctd_block
from sctd_ds.encoder import ScTD, convert, set_mode, state_of
from sctd_ds.objective import PARTS
from sctd_ds.schedule import Mode, step_mode

logger = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """Training cannot go on; raised on every rank, before the weights change."""

    shared = True
    """Every rank knows (see `ranks`): one of them may tell the user."""


class NonFiniteLossError(TrainingError):
    """A micro-batch of the step had a NaN or infinite loss, on this rank or another one (`here` tells)."""

    def __init__(self, step: int, here: list[str]) -> None:
        self.step, self.here, self.shared = step, here, not here
        where = f"on this rank, in {', '.join(here)}" if here else "on another rank"
        super().__init__(f"step {step}: the loss is not finite {where}; the weights are those of step {step - 1}")


class StepLogic(DeepSpeedEngine):
    """What a step, an importance table and a checkpoint need of any DeepSpeed engine: mixed in before the engine's class."""

    def _attach(self) -> None:
        self.sctd: ScTD = state_of(self.module)
        self.stop_requested = False
        """Set on any rank, at any time: after the next step `stop_agreed` is true on all ranks."""
        self.stop_agreed = False
        self.step_parts: dict[str, float] = {}
        """Parts of the objective of the last step: means over its micro-batches and over all ranks."""
        self.forced_mode: Mode | None = None
        """Overrides the schedule: for measuring one kind of step."""
        self._sums: dict[str, Tensor] = {}
        self._forwards = 0

    @property
    def applied_steps(self) -> int:
        """Optimizer steps that changed the weights; DeepSpeed's global_steps also counts skipped ones."""
        return self.global_steps - self.skipped_steps

    @property
    def step_mode(self) -> Mode:
        """What the step being computed does."""
        return self.forced_mode or step_mode(self.sctd.config, self.applied_steps + 1)

    def _group(self) -> dist.ProcessGroup | None:
        """The ranks that agree on a step and share the table; None: all."""
        return None

    def _collect(self, parts: Mapping[str, Tensor]) -> None:
        """Add the parts of one micro-batch's objective to the step's."""
        for name, value in parts.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._forwards += 1

    def _take_model_step(self, lr_kwargs: Any) -> None:
        self._agree()
        try:
            super()._take_model_step(lr_kwargs)
        except Exception as error:  # DeepSpeed raises a bare Exception here
            if "loss scale already at minimum" not in str(error):
                raise
            raise TrainingError(
                f"step {self.applied_steps + 1}: the fp16 loss scale is at its minimum and gradients still overflow. "
                "Use bf16, a smaller learning rate, a longer warmup or gradient_clipping=1.0; the last checkpoint is intact"
            ) from error
        if self._step_applied:
            self.sctd.importance.update(self._group())
        else:
            self.sctd.importance.discard()

    def _agree(self) -> None:
        """Before the update, with one small all-reduce and one read-back: is every loss finite, does any rank want to stop?

        A NaN or an infinity survives the sum over ranks, so all ranks see it and all raise. Ranks that compute no loss (all
        but a pipeline's last stage) count for nothing in the means.
        """
        known, zero = [name in self._sums for name in PARTS], torch.zeros((), device=self.device)
        means = [self._sums[name] / self._forwards if name in self._sums else zero for name in PARTS]
        flags = torch.tensor([*known, self.stop_requested], dtype=torch.float32, device=self.device)
        local = torch.cat([torch.stack(means), flags])
        self._sums, self._forwards = {}, 0
        total = local.clone()
        if dist.get_world_size(self._group()) > 1:
            dist.all_reduce(total, group=self._group())
        mine, everyone = torch.stack([local, total]).tolist()
        n = len(PARTS)
        self.stop_agreed = everyone[-1] > 0
        counts = everyone[n : 2 * n]
        self.step_parts = {name: x / c for name, x, c in zip(PARTS, everyone[:n], counts, strict=True) if c}
        if not math.isfinite(self.step_parts.get("loss", 0.0)):
            self.sctd.importance.discard()
            here = [name for name, value in zip(PARTS, mine[:n], strict=True) if not math.isfinite(value)]
            raise NonFiniteLossError(self.applied_steps + 1, here)

    def parameter_names(self) -> dict[str, str]:
        """This rank's parameters: DeepSpeed's name -> the name in the model's state_dict."""
        return {name: name for name, _ in self.module.named_parameters()}

    def save_checkpoint(self, save_dir, tag=None, client_state=None, save_latest=True, exclude_frozen_parameters=False):
        """DeepSpeed's checkpoint plus the importance table (in the client state) and one file of random states per rank."""
        tag = f"global_step{self.global_steps}" if tag is None else str(tag)
        folder = Path(save_dir) / tag
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(random_state(), folder / _random_state_name(self.global_rank))
        own = {
            "importance": self.sctd.importance.state_dict(),
            "method": self.sctd.config.method,
            "names": self.parameter_names(),
        }
        return super().save_checkpoint(
            save_dir, tag, {**(client_state or {}), "sctd": own}, save_latest, exclude_frozen_parameters
        )

    def load_checkpoint(self, load_dir, tag=None, *args, **kwargs):
        """DeepSpeed's load plus what `save_checkpoint` added; a plain DeepSpeed checkpoint leaves the table as it is."""
        path, client = super().load_checkpoint(load_dir, tag, *args, **kwargs)
        if path is None:
            return path, client
        own = client.pop("sctd", None)
        if own is None:
            logger.warning("%s holds no importance table (a dense run's checkpoint?): the table starts anew", path)
            return path, client
        self.sctd.importance.to(self.device)
        self.sctd.importance.load_state_dict(own["importance"])
        file = Path(path).parent / _random_state_name(self.global_rank)
        if file.exists():
            set_random_state(torch.load(file, weights_only=True))
        else:
            logger.warning("%s is missing (another number of ranks?): dropout continues from a new random state", file)
        return path, client


class ScTDEngine(StepLogic):
    """DeepSpeed's data-parallel engine (ZeRO 0, 1, 2) with the method's schedule, importance table and checkpoints."""

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        if not self.module.training:
            return super().forward(*inputs, **kwargs)
        set_mode(self.module, self.step_mode, self.applied_steps + 1)
        output = super().forward(*inputs, **kwargs)
        self._collect(self.sctd.parts)
        return output

    def train_batch(self, batches: Iterator[Mapping[str, Tensor]]) -> float:
        """One optimizer step over the next `gradient_accumulation_steps` micro-batches; returns the mean loss of all ranks.

        The model trains, also where it was left in evaluation mode.
        """
        if not self.module.training:
            self.train()
        for _ in range(self.gradient_accumulation_steps()):
            batch = {key: value.to(self.device, non_blocking=True) for key, value in next(batches).items()}
            loss = self(**batch).loss
            self.backward(loss)
            self.step()
        return self.step_parts["loss"]

    def _group(self) -> dist.ProcessGroup | None:
        return self.seq_data_parallel_group


ENGINES: dict[type, type] = {DeepSpeedEngine: ScTDEngine}


def initialize(args: Any = None, model: torch.nn.Module | None = None, *rest: Any,
               config: Any = None, config_params: Any = None, sctd_config: ScTDConfig | Mapping[str, Any] | None = None,
               **kwargs: Any) -> tuple[Any, Any, Any, Any]:  # fmt: skip
    """deepspeed.initialize for a model that trains with token dropping: same arguments, same four values.

    The method comes from `sctd_config`, or from the "sctd" block of the DeepSpeed configuration (`config`, `config_params`
    or args.deepspeed_config); a model that is converted already keeps its own. Raises ValueError for a configuration
    without either, for unknown keys in it, and for what cannot work (ZeRO-3, a model family without an adapter).
    """
    given = config if config is not None else config_params
    given = given if given is not None else getattr(args, "deepspeed_config", None)
    if given is not None:
        raw, _ = read_json(given)
        check_top_level(raw, extra=("sctd", "pretrain"))
        zero = raw.get("zero_optimization", {})
        stage = zero.get("stage", 0) if isinstance(zero, Mapping) else int(zero)  # true and false are an older spelling
        _refuse(stage, raw.get("sequence_parallel_size", 1), isinstance(model, PipelineModule))
    if model is None:
        raise ValueError("sctd_ds.initialize needs model=")
    block = sctd_config if sctd_config is not None else sctd_block(given)
    if isinstance(model, PipelineModule):
        _refuse_other(state_of(model).config, block)
    elif block is not None:
        convert(model, block if isinstance(block, ScTDConfig) else ScTDConfig(**block))
    elif not hasattr(model, "_sctd"):
        raise ConfigError(
            'no ScTD settings: add an "sctd" block to the DeepSpeed configuration (an empty one means the defaults), '
            "or pass sctd_config="
        )
    values = deepspeed.initialize(args, model, *rest, config=config, config_params=config_params, **kwargs)
    attach(values[0])
    return values


def attach(engine: Any) -> Any:
    """Make a DeepSpeed engine around a converted model a ScTDEngine, in place; `initialize` and `convert` do it."""
    if type(engine) not in ENGINES and type(engine) not in ENGINES.values():
        raise ValueError(f"{type(engine).__name__} is not supported; supported: {', '.join(e.__name__ for e in ENGINES)}")
    _refuse(engine.zero_optimization_stage(), engine.sequence_parallel_size, isinstance(engine.module, PipelineModule))
    # deepspeed.initialize chooses the class itself; the subclass adds no construction of its own.
    engine.__class__ = ENGINES.get(type(engine), type(engine))
    engine._attach()
    release_shared_memory()
    return engine


def init_distributed() -> None:
    """deepspeed.init_distributed, where that is not done yet, without what it would leave behind, on this rank's own device."""
    deepspeed.init_distributed(verbose=False)
    # DeepSpeed waits with this for its engine; a collective before that would find every rank on the first device.
    if get_accelerator().device_name() != "cpu" and "LOCAL_RANK" in os.environ:
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    release_shared_memory()


def release_shared_memory() -> None:
    """Take the name from DeepSpeed's shared memory, so that the system frees it with the last process. Every rank calls.

    On a CPU each rank maps 66 MiB in /dev/shm, which DeepSpeed never unlinks: memory that every run would take for good.
    """
    if get_accelerator().device_name() == "cpu":
        dist.barrier()  # all ranks have mapped it; from here on nobody needs the name
        where, rank = (os.environ.get(key, "") for key in ("MASTER_ADDR", "MASTER_PORT")), dist.get_rank()
        name = "_".join(["deepspeed_allreduce_buffer", str(os.getuid()), *where, str(rank)])
        Path("/dev/shm", name).unlink(missing_ok=True)


def _refuse_other(config: ScTDConfig, block: ScTDConfig | Mapping[str, Any] | None) -> None:
    """A pipeline got its settings when it was built, and partitioned by them."""
    wanted = block if isinstance(block, ScTDConfig) else ScTDConfig(**(block or {}))
    for key in sorted(wanted.model_fields_set):
        ours, theirs = getattr(config, key), getattr(wanted, key)
        if ours != theirs:
            raise ConfigError(
                f"sctd.{key}={theirs!r}, but the pipeline was built with {ours!r}: build it with the same settings"
            )


def _refuse(zero_stage: int, sequence_parallel_size: int, pipeline: bool) -> None:
    if pipeline and zero_stage != 1:
        raise ConfigError(
            f"zero_optimization.stage={zero_stage} with a pipeline: use 1. DeepSpeed has no pipeline with 2 and 3, and with 0 "
            "clips by the gradients of the first stage alone"
        )
    if zero_stage == 3:
        raise ConfigError("zero_optimization.stage=3 is not supported by sctd_ds: use stage 2")
    if sequence_parallel_size > 1:
        raise ConfigError(
            f"sequence_parallel_size={sequence_parallel_size}: tokens are chosen from whole rows, which sequence parallelism "
            "splits over ranks; use data parallelism"
        )


def random_state() -> dict[str, Any]:
    """This rank's random states (python, numpy, torch, device) in types that torch.load reads with weights_only=True."""
    version, words, gauss = random.getstate()
    name, keys, *numbers = np.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *numbers],
        "torch": torch.get_rng_state(),
        "device": get_accelerator().get_rng_state(),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore `random_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *numbers = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *numbers))
    torch.set_rng_state(state["torch"])
    get_accelerator().set_rng_state(state["device"])


def _random_state_name(rank: int) -> str:
    return f"sctd_random_rank{rank:05d}.pt"
