"""The files of a round in a folder.

Each file is a pure function from a `PruningResult` to text (`_FILES`); writing is one function for all of them.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from lightning_softprune.report.page import report_page
from lightning_softprune.report.series import trial_rows
from lightning_softprune.results import PruningResult
from lightning_softprune.utilities.files import replace_file

RESULT_FILE = "result.json"


def round_folder(root: Path, epoch: int) -> Path:
    """Where the files of the round at `epoch` belong.

    >>> round_folder(Path("logs"), 10).as_posix()
    'logs/softprune/epoch=10'
    """
    return Path(root) / "softprune" / f"epoch={epoch}"


def write_files(result: PruningResult, folder: Path) -> list[Path]:
    """Write `result.json`, `trials.csv` and `report.html`, replacing those of an earlier run.

    A reader sees an old file or a new one, never half of one.

    Args:
        result: The round.
        folder: Where to write; made if it is not there.

    Returns:
        The paths written.

    Raises:
        OSError: If the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    texts = {name: render(result) for name, render in _FILES.items()}  # all of them first: what fails writes nothing
    return [replace_file(folder / name, text.encode()) for name, text in texts.items()]


def try_write_files(result: PruningResult, root: Path) -> Path | None:
    """Write the files of a round into its folder under `root`; where that fails, warn.

    Returns:
        The folder; ``None`` where it could not be written.
    """
    folder = round_folder(root, result.epoch)
    try:
        write_files(result, folder)
    except Exception as error:  # a full disk, a folder of somebody else's: no reason to end a training run
        rank_zero_warn(f"SoftPruning: no report of the round in {folder}: {type(error).__name__}: {error}")
        return None
    return folder


def read_result(path: Path) -> PruningResult:
    """Read a `result.json`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is corrupt or not a pruning result; the message names the file.
    """
    content = Path(path).read_bytes()
    try:
        return PruningResult.from_dict(json.loads(content))
    except (ValueError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path}: cannot be read as a pruning result ({error})") from error


def round_folders(root: Path) -> list[Path]:
    """The folders of rounds at or below `root`: run by run, the epochs in order.

    Raises:
        OSError: If `root` is not a folder that can be read.
    """
    os.scandir(root).close()  # `rglob` says nothing about a folder that is missing or cannot be read
    if (root / RESULT_FILE).is_file():
        return [root]
    found = [path.parent for path in root.rglob(f"epoch=*/{RESULT_FILE}")]

    def key(folder: Path) -> tuple[Path, int, str]:
        epoch = folder.name.removeprefix("epoch=")
        return folder.parent, int(epoch) if epoch.isdecimal() else -1, epoch

    return sorted(found, key=key)


def rebuild_files(folder: Path) -> list[Path]:
    """Write the other files of a round again, from its `result.json`, which stays as it is.

    Returns:
        The paths written.

    Raises:
        FileNotFoundError: If there is no `result.json`.
        ValueError: If it cannot be read as a result.
        OSError: If the folder cannot be written.
    """
    result = read_result(folder / RESULT_FILE)
    texts = {name: render(result) for name, render in _FILES.items() if name != RESULT_FILE}
    return [replace_file(folder / name, text.encode()) for name, text in texts.items()]


def _json_text(result: PruningResult) -> str:
    return json.dumps(result.to_dict(), indent=2, allow_nan=False) + "\n"


def _csv_text(result: PruningResult) -> str:
    header, rows = trial_rows(result)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")  # floats as repr: nothing is lost; NaN as nan
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


_FILES: dict[str, Callable[[PruningResult], str]] = {
    RESULT_FILE: _json_text,
    "trials.csv": _csv_text,
    "report.html": report_page,
}
