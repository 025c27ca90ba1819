"""apex is looked for where it can be, and each way of not having it is told apart. No apex is needed."""

import sys

import pytest
import torch
from torch import nn

import sctd_ds
from helpers.families import FAMILIES, build, rows
from sctd_ds.integrations import apex

NORMALIZATION = """
import torch
class FusedLayerNorm(torch.nn.LayerNorm):
    calls = 0
    def forward(self, x):
        FusedLayerNorm.calls += 1
        return super().forward(x)
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of packages that stands before all others; no apex may be installed beside it for these tests to mean much."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def write(**files: str) -> None:
        for name, text in files.items():
            path = tmp_path / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    yield write
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("apex", "fused_layer_norm_cuda", "amp_C"):
            del sys.modules[name]


def nvidia(site, *extensions: str) -> None:
    """A Python-only build, and such of its extensions as are named."""
    init = {"apex/__init__": "", "apex/optimizers/__init__": "class FusedLAMB: pass\nclass FusedAdam: pass\n"}
    site(**init, **{"apex/normalization/__init__": NORMALIZATION}, **dict.fromkeys(extensions, ""))


def test_not_installed(monkeypatch):
    find = apex.importlib.util.find_spec
    monkeypatch.setattr(apex.importlib.util, "find_spec", lambda name: None if name == "apex" else find(name))
    for part in ("normalization", "optimizers"):
        with pytest.raises(ValueError, match="not installed"):
            apex.require(part)


def test_the_unrelated_package_of_that_name_is_not_even_imported(site):
    site(**{"apex/__init__": "raise ImportError('pyramid')", "apex/lib/__init__": ""})
    with pytest.raises(ValueError, match="not NVIDIA's"):
        apex.fuse_layer_norms(nn.LayerNorm(2))
    with pytest.raises(ValueError, match="not NVIDIA's"):
        apex.optimizer("FusedLAMB")


def test_a_python_only_build(site):
    nvidia(site)
    with pytest.raises(ValueError, match="fused_layer_norm_cuda"):
        apex.require("normalization")
    with pytest.raises(ValueError, match="amp_C"):
        apex.require("optimizers")


def test_a_build_with_one_extension_only(site):
    nvidia(site, "amp_C")
    assert apex.optimizer("FusedLAMB").__module__ == "apex.optimizers"
    with pytest.raises(ValueError, match="fused_layer_norm_cuda"):
        apex.fuse_layer_norms(nn.LayerNorm(2))


def test_layer_norms_are_replaced_over_the_same_parameters(site):
    nvidia(site, "fused_layer_norm_cuda")
    family = FAMILIES[0]
    plain, model = build(family), build(family)
    parameters = dict(model.named_parameters())
    assert apex.fuse_layer_norms(model) == 2 * 6 + 2  # two a layer, one in the embedding, one in the head
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    sctd_ds.convert(model, sctd_ds.ScTDConfig(keep_token_ids=[]))
    sctd_ds.convert(plain, sctd_ds.ScTDConfig(keep_token_ids=[]))
    _, kwargs = family.arguments(rows())
    assert torch.equal(model(**kwargs).loss, plain(**kwargs).loss)
    assert type(model.bert.embeddings.LayerNorm).calls > 0
