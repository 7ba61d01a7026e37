import importlib
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "examples" / "experiments"


@pytest.fixture
def experiment(monkeypatch):
    """Imports a script of the experiments, and forgets it afterwards with all that it imported beside it."""
    monkeypatch.syspath_prepend(EXPERIMENTS)
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(EXPERIMENTS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
