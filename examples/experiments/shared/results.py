"""Results of an experiment in a folder: rows that are not computed twice, their environment, a table to read."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
_PACKAGES = (
    "lightning-softprune",
    "torch",
    "lightning",
    "torchmetrics",
    "numpy",
    "scipy",
    "gymnasium",
    "torch-pruning",
)

Row = dict[str, Any]


def environment() -> dict[str, Any]:
    """Versions and the machine, as far as they matter to the figures."""
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in _PACKAGES if find_spec(name.replace("-", "_"))},
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def arguments(name: str, description: str | None) -> argparse.ArgumentParser:
    """The options that every experiment has; where its files go is `folders`'s business."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few minutes: small, and of no meaning")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, help=f"folder of the results (default: results/{name} beside the script)"
    )
    parser.add_argument("--cache", type=Path, help="folder of trained networks (default: examples/output/NAME)")
    return parser


def folders(name: str, args: argparse.Namespace) -> tuple[Path, Path]:
    """Where results and trained networks go; a quick run has folders of its own, and overwrites nothing of worth."""
    scratch = ROOT.parent / "output" / (f"{name}-quick" if args.quick else name)
    output = args.output or (scratch if args.quick else ROOT / "results" / name)
    cache = args.cache or scratch
    for folder in (output, cache):
        folder.mkdir(parents=True, exist_ok=True)
    return output, cache


def trainer_settings(folder: Path) -> dict[str, Any]:
    """Arguments of a Trainer that is quiet, on the processor."""
    return {
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": folder,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }


def without_places(words: Sequence[str]) -> list[str]:
    """A command without the folders of one machine.

    >>> without_places(["promise.py", "--data-dir", "/home/me/mnist", "--output", "out", "--seed", "1"])
    ['promise.py', '--data-dir', 'DIR', '--seed', '1']
    """
    kept: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        if before == "--data-dir":
            kept.append("DIR")
        elif not {before, word} & {"--output", "--cache"}:
            kept.append(word)
    return kept


class Results:
    """The rows of a JSON file, by name. What is there already is not computed again.

    Args:
        folder: Where the file is.
        settings: What the rows depend on; rows of other settings are refused.
        name: The file's name, without `.json`.

    Raises:
        SystemExit: The file there is of other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], name: str = "results") -> None:
        self.path = folder / f"{name}.json"
        self._content: dict[str, Any] = {"settings": dict(settings), "rows": {}}
        if self.path.is_file():
            self._content = json.loads(self.path.read_text())
            if self._content["settings"] != json.loads(json.dumps(settings)):
                sys.exit(f"{self.path}: has results of {self._content['settings']}, not of {dict(settings)}; remove it")

    @property
    def rows(self) -> dict[str, Row]:
        """The rows so far, by name."""
        rows: dict[str, Row] = self._content["rows"]
        return rows

    def row(self, name: str, compute: Callable[[], Row]) -> Row:
        """The row of this name, computed and written if it is not there yet; with its command and environment."""
        if name not in self.rows:
            started = time.monotonic()
            row = compute()
            spent = round(time.monotonic() - started, 1)
            command = shlex.join(["python", *without_places(sys.argv)])
            self.rows[name] = row | {"seconds_in_all": spent, "command": command, "environment": environment()}
            scratch = self.path.with_suffix(".tmp")
            scratch.write_text(json.dumps(self._content, indent=1) + "\n")
            scratch.replace(self.path)
            print(f"{name}: {spent:.0f} s", flush=True)
        return self.rows[name]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table.

    >>> print(markdown(["a", "b"], [["1", "2"]]))
    | a | b |
    | --- | --- |
    | 1 | 2 |
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
