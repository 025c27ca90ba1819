"""NVIDIA apex, where its compiled parts are really there: FusedLayerNorm, FusedLAMB and FusedAdam.

A run asks for them with `"pretrain": {"layer_norm": "apex"}` and `"optimizer": {"type": "apex.FusedLAMB", "params": {...}}`.
Nothing of apex is declared as a dependency or imported otherwise. `require` looks for the compiled extensions, because
`import apex` says little: the package index has an unrelated package of that name, and a Python-only build imports and then
fails.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from sctd_ds.config import ConfigError, did_you_mean

# What each part of apex needs besides Python.
EXTENSIONS = {"normalization": "fused_layer_norm_cuda", "optimizers": "amp_C"}
BUILD = "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation git+https://github.com/NVIDIA/apex"

OPTIMIZERS = ("apex.FusedAdam", "apex.FusedLAMB")
"""Values of optimizer.type.

FusedLAMB is not DeepSpeed's own "Lamb": apex clips by the global norm (max_grad_norm, 1.0 by default, beside DeepSpeed's
gradient_clipping) and does not bound the trust ratio. A run should not change from one to the other. ZeRO 1 and 2 give the
optimizer one flat tensor per rank, so there the trust ratio is one for all of a rank's parameters, not one per layer.
"""


def require(part: Literal["normalization", "optimizers"]) -> None:
    """ConfigError unless this part of NVIDIA apex can work; the message says which condition fails. Imports nothing."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        raise ConfigError(f"NVIDIA apex is not installed: use torch's, or build it with\n  {BUILD}")
    folders = [Path(folder) / part for folder in spec.submodule_search_locations or ()]
    if not any(folder.is_dir() for folder in folders):
        raise ConfigError(
            f"the installed package `apex` ({spec.origin}) is not NVIDIA's but an unrelated one from the package index: "
            f"pip uninstall apex, and build NVIDIA's with\n  {BUILD}"
        )
    if importlib.util.find_spec(EXTENSIONS[part]) is None:
        raise ConfigError(
            f"NVIDIA apex was built without its CUDA extensions ({EXTENSIONS[part]} is missing): build it again with\n  {BUILD}"
        )


def is_apex(optimizer_type: object) -> bool:
    """Whether a value of optimizer.type asks for apex."""
    return isinstance(optimizer_type, str) and optimizer_type.startswith("apex.")


def check_optimizer(optimizer_type: str, params: Mapping[str, Any]) -> None:
    """ConfigError unless `optimizer` can build this optimizer with these parameters."""
    known = set(inspect.signature(_optimizer_class(optimizer_type)).parameters) - {"params"}
    for key in params:
        if key not in known:
            raise ConfigError(f'unknown key "{key}" in optimizer.params of {optimizer_type}; {did_you_mean(key, known)}')


def optimizer(
    optimizer_type: str, parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]], params: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """apex's optimizer over `parameters`, to be passed to `initialize` as `optimizer=`.

    optimizer_type: one of OPTIMIZERS. parameters: or groups of them. params: the optimizer's keyword arguments. ZeRO also wants
    zero_allow_untested_optimizer.
    """
    return _optimizer_class(optimizer_type)(parameters, **params)


def _optimizer_class(optimizer_type: str) -> type[torch.optim.Optimizer]:
    if optimizer_type not in OPTIMIZERS:
        raise ConfigError(f'optimizer.type="{optimizer_type}" is unknown; {did_you_mean(optimizer_type, OPTIMIZERS)}')
    require("optimizers")
    return getattr(importlib.import_module("apex.optimizers"), optimizer_type.removeprefix("apex."))


def fuse_layer_norms(model: nn.Module) -> int:
    """Replace every nn.LayerNorm with a bias by apex's FusedLayerNorm over the same parameters; returns how many.

    state_dict keys, parameters and what optimizers hold stay as they are. Training and evaluation then round differently.
    """
    require("normalization")
    fused_class = importlib.import_module("apex.normalization").FusedLayerNorm
    found = [
        (parent, name, norm)
        for parent in model.modules()
        for name, norm in parent.named_children()
        if type(norm) is nn.LayerNorm and norm.bias is not None
    ]
    for parent, name, norm in found:
        fused = fused_class(norm.normalized_shape, eps=norm.eps, elementwise_affine=True)
        fused.weight, fused.bias = norm.weight, norm.bias
        setattr(parent, name, fused.train(norm.training))
    return len(found)
