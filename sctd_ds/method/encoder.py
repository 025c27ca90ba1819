"""One encoder layer of a model: run as it is, compiled, or recomputed in the backward pass.

Legend: B rows, Q query tokens, C context tokens, d hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sctd_ds.adapters import Adapter


class Encoder:
    """Runs a model's layers one at a time, on any queries and context. It holds no parameter."""

    def __init__(self, adapter: Adapter, documents: bool = False) -> None:
        """documents: whether the masks of `run` number the documents of a row."""
        self.adapter = adapter
        self._documents = documents
        self._layer: Callable[..., Tensor] = adapter.layer
        self._compile_options: dict[str, Any] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Encoder:
        """An encoder of the copied model. Compiled code is shared, unless the layer looks things up in its own adapter."""
        memo[id(self)] = copied = Encoder.__new__(Encoder)  # first, as the adapter leads back here through its model
        copied.__init__(copy.deepcopy(self.adapter, memo), self._documents)  # type: ignore[misc]
        if self._compile_options is not None:
            if hasattr(self.adapter.layer, "__self__"):
                copied.compile(**self._compile_options)
            else:
                copied._layer, copied._compile_options = self._layer, self._compile_options
        return copied

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

    def run(
        self,
        index: int,
        queries: Tensor,
        context: Tensor,
        mask: Tensor | None,
        query_at: Tensor | None = None,
        context_at: Tensor | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """Layer `index`: queries [B, Q, d] attend to context [B, C, d]; mask [B, C], 0 at padding, or None.

        With `documents`, a query attends where the mask has its own number. Padding then attends to padding.

        query_at, context_at: the positions of these tokens in the row, [B, Q] and [B, C], for layers that depend on them;
        None: 0, 1, 2 ... recompute: keep the layer's inputs only, and run it again in the backward pass.
        """
        layer: Any = self.adapter.layers[index]
        attend = None
        if mask is not None and self._documents:
            # Only the cross and the last layer choose queries of their context.
            of_queries = mask if query_at is None or context_at is not None else mask.gather(1, query_at.long())
            attend = (of_queries[:, :, None] == mask[:, None, :])[:, None]
        elif mask is not None:
            attend = mask.bool()[:, None, None, :]
        places = (query_at, context_at) if self.adapter.positional else ()
        if not layer.training:
            return self.adapter.layer(layer, queries, context, attend, *places)
        if getattr(layer, "gradient_checkpointing", False):
            # gradient_checkpointing_enable sets this function. Positions are arguments, so no selection is made twice.
            return layer._gradient_checkpointing_func(self._layer, layer, queries, context, attend, *places)
        if recompute:
            return checkpoint(self._layer, layer, queries, context, attend, *places, use_reentrant=False)
        return self._layer(layer, queries, context, attend, *places)
