"""The command `lightning-softprune`: what was pruned in a checkpoint, and reports built anew.

Whatever is wrong with a file is one line on stderr that names it, and exit code 1; wrong usage is exit code 2.

Files may come from anybody. Below the folder that the user names, no link is followed and nothing but regular files is
opened; what the user names may be a link.

What a command needs is imported by the command: `--help` waits for none of it, and only checkpoints need torch.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import unicodedata
import warnings
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lightning_softprune.utilities.files import refuse_other_than_file
from lightning_softprune.utilities.version import __version__
from lightning_softprune.utilities.wording import counted

if TYPE_CHECKING:
    from lightning_softprune.results import PruningResult
    from lightning_softprune.search import Solution

PROGRAM = "lightning-softprune"

RESULT_FILE, INDEX_FILE = "result.json", "softprune.html"

COSTS = ("params", "macs")


class FileError(Exception):
    """A file that cannot be used; the message is one line that names it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Its arguments; those of the process if not given.

    Returns:
        The exit code: 0, or 1 if a file is missing, foreign, corrupt or cannot be read or written.

    Raises:
        SystemExit: For `--help` and `--version` (code 0) and wrong usage (code 2).
    """
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except FileError as error:
        return _complain(error)
    except BrokenPipeError:  # the reader (`head`, a pager) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Look at what lightning_softprune has done to a model, and build its reports anew.",
        epilog="Exit codes: 0 fine; 1 a file is missing, foreign, corrupt or not accessible; 2 wrong usage.",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    show = commands.add_parser(
        "show",
        help="print what was pruned: the rounds, and the channels of each group",
        description="Print what was pruned: one row per round, and the channels of each group from round to round.",
    )
    show.add_argument(
        "path",
        type=Path,
        metavar="PATH",
        help=f"a checkpoint (.ckpt) of a pruned model, a round's {RESULT_FILE}, or a folder with rounds below it",
    )
    show.add_argument("--json", action="store_true", help="print all that is known, as JSON: a list of runs")
    show.set_defaults(run=_show)
    report = commands.add_parser(
        "report",
        help="write report.html and trials.csv again, and a page that compares rounds and runs",
        description=(
            f"Write report.html and trials.csv again, from the {RESULT_FILE} beside them, and {INDEX_FILE}, which "
            "compares all rounds and runs below DIR; print their paths."
        ),
    )
    report.add_argument(
        "path", type=Path, metavar="DIR", help="the folder of a round, or one with rounds below it: rewrites all"
    )
    report.set_defaults(run=_report)
    solve = commands.add_parser(
        "solve",
        help="what a round's measurements say of another sparsity, without running anything",
        description=(
            "Print the best plan for other targets, and the score it should have, from what a round has measured. "
            "Without --target: from 10 % to 90 %."
        ),
    )
    solve.add_argument("path", type=Path, metavar="DIR", help=f"the folder of a round, or its {RESULT_FILE}")
    solve.add_argument(
        "--target", type=_target, action="append", metavar="SPARSITY", help="in (0, 1]; may be given several times"
    )
    solve.add_argument("--cost", choices=COSTS, help="what sparsity is measured in; default: the round's")
    solve.add_argument(
        "--limit",
        type=_limit,
        action=_OncePerCost,
        metavar="COST=FRACTION",
        help="how much may remain: macs=0.5; once for each cost, params or macs",
    )
    solve.set_defaults(run=_solve)
    return parser


def _target(text: str) -> float:
    from lightning_softprune.utilities.checks import fraction

    try:
        return fraction("--target", float(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction in (0, 1]") from None


def _limit(text: str) -> tuple[str, float]:
    from lightning_softprune.utilities.checks import fraction, one_of

    name, _, value = text.partition("=")
    try:
        return one_of("--limit", name, COSTS), fraction("--limit", float(value))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not COST=FRACTION, as in macs=0.5, with params or macs and a fraction in (0, 1]"
        ) from None


class _OncePerCost(argparse.Action):
    """Collects `--limit` into a dictionary; a cost that has one already is wrong usage."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        del parser
        name, limit = values
        limits = getattr(namespace, self.dest) or {}
        if name in limits:
            raise argparse.ArgumentError(self, f"{name} has a limit already, {limits[name]:g}; one for each cost")
        setattr(namespace, self.dest, {**limits, name: limit})


# ------------------------------------------------------------------------------------------------------------ commands


def _show(arguments: argparse.Namespace) -> int:
    from lightning_softprune.report import read_result, read_round

    path: Path = arguments.path
    runs: dict[Path, list[PruningResult]] = {}
    if path.is_dir():
        for folder in _folders(path):
            runs.setdefault(folder.parent, []).append(_result(folder, read_round))
        if len(runs) == 1:
            runs = {path: next(iter(runs.values()))}
    elif path.suffix == ".json":
        runs[path] = [_result(path, partial(read_result, follow_links=True))]
    else:
        runs[path] = _recorded(path)
    if arguments.json:
        found = [{"path": str(place), "rounds": [one.to_dict() for one in results]} for place, results in runs.items()]
        print(json.dumps(found, indent=2, allow_nan=False))
        return 0
    for place, results in runs.items():
        _print(place, results)
    return 0


def _print(path: Path, results: Sequence[PruningResult]) -> None:
    from rich.console import Console

    from lightning_softprune.report import print_rounds

    rounds = counted(len(results), "round")
    print(f"{_one_line(path, sys.stdout)}: {rounds}\n", flush=True)
    if results:
        print_rounds(results, Console())


def _solve(arguments: argparse.Namespace) -> int:
    """Print what was found for each target; one that is out of reach is complained of, and the others are printed."""
    from rich.console import Console

    from lightning_softprune.report import print_solutions, read_round

    path: Path = arguments.path
    folders = _folders(path.parent if path.name == RESULT_FILE and path.is_file() else path)
    if len(folders) > 1:
        raise FileError(f"{path}: holds {len(folders)} rounds; name the folder of one, as {folders[0]}")
    result = _result(folders[0], read_round)
    question = {"cost": arguments.cost, "limits": arguments.limit}
    try:
        if arguments.target is None:  # as far as there is something
            answers: Sequence[Solution | FileError] = result.solve_targets([n / 10 for n in range(1, 10)], **question)
            answers = answers or [FileError(f"{path}: no target from 10 % to 90 % can be met; --target says how near")]
        else:
            answers = [_answer(path, result, target, question) for target in arguments.target]
    except ValueError as error:
        raise FileError(f"{path}: {error}") from error
    found = [answer for answer in answers if not isinstance(answer, FileError)]
    if found:
        print_solutions(found, result, Console())
    return max((_complain(answer) for answer in answers if isinstance(answer, FileError)), default=0)


def _answer(path: Path, result: PruningResult, target: float, question: dict[str, Any]) -> Solution | FileError:
    from lightning_softprune.search import OutOfReachError

    try:
        return result.solve(target, **question)
    except OutOfReachError as error:
        return FileError(f"{path}: {error}")


def _report(arguments: argparse.Namespace) -> int:
    """Build every report that can be built; one that cannot is no reason to leave out the others."""
    from lightning_softprune.report import write_index

    path: Path = arguments.path
    folders = _folders(path.parent if path.name == RESULT_FILE and path.is_file() else path)
    built = {folder: _rebuild(folder) for folder in folders}
    good = [folder for folder, code in built.items() if code == 0]
    if good and folders != [path] and path.is_dir():
        try:
            print(_one_line(write_index(path, good), sys.stdout))
        except (OSError, ValueError) as error:
            return _complain(_file_error(path, error))
    return max(built.values())


def _rebuild(folder: Path) -> int:
    from lightning_softprune.report import rebuild_files

    try:
        written = rebuild_files(folder)
    except (OSError, ValueError) as error:
        return _complain(_file_error(folder, error))
    for path in written:
        print(_one_line(path, sys.stdout))
    return 0


# --------------------------------------------------------------------------------------------------------------- files


def _folders(path: Path) -> list[Path]:
    from lightning_softprune.report import round_folders

    try:
        folders = round_folders(path)
    except (OSError, ValueError) as error:
        raise _file_error(path, error) from error
    if not folders:
        raise FileError(f"{path}: no {RESULT_FILE} of a round in this folder or below it")
    return folders


def _result(path: Path, read: Callable[[Path], PruningResult]) -> PruningResult:
    try:
        return read(path)
    except (OSError, ValueError) as error:
        raise _file_error(path, error) from error


def _recorded(path: Path) -> list[PruningResult]:
    """The rounds in a checkpoint's record."""
    from lightning_softprune.checkpoint import RECORD, recorded_rounds

    checkpoint = _load(path)
    record = checkpoint.get(RECORD) if isinstance(checkpoint, dict) else None
    if record is None:
        if isinstance(checkpoint, dict) and "pytorch-lightning_version" in checkpoint:
            raise FileError(f'{path}: an ordinary checkpoint without a "{RECORD}" record: its model was not pruned')
        raise FileError(f"{path}: not a Lightning checkpoint")
    try:
        return recorded_rounds(record)
    except ValueError as error:
        raise FileError(f"{path}: {str(error).replace(repr(RECORD), json.dumps(RECORD), 1)}") from error


def _load(path: Path) -> Any:
    """What is in a checkpoint: plain types and tensors only, which stay on disk where they can."""
    import torch

    try:
        refuse_other_than_file(path)
        path.open("rb").close()
    except OSError as error:
        raise _file_error(path, error) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged file can raise anything, an OSError too
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        reason = f": it holds {foreign[1]}, which weights_only=True does not load" if foreign else ""
        raise FileError(f"{path}: cannot be read as a checkpoint{reason}") from error


def _file_error(path: Path, error: OSError | ValueError) -> FileError:
    if isinstance(error, OSError):
        return FileError(f"{error.filename2 or error.filename or path}: {error.strerror or error}")
    text = str(error)
    return FileError(text if str(path) in text else f"{path}: {text}")


def _complain(error: FileError) -> int:
    print(f"{PROGRAM}: {_one_line(error, sys.stderr)}", file=sys.stderr)
    return 1


def _one_line(text: object, stream: TextIO) -> str:
    """The text on one line, in characters that the stream has and that do nothing to a terminal."""
    encoding = stream.encoding or "utf-8"
    text = str(text).replace("\n", " ")
    plain = "".join(ascii(c)[1:-1] if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text)
    return plain.encode(encoding, "backslashreplace").decode(encoding)
