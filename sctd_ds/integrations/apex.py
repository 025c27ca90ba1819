"""NVIDIA apex, where its compiled parts are really there: FusedLayerNorm, and FusedLAMB or FusedAdam as client optimizers.

Nothing of it is needed, declared or imported otherwise. What is probed are the compiled extensions, because `import apex`
says little: the package index has an unrelated package of that name, and a Python-only build imports and then fails.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from sctd_ds.config import ConfigError

# What each part of apex needs besides Python.
EXTENSIONS = {"normalization": "fused_layer_norm_cuda", "optimizers": "amp_C"}
BUILD = "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation git+https://github.com/NVIDIA/apex"


def require(part: Literal["normalization", "optimizers"]) -> None:
    """ConfigError unless this part of NVIDIA apex can work; it tells apart why not. Imports nothing."""
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


def optimizer(name: Literal["FusedLAMB", "FusedAdam"]) -> type[torch.optim.Optimizer]:
    """apex's optimizer class, to be passed to `initialize` as `optimizer=`; ZeRO wants zero_allow_untested_optimizer then.

    FusedLAMB and DeepSpeed's own FusedLamb ("type": "Lamb") are different algorithms: apex clips by the global norm and has
    no bounds on the trust ratio. A run should not change from one to the other.
    """
    require("optimizers")
    return getattr(importlib.import_module("apex.optimizers"), name)


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
