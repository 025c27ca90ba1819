"""Where tokens go: the full and the dropped pass through a model's own layers, and the conversion that puts them to work.

Legend: B rows, S tokens, K kept tokens, R positions of a row that the loss reads, d hidden size, l layers.
"""

from __future__ import annotations

import copy
import functools
import logging
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import sctd_kernels
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sctd_ds.adapters import Adapter, Batch, find_adapter
from sctd_ds.config import ScTDConfig
from sctd_ds.importance import POLICIES, Importance
from sctd_ds.labels import Labelled, Places, locate_labels
from sctd_ds.schedule import MODES, LayerPlan, Mode, aligned_rows, kept_tokens

logger = logging.getLogger(__name__)

_STATE = "_sctd"
_FORWARD = "sctd_training_forward"


@dataclass
class Selection:
    """Kept positions of each row, ascending: kept [B, K] int32; slot [B, S] int32, the place in `kept` or -1; mask [B, K]."""

    kept: Tensor
    slot: Tensor
    mask: Tensor | None


@dataclass
class Pass:
    """What the objective needs of one pass: states after layer l [B, S or R, d] and after layer l-1 [B, S or K, d].

    At both layers the first state of a row is that of [CLS].
    """

    last: Tensor
    previous: Tensor


@dataclass
class Passes:
    """The passes of one micro-batch; None: not run. rows: those that the full pass is run on."""

    labelled: Labelled
    dropped: Pass | None
    full: Pass | None
    selection: Selection | None
    rows: range


class Encoder:
    """Runs a model's layers over all tokens or over a selection. Holds no parameter."""

    def __init__(self, adapter: Adapter, plan: LayerPlan | None) -> None:
        self.adapter = adapter
        self.plan = plan
        self._layer: Callable[..., Tensor] = adapter.layer
        self._compile_options: dict[str, Any] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Encoder:
        """An encoder of the copied model. Compiled code is shared, but for a layer that looks things up in its own adapter."""
        memo[id(self)] = twin = object.__new__(Encoder)
        twin.adapter, twin.plan = copy.deepcopy(self.adapter, memo), self.plan
        twin._layer, twin._compile_options = twin.adapter.layer, None
        if self._compile_options is not None:
            if hasattr(self.adapter.layer, "__self__"):
                twin.compile(**self._compile_options)
            else:
                twin._layer, twin._compile_options = self._layer, self._compile_options
        return twin

    @property
    def compiled(self) -> bool:
        return self._compile_options is not None

    def compile(self, **options: Any) -> None:
        """Compile one layer; every layer shares the code, one graph per shape: (S, S), (K, S), (K, K) and (R, S).

        options: for torch.compile.
        """
        # Masked and unmasked, and the rows of a "spread" step, add to the four shapes; the default limit is 8.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
        self._layer = torch.compile(self.adapter.layer, dynamic=False, **options)
        self._compile_options = options

    def prefix(self, batch: Batch) -> Tensor:
        """Embedding and the layers before the cross layer, on all tokens: [B, S, d]."""
        x = self.adapter.embed(batch)
        for i in self.plan.full if self.plan else ():
            x = self.run_layer(i, x, x, batch.attention_mask)
        return x

    def full_suffix(self, x: Tensor, mask: Tensor | None, outputs: Places | None = None) -> Pass:
        """The remaining layers on all tokens. x: [B, S, d] from `prefix`; mask: [B, S] or None; outputs: see `last_layer`."""
        for i in range(self.plan.cross if self.plan else 0, len(self.adapter.layers) - 1):
            x = self.run_layer(i, x, x, mask)
        return Pass(self.last_layer(x, mask, outputs), x)

    def dropped_suffix(self, x: Tensor, mask: Tensor | None, selection: Selection, outputs: Places | None = None,
                       recompute: bool = False) -> Pass:  # fmt: skip
        """The remaining layers, the middle ones on the kept tokens. x: [B, S, d] from `prefix`; mask: [B, S] or None.

        outputs: see `last_layer`. recompute: keep these layers' inputs only, and run them again in the backward pass.
        """
        assert self.plan is not None
        kept, slot = selection.kept, selection.slot
        run = functools.partial(self.run_layer, recompute=recompute)
        if self.adapter.black_box:
            y = sctd_kernels.gather_tokens(run(self.plan.cross, x, x, mask), kept, slot)
        else:
            y = run(self.plan.cross, sctd_kernels.gather_tokens(x, kept, slot), x, mask, kept)
        for i in self.plan.kept:
            y = run(i, y, y, selection.mask, kept, kept)
        merged = sctd_kernels.merge_tokens(x, y, kept, slot)
        return Pass(self.last_layer(merged, mask, outputs, recompute), y)

    def last_layer(self, x: Tensor, mask: Tensor | None, outputs: Places | None = None, recompute: bool = False) -> Tensor:
        """Layer l on [B, S, d] states of layer l-1: its output everywhere, [B, S, d], or at `outputs` alone, [B, R, d].

        Nothing follows that layer, so where no loss reads its output only its keys and values matter.
        """
        i = len(self.adapter.layers) - 1
        if outputs is None:
            return self.run_layer(i, x, x, mask, recompute=recompute)
        queries = sctd_kernels.gather_tokens(x, outputs.at, outputs.slot)
        return self.run_layer(i, queries, x, mask, outputs.at, recompute=recompute)

    def run_layer(self, index: int, queries: Tensor, context: Tensor, mask: Tensor | None, query_at: Tensor | None = None,
                  context_at: Tensor | None = None, recompute: bool = False) -> Tensor:  # fmt: skip
        """Layer `index`: queries [B, Q, d] attend to context [B, C, d]; mask [B, C] or None.

        query_at, context_at: where in the row these tokens stand, [B, Q] and [B, C], for layers that depend on it.
        """
        layer: Any = self.adapter.layers[index]
        attend = None if mask is None else mask.bool()[:, None, None, :]
        places = (query_at, context_at) if self.adapter.positional else ()
        if not layer.training:
            return self.adapter.layer(layer, queries, context, attend, *places)
        if getattr(layer, "gradient_checkpointing", False):
            # The function is set by gradient_checkpointing_enable; a selection travels in as data, so it is never made twice.
            return layer._gradient_checkpointing_func(self._layer, layer, queries, context, attend, *places)
        if recompute:
            return checkpoint(self._layer, layer, queries, context, attend, *places, use_reentrant=False)
        return self._layer(layer, queries, context, attend, *places)


class ScTD:
    """Everything the method knows about one model: config, encoder, importance table, and what the next forward does."""

    def __init__(self, model: nn.Module, config: ScTDConfig) -> None:
        adapter = find_adapter(model)
        check_trainable(adapter)
        plan = None if config.method == "dense" else LayerPlan(len(adapter.layers))
        self.config = config
        self.encoder = Encoder(adapter, plan)
        self.importance: Importance = POLICIES[config.importance](
            adapter.vocabulary, config, resolve_keep_ids(config, adapter.vocabulary)
        )
        self.mode: Mode = "dense" if config.method == "dense" else "drop"
        self.step: int | None = None
        self.parts: dict[str, Tensor] = {}
        """Detached pieces of the last training forward's loss, on the device; see `objective.compute`."""

    @property
    def adapter(self) -> Adapter:
        return self.encoder.adapter

    def select(self, batch: Batch) -> Selection:
        """Choose the kept tokens of a micro-batch: once, never again in recomputation."""
        keep = kept_tokens(batch.input_ids.shape[1], self.config.drop_ratio)
        self.importance.to(batch.input_ids.device)
        scores, ids = self.importance.selection(batch.input_ids)
        kept, slot = sctd_kernels.select_tokens(scores, ids, keep, batch.attention_mask)
        mask = None if batch.attention_mask is None else batch.attention_mask.gather(1, kept.long())
        return Selection(kept, slot, mask)

    def locate(self, batch: Batch, mode: Mode) -> Labelled:
        """Find the labelled tokens, and with them where the last layer has to be run in `mode`."""
        config, adapter = self.config, self.adapter
        labelled = locate_labels(batch.labels, adapter.ignore_index, config.labels_per_row, adapter.vocabulary)
        reads_all = mode == "align" and config.align_on != "cls"
        return labelled if config.last_layer == "all" or adapter.black_box or reads_all else labelled.narrowed()

    def passes(self, batch: Batch, mode: Mode) -> Passes:
        """Run the passes of `mode`."""
        encoder, mask, labelled = self.encoder, batch.attention_mask, self.locate(batch, mode)
        rows, outputs = range(batch.input_ids.shape[0]), labelled.outputs
        prefix = encoder.prefix(batch)
        if mode == "dense":
            return Passes(labelled, None, encoder.full_suffix(prefix, mask, outputs), None, rows)
        selection = self.select(batch)
        recompute = mode == "align" and self.config.recompute_align
        dropped = encoder.dropped_suffix(prefix, mask, selection, outputs, recompute)
        if mode == "drop":
            return Passes(labelled, dropped, None, selection, range(0))
        chosen = aligned_rows(self.config, self.step, len(rows))
        if not len(chosen):
            return Passes(labelled, dropped, None, selection, chosen)
        if not self.config.shared_prefix:
            prefix = encoder.prefix(take_rows(batch, chosen))
        elif chosen != rows:
            prefix = prefix[chosen.start :: chosen.step].contiguous()  # a strided view would compile a graph of its own
        full = encoder.full_suffix(prefix, take_rows(batch, chosen).attention_mask, labelled.take_rows(chosen).outputs)
        return Passes(labelled, dropped, full, selection, chosen)


def take_rows(batch: Batch, rows: range) -> Batch:
    """The micro-batch's `rows`, as views."""
    if rows == range(batch.input_ids.shape[0]):
        return batch

    def take(x: Any) -> Any:
        # Position ids may have a single row that serves all.
        per_row = isinstance(x, Tensor) and x.shape[0] == batch.input_ids.shape[0]
        return x[rows.start :: rows.step] if per_row else x

    embedding = {key: take(value) for key, value in batch.embedding.items()}
    return replace(
        batch, input_ids=take(batch.input_ids), labels=take(batch.labels), attention_mask=take(batch.attention_mask),
        embedding=embedding, sentence_labels=take(batch.sentence_labels),
    )  # fmt: skip


def check_trainable(adapter: Adapter) -> None:
    """Refuse a frozen encoder: there would be nothing to align and no cost to save."""
    if not any(parameter.requires_grad for layer in adapter.layers for parameter in layer.parameters()):
        raise ValueError(
            "no parameter of the encoder's layers is trainable (requires_grad): token dropping saves work in training them. "
            "Unfreeze layers, or train without sctd_ds"
        )


def convert(model: Any, config: ScTDConfig | None = None) -> Any:
    """Teach `model` (or the model of a DeepSpeed engine) token dropping, in place: same object, parameters, state_dict keys.

    Training forwards (which need labels) then return the method's objective as their loss; `model.eval()` is the untouched
    model. Converting again replaces the configuration and keeps the importance table. Raises ValueError for a model
    family without an adapter, with fewer than four layers, or whose encoder is frozen.
    """
    if hasattr(model, "_take_model_step"):  # an engine; it also needs our schedule and checkpoints
        from sctd_ds.engine import attach

        convert(model.module, config)
        return attach(model)
    state = ScTD(model, config or ScTDConfig())
    previous: ScTD | None = getattr(model, _STATE, None)
    if previous is None and "forward" in vars(model):
        raise ValueError(
            f"{type(model).__name__}.forward was replaced on this object: convert the model before anything wraps it"
        )
    if previous is not None and type(previous.importance) is type(state.importance):
        state.importance.to(previous.importance.scores.device)
        state.importance.load_state_dict(previous.importance.state_dict())
    setattr(model, _STATE, state)
    if previous is not None:  # its forward looks the state up; whoever wrapped that forward since keeps the wrapping
        return model
    original = type(model).forward

    # A bound method, and no closure over `model`: a deep copy of the model is converted by itself.
    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return original(self, *args, **kwargs)
        from sctd_ds import objective

        state = state_of(self)
        check_trainable(state.adapter)
        batch = state.adapter.batch(args, kwargs)
        loss, state.parts, first = objective.compute(state, batch)
        return state.adapter.output(loss, batch, first)

    # Pickle stores a bound method by name and would silently bring the class's own forward back; this name fails aloud.
    forward.__name__ = _FORWARD
    model.forward = types.MethodType(forward, model)
    return model


def revert(model: nn.Module) -> nn.Module:
    """Undo `convert`: the model trains as it did before, and the importance table is gone.

    Raises ValueError for a model that is not converted, that an engine of ours drives, or whose forward was wrapped since.
    """
    if hasattr(model, "_take_model_step"):
        raise ValueError(f"{type(model).__name__} needs the method to step: build a new engine around sctd_ds.revert(model)")
    state_of(model)
    if getattr(vars(model)["forward"], "__name__", None) != _FORWARD:
        raise ValueError(f"{type(model).__name__}.forward was wrapped since the conversion: revert what wrapped it first")
    del model.forward
    delattr(model, _STATE)
    return model


def state_of(model: nn.Module) -> ScTD:
    """The method's state of a converted model (or of an engine around one)."""
    state = getattr(model, _STATE, None) or getattr(getattr(model, "module", None), _STATE, None)
    if state is None:
        raise ValueError(f"{type(model).__name__} is not converted: call sctd_ds.convert(model, config) first")
    return state


def set_mode(model: nn.Module, mode: Mode, step: int | None = None) -> None:
    """What the next training forwards do: "dense", "drop" or "align". The engine sets it by itself.

    step: the optimizer step being computed (1-based), which align_schedule="spread" needs to choose rows; without it
    every row is aligned.
    """
    if mode not in MODES:
        raise ValueError(f'mode="{mode}": expected one of {", ".join(MODES)}')
    state = state_of(model)
    if mode != "dense" and state.encoder.plan is None:
        raise ValueError(f'mode="{mode}" needs a method that drops tokens; the model was converted with method="dense"')
    state.mode, state.step = mode, step


def importance(model: nn.Module) -> Importance:
    """The importance policy of a converted model; `.scores` is its [V] fp32 table, writable."""
    return state_of(model).importance


# UNK, CLS, SEP and MASK of released vocabularies, by their size; recipes pad BERT's to a multiple of 8, 64 or 128.
_KEEP_IDS = {
    **{size: [100, 101, 102, 103] for size in (30522, 30528, 30592)},  # BERT uncased, and with it ELECTRA and DistilBERT
    **{size: [100, 101, 102, 103] for size in (28996, 29000, 29056)},  # BERT cased
    50265: [0, 2, 3, 50264],  # RoBERTa
    250002: [0, 2, 3, 250001],  # XLM-RoBERTa
    50368: [50280, 50281, 50282, 50284],  # ModernBERT
}


def resolve_keep_ids(config: ScTDConfig, vocabulary: int) -> list[int]:
    """Ids to pin. "auto" knows some released vocabularies by their size; a run with a tokenizer passes its own ids."""
    if config.keep_token_ids != "auto":
        return config.keep_token_ids
    if config.method == "dense" or config.importance == "random":
        return []
    if vocabulary in _KEEP_IDS:
        return _KEEP_IDS[vocabulary]
    logger.warning(
        'sctd.keep_token_ids is "auto", but the special tokens of a vocabulary of %d ids are not known here: none is pinned. '
        "Set it to the ids of UNK, CLS, SEP and MASK.",
        vocabulary,
    )
    return []
