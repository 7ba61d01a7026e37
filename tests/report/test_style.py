"""Colours of the page."""

import importlib.resources
import re

import pytest


def colours(scheme: str) -> dict[str, str]:
    css = importlib.resources.files("lightning_softprune.report").joinpath("page.css").read_text(encoding="utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", css, flags=re.S)
    block = light if scheme == "light" else dark
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6,8});", block))


def contrast(first: str, second: str) -> float:
    """The contrast ratio of two colours (WCAG 2.2, "contrast ratio" and "relative luminance")."""

    def luminance(colour: str) -> float:
        channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


def test_contrast_of_black_and_white_is_the_standards() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_marks_have_enough_contrast(scheme: str) -> None:
    colour = colours(scheme)

    for text in ("ink", "muted", "accent", "good", "bad"):
        for background in ("page", "card"):
            assert contrast(colour[text], colour[background]) >= 4.5, (text, background)
    for background in ("warn", "info"):
        assert contrast(colour["ink"], colour[background]) >= 4.5, background
    for mark in ("edge", "accent", *(f"c{number}" for number in range(7))):
        assert contrast(colour[mark], colour["card"]) >= 3.0, mark
    for bar in (f"c{number}" for number in range(7)):
        assert contrast(colour[bar], colour["track"]) >= 3.0, bar


def test_both_schemes_define_the_same_colours() -> None:
    assert colours("light").keys() == colours("dark").keys()
