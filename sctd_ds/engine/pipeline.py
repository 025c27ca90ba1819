"""The same model over pipeline stages: DeepSpeed's PipelineModule and PipelineEngine with the method inside.

A stage owns some of the model's own layers and walks them as the data-parallel path does (`passes.advance`). Stages exchange
one packed tensor, [B + R, S, d]: B rows of the dropped pass and, after the layer where the passes part, R rows of the full
pass. So an align step costs one send and one backward pass per micro-batch, and a shared prefix runs once. After the cross
layer a row of the dropped pass holds the kept tokens' states at their positions; at the other positions the states of the
last full layer wait for the last layer. The first stage chooses the kept tokens, and the choice travels beside the states as
integers. Every rank reads its pipeline's micro-batches itself, so ids, labels and padding masks never travel.

Legend: B rows, S tokens, K kept tokens, R rows of the full pass, d hidden size.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe import schedule as pipe_schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor, nn

from sctd_ds.adapters import Batch
from sctd_ds.adapters.architectures import ARCHITECTURES
from sctd_ds.config import ConfigError, ScTDConfig
from sctd_ds.deepspeed_json import replicas
from sctd_ds.engine.ranks import init_distributed
from sctd_ds.engine.step import StepLogic
from sctd_ds.method import objective, passes
from sctd_ds.method.convert import convert, is_converted, state_of
from sctd_ds.method.flops import Shape, part_flops
from sctd_ds.method.passes import Streams
from sctd_ds.method.plan import kept_tokens
from sctd_ds.method.schedule import Mode, mean_cost, modes
from sctd_ds.method.selection import Selection
from sctd_ds.method.state import ScTD

Visit = Callable[[Streams], None]


@dataclass(frozen=True)
class Task:
    """A micro-batch, the mode it runs in, and the optimizer step it belongs to (None: evaluation)."""

    batch: Batch
    mode: Mode
    step: int | None

    def full_rows(self, config: ScTDConfig) -> range:
        """Rows that the full pass runs on."""
        return passes.full_rows(config, self.batch, self.mode, self.step)


class Embedding(nn.Module):
    """First layer: embeds a micro-batch and chooses its kept tokens."""

    def __init__(self, state: ScTD, module: nn.Module) -> None:
        super().__init__()
        self.state, self.module = state, module

    def forward(self, task: Task) -> Streams:
        return passes.begin(self.state, task.batch, task.mode, task.step)


class EncoderLayer(nn.Module):
    """One of the model's layers."""

    def __init__(self, state: ScTD, index: int) -> None:
        super().__init__()
        self.state, self.index = state, index
        self.module = state.adapter.layers[index]

    def forward(self, streams: Streams) -> Streams:
        return passes.advance(self.state, self.index, streams)


class Head(nn.Module):
    """Last layer: the objective, or in evaluation whatever `visit` makes of the passes. Owns the output head."""

    def __init__(self, state: ScTD, module: nn.Module) -> None:
        super().__init__()
        self.state, self.module = state, module
        self.visit: Visit | None = None
        self.collect: Callable[[Mapping[str, Tensor]], None] = lambda parts: None

    def forward(self, streams: Streams) -> Tensor:
        if self.visit is not None:
            self.visit(streams)
            return torch.zeros((), device=streams.batch.input_ids.device)
        result = objective.compute(self.state, streams)
        self.collect(result.parts)
        return result.loss


class Tied(nn.Module):
    """Declares a weight as shared between the first and the last stage; it takes no part in the forward pass."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


class Pipeline(PipelineModule):
    """A converted model whose layers are spread over stages. `sctd_ds.initialize` makes a ScTDPipelineEngine of it.

    model: Hugging Face BertForMaskedLM or ModernBertForMaskedLM, the same on every rank; a rank keeps the weights of its own
    stage and releases the others, so the model cannot be used by itself afterwards. config: where the model is not converted.
    stages: must divide the number of ranks; the rest is data parallel. boundaries: number of the first encoder layer (from 0)
    of each stage but the first; by default stages get equal shares of the floating-point operations of an average step.
    length: tokens per row for that count, by default the model's longest.
    """

    def __init__(
        self,
        model: Any,
        config: ScTDConfig | None = None,
        *,
        stages: int,
        boundaries: Sequence[int] | None = None,
        length: int | None = None,
    ) -> None:
        if config is not None or not is_converted(model):
            convert(model, config)
        state = state_of(model)
        row = ARCHITECTURES.get(getattr(model.config, "model_type", ""))
        if row is None or row.ends is None or type(state.adapter) is not row.adapter:
            raise ConfigError(
                "a pipeline is built from BertForMaskedLM or ModernBertForMaskedLM, not from "
                f"{type(model).__name__}: use data parallelism"
            )
        init_distributed()
        check_stages(stages, state.plan.layers)
        replicas(dist.get_world_size(), stages)
        if boundaries is None:
            boundaries = balance(state, model.config, stages, length)
        numbers = range(1, len(state.adapter.layers))
        if len(boundaries) != stages - 1 or list(boundaries) != [n for n in numbers if n in boundaries]:
            raise ConfigError(
                f"boundaries={list(boundaries)}: expected {stages - 1} encoder layers from 1 to {numbers[-1]}, ascending"
            )
        embeddings, head = row.ends(model)
        specs = [
            LayerSpec(Embedding, state, embeddings),
            *(LayerSpec(EncoderLayer, state, i) for i in range(len(state.adapter.layers))),
            LayerSpec(Head, state, head),
        ]
        first_layer = 1
        words = model.get_input_embeddings().weight
        if model.get_output_embeddings().weight is words:
            tie = TiedLayerSpec("word_embeddings", Tied, words, forward_fn=lambda tied, streams: streams)
            specs = [tie, *specs[:-1], tie, specs[-1]]
            first_layer = 2
        # Set before nn.Module's own __init__, which allows plain values only; the model must not become a submodule, because
        # DeepSpeed is to see the stage's own weights.
        self.__dict__.update(plain_model=model, _sctd=state, _boundaries=tuple(boundaries), _first_layer=first_layer)
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints here, past its logger
            super().__init__(specs, num_stages=stages, partition_method="flops")
        self._tasks: deque[Task] = deque()
        plain = {parameter: name for name, parameter in model.named_parameters()}
        self.plain_names = {name: plain[parameter] for name, parameter in self.named_parameters()}
        """Name of each of this stage's parameters here -> in `model`; a tied one has its first name on every stage."""
        self._release(embeddings, head)

    @property
    def head(self) -> Head | None:
        """The objective's layer, on the last stage."""
        return next((layer for layer in self.forward_funcs if isinstance(layer, Head)), None)

    def feed(self, tasks: Iterable[Task]) -> None:
        """The micro-batches of the coming forward passes, in order."""
        self._tasks = deque(tasks)

    def forward(self, received: Any) -> Tensor | tuple[Tensor, ...]:
        """One micro-batch through this stage. received: the former stage's packed tensors; the first stage ignores it."""
        task = self._tasks.popleft()
        result = super().forward(task if self.stage_id == 0 else self._unpack(received, task))
        return result if isinstance(result, Tensor) else self._pack(result)

    def _pack(self, streams: Streams) -> tuple[Tensor, ...]:
        selection = streams.selection
        if selection is None:
            assert streams.full is not None
            return (streams.full,)
        assert streams.tokens is not None
        x = streams.tokens if streams.kept is None else selection.merge(streams.tokens, streams.kept)
        # Floating-point tensors first: DeepSpeed shares one list of buffers between activations and gradients.
        packed = x if streams.full is None else torch.cat([x, streams.full])
        return packed, torch.cat([selection.positions, selection.slot], dim=1)

    def _unpack(self, received: tuple[Tensor, ...], task: Task) -> Streams:
        packed, state, batch, rows = received[0], self._sctd, task.batch, task.full_rows(self._sctd.config)
        if task.mode == "dense":
            return Streams(batch, task.mode, rows, full=packed)
        b, s = batch.input_ids.shape
        k = kept_tokens(s, state.config.drop_ratio)
        selection = Selection(*(part.contiguous() for part in received[1].split([k, s], dim=1)))
        tokens, full = packed[:b], packed[b:] if len(packed) > b else None
        first_layer_here = self._local_start - self._first_layer
        kept = selection.gather(tokens) if first_layer_here > state.plan.cross else None
        return Streams(batch, task.mode, rows, selection, passes.kept_mask(batch, selection), tokens, kept, full)

    def _partition_layers(self, method: str = "flops") -> None:
        """Cut the list of layers; DeepSpeed's own methods count parameters, and half of our layers cost half."""
        self.parts = [0, *(self._first_layer + boundary for boundary in self._boundaries), len(self._layer_specs)]
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

    def _release(self, embeddings: nn.Module, head: nn.Module) -> None:
        """Give up the weights of other stages, which this rank built only to start from the same values as they do."""
        mine = {module for layer in self.children() for module in layer.modules()}
        for module in (embeddings, *self._sctd.adapter.layers, head):
            if module not in mine:
                module.to("meta")


def _timed(instruction: Callable[..., None]) -> Callable[..., None]:
    """An instruction of DeepSpeed's pipeline schedule that adds its time to the engine's `work_seconds`, if that is wanted."""

    def timed(engine: ScTDPipelineEngine, *args: Any, **kwargs: Any) -> None:
        if not engine.time_work:
            return instruction(engine, *args, **kwargs)
        start = time.perf_counter()
        instruction(engine, *args, **kwargs)
        get_accelerator().synchronize()
        engine.work_seconds += time.perf_counter() - start

    return timed


class ScTDPipelineEngine(StepLogic, PipelineEngine):
    """DeepSpeed's pipeline engine (ZeRO 1) with the method's schedule, importance table and checkpoints."""

    def _attach(self) -> None:
        super()._attach()
        self.sctd.importance.to(self.device)
        for part in self.module.plain_model.modules():
            if next(part.parameters(), None) is None:  # a rotary embedding, which all layers read, belongs to no stage
                part.to(self.device)
        self.time_work = False
        """Whether to measure `work_seconds`, which waits for the device after each forward and backward pass."""
        self.work_seconds = 0.0
        """Time spent in forward and backward passes, and not in waiting for other stages."""
        self._layout: tuple[Any, ...] = ()
        if self.module.head is not None:
            self.module.head.collect = self._collect

    def train_batch(self, batches: Iterator[Mapping[str, Tensor]]) -> float:
        """One optimizer step over the next `gradient_accumulation_steps` micro-batches; returns the mean loss of all ranks.

        Every stage of a pipeline must be given the same micro-batches, all of one shape: {"input_ids", "labels", and where
        rows are padded "attention_mask"}. Replicas of the pipeline get different ones.
        """
        micro = [self._batch(next(batches)) for _ in range(self.micro_batches)]
        if len({batch.input_ids.shape for batch in micro}) > 1:
            raise ValueError("the micro-batches of a step must have one shape in a pipeline: pad rows, or drop the last batch")
        self.module.train()
        self._feed([Task(batch, self.step_mode, self.applied_steps + 1) for batch in micro])
        super().train_batch(_placeholders(micro))
        return self.step_parts["loss"]

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Mapping[str, Tensor]], visit: Visit) -> None:
        """Run both passes (the full one alone where the method drops nothing) without dropout.

        visit: called on the last stage with the finished streams of each micro-batch. Every stage must be given the same
        micro-batches.
        """
        training, head = self.module.training, self.module.head
        self.module.eval()
        self._compute_loss = False
        if head is not None:
            head.visit = visit
        for _, same in itertools.groupby(map(self._batch, batches), key=lambda batch: batch.input_ids.shape):
            micro = list(same)
            self._feed([Task(batch, self.sctd.both_passes, None) for batch in micro])
            self.set_dataiterator(_placeholders(micro))
            self._exec_schedule(self._inference_schedule(len(micro)))
        if head is not None:
            head.visit = None
        self.module.train(training)

    def gather_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The stages' shares of a state_dict put together, on rank 0; elsewhere what was given. Every rank calls."""
        grid = self.grid
        shares: list[Any] = [state]
        if grid.data_parallel_id == 0:
            shares = [None] * self.num_stages if self.global_rank == 0 else [state]
            dist.gather_object(state, shares if self.global_rank == 0 else None, dst=0, group=grid.pp_proc_group)
        return {name: value for share in shares for name, value in share.items()}

    def parameter_names(self) -> dict[str, str]:
        return self.module.plain_names

    def _batch(self, raw: Mapping[str, Tensor]) -> Batch:
        return self.sctd.read((), {key: value.to(self.device, non_blocking=True) for key, value in raw.items()})

    def _feed(self, tasks: Sequence[Task]) -> None:
        """Hand over micro-batches of one shape. When the shape of what stages exchange changes, they have to learn it anew."""
        first = tasks[0]
        full_rows = len(first.full_rows(self.sctd.config))
        layout = (first.mode, first.batch.input_ids.shape, full_rows, self.module.training)
        if layout != self._layout:
            self.reset_activation_shape()
        self._layout = layout
        self.module.feed(tasks)

    _INSTRUCTION_MAP = {
        **PipelineEngine._INSTRUCTION_MAP,
        pipe_schedule.ForwardPass: _timed(PipelineEngine._exec_forward_pass),
        pipe_schedule.BackwardPass: _timed(PipelineEngine._exec_backward_pass),
    }


def check_stages(stages: int, layers: int) -> None:
    """ConfigError for more pipeline stages than there are layers."""
    if stages > layers:
        raise ConfigError(f"{stages} pipeline stages, but the model has {layers} encoder layers: use at most {layers} stages")


def balance(state: ScTD, sizes: Any, stages: int, length: int | None = None) -> tuple[int, ...]:
    """Boundaries that make the costliest stage of an average step as cheap as can be. sizes: the model's configuration.

    The head goes with the last layer, because the objective compares the states before and behind that layer.
    """
    length = length or sizes.max_position_embeddings
    shape = Shape.of(sizes, length=length, labels=state.config.labels_per_row or round(0.15 * length))
    flops = {mode: part_flops(shape, state.config, mode) for mode in modes(state.config)}
    costs = [mean_cost(state.config, {mode: parts[i] for mode, parts in flops.items()}) for i in range(shape.layers + 1)]
    costs[-2:] = [costs[-2] + costs[-1]]
    # best[n]: the least possible maximum for the first n layers, and its boundaries; one stage more in each round.
    best: dict[int, tuple[float, tuple[int, ...]]] = {n: (sum(costs[:n]), ()) for n in range(1, shape.layers + 1)}
    for _ in range(1, stages):
        best = {
            n: min((max(best[m][0], sum(costs[m:n])), (*best[m][1], m)) for m in best if m < n)
            for n in range(min(best) + 1, shape.layers + 1)
        }
    return best[shape.layers][1]


def _placeholders(micro: Sequence[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
    """What DeepSpeed's engine loads on the first and the last stage; the module has the micro-batches already."""
    return iter([(batch.input_ids, batch.labels) for batch in micro])
