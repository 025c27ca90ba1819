"""The models that pretrain.py trains: new ones by their sizes, and trained ones to continue from; and apex's optimizers."""

from __future__ import annotations

import copy
import difflib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from deepspeed.accelerator import get_accelerator
from torch import nn

from sctd_ds import data
from sctd_ds.adapters.architectures import ARCHITECTURES, DEFAULT, PRESETS, Architecture
from sctd_ds.config import ConfigError, PretrainConfig, ScTDConfig, one_line, problems, short
from sctd_ds.deepspeed_schema import model_of
from sctd_ds.engine.pipeline import check_stages
from sctd_ds.integrations import apex
from sctd_ds.integrations.export import WEIGHTS, read_importance
from sctd_ds.method.convert import convert, importance, state_of
from sctd_ds.method.plan import LayerPlan
from sctd_ds.method.state import of_tokenizer
from sctd_ds.run.settings import RunConfig

logger = logging.getLogger(__name__)

VOCABULARY_MULTIPLE = 64
"""A new model's embedding gets a multiple of this many rows, which suits the matrix units; ids beyond the tokenizer's are
never used."""


# The model as its configuration describes it, before anything is built


def check(run: RunConfig) -> None:
    """ConfigError for a model that the run's method, its pipeline or this machine cannot train. Nothing is loaded or built."""
    model, stages = model_config(run.pretrain), run.pretrain.stages
    _check_sizes(model)
    if run.sctd.method != "dense":
        LayerPlan(model.num_hidden_layers)
    if stages > 1:
        runs = [kind for kind, row in ARCHITECTURES.items() if row.ends]
        if model.model_type not in runs:
            raise ConfigError(
                f'pretrain.stages={stages}: pretrain.model is of type "{model.model_type}", a pipeline runs {", ".join(runs)}'
            )
        check_stages(stages, model.num_hidden_layers)
    if run.pretrain.layer_norm == "apex":
        if not getattr(model, "norm_bias", True):
            raise ConfigError(
                'pretrain.layer_norm="apex": FusedLayerNorm has a bias, and the norms of pretrain.model have none: use "torch"'
            )
        apex.require("normalization")


def check_weights(pretrain: PretrainConfig) -> None:
    """ConfigError for a folder to continue from that holds no weights. Nothing is loaded."""
    name = pretrain.trained_model
    if name and Path(name).is_dir() and not any(any(Path(name).glob(pattern)) for pattern in WEIGHTS):
        raise ConfigError(f'pretrain.model="{name}" has no weights: expected a file {" or ".join(WEIGHTS)} beside config.json')


def model_config(pretrain: PretrainConfig) -> transformers.PreTrainedConfig:
    """The run's model as transformers describes it; a new one's vocabulary is left to the tokenizer. Raises ConfigError."""
    if pretrain.trained_model is None:
        return _new_config(pretrain)
    return _trained_config(pretrain.trained_model, pretrain.seq_length)


def sizes(pretrain: PretrainConfig, tokenizer: transformers.PreTrainedTokenizerBase) -> transformers.PreTrainedConfig:
    """`model_config` with the vocabulary that the tokenizer gives a new model."""
    config = model_config(pretrain)
    if pretrain.trained_model is None:
        config.vocab_size = -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        for name, other in (("pad", "pad"), ("cls", "cls"), ("sep", "sep"), ("bos", "cls"), ("eos", "sep")):
            if getattr(config, f"{name}_token_id", None) is not None:  # BERT's has the first only
                own = getattr(tokenizer, f"{name}_token_id")
                setattr(config, f"{name}_token_id", getattr(tokenizer, f"{other}_token_id") if own is None else own)
    return config


def _new_config(pretrain: PretrainConfig) -> transformers.PreTrainedConfig:
    block = dict(PRESETS[pretrain.model] if isinstance(pretrain.model, str) else pretrain.model)
    new = {name: row for name, row in ARCHITECTURES.items() if row.keys}
    kind = block.get("model_type", DEFAULT)
    if not isinstance(kind, str) or kind not in new:
        known = " or ".join(map(json.dumps, new))
        raise ConfigError(f"pretrain.model.model_type={short(kind)}: a new model is of type {known}")
    if "vocab_size" in block:
        raise ConfigError("pretrain.model.vocab_size: the vocabulary comes from the tokenizer; remove the key")
    keys = model_of({"model_type": str, **new[kind].keys})
    for problem in problems(block, "pretrain.model", keys).values():
        raise ConfigError(problem)
    sizes = keys(**block).model_dump(exclude_unset=True, exclude={"model_type"})
    with _blaming_transformers():
        config = transformers.AutoConfig.for_model(kind, **sizes)
    length = pretrain.seq_length
    if "max_position_embeddings" not in sizes:
        config.max_position_embeddings = max(config.max_position_embeddings, length)
    elif config.max_position_embeddings < length:
        positions = config.max_position_embeddings
        raise ConfigError(f"pretrain.model.max_position_embeddings={positions} is smaller than pretrain.seq_length={length}")
    return config


def _check_sizes(config: transformers.PreTrainedConfig) -> None:
    """ConfigError for sizes that transformers cannot build, or whose weights alone exceed this machine's memory."""
    one_layer = copy.deepcopy(config)
    one_layer.num_hidden_layers = 1
    with _blaming_transformers():
        with torch.device("meta"):  # shapes without memory
            model = transformers.AutoModelForMaskedLM.from_config(one_layer)
        layers = _row(config).adapter(model).layers
        whole, layer = (sum(p.numel() for part in parts for p in part.parameters()) for parts in ([model], layers))
    needed = 4 * (whole + (config.num_hidden_layers - 1) * layer)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise ConfigError(
            f"pretrain.model: its weights need {needed / 2**30:,.0f} GiB, this machine has {memory / 2**30:,.0f}: "
            "choose smaller sizes"
        )


@contextmanager
def _blaming_transformers() -> Iterator[None]:
    """Whatever is raised inside as a ConfigError of one line."""
    try:
        yield
    except Exception as error:  # KeyError, ValueError, RuntimeError, ...: neither library has an error of its own for it
        raise ConfigError(f"pretrain.model: transformers cannot build it ({one_line(error)})") from None


def _row(config: transformers.PreTrainedConfig) -> Architecture:
    return ARCHITECTURES[config.model_type]


def _trained_config(name: str, length: int) -> transformers.PreTrainedConfig:
    found = _read_config(name)
    decoder = getattr(found, "is_decoder", False)  # not every type has it
    if found.model_type not in ARCHITECTURES or decoder:
        what = "a decoder" if decoder else f'of type "{found.model_type}"'
        raise ConfigError(
            f'pretrain.model="{name}" is {what}; pretrain.py continues from {", ".join(ARCHITECTURES)}. For other families '
            "call sctd_ds.initialize in a script of your own (docs/recipes.md)"
        )
    positions = found.max_position_embeddings
    if _row(found).after_padding:
        if found.pad_token_id is None:
            raise ConfigError(f'pretrain.model="{name}": config.json has no pad_token_id, from which positions count')
        positions -= found.pad_token_id + 1
    if positions < length:
        raise ConfigError(f'pretrain.seq_length={length}, but pretrain.model="{name}" has only {positions} positions')
    return found


def _read_config(name: str) -> transformers.PreTrainedConfig:
    """The config.json of a folder or Hub model. Raises ConfigError, with a guess at what was meant."""
    path, there = Path(name), False
    try:
        there = path.exists()
        return transformers.AutoConfig.from_pretrained(name, local_files_only=there, trust_remote_code=False)
    except (OSError, ValueError) as error:  # what transformers raises for missing, broken and unknown models
        reason = one_line(error)
    looks_like_a_path = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if looks_like_a_path and not there:
        reason = "no such folder"
    meant = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.85)
    if there and (path / "model" / "config.json").is_file():  # a run's folder
        meant = [str(path / "model")]
    hint = f'; did you mean "{meant[0]}"?' if meant else ""
    raise ConfigError(f'pretrain.model="{name}" is neither a preset nor a trained model that can be loaded ({reason}){hint}')


# The model itself


def build_model(run: RunConfig, packed: data.PackedData) -> transformers.PreTrainedModel:
    """The run's model in fp32, new or trained before, converted, and compiled where the run asks for it.

    A new one is initialised from the run's seed. Raises ConfigError for a trained one that cannot be loaded.
    """
    # Weights
    trained = run.pretrain.trained_model
    transformers.set_seed(run.pretrain.seed)
    model: transformers.PreTrainedModel
    if trained is None:
        model = transformers.AutoModelForMaskedLM.from_config(sizes(run.pretrain, packed.tokenizer))
    else:
        model = _load_trained(trained)
        _check_tokenizer(model.config, packed.tokenizer, trained)
    if run.pretrain.layer_norm == "apex":
        apex.fuse_layer_norms(model)

    # Method
    convert(model, method_of(run, packed))
    if trained is not None and state_of(model).has_table:
        _continue_table(model, trained)

    # Speed
    wanted = run.pretrain.compile
    if wanted is True or (wanted == "auto" and get_accelerator().device_name() == "cuda"):
        state_of(model).encoder.compile()
    return model


def parameter_groups(run: RunConfig, model: nn.Module) -> list[dict[str, Any]]:
    """The parameters of a model, or of a pipeline's stage, for the optimizer: matrices, whose weights decay, and norms and
    biases, whose do not. The first group has the options of the file's "optimizer" block."""
    parameters = list(model.parameters())
    if run.pretrain.decay_all:
        return [{"params": parameters}]
    matrices, others = ([p for p in parameters if (p.dim() > 1) == many] for many in (True, False))
    return [{"params": matrices}, {"params": others, "weight_decay": 0.0}]


def build_optimizer(run: RunConfig, model: nn.Module) -> torch.optim.Optimizer | None:
    """apex's optimizer over the model, for `sctd_ds.initialize(optimizer=...)`; None where DeepSpeed builds the optimizer."""
    block = run.apex_optimizer
    return None if block is None else apex.optimizer(block["type"], parameter_groups(run, model), block.get("params", {}))


def labels_per_row(run: RunConfig, packed: data.PackedData) -> int:
    """Labelled tokens of a full row: a fixed number, so that shapes are static."""
    return data.Masker(packed.tokenizer, 0, run.pretrain.mlm_probability).labels_per_row(run.pretrain.seq_length)


def _load_trained(name: str) -> transformers.PreTrainedModel:
    """A Hugging Face folder's or Hub model's weights, ready to train. A missing output head is replaced by a new one, with a
    warning."""
    try:
        model, found = transformers.AutoModelForMaskedLM.from_pretrained(
            name,
            dtype=torch.float32,
            local_files_only=Path(name).exists(),
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
        )
    except Exception as error:  # OSError, SafetensorError, RuntimeError, pickle's own ...: all say what is wrong with the file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f'pretrain.model="{name}": its weights cannot be loaded ({reason})') from None
    missing = sorted(key for key in found["missing_keys"] if key.startswith(model.base_model_prefix + "."))
    mismatched = sorted(key for key, *_ in found["mismatched_keys"])
    if missing or mismatched:
        what = f"lack {missing[0]}" if missing else f"have another size of {mismatched[0]}"
        raise ConfigError(f'pretrain.model="{name}": its weights {what}, they are not those of its config.json')
    if found["missing_keys"]:
        logger.warning("%s has no masked-LM head: a new one is trained", name)
    return model.train()


def _check_tokenizer(
    config: transformers.PreTrainedConfig, tokenizer: transformers.PreTrainedTokenizerBase, trained: str
) -> None:
    """ConfigError unless a trained model and its tokenizer number the same tokens."""
    if len(tokenizer) > config.vocab_size:
        raise ConfigError(f'pretrain.model="{trained}" embeds {config.vocab_size} ids, its tokenizer has {len(tokenizer)}')
    if _row(config).after_padding and config.pad_token_id != tokenizer.pad_token_id:
        raise ConfigError(
            f'pretrain.model="{trained}": pad_token_id is {config.pad_token_id} in config.json, '
            f"{tokenizer.pad_token_id} in its tokenizer, and positions count from it: they must agree"
        )


def method_of(run: RunConfig, packed: data.PackedData) -> ScTDConfig:
    """The run's method, with what its data decides."""
    config = run.sctd.model_copy(update={"labels_per_row": labels_per_row(run, packed)})
    return of_tokenizer(config, packed.tokenizer)


def _continue_table(model: transformers.PreTrainedModel, trained: str) -> None:
    """Continue with the importance table that an earlier run left beside the weights, if the run's policy can use it."""
    try:
        table = read_importance(trained)
    except ValueError as error:
        raise ConfigError(f'pretrain.model="{trained}": {error}') from None
    policy = importance(model)
    if table is None:
        logger.info("%s has no importance table: a new one is learned", trained)
    elif policy.adopt(table.policy, table.scores):
        logger.info("importance table: that of %s", trained)
    else:
        message = '%s has an importance table of "%s": this run learns a new one, of "%s"'
        logger.info(message, trained, table.policy, policy.name)
