"""Evaluation of pretrained models: fine-tuning, layer probes, semantic drift, and their tables and figures.

`tasks` lists the tasks, `sources` reads their data, `synthetic` generates small copies of them in the language
of `grammar`, `finetune` and `analysis` measure, `training` scores a model while it trains, `baseline` scores a
bag of words, `scores` has the metrics, `store` keeps outcomes, and `report` writes Markdown, CSV and PNG. Start
with `python -m sctd_ds.eval --help`.

It reads Hugging Face folders, without an engine; only the checkpoints of a run need DeepSpeed.
"""

from sctd_ds.eval.sources import EvalError
from sctd_ds.eval.tasks import SUITES, TASKS, Task

__all__ = ["SUITES", "TASKS", "EvalError", "Task"]
