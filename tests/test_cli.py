import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_softprune
from lightning_softprune import report, search
from lightning_softprune.cli import COSTS, INDEX_FILE, RESULT_FILE, main
from lightning_softprune.report.files import round_folder, write_files
from lightning_softprune.report.page import report_page
from lightning_softprune.results import PruningResult
from support.modules import fit, made, softpruning
from support.results import full_result, read_csv

pytestmark = pytest.mark.slow

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[PruningResult]]:
    """Checkpoints of a fit with two rounds, before and after them."""
    folder = tmp_path_factory.mktemp("fit")
    callback = softpruning(epochs=[1, 2], report=True)
    checkpoints = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    fit(folder, made(), callback, checkpoints, enable_checkpointing=True)
    return folder, callback.results


def rows(text: str) -> dict[str, list[str]]:
    """The lines of tables by their first cell."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if line.strip()]
    return {line[0]: line[1:] for line in lines}


def failure(capsys: Captured, *arguments: object) -> str:
    """What the command complains about; it has to be one line, and exit code 1."""
    assert main([str(argument) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    return captured.err.strip()


def test_names_of_files_and_costs_are_those_of_the_package() -> None:
    """The command line has its own, so that `--help` need not import them."""
    assert (INDEX_FILE, RESULT_FILE) == (report.INDEX_FILE, report.RESULT_FILE)
    assert COSTS == search.COSTS


# show


def test_show_prints_rounds_and_groups_of_a_checkpoint(
    pruned: tuple[Path, list[PruningResult]], capsys: Captured
) -> None:
    folder, results = pruned
    path = folder / "epoch=2.ckpt"

    assert main(["show", str(path)]) == 0
    captured = capsys.readouterr()
    table = rows(captured.out)

    assert captured.err == ""
    assert captured.out.startswith(f"{path}: 2 rounds\n")
    for result in results:
        before, after = result.costs_before, result.costs_after
        assert table[str(result.epoch)] == [
            f"{result.sparsity:.4g}",
            f"{before.params:,} -> {after.params:,}",
            f"{before.macs:,} -> {after.macs:,}",
            f"{result.score_before:.4g} -> {result.score_after:.4g}",
            *([] if result is results[0] else [f"{result.score_finetuned:.4g}"]),
            f"{result.strategy}: {result.stop_reason}",
            "yes",
        ]
    for first, second in zip(results[0].groups, results[1].groups, strict=True):
        channels = f"{first.channels_before} -> {first.channels_after} -> {second.channels_after}"
        assert table[first.name] == [first.component, first.kind, channels]


def test_show_takes_a_result_a_round_and_a_log_folder(tmp_path: Path, capsys: Captured) -> None:
    for epoch in (4, 10):
        write_files(full_result(epoch=epoch), round_folder(tmp_path, epoch))

    for path in (round_folder(tmp_path, 4) / "result.json", round_folder(tmp_path, 4)):
        assert main(["show", str(path)]) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"{path}: 1 round\n")
        assert rows(out)["encoder.0"] == ["encoder", "intra", "512 -> 154"]
    for path in (tmp_path, tmp_path / "softprune"):
        assert main(["show", str(path)]) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"{path}: 2 rounds\n")
        assert [line.split()[0] for line in out.splitlines()[5:7]] == ["4", "10"]


def test_show_keeps_the_runs_below_a_folder_apart(tmp_path: Path, capsys: Captured) -> None:
    for run in ("version_0", "version_1"):
        write_files(full_result(), round_folder(tmp_path / run, 4))

    assert main(["show", str(tmp_path)]) == 0

    headings = [line for line in capsys.readouterr().out.splitlines() if "round" in line]
    assert headings == [f"{tmp_path / run / 'softprune'}: 1 round" for run in ("version_0", "version_1")]


def test_show_says_what_was_not_applied(tmp_path: Path, capsys: Captured) -> None:
    write_files(full_result(applied=False, reason="this was a dry run"), tmp_path)

    assert main(["show", str(tmp_path)]) == 0

    out = capsys.readouterr().out
    assert "no: this was a dry run" in out
    assert rows(out)["encoder.0"][-1] == "512 -> 154"


def test_a_round_that_was_skipped_is_not_in_a_groups_history(tmp_path: Path, capsys: Captured) -> None:
    write_files(full_result(epoch=3, applied=False, reason="nothing is feasible"), round_folder(tmp_path, 3))
    write_files(full_result(epoch=4), round_folder(tmp_path, 4))

    assert main(["show", str(tmp_path)]) == 0

    assert rows(capsys.readouterr().out)["encoder.0"][-1] == "512 -> 154"


def test_a_checkpoint_from_before_the_first_round_is_said_to_be_ordinary(
    pruned: tuple[Path, list[PruningResult]], capsys: Captured
) -> None:
    path = pruned[0] / "epoch=0.ckpt"

    message = failure(capsys, "show", path)

    assert message == (
        f'lightning-softprune: {path}: an ordinary checkpoint without a "softprune" record: its model was not pruned'
    )


class Foreign:
    """Not a plain type."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {}}, "not a Lightning checkpoint"),
        ([1, 2], "not a Lightning checkpoint"),
        ({"softprune": None}, "not a Lightning checkpoint"),
        ({"softprune": 3}, 'the "softprune" record is damaged'),
        ({"softprune": {"results": 3}}, 'the "softprune" record is damaged'),
        ({"softprune": {"format": 1, "results": [3]}}, 'the "softprune" record is damaged'),
        ({"softprune": {"format": 1, "results": [{"epoch": "x"}]}}, 'the "softprune" record is damaged'),
        ({"softprune": {"format": 99, "results": []}}, "has format 99; this version of lightning-softprune reads"),
        (Foreign(), f"it holds {__name__}.Foreign, which weights_only=True does not load"),
    ],
)
def test_show_refuses_foreign_and_damaged_records(tmp_path: Path, capsys: Captured, content: Any, message: str) -> None:
    path = tmp_path / "model.ckpt"
    torch.save(content, path)

    complaint = failure(capsys, "show", path)

    assert complaint.startswith(f"lightning-softprune: {path}: ")
    assert message in complaint


@pytest.mark.parametrize("content", [b"", b"text\nand more", b"PK\x03\x04", b"\x80\x02}.", b"\x00" * 99])
@pytest.mark.parametrize("name", ["model.ckpt", "result.json", "file"])
def test_show_refuses_files_of_other_kinds(tmp_path: Path, capsys: Captured, content: bytes, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)

    assert str(path) in failure(capsys, "show", path)


def test_show_refuses_a_checkpoint_cut_off_anywhere(
    pruned: tuple[Path, list[PruningResult]], tmp_path: Path, capsys: Captured
) -> None:
    content = (pruned[0] / "epoch=2.ckpt").read_bytes()
    path = tmp_path / "model.ckpt"
    for length in range(0, len(content), len(content) // 7):
        path.write_bytes(content[:length])
        assert f"{path}: cannot be read as a checkpoint" in failure(capsys, "show", path)


@pytest.mark.parametrize("command", ["show", "report"])
def test_a_missing_path_is_named(tmp_path: Path, capsys: Captured, command: str) -> None:
    assert f"{tmp_path / 'gone'}: No such file or directory" in failure(capsys, command, tmp_path / "gone")
    assert f"{tmp_path / 'gone.ckpt'}: " in failure(capsys, command, tmp_path / "gone.ckpt")


@pytest.mark.parametrize("command", ["show", "report"])
def test_a_folder_without_rounds_is_named(tmp_path: Path, capsys: Captured, command: str) -> None:
    (tmp_path / "result.json").mkdir()

    assert f"{tmp_path}: no result.json of a round" in failure(capsys, command, tmp_path)


@pytest.mark.parametrize("command", ["show", "report"])
def test_a_corrupt_result_is_named(tmp_path: Path, capsys: Captured, command: str) -> None:
    path = tmp_path / "result.json"
    path.write_text("{")

    assert f"{path}: cannot be read as a pruning result" in failure(capsys, command, tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("command", ["show", "report"])
def test_a_file_without_permission_is_named(tmp_path: Path, capsys: Captured, command: str) -> None:
    write_files(full_result(), tmp_path)
    path = tmp_path / "result.json"
    path.chmod(0)

    assert f"{path}: Permission denied" in failure(capsys, command, tmp_path)


@pytest.mark.parametrize("command", ["show", "report"])
def test_a_file_that_the_system_refuses_is_named(
    tmp_path: Path, capsys: Captured, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(full_result(), tmp_path)

    def refuse(path: Path, *_: object) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)

    assert failure(capsys, command, tmp_path).endswith(f"{tmp_path / 'result.json'}: Permission denied")


def test_a_line_break_in_a_name_stays_on_the_line(tmp_path: Path, capsys: Captured) -> None:
    assert "a b" in failure(capsys, "show", tmp_path / "a\nb")


# report


def test_report_builds_the_files_anew_and_prints_their_paths(tmp_path: Path, capsys: Captured) -> None:
    folder = round_folder(tmp_path, 4)
    write_files(full_result(), folder)
    source = (folder / "result.json").read_bytes()
    table, page = folder / "trials.csv", folder / "report.html"
    page.unlink()
    table.write_text("rubbish")

    assert main(["report", str(folder)]) == 0

    captured = capsys.readouterr()
    assert captured.out.splitlines() == [str(table), str(page)]
    assert captured.err == ""
    assert page.read_text(encoding="utf-8") == report_page(full_result())
    assert len(read_csv(table)) == 4
    assert (folder / "result.json").read_bytes() == source


def test_report_builds_every_round_below_a_log_directory(tmp_path: Path, capsys: Captured) -> None:
    folders = [round_folder(tmp_path / "version_0", epoch) for epoch in (2, 10)]
    for folder in folders:
        write_files(full_result(), folder)
        (folder / "report.html").unlink()

    assert main(["report", str(tmp_path)]) == 0

    expected = [str(folder / name) for folder in folders for name in ("trials.csv", "report.html")]
    expected.append(str(tmp_path / "softprune.html"))
    assert capsys.readouterr().out.splitlines() == expected
    assert all(map(os.path.exists, expected))


def test_show_prints_json_for_programs(tmp_path: Path, capsys: Captured) -> None:
    for run, epoch in (("a", 4), ("a", 10), ("b", 4)):
        write_files(full_result(epoch=epoch), round_folder(tmp_path / run, epoch))

    assert main(["show", str(tmp_path), "--json"]) == 0

    runs = json.loads(capsys.readouterr().out)
    assert [run["path"] for run in runs] == [str(tmp_path / run / "softprune") for run in ("a", "b")]
    found = [[PruningResult.from_dict(one).epoch for one in run["rounds"]] for run in runs]
    assert found == [[4, 10], [4]]


@pytest.mark.parametrize("arguments", [["--help"], ["solve", "--help"], ["solve", "."], ["report", "."]])
def test_commands_that_need_no_torch_do_not_wait_for_it(tmp_path: Path, arguments: list[str]) -> None:
    write_files(full_result(), tmp_path)
    code = (
        "import sys\nfrom lightning_softprune.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print(*({'torch', 'lightning', 'scipy', 'matplotlib', 'optuna'} & {n.partition('.')[0] for n in sys.modules}))"
    )
    path = os.pathsep.join([str(Path(lightning_softprune.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    run = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(run, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "", done.stderr


def test_report_takes_the_result_itself(tmp_path: Path, capsys: Captured) -> None:
    write_files(full_result(), tmp_path)
    (tmp_path / "report.html").unlink()

    assert main(["report", str(tmp_path / "result.json")]) == 0

    assert (tmp_path / "report.html").is_file()


def test_a_corrupt_round_does_not_keep_the_others_from_being_built(tmp_path: Path, capsys: Captured) -> None:
    broken, whole = (round_folder(tmp_path, epoch) for epoch in (1, 2))
    for folder in (broken, whole):
        write_files(full_result(), folder)
        (folder / "report.html").unlink()
    (broken / "result.json").write_text(json.dumps({"epoch": 1}))

    assert main(["report", str(tmp_path)]) == 1

    captured = capsys.readouterr()
    assert str(broken / "result.json") in captured.err
    assert (whole / "report.html").is_file()
    assert not (broken / "report.html").exists()


def test_report_into_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(full_result(), tmp_path)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)

    assert failure(capsys, "report", tmp_path) == f"lightning-softprune: {tmp_path}: No space left on device"


# files of somebody else's

POSIX = pytest.mark.skipif(os.name != "posix", reason="links and pipes are POSIX's")


@POSIX
@pytest.mark.parametrize("command", ["show", "report"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "link to a device", "pipe", "folder"])
@pytest.mark.parametrize("below", [True, False])
def test_a_result_that_is_no_file_of_the_folder_is_named_and_not_opened(
    tmp_path: Path, capsys: Captured, kind: str, command: str, below: bool
) -> None:
    if kind == "folder" and not below:
        return  # then rounds are looked for below
    folder = round_folder(tmp_path / "run", 4) if below else tmp_path / "run"
    folder.mkdir(parents=True)
    path, elsewhere = folder / "result.json", tmp_path / "elsewhere"
    write_files(full_result(), elsewhere)
    targets = {"link": elsewhere / "result.json", "link to a device": "/dev/zero", "dangling link": tmp_path / "gone"}
    if kind in targets:
        path.symlink_to(targets[kind])
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()

    complaint = failure(capsys, command, tmp_path / "run")

    assert complaint.startswith(f"lightning-softprune: {path}: ")
    assert ("a link, which is not followed" if "link" in kind else "not a regular file") in complaint
    assert list(folder.iterdir()) == [path]


@POSIX
def test_a_linked_round_is_named_and_the_others_are_built(tmp_path: Path, capsys: Captured) -> None:
    elsewhere, own = tmp_path / "elsewhere", round_folder(tmp_path / "run", 4)
    for folder in (round_folder(elsewhere, 5), own):
        write_files(full_result(), folder)
        (folder / "report.html").unlink()
    links = [own.parent / "epoch=5", tmp_path / "run" / "old" / "softprune", tmp_path / "run" / "latest"]
    links[1].parent.mkdir()
    for link, target in zip(links, (round_folder(elsewhere, 5), elsewhere / "softprune", elsewhere), strict=True):
        link.symlink_to(target)

    assert main(["report", str(tmp_path / "run")]) == 1

    captured = capsys.readouterr()
    refused = [f"lightning-softprune: {link}: a link, which is not followed" for link in links[:2]]
    assert sorted(captured.err.splitlines()) == sorted(refused)
    built = [*(own / name for name in ("trials.csv", "report.html")), tmp_path / "run" / "softprune.html"]
    assert captured.out.splitlines() == list(map(str, built))
    assert not (round_folder(elsewhere, 5) / "report.html").exists()


@POSIX
def test_links_in_the_place_of_what_is_built_are_replaced(tmp_path: Path, capsys: Captured) -> None:
    folder, precious = round_folder(tmp_path, 4), tmp_path / "precious"
    write_files(full_result(), folder)
    precious.write_text("precious")
    for name in ("report.html", "trials.csv"):
        (folder / name).unlink()
        (folder / name).symlink_to(precious)

    assert main(["report", str(folder)]) == 0

    assert precious.read_text() == "precious"
    assert not any(path.is_symlink() for path in folder.iterdir())


def test_a_folder_in_the_place_of_the_page_is_named(tmp_path: Path, capsys: Captured) -> None:
    write_files(full_result(), tmp_path)
    (tmp_path / "report.html").unlink()
    (tmp_path / "report.html").mkdir()

    assert failure(capsys, "report", tmp_path).startswith(f"lightning-softprune: {tmp_path / 'report.html'}: ")


@POSIX
def test_what_the_user_names_may_be_a_link_but_no_pipe(tmp_path: Path, capsys: Captured) -> None:
    write_files(full_result(), round_folder(tmp_path / "run", 4))
    (tmp_path / "latest").symlink_to(tmp_path / "run")
    (tmp_path / "x.json").symlink_to(round_folder(tmp_path / "run", 4) / "result.json")
    for command, name in (("show", "latest"), ("show", "x.json"), ("report", "latest")):
        assert main([command, str(tmp_path / name)]) == 0
    capsys.readouterr()

    for name in ("pipe.json", "pipe.ckpt", "result.json"):
        os.mkfifo(tmp_path / name)
        assert str(tmp_path / name) in failure(capsys, "show", tmp_path / name)
    assert str(tmp_path / "result.json") in failure(capsys, "report", tmp_path / "result.json")


HUGE = [10**400, -(10**400), 2**63, float(2**70), "1e400", {"x": 10**400}]


@pytest.mark.parametrize("value", HUGE, ids=lambda value: f"{type(value).__name__}")
@pytest.mark.parametrize("field", ["epoch", "evaluations", "chosen", "costs_before", "groups", "format"])
def test_show_refuses_numbers_in_a_record_that_nothing_can_hold(
    tmp_path: Path, capsys: Captured, field: str, value: Any
) -> None:
    result = full_result().to_dict()
    record: dict[str, Any] = {"format": 1, "results": [result]}
    if field == "groups":
        result["groups"][1]["channels_after"] = value
    elif field == "costs_before":
        result["costs_before"]["macs"] = value
    else:
        (record if field == "format" else result)[field] = value
    path = tmp_path / "model.ckpt"
    torch.save({"softprune": record}, path)

    complaint = failure(capsys, "show", path)

    assert complaint.startswith(f'lightning-softprune: {path}: the "softprune" record ')
    assert field in complaint
    assert len(complaint) < 400 + len(str(path))


def test_nothing_in_a_file_commands_the_terminal(tmp_path: Path, capsys: Captured) -> None:
    escape = "\x1b]0;title\x07\x9b31m\r"
    result = full_result(applied=False, reason=escape, strategy=escape, constraints=(escape,), outcome="")
    groups = tuple(replace(group, name=group.name + escape, kind=escape) for group in result.groups)
    write_files(replace(result, groups=groups), tmp_path)
    assert main(["show", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    (tmp_path / "result.json").write_text(json.dumps({**result.to_dict(), "mode": escape}))
    shown += failure(capsys, "show", tmp_path) + failure(capsys, "show", tmp_path / escape)

    assert not set(escape) & set("\x00\x1b\x07\x9b\r") & set(shown)


# the command itself


@pytest.mark.parametrize("arguments", [[], ["show"], ["report"], ["prune", "x"], ["show", "a", "b"], ["--nonsense"]])
def test_wrong_usage_is_exit_code_2(arguments: list[str], capsys: Captured) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)

    assert stopped.value.code == 2
    assert "usage: lightning-softprune" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--version"], f"lightning-softprune {lightning_softprune.__version__}\n"),
        (["--help"], "report.html"),
        (["show", "--help"], ".ckpt"),
        (["report", "--help"], "result.json"),
    ],
)
def test_help_and_version(arguments: list[str], text: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)

    assert stopped.value.code == 0
    assert text in capsys.readouterr().out


def run(folder: Path, *arguments: str, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which stands in `folder`."""
    command = [sys.executable, "-m", "lightning_softprune", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(lightning_softprune.__file__).parent.parent)}
    pipes = {"stdout": stdout, "stderr": subprocess.PIPE}
    return subprocess.run(command, cwd=folder, env=environment, text=True, timeout=250, check=False, **pipes)


def test_the_module_runs_as_a_program(tmp_path: Path) -> None:
    done = run(tmp_path, "show", "gone.ckpt")

    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "lightning-softprune: gone.ckpt: No such file or directory\n"


@pytest.mark.skipif(os.name != "posix", reason="pipes are POSIX's")
def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    groups = tuple(replace(full_result().groups[0], name=f"group{index}") for index in range(3000))
    write_files(full_result(groups=groups, trials=(), chosen=None), tmp_path)
    reading, writing = os.pipe()
    os.close(reading)

    done = run(tmp_path, "show", ".", stdout=writing)
    os.close(writing)

    assert done.stderr == ""
    assert done.returncode == 0


def test_the_script_is_declared() -> None:
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()

    assert 'lightning-softprune = "lightning_softprune.cli:main"' in text


# solve


@pytest.fixture(scope="module")
def round_with_curves(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PruningResult]:
    folder = tmp_path_factory.mktemp("curves")
    callback = softpruning(search=lightning_softprune.SensitivitySearch(), report=True)
    fit(folder, made(), callback)
    return next(folder.rglob("result.json")).parent, callback.results[0]


def test_solve_prints_what_the_result_says_of_each_target(
    round_with_curves: tuple[Path, PruningResult], capsys: Captured
) -> None:
    folder, result = round_with_curves
    assert main(["solve", str(folder), "--target", "0.3", "--target", "0.6"]) == 0
    printed = rows(capsys.readouterr().out)
    for target in (0.3, 0.6):
        solution = result.solve(target)
        assert printed[str(target)][:2] == [f"{solution.sparsity:.4f}", f"{solution.params:,}"]
        assert printed[str(target)][3:] == [f"{solution.score:.4g}", "measured" if solution.measured else "predicted"]


def test_solve_names_a_target_out_of_reach_and_prints_the_others(
    round_with_curves: tuple[Path, PruningResult], capsys: Captured
) -> None:
    folder, _ = round_with_curves
    assert main(["solve", str(folder), "--target", "0.5", "--target", "1.0"]) == 1
    captured = capsys.readouterr()
    assert "0.5" in rows(captured.out)
    assert "target_sparsity=1.0" in captured.err
    assert captured.err.count("\n") == 1


def test_solve_takes_limits_and_says_what_one_looks_like(
    round_with_curves: tuple[Path, PruningResult], capsys: Captured
) -> None:
    folder, result = round_with_curves
    assert main(["solve", str(folder), "--target", "0.5", "--limit", "macs=0.5", "--cost", "params"]) == 0
    limited = result.solve(0.5, limits={"macs": 0.5})
    assert limited.macs <= 0.5 * result.costs_before.macs
    assert rows(capsys.readouterr().out)["0.5"][1] == f"{limited.params:,}"
    with pytest.raises(SystemExit) as stopped:
        main(["solve", str(folder), "--limit", "half"])
    assert stopped.value.code == 2
    assert "macs=0.5" in capsys.readouterr().err


def test_solve_prints_a_table_of_what_is_in_reach_without_a_target(
    round_with_curves: tuple[Path, PruningResult], capsys: Captured
) -> None:
    folder, result = round_with_curves
    assert main(["solve", str(folder)]) == 0
    printed = rows(capsys.readouterr().out)
    expected = result.solve_targets([n / 10 for n in range(1, 10)])
    assert len(expected) > 3
    assert all(printed[f"{found.target_sparsity:.3g}"][0] == f"{found.sparsity:.4f}" for found in expected)


def test_solve_says_once_what_stands_in_the_way_of_all_targets(
    round_with_curves: tuple[Path, PruningResult], tmp_path: Path, capsys: Captured
) -> None:
    _, result = round_with_curves
    write_files(replace(result, sensitivity=()), tmp_path)
    folder = next(tmp_path.rglob("result.json")).parent
    assert "measured no sensitivity curves" in failure(capsys, "solve", folder, "--target", 0.3, "--target", 0.4)


def test_solve_says_where_no_target_can_be_met(round_with_curves: tuple[Path, PruningResult], capsys: Captured) -> None:
    complaint = failure(capsys, "solve", round_with_curves[0], "--limit", "macs=0.001")
    assert "no target from 10 % to 90 % can be met" in complaint


def test_solve_marks_plans_below_their_target(round_with_curves: tuple[Path, PruningResult], capsys: Captured) -> None:
    _, result = round_with_curves
    found = result.solve(0.5)
    report.print_solutions([replace(found, sparsity=0.49), found], result)
    below, reached = capsys.readouterr().out.splitlines()[-2:]
    assert re.search("(measured|predicted), below target$", below.rstrip())
    assert "below" not in reached


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        (["--target", "1.5"], "'1.5' is not a fraction in (0, 1]"),
        (["--target", "nan"], "'nan' is not a fraction in (0, 1]"),
        (["--limit", "speed=0.3"], "'speed=0.3' is not COST=FRACTION, as in macs=0.5, with params or macs"),
        (["--limit", "macs=nan"], "a fraction in (0, 1]"),
        (["--limit", "macs=0.5", "--limit", "macs=0.9"], "macs has a limit already, 0.5"),
    ],
)
def test_solve_refuses_numbers_that_nothing_can_be_asked_for(
    tmp_path: Path, capsys: Captured, arguments: list[str], allowed: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["solve", str(tmp_path), *arguments])
    assert stopped.value.code == 2
    assert allowed in capsys.readouterr().err


DAMAGED: dict[str, tuple[Any, str]] = {
    "numbers.dense": ({}, "params and macs of dense"),
    "numbers.round_to": (0, "round_to and samples"),
    "numbers.coefficients": ([], "owners of the groups"),
    "numbers.groups.0.owner": (7, "owners of the groups"),
    "numbers.groups.0.least": (10**6, "least, low, high and step of group"),
    "numbers.groups.0.name": ("renamed", "groups are not those of the result"),
    "numbers.costs.slots.0.groups.0": (9, "groups and removed of slot 0"),
    "numbers.costs.slots.0.groups": ([-1], "groups and removed of slot 0"),
    "numbers.costs.slots.0.removed": ([[0, 1]], "groups and removed of slot 0"),
    "numbers.costs.params.0.slots.0": (99, "slots of the terms"),
    "numbers.costs.macs.0.once_smaller": (99, "slots of the terms"),
    "numbers.errors.counts.0": ([], "counts and errors"),
    "sensitivity.0.group": ("renamed", "sensitivity: ['renamed', "),
    "sensitivity.0": ({"group": "encoder.0", "coefficients": [], "scores": []}, "has no point"),
    "trials.0.coefficients.0": (5.0, "trials[0]: its coefficients are not in [0, 1]"),
    "cost": ("flops", "cost: 'flops'"),
}


@pytest.mark.parametrize("place", DAMAGED)
def test_a_damaged_result_is_one_line_that_names_what_does_not_fit(
    round_with_curves: tuple[Path, PruningResult], tmp_path: Path, capsys: Captured, place: str
) -> None:
    data, (value, named) = round_with_curves[1].to_dict(), DAMAGED[place]
    *way, last = (int(key) if key.isdigit() else key for key in place.split("."))
    inner: Any = data
    for key in way:
        inner = inner[key]
    inner[last] = value
    (tmp_path / RESULT_FILE).write_text(json.dumps(data))
    for command in (["solve", tmp_path, "--target", 0.5], ["report", tmp_path]):
        complaint = failure(capsys, *command)
        assert named in complaint
        assert str(tmp_path / RESULT_FILE) in complaint


def test_a_result_without_one_of_its_curves_names_it(
    round_with_curves: tuple[Path, PruningResult], tmp_path: Path, capsys: Captured
) -> None:
    data = round_with_curves[1].to_dict()
    (lost,) = data["sensitivity"][:1]
    del data["sensitivity"][:1]
    (tmp_path / RESULT_FILE).write_text(json.dumps(data))
    assert f"no sensitivity curve of {lost['group']}" in failure(capsys, "solve", tmp_path, "--target", 0.5)
