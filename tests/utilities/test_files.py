"""Files are replaced as a whole or not at all."""

import secrets
from pathlib import Path

import pytest

from lightning_softprune.utilities.files import being_replaced, remove_leftovers, replace_file


def test_the_new_content_stands_where_the_old_stood(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    assert replace_file(path, b"new") == path
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_content_and_no_leftover(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"old")

    def half() -> None:
        with being_replaced(path) as file:
            file.write(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        half()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_temporary_file_of_another_process_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "token_hex", lambda _: "taken")
    foreign = tmp_path / ".a.json.taken.tmp"
    foreign.write_bytes(b"being written")
    with pytest.raises(FileExistsError):
        replace_file(tmp_path / "a.json", b"new")
    assert foreign.read_bytes() == b"being written"


def test_leftovers_of_this_file_alone_are_removed(tmp_path: Path) -> None:
    ours, other = tmp_path / ".a.json.0123.tmp", tmp_path / ".b.json.0123.tmp"
    ours.touch()
    other.touch()
    remove_leftovers(tmp_path / "a.json")
    assert not ours.exists()
    assert other.exists()
