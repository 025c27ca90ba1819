"""Attention, and the rule that chooses its kernel: torch's own choice differs between versions, and not every one is right."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

KERNELS = {
    "cudnn": (SDPBackend.CUDNN_ATTENTION, torch.backends.cuda.cudnn_sdp_enabled),
    "flash": (SDPBackend.FLASH_ATTENTION, torch.backends.cuda.flash_sdp_enabled),
    "efficient": (SDPBackend.EFFICIENT_ATTENTION, torch.backends.cuda.mem_efficient_sdp_enabled),
    "math": (SDPBackend.MATH, torch.backends.cuda.math_sdp_enabled),
}
"""torch's attention kernels in the order in which torch 2.11 to 2.15 try those that are enabled, with the user's switch."""

HOPPER = (9, 0)
CUDNN_VERSION = 91900  # 9.19, which comes with torch 2.11; older ones read beyond the end of a row
CUDNN_TILE = 128
CUDNN_DROPOUTS = 16


def backends(
    *,
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    head_size: int,
    dtype: torch.dtype,
    masked: bool,
    dropout: float,
    deterministic: bool,
    device: torch.device,
    capability: tuple[int, int] | None = None,
    cudnn_version: int | None = None,
) -> tuple[str, ...]:
    """The attention kernels for these sizes, best first, of "cudnn", "flash", "efficient" and "math"; (): torch's own choice.

    - cudnn: the fastest on Hopper, slower than flash on most other GPUs. fp16 and bf16. Without a mask, with which its
      gradients can be NaN; without determinism; with a dropout that is a multiple of 1/16, as some of its kernels round
      to one; for queries and keys in whole tiles of 128, as its known faults concern a part of a tile.
    - flash: fp16 and bf16, without a mask.
    - efficient: also fp32, also with a mask, for heads aligned to 16 bytes.
    - math: anything; it holds the scores of all queries and keys in memory.

    Left out is what `torch.backends.cuda.enable_cudnn_sdp(False)` and its like switch off. torch passes over what it was
    built without. On a CPU and with ROCm the choice is torch's own.

    Args:
        masked: whether there is a mask, of any form.
        dropout: the probability.
        deterministic: whether `torch.use_deterministic_algorithms` is on.
        capability, cudnn_version: of the GPU, and of cuDNN as `torch.backends.cudnn.version()` gives it; default: as installed.
    """
    if device.type != "cuda" or torch.version.hip:
        return ()
    half = dtype in (torch.float16, torch.bfloat16)
    cudnn = (
        (half and not masked and not deterministic)
        and dropout * CUDNN_DROPOUTS % 1 == 0
        and (queries % CUDNN_TILE == 0 and keys % CUDNN_TILE == 0)
        and (head_size % 8 == 0 and head_size <= 128)
        and max(batch, heads) < 2**16
        and (capability or _capability(device)) == HOPPER
        and (cudnn_version or _cudnn_version()) >= CUDNN_VERSION
    )
    usable = {
        "cudnn": cudnn,
        "flash": half and not masked and head_size <= 256,
        "efficient": dtype != torch.float64 and head_size * dtype.itemsize % 16 == 0,
        "math": True,
    }
    return tuple(name for name in KERNELS if usable[name] and _enabled(name))


# What torch.compile takes from these is a constant.
@torch.compiler.assume_constant_result
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@torch.compiler.assume_constant_result
def _cudnn_version() -> int:
    return torch.backends.cudnn.version() or 0


@torch.compiler.assume_constant_result
def _enabled(name: str) -> bool:
    return KERNELS[name][1]()


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Scaled dot-product attention: query [B, heads, Q, D], key and value [B, heads, C, D] -> [B, heads, Q, D].

    mask: bool, broadcast to [B, heads, Q, C], True = attend. dropout: the probability.
    """
    batch, heads, queries, head_size = query.shape
    names = backends(
        batch=batch,
        heads=heads,
        queries=queries,
        keys=key.shape[2],
        head_size=head_size,
        dtype=query.dtype,
        masked=mask is not None,
        dropout=dropout,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        device=query.device,
    )
    if not names:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    # Inside the compiled layer: only what the code itself names tells one choice from another in the cache of compiled code.
    with sdpa_kernel([KERNELS[name][0] for name in names]):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
