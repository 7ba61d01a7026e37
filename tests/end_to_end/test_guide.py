"""The guide: its code runs, its links lead somewhere, and its index of reasons has every reason."""

import ast
import re
import sys
import types
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml

from lightning_softprune import register_layer
from lightning_softprune.cli import main
from lightning_softprune.graph import layer_type, layout_of
from support.snippets import SnippetAutoencoder, taken_for_granted

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "examples" / "guide").glob("*.md"))
TEXTS = {page.stem: page.read_text(encoding="utf-8") for page in PAGES}


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXTS[page], flags=re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in TEXTS if blocks(page, "python")])
def test_the_python_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch, capsys):
    """Each block in the names of those before it; what a page says is printed is printed."""
    monkeypatch.chdir(tmp_path)
    script = types.ModuleType(f"guide_{page}")
    monkeypatch.setitem(sys.modules, script.__name__, script)
    names = script.__dict__
    names.update(taken_for_granted(), L=L, Autoencoder=SnippetAutoencoder, example=torch.rand(2, 12))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*_check_is_size.*")
        for block in blocks(page, "python"):
            exec(block, names)
    if page == "constraints":
        (printed,) = blocks(page, "text")
        assert printed in capsys.readouterr().out
    if page == "checkpoints":
        expected = names["model"].cpu().eval()(names["example"])
        for loaded in (names["pruned"], names["again"].eval(), names["shaped"].eval(), names["exported"].module()):
            torch.testing.assert_close(loaded(names["example"]), expected)


def test_the_layer_of_ones_own_is_the_same_in_python_and_in_yaml(monkeypatch):
    python, (configuration,) = blocks("extending", "python")[0], blocks("extending", "yaml")
    package = types.ModuleType("my_package")
    monkeypatch.setitem(sys.modules, "my_package", package)
    exec(python, package.__dict__)
    layer = package.Swapped(4, 6)
    entry = layer_type(layer)
    (given,) = yaml.safe_load(configuration)["layers"]
    register_layer(**given)
    assert layer_type(layer) is entry
    assert layout_of(layer).slots == {"in": 4, "out": 6}


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert links or page.stem not in ("README", "troubleshooting")
    assert not [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_commands_are_commands(page, capsys):
    code = re.findall(r"^```.*?^```|`[^`\n]+`", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    words = {word for text in code for word in re.findall(r"lightning-softprune ([a-z]+)", text)}
    assert words or page.stem != "command_line"
    for word in words:
        with pytest.raises(SystemExit) as ended:
            main([word, "--help"])
        assert ended.value.code == 0, capsys.readouterr().err


def said_in_the_graph():
    """The texts of reasons that name an operation: the second argument of `said`."""
    for path in (ROOT / "lightning_softprune" / "graph" / "flow").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "said":
                text = node.args[1]
                parts = text.values if isinstance(text, ast.JoinedStr) else [text]
                yield from (p.value.strip() for p in parts if isinstance(p, ast.Constant) and len(p.value) > 12)


def test_the_index_has_every_reason():
    """A new reason needs a line in the guide that says what to do."""
    said = set(said_in_the_graph())
    assert len(said) > 25
    assert not sorted(text for text in said if text.rstrip(" :") not in TEXTS["troubleshooting"])


RAISED = {
    *("ArgumentTypeError", "FileError", "FileExistsError", "MisconfigurationException", "ModuleNotFoundError"),
    *("NotImplementedError", "OutOfReachError", "RuntimeError", "TypeError", "ValueError"),
    *("rank_zero_warn", "warn"),
}


def messages_in_the_package():
    """Of each message of an error or a warning, the longest piece that is always the same."""
    for path in (ROOT / "lightning_softprune").rglob("*.py"):
        if path.name == "testing.py":
            continue  # assertions for authors of strategies
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(node.func, "id", getattr(node.func, "attr", "")) if isinstance(node, ast.Call) else ""
            if name in RAISED and node.args and isinstance(node.args[0], ast.JoinedStr | ast.Constant):
                pieces = (part.value for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant))
                yield max((str(piece).strip(" :;,.()\n") for piece in pieces), key=len)


def test_the_index_has_every_message():
    """A new error needs a line in the guide that says what to do."""
    messages = {message for message in messages_in_the_package() if len(message) > 7}
    assert len(messages) > 150
    assert not sorted(message for message in messages if message not in TEXTS["messages"])
