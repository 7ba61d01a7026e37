"""The page that compares rounds and runs."""

import math
from dataclasses import replace

from lightning_softprune.report.index import index_page
from lightning_softprune.results import Costs, Origin
from support.pages import Page
from support.results import RESULTS, full_result


def a_round(params, score, latency, **changes):
    costs = Costs(params, 2 * params)
    how = {"latency_after": latency, "device": "cpu (2 threads)", "latency_batch": 64, "score_finetuned": score}
    return full_result(costs_after=costs, **{**how, **changes})


def cells(page, head):
    """One column of the only table."""
    (table,) = page.tables
    place = table[0].index(head)
    return [row[place] for row in table[1:]]


def test_rounds_are_compared_by_their_score_in_the_end_against_size_and_latency():
    rounds = [
        ("a/softprune/epoch=4", a_round(300, 20.0, 0.004)),
        ("b/softprune/epoch=4", a_round(200, 19.0, 0.005)),
        ("c/softprune/epoch=4", a_round(400, 19.5, 0.006, score_finetuned=None, score_after=19.5)),
        ("d/softprune/epoch=4", a_round(100, 25.0, 0.001, applied=False, outcome="skipped", reason="none")),
    ]
    page = Page(index_page("runs", rounds))

    assert cells(page, "front") == ["size, latency", "size", "", ""]
    assert cells(page, "round") == [folder for folder, _ in rounds]
    assert cells(page, "fine-tuned") == ["20", "19", "", "25"]
    assert cells(page, "latency in ms") == ["4", "5", "6", "1"]
    links = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    assert links == [f"{folder.replace('=', '%3D')}/report.html" for folder, _ in rounds]
    assert page.count("circle", "feasible") == 2 * (2 + 0) + 2  # two charts, and their legends
    assert page.count("circle", "infeasible") == 2 * 1 + 2
    assert "latency in ms (cpu (2 threads), batch of 64)" in page.text
    assert "4 rounds" in page.text


def test_latencies_of_different_devices_are_compared_as_shares_and_metrics_apart():
    rounds = [("a", a_round(300, 20.0, 0.004)), ("b", a_round(200, 19.0, 0.005, device="cuda:0 (H100)"))]
    page = Page(index_page("runs", rounds))
    assert "latency, fraction of dense" in page.text
    rounds[1] = ("b", replace(rounds[1][1], monitor="val_loss", mode="min"))
    assert len(Page(index_page("runs", rounds)).tables) == 2


def test_a_latency_whose_spread_supports_no_change_has_no_sign():
    shares = {"latency": 0.97}
    rounds = [(str(spread), a_round(300, 20.0, 0.004, shares=shares, latency_spread=spread)) for spread in (0.05, 0.01)]
    assert cells(Page(index_page("runs", rounds)), "of dense") == ["about the same", "-3.0 %"]


def test_the_page_is_well_formed_whatever_was_found():
    rounds = [(name, replace(result, origin=Origin(name, name, name))) for name, result in RESULTS.items()]
    text = index_page("<b>", [*rounds, ("nan", a_round(1, math.nan, 0.1))])
    page = Page(text)
    text.encode()
    assert page.count("script") == 1
    assert "nan" not in {attributes.get(key) for _, attributes in page.elements for key in ("cx", "cy", "x", "y")}
