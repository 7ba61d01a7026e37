"""Names of one library of Lightning, and what becomes of them when the other is imported: on two small packages."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_softprune.utilities import libraries

CALLBACKS = """
class Callback: pass
class Deep(Callback): pass
def which(): return __name__
"""
ROOT = "from {name}.callbacks import Callback\nclass Trainer: pass\nclass LightningModule: pass\n"
OURS = """
import sys
from {libraries} import counterpart, counterparts, library_of, of_both_libraries
import lightning.pytorch as ours
from lightning.pytorch import callbacks

@of_both_libraries
class Pruning(callbacks.Callback): pass
class Below(Pruning): pass
"""


@pytest.fixture
def run(tmp_path):
    """Runs code beside two packages with the libraries' names; the package's file comes without all the others."""
    for name in ("lightning/pytorch", "pytorch_lightning"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "callbacks.py").write_text(CALLBACKS)
        (tmp_path / name / "__init__.py").write_text(ROOT.format(name=name.replace("/", ".")))
    (tmp_path / "lightning" / "__init__.py").touch()
    (tmp_path / "shelf.py").write_text(Path(libraries.__file__).read_text())

    def run(code):
        program = OURS.format(libraries="shelf") + code
        command = [sys.executable, "-S", "-c", program]  # without the installed packages
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr

    return run


def test_a_class_of_ours_joins_the_other_library_when_that_is_imported(run):
    run("""
assert Pruning.__bases__ == (callbacks.Callback,)
assert [type(one).__name__ for one in sys.meta_path].count("_Watch") == 1
one = Below()
import pytorch_lightning as other
assert issubclass(Pruning, other.Callback) and issubclass(Pruning, ours.Callback)
assert isinstance(one, other.Callback) and Pruning in other.Callback.__subclasses__()
assert "_Watch" not in [type(one).__name__ for one in sys.meta_path]
""")


def test_a_class_of_ours_joins_a_library_that_is_there_already(run):
    run("""
import pytorch_lightning as other
@of_both_libraries
class Late(callbacks.Deep): pass
assert Late.__bases__ == (callbacks.Deep, other.callbacks.Deep) and issubclass(Late, other.Callback)
""")


def test_several_classes_may_wait_for_one_module(run):
    run("""
@of_both_libraries
class Second(callbacks.Deep): pass
import pytorch_lightning as other
assert issubclass(Second, other.callbacks.Deep) and issubclass(Pruning, other.Callback)
""")


def test_classes_are_compared_in_the_libraries_that_are_imported(run):
    run("""
assert counterparts(callbacks.Deep) == (callbacks.Deep,) and counterparts(dict) == (dict,)
import pytorch_lightning as other
assert counterparts(callbacks.Deep) == (callbacks.Deep, other.callbacks.Deep) and counterparts(dict) == (dict,)
del other.callbacks.Deep  # an older release
assert counterparts(callbacks.Deep) == (callbacks.Deep,)
""")


def test_names_are_taken_from_the_library_of_the_trainer_or_the_module(run):
    run("""
class Mine(ours.Trainer): pass
assert [library_of(one) for one in (Mine(), object(), None)] == ["lightning.pytorch"] * 3
import pytorch_lightning as other
class Theirs(dict, other.LightningModule): pass
assert library_of(Theirs()) == "pytorch_lightning" and library_of(Mine()) == "lightning.pytorch"
assert counterpart(callbacks.Deep, Theirs()) is other.callbacks.Deep
assert counterpart(callbacks.which, other.Trainer())() == "pytorch_lightning.callbacks"
assert counterpart(callbacks, other.Trainer()) is other.callbacks
for value in (callbacks.Deep, callbacks.which, callbacks):
    assert counterpart(value, Mine()) is counterpart(value, object()) is value
""")


def test_a_library_that_is_not_installed_is_not_missed(run):
    run("""
import shutil
shutil.rmtree("pytorch_lightning")
try:
    import pytorch_lightning.callbacks
except ModuleNotFoundError as error:
    assert error.name == "pytorch_lightning"
assert isinstance(Below(), ours.Callback) and counterparts(callbacks.Deep) == (callbacks.Deep,)
""")


def test_what_keeps_a_lazy_name_from_being_imported_is_said(tmp_path, monkeypatch):
    """A library that is broken raises an `AttributeError`, which Python would take for a name that is not there."""
    (tmp_path / "drowsy").mkdir()
    (tmp_path / "drowsy" / "__init__.py").write_text(
        "from lightning_softprune.utilities.libraries import lazily\n"
        "__getattr__ = lazily(__name__, {'bed': 'room', 'night': 'room'})\n"
    )
    (tmp_path / "drowsy" / "room.py").write_text("import math\nbed = math.pillow\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"drowsy\.room cannot be imported: module 'math' has no attribute 'pillow'"):
        from drowsy import bed  # noqa: F401
    (tmp_path / "drowsy" / "room.py").write_text("bed = 1\n")
    importlib.invalidate_caches()
    from drowsy import bed as found

    assert found == 1
    with pytest.raises(ImportError, match="cannot import name 'night'"):
        from drowsy import night  # noqa: F401
