"""An import never points upwards; each foreign private API has one home."""

import ast
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = "lightning_softprune"
ROOT = Path(__file__).parent.parent / PACKAGE

# From the bottom to the top. Modules of one level may import each other, in one direction.
LEVELS = (
    {"utilities"},
    {"results", "search"},  # numbers only
    {"graph"},
    {"trainer", "surgery", "calibration", "checkpoint", "report"},
    {"compensation"},
    {"round"},
    {"callback"},
    {"cli", "standalone", "parser"},
    {"__init__", "__main__"},
)
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}
FILES = sorted(ROOT.rglob("*.py"))


def unit(path):
    """The module's place in the table: a file, or a folder."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path):
    """Dotted names of all that a file imports, also within functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path):
    for name in imports(path):
        first, _, rest = name.partition(".")
        if first == PACKAGE and rest != "__version__":  # the package's version is everybody's to read
            below = rest.split(".")[0]
            yield below if (ROOT / below).is_dir() or (ROOT / f"{below}.py").exists() else "__init__"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path):
    for name in (unit(path), *own_imports(path)):
        assert name in LEVEL, f"give {name} a place in the table of this test"
        assert LEVEL[name] <= LEVEL[unit(path)], f"{unit(path)} imports {name}"


def test_no_two_modules_import_each_other():
    reached = {unit(path): set() for path in FILES}
    for path in FILES:
        reached[unit(path)] |= set(own_imports(path)) - {unit(path)}
    for _ in reached:
        for name in reached:
            reached[name] |= set().union(*(reached.get(other, set()) for other in reached[name]))
    assert not [name for name, others in reached.items() if name in others]


def importers(*names):
    found = set()
    for path in FILES:
        for name in imports(path):
            if any(name == wanted or name.startswith(f"{wanted}.") for wanted in names):
                found.add(unit(path))
    return found


def test_torch_pruning_has_one_importer():
    assert importers("torch_pruning") == {"graph"}


def test_private_names_of_lightning_have_one_importer():
    users = set()
    for path in FILES:
        for name in imports(path):
            parts = name.split(".")
            if parts[0] in ("lightning", "pytorch_lightning", "lightning_fabric") and any(
                part.startswith("_") for part in parts
            ):
                users.add(unit(path))
    assert users == {"trainer"}


def test_below_the_trainer_nothing_knows_lightning():
    low = {name for name, level in LEVEL.items() if level < LEVEL["trainer"]} | {
        "surgery",
        "calibration",
        "compensation",
    }
    assert not importers("lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics") & low


def test_numbers_know_no_tensors():
    low = {name for name, level in LEVEL.items() if level < LEVEL["graph"]}
    assert importers("torch") & low == {"utilities"}  # its files are doors of their own: no number imports snapshot.py


def python(code):
    """Run code in a process of its own, whose path holds the package without its `__init__`."""
    prelude = (
        "import sys, types\n"
        f"package = types.ModuleType({PACKAGE!r})\n"
        f"package.__path__ = [{str(ROOT)!r}]\n"
        f"sys.modules[{PACKAGE!r}] = package\n"
    )
    done = subprocess.run([sys.executable, "-c", prelude + code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_search_runs_without_torch_and_without_lightning():
    code = f"import {PACKAGE}.search\nprint(*sys.modules)"
    loaded = {name.partition(".")[0] for name in python(code)}
    assert "numpy" in loaded
    assert not loaded & {"torch", "lightning", "pytorch_lightning", "torchmetrics", "torch_pruning", "optuna"}


def test_groups_and_surgery_run_without_lightning():
    code = (
        f"import {PACKAGE}.graph, {PACKAGE}.surgery, {PACKAGE}.calibration, {PACKAGE}.compensation\n"
        "print(*(name for name in sys.modules if name.startswith(('lightning.', 'pytorch_lightning', 'torchmetrics'))))"
    )
    assert python(code) == []


def test_extras_are_imported_where_they_are_used():
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            extras = {"optuna", "jsonargparse", "sklearn", "matplotlib"}
            assert not {name.partition(".")[0] for name in names} & extras, path


def test_every_file_is_looked_at():
    assert {"graph", "search", "callback"} <= {unit(path) for path in FILES}
    assert len(list(itertools.chain.from_iterable(imports(path) for path in FILES))) > 100
