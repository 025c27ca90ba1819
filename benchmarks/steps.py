"""The training steps that are compared: kinds of step, cases, and a trainer that can take a step of any kind."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn
from torch.profiler import record_function
from transformers import BertConfig, BertForMaskedLM

import sctd_ds
from benchmarks import random_ltd
from benchmarks.profiling import UPDATE
from sctd_ds.config import ScTDConfig
from sctd_ds.method.convert import state_of
from sctd_ds.method.flops import Shape, part_flops, sequence_flops
from sctd_ds.method.plan import LayerPlan, kept_tokens
from sctd_ds.method.schedule import Mode
from sctd_ds.run.probe import HUGGING_FACE, STATIC_FP16, release_memory
from sctd_ds.run.report import PEAK_FLOPS

VOCABULARY = 30528  # BERT's 30522 as pretrain.py pads it, for every variant
MODELS: dict[str, dict[str, Any]] = {
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "small": {"hidden_size": 256, "num_hidden_layers": 12, "num_attention_heads": 4, "intermediate_size": 1024,
              "vocab_size": 4096},
}  # fmt: skip
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

HUGGING_FACE_COMPILED, RANDOM_LTD = "huggingface compiled", "random-LTD"
ALIGN, SEPARATE = "align", "align, separate prefix"
DENSE_WHOLE, DROP_WHOLE = "dense, whole last layer", "drop, whole last layer"


@dataclass(frozen=True)
class Variant:
    """One kind of step: whose forward runs, the mode, and how the method's settings differ from the default."""

    name: str
    mode: Mode = "dense"
    settings: Mapping[str, Any] = field(default_factory=dict)
    against: str | None = "dense"
    """Name of the dense step that its time and operations are compared with."""
    model: Literal["ours", "plain", "compiled", "random-LTD"] = "ours"

    @property
    def ours(self) -> bool:
        """Whether the converted model runs, not the untouched one."""
        return self.model == "ours"


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
        return Shape(size["num_hidden_layers"], size["hidden_size"], size["intermediate_size"], vocabulary, self.length,
                     self.labels)  # fmt: skip

    def config(self, variant: Variant) -> ScTDConfig:
        return ScTDConfig(keep_token_ids=[0, 1, 2, 3], labels_per_row=self.labels, **variant.settings)

    def kept(self, variant: Variant) -> int:
        """K of S tokens."""
        return kept_tokens(self.length, self.config(variant).drop_ratio)

    def flops(self, variant: Variant) -> float:
        """Operations of one sequence as the variant computes them: the untouched model's head runs on every token."""
        shape, config = self.shape, self.config(variant)
        if variant.ours:
            return sequence_flops(shape, config, variant.mode)
        if variant.model != "random-LTD":
            return sequence_flops(shape, config, "dense", self.length)
        # A drop step, but for the layer where our kept tokens attend to all: to it, too, the dropped ones are gone.
        parts, plan = part_flops(shape, config, "drop", self.length), LayerPlan(shape.layers)
        return sum(parts) - parts[plan.cross] + parts[plan.kept[0]]

    def batches(self, device: torch.device, count: int = 4) -> list[dict[str, Tensor]]:
        """Random rows, always the same: input_ids [B, S] and labels [B, S] with exactly `labels` labelled tokens a row."""
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

    @property
    def peak_flops(self) -> float | None:
        """The device's dense 16-bit peak; None where it is not known or does not apply."""
        if self.device.type != "cuda" or self.dtype == "fp32":
            return None
        name = torch.cuda.get_device_name()
        return next((value for key, value in PEAK_FLOPS.items() if key in name), None)


class Trainer:
    """One model that can take a step of any variant, without an engine at first and with one after `start_engine`."""

    def __init__(self, model: str, setup: Setup) -> None:
        self.setup = setup
        size = {"vocab_size": VOCABULARY, **MODELS[model]}
        torch.manual_seed(0)
        with setup.device:
            built = BertForMaskedLM(BertConfig(**size, attn_implementation="sdpa"))
        self.model: Any = built.to(DTYPES[setup.dtype]).train()
        sctd_ds.convert(self.model, ScTDConfig(keep_token_ids=[0, 1, 2, 3]))
        self.engine: Any = None
        self.variant = BY_NAME[HUGGING_FACE]
        self._steps = 0
        plain = type(self.model).forward
        self._forwards = {"ours": self.model.forward, "plain": types.MethodType(plain, self.model)}
        self._forwards["random-LTD"] = self._forwards["plain"]
        self._layers: nn.ModuleList = self.model.bert.encoder.layer
        self._random_ltd_layers: nn.ModuleList | None = None
        if setup.compile:
            # Every pair of S and B has graphs of its own, of all models; a step that quietly ran uncompiled would mislead.
            torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1024
            torch._dynamo.config.fail_on_recompile_limit_hit = True
            state_of(self.model).encoder.compile()
            self._forwards["compiled"] = types.MethodType(torch.compile(plain, dynamic=False), self.model)

    def start_engine(self) -> None:
        """Put the real engine around the model, with the settings of ds_configs/ and torch's fused AdamW."""
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # enters DeepSpeed's own bookkeeping only; batches come as they are
            "gradient_accumulation_steps": self.setup.accumulation,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "weight_decay": 0.01, "torch_adam": True, "fused": True}},
            "zero_optimization": {"stage": 2, "contiguous_gradients": True, "overlap_comm": self.setup.device.type == "cuda"},
            "gradient_clipping": 1.0,
            "steps_per_print": 1_000_000_000,
            "data_efficiency": random_ltd.settings(len(self._layers)),  # does nothing to layers that are not wrapped
        }
        if self.setup.dtype == "fp16":
            settings["fp16"] = STATIC_FP16
        elif self.setup.dtype == "bf16":
            settings["bf16"] = {"enabled": True}
        self.engine, *_ = sctd_ds.initialize(model=self.model, model_parameters=self.model.parameters(), config=settings)
        self._engine_class = type(self.engine)

    def missing(self, variant: Variant) -> str | None:
        """What a step of `variant` would need that is not here, in a line; None: nothing."""
        if variant.model == "compiled" and not self.setup.compile:
            return "torch.compile is off"
        if variant.model == "random-LTD":
            if self.engine is None:
                return "random-LTD works inside DeepSpeed's engine only"
            return random_ltd.unavailable()
        return None

    def choose(self, variant: Variant, case: Case) -> None:
        """Make the next steps those of `variant`."""
        self.variant = variant
        self.model.forward = self._forwards[variant.model]
        self.model.bert.encoder.layer = self._layers
        state_of(self.model).config = case.config(variant)
        if self.engine is None:
            return
        # The untouched model trains under DeepSpeed's own engine, which ours extends without construction of its own.
        self.engine.__class__ = self._engine_class if variant.ours else DeepSpeedEngine
        self.engine.forced_mode = variant.mode
        if variant.model == "random-LTD":
            self._random_ltd_layers = self._random_ltd_layers or random_ltd.wrap(self.engine)
            self.model.bert.encoder.layer = self._random_ltd_layers
            random_ltd.keep(self.engine, case.kept(variant))

    def step(self, batch: Mapping[str, Tensor]) -> None:
        """One step on the device, not waited for: with the engine all micro-batches of an update and the update."""
        self._steps += 1
        if self.engine is None:
            if self.variant.ours:
                sctd_ds.set_mode(self.model, self.variant.mode, self._steps)
            self.model(**batch).loss.backward()
            self.model.zero_grad(set_to_none=True)
            return
        for _ in range(self.setup.accumulation):
            self.engine.backward(self.engine(**batch).loss)
            with record_function(UPDATE):
                self.engine.step()

    def close(self) -> None:
        """Give the memory back."""
        if self.engine is not None:
            self.engine.destroy()
        self.__dict__.clear()
        release_memory()
