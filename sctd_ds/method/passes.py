"""The walk through the encoder: the full and the dropped pass of one micro-batch, side by side, layer by layer.

    streams = begin(state, batch, mode, step)            # embed, and choose the kept tokens
    for layer in range(layers):
        streams = advance(state, layer, streams)         # one layer, on every stream

`run` is this loop. A pipeline stage walks its own layers, validation and probes walk all of them without dropout, and
`flops.part_flops` counts what the same layer plan costs.

Legend: B rows, S tokens, K kept tokens, R positions of a row that the loss reads, d hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from sctd_ds.adapters import Batch
from sctd_ds.config import ScTDConfig
from sctd_ds.method.labels import Labelled
from sctd_ds.method.schedule import Mode, aligned_rows
from sctd_ds.method.selection import Selection
from sctd_ds.method.state import ScTD


@dataclass(frozen=True)
class Pass:
    """What the objective reads of one pass: states after layer l, [B, S or R, d], and after layer l-1, [B, S or K, d].

    At both layers the first state of a row is that of [CLS].
    """

    last: Tensor
    previous: Tensor


@dataclass(frozen=True)
class Streams:
    """One micro-batch between two layers. What a pass does not have, or not yet, is None."""

    batch: Batch
    mode: Mode
    rows: range
    """The rows of the full pass: all in a dense step, those that are aligned in an align step, none in a drop step."""
    selection: Selection | None = None
    """The kept tokens; None: there is no dropped pass."""
    kept_mask: Tensor | None = None
    """[B, K], the attention mask of the kept tokens; None: no padding."""
    tokens: Tensor | None = None
    """Dropped pass, all tokens [B, S, d]. From the cross layer on, only the dropped tokens' states are read again."""
    kept: Tensor | None = None
    """Dropped pass, kept tokens [B, K, d], from the cross layer on."""
    full: Tensor | None = None
    """Full pass [rows, S, d]. With a shared prefix it leaves `tokens` at the cross layer."""
    labelled: Labelled | None = None
    dropped_pass: Pass | None = None
    full_pass: Pass | None = None
    """Results, after the last layer."""

    @property
    def full_mask(self) -> Tensor | None:
        """The attention mask of the full pass's rows."""
        mask = self.batch.attention_mask
        return mask if mask is None or len(self.rows) == len(mask) else mask[self.rows.start :: self.rows.step]


def run(state: ScTD, batch: Batch, mode: Mode, step: int | None = None) -> Streams:
    """Both passes of `mode` through all layers. step: the optimizer step, which chooses the rows of a "spread" step."""
    streams = begin(state, batch, mode, step)
    for layer in range(state.plan.layers):
        streams = advance(state, layer, streams)
    return streams


def begin(state: ScTD, batch: Batch, mode: Mode, step: int | None = None) -> Streams:
    """Embed a micro-batch and choose its kept tokens."""
    rows = full_rows(state.config, batch, mode, step)
    embedded = state.adapter.embed(batch)
    if mode == "dense":
        return Streams(batch, mode, rows, full=embedded)
    selection = state.select(batch)
    streams = Streams(batch, mode, rows, selection, kept_mask(batch, selection), tokens=embedded)
    # Without dropout both prefixes are the same, so evaluation always shares one.
    if len(rows) and not state.config.shared_prefix and state.adapter.layers[0].training:
        return replace(streams, full=state.adapter.embed(take_rows(batch, rows)))
    return streams


def advance(state: ScTD, layer: int, streams: Streams) -> Streams:
    """Run encoder layer `layer` (from 0) on every stream."""
    region, run_layer, selection = state.plan.region(layer), state.encoder.run, streams.selection
    if region == "last":
        return _finish(state, streams)

    tokens, kept, full, rows, mask = streams.tokens, streams.kept, streams.full, streams.rows, streams.batch.attention_mask
    if region == "cross" and selection is not None and full is None and len(rows):
        assert tokens is not None
        # A strided view would compile a graph of its own.
        full = tokens if len(rows) == len(tokens) else tokens[rows.start :: rows.step].contiguous()
    if full is not None:
        full = run_layer(layer, full, full, streams.full_mask)
    if selection is None:
        return replace(streams, full=full)

    recompute = _recompute(state, streams)
    at = selection.positions
    if region == "full":
        assert tokens is not None
        tokens = run_layer(layer, tokens, tokens, mask)
    elif region == "cross":
        assert tokens is not None
        if state.adapter.black_box:
            kept = selection.gather(run_layer(layer, tokens, tokens, mask, recompute=recompute))
        else:
            kept = run_layer(layer, selection.gather(tokens), tokens, mask, at, recompute=recompute)
    else:
        assert kept is not None
        kept = run_layer(layer, kept, kept, streams.kept_mask, at, at, recompute=recompute)
    return replace(streams, tokens=tokens, kept=kept, full=full)


def _finish(state: ScTD, streams: Streams) -> Streams:
    """The last layer, where the dropped tokens come back with their states of the last full layer."""
    batch, labelled = streams.batch, state.locate(streams.batch)
    full_pass = dropped_pass = None
    if streams.full is not None:
        outputs = labelled.take_rows(streams.rows).outputs
        full_pass = Pass(_last_layer(state, streams.full, streams.full_mask, outputs), streams.full)
    if streams.selection is not None:
        assert streams.tokens is not None and streams.kept is not None
        merged = streams.selection.merge(streams.tokens, streams.kept)
        recompute = _recompute(state, streams)
        last = _last_layer(state, merged, batch.attention_mask, labelled.outputs, recompute)
        dropped_pass = Pass(last, streams.kept)
    return replace(streams, labelled=labelled, dropped_pass=dropped_pass, full_pass=full_pass)


def _last_layer(state: ScTD, x: Tensor, mask: Tensor | None, outputs: Selection | None, recompute: bool = False) -> Tensor:
    """Layer l on the states of layer l-1 [B, S, d]: its output everywhere, [B, S, d], or at `outputs` alone, [B, R, d].

    No layer follows, so where the loss reads no output, only the keys and values matter.
    """
    if outputs is None:
        return state.encoder.run(state.plan.last, x, x, mask, recompute=recompute)
    return state.encoder.run(state.plan.last, outputs.gather(x), x, mask, outputs.positions, recompute=recompute)


def _recompute(state: ScTD, streams: Streams) -> bool:
    return streams.mode == "align" and state.config.recompute_align


def full_rows(config: ScTDConfig, batch: Batch, mode: Mode, step: int | None) -> range:
    """Rows of the micro-batch that the full pass runs on."""
    rows = range(len(batch.input_ids))
    if mode == "dense":
        return rows
    return aligned_rows(config, step, len(rows)) if mode == "align" else range(0)


def kept_mask(batch: Batch, selection: Selection) -> Tensor | None:
    """The attention mask of the kept tokens, [B, K]; None where rows are full."""
    return None if batch.attention_mask is None else batch.attention_mask.gather(1, selection.positions.long())


def take_rows(batch: Batch, rows: range) -> Batch:
    """The micro-batch's `rows`, as views."""
    if rows == range(len(batch.input_ids)):
        return batch

    def take(x: Any) -> Any:
        # Position ids may have a single row that serves all.
        per_row = isinstance(x, Tensor) and len(x) == len(batch.input_ids)
        return x[rows.start :: rows.step] if per_row else x

    return replace(
        batch,
        input_ids=take(batch.input_ids),
        labels=take(batch.labels),
        attention_mask=take(batch.attention_mask),
        embedding={key: take(value) for key, value in batch.embedding.items()},
        sentence_labels=take(batch.sentence_labels),
    )
