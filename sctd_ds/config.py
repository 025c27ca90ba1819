"""One JSON file describes one run: DeepSpeed's own keys, an "sctd" block (the method) and a "pretrain" block (the run).

DeepSpeed ignores a misspelt top-level key without a word. Here an unknown key, wherever it stands, is an error that names
the nearest known one; "auto" values are resolved or refused; and combinations that cannot work are named before DeepSpeed
builds anything. All problems raise ConfigError, a ValueError whose text is meant for the user.
"""

from __future__ import annotations

import difflib
import inspect
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the key, the value and the remedy."""


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_explain(error, type(self).__name__, type(self).model_fields)) from None


class ScTDConfig(_Block):
    """The method: token dropping with semantic-consistent learning (Zhong et al., ACL 2023)."""

    method: Literal["sctd", "token_drop", "dense"] = "sctd"
    """"sctd" drops tokens and aligns every `interval` steps; "token_drop" never aligns; "dense" is plain BERT."""
    drop_ratio: float = Field(0.5, ge=0.0, lt=1.0)
    """Share of the tokens that skip the middle layers: K = S - floor(S * drop_ratio) are kept."""
    interval: int = Field(10, ge=1)
    """Fi: step t (1-based, applied optimizer steps) aligns when t % interval == 0."""
    kl_weight: float = Field(0.05, ge=0.0)
    """lambda in Eq. 4."""
    kl_reduction: Literal["labels", "mean"] = "labels"
    """"labels": sum over sequences / number of labelled tokens (Eq. 1-3, the authors' code); "mean": mean over sequences."""
    align_on: Literal["cls", "mean", "kept"] = "cls"
    """What the KL compares: the [CLS] state, the mean state over the positions both passes have, or every kept position."""
    kl_layers: Literal["both", "last", "previous"] = "both"
    """Which KL terms are learned: KL_l + KL_{l-1}, KL_l alone (L_SCg), or KL_{l-1} alone (L_SCl); for ablations (Table 4)."""
    align_schedule: Literal["interval", "spread"] = "interval"
    """"interval": whole steps align (the paper); "spread": in every step the rows r with (r + t) % interval == 0 do."""
    recompute_align: bool = False
    """In align steps, run the dropped pass's layers again in backward instead of keeping their activations: an align step
    then fits where a dense step does, for about 7 % more work in these steps."""
    last_layer: Literal["labelled", "all"] = "labelled"
    """Where the last layer's queries, output and feed-forward run: at the tokens that the loss reads (the labelled ones and
    [CLS]), or at all. The loss and its gradients are the same, but for which random numbers dropout draws."""
    shared_prefix: bool = True
    """Run layers 1 .. l//2-1 once for both passes of an align step; false: two whole passes, as the paper does."""
    objective: Literal["paper", "released"] = "paper"
    """"paper": Eq. 4; "released": the authors' code (no loss on the full pass, gradient through the KL's teacher)."""
    importance: Literal["loss", "frequency", "random"] = "loss"
    """What makes a token important: its running masked-LM loss, its rarity, or nothing (a control)."""
    decay: float = Field(0.995, ge=0.0, lt=1.0)
    """Decay of the running loss per vocabulary id."""
    keep_token_ids: list[int] | Literal["auto"] = "auto"
    """Ids that are never dropped before others (UNK, CLS, SEP, MASK); "auto" takes them from the tokenizer."""
    labels_per_row: int | None = Field(None, ge=1)
    """Upper bound of labelled tokens per row. Set, every shape is static and a step never waits for the device; a row with
    more labels makes the loss NaN. Unset, each forward reads the largest count back from the device. pretrain.py sets it."""


class PretrainConfig(_Block):
    """The run: model, data, length, logging, saving. Read by pretrain.py only."""

    model: str | dict[str, Any] = "bert-base"
    """"bert-base", "bert-large", or keyword arguments of transformers.BertConfig: a new BERT, whose vocabulary comes from the
    tokenizer; `--set pretrain.model.num_hidden_layers=9` changes one argument of either. Any other name is that of a trained
    masked-LM model with BERT's layers, a Hugging Face folder or a Hub name, to go on from: its weights, its tokenizer and, of
    a folder that has one, the importance table. Keep the folder while the run lasts: to continue, the run looks into it."""
    data: str | list[str] = "python-docs"
    """A folder made by `python -m sctd_ds.data build`, or raw text: files, folders, a Hub name, "python-docs[:SIZE]"."""
    tokenizer: str | None = None
    """For raw text: an existing tokenizer (folder or name); unset, that of a trained `model`, or else a WordPiece tokenizer
    is trained on the text."""
    vocab_size: int = Field(30522, ge=100)
    """For raw text without a tokenizer: size of the trained vocabulary."""
    pad_vocab_to: int = Field(64, ge=1)
    """A new model's embedding gets a multiple of this many rows, which the matrix units like; ids beyond the tokenizer stay
    unused. A trained model keeps its own."""
    seq_length: int = Field(512, ge=8)
    """Tokens per row, [CLS] and [SEP] included."""
    steps: int = Field(250_000, ge=1)
    """Optimizer steps of the whole run; skipped (overflowed) steps are not counted."""
    seed: int = Field(0, ge=0)
    """Seeds initialisation, dropout, data order and masks."""
    mlm_probability: float = Field(0.15, gt=0.0, lt=1.0)
    """Share of the tokens that are predicted; of these 80 % become [MASK], 10 % a random token, 10 % stay."""
    validation_every: int = Field(1000, ge=0)
    """Validate every n steps and at the end; 0: at the end only."""
    validation_rows: int = Field(512, ge=1)
    """Rows of the validation split used each time."""
    log_every: int = Field(50, ge=1)
    """A console line every n steps where there is no terminal, and one write of metrics."""
    save_every: int = Field(1000, ge=0)
    """Checkpoint every n steps and at the end; 0: at the end only."""
    keep_last: int = Field(2, ge=1)
    """Checkpoints kept; older ones are deleted after a newer one is complete."""
    probe_steps: int = Field(5, ge=0)
    """Timed steps of each kind at start-up, on a copy of the model, from which the saving is computed; 0: not measured."""
    stages: int = Field(1, ge=1)
    """Pipeline stages; the launcher's ranks are stages x replicas, and replicas are data parallel. 1: no pipeline."""
    num_workers: int = Field(0, ge=0)
    """Threads per rank that prepare batches ahead; they change speed only."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile of the encoder layers; "auto": on GPUs."""
    deterministic: bool = False
    """Only kernels that always round alike, so that equal runs are equal bit for bit on a GPU too, where attention's backward
    otherwise adds in any order; slower. A CPU needs it not."""
    layer_norm: Literal["torch", "apex"] = "torch"
    """"apex": NVIDIA apex's FusedLayerNorm, where its compiled parts are there. It stays outside of compiled layers."""
    precision: Literal["auto", "strict"] = "auto"
    """A device without fp16: "auto" trains in bf16 and says so, "strict" refuses."""
    output: str = "runs/{name}"
    """Folder of the run; {name} is the configuration file's name."""

    @property
    def trained_model(self) -> str | None:
        """Folder or Hub name of the model to go on from; None: the model is new."""
        return self.model if isinstance(self.model, str) and self.model not in _PRESETS else None


# Top-level keys that DeepSpeed 0.19 reads. It has no list of its own; a test holds this one against its sources.
DEEPSPEED_KEYS = frozenset(
    """
    activation_checkpointing aio autotuning bf16 bfloat16 checkpoint checkpoint_writer comet comms_logger
    communication_data_type compile csv_monitor data_efficiency data_parallel_size data_types dataloader_drop_last
    datastates_ckpt disable_allgather disable_python_gc dump_state expert_parallel flops_profiler fp16
    gradient_accumulation_steps gradient_allreduce_op gradient_clipping gradient_predivide_factor hybrid_engine log_level
    managed_gradient_accumulation memory_breakdown optimizer pipeline prescale_gradients scheduler
    seq_parallel_communication_data_type sequence_parallel_size steps_per_print tensor_parallel tensorboard timers
    torch_autocast train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism use_node_local_storage
    wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    zero_optimization zenflow vocabulary_size
    """.split()
)

# "auto" values that this project resolves itself (see `load`); anywhere else "auto" is refused.
_RESOLVED_AUTO = {
    ("gradient_accumulation_steps",),
    ("scheduler", "params", "total_num_steps"),
    ("scheduler", "params", "warmup_max_lr"),
    ("sctd", "keep_token_ids"),
    ("pretrain", "compile"),
    ("pretrain", "precision"),
}

# Keys whose change does not change what is learned: a checkpoint may be resumed with other values of these.
RUN_ONLY_KEYS = frozenset(
    f"pretrain.{key}"
    for key in (
        "log_every validation_every validation_rows save_every keep_last probe_steps num_workers output precision data "
        "deterministic"
    ).split()
) | {
    "steps_per_print", "wall_clock_breakdown", "tensorboard", "wandb", "csv_monitor", "comet", "flops_profiler",
    "comms_logger", "dump_state", "log_level", "memory_breakdown", "timers",
}  # fmt: skip


@dataclass(frozen=True)
class RunConfig:
    """A validated run: what DeepSpeed gets, the method, the run, and what was resolved on the way (`notes`)."""

    name: str
    deepspeed: dict[str, Any]
    sctd: ScTDConfig
    pretrain: PretrainConfig
    micro_batch: int
    accumulation: int
    world_size: int
    """Data-parallel ranks; with pipeline stages, replicas of the pipeline."""
    notes: tuple[str, ...] = ()

    @property
    def global_batch(self) -> int:
        """Rows per optimizer step, over all ranks and micro-batches."""
        return self.micro_batch * self.accumulation * self.world_size

    @property
    def ranks(self) -> int:
        """Processes of the run."""
        return self.world_size * self.pretrain.stages

    def flat(self) -> dict[str, Any]:
        """Every setting under its dotted key: what a checkpoint stores and a resumed run is compared with."""
        blocks = {**self.deepspeed, "sctd": self.sctd.model_dump(), "pretrain": self.pretrain.model_dump()}
        return {".".join(path): value for path, value in leaves(blocks)}


def load(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), world_size: int = 1) -> RunConfig:
    """Read, override, check and resolve a run's configuration.

    source: a JSON file, or its content as a mapping. overrides: "dotted.key=value", value in JSON or a bare word.
    world_size: processes of the run. Raises ConfigError.
    """
    raw, name = read_json(source)
    for item in overrides:
        _apply_override(raw, item)
    check_top_level(raw, extra=("sctd", "pretrain"))

    sctd = ScTDConfig(**_block(raw, "sctd"))
    pretrain = PretrainConfig(**_block(raw, "pretrain"))
    if pretrain.tokenizer and pretrain.trained_model:
        raise ConfigError(
            f'pretrain.tokenizer="{pretrain.tokenizer}", but the trained model {pretrain.trained_model} brings its own: '
            "remove the key (into a model folder without one, save the tokenizer)"
        )
    deepspeed = {key: value for key, value in raw.items() if key not in ("sctd", "pretrain")}
    _check_method(sctd, pretrain)
    check_deepspeed(deepspeed)
    for path, value in leaves(raw):
        if value == "auto" and path not in _RESOLVED_AUTO:
            raise ConfigError(f'{".".join(path)} is "auto", which nothing here resolves: write the value itself')
    world_size = _replicas(deepspeed, pretrain, world_size)
    micro, accumulation = _resolve_batch(deepspeed, world_size)
    _resolve_schedule(deepspeed, pretrain)
    notes = _resolve_precision(deepspeed, pretrain)
    return RunConfig(name, deepspeed, sctd, pretrain, micro, accumulation, world_size, notes)


def read_json(source: str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The configuration as a dict of its own, and a short name for it."""
    if isinstance(source, Mapping):
        return json.loads(json.dumps(source)), "run"
    path = Path(source)
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content, path.stem


def check_top_level(raw: Mapping[str, Any], extra: Iterable[str] = ()) -> None:
    """Refuse top-level keys that neither DeepSpeed nor we read, and those DeepSpeed has removed."""
    from deepspeed.runtime import config as deepspeed_config

    removed = getattr(deepspeed_config, "_REMOVED_TOP_LEVEL_CONFIG_KEYS", {})
    known = DEEPSPEED_KEYS | set(extra)
    for key in raw:
        if key in removed:
            doctor = "python -m sctd_ds.recipes check FILE --write"
            raise ConfigError(f'"{key}": {removed[key]} Remove the block; `{doctor}` repairs the whole file.')
        if key not in known:
            raise ConfigError(f'unknown key "{key}"{_did_you_mean(key, known)}')


def block_models() -> dict[str, type[BaseModel]]:
    """DeepSpeed's own models of those nested blocks for which it has one."""
    from deepspeed.monitor.config import CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return {
        "zero_optimization": DeepSpeedZeroConfig,
        "fp16": DeepSpeedFP16Config,
        "bf16": DeepSpeedBF16Config,
        "tensorboard": TensorBoardConfig,
        "wandb": WandbConfig,
        "csv_monitor": CSVConfig,
    }


def check_deepspeed(config: Mapping[str, Any]) -> None:
    """Check DeepSpeed's nested blocks, with its own models where it has them, before anything is built."""
    for key, model in block_models().items():
        if key in config:
            block = _block(config, key)
            try:
                model(**block)
            except ValidationError as error:
                raise ConfigError(_explain(error, key, model.model_fields)) from None
    _check_optimizer(config)
    _check_scheduler(config)
    if config.get("fp16", {}).get("enabled") and config.get("bf16", {}).get("enabled"):
        raise ConfigError("fp16.enabled and bf16.enabled are both true: choose one")
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage == 3:
        raise ConfigError(
            "zero_optimization.stage=3 is not supported: both passes of an align step would gather every parameter twice; "
            "use stage 2"
        )
    if config.get("pipeline") and stage >= 2:
        raise ConfigError(f"a pipeline cannot run with zero_optimization.stage={stage} (DeepSpeed allows 0 and 1): use 1")


def sctd_block(config: Any) -> dict[str, Any] | None:
    """The "sctd" block of a DeepSpeed configuration given as a path or a dict; None where it has none."""
    if config is None:
        return None
    raw, _ = read_json(config)
    return _block(raw, "sctd") if "sctd" in raw else None


def differences(old: Mapping[str, Any], new: Mapping[str, Any], allowed: Iterable[str] = ()) -> list[str]:
    """Settings (as from `RunConfig.flat`) that differ and matter, one "key: old -> new" line each."""
    ignored = RUN_ONLY_KEYS | set(allowed)
    keys = [key for key in sorted({*old, *new}) if not any(key == i or key.startswith(i + ".") for i in ignored)]
    return [f"{k}: {old.get(k, 'unset')} -> {new.get(k, 'unset')}" for k in keys if old.get(k) != new.get(k)]


def _check_method(sctd: ScTDConfig, pretrain: PretrainConfig) -> None:
    layers = model_config(pretrain).num_hidden_layers
    if sctd.method != "dense" and layers < 4:
        raise ConfigError(
            f"pretrain.model has {layers} layers, but token dropping needs at least 4: one full, one cross, one kept-only "
            'and one last layer; use a deeper model or "method": "dense"'
        )


def _replicas(config: Mapping[str, Any], pretrain: PretrainConfig, ranks: int) -> int:
    """How many pipelines the ranks form; says what a pipeline cannot do."""
    stages = pretrain.stages
    if stages == 1:
        return ranks
    sizes = model_config(pretrain)
    if sizes.model_type != "bert":
        raise ConfigError(
            f'pretrain.stages={stages}: pretrain.model is of type "{sizes.model_type}", a pipeline runs "bert" only'
        )
    check_stages(stages, sizes.num_hidden_layers, ranks)
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage != 1:
        why = "clips by the gradients of the first stage alone" if stage == 0 else "has no pipeline"
        raise ConfigError(f"pretrain.stages={stages}: with zero_optimization.stage={stage} DeepSpeed {why}; use 1")
    if config.get("pipeline", {}).get("activation_checkpoint_interval"):
        raise ConfigError(
            "pipeline.activation_checkpoint_interval cannot be used with token dropping: sctd.recompute_align saves memory"
        )
    return ranks // stages


def check_stages(stages: int, layers: int, ranks: int) -> None:
    """ConfigError for a number of pipeline stages that cannot be built."""
    if stages > layers:
        raise ConfigError(f"{stages} pipeline stages, but the model has {layers} encoder layers: use at most {layers} stages")
    if ranks % stages:
        raise ConfigError(
            f"{ranks} ranks cannot form pipelines of {stages} stages: start a multiple of {stages} ranks (--num_gpus)"
        )


_PRESETS = {
    "bert-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "bert-large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}


# Model types with BERT's layers, which is what pretrain.py counts the operations of; `initialize` takes more families.
_BERT_LIKE = ("bert", "roberta", "xlm-roberta", "camembert")


def model_config(pretrain: PretrainConfig) -> PreTrainedConfig:
    """The run's model as transformers describes it; a new one's vocabulary is left to the tokenizer. Raises ConfigError."""
    from transformers import BertConfig

    length = pretrain.seq_length
    if pretrain.trained_model is not None:
        return _trained_config(pretrain.trained_model, length)
    arguments = dict(_PRESETS[pretrain.model] if isinstance(pretrain.model, str) else pretrain.model)
    known = {name for name in BertConfig().to_dict() if not name.startswith("_")}
    for key in arguments:
        if key not in known:
            raise ConfigError(f'unknown key "{key}" in pretrain.model{_did_you_mean(key, known)}')
    if "vocab_size" in arguments:
        raise ConfigError("pretrain.model.vocab_size: the vocabulary comes from the tokenizer; remove the key")
    positions = arguments.setdefault("max_position_embeddings", max(512, length))
    if positions < length:
        raise ConfigError(f"pretrain.model.max_position_embeddings={positions} is smaller than pretrain.seq_length={length}")
    return BertConfig(**arguments)


def _trained_config(name: str, length: int) -> PreTrainedConfig:
    from transformers import AutoConfig

    path = Path(name)
    try:
        found = AutoConfig.from_pretrained(name, local_files_only=path.exists())
    except (OSError, ValueError) as error:  # what transformers raises for missing, broken and unknown models
        reason = str(error).splitlines()[0]
        if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            reason = reason if path.exists() else "no such folder"
        near = difflib.get_close_matches(name, _PRESETS, n=1, cutoff=0.85)
        if (path / "model" / "config.json").is_file():
            near = [str(path / "model")]
        hint = f'; did you mean "{near[0]}"?' if near else ""
        raise ConfigError(
            f'pretrain.model="{name}" is neither a preset nor a trained model that can be loaded ({reason}){hint}'
        ) from None
    decoder = getattr(found, "is_decoder", False)  # not every type has it
    if found.model_type not in _BERT_LIKE or decoder:
        kind = "a decoder" if decoder else f'of type "{found.model_type}"'
        raise ConfigError(
            f'pretrain.model="{name}" is {kind}; pretrain.py goes on from {", ".join(_BERT_LIKE)}. For other families call '
            "sctd_ds.initialize in a script of your own (docs/recipes.md)"
        )
    positions = found.max_position_embeddings
    if found.model_type != "bert":  # RoBERTa counts positions from behind its padding id
        if found.pad_token_id is None:
            raise ConfigError(f'pretrain.model="{name}": config.json has no pad_token_id, from which positions count')
        positions -= found.pad_token_id + 1
    if positions < length:
        raise ConfigError(f'pretrain.seq_length={length}, but pretrain.model="{name}" has only {positions} positions')
    return found


def _resolve_batch(config: dict[str, Any], world_size: int) -> tuple[int, int]:
    """Fill in the missing one of the three batch keys; returns (micro batch, accumulation steps)."""
    total, micro, steps = (
        config.get(key) for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    )
    steps = None if steps == "auto" else steps
    for key, value in (("train_batch_size", total), ("train_micro_batch_size_per_gpu", micro),
                       ("gradient_accumulation_steps", steps)):  # fmt: skip
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ConfigError(f"{key}={value!r}: expected a whole number of at least 1")
    if total is None and micro is None:
        raise ConfigError("set train_batch_size (rows per step over all ranks) or train_micro_batch_size_per_gpu")
    if micro is None:
        assert total is not None
        micro = total // (world_size * (steps or 1)) or 1
    if steps is None:
        steps = 1 if total is None else total // (micro * world_size)
    if total is None:
        total = micro * steps * world_size
    if micro * steps * world_size != total:
        raise ConfigError(
            f"train_batch_size={total} is not train_micro_batch_size_per_gpu={micro} x gradient_accumulation_steps={steps} "
            f"x {world_size} ranks: choose a micro batch and a number of ranks whose product divides {total}"
        )
    config.update(train_batch_size=total, train_micro_batch_size_per_gpu=micro, gradient_accumulation_steps=steps)
    return micro, steps


def _resolve_schedule(config: dict[str, Any], pretrain: PretrainConfig) -> None:
    params = config.get("scheduler", {}).get("params", {})
    if params.get("total_num_steps") == "auto":
        params["total_num_steps"] = pretrain.steps
    if params.get("warmup_max_lr") == "auto":
        rate = config.get("optimizer", {}).get("params", {}).get("lr")
        if rate is None:
            raise ConfigError('scheduler.params.warmup_max_lr is "auto", but optimizer.params.lr is not set')
        params["warmup_max_lr"] = rate
    warmup, total = params.get("warmup_num_steps"), params.get("total_num_steps")
    if isinstance(warmup, int) and isinstance(total, int) and warmup >= total:
        raise ConfigError(f"scheduler.params.warmup_num_steps={warmup} must be below total_num_steps={total}")


def _resolve_precision(config: dict[str, Any], pretrain: PretrainConfig) -> tuple[str, ...]:
    """Replace fp16 by bf16 where the device has no fp16; returns what to tell the user."""
    from deepspeed.accelerator import get_accelerator

    fp16 = config.get("fp16", {})
    if not fp16.get("enabled") or get_accelerator().is_fp16_supported():
        return ()
    device = get_accelerator().device_name()
    if pretrain.precision == "strict":
        raise ConfigError(
            f'fp16.enabled is true, but the device "{device}" has no fp16: use bf16, or "pretrain": {{"precision": "auto"}}'
        )
    config.pop("fp16")
    config["bf16"] = {"enabled": True}
    return (f'The device "{device}" has no fp16: training in bf16 instead (pretrain.precision="strict" refuses).',)


def _check_optimizer(config: Mapping[str, Any]) -> None:
    import torch
    from deepspeed.ops.adam import FusedAdam
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    if "optimizer" not in config:
        return
    block = _block(config, "optimizer")
    _only(block, ("type", "params", "legacy_fusion"), "optimizer")
    torch_names = [n for n, c in vars(torch.optim).items() if inspect.isclass(c) and n != "Optimizer"]
    name, known = block.get("type"), [*DEEPSPEED_OPTIMIZERS, *torch_names]
    # DeepSpeed compares its own names in lower case and looks others up in torch.optim as they are.
    if not isinstance(name, str) or (name.lower() not in DEEPSPEED_OPTIMIZERS and name not in torch_names):
        raise ConfigError(f'optimizer.type="{name}" is unknown{_did_you_mean(str(name), known)}')
    if name.lower() in ("adam", "adamw"):
        keys = {*inspect.signature(FusedAdam).parameters, *inspect.signature(torch.optim.AdamW).parameters}
        _only(block.get("params", {}), {*keys, "torch_adam", "adam_w_mode"} - {"params"}, "optimizer.params")


def _check_scheduler(config: Mapping[str, Any]) -> None:
    from deepspeed.runtime import lr_schedules

    if "scheduler" not in config:
        return
    block = _block(config, "scheduler")
    _only(block, ("type", "params"), "scheduler")
    name = str(block.get("type"))
    if name not in lr_schedules.VALID_LR_SCHEDULES:
        raise ConfigError(f'scheduler.type="{name}" is unknown{_did_you_mean(name, lr_schedules.VALID_LR_SCHEDULES)}')
    known = inspect.signature(getattr(lr_schedules, name)).parameters
    _only(block.get("params", {}), set(known) - {"optimizer"}, "scheduler.params")


def _block(raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = raw.get(key, {})
    if not isinstance(value, Mapping):
        raise ConfigError(f'"{key}" must be a JSON object, found {value!r}')
    return dict(value)


def _only(block: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    known = set(known)
    for key in block:
        if key not in known:
            raise ConfigError(f'unknown key "{key}" in {where}{_did_you_mean(key, known)}')


def _did_you_mean(key: str, known: Iterable[str]) -> str:
    known = sorted(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f'; did you mean "{near[0]}"?' if near else f"; known: {', '.join(known)}"


def _explain(error: ValidationError, where: str, known: Iterable[str]) -> str:
    """pydantic's findings as one line each, in the words of the file."""
    where = {"ScTDConfig": "sctd", "PretrainConfig": "pretrain"}.get(where, where)
    lines = []
    for item in error.errors():
        # For a union of types pydantic reports every branch, named at the end of the path; the key is enough.
        key = ".".join(str(part) for part in item["loc"][:1])
        if item["type"] == "extra_forbidden":
            lines.append(f'unknown key "{key}" in {where}{_did_you_mean(key, known)}')
        else:
            message = item["msg"][:1].lower() + item["msg"][1:]
            lines.append(f"{where}.{key}={item['input']!r}: {message}" if key else f"{where}: {message}")
    return "\n".join(dict.fromkeys(lines))


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterable[tuple[tuple[str, ...], Any]]:
    """Every innermost value of nested mappings, with its path."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    else:
        yield path, value


def _apply_override(raw: dict[str, Any], item: str) -> None:
    path, equals, text = item.partition("=")
    if not equals or not path:
        raise ConfigError(f'--set "{item}": expected dotted.key=value, for example sctd.interval=20')
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f'--set "{item}": the value must be finite')
    *blocks, key = path.split(".")
    for part in blocks:
        inner = raw.setdefault(part, {})
        if part == "model" and isinstance(inner, str) and inner in _PRESETS:  # a preset, with one of its sizes changed
            inner = raw[part] = dict(_PRESETS[inner])
        if part == "model" and isinstance(inner, str):
            raise ConfigError(f'--set "{item}": pretrain.model="{inner}" is a trained model, whose sizes cannot be changed')
        if not isinstance(inner, dict):
            raise ConfigError(f'--set "{item}": "{part}" is not a block')
        raw = inner
    raw[key] = value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ConfigError(f'the key "{key}" stands twice in one block')
        seen[key] = value
    return seen
