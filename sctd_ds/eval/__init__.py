"""What a pretrained model has learned: fine-tuning, probes, semantic drift, and the tables and figures made of them.

`tasks` says what there is, `sources` where the data comes from, `twins` makes small stand-ins for it, `finetune` and `analysis`
measure, `scores` holds the metrics, `report` writes Markdown, CSV and PNG. `python -m sctd_ds.eval --help` is the way in.

Works on Hugging Face folders and needs neither an engine nor DeepSpeed.
"""

from sctd_ds.eval.scores import glue_average
from sctd_ds.eval.sources import EvalError
from sctd_ds.eval.tasks import SUITES, TASKS, Task

__all__ = ["SUITES", "TASKS", "EvalError", "Task", "glue_average"]
