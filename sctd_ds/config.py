"""One JSON file describes one run: DeepSpeed's own keys, an "sctd" block (the method) and a "pretrain" block (the run).

DeepSpeed ignores a misspelt top-level key without a word. Here an unknown key, wherever it stands, is an error that names
the nearest known one; "auto" values are resolved or refused; and combinations that cannot work are named before DeepSpeed
builds anything. All problems raise ConfigError, a ValueError whose text is meant for the user.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

if TYPE_CHECKING:
    pass


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the key, the value and the remedy."""


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(explain(error, type(self).__name__, type(self).model_fields)) from None


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
    kl_layers: Literal["both", "last", "previous"] = "both"
    """Which KL terms are learned: KL_l + KL_{l-1}, KL_l alone (L_SCg), or KL_{l-1} alone (L_SCl); for ablations (Table 4)."""
    align_schedule: Literal["interval", "spread"] = "interval"
    """"interval": whole steps align (the paper); "spread": in every step the rows r with (r + t) % interval == 0 do."""
    dense_start: int | float = Field(0, ge=0)
    """How long training is dense before it drops tokens: optimizer steps, or a share (0 < x < 1) of the run's steps. 0: the
    paper. The dense steps' losses fill the importance table."""
    dense_finish: int | float = Field(0, ge=0)
    """How long training is dense at its end, likewise."""
    total_steps: int | None = Field(None, ge=1)
    """Optimizer steps of the whole run, from which shares and `dense_finish` count. pretrain.py and the Trainer callback set
    it; a loop of your own that uses them has to."""
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

    @field_validator("dense_start", "dense_finish", mode="before")
    @classmethod
    def _steps_or_share(cls, value: Any) -> Any:
        if isinstance(value, bool) or (isinstance(value, float) and not (0 < value < 1 or value == 0)):
            raise ValueError("expected a whole number of optimizer steps, or a share of the run between 0 and 1")
        return value


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
        return self.model if isinstance(self.model, str) and self.model not in BERT_SIZES else None


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


def differences(old: Mapping[str, Any], new: Mapping[str, Any], allowed: Iterable[str] = ()) -> list[str]:
    """Settings (as from `RunConfig.flat`) that differ and matter, one "key: old -> new" line each."""
    ignored = RUN_ONLY_KEYS | set(allowed)
    keys = [key for key in sorted({*old, *new}) if not any(key == i or key.startswith(i + ".") for i in ignored)]
    return [f"{k}: {old.get(k, 'unset')} -> {new.get(k, 'unset')}" for k in keys if old.get(k) != new.get(k)]


BERT_SIZES = {
    "bert-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "bert-large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}


def did_you_mean(key: str, known: Iterable[str]) -> str:
    known = sorted(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f'; did you mean "{near[0]}"?' if near else f"; known: {', '.join(known)}"


def explain(error: ValidationError, where: str, known: Iterable[str]) -> str:
    """pydantic's findings as one line each, in the words of the file."""
    where = {"ScTDConfig": "sctd", "PretrainConfig": "pretrain"}.get(where, where)
    lines = []
    for item in error.errors():
        # For a union of types pydantic reports every branch, named at the end of the path; the key is enough.
        key = ".".join(str(part) for part in item["loc"][:1])
        if item["type"] == "extra_forbidden":
            lines.append(f'unknown key "{key}" in {where}{did_you_mean(key, known)}')
        else:
            message = item["msg"][:1].lower() + item["msg"][1:]
            lines.append(f"{where}.{key}={item['input']!r}: {message}" if key else f"{where}: {message}")
    return "\n".join(dict.fromkeys(lines))


def replicas(ranks: int, stages: int) -> int:
    """How many pipelines of `stages` stages the ranks form. Raises ConfigError where some are left over."""
    if ranks % stages:
        raise ConfigError(
            f"{ranks} ranks cannot form pipelines of {stages} stages: start a multiple of {stages} ranks (--num_gpus)"
        )
    return ranks // stages
