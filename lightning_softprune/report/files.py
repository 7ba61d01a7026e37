"""The files of a round in a folder.

Each file is a pure function from a `PruningResult` to text (`_FILES`); writing is one function for all of them.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from lightning_softprune.report.index import index_page
from lightning_softprune.report.page import report_page
from lightning_softprune.report.series import trial_rows
from lightning_softprune.results import PruningResult
from lightning_softprune.utilities.files import read_file, refuse_link, replace_file

RESULT_FILE, INDEX_FILE = "result.json", "softprune.html"

_ROOT, _ROUND, _VERSION, _CLAIM = "softprune", "epoch=", "version_", ".run"


def round_folder(root: Path, epoch: int) -> Path:
    """Where the files of the round at `epoch` belong.

    >>> round_folder(Path("logs"), 10).as_posix()
    'logs/softprune/epoch=10'
    """
    return Path(root) / _ROOT / f"{_ROUND}{epoch}"


def claim_folder(root: Path, epoch: int, identity: str) -> Path:
    """Where the files of a run's round at `epoch` belong, so that no other run's are overwritten.

    The first run in a folder has its rounds in ``softprune/epoch=<e>``, the next one in
    ``softprune/version_1/epoch=<e>``, and so on. A run that goes on finds its own place again, and one that starts at
    the same moment another: whoever makes the file ``.run`` first has the place.

    Args:
        root: The run's folder.
        epoch: The round's.
        identity: Tells runs apart, see `Origin`.

    Raises:
        OSError: The place cannot be written, or is a link.
    """
    first = round_folder(root, epoch)
    for number in itertools.count():
        folder = first if number == 0 else first.parent / f"{_VERSION}{number}" / first.name
        if _runs_in(folder.parent) <= {identity} and _is_claimed(folder.parent, identity):
            return folder
    raise AssertionError("there are versions without end")


def _is_claimed(place: Path, identity: str) -> bool:
    """Whether the run has this place, now or before."""
    _refuse_linked(place)
    place.mkdir(parents=True, exist_ok=True)
    try:
        with (place / _CLAIM).open("x", encoding="utf-8") as file:
            file.write(identity)
    except FileExistsError:
        return read_file(place / _CLAIM) == identity.encode()
    return True


def _runs_in(folder: Path) -> set[str | None]:
    """The identities of the runs that have rounds right in this folder; `None`: one that is not known."""
    return set(map(_identity_in, folder.glob(f"{_ROUND}*/{RESULT_FILE}")))


def _identity_in(path: Path) -> str | None:
    try:
        return str(json.loads(read_file(path))["origin"]["identity"]) or None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):  # older, or somebody else's
        return None


def write_files(result: PruningResult, folder: Path) -> list[Path]:
    """Write `result.json`, `trials.csv` and `report.html`, replacing those that are there.

    A reader sees an old file or a new one, never half of one. A link in the place of a file is replaced, and what it
    points to is left alone.

    Args:
        result: The round.
        folder: Where to write; made if it is not there.

    Returns:
        The paths written.

    Raises:
        OSError: If the folder cannot be written, or is a link in the place of a round's folder.
    """
    folder = Path(folder)
    for place in (*folder.parents[:2], folder):
        _refuse_linked(place)
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
        folder = claim_folder(root, result.epoch, result.origin.identity)
        write_files(result, folder)
    except Exception as error:  # a full disk, a folder of somebody else's: no reason to end a training run
        from lightning.pytorch.utilities import rank_zero_warn  # slow to import, and the command line has no use for it

        rank_zero_warn(f"SoftPruning: no report of the round in {folder}: {type(error).__name__}: {error}")
        return None
    return folder


def read_result(path: Path, *, follow_links: bool = False) -> PruningResult:
    """Read a `result.json`.

    Args:
        path: The file.
        follow_links: Whether it may be a link to one.

    Raises:
        FileNotFoundError: If there is no such file.
        OSError: If it is no regular file, or cannot be read.
        ValueError: If it is corrupt or not a pruning result; the message names the file.
    """
    content = read_file(Path(path), follow_links=follow_links)
    try:
        return PruningResult.from_dict(json.loads(content, parse_float=_finite))
    except (ValueError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path}: cannot be read as a pruning result ({error})") from error


def read_round(folder: Path) -> PruningResult:
    """Read the `result.json` in a round's folder; see :func:`read_result`.

    Raises:
        OSError: Also if the folder is a link in the place of a round's.
    """
    _refuse_linked(folder)
    return read_result(folder / RESULT_FILE)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):  # Python reads 1e400 as infinity, which is "inf" in our files
        raise ValueError(f"{text:.60} is no number that a float can hold")
    return value


def _refuse_linked(folder: Path) -> None:
    """Links to whole runs are the user's own habit (`latest`); those in the place of our folders are nobody's."""
    if folder.name == _ROOT or folder.name.startswith(_ROUND) or _is_version(folder):
        refuse_link(folder)


def _is_version(folder: Path) -> bool:
    return folder.name.startswith(_VERSION) and folder.parent.name == _ROOT


def round_folders(root: Path) -> list[Path]:
    """The folders of rounds at or below `root`: run by run, the epochs in order.

    Links to folders are not followed. One in the place of a round's folder is in the list, for :func:`read_round` to
    refuse by name.

    Raises:
        OSError: If `root` is not a folder that can be read.
    """
    os.scandir(root).close()  # below, nothing is said of a folder that cannot be read
    if _has_result(root):
        return [root]
    found, stack = [], [root]
    while stack:  # not recursive: folders may be nested more deeply than Python's calls
        try:
            with os.scandir(stack.pop()) as entries:
                folders = [(Path(entry.path), entry.is_symlink()) for entry in entries if entry.is_dir()]
        except OSError:
            continue
        for folder, is_link in folders:
            ours = folder.name == _ROOT or folder.name.startswith(_ROUND)
            if is_link:
                found += [folder] if ours else []
                continue
            stack.append(folder)
            if folder.name.startswith(_ROUND) and os.path.lexists(folder / RESULT_FILE):
                found.append(folder)

    return sorted(found, key=_natural)


def _natural(folder: Path) -> list[list[tuple[int, str]]]:
    """Folder by folder, with numbers by their size."""
    return [
        [(int(piece) if piece.isdecimal() else -1, piece) for piece in re.split(r"([0-9]+)", part)]
        for part in folder.parts
    ]


def _has_result(folder: Path) -> bool:
    """Whether there is a `result.json`, be it only to be refused."""
    path = folder / RESULT_FILE
    return os.path.lexists(path) and not (path.is_dir() and not path.is_symlink())


def rebuild_files(folder: Path) -> list[Path]:
    """Write the other files of a round again, from its `result.json`, which stays as it is.

    Returns:
        The paths written.

    Raises:
        FileNotFoundError: If there is no `result.json`.
        ValueError: If it cannot be read as a result.
        OSError: If the folder cannot be written.
    """
    result = read_round(folder)
    texts = {name: render(result) for name, render in _FILES.items() if name != RESULT_FILE}
    return [replace_file(folder / name, text.encode()) for name, text in texts.items()]


def write_index(root: Path, folders: Sequence[Path]) -> Path:
    """Write a page that compares rounds, beside the folders that they are below.

    Args:
        root: Where to write it.
        folders: Those of the rounds.

    Returns:
        Its path.

    Raises:
        OSError: If a result cannot be read or the page not written.
        ValueError: If a file is no result.
    """
    rounds = [(folder.relative_to(root).as_posix(), read_round(folder)) for folder in folders]
    return replace_file(root / INDEX_FILE, index_page(root.resolve().name, rounds).encode())


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
