import importlib
import re
from pathlib import Path

import pytest

from lightning_softprune import UniformBaseline

pytestmark = pytest.mark.slow

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

FOLDER = Path(__file__).parents[2] / "examples" / "gallery"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "common")
README = (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module", autouse=True)
def folder_of_the_scripts():
    import matplotlib

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        matplotlib.use("agg")
        yield


# A few batches per epoch: these networks know nothing, and some of what is asked for may not be met.
@pytest.mark.filterwarnings("ignore:SoftPruning")
@pytest.mark.filterwarnings("ignore:.*epoch_end` hooks were not.*")
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_prints_a_table_and_draws_its_picture(name, one_thread, tmp_path, capsys, monkeypatch):
    if name == "oneshot_onnx":
        pytest.importorskip("onnxruntime")
    script = importlib.import_module(name)
    monkeypatch.setattr(script, "SensitivitySearch", UniformBaseline)  # one plan: what is searched is tested elsewhere
    if hasattr(script, "convnet"):
        convnet = importlib.import_module("classifier").convnet
        monkeypatch.setattr(script, "convnet", lambda *widths: convnet(*(width // 4 for width in widths)))
    script.main(["--quick", "--out", str(tmp_path)])
    picture = tmp_path / f"{name}.png"
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    table, last = capsys.readouterr().out.rstrip().rsplit("\n\n", 1)
    assert last == f"Picture: {picture}"
    assert re.search(r"\d", table.splitlines()[-1])


def test_scripts_are_short_and_their_pictures_small():
    assert len(SCRIPTS) >= 8
    for name in SCRIPTS:
        assert len((FOLDER / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 100
        assert (FOLDER / f"{name}.png").stat().st_size < 80_000
        assert f"({name}.py)" in README
        assert f"({name}.png)" in README
