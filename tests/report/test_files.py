import json
import math
import os
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_softprune.report.files import (
    claim_folder,
    read_result,
    rebuild_files,
    round_folder,
    round_folders,
    write_files,
)
from lightning_softprune.report.page import report_page
from lightning_softprune.report.series import log_values, trial_rows
from lightning_softprune.results import Healing
from support.results import read_csv, recorded_result


def test_round_folder_is_named_by_its_epoch(tmp_path: Path) -> None:
    assert round_folder(tmp_path, 12) == tmp_path / "softprune" / "epoch=12"


def test_files_are_written_into_a_new_folder_and_nothing_else_is_left(tmp_path: Path) -> None:
    folder = round_folder(tmp_path, 4)

    paths = write_files(recorded_result(), folder)

    assert [path.name for path in paths] == ["result.json", "trials.csv", "report.html"]
    assert {path.parent for path in paths} == {folder}
    assert sorted(folder.iterdir()) == sorted(paths)


def test_the_result_read_is_the_result_written(tmp_path: Path) -> None:
    result = recorded_result(trials=recorded_result().trials[:2])
    write_files(result, tmp_path)

    assert read_result(tmp_path / "result.json") == result


def test_the_json_file_is_valid_json_in_spite_of_nan(tmp_path: Path) -> None:
    write_files(recorded_result(), tmp_path)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    data = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert data["trials"][2]["score"] == "nan"
    assert math.isnan(read_result(tmp_path / "result.json").trials[2].score)


def test_the_csv_has_one_row_per_trial_with_every_value(tmp_path: Path) -> None:
    write_files(recorded_result(), tmp_path)

    rows = read_csv(tmp_path / "trials.csv")

    assert rows[0] == {
        "trial": "0",
        "sparsity": "0.7",
        "score": "19.7",
        "feasible": "True",
        "pareto": "True",
        "seconds": "0.5",
        "share": "1.0",
        "stage": "search",
        "metric/val_psnr": "19.7",
        "metric/val_loss": "0.1",
        "coefficient/encoder.0": "0.7",
        "coefficient/encoder.4": "0.25",
    }
    assert [row["pareto"] for row in rows] == ["True", "False", "False"]
    assert [row["feasible"] for row in rows] == ["True", "False", "False"]
    assert float(rows[1]["coefficient/encoder.4"]) == 1 / 3
    assert rows[1]["metric/val_loss"] == ""
    assert rows[2]["score"] == "nan"
    assert rows[2]["metric/val_loss"] == "inf"


def test_the_page_beside_them_is_of_this_round(tmp_path: Path) -> None:
    write_files(recorded_result(), tmp_path)

    assert (tmp_path / "report.html").read_text(encoding="utf-8") == report_page(recorded_result())


def test_a_name_that_utf8_cannot_write_is_no_reason_to_lose_the_page(tmp_path: Path) -> None:
    result = replace(recorded_result(), trials=(), stop_reason="\udcff")

    write_files(result, tmp_path)

    assert read_result(tmp_path / "result.json").stop_reason == "\udcff"


def test_names_with_commas_quotes_and_line_breaks_survive_the_csv(tmp_path: Path) -> None:
    names = ('a,b "quoted"', "ü\nsecond; line")
    result = recorded_result(names)
    result = replace(result, trials=(replace(result.trials[0], metrics={'m,"x"': 1.5}),))
    write_files(result, tmp_path)

    (row,) = read_csv(tmp_path / "trials.csv")

    assert row[f"coefficient/{names[0]}"] == "0.7"
    assert row[f"coefficient/{names[1]}"] == "0.25"
    assert row['metric/m,"x"'] == "1.5"
    assert len(row) == 11


def test_a_round_without_trials_still_has_a_header(tmp_path: Path) -> None:
    write_files(recorded_result(trials=()), tmp_path)

    assert (tmp_path / "trials.csv").read_text().splitlines() == [
        "trial,sparsity,score,feasible,pareto,seconds,share,stage,coefficient/encoder.0,coefficient/encoder.4"
    ]


def test_trial_rows_are_as_wide_as_their_header() -> None:
    header, rows = trial_rows(recorded_result())

    assert [len(row) for row in rows] == [len(header)] * 3


def test_writing_again_replaces_the_files(tmp_path: Path) -> None:
    write_files(recorded_result(), tmp_path)
    write_files(recorded_result(epoch=5, trials=()), tmp_path)

    assert read_result(tmp_path / "result.json").epoch == 5
    assert read_csv(tmp_path / "trials.csv") == []


def test_a_write_that_fails_leaves_the_old_file_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(recorded_result(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_files(recorded_result(epoch=99), tmp_path)

    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_files_get_the_permissions_that_the_umask_gives(tmp_path: Path) -> None:
    ordinary = tmp_path / "ordinary"
    ordinary.touch()

    for path in write_files(recorded_result(), tmp_path / "files"):
        assert path.stat().st_mode == ordinary.stat().st_mode


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"not json",
        b"[1, 2]",
        b'{"epoch": 3}',
        b"\x89PNG\r\n\x1a\n\xff",
        b"[" * 100_000,
        b"\x00" * 10,
        b'{"epoch": ' + b"9" * 5000 + b"}",
    ],
)
def test_a_corrupt_or_foreign_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(content)

    with pytest.raises(ValueError, match=r"result\.json: cannot be read as a pruning result"):
        read_result(path)


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    path = write_files(recorded_result(), tmp_path)[0]
    content = path.read_bytes().rstrip()
    for length in range(0, len(content), 97):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="cannot be read"):
            read_result(path)


def test_a_missing_file_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"result\.json"):
        read_result(tmp_path / "result.json")


def test_round_folders_are_found_run_by_run_in_order_of_their_epochs(tmp_path: Path) -> None:
    folders = [round_folder(tmp_path / run, epoch) for run in ("a", "b") for epoch in (2, 9, 10)]
    for folder in reversed(folders):
        write_files(recorded_result(), folder)
    (tmp_path / "epoch=3").mkdir()
    (tmp_path / "other").mkdir()
    write_files(recorded_result(), tmp_path / "other")  # not a round's folder by its name

    assert round_folders(tmp_path) == folders
    assert round_folders(folders[0].parent) == folders[:3]
    assert round_folders(folders[0]) == folders[:1]
    assert round_folders(tmp_path / "other") == [tmp_path / "other"]
    assert round_folders(tmp_path / "epoch=3") == []


def test_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone"):
        round_folders(tmp_path / "gone")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        round_folders(tmp_path / "file")


def test_files_are_built_anew_from_the_result(tmp_path: Path) -> None:
    paths = write_files(recorded_result(), tmp_path)
    before = [path.read_bytes() for path in paths]
    time = paths[0].stat().st_mtime_ns
    for path in paths[1:]:
        path.unlink()

    assert rebuild_files(tmp_path) == paths[1:]

    assert [path.read_bytes() for path in paths] == before
    assert paths[0].stat().st_mtime_ns == time


def test_log_values_are_the_scalars_of_the_contract() -> None:
    values = log_values(recorded_result())

    assert values == {
        "softprune/sparsity": 0.7,
        "softprune/params": 300.0,
        "softprune/macs": 700.0,
        "softprune/score": 19.7,
        "softprune/evaluations": 4.0,
        "softprune/coefficient/encoder.0": 0.7,
        "softprune/coefficient/encoder.4": 0.25,
    }
    assert {type(value) for value in values.values()} == {float}
    healed = log_values(recorded_result(score_compensated=19.4, healing=Healing(19.7, True, (0.5,))))
    assert healed == {**values, "softprune/score_compensated": 19.4}


NUMBERS = ["1" + "0" * 400, "-1" + "0" * 400, "1e400", "-1e999", "9" * 5000, "9" * 5000 + ".5", '"1e400"', "1" * 20]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: f"{number:.8}{len(number)}")
@pytest.mark.parametrize(
    "field", ["costs_after.params", "trials.0.score", "trials.1.coefficients.0", "epoch", "limits"]
)
def test_a_number_that_nothing_can_hold_is_refused(tmp_path: Path, field: str, number: str) -> None:
    path = write_files(recorded_result(), tmp_path)[0]
    data = json.loads(path.read_text())
    *parents, last = field.split(".")
    place = data
    for key in parents:
        place = place[int(key)] if isinstance(place, list) else place[key]
    place[int(last) if isinstance(place, list) else last] = {"macs": "HERE"} if field == "limits" else "HERE"
    path.write_text(json.dumps(data).replace('"HERE"', number))

    if number == "1" * 20 and field.split(".")[-1] in ("score", "0", "limits"):
        read_result(path)  # a float holds it
        return
    with pytest.raises(ValueError, match=r"result\.json: cannot be read as a pruning result") as raised:
        read_result(path)
    assert len(str(raised.value)) < 400 + len(str(path))


@pytest.mark.skipif(os.name != "posix", reason="links are POSIX's")
def test_a_link_in_the_place_of_a_rounds_folder_is_not_written_through(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "epoch=5").mkdir(parents=True)
    (elsewhere / "epoch=5" / "result.json").write_text("precious")
    (tmp_path / "a" / "softprune").mkdir(parents=True)
    (tmp_path / "a" / "softprune" / "epoch=4").symlink_to(elsewhere / "epoch=5")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "softprune").symlink_to(elsewhere)

    for run, epoch in (("a", 4), ("b", 5), ("b", 6)):
        with pytest.raises(OSError, match="a link, which is not followed"):
            write_files(recorded_result(), round_folder(tmp_path / run, epoch))

    assert [path.name for path in elsewhere.rglob("*")] == ["epoch=5", "result.json"]
    assert (elsewhere / "epoch=5" / "result.json").read_text() == "precious"
    (tmp_path / "latest").symlink_to(tmp_path / "c")  # a link to a whole run is the user's own
    (tmp_path / "c").mkdir()
    assert len(write_files(recorded_result(), round_folder(tmp_path / "latest", 4))) == 3


def test_folders_nested_more_deeply_than_calls_can_be_are_searched(tmp_path: Path) -> None:
    here, before = tmp_path, Path.cwd()
    try:
        for _ in range(8):
            os.chdir(here)
            part = Path(*["d"] * 200)
            part.mkdir(parents=True)
            here = part
        os.chdir(tmp_path)
        assert round_folders(tmp_path) == []
    finally:
        os.chdir(before)
        subprocess.run(["rm", "-rf", str(tmp_path / "d")], check=True)  # more deeply nested than pytest can remove


def test_runs_that_start_at_one_moment_have_places_of_their_own(tmp_path: Path) -> None:
    together = threading.Barrier(8)

    def claim(identity: str) -> Path:
        together.wait()
        return claim_folder(tmp_path, 3, identity)

    with ThreadPoolExecutor(8) as pool:
        places = list(pool.map(claim, "abcdefgh"))

    versions = [tmp_path / "softprune" / f"version_{number}" / "epoch=3" for number in range(1, 8)]
    assert sorted(places) == sorted([round_folder(tmp_path, 3), *versions])
    assert [claim_folder(tmp_path, 5, identity).parent for identity in "abcdefgh"] == [path.parent for path in places]
