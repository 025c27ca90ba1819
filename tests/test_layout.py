"""Rules of the house that a machine can check: import direction, the free name `kernels`, what a wheel holds."""

import ast
import subprocess
import sys
import zipfile

import pytest

from helpers import ROOT

# What each module of sctd_ds may import of ours, at import time. Later ones build on earlier ones; there are no cycles.
ORDER = [
    "config", "schedule", "importance", "adapters", "labels", "encoder", "objective", "validation", "engine", "pipeline",
    "huggingface", "ranks", "checkpoint", "metrics", "probe", "report", "data", "apex", "job", "recipes", "trainer",
]  # fmt: skip
# Evaluation is a reader of finished models: it has an order of its own, and of the rest it knows these alone.
EVAL_ORDER = "tasks scores sources store twins baseline finetune analysis report __init__ __main__".split()
EVAL_NEEDS = {"config", "encoder", "huggingface", "metrics", "data", "grammar"}


def imports(path, package: str = "sctd_ds") -> set[str]:
    """Top-level imports of ours in a file: the modules of `package` ("config", ...), and "sctd_kernels" and the like."""
    found, depth = set(), package.count(".") + 1
    for node in ast.parse(path.read_text()).body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if name == package or name.startswith(package + "."):
                found.add(parts[depth] if len(parts) > depth else package)
            elif parts[0] in ("sctd_kernels", "benchmarks", "pretrain"):
                found.add(parts[0])
    return found


@pytest.mark.parametrize("module", [m for m in ORDER if m != "data"])
def test_modules_import_only_what_stands_before_them(module):
    allowed = set(ORDER[: ORDER.index(module)]) | {"sctd_kernels"}
    path = ROOT / "sctd_ds" / module
    for file in path.glob("*.py") if path.is_dir() else [path.with_suffix(".py")]:
        assert imports(file) <= allowed | {module}, file


def test_every_module_has_its_place():
    found = {path.stem for path in (ROOT / "sctd_ds").iterdir() if path.is_dir() or path.suffix == ".py"}
    assert found - {"__init__", "__pycache__"} == {*ORDER, "grammar", "eval"}
    assert {path.stem for path in (ROOT / "sctd_ds" / "eval").glob("*.py")} == set(EVAL_ORDER)


def test_evaluation_reads_models_and_its_modules_stand_in_order():
    for file in (ROOT / "sctd_ds" / "eval").glob("*.py"):
        assert imports(file) <= EVAL_NEEDS | {"eval"}, file
        assert imports(file, "sctd_ds.eval") <= set(EVAL_ORDER[: EVAL_ORDER.index(file.stem)]), file


def test_data_and_the_grammar_import_nothing_else_of_ours_and_kernels_nothing_at_all():
    assert not imports(ROOT / "sctd_ds" / "grammar.py")
    for file in (ROOT / "sctd_ds" / "data").glob("*.py"):
        assert imports(file) <= {"data"}, file
    for file in (ROOT / "kernels" / "sctd_kernels").glob("*.py"):
        assert imports(file) <= {"sctd_kernels"}, file
        assert "transformers" not in file.read_text() and "deepspeed" not in file.read_text(), file


def test_tables_of_an_ablation_know_nothing_of_how_it_is_run():
    assert not imports(ROOT / "benchmarks" / "ablation_tables.py", "benchmarks")
    assert "ablation_tables" in imports(ROOT / "benchmarks" / "ablate.py", "benchmarks")


def test_importing_the_package_is_light():
    code = (
        "import sys, sctd_ds; heavy = {'deepspeed', 'datasets', 'sklearn', 'matplotlib'};"
        "print(sorted((heavy | {'transformers'}) & sys.modules.keys()));"
        "import transformers.models.auto.auto_factory; heavy -= sys.modules.keys();"  # what transformers itself brings along
        "import sctd_ds.eval.__main__; print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "[]"]


def test_the_name_kernels_stays_hugging_faces(tmp_path):
    """From the repository's root, with a package named `kernels` installed, transformers' BERT and ours both import."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("MARK = 'theirs'\n")
    code = (
        "import kernels, sctd_kernels, sctd_ds; assert kernels.MARK == 'theirs';"
        "from transformers import BertForMaskedLM; print(sctd_kernels.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(1, {str(tmp_path)!r}); {code}"], cwd=ROOT,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("kernels/sctd_kernels/__init__.py")
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_wheel_holds_both_packages_and_no_top_level_kernels(tmp_path):
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT],
                   check=True, capture_output=True)  # fmt: skip
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    tops = {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert tops == {"sctd_ds", "sctd_kernels"}
    assert "sctd_kernels/__init__.py" in names and "sctd_ds/data/__init__.py" in names
