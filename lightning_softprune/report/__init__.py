"""What people see of a round: a bar and tables in the terminal, files, a page, figures for loggers."""

from typing import TYPE_CHECKING

from lightning_softprune.report.files import (
    INDEX_FILE,
    RESULT_FILE,
    read_result,
    read_round,
    rebuild_files,
    round_folders,
    try_write_files,
    write_index,
)
from lightning_softprune.report.messages import dense_checkpoints_stay, rounds_never_reached
from lightning_softprune.report.series import log_values
from lightning_softprune.report.tables import print_finetuned, print_round, print_rounds, print_solutions
from lightning_softprune.utilities.libraries import lazily

if TYPE_CHECKING:
    from lightning_softprune.report.figures import log_figures
    from lightning_softprune.report.progress import Phases, SearchProgress, Style
else:  # these know Lightning, which takes seconds to import; the command line has no use for them
    _IN_PROGRESS = ("Phases", "SearchProgress", "Style")
    __getattr__ = lazily(__name__, {"log_figures": "figures", **dict.fromkeys(_IN_PROGRESS, "progress")})

__all__ = [
    "INDEX_FILE",
    "RESULT_FILE",
    "Phases",
    "SearchProgress",
    "Style",
    "dense_checkpoints_stay",
    "log_figures",
    "log_values",
    "print_finetuned",
    "print_round",
    "print_rounds",
    "print_solutions",
    "read_result",
    "read_round",
    "rebuild_files",
    "round_folders",
    "rounds_never_reached",
    "try_write_files",
    "write_index",
]
