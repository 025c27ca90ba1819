"""The schema of a run's own settings: the "sctd" block (the method), the "pretrain" block (the run), and facts about keys.

Both blocks stand in the JSON file that DeepSpeed reads, beside DeepSpeed's own keys (`deepspeed_json`). An unknown key is an
error that names the nearest known one, and so is a key that an earlier version had. All problems raise ConfigError.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Number
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from sctd_ds.adapters.architectures import PRESETS


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the key, the value and the remedy."""


Block = dict[str, Any]
"""A JSON object."""
Method = Literal["sctd", "token_drop", "dense"]


class _Block(BaseModel):
    """A block of the file. Errors are those of pydantic, as ConfigError and in the words of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    block: ClassVar[str]
    """Key of the block in the file."""

    def __init__(self, **values: Any) -> None:
        for key in values:
            removed = REMOVED_KEYS.get(f"{self.block}.{key}")
            if removed:
                raise ConfigError(f"{self.block}.{key} was removed: {removed.why}; {removed.remedy}")
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError("; ".join(_explain(error, values, self.block, type(self).model_fields).values())) from None
        for _, problem in _misread(values, self, self.block):
            raise ConfigError(problem)


class ScTDConfig(_Block):
    """The method: token dropping with semantic-consistent learning (Zhong et al., ACL 2023)."""

    block = "sctd"

    method: Method = "sctd"
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
    """Align steps run the dropped pass's layers again in backward instead of keeping their activations."""
    last_layer: Literal["labelled", "all"] = "labelled"
    """Where the last layer's queries, output and feed-forward run: at the tokens that the loss reads (the labelled ones and
    [CLS]), or at all. Loss and gradients are the same, except for the random numbers that dropout draws."""
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
    document_mask: bool | Annotated[int, Field(ge=0)] = False
    """Attention stays within the documents of a packed row, as a separator ends them: an id, or true for the tokenizer's [SEP].
    false: every token attends to the whole row, as in the paper."""
    labels_per_row: int | None = Field(None, ge=1)
    """Upper bound of labelled tokens per row; pretrain.py sets it. With a bound, every shape is static, a step never waits for
    the device, and a row with more labels makes the loss NaN. Without, each forward reads the largest count from the device."""

    @field_validator("dense_start", "dense_finish", mode="before")
    @classmethod
    def _steps_or_share(cls, value: Any) -> Any:
        if isinstance(value, bool) or (isinstance(value, float) and not (0 < value < 1 or value == 0)):
            raise ValueError("expected a whole number of optimizer steps, or a share of the run between 0 and 1")
        return value


class PretrainConfig(_Block):
    """The run: model, data, length, logging, saving. Read by pretrain.py only."""

    block = "pretrain"

    model: str | dict[str, Any] = "bert-base"
    """A new model: "bert-base", "bert-large", "modernbert-base", "modernbert-large", or sizes: arguments of transformers'
    BertConfig, or with "model_type": "modernbert" of its ModernBertConfig. Its vocabulary is the tokenizer's, its embedding
    padded to a multiple of 64 rows; `--set pretrain.model.num_hidden_layers=9` changes one argument of either. Or a trained
    masked-LM model of a type in `adapters.architectures` to continue from, a Hugging Face folder or a Hub name: its weights,
    its tokenizer and, where the folder has one, its importance table. A resumed run reads the folder again."""
    data: str | list[str] = "python-docs"
    """A folder made by `python -m sctd_ds.data build`, or raw text: files, folders, URLs, a Hub name, "python-docs[:SIZE]"."""
    tokenizer: str | None = None
    """For raw text: an existing tokenizer (folder or name). Unset, it is that of a trained `model`; for a new one, a WordPiece
    tokenizer is trained on the text."""
    vocab_size: int = Field(30522, ge=100)
    """For raw text without a tokenizer: size of the trained vocabulary."""
    cased: bool = False
    """For raw text without a tokenizer: the trained vocabulary keeps case and accents."""
    text_column: str = "text"
    """For raw text in records: the column that holds the text."""
    validation_fraction: float = Field(0.01, ge=0.0, lt=1.0)
    """For raw text: share of the tokens held out, by document; at least one row."""
    dedup: bool = False
    """For raw text: drop documents whose text was there before."""
    seq_length: int = Field(512, ge=8)
    """Tokens per row, [CLS] and [SEP] included."""
    steps: int = Field(250_000, ge=1)
    """Optimizer steps of the whole run; skipped (overflowed) steps are not counted."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seeds initialisation, dropout, data order and masks."""
    mlm_probability: float = Field(0.15, gt=0.0, lt=1.0)
    """Share of the tokens that are predicted; of these 80 % become [MASK], 10 % a random token, 10 % stay."""
    decay_all: bool = False
    """Weight decay shrinks norms and biases too, as in earlier versions, whose runs go on with true; false: matrices alone."""
    validation_every: int = Field(1000, ge=0)
    """Validate every n steps and at the end; 0: at the end only."""
    validation_rows: int = Field(512, ge=1)
    """Rows of the validation split used each time."""
    evaluate: str | None = None
    """A folder with past_present.txt, subj_number.txt or both, of SentEval or from `python -m sctd_ds.eval synthetic`: each
    validation also scores a linear probe on the model's states, for tense and for number. Needs scikit-learn."""
    early_stopping: int = Field(0, ge=0)
    """Stop once so many validations in a row have not brought the validation loss below its lowest value before them. The last
    weights are exported, not the best. 0: train all steps."""
    log_every: int = Field(50, ge=1)
    """Every n steps: one line on the console where there is no terminal, and one write of metrics."""
    save_every: int = Field(1000, ge=0)
    """Checkpoint every n steps and at the end; 0: at the end only."""
    keep_last: int = Field(2, ge=1)
    """Checkpoints kept; older ones are deleted after a newer one is complete."""
    probe_steps: int = Field(5, ge=0)
    """Timed steps of each mode at start-up, on a copy of the model, from which the saving is computed; 0: not measured."""
    stages: int = Field(1, ge=1)
    """Pipeline stages; the launcher's ranks are stages x replicas, and replicas are data parallel. 1: no pipeline."""
    num_workers: int = Field(0, ge=0)
    """Threads per rank that prepare batches ahead; they change speed only."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile of the encoder layers; "auto": on GPUs."""
    deterministic: bool = False
    """Use only kernels that always round alike, so that equal runs are equal bit for bit on a GPU, where attention's backward
    otherwise adds in any order; slower. Not needed on a CPU."""
    layer_norm: Literal["torch", "apex"] = "torch"
    """"apex": every LayerNorm becomes NVIDIA apex's FusedLayerNorm over the same parameters. Needs apex with its CUDA
    extensions, and says before anything is built what is missing. torch.compile does not look into it. (apex's optimizers:
    `"optimizer": {"type": "apex.FusedLAMB"}` or "apex.FusedAdam".)"""

    @property
    def trained_model(self) -> str | None:
        """Folder or Hub name of the model to continue from; None: the model is new."""
        return self.model if isinstance(self.model, str) and self.model not in PRESETS else None


# Keys that are gone, and keys that may differ


@dataclass(frozen=True)
class RemovedKey:
    """A key that an earlier version had."""

    why: str
    remedy: str = "remove the key"
    always: object = None
    """The value that every run has now, and of which alone a checkpoint can be resumed; None: it never mattered to one."""


REMOVED_KEYS = {
    "sctd.align_on": RemovedKey("the KL compares the [CLS] states", always="cls"),
    "sctd.kl_reduction": RemovedKey("the KL is divided by the number of labelled tokens", always="labels"),
    "pretrain.pad_vocab_to": RemovedKey("a new model's embedding has a multiple of 64 rows", always=64),
    "pretrain.precision": RemovedKey("where a device has no fp16, the run trains in bf16 and says so"),
    "pretrain.output": RemovedKey("a run's folder is runs/NAME", "remove the key, and choose another folder with --output"),
}
"""Dotted keys of the two blocks."""

NEW_KEYS = {
    "sctd.dense_start": 0,
    "sctd.dense_finish": 0,
    "sctd.document_mask": False,
    "pretrain.early_stopping": 0,
    "pretrain.decay_all": True,
}
"""Keys that checkpoints of earlier versions lack, and what runs did then."""

FIXED_KEYS = frozenset({"pretrain.decay_all"})
"""Keys that --allow-change does not free: a checkpoint's optimizer has the groups of parameters that they decide."""


_RECORDING = frozenset(
    """
    pretrain.log_every pretrain.validation_every pretrain.evaluate pretrain.save_every pretrain.keep_last pretrain.probe_steps
    steps_per_print tensorboard wandb csv_monitor comet dump_state log_level
    """.split()
)
"""What is written down, and when."""
_SPEED_AND_NAMES = frozenset(
    """
    pretrain.data pretrain.validation_rows pretrain.early_stopping pretrain.num_workers pretrain.deterministic
    pretrain.cased pretrain.text_column pretrain.validation_fraction pretrain.dedup
    wall_clock_breakdown flops_profiler comms_logger memory_breakdown timers
    zero_optimization.overlap_comm zero_optimization.reduce_bucket_size
    """.split()
)
"""How fast steps are, how runs are judged and ended, and the name of the data (its content is compared by its fingerprint)."""
_LAYOUT = frozenset(
    """
    pretrain.stages zero_optimization train_micro_batch_size_per_gpu gradient_accumulation_steps
    sctd.recompute_align sctd.last_layer
    """.split()
)
"""Where and in which order the same mathematics is computed."""

MAY_DIFFER_IN_TABLE = _RECORDING
"""Keys in which runs of one table of results may differ."""
MAY_DIFFER_ON_RESUME = _RECORDING | _SPEED_AND_NAMES
"""Keys of which a checkpoint may be resumed with other values: they do not change what is learned."""
MAY_DIFFER_ON_START = MAY_DIFFER_ON_RESUME | _LAYOUT
"""Keys of which a run may have other values than the checkpoint that it starts from (--start-from)."""


def differences(old: Mapping[str, Any], new: Mapping[str, Any], may_differ: Iterable[str] = MAY_DIFFER_ON_RESUME) -> list[str]:
    """Settings under dotted keys (`RunConfig.flat`) that differ and matter, one "key: old -> new" line each.

    may_differ: keys, or blocks of keys, to leave out. A removed key in `old` matters where it held another value than the one
    that every run has now.
    """
    free = tuple(may_differ)
    lines = []
    for key in sorted({*old, *new}):
        removed = REMOVED_KEYS.get(key)
        if any(key == name or key.startswith(name + ".") for name in free):
            continue
        if removed is None:
            before, now = old.get(key, NEW_KEYS.get(key, "unset")), new.get(key, "unset")
            if before != now:
                fixed = " (with which its optimizer cannot go on; no --allow-change helps)" if key in FIXED_KEYS else ""
                lines.append(f"{key}: {before} -> {now}{fixed}")
        elif removed.always not in (None, old.get(key, removed.always)):
            lines.append(f"{key}: {old[key]} -> removed, now always {removed.always} ({removed.why})")
    return lines


# Errors in the words of the file


def problems(block: Mapping[str, Any], where: str, model: type[BaseModel]) -> dict[str, str]:
    """What a pydantic model refuses of the block at `where`, by dotted key: one line each."""
    try:
        return dict(_misread(block, model(**block), where))
    except ValidationError as error:
        return _explain(error, block, where, model.model_fields)
    except ConfigError as error:
        return {where: str(error)}
    except (AssertionError, TypeError, ValueError) as error:  # of DeepSpeed's models, about forms and pairs of keys
        return {where: f"{where}: {one_line(error)}"}


def _explain(error: ValidationError, block: Mapping[str, Any], where: str, known: Iterable[str]) -> dict[str, str]:
    """pydantic's errors about the block at `where`, by dotted key: one line each."""
    lines: dict[str, str] = {}
    for item in error.errors():
        key = _key(item["loc"], block, where)
        expected = item["msg"][:1].lower() + item["msg"][1:].replace("\n", " ")
        if item["type"] == "extra_forbidden":
            name = str(item["loc"][-1])
            lines[key] = f'unknown key "{name}" in {where}; {did_you_mean(name, known)}'
        elif item["type"] == "missing" and key.endswith(f".{item['loc'][-1]}"):
            lines[key] = f"{key} is missing"
        elif item["type"] == "model_type":
            lines[key] = f"{key}={short(item['input'])}: expected a JSON object"
        elif key in lines:  # another branch of a union of types
            lines[key] += f", or {expected}"
        else:
            lines[key] = f"{key}={short(item['input'])}: {expected}"
    return lines


def _key(location: tuple[int | str, ...], block: Any, where: str) -> str:
    """The dotted key of a place that pydantic names; an item of a list and a branch of a union, which follow, are left out."""
    path = [where] if where else []
    for depth, part in enumerate(location):
        if not isinstance(block, Mapping) or (part not in block and depth):
            break
        path.append(str(part))
        block = block.get(part)
    return ".".join(path)


def _misread(given: Any, read: Any, key: str) -> Iterator[tuple[str, str]]:
    """Where pydantic took true, 3 and "3" for each other, which differ in JSON: dotted keys, and why.

    given: a value as written. read: what pydantic made of it.
    """
    if isinstance(given, Mapping) and isinstance(read, BaseModel | Mapping):
        fields = read if isinstance(read, Mapping) else dict(read)
        for name, value in given.items():
            yield from _misread(value, fields.get(name), f"{key}.{name}" if key else name)
    elif isinstance(given, list | tuple) and isinstance(read, list | tuple):
        for value, item in zip(given, read, strict=False):
            yield from _misread(value, item, key)
    elif isinstance(read, Number) and _kind(given) != _kind(read):
        yield key, f"{key}={short(given)}: expected {_kind(read)}"


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    return "a number" if isinstance(value, Number) else "another value"


def short(value: Any) -> str:
    """A value in a message: one line of bearable length."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def counted(number: int, one: str, many: str) -> str:
    """A number with its noun: "1 rank", "2 ranks"."""
    return f"{number:,} {one if number == 1 else many}"


def one_line(error: Exception) -> str:
    """Somebody else's error in a message of ours."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: the nearest known one, or all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f'did you mean "{near[0]}"?' if near else f"known: {', '.join(known)}"


# Reading the file

MAX_DEPTH = 20
"""Blocks and lists inside of one another; DeepSpeed's own need six."""


def read_json(source: str | Path | Mapping[str, Any]) -> tuple[Block, str]:
    """The configuration as a dict of its own, and a short name for it. Raises ConfigError for what is not a JSON object."""
    if isinstance(source, Mapping):
        try:
            return parse_json(json.dumps(source)), "run"
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"the configuration cannot be written as JSON ({error})") from None
    path = Path(source)
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content, path.stem


def parse_json(text: str, key: str = "") -> Any:
    """The value of a JSON text. Numbers must be finite and whole ones fit in 64 bits; a key stands once in its block.

    key: the dotted key that the value belongs to. Raises ConfigError for these, JSONDecodeError for what is not JSON, and for
    what is nested too deep to be read, RecursionError.
    """
    value = json.loads(text, object_pairs_hook=_no_duplicates)
    _check_numbers(value, key, depth=0)
    return value


def _check_numbers(value: Any, key: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ConfigError(f"{key[:80]} is nested more than {MAX_DEPTH} deep")
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_numbers(inner, f"{key}.{name}" if key else name, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            _check_numbers(inner, key, depth + 1)
    elif (isinstance(value, float) and not math.isfinite(value)) or (isinstance(value, int) and abs(value) >= 2**63):
        raise ConfigError(f"{key}={short(value)}: expected a finite number, a whole one of at most 64 bits")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> Block:
    seen: Block = {}
    for key, value in pairs:
        if key in seen:
            raise ConfigError(f'the key "{key}" stands twice in one block')
        seen[key] = value
    return seen


def json_block(raw: Mapping[str, Any], key: str) -> Block:
    """A copy of a top-level block; an empty one where there is none. Raises ConfigError for another value."""
    value = raw.get(key, {})
    if not isinstance(value, Mapping):
        raise ConfigError(f'"{key}" must be a JSON object, found {value!r}')
    return dict(value)


def sctd_block(config: str | Path | Mapping[str, Any] | None) -> Block | None:
    """The "sctd" block of a DeepSpeed configuration given as a path or a dict; None where it has none."""
    if config is None:
        return None
    raw, _ = read_json(config)
    return json_block(raw, "sctd") if "sctd" in raw else None


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every innermost value of nested mappings, with its path."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    else:
        yield path, value
