"""Kernels for token dropping: select tokens, take them out of a sequence, put them back, and compute losses and scores.

    select_tokens        keep the K tokens of highest score in every sequence
    gather_tokens        take the kept tokens out of a sequence
    merge_tokens         put them back
    softmax_kl           KL(softmax(teacher) || softmax(student)) of every row
    token_cross_entropy  cross-entropy of every row
    linear_gelu          GELU of a linear layer, with the bias's gradient from the backward pass of GELU
    layer_norm           LayerNorm, with its parameters' gradients from the one pass of its backward
    record_losses        sum losses per vocabulary id, exactly
    update_scores        moving average of those losses

Every function runs as a Triton kernel on a GPU and as plain torch elsewhere; `backend="triton"` or `"torch"`
forces one. `sctd_kernels.reference` has the torch versions, which define what the kernels compute.
"""

from sctd_kernels import reference
from sctd_kernels.api import (
    gather_tokens,
    layer_norm,
    linear_gelu,
    merge_tokens,
    record_losses,
    select_tokens,
    softmax_kl,
    token_cross_entropy,
    update_scores,
)

__all__ = [
    "gather_tokens",
    "layer_norm",
    "linear_gelu",
    "merge_tokens",
    "record_losses",
    "reference",
    "select_tokens",
    "softmax_kl",
    "token_cross_entropy",
    "update_scores",
]
