"""The Hugging Face Hub: the card of an exported model, and the command that uploads a model.

    sctd push runs/large --to OWNER/NAME --license apache-2.0 --language en [--private] [--dry-run]

checks that the run's model loads, with its tokenizer, writes licence and language into its card, and uploads the files of the
model, and no others, of the folder. Licence and language are yours to say: nothing is guessed. Uploading needs `hf auth login`
or HF_TOKEN; --dry-run needs no network, changes nothing and lists what would be uploaded. The exit status is 2 for what cannot
be uploaded.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import huggingface_hub
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from sctd_ds.config import ConfigError, ScTDConfig, one_line
from sctd_ds.integrations.export import IMPORTANCE, WEIGHTS, forget_where_from, read_importance

CARD = "README.md"
UPLOADED = (
    CARD,
    "config.json",
    "generation_config.json",
    *WEIGHTS,
    "*.index.json",
    IMPORTANCE,
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
)
"""Files of a model's folder; a folder may hold others, such as the optimizer's states in a Trainer's checkpoint."""


# The card


def model_card(report: Mapping[str, Any], method: ScTDConfig, sources: Sequence[str]) -> ModelCard:
    """The card of a run's exported model, without a licence and a language, which nobody but its owner knows.

    report: the content of report.json. sources: of the training text.
    """
    trained, loss, on = report["trained_model"], report["validation"].get("loss_full"), report["validated_on"]
    measured = loss is not None and math.isfinite(loss)
    result = EvalResult(
        task_type="fill-mask",
        task_name="Masked language modelling",
        dataset_type="text",
        dataset_name=f"held-out rows of {', '.join(map(_public, sources))}",
        dataset_split="validation",
        dataset_args=on,
        metric_type="loss",
        metric_name="Cross-entropy per masked token, in nats",
        metric_value=round(loss, 4) if measured else None,
    )
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="fill-mask",
        # A folder is no name that the Hub could link to.
        base_model=trained if trained and not Path(trained).exists() else None,
        tags=["sctd_ds", "masked-lm", *(["token-dropping"] if method.method != "dense" else [])],
        model_name=report["name"],
        eval_results=[result] if measured else None,
    )
    rows = {
        "steps x batch": f"{report['steps']:,} x {report['global_batch']:,} sequences of {report['seq_length']} tokens",
        "continued from": _public(trained) if trained else None,
        "training text": ", ".join(map(_public, sources)),
        "fingerprint of the training data": f"`{on['fingerprint']}`" if on else None,
        "validation loss (masked LM, all tokens)": f"{loss:.4f}" if measured else "not measured",
        "time saved against a dense step": "not measured" if report["time_saved"] is None else f"{report['time_saved']:.1%}",
        "device": report["environment"]["device"],
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value is not None)
    return ModelCard(f"""---
{data.to_yaml()}
---
# {report["name"]}

A {report["architecture"]} masked language model, pretrained with sctd_ds {report["environment"]["sctd_ds"]} by {_how(method)}.
Loaded from here it is a plain {report["architecture"]} that sees every token in every layer.

| | |
|---|---|
{table}

Load it, in a folder or by its name on the Hub, with

```python
from transformers import AutoModelForMaskedLM, AutoTokenizer

model = AutoModelForMaskedLM.from_pretrained(name)
tokenizer = AutoTokenizer.from_pretrained(name)
```
""")


def _how(method: ScTDConfig) -> str:
    dropping = f"{method.drop_ratio:.0%} of the tokens skip the middle layers"
    return {
        "dense": "plain masked-language-model pretraining",
        "token_drop": f"token dropping ({dropping})",
        "sctd": f"token dropping with semantic-consistent learning (ScTD; {dropping}, both passes are aligned with interval "
        f"{method.interval}, kl_weight {method.kl_weight})",
    }[method.method]


def _public(source: str) -> str:
    """A name as it was given; of an absolute path, which says much about a machine, only the end."""
    path = PurePath(source)
    return str(PurePath("...", *path.parts[-2:])) if path.is_absolute() else source


# The upload


def find_model(path: Path) -> Path:
    """The model's folder: `path` itself, or "model" in the folder of a finished run. Raises ConfigError for neither."""
    for folder in (path / "model", path):
        if (folder / "config.json").is_file():
            return folder
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder")
    hint = "; its run has not finished" if (path / "checkpoints").is_dir() else ""
    raise ConfigError(f"{path}: neither a finished run nor a model's folder, as it has no config.json{hint}")


def check_model(folder: Path) -> None:
    """ConfigError unless the model loads with all its weights, its tokenizer and, if it has one, its importance table."""
    if not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        raise ConfigError(f"{folder} has no weights: expected a file {' or '.join(WEIGHTS)}")
    if not all((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ConfigError(f"{folder} lacks tokenizer.json or tokenizer_config.json: save the model's tokenizer into it")
    transformers.utils.logging.disable_progress_bar()
    try:
        model, found = transformers.AutoModelForMaskedLM.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        table = read_importance(folder)
    except Exception as error:  # OSError, ValueError, SafetensorError, tokenizers' own ...: all say what is wrong with a file
        raise ConfigError(f"{folder} cannot be loaded ({one_line(error)})") from None
    missing, vocabulary = sorted(found["missing_keys"]), model.get_input_embeddings().weight.shape[0]
    if missing:
        raise ConfigError(f"{folder}: its weights lack {missing[0]}")
    if len(tokenizer) > vocabulary:
        raise ConfigError(f"{folder}: the model embeds {vocabulary} ids, its tokenizer has {len(tokenizer)}")
    if table is not None and len(table.scores) != vocabulary:
        raise ConfigError(f"{folder}: the model embeds {vocabulary} ids, {IMPORTANCE} has {len(table.scores)}")


def read_card(folder: Path) -> ModelCard:
    """The folder's card; a short one where it has none. Raises ConfigError for a card that cannot be read."""
    if not (folder / CARD).is_file():
        data = ModelCardData(library_name="transformers", pipeline_tag="fill-mask", tags=["sctd_ds", "masked-lm"])
        return ModelCard(f"---\n{data.to_yaml()}\n---\n# {folder.absolute().name}\n\nA masked language model.\n")
    try:
        return ModelCard.load(folder / CARD)
    except Exception as error:  # OSError, UnicodeDecodeError, the YAML parser's own
        raise ConfigError(f"{folder / CARD} cannot be read ({one_line(error)})") from None


def listing(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files that are uploaded, and what else the folder holds."""
    inside = sorted(folder.iterdir())
    files = [path for path in inside if path.is_file() and any(path.match(pattern) for pattern in UPLOADED)]
    return files, [path for path in inside if path not in files]


def push(folder: Path, name: str, private: bool) -> str:
    """Upload a model's folder to the Hub as OWNER/NAME, which is created if need be; returns its address.

    Raises ConfigError where the Hub cannot be reached or refuses, and for a public repository that was to be private.
    """
    if huggingface_hub.get_token() is None:
        raise ConfigError("not logged in to the Hugging Face Hub: run `hf auth login`, or set HF_TOKEN")
    api = huggingface_hub.HfApi(library_name="sctd_ds")
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        if private and not api.model_info(name).private:
            raise ConfigError(f"{name} is there already, and it is public: make it private on the Hub, or leave --private out")
        uploaded, _ = listing(folder)
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=[path.name for path in uploaded],
            commit_message="Upload a model pretrained with sctd_ds",
        )
    except ConfigError:
        raise
    except HfHubHTTPError as error:
        raise ConfigError(f"{name}: the Hugging Face Hub refuses ({one_line(error)})") from None
    except Exception as error:  # those of the HTTP library, which is not the same in every version of huggingface_hub
        raise ConfigError(
            f"{name}: the Hugging Face Hub cannot be reached ({one_line(error)}). With a network, the same command uploads; "
            "without one, --dry-run shows what it would upload"
        ) from None
    return str(address)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("sctd push", description=__doc__, formatter_class=as_written)
    parser.add_argument("folder", type=Path, metavar="RUN", help="the folder of a finished run, or of an exported model")
    parser.add_argument("--to", required=True, metavar="OWNER/NAME", help="the repository, created if it is not there")
    parser.add_argument("--license", metavar="ID", help="the licence as the Hub spells it, for example apache-2.0 or mit")
    parser.add_argument("--language", nargs="+", metavar="CODE", help="languages of the text, for example en")
    parser.add_argument("--private", action="store_true", help="create the repository private")
    parser.add_argument("--dry-run", action="store_true", help="check everything, list what would be uploaded, change nothing")
    given = parser.parse_args(arguments)
    try:
        _run(given)
    except ConfigError as error:
        print(f"push: {error}", file=sys.stderr)
        return 2
    return 0


def _run(given: argparse.Namespace) -> None:
    try:
        validate_repo_id(given.to)
    except HFValidationError as error:
        raise ConfigError(f"--to {given.to}: {one_line(error)}") from None
    if "/" not in given.to:
        raise ConfigError(f"--to {given.to}: expected OWNER/NAME")
    folder = find_model(given.folder)
    check_model(folder)

    # The card
    card = read_card(folder)
    if given.license:
        card.data["license"] = given.license
    if given.language:
        card.data["language"] = given.language[0] if len(given.language) == 1 else given.language
    if not given.dry_run:
        try:
            card.save(folder / CARD)
            forget_where_from(folder)
        except OSError as error:
            raise ConfigError(f"{folder} cannot be written ({error})") from None

    # What is uploaded
    uploaded, left_out = listing(folder)
    for path in uploaded:
        print(f"  {path.stat().st_size / 1e6:10,.3f} MB  {path.name}")
    if left_out:
        print(f"  left out, as no part of the model: {', '.join(path.name for path in left_out)}")
    unknown = [option for option in ("license", "language") if not card.data.get(option)]
    if unknown:
        print(f"  the card names no {' and no '.join(unknown)}: add --{' and --'.join(unknown)}")
    if given.dry_run:
        print(f"dry run: nothing was changed or uploaded. The card would begin\n---\n{card.data.to_yaml()}\n---")
        return
    print(f"uploaded to {push(folder, given.to, given.private)}")
