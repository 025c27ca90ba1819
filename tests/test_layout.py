"""Rules of the repository that a machine can check: import direction, the free name `kernels`, what a wheel holds."""

import ast
import graphlib
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from helpers import ROOT

PACKAGE = ROOT / "sctd_ds"
# Rooms of sctd_ds, each a module or a folder. A room imports itself and rooms above it, also inside functions.
ENTRY = "__init__"  # the public names, made of everything before it
ROOMS = f"""adapters config deepspeed_schema deepspeed_json method engine integrations data run eval doctor compare {ENTRY}
pretrain __main__""".split()
# What data and eval are allowed of these: data stands alone, and evaluation reads finished models.
NEEDS = {"data": set(), "eval": {"config", "adapters", "method", "engine", "integrations", "data", "run"}}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name below it: "method.passes", "data" for its __init__."""
    names = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == ENTRY and len(parts) > 1 else parts)] = path
    return names


MODULES = modules()


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere, inside functions too: "sctd_ds.method.passes", "torch.nn.Module"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def needs(module: str) -> set[str]:
    """The modules of sctd_ds that `module` imports."""
    found = set()
    for name in imported(MODULES[module]):
        if name == "sctd_ds" or name.startswith("sctd_ds."):
            inside = name.removeprefix("sctd_ds").removeprefix(".")
            candidates = [inside, inside.rpartition(".")[0]]
            found.add(next((candidate for candidate in candidates if candidate in MODULES), ENTRY))
    return found - {module}


GRAPH = {module: needs(module) for module in MODULES}


def test_every_module_has_a_room():
    assert {module.partition(".")[0] for module in MODULES} == set(ROOMS)


@pytest.mark.parametrize("module", sorted(set(MODULES) - {ENTRY}))
def test_a_module_imports_only_rooms_above_its_own(module):
    room = module.partition(".")[0]
    allowed = NEEDS.get(room, set(ROOMS[: ROOMS.index(room)])) | {room}
    assert {other.partition(".")[0] for other in GRAPH[module]} <= allowed, GRAPH[module]


def test_no_modules_import_each_other_in_a_circle():
    list(graphlib.TopologicalSorter(GRAPH).static_order())


def test_the_method_is_listed_in_the_order_of_its_imports():
    text = ast.get_docstring(ast.parse(MODULES["method"].read_text()))
    listed = [line.split()[0] for line in text.splitlines() if line.startswith("    ")]
    assert sorted(f"method.{name}" for name in listed) == sorted(m for m in MODULES if m.startswith("method."))
    for number, name in enumerate(listed):
        inside = {other for other in GRAPH[f"method.{name}"] if other.startswith("method")}
        assert inside - {"method"} <= {f"method.{other}" for other in listed[:number]}, name


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda path: path.name)
def test_kernels_need_torch_and_triton_only(path):
    tops = {name.partition(".")[0] for name in imported(path)}
    assert not tops & {"sctd_ds", "transformers", "deepspeed", "benchmarks", "pretrain"}


def test_nothing_in_the_package_imports_what_uses_it():
    for path in MODULES.values():
        assert not {name.partition(".")[0] for name in imported(path)} & {"benchmarks", "pretrain", "tests"}, path


def test_tables_of_an_ablation_do_not_know_how_it_is_run():
    tables, runs = (imported(ROOT / "benchmarks" / f"{name}.py") for name in ("ablation_tables", "ablate"))
    assert not any(name.startswith("benchmarks") for name in tables)
    assert any(name.startswith("benchmarks.ablation_tables") for name in runs)


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
        f"import sys; sys.path.insert(1, {str(tmp_path)!r});"
        "import kernels, sctd_kernels, sctd_ds; assert kernels.MARK == 'theirs';"
        "from transformers import BertForMaskedLM; print(sctd_kernels.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("kernels/sctd_kernels/__init__.py")
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_wheel_holds_both_packages_and_no_top_level_kernels(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert tops == {"sctd_ds", "sctd_kernels"}
    assert {"sctd_kernels/__init__.py", "sctd_ds/data/__init__.py", "sctd_ds/method/passes.py"} <= set(names)
    assert {"sctd_ds/py.typed", "sctd_kernels/py.typed"} <= set(names)
    assert any(name.endswith("/LICENSE") for name in names)


def test_a_wheel_alone_has_the_command_and_the_configurations(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (entries,) = (tmp_path / "site").glob("*.dist-info/entry_points.txt")
    assert "sctd = sctd_ds.__main__:main" in entries.read_text()
    code = "from sctd_ds.run import job, settings; print(settings.shipped()['base'], job.load('large').pretrain.model)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2:] == [str(tmp_path / "site" / "sctd_ds" / "ds_configs" / "base.json"), "bert-large"]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="asks git for the files; this is such a distribution")
def test_a_source_distribution_holds_what_its_tests_need(tmp_path):
    code = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True)
    with tarfile.open(tmp_path / done.stdout.splitlines()[-1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    left_out = {".gitignore", ".pre-commit-config.yaml"}
    assert {name for name in tracked if not name.startswith(".ci/")} - left_out <= names


def test_no_model_folder_brings_code_that_runs():
    """Without the argument, transformers asks on the terminal whether to run a folder's own code."""
    calls = []
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py"), ROOT / "pretrain.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained":
                given = {word.arg: word.value for word in node.keywords}
                calls.append(isinstance(given.get("trust_remote_code"), ast.Constant) and not given["trust_remote_code"].value)
    assert len(calls) > 5 and all(calls)


def test_no_pickle_is_executed():
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py"), ROOT / "pretrain.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert given.get("weights_only") == "True", f"{path}:{node.lineno}"
