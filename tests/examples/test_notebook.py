import json
import re
import warnings
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

NOTEBOOK = Path(__file__).parents[2] / "examples" / "guide" / "from_dense_to_exported.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def test_the_notebook_was_executed_from_top_to_bottom_and_shows_what_came_out():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "execute_result", "display_data"}
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    assert NOTEBOOK.stat().st_size < 300_000


def test_the_cells_run(one_thread, tmp_path, monkeypatch, capsys):
    for library in ("sklearn", "matplotlib", "onnxruntime", "onnxscript"):
        pytest.importorskip(library)
    import matplotlib

    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "notebook"}
    with warnings.catch_warnings():  # the notebook silences all
        for number, cell in enumerate(CODE, start=1):
            source = re.sub(r"max_epochs=\d+", "max_epochs=1", "".join(cell["source"]))
            exec(compile(source, f"cell {number}", "exec"), names)
    assert names["result"].applied
    assert sum(p.numel() for p in names["loaded"].parameters()) == names["result"].costs_after.params
    assert "the file and the module give the same pictures" in capsys.readouterr().out
