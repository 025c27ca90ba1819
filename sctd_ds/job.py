"""The pieces of a pretraining job that pretrain.py puts together: its data, its model, its forecast."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from deepspeed.accelerator import get_accelerator

from sctd_ds import apex, config, data, ranks, report
from sctd_ds.config import ConfigError, RunConfig
from sctd_ds.encoder import convert, importance, state_of
from sctd_ds.huggingface import read_importance
from sctd_ds.probe import Probe
from sctd_ds.schedule import Shape, mean_cost

logger = logging.getLogger(__name__)


def be_deterministic() -> None:
    """Let this process repeat bit for bit on a GPU: kernels that add in one order only. Call it before any matrix product."""
    import torch._inductor.config
    import torch.utils.deterministic

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS wants for it
    # Not warn_only: only the strict mode makes attention's backward deterministic.
    torch.use_deterministic_algorithms(True)
    # Nothing here reads memory that it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch._inductor.config.deterministic = True  # no choice between kernels by their time


def prepare_data(spec: str | list[str], run: RunConfig) -> data.PackedData:
    """Built data, or raw text built once into data/cache: rank 0 works, the others wait. Raises DataError on every rank."""
    options = run.pretrain

    def build() -> Path:
        # Without the run's seed: runs of one text hold out the same of it, and can be compared.
        return data.prepare(
            spec,
            Path("data") / "cache",
            tokenizer=options.tokenizer or options.trained_model,
            vocab_size=options.vocab_size,
            seq_length=options.seq_length,
        )

    def load() -> data.PackedData:
        packed = data.load(path, seq_length=options.seq_length)
        if len(packed.train) < run.global_batch:
            raise data.DataError(
                f"{path}: {len(packed.train)} training rows are fewer than one batch of {run.global_batch}: "
                "add text, or lower train_batch_size or pretrain.seq_length"
            )
        if options.trained_model:
            data.check_tokenizer(packed, options.trained_model)
        return packed

    path = ranks.on_first(build)
    return ranks.on_all(load)


def make_batches(run: RunConfig, packed: data.PackedData, rank: int) -> tuple[data.Loader, Callable[[], Iterator[data.Batch]]]:
    """This rank's training batches, and a function that gives its validation batches, the same ones each time."""
    options = run.pretrain
    masker = data.Masker(packed.tokenizer, options.seed, options.mlm_probability)
    # DeepSpeed numbers ranks stage by stage; all stages of a pipeline read the same rows.
    replica, world = rank % run.world_size, run.world_size
    loader = data.Loader(
        packed.train,
        masker,
        micro_batch=run.micro_batch,
        accumulation=run.accumulation,
        rank=replica,
        world=world,
        seed=options.seed,
        num_workers=options.num_workers,
    )
    most = -(-options.validation_rows // run.micro_batch)
    rows = {"batch_size": run.micro_batch, "rank": replica, "world": world, "max_batches": most}
    return loader, partial(data.validation_batches, packed.validation, masker, **rows)


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
        settings["keep_token_ids"] = [getattr(tokenizer, f"{name}_token_id") for name in ("unk", "cls", "sep", "mask")]
    convert(model, run.sctd.model_copy(update=settings))
    if trained:
        _take_importance(model, trained)
    wanted = run.pretrain.compile
    if wanted is True or (wanted == "auto" and get_accelerator().device_name() == "cuda"):
        state_of(model).encoder.compile()
    return model


def _new_model(run: RunConfig, tokenizer: transformers.PreTrainedTokenizerBase) -> transformers.PreTrainedModel:
    sizes, multiple = config.model_config(run.pretrain), run.pretrain.pad_vocab_to
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
    """Go on with the importance table that an earlier run of ours has left beside the weights, if it is of the same kind."""
    config = state_of(model).config
    if config.method == "dense" or config.importance == "random":
        return
    try:
        table = read_importance(trained)
    except ValueError as error:
        raise ConfigError(f'pretrain.model="{trained}": {error}') from None
    if table is None:
        logger.info("%s has no importance table: it starts anew", trained)
    elif table.policy == config.importance == "loss":
        importance(model).load_state_dict({"scores": table.scores})
        logger.info("importance table: that of %s", trained)
    else:  # the counts behind a table of frequencies are not in it
        logger.info('%s has an importance table of "%s": ours of "%s" starts anew', trained, table.policy, config.importance)


def labels_per_row(run: RunConfig, packed: data.PackedData) -> int:
    """Labelled tokens of a full row: fixed, so that shapes are."""
    return data.Masker(packed.tokenizer, 0, run.pretrain.mlm_probability).labels_per_row(run.pretrain.seq_length)


def shape_of(model: transformers.PreTrainedModel, run: RunConfig, packed: data.PackedData) -> Shape:
    """The sizes that decide a step's cost."""
    sizes = model.config
    return Shape(
        layers=sizes.num_hidden_layers,
        hidden=sizes.hidden_size,
        intermediate=sizes.intermediate_size,
        vocabulary=sizes.vocab_size,
        length=run.pretrain.seq_length,
        labels=labels_per_row(run, packed),
    )


def describe(model: transformers.PreTrainedModel, run: RunConfig, packed: data.PackedData) -> str:
    """The line a run starts with."""
    stages, trained = run.pretrain.stages, run.pretrain.trained_model
    size = f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters" + (f" of {trained}" if trained else "")
    rows = f"{len(packed.train):,} rows of {run.pretrain.seq_length} tokens to train on, {len(packed.validation):,} to validate"
    who = "ranks" if stages == 1 else f"pipelines of {stages} stages"
    step = f"{run.world_size} {who} x {run.micro_batch} rows x {run.accumulation} micro-batches"
    return f"{run.name}: {size}, {rows}; a step is {step}"


def forecast(run: RunConfig, shape: Shape, measured: Probe, folder: Path) -> str:
    """What a dry run tells: time by kind of step, saving, the whole run, memory."""
    result = report.build(run, shape, measured, folder)
    hours = mean_cost(run.sctd, measured.step_ms) * run.pretrain.steps / 3.6e6
    lines = report.saving_text(result)
    lines.append(f"  whole run        {run.pretrain.steps:,} steps, about {hours:,.1f} hours on this device")
    for kind, size in measured.peak_bytes.items():
        lines.append(f"  peak memory      {kind}: {size / 2**30:.1f} GiB")
    return "\n".join(lines)
