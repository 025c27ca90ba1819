"""The rule that chooses attention's kernel, as on GPUs that are not here, and that torch runs what it chose."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForMaskedLM, ModernBertConfig, ModernBertForMaskedLM

import sctd_ds
from sctd_ds.adapters import attention

GPU = torch.device("cuda", 0)
HOPPER, AMPERE, BLACKWELL = (9, 0), (8, 0), (10, 0)
# A layer of BERT-large on full rows, in the runs of ds_configs/ but for the dropout, which is 0.1 there.
LAYER = {
    "batch": 64,
    "heads": 16,
    "queries": 512,
    "keys": 512,
    "head_size": 64,
    "dtype": torch.float16,
    "masked": False,
    "dropout": 0.0,
    "deterministic": False,
    "device": GPU,
    "capability": HOPPER,
    "cudnn_version": 91900,
}
ALL, NO_CUDNN, MASKED = ("cudnn", "flash", "efficient", "math"), ("flash", "efficient", "math"), ("efficient", "math")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, ALL),
        ({"dtype": torch.bfloat16, "queries": 256, "keys": 256}, ALL),
        ({"queries": 256}, ALL),
        ({"dropout": 0.125}, ALL),
        ({"dropout": 0.1}, NO_CUDNN),
        ({"deterministic": True}, NO_CUDNN),
        ({"capability": AMPERE}, NO_CUDNN),
        ({"capability": BLACKWELL}, NO_CUDNN),
        ({"cudnn_version": 91501}, NO_CUDNN),
        ({"queries": 77}, NO_CUDNN),
        ({"queries": 64, "keys": 64}, NO_CUDNN),
        ({"keys": 192}, NO_CUDNN),
        ({"head_size": 192}, NO_CUDNN),
        ({"batch": 65_536}, NO_CUDNN),
        ({"masked": True}, MASKED),
        ({"masked": True, "keys": 192, "dropout": 0.1}, MASKED),
        ({"dtype": torch.float32}, MASKED),
        ({"dtype": torch.float64}, ("math",)),
        ({"head_size": 20}, ("flash", "math")),
        ({"head_size": 20, "dtype": torch.float32}, MASKED),
        ({"head_size": 18, "dtype": torch.float32}, ("math",)),
        ({"head_size": 264}, MASKED),
        ({"device": torch.device("cpu")}, ()),
    ],
    ids=str,
)
def test_the_rule(change, expected):
    assert attention.backends(**{**LAYER, **change}) == expected


def test_a_kernel_that_the_user_switched_off_stays_off():
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        assert attention.backends(**LAYER) == NO_CUDNN
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def test_with_rocm_the_choice_is_torchs_own(monkeypatch):
    """Its devices are of type cuda too, and MI300 has Hopper's capability."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert attention.backends(**LAYER) == ()


def test_the_gpu_and_its_cudnn_are_asked_where_they_are_not_given(monkeypatch):
    case = {**LAYER, "capability": None, "cudnn_version": None}
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    for capability, expected in ((HOPPER, ALL), (AMPERE, NO_CUDNN)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, is_a=capability: is_a)
        assert attention.backends(**case) == expected
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: HOPPER)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: None)  # torch without cuDNN
    assert attention.backends(**case) == NO_CUDNN


class Operators(TorchDispatchMode):
    """Collects the attention operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.ran += [str(function)] if "scaled_dot_product" in str(function) else []
        return function(*args, **(kwargs or {}))


def kernel_of(run) -> str:
    """The kernel that `run` runs attention with on a CPU, which has two: "flash", or "math", of plain operators."""
    with Operators() as operators:
        run()
    return "flash" if operators.ran else "math"


def heads(queries: int = 128, **settings) -> Tensor:
    return torch.randn(2, 4, queries, 16, generator=torch.Generator().manual_seed(0), **settings)


@pytest.mark.parametrize("name", ["flash", "math"])
def test_torch_runs_the_chosen_kernel_and_its_state_comes_back(name, monkeypatch):
    monkeypatch.setattr(attention, "backends", lambda **case: (name,))
    before = torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True)
    x = heads()
    assert kernel_of(lambda: attention.attend(x, x, x, None, 0.0)) == name
    with pytest.raises(RuntimeError):
        attention.attend(x, x[..., :8], x, None, 0.0)
    assert torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True) == before


def test_on_a_cpu_attention_is_torchs_to_the_bit():
    x, mask = heads(), torch.rand(2, 1, 1, 128) < 0.8
    assert kernel_of(lambda: attention.attend(x, x, x, None, 0.0)) == "flash"
    assert torch.equal(attention.attend(x, x, x, mask, 0.0), F.scaled_dot_product_attention(x, x, x, attn_mask=mask))


def test_compiled_code_holds_the_choice_for_its_shape(monkeypatch):
    """In one graph, and with a graph of its own where determinism changes what the rule says."""
    graphs, rule = [], attention.backends

    def choose(**case):
        """Flash where a Hopper GPU would run cuDNN, which a CPU lacks; otherwise math."""
        names = rule(**{**case, "device": GPU})
        return ("flash",) if names[0] == "cudnn" else ("math",)

    def keep(graph, inputs):
        graphs.append(" ".join(str(node.target) for node in graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: HOPPER)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    monkeypatch.setattr(attention, "backends", choose)
    compiled = torch.compile(attention.attend, backend=aot_autograd(fw_compiler=keep), dynamic=False, fullgraph=True)
    try:
        for queries, deterministic in ((128, False), (64, False), (128, True)):
            torch.use_deterministic_algorithms(deterministic)
            x = heads(queries, dtype=torch.float16)
            torch.testing.assert_close(compiled(x, x, x, None, 0.0), attention.attend(x, x, x, None, 0.0))
    finally:
        torch.use_deterministic_algorithms(False)
        torch._dynamo.reset()
    assert ["flash_attention" in graph for graph in graphs] == [True, False, False]


def models() -> list[nn.Module]:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    return [
        BertForMaskedLM(BertConfig(**sizes, attention_probs_dropout_prob=0.25)),
        ModernBertForMaskedLM(ModernBertConfig(**sizes, **special, attention_dropout=0.25, global_attn_every_n_layers=1)),
    ]


@pytest.mark.parametrize("padded", [False, True], ids=["full rows", "padded rows"])
@pytest.mark.parametrize("family", [0, 1], ids=["BERT", "ModernBERT"])
def test_every_layer_asks_the_rule_with_what_it_runs(family, padded, monkeypatch):
    asked = []
    real = attention.backends
    monkeypatch.setattr(attention, "backends", lambda **case: asked.append(case) or real(**case))
    model = sctd_ds.convert(models()[family], sctd_ds.ScTDConfig(keep_token_ids=[1], labels_per_row=2))
    ids = torch.randint(3, 64, (3, 16))
    labels = torch.full_like(ids, -100)
    labels[:, 3] = 5
    batch = {"input_ids": ids, "labels": labels}
    if padded:
        batch["attention_mask"] = (torch.arange(16) < 12).long().expand(3, -1)
    torch.use_deterministic_algorithms(True)
    try:
        sctd_ds.set_mode(model.train(), "drop")
        model(**batch)
    finally:
        torch.use_deterministic_algorithms(False)
    # The last layer's queries are a row's labelled tokens and [CLS].
    assert [(case["queries"], case["keys"]) for case in asked] == [(16, 16), (8, 16), (8, 8), (3, 16)]
    for case in asked:
        assert (case["batch"], case["heads"], case["head_size"]) == (3, 2, 16)
        assert (case["masked"], case["dropout"], case["deterministic"]) == (padded, 0.25, True)
        assert (case["dtype"], case["device"].type) == (torch.float32, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.125])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(512, 512), (256, 512), (192, 192), (77, 512)])
def test_a_gpu_runs_the_best_kernel_of_the_rule(queries, keys, masked, dropout, deterministic):
    names = {"cudnn": "cudnn_attention", "flash": "flash_attention", "efficient": "efficient_attention"}
    query = torch.randn(4, 16, queries, 64, device="cuda", dtype=torch.float16, requires_grad=True)
    key = torch.randn(4, 16, keys, 64, device="cuda", dtype=torch.float16, requires_grad=True)
    mask = torch.ones(4, 1, 1, keys, dtype=torch.bool, device="cuda") if masked else None
    torch.use_deterministic_algorithms(deterministic)
    try:
        case = {**LAYER, "queries": queries, "keys": keys, "masked": masked, "dropout": dropout, "deterministic": deterministic}
        best = attention.backends(**{**case, "batch": 4, "capability": None, "cudnn_version": None})[0]
        with Operators() as operators:
            mixed = attention.attend(query, key, key, mask, dropout)
    finally:
        torch.use_deterministic_algorithms(False)
    assert names[best] in operators.ran[0]
    gradients = torch.autograd.grad(mixed.float().square().sum(), (query, key))
    assert mixed.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)
