import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_softprune

pytestmark = pytest.mark.slow

pytest.importorskip("sphinx")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def command():
    """The README's command, as arguments of Python."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"bin/python (-m sphinx .*)$", readme, flags=re.MULTILINE)
    return shlex.split(line)


def test_the_reference_is_built_without_a_warning_and_names_all_that_is_exported(command, tmp_path):
    *options, folder, output = command
    assert output.startswith("build/")  # ignored by git
    done = subprocess.run(
        [sys.executable, *options, "-d", tmp_path / "cache", ROOT / folder, tmp_path / "html"],
        capture_output=True, text=True, timeout=250, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pages = "".join(page.read_text(encoding="utf-8") for page in (tmp_path / "html").glob("*.html"))
    for name in lightning_softprune.__all__:
        assert f'id="lightning_softprune.{name}"' in pages, name


def test_a_warning_is_an_error(command):
    assert {"-W", "--keep-going"} <= set(command)
