import io
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from rich.console import Console
from rich.errors import LiveError
from rich.live import Live
from torch.utils.data import DataLoader, TensorDataset

from lightning_softprune import SoftPruning, UniformBaseline
from lightning_softprune.report.progress import Phases, SearchProgress, progress_style
from lightning_softprune.report.tables import print_round
from support.consoles import Terminal, make_console, output_of, visible
from support.results import printed_result

pytestmark = pytest.mark.usefixtures("ordinary_terminal")


def run_search(console: Console | None = None, total: int | None = 3, **arguments: Any) -> None:
    with SearchProgress(total, "val_psnr", "max", console=console, **arguments) as bar:
        for score in (18.0, 19.5, 19.0):
            bar.advance(score)


@pytest.mark.parametrize("style", ["auto", "rich", "tqdm"])
def test_on_a_terminal_the_bar_shows_count_and_best_and_goes_away(style: Any) -> None:
    console = make_console()

    with SearchProgress(3, "val_psnr", "max", style=style, console=console) as bar:
        bar.advance(18.0)
        bar.advance(19.5)
        bar.advance(19.0)
        if bar._display is not None and style != "tqdm":
            bar._display._progress.refresh()  # type: ignore[attr-defined]  # not to wait for its thread
        else:
            bar._display._bar.refresh()  # type: ignore[union-attr]
    text = visible(output_of(console))

    assert "Search" in text
    assert "3/3" in text
    assert "best val_psnr 19.5" in text
    # The last thing done is to erase the line.
    assert output_of(console).endswith(("\x1b[2K", "\r")), repr(output_of(console)[-40:])


@pytest.mark.parametrize("style", ["rich", "tqdm"])
def test_an_unknown_total_is_a_question_mark(style: Any) -> None:
    console = make_console()

    run_search(console, total=None, style=style)

    assert "0/?" in visible(output_of(console))
    assert "%" not in visible(output_of(console))


@pytest.mark.parametrize("style", ["rich", "tqdm", "plain"])
def test_more_trials_than_announced_are_no_error(style: Any) -> None:
    run_search(make_console(), total=1, style=style)


@pytest.mark.parametrize("style", ["auto", "rich", "tqdm", "plain"])
def test_without_a_terminal_there_are_two_plain_lines(style: Any) -> None:
    console = make_console(terminal=False)

    run_search(console, style=style)

    first, second = output_of(console).splitlines()
    assert first == "Search: up to 3 evaluations, val_psnr (max)"
    assert re.fullmatch(r"Search: 3 evaluations, best val_psnr 19\.5, \d+\.\d s", second)
    assert "\r" not in output_of(console)
    assert "\x1b" not in output_of(console)


@pytest.mark.parametrize("style", ["rich", "tqdm"])
@pytest.mark.parametrize(
    ("variable", "value", "file"),
    [("FORCE_COLOR", "1", io.StringIO), ("TTY_INTERACTIVE", "0", Terminal), ("TERM", "dumb", Terminal)],
)
def test_coloured_logs_and_dumb_terminals_get_plain_lines(
    style: Any, variable: str, value: str, file: type[io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    console = Console(file=file(), width=120)
    assert console.is_terminal

    run_search(console, style=style)

    assert len(output_of(console).splitlines()) == 2
    assert "\r" not in output_of(console)


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("style", ["auto", "rich", "tqdm", "plain"])
def test_disabled_means_silent(style: Any, terminal: bool, capfd: pytest.CaptureFixture[str]) -> None:
    console = make_console(terminal)

    run_search(console, style="none")
    run_search(None, style="none")

    assert output_of(console) == ""
    assert capfd.readouterr() == ("", "")


def test_lower_is_better_in_mode_min_and_nan_is_never_best() -> None:
    with SearchProgress(None, "val_loss", "min", style="none") as bar:
        for score in (math.nan, 0.5, 0.2, 0.3, math.nan):
            bar.advance(score)

    assert bar.best == 0.2
    assert bar.evaluations == 5


def test_the_searchs_own_best_is_shown_and_nan_means_none_yet() -> None:
    console = make_console(terminal=False)
    with SearchProgress(2, "val_psnr", "max", console=console) as bar:
        bar.advance(25.0, best=math.nan)
        assert math.isnan(bar.best)
    with SearchProgress(2, "val_psnr", "max", console=console) as bar:
        bar.advance(25.0, best=19.0)

    lines = output_of(console).splitlines()
    assert "best val_psnr -," in lines[1]
    assert "1 evaluation, best val_psnr 19," in lines[3]


@pytest.mark.parametrize("style", ["rich", "tqdm", "plain"])
def test_an_exception_passes_and_the_screen_is_tidy(style: Any) -> None:
    console = make_console()

    def search() -> None:
        with SearchProgress(3, "m", "max", style=style, console=console) as bar:
            bar.advance(1.0)
            raise KeyError("user")

    with pytest.raises(KeyError, match="user"):
        search()

    if style == "plain":
        assert "Search interrupted: 1 evaluation" in output_of(console)
    if style == "rich":
        assert output_of(console).count("\x1b[?25l") == output_of(console).count("\x1b[?25h")  # the cursor is back
    run_search(console, style=style)  # and the console is free again


def test_a_live_display_that_rich_refuses_falls_back_to_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise LiveError("Only one live display may be active at once")

    console = make_console()
    monkeypatch.setattr(console, "set_live", refuse)

    run_search(console, style="rich")

    assert len(output_of(console).splitlines()) == 2


def test_inside_somebody_elses_live_display_nothing_breaks() -> None:
    console = make_console()

    with Live("other", console=console, auto_refresh=False) as live:
        run_search(console, style="rich")
        live.update("still alive", refresh=True)

    assert "still alive" in visible(output_of(console))


@pytest.mark.parametrize(("argument", "value"), [("mode", "best"), ("style", "fancy")])
def test_an_unknown_argument_is_refused(argument: str, value: str) -> None:
    arguments: dict[str, Any] = {"mode": "max", argument: value}
    with pytest.raises(ValueError, match=f"{argument}: '{value}' is not one of "):
        SearchProgress(1, "val_psnr", **arguments)


class Tiny(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.layer(batch[0]).square().mean()
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("val_psnr", self.layer(batch[0]).mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Searches(Callback):
    """Runs a search at the start of each epoch, as a round does, and prints its result."""

    def __init__(self, enabled: bool = True, total: int | None = 3) -> None:
        self.enabled = enabled
        self.total = total
        self.displays: list[str] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        progress = SearchProgress(self.total, "val_[psnr]", "max", "auto" if self.enabled else "none", trainer=trainer)
        with progress as bar:
            self.displays.append(type(bar._display).__name__)
            for score in (18.0, 19.5, 19.0):
                bar.advance(score)
            if bar._display is not None and isinstance(trainer.progress_bar_callback, RichProgressBar):
                trainer.progress_bar_callback.refresh(hard=True)  # not to wait for its thread
        if self.enabled:
            print_round(printed_result(epoch=trainer.current_epoch))


def fit(
    tmp_path: Path, *callbacks: Callback, module: LightningModule | None = None, max_epochs: int = 2, **arguments: Any
) -> Trainer:
    trainer = Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        devices=1,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **arguments,
    )
    data: DataLoader[Any] = DataLoader(TensorDataset(torch.ones(8, 4)), batch_size=2)
    trainer.fit(module or Tiny(), data, data)
    return trainer


@pytest.mark.parametrize("search_first", [True, False])
@pytest.mark.parametrize("leave", [True, False])
@pytest.mark.parametrize("total", [3, None])
def test_with_lightnings_rich_bar_the_search_is_a_row_of_it(
    tmp_path: Path, search_first: bool, leave: bool, total: int | None
) -> None:
    terminal = Terminal()
    lightning_bar = RichProgressBar(
        leave=leave, console_kwargs={"file": terminal, "force_terminal": True, "width": 140}
    )
    searches = Searches(total=total)

    fit(tmp_path, *((searches, lightning_bar) if search_first else (lightning_bar, searches)))
    text = visible(terminal.getvalue())

    assert searches.displays == ["_RichRow", "_RichRow"]
    assert re.search(r"Search, best val_\[psnr\] 19\.5 .* 3/" + ("3" if total else "--"), text)
    assert text.count("SoftPruning, epoch") == 2
    assert re.search(r"Epoch 1/1 .* 4/4 ", text)  # Lightning's own bar goes on
    assert "loss:" in text
    assert "Search" not in text[text.rindex("Epoch 1/1") :]  # and at the end the search's row is gone
    if not leave:
        assert lightning_bar.train_progress_bar.description.startswith("Epoch 1/1")  # looked up by place in a list


def test_with_lightnings_tqdm_bar_the_search_is_one_more_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    searches = Searches()

    fit(tmp_path, searches, TQDMProgressBar())
    text = visible(terminal.getvalue())

    assert searches.displays == ["_TqdmBar", "_TqdmBar"]
    assert "\n\rSearch:" in text  # below the training bar
    assert "best val_[psnr]" in text
    assert re.search(r"Epoch 1: 100%.* 4/4 .*loss=", text)
    assert text.count("SoftPruning, epoch") == 2
    titles = [line for line in re.split(r"[\r\n]+", text) if "SoftPruning" in line]
    assert [title.strip() for title in titles] == ["SoftPruning, epoch 0", "SoftPruning, epoch 1"]  # not behind a bar


class Wide(Tiny):
    """Has something to prune."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))


@pytest.mark.slow
@pytest.mark.parametrize("finetune_epochs", [None, 0])
@pytest.mark.parametrize("pruning_first", [True, False])
@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar])
def test_with_lightnings_bars_a_round_speaks_and_the_bar_goes_on(
    tmp_path: Path,
    bar: type[ProgressBar],
    pruning_first: bool,
    finetune_epochs: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "140")
    pruning = SoftPruning(
        monitor="val_psnr",
        mode="max",
        search=UniformBaseline(),
        tolerance=0.1,
        finetune_epochs=finetune_epochs,
        report=False,
    )
    callbacks = [pruning, bar()] if pruning_first else [bar(), pruning]
    module = Wide()

    fit(tmp_path, *callbacks, module=module, max_epochs=4)
    text = visible(terminal.getvalue())

    assert pruning.results[0].applied
    assert module.layer[0].out_features < 16
    assert text.count("SoftPruning, epoch 1") == 1
    assert "layer.0" in text
    last = 3 if finetune_epochs is None else 0
    lightning_bar = rf"Epoch {last}: 100%.* 4/4 " if bar is TQDMProgressBar else rf"Epoch {last}/3 .* 4/4 "
    assert re.search(lightning_bar, text)
    begin, end = text.split("SoftPruning, epoch 1")
    assert re.search(r"Search.*best val_psnr", begin)
    assert "Search" not in end
    assert ("Epoch 3" in end) == (finetune_epochs is None)


@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar])
def test_with_lightnings_bars_in_a_log_the_search_is_two_lines_per_round(
    tmp_path: Path, bar: type[ProgressBar], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stdout", log)
    searches = Searches()

    fit(tmp_path, searches, bar())

    assert searches.displays == ["_PlainLines", "_PlainLines"]
    lines = [line.strip() for line in re.split(r"[\r\n]+", log.getvalue()) if "Search" in line and "Gra" not in line]
    assert len(lines) == 4
    assert lines[0] == lines[2] == "Search: up to 3 evaluations, val_[psnr] (max)"
    assert lines[1].startswith("Search: 3 evaluations, best val_[psnr] 19.5, ")


@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar])
def test_a_silent_search_leaves_lightnings_bars_alone(
    tmp_path: Path, bar: type[ProgressBar], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)

    fit(tmp_path, Searches(enabled=False), bar())

    assert "Search" not in terminal.getvalue()
    assert "Epoch 1" in terminal.getvalue()


@pytest.mark.parametrize(
    ("bar", "style"),
    [
        (RichProgressBar(), "rich"),
        (TQDMProgressBar(), "tqdm"),
        (RichProgressBar(refresh_rate=0), "plain"),
        (TQDMProgressBar(refresh_rate=0), "plain"),
        (ProgressBar(), "plain"),
    ],
)
def test_the_style_is_that_of_the_trainers_bar(tmp_path: Path, bar: Callback, style: str) -> None:
    trainer = Trainer(callbacks=[bar], logger=False, accelerator="cpu", default_root_dir=tmp_path)

    assert progress_style(trainer) == style


def test_a_trainer_without_bar_gets_plain_lines(tmp_path: Path) -> None:
    trainer = Trainer(enable_progress_bar=False, logger=False, accelerator="cpu", default_root_dir=tmp_path)
    console = make_console()

    run_search(console, trainer=trainer)

    assert progress_style(trainer) == "plain"
    assert len(output_of(console).splitlines()) == 2


def test_a_log_file_gets_a_line_every_half_minute_with_count_best_and_time_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter([0.0, 20.0, 40.0, 60.0, 61.0])
    monkeypatch.setattr("lightning_softprune.report.progress.time.perf_counter", lambda: next(clock))
    console = make_console(terminal=False)
    with SearchProgress(4, "val_psnr", "max", style="plain", console=console) as bar:
        bar.advance(18.0)
        bar.advance(19.5)
        bar.advance(19.0)
    assert output_of(console).splitlines()[1:-1] == [
        "Search: 2 of up to 4 evaluations, best val_psnr 19.5, 40 s, up to 40 s left"
    ]


def test_phases_have_bars_of_their_own_on_a_terminal_and_no_lines_elsewhere() -> None:
    for terminal in (True, False):
        console = make_console() if terminal else make_console(terminal=False)
        phases = Phases("rich")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("rich.get_console", lambda console=console: console)
            with phases("tracing"):
                pass
        assert ("SoftPruning, tracing" in visible(output_of(console))) == terminal
        assert list(phases.seconds) == ["tracing"]


def test_a_phase_has_a_line_in_a_log_where_half_a_minute_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("lightning_softprune.report.progress.time.perf_counter", lambda: now)
    console = make_console(terminal=False)
    monkeypatch.setattr("rich.get_console", lambda: console)
    phases = Phases("plain")

    def work(*done: Callable[[], None]) -> None:
        nonlocal now
        for step in done:
            now += 10.0
            step()

    tick = phases.tick
    with phases("baseline"):
        work(tick, tick)
    with phases("tracing"):
        work(tick, tick)  # half a minute is over with the first
    with phases.timed("searching"):
        work(tick, tick, tick, tick)  # has lines of its own
    with phases("timing"):
        work(tick, tick)
    with phases.counted("healing", 4) as advance:
        work(tick, lambda: advance(0.5), lambda: advance(0.4), tick, tick)
    assert output_of(console).splitlines() == [
        "SoftPruning, tracing: 30 s since the round began",
        "SoftPruning, healing: 0 of 4, 110 s since the round began",
        "SoftPruning, healing: 2 of 4, 140 s since the round began",
    ]
    work(tick)  # after the phases there is nothing to say
    assert len(output_of(console).splitlines()) == 3


def test_what_is_said_before_a_search_is_one_line_above_it() -> None:
    console = make_console(terminal=False)
    bar = SearchProgress(2, "val_psnr", "max", style="plain", console=console)
    bar.say("SoftPruning: 2 groups")
    with bar:
        bar.advance(1.0)
    assert output_of(console).splitlines()[:2] == [
        "SoftPruning: 2 groups",
        "Search: up to 2 evaluations, val_psnr (max)",
    ]
