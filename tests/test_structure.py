"""The house: an import never points upwards, folders have one door, rooms stay small, foreign private APIs one home."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_softprune

PACKAGE = "lightning_softprune"
ROOT = Path(__file__).parent.parent / PACKAGE

# From the bottom to the top; lightning_softprune/README.md draws it. Folders of one level do not import each other.
LEVELS = (
    {"utilities"},
    {"search"},
    {"results"},
    {"graph"},
    {"trainer", "surgery", "checkpoint", "report"},
    {"calibration"},
    {"compensation"},
    {"round"},
    {"callback"},
    {"standalone", "testing"},
    {"cli", "parser"},
    {"__init__", "__main__"},
)
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}
FILES = sorted(ROOT.rglob("*.py"))
IDS = [str(path.relative_to(ROOT)) for path in FILES]

MOST_ENTRIES, MOST_ENTRIES_OF_THE_ROOT, MOST_LINES = 15, 18, 450
MOST_LINES_OF_A_FUNCTION, MOST_PARAMETERS = 60, 6


def unit(path):
    """The file's place in the table: itself, or its folder."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def module(path):
    """The dotted name of a file."""
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(path): path for path in FILES}


@functools.cache
def tree_of(path):
    return ast.parse(path.read_text())


@functools.cache
def imports(path):
    """(module, name or None) of all that a file imports, also within functions and under TYPE_CHECKING."""
    found = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found += [(node.module, alias.name) for alias in node.names]
    return found


@functools.cache
def own_imports(path):
    """Files of the package that a file imports from: a submodule where the name is one."""
    own = [(name, f"{name}.{attribute}") for name, attribute in imports(path) if name.split(".")[0] == PACKAGE]
    return [MODULES[inner] if inner in MODULES else MODULES[name] for name, inner in own]


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_imports_point_downwards(path):
    for other in own_imports(path):
        above, below = unit(path), unit(other)
        assert {above, below} <= LEVEL.keys(), f"give {above} and {below} a place in the table of this test"
        assert above == below or LEVEL[below] < LEVEL[above], f"{above} imports {below}"


def test_no_two_files_import_each_other():
    reached = {path: set(own_imports(path)) - {path} for path in FILES}
    for path in FILES:  # a folder's door is the way to its files, and no file goes through the door of its own folder
        assert not any(other.name == "__init__.py" and other.parent in path.parents for other in reached[path]), path
    for _ in reached:
        for path in reached:
            reached[path] |= set().union(*(reached[other] for other in reached[path]))
    assert not [path for path, others in reached.items() if path in others]


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_other_folders_are_entered_by_their_door(path):
    for other in own_imports(path):
        if other.parent != ROOT and unit(other) not in (unit(path), "utilities"):
            assert other.name == "__init__.py", f"{path}: import from {unit(other)}, not from {other.name} in it"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_names_with_an_underscore_stay_in_their_file(path):
    private = [name for module, name in imports(path) if module.split(".")[0] == PACKAGE and str(name).startswith("_")]
    assert not [name for name in private if name != "__version__"]


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES} - {ROOT}), ids=lambda folder: folder.name)
def test_no_name_hides_a_file(folder):
    """`from package.folder import name` is to mean one thing."""
    door = ast.parse((folder / "__init__.py").read_text())
    names = {
        alias.asname or alias.name for node in door.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    files = {path.stem for path in folder.glob("*.py")}
    assert not names & files


# ---------------------------------------------------------------------------------------------------------- small rooms


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES}), ids=lambda folder: folder.name)
def test_folders_are_small(folder):
    """Rooms are counted: files of code, and folders of them."""
    entries = [path for path in folder.iterdir() if path.suffix == ".py" or (path.is_dir() and any(path.glob("*.py")))]
    assert len(entries) <= (MOST_ENTRIES_OF_THE_ROOT if folder == ROOT else MOST_ENTRIES)


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_files_are_small(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES


def public_constructors():
    """Constructors of the classes that users make, and `prune`: their arguments are the contract's."""
    return {(name, "__init__") for name in lightning_softprune.__all__} | {(None, "prune")}


def large_functions(tree):
    """What is said of functions that are too long, or have too many parameters."""
    owner = {f: node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for f in node.body}
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if (owner.get(node), node.name) in public_constructors():
            continue
        given = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        number = len(given) - (node in owner and given[:1] in (["self"], ["cls"]))
        if number > MOST_PARAMETERS:
            yield f"{node.name} has {number} parameters"
        if node.end_lineno - node.lineno >= MOST_LINES_OF_A_FUNCTION:
            yield f"{node.name} is too long"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_functions_are_small(path):
    assert not list(large_functions(tree_of(path)))


def test_functions_that_are_too_large_are_found():
    def function(name, lines, parameters="", indent=""):
        return "".join([f"{indent}def {name}({parameters}):\n", *[f"{indent}    pass\n"] * (lines - 1)])

    seven = "a, b, /, c, d, *, e, f, g"
    text = (
        function("wide", 2, seven)
        + function("long", MOST_LINES_OF_A_FUNCTION + 1)
        + function("whole", MOST_LINES_OF_A_FUNCTION)
        + "class Inner:\n"
        + function("six", 2, "self, a, b, c, d, e, f", "    ")
        + function("seven", 2, f"self, {seven}", "    ")
        + "class SoftPruning:\n"
        + function("__init__", 2, f"self, {seven}", "    ")
    )
    found = ["long is too long", "seven has 7 parameters", "wide has 7 parameters"]
    assert sorted(large_functions(ast.parse(text))) == found


# ------------------------------------------------------------------------------------------------------ foreign homes


def importers(*names):
    return {unit(path) for path in FILES for module, _ in imports(path) if module.split(".")[0] in names}


def test_private_names_of_lightning_have_one_importer():
    users = set()
    for path in FILES:
        for name, attribute in imports(path):
            parts = [*name.split("."), str(attribute)]
            if parts[0] in ("lightning", "pytorch_lightning", "lightning_fabric"):
                users |= {unit(path) for part in parts if part.startswith("_")}
    assert users == {"trainer"}


LIGHTNINGS = {"trainer", "strategy", "callback", "loop", "pl_module", "connector", "combined", "logger", "optimizer"}
TORCHS = {"_numel_cache"}


def test_private_attributes_of_lightnings_objects_are_used_in_one_folder():
    users = {}
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                base = node.value
                name = base.id if isinstance(base, ast.Name) else base.attr if isinstance(base, ast.Attribute) else ""
                if name.strip("_") in LIGHTNINGS and node.attr not in TORCHS:
                    users.setdefault(unit(path), set()).add(f"{name}.{node.attr}")
    assert users.keys() == {"trainer"}, users


@functools.cache
def lightnings_names(path):
    """Names in a file that are Lightning's, or begin with a module of Lightning's."""
    found = set()
    for node in ast.walk(tree_of(path)):
        origins = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for alias in node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
            if (origins or [alias.name])[0].split(".")[0] == "lightning":
                found.add(alias.asname or alias.name.split(".")[0])
    return found


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_objects_are_compared_with_the_classes_of_both_lightning_libraries(path):
    """`isinstance(callback, counterparts(ModelCheckpoint))`: see utilities/libraries.py."""
    for node in ast.walk(tree_of(path)):
        function = node.func if isinstance(node, ast.Call) else None
        if isinstance(function, ast.Name) and function.id in ("isinstance", "issubclass"):
            kinds = node.args[1].elts if isinstance(node.args[1], ast.Tuple) else [node.args[1]]
            asked = {ast.unparse(kind) for kind in kinds}
            assert not {name for name in asked if name.split(".")[0] in lightnings_names(path)}, asked


def test_what_is_raised_is_caught_by_both_lightning_libraries():
    importing = {path for path in FILES for _, name in imports(path) if name == "MisconfigurationException"}
    foreign = {path.name for path in importing if "MisconfigurationException" in lightnings_names(path)}
    assert importing
    assert not foreign, "import it from lightning_softprune.trainer"


def test_below_the_trainer_nothing_knows_lightning():
    low = {name for name, level in LEVEL.items() if level < LEVEL["trainer"]}
    low |= {"surgery", "calibration", "compensation"}
    assert not importers("lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics") & low


def test_numbers_know_no_tensors():
    assert not importers("torch") & {"search", "results", "testing"}
    assert not (imports(ROOT / "utilities" / "__init__.py"))


LAYER = re.compile(r"Conv|Linear|Bilinear|Norm|Attention|Embedding|RNN|LSTM|GRU|Transformer")
KNOWN_ELSEWHERE = {
    "compensation/replay.py": {"Linear"} | {f"Conv{kind}{n}d" for kind in ("", "Transpose") for n in (1, 2, 3)},
    "compensation/healing/lessons.py": {"Embedding", "EmbeddingBag", "RNNBase"},
}
"""What is asked of layers that no plan is concerned with: whether samples are computed apart, and how they learn."""


def layers_named_in(tree):
    """Types of layers of torch's that code names: `nn.Linear`, or `Linear` from there."""
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and re.match(r"torch\.nn(\.modules\b|$)", str(node.module))
        for alias in node.names
    }
    for node in ast.walk(tree):
        name = ""
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).removeprefix("torch.").split(".")[0] == "nn":
            name = node.attr
        elif isinstance(node, ast.Name) and node.id in imported:
            name = node.id
        if LAYER.search(name):
            yield name


def test_layer_types_are_known_in_one_file():
    """A type of layer is one entry of the table: nobody else asks what a layer is."""
    table = {ROOT / "graph" / "layers.py", *(ROOT / "graph" / "layer_types").iterdir()}
    found = {path.relative_to(ROOT).as_posix(): set(layers_named_in(tree_of(path))) for path in set(FILES) - table}
    assert {path: names for path, names in found.items() if names} == KNOWN_ELSEWHERE


def test_types_of_layers_are_found_wherever_they_are_named():
    text = (
        "from torch.nn import LayerNorm\nfrom torch.nn.modules.conv import _ConvNd\n"
        "KINDS = (nn.Linear, torch.nn.Conv2d, nn.modules.batchnorm._BatchNorm)\n"
        "def f(layer):\n    return type(layer) is LayerNorm or layer.__class__ in {_ConvNd}\n"
        "nn.ReLU(), nn.functional.linear, nn.init.kaiming_normal_, other.Linear, nn.Module\n"
    )
    assert sorted(layers_named_in(ast.parse(text))) == ["Conv2d", "LayerNorm", "Linear", "_BatchNorm", "_ConvNd"]


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
    code = f"import {PACKAGE}.search, {PACKAGE}.testing, {PACKAGE}.results\nprint(*sys.modules)"
    loaded = {name.partition(".")[0] for name in python(code)}
    assert "numpy" in loaded
    assert not loaded & {"torch", "lightning", "pytorch_lightning", "torchmetrics", "torch_pruning", "optuna", "pytest"}


def test_groups_and_surgery_run_without_lightning():
    code = (
        f"import {PACKAGE}.graph, {PACKAGE}.surgery, {PACKAGE}.calibration, {PACKAGE}.compensation\n"
        "print(*(name for name in sys.modules if name.startswith(('lightning.', 'pytorch_lightning', 'torchmetrics'))))"
    )
    assert python(code) == []


def test_extras_are_imported_where_they_are_used():
    for path in FILES:
        for node in tree_of(path).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            extras = {"optuna", "jsonargparse", "sklearn", "matplotlib"}
            assert not {name.partition(".")[0] for name in names} & extras, path


def test_every_file_is_looked_at():
    assert {"graph", "search", "callback"} <= {unit(path) for path in FILES}
    assert sum(1 for path in FILES for _ in imports(path)) > 100
