"""Tables in the terminal."""

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lightning_softprune.report.progress import SearchProgress
from lightning_softprune.report.tables import groups_table, print_round, print_rounds
from lightning_softprune.results import DRY_RUN, GroupResult, LeftOut
from support.consoles import make_console, output_of, visible
from support.results import printed_result

pytestmark = pytest.mark.usefixtures("ordinary_terminal")


def row_with(text: str, name: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"{name} "))
    return re.split(r"\s{2,}", line.strip())


def test_the_table_shows_each_group_before_and_after() -> None:
    console = make_console(terminal=False)
    print_round(printed_result(), console)
    text = output_of(console)

    assert row_with(text, "encoder[red].0")[:-1] == ["encoder[red].0", "encoder", "intra", "512 -> 154", "0.699"]
    assert row_with(text, "encoder[red].0")[-1] == "━━━"  # 154 of 512 in ten
    assert row_with(text, "encoder.4") == ["encoder.4", "encoder", "inter", "32 -> 32", "0.000", "━" * 10]
    assert row_with(text, "parameters") == ["parameters", "1.08 M -> 322 K", "-70.2 %"]
    assert row_with(text, "MACs") == ["MACs", "2.00 M -> 500 K", "-75.0 %"]
    assert row_with(text, "val_psnr") == ["val_psnr", "19.97 -> 19.71"]
    assert row_with(text, "sparsity") == ["sparsity", "0.7016", "target 0.7"]


def test_the_table_says_when_nothing_was_applied_and_why() -> None:
    console = make_console(terminal=False)
    print_round(printed_result(applied=False, reason="dry run", target_sparsity=None, groups=()), console)

    assert "SoftPruning, epoch 10 (not applied: dry run)" in output_of(console)
    assert "target" not in output_of(console)


COVERAGE = "87 % of the parameters are in prunable groups; largest left out: head[red] (it is the output)"


def test_the_coverage_is_one_line_above_the_summary() -> None:
    console = make_console(terminal=False)
    print_round(printed_result(coverage=COVERAGE), console)
    lines = output_of(console).splitlines()
    assert lines[lines.index(COVERAGE) + 1].startswith("epoch 10: ")


def test_a_result_without_coverage_prints_no_line_of_it() -> None:
    console = make_console(terminal=False)
    print_round(printed_result(), console)
    assert "prunable groups" not in output_of(console)


LEFT_OUT = (
    LeftOut("decoder.4", "decoder", 64, "its outputs are the module's outputs"),
    LeftOut("scale[red]", "", 0, "a parameter that validation never runs"),
)


def test_a_dry_run_shows_bounds_costs_and_what_is_left_out() -> None:
    console = make_console(terminal=False)
    groups = (
        GroupResult("encoder.0", "encoder", "intra", 512, 154, 0.6993, 0.05, 0.998, 1_079_344, 4321),
        GroupResult("encoder.4", "encoder", "inter", 32, 32, 0.0),
    )
    print_round(printed_result(applied=False, reason=DRY_RUN, groups=groups, left_out=LEFT_OUT), console)
    text = output_of(console)

    assert "SoftPruning, epoch 10 (not applied: this was a dry run)" in text
    first, second = text.split("One group alone")
    assert row_with(first, "encoder.0")[3:] == ["512 -> 154", "0.699", "━━━"]
    assert row_with(second, "group")[1:] == ["lowest", "highest", "parameters", "MACs"]
    assert row_with(second, "encoder.0")[1:] == ["0.050", "0.998", "-1.08 M", "-4.32 K"]
    assert row_with(second, "encoder.4")[1:] == ["0.000", "1.000", "0", "0"]
    assert row_with(text, "parameters") == ["parameters", "1.08 M -> 322 K", "-70.2 %"]
    assert row_with(text, "decoder.4") == ["decoder.4", "decoder", "64", "its outputs are the module's outputs"]
    assert row_with(text, "scale[red]") == ["scale[red]", "a parameter that validation never runs"]
    assert text.index("sparsity") < text.index("One group") < text.index("Left out") < text.index("scale[red]")
    assert text.splitlines()[-2].startswith("epoch 10, not applied (this was a dry run)")


@pytest.mark.parametrize("changes", [{}, {"applied": False, "reason": "nothing is feasible"}])
def test_other_rounds_have_neither(changes: dict[str, Any]) -> None:
    console = make_console(terminal=False)
    print_round(printed_result(left_out=LEFT_OUT, **changes), console)

    assert "Left out" not in output_of(console)
    assert "bounds" not in output_of(console)


def test_a_dry_run_that_leaves_nothing_out_has_no_list() -> None:
    console = make_console(terminal=False)
    print_round(printed_result(applied=False, reason=DRY_RUN), console)

    assert "Left out" not in output_of(console)


def test_latency_limits_and_constraints_are_shown_if_there_are_any() -> None:
    console = make_console(terminal=False)
    print_round(
        printed_result(
            latency_before=0.00123,
            latency_after=0.00071,
            limits={"macs": 0.5, "latency": 0.75},
            shares={"macs": 0.3, "latency": 0.8},
            constraints=("val_psnr >= 19.5",),
        ),
        console,
    )
    text = output_of(console)

    assert row_with(text, "latency  ") == ["latency", "1.23 ms -> 0.71 ms", "-42.3 %"]
    assert row_with(text, "macs <= 0.5 of dense") == ["macs <= 0.5 of dense", "0.3 of dense", "met"]
    assert row_with(text, "latency <= 0.75 of dense") == ["latency <= 0.75 of dense", "0.8 of dense", "not met"]
    assert row_with(text, "val_psnr >= 19.5")[0] == "val_psnr >= 19.5"
    plain = make_console(terminal=False)
    print_round(printed_result(), plain)
    assert not re.search("latency|of dense", output_of(plain))


def test_the_three_costs_are_told_against_dense_with_what_latency_was_measured_on() -> None:
    console = make_console(terminal=False)
    shares = {"params": 0.3, "macs": 0.25, "latency": 0.92}
    print_round(printed_result(shares=shares, device="cpu (2 threads)", latency_batch=64), console)
    *_, dense, knobs = output_of(console).splitlines()

    costs = "parameters -70.0 %, MACs -75.0 %, latency -8.0 %"
    assert dense == f"Against dense: {costs} (cpu (2 threads), batch of 64)"
    assert knobs.startswith("70% fewer parameters were asked for, and latency falls by 8%: ")
    assert knobs.endswith('ask for it with cost="macs", limits={"latency": 0.65} or round_to=8')


def test_rounds_are_told_with_the_history_of_each_group() -> None:
    console = make_console(terminal=False)
    first, second = printed_result(), printed_result(epoch=12, strategy="RandomSearch", stop_reason="exhausted")
    second = replace(second, groups=tuple(replace(g, channels_before=154, channels_after=100) for g in second.groups))
    skipped = printed_result(epoch=14, applied=False, reason="nothing is feasible", groups=())

    print_rounds([first, second, skipped], console)
    text = output_of(console)

    assert row_with(text, "encoder[red].0")[-1] == "512 -> 154 -> 100"
    lines = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    assert [line[0] for line in lines if line[0].isdigit()] == ["10", "12", "14"]
    assert "RandomSearch: exhausted" in text
    assert "no: nothing is feasible" in text
    assert ["10", "0.7016", "1,079,344 -> 322,102", "2,000,000 -> 500,000", "19.97 -> 19.71"] in [x[:5] for x in lines]
    assert "1,079,344 -> 322,102" in text


def test_on_a_terminal_the_table_is_no_wider_than_the_screen() -> None:
    console = make_console(width=80)
    console.print(groups_table(printed_result()))

    lines = visible(output_of(console)).splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("encoder[red].0" in line for line in lines) == 1  # and nothing had to be folded


@pytest.mark.parametrize(("width", "left_out"), [(80, set()), (60, {"component", "kind"})])
def test_where_the_screen_is_narrow_columns_are_left_out_and_no_number_is_broken(
    width: int, left_out: set[str]
) -> None:
    console = make_console(width=width)
    result = printed_result(latency_before=0.00123, latency_after=0.00071, latency_spread=0.031, score_finetuned=19.99)
    print_round(result, console)
    print_rounds([result, replace(result, epoch=12)], console)
    text = visible(output_of(console))
    tables = text[: text.index("epoch 10:")] + text[text.index("Rounds") :]

    assert max(map(len, tables.splitlines())) <= width
    head = tables.splitlines()[1].split()
    assert {"group", "component", "kind", "channels", "coefficient", "kept"} - set(head) == left_out
    for number in ("512 -> 154", "1.08 M -> 322 K", "1.23 ms -> 0.71 ms", "19.97 -> 19.71", "1,079,344 -> 322,102"):
        assert number in tables
    assert "…" not in tables


@pytest.mark.parametrize("width", [10, 40, 80])
@pytest.mark.parametrize("terminal", [True, False])
def test_narrow_and_ascii_only_screens_are_no_error(width: int, terminal: bool) -> None:
    buffer = io.BytesIO()
    console = Console(file=io.TextIOWrapper(buffer, encoding="ascii"), width=width, force_terminal=terminal)

    with SearchProgress(3, "präzision", "max", style="plain", console=console) as bar:
        bar.advance(1.0)
    print_round(printed_result(monitor="präzision", reason="…"), console)
    console.file.flush()

    text = visible(buffer.getvalue().decode("ascii"))
    assert "best pr?zision 1," in text
    assert "pr?zision 19.97 -> 19.71" in text
    assert terminal or row_with(text, "encoder.4")[-1].endswith("-" * 10)


@pytest.mark.parametrize("width", [10, 40, 80])
def test_the_other_tables_fit_narrow_and_ascii_only_screens_too(width: int) -> None:
    buffer = io.BytesIO()
    console = Console(file=io.TextIOWrapper(buffer, encoding="ascii"), width=width, force_terminal=True)
    left_out = (replace(LEFT_OUT[0], name="größe", reason="x" * 200), LEFT_OUT[1])

    print_round(printed_result(applied=False, reason=DRY_RUN, left_out=left_out, constraints=("ü > 1",)), console)
    console.file.flush()
    lines = visible(buffer.getvalue().decode("ascii")).splitlines()
    lines = [line for line in lines if not line.startswith("epoch 10")]  # the summary is one line
    print_rounds([printed_result(monitor="präzision", reason="…")], console)
    console.file.flush()
    lines += visible(buffer.getvalue().decode("ascii")).splitlines()[len(lines) + 1 :]

    assert width < 80 or max(map(len, lines)) <= width
    assert width < 80 or any("gr??e" in line for line in lines)


def test_in_a_log_neither_table_nor_summary_is_folded() -> None:
    console = make_console(terminal=False, width=60)
    long_name = "encoder." + "block." * 12 + "0"
    result = printed_result()
    result = replace(result, groups=(replace(result.groups[0], name=long_name),))

    print_round(result, console)

    assert result.summary in output_of(console).splitlines()
    assert row_with(output_of(console), long_name)[-2:] == ["0.699", "━━━"]


def test_where_the_report_is_is_said(tmp_path: Path) -> None:
    console = make_console(terminal=False)
    print_round(printed_result(), console, folder=tmp_path)
    assert output_of(console).splitlines()[-1] == f"Report: {tmp_path / 'report.html'}"
