import importlib.util
import math
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_softprune.report import figures
from lightning_softprune.report.figures import MAX_GROUPS, channels_figure, log_figures, score_figure
from support.modules import fit, made, softpruning
from support.results import RESULTS, full_result, large_result

pytestmark = pytest.mark.slow

NAMES = ["softprune/score_against_sparsity", "softprune/channels_kept"]


class ImageLogger(CSVLogger):
    """A logger with WandbLogger's method for images."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.images: list[tuple[str, Any, int | None]] = []

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        self.images += [(key, image, step) for image in images]


class Board(TensorBoardLogger):
    """TensorBoard, as far as figures go."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.figures: list[tuple[str, Any, int]] = []

    @property
    def experiment(self) -> Any:
        return self

    def add_figure(self, tag: str, figure: Any, global_step: int) -> None:
        self.figures.append((tag, figure, global_step))


class Failing(ImageLogger):
    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        raise ConnectionError("the server is away")


@pytest.fixture(autouse=True)
def _matplotlib_is_looked_for_again() -> Iterator[None]:
    figures._has_matplotlib.cache_clear()
    yield
    figures._has_matplotlib.cache_clear()


def labels(figure: Any) -> list[str]:
    (axes,) = figure.axes
    return list(axes.get_legend_handles_labels()[1])


def test_a_logger_with_log_image_gets_pixels(tmp_path: Path) -> None:
    logger = ImageLogger(tmp_path)

    log_figures(full_result(), [logger], step=7)

    assert [(name, step) for name, _, step in logger.images] == [(name, 7) for name in NAMES]
    for _, pixels, _ in logger.images:
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3
        assert pixels.shape[2] == 3
        assert len(np.unique(pixels)) > 10


def test_tensorboard_gets_figures(tmp_path: Path) -> None:
    logger = Board(tmp_path)

    log_figures(full_result(), [logger], step=7)

    assert [(name, step) for name, _, step in logger.figures] == [(name, 7) for name in NAMES]
    assert len(logger.figures[0][1].axes) == 1


def test_a_real_tensorboard_file_holds_them(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)

    log_figures(full_result(), [logger], step=7)
    logger.finalize("success")

    (events,) = Path(logger.log_dir).glob("events.*")
    content = events.read_bytes()
    assert all(name.encode() in content for name in NAMES)
    assert b"PNG" in content


def test_without_a_logger_for_pictures_nothing_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    log_figures(full_result(), [CSVLogger(tmp_path)], step=0)
    log_figures(full_result(), [], step=0)


def test_without_matplotlib_there_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    logger = ImageLogger(tmp_path)

    with pytest.warns(UserWarning, match=r"matplotlib is missing.*\[report\]"):
        log_figures(full_result(), [logger], step=0)
    log_figures(full_result(), [logger], step=1)  # a second warning would be an error

    assert logger.images == []


def test_a_logger_that_fails_is_named_and_the_next_one_gets_its_figures(tmp_path: Path) -> None:
    after = ImageLogger(tmp_path)

    with pytest.warns(UserWarning, match=r"no figures for Failing: ConnectionError: the server is away"):
        log_figures(full_result(), [Failing(tmp_path), after], step=0)

    assert len(after.images) == 2


@pytest.mark.parametrize("name", RESULTS)
def test_every_result_can_be_drawn(tmp_path: Path, name: str) -> None:
    logger = ImageLogger(tmp_path)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log_figures(RESULTS[name], [logger], step=0)

    assert [name for name, _, _ in logger.images] == NAMES


def test_names_are_not_taken_for_formulas(tmp_path: Path) -> None:
    result = full_result(monitor="$x_{")
    groups = (replace(result.groups[0], name="a$b$c^{"), result.groups[1])
    logger = ImageLogger(tmp_path)

    log_figures(replace(result, groups=groups), [logger], step=0)

    assert len(logger.images) == 2


def test_score_against_sparsity_shows_trials_front_and_band() -> None:
    figure = score_figure(full_result())

    assert labels(figure) == [
        *(
            "target sparsity and tolerance",
            "before pruning",
            "not feasible",
            "feasible trial",
            "Pareto front",
            "chosen",
        ),
    ]
    (axes,) = figure.axes
    points = [tuple(point) for collection in axes.collections for point in collection.get_offsets().tolist()]
    assert points == [(0.35, 19.9), (0.7, 19.7), (0.69, 19.5), (0.7, 19.7)]
    band = axes.patches[0]
    assert band.get_x() == pytest.approx(0.6875)
    assert band.get_width() == pytest.approx(0.025)
    front = axes.lines[-1]
    assert list(front.get_xdata()) == [0.35, 0.7]
    assert axes.get_ylabel() == "val_psnr"


def test_without_a_target_or_a_choice_the_rest_is_shown() -> None:
    assert labels(score_figure(full_result(target_sparsity=None, chosen=None, score_before=math.nan))) == [
        *("not feasible", "feasible trial", "Pareto front"),
    ]


def test_channels_kept_has_a_bar_per_group() -> None:
    (axes,) = channels_figure(full_result()).axes

    assert [label.get_text() for label in axes.get_yticklabels()] == ["encoder.0", "encoder.4"]
    assert [text.get_text() for text in axes.texts] == ["154 of 512", "24 of 32"]
    assert [bar.get_width() for bar in axes.patches] == [1.0, 1.0, 154 / 512, 0.75]
    assert axes.patches[-1].get_hatch()


def test_of_very_many_groups_those_that_lost_most_are_shown() -> None:
    result = large_result(0, 200)
    groups = tuple(replace(group, channels_after=512 - index) for index, group in enumerate(result.groups))

    (axes,) = channels_figure(replace(result, groups=groups)).axes

    assert len(axes.texts) == MAX_GROUPS
    assert axes.texts[0].get_text() == "392 of 512"
    assert "80 of 200 groups" in axes.get_title(loc="left")


def test_a_fit_gives_each_round_to_the_logger_at_its_step(tmp_path: Path) -> None:
    logger = ImageLogger(tmp_path)

    fit(tmp_path, made(), softpruning(epochs=[1, 2], report=True), logger=logger)

    assert [(name, step) for name, _, step in logger.images] == [(name, step) for step in (4, 8) for name in NAMES]


def test_a_logger_that_fails_does_not_end_the_fit(tmp_path: Path) -> None:
    callback = softpruning(report=True)

    with pytest.warns(UserWarning, match="no figures for Failing"):
        trainer = fit(tmp_path, made(), callback, logger=Failing(tmp_path))

    assert callback.results[0].applied
    assert trainer.state.finished


def test_report_false_draws_nothing(tmp_path: Path) -> None:
    logger = ImageLogger(tmp_path)

    fit(tmp_path, made(), softpruning(report=False), logger=logger)

    assert logger.images == []
