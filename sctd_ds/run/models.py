"""The models that pretrain.py trains: new ones by their sizes, and trained ones to continue from."""

from __future__ import annotations

import difflib
import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from deepspeed.accelerator import get_accelerator

from sctd_ds import data
from sctd_ds.adapters.special_tokens import special_ids
from sctd_ds.config import BERT_SIZES, ConfigError, PretrainConfig, did_you_mean
from sctd_ds.engine.pipeline import check_stages
from sctd_ds.integrations import apex
from sctd_ds.integrations.export import read_importance
from sctd_ds.method.convert import convert, importance, state_of
from sctd_ds.method.plan import LayerPlan
from sctd_ds.run.settings import RunConfig

logger = logging.getLogger(__name__)


def check(run: RunConfig) -> None:
    """ConfigError for a model that the run's method or its pipeline cannot train. Nothing is loaded or built."""
    sizes, stages = model_config(run.pretrain), run.pretrain.stages
    if run.sctd.method != "dense":
        LayerPlan(sizes.num_hidden_layers)
    if stages > 1:
        if sizes.model_type != "bert":
            raise ConfigError(
                f'pretrain.stages={stages}: pretrain.model is of type "{sizes.model_type}", a pipeline runs "bert" only'
            )
        check_stages(stages, sizes.num_hidden_layers)


# Model types with BERT's layers, which is what pretrain.py counts the operations of; `initialize` takes more families.
_BERT_LIKE = ("bert", "roberta", "xlm-roberta", "camembert")


def model_config(pretrain: PretrainConfig) -> transformers.PreTrainedConfig:
    """The run's model as transformers describes it; a new one's vocabulary is left to the tokenizer. Raises ConfigError."""
    length = pretrain.seq_length
    if pretrain.trained_model is not None:
        return _trained_config(pretrain.trained_model, length)
    arguments = dict(BERT_SIZES[pretrain.model] if isinstance(pretrain.model, str) else pretrain.model)
    known = {name for name in transformers.BertConfig().to_dict() if not name.startswith("_")}
    for key in arguments:
        if key not in known:
            raise ConfigError(f'unknown key "{key}" in pretrain.model{did_you_mean(key, known)}')
    if "vocab_size" in arguments:
        raise ConfigError("pretrain.model.vocab_size: the vocabulary comes from the tokenizer; remove the key")
    positions = arguments.setdefault("max_position_embeddings", max(512, length))
    if positions < length:
        raise ConfigError(f"pretrain.model.max_position_embeddings={positions} is smaller than pretrain.seq_length={length}")
    return transformers.BertConfig(**arguments)


def _trained_config(name: str, length: int) -> transformers.PreTrainedConfig:
    path = Path(name)
    try:
        found = transformers.AutoConfig.from_pretrained(name, local_files_only=path.exists())
    except (OSError, ValueError) as error:  # what transformers raises for missing, broken and unknown models
        reason = str(error).splitlines()[0]
        if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            reason = reason if path.exists() else "no such folder"
        near = difflib.get_close_matches(name, BERT_SIZES, n=1, cutoff=0.85)
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


def build_model(run: RunConfig, packed: data.PackedData) -> transformers.PreTrainedModel:
    """The run's model in fp32, new or trained before, converted, and compiled where the run asks for it.

    A new one is initialised from the run's seed. Raises ConfigError for a trained one that cannot be loaded.
    """
    tokenizer, trained = packed.tokenizer, run.pretrain.trained_model
    transformers.set_seed(run.pretrain.seed)
    model = _load_trained(trained) if trained else _new_model(run, tokenizer)
    if len(tokenizer) > model.config.vocab_size:
        raise ConfigError(
            f'pretrain.model="{trained}" embeds {model.config.vocab_size} ids, its tokenizer has {len(tokenizer)}'
        )
    if model.config.model_type != "bert" and model.config.pad_token_id != tokenizer.pad_token_id:
        raise ConfigError(
            f'pretrain.model="{trained}": pad_token_id is {model.config.pad_token_id} in config.json, '
            f"{tokenizer.pad_token_id} in its tokenizer, and positions count from it: they must agree"
        )
    if run.pretrain.layer_norm == "apex":
        apex.fuse_layer_norms(model)
    settings: dict[str, Any] = {"labels_per_row": labels_per_row(run, packed)}
    if run.sctd.keep_token_ids == "auto":
        settings["keep_token_ids"] = special_ids(tokenizer)
    convert(model, run.sctd.model_copy(update=settings))
    if trained:
        _take_importance(model, trained)
    wanted = run.pretrain.compile
    if wanted is True or (wanted == "auto" and get_accelerator().device_name() == "cuda"):
        state_of(model).encoder.compile()
    return model


def _new_model(run: RunConfig, tokenizer: transformers.PreTrainedTokenizerBase) -> transformers.PreTrainedModel:
    sizes, multiple = model_config(run.pretrain), run.pretrain.pad_vocab_to
    assert isinstance(sizes, transformers.BertConfig)
    sizes.vocab_size = -(-len(tokenizer) // multiple) * multiple
    sizes.pad_token_id = tokenizer.pad_token_id
    return transformers.BertForMaskedLM(sizes)


def _load_trained(name: str) -> transformers.PreTrainedModel:
    """A Hugging Face folder's or Hub model's weights, ready to train. What lacks an output head gets a new one, and says so."""
    try:
        model, found = transformers.AutoModelForMaskedLM.from_pretrained(
            name, dtype=torch.float32, local_files_only=Path(name).exists(), output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
        )  # fmt: skip
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


def _take_importance(model: transformers.PreTrainedModel, trained: str) -> None:
    """Continue with the importance table that an earlier run left beside the weights, if the run's policy can."""
    if not state_of(model).has_table:
        return
    try:
        table = read_importance(trained)
    except ValueError as error:
        raise ConfigError(f'pretrain.model="{trained}": {error}') from None
    policy = importance(model)
    if table is None:
        logger.info("%s has no importance table: it starts anew", trained)
    elif policy.adopt(table.policy, table.scores):
        logger.info("importance table: that of %s", trained)
    else:
        logger.info('%s has an importance table of "%s": this run\'s, of "%s", starts anew', trained, table.policy, policy.name)


def labels_per_row(run: RunConfig, packed: data.PackedData) -> int:
    """Labelled tokens of a full row: a fixed number, so that shapes are static."""
    return data.Masker(packed.tokenizer, 0, run.pretrain.mlm_probability).labels_per_row(run.pretrain.seq_length)
