"""The training steps that are compared: variants, cases, and a trainer that can take a step of any variant."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from transformers import BertConfig, BertForMaskedLM

import sctd_ds
from benchmarks import random_ltd
from benchmarks.profiling import UPDATE
from sctd_ds.adapters.architectures import PRESETS
from sctd_ds.adapters.huggingface import BertAdapter
from sctd_ds.config import ScTDConfig
from sctd_ds.method.convert import state_of
from sctd_ds.method.flops import Shape, part_flops, sequence_flops
from sctd_ds.method.plan import LayerPlan, kept_tokens
from sctd_ds.method.schedule import Mode
from sctd_ds.run.environment import device_name, peak_flops
from sctd_ds.run.probe import HUGGING_FACE, choose_step, release_memory, start_engine

VOCABULARY = 30528  # BERT's 30522 as pretrain.py pads it, for every variant
SMALL = {
    "hidden_size": 256,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "vocab_size": 4096,
}
TOY = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 96}
MODELS: dict[str, dict[str, Any]] = {
    "large": PRESETS["bert-large"],
    "base": PRESETS["bert-base"],
    "small": SMALL,
    "toy": TOY,
}
ON_A_CPU = ("small", "toy")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

HUGGING_FACE_COMPILED, RANDOM_LTD = "huggingface compiled", "random-LTD"
ALIGN, SEPARATE = "align", "align, separate prefix"
DENSE_WHOLE, DROP_WHOLE = "dense, whole last layer", "drop, whole last layer"


@dataclass(frozen=True)
class Variant:
    """A step to measure: the mode, how the method's settings differ from the default, and which forward runs."""

    name: str
    mode: Mode = "dense"
    settings: Mapping[str, Any] = field(default_factory=dict)
    against: str | None = "dense"
    """Name of the dense step that its time and operations are compared with."""
    model: Literal["converted", "plain", "compiled", "random-LTD"] = "converted"
    """The converted model, or the untouched one: as it is, compiled, or with random-LTD's layers."""
    eager: bool = False
    """Without torch.compile, whatever the others do."""
    one_pass: bool = False
    """With `BertAdapter.one_pass_backward`."""

    @property
    def converted(self) -> bool:
        return self.model == "converted"


VARIANTS = (
    Variant(HUGGING_FACE, against=None, model="plain"),
    Variant(HUGGING_FACE_COMPILED, against=None, model="compiled"),
    Variant(RANDOM_LTD, against=HUGGING_FACE, model="random-LTD"),
    Variant("dense"),
    Variant("drop", "drop"),
    Variant(ALIGN, "align"),
    Variant(SEPARATE, "align", {"shared_prefix": False}),
    Variant("align, recomputed", "align", {"recompute_align": True}),
    Variant("spread", "align", {"align_schedule": "spread"}),
    Variant(DENSE_WHOLE, "dense", {"last_layer": "all"}, against=DENSE_WHOLE),
    Variant(DROP_WHOLE, "drop", {"last_layer": "all"}, against=DENSE_WHOLE),
    Variant("dense, eager", "dense", eager=True),
    Variant("drop, eager", "drop", against="drop", eager=True),
    Variant("drop, one pass", "drop", against="drop", one_pass=True),
    Variant("drop, one pass, eager", "drop", against="drop", eager=True, one_pass=True),
)
BY_NAME = {variant.name: variant for variant in VARIANTS}


@dataclass(frozen=True, order=True)
class Case:
    """A model by name, S tokens per row, B rows per micro-batch."""

    model: str
    length: int
    batch: int

    @property
    def labels(self) -> int:
        """Labelled tokens per row: as many as `sctd_ds.data.Masker` chooses at 15 %."""
        return max(1, round(0.15 * (self.length - 2)))

    @property
    def shape(self) -> Shape:
        size = MODELS[self.model]
        vocabulary = size.get("vocab_size", VOCABULARY)
        return Shape(
            layers=size["num_hidden_layers"],
            hidden=size["hidden_size"],
            intermediate=size["intermediate_size"],
            vocabulary=vocabulary,
            length=self.length,
            labels=self.labels,
        )

    def config(self, variant: Variant) -> ScTDConfig:
        return ScTDConfig(keep_token_ids=[0, 1, 2, 3], labels_per_row=self.labels, **variant.settings)

    def kept(self, variant: Variant) -> int:
        """K of S tokens."""
        return kept_tokens(self.length, self.config(variant).drop_ratio)

    def flops(self, variant: Variant) -> float:
        """Operations of one sequence as the variant computes them: the untouched model's head runs on every token."""
        shape, config = self.shape, self.config(variant)
        if variant.converted:
            return sequence_flops(shape, config, variant.mode)
        if variant.model != "random-LTD":
            return sequence_flops(shape, config, "dense", self.length)
        # As a drop step, except for the cross layer, which random-LTD runs on the kept tokens alone.
        parts, plan = part_flops(shape, config, "drop", self.length), LayerPlan(shape.layers)
        return sum(parts) - parts[plan.cross] + parts[plan.kept[0]]

    def batches(self, device: torch.device, count: int = 4) -> list[dict[str, Tensor]]:
        """The same random rows each time: input_ids and labels [B, S], with exactly `labels` labelled tokens per row."""
        generator = torch.Generator().manual_seed(0)
        vocabulary, made = self.shape.vocabulary, []
        for _ in range(count):
            ids = torch.randint(4, vocabulary, (self.batch, self.length), generator=generator)
            chosen = 1 + torch.rand(self.batch, self.length - 1, generator=generator).argsort(1)[:, : self.labels]
            labels = torch.full_like(ids, -100).scatter(1, chosen, ids.gather(1, chosen))
            ids.scatter_(1, chosen, 3)
            made.append({"input_ids": ids.to(device), "labels": labels.to(device)})
        return made

    def __str__(self) -> str:
        return f"{self.model} S={self.length} B={self.batch}"


@dataclass(frozen=True)
class Setup:
    """What all variants of a run share."""

    device: torch.device
    dtype: str
    compile: bool
    accumulation: int = 1
    deterministic: bool = False
    """Kernels that add in one order only; `make_setup` asked torch for them."""

    @property
    def peak_flops(self) -> float | None:
        """The device's dense 16-bit peak in FLOP/s; None where it is not known or does not apply."""
        return None if self.dtype == "fp32" else peak_flops(device_name(self.device.type))


class Trainer:
    """One model that can take a step of any variant, first without an engine, and with one after `start_engine`."""

    def __init__(self, model: str, setup: Setup) -> None:
        self.setup = setup
        size = {"vocab_size": VOCABULARY, **MODELS[model]}
        torch.manual_seed(0)
        with setup.device:
            built = BertForMaskedLM(BertConfig(**size, attn_implementation="sdpa"))
        self.model: Any = built.to(DTYPES[setup.dtype]).train()
        sctd_ds.convert(self.model, ScTDConfig(keep_token_ids=[0, 1, 2, 3]))
        self.engine: Any = None
        self.variant: Variant | None = None
        self._steps = 0
        plain = types.MethodType(type(self.model).forward, self.model)
        self._forwards: dict[str, Callable[..., Any]] = {
            "converted": self.model.forward,
            "plain": plain,
            "random-LTD": plain,  # with other layers
        }
        self._layers: nn.ModuleList = self.model.bert.encoder.layer
        self._random_ltd_layers: nn.ModuleList | None = None
        if setup.compile:
            # Each pair of S and B needs graphs of its own. A step that silently ran uncompiled would give a wrong figure.
            torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1024
            torch._dynamo.config.fail_on_recompile_limit_hit = True
            state_of(self.model).encoder.compile()
            compiled = torch.compile(type(self.model).forward, dynamic=False)
            self._forwards["compiled"] = types.MethodType(compiled, self.model)

    def start_engine(self) -> None:
        """Put the real engine around the model, with the settings of ds_configs/ and torch's fused AdamW."""
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # only for DeepSpeed's bookkeeping: a batch may have any size
            "gradient_accumulation_steps": self.setup.accumulation,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "weight_decay": 0.01, "torch_adam": True, "fused": True}},
            "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 50_000_000},
            "gradient_clipping": 1.0,
            "steps_per_print": 1_000_000_000,
            "timers": {"throughput": {"enabled": False}},
            "data_efficiency": random_ltd.settings(len(self._layers)),  # no effect on layers that are not wrapped
        }
        if self.setup.dtype in ("fp16", "bf16"):
            settings[self.setup.dtype] = {"enabled": True}
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
        self.engine = start_engine(self.model, settings)

    def missing(self, variant: Variant) -> str | None:
        """Why a step of `variant` cannot run here, in a line; None: it can."""
        if (variant.model == "compiled" or variant.eager) and not self.setup.compile:
            return "torch.compile is off"
        if variant.model == "random-LTD":
            if self.engine is None:
                return "random-LTD works inside DeepSpeed's engine only"
            return random_ltd.unavailable()
        return None

    def choose(self, variant: Variant, case: Case) -> None:
        """Make the next steps those of `variant`."""
        self.variant = variant
        torch.compiler.set_stance("force_eager" if variant.eager else "default")
        BertAdapter.one_pass_backward = variant.one_pass
        self.model.forward = self._forwards[variant.model]
        self.model.bert.encoder.layer = self._layers
        state_of(self.model).config = case.config(variant)
        if self.engine is None:
            return
        choose_step(self.engine, variant.mode, untouched=not variant.converted)
        if variant.model == "random-LTD":
            self._random_ltd_layers = self._random_ltd_layers or random_ltd.wrap(self.engine)
            self.model.bert.encoder.layer = self._random_ltd_layers
            random_ltd.keep(self.engine, case.kept(variant))

    def step(self, batch: Mapping[str, Tensor]) -> None:
        """One step, without waiting for the device. With the engine: all micro-batches of an update, and the update."""
        self._steps += 1
        if self.engine is None:
            if self.variant.converted:
                sctd_ds.set_mode(self.model, self.variant.mode, self._steps)
            self.model(**batch).loss.backward()
            self.model.zero_grad(set_to_none=True)
            return
        for _ in range(self.setup.accumulation):
            self.engine.backward(self.engine(**batch).loss)
            with record_function(UPDATE):
                self.engine.step()

    def close(self) -> None:
        """Release the memory, and that of what was compiled. Only `variant` stays readable."""
        torch.compiler.set_stance("default")
        BertAdapter.one_pass_backward = False
        torch._dynamo.reset()
        if self.engine is not None:
            self.engine.destroy()
        variant = self.variant
        self.__dict__.clear()
        self.variant = variant
        release_memory()
