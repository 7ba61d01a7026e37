"""Files are replaced as a whole or not at all."""

import os
import secrets
from pathlib import Path

import pytest

from lightning_softprune.utilities.files import being_replaced, read_file, remove_leftovers, replace_file

POSIX = pytest.mark.skipif(os.name != "posix", reason="links and pipes are POSIX's")


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


@POSIX
@pytest.mark.parametrize("there", [True, False])
def test_a_link_in_the_place_of_a_file_is_replaced_and_what_it_points_to_left_alone(
    tmp_path: Path, there: bool
) -> None:
    target, path = tmp_path / "precious", tmp_path / "a.json"
    if there:
        target.write_bytes(b"precious")
    path.symlink_to(target)
    replace_file(path, b"new")
    assert (path.is_symlink(), path.read_bytes()) == (False, b"new")
    assert target.exists() == there
    assert not there or target.read_bytes() == b"precious"


@POSIX
def test_a_link_under_the_temporary_name_is_not_written_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secrets, "token_hex", lambda _: "guessed")
    target = tmp_path / "precious"
    for content in (None, b"precious"):  # one that dangles, and one that does not
        if content is not None:
            target.write_bytes(content)
        link = tmp_path / ".a.json.guessed.tmp"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        with pytest.raises(FileExistsError):
            replace_file(tmp_path / "a.json", b"new")
        assert target.exists() == (content is not None)
    assert target.read_bytes() == b"precious"


@POSIX
def test_only_a_regular_file_is_read_and_no_link_is_followed_unless_it_may_be(tmp_path: Path) -> None:
    path, link, pipe = (tmp_path / name for name in ("file", "link", "pipe"))
    path.write_bytes(b"content")
    link.symlink_to(path)
    os.mkfifo(pipe)
    (tmp_path / "to_pipe").symlink_to(pipe)
    (tmp_path / "device").symlink_to("/dev/zero")
    assert read_file(path) == read_file(path, follow_links=True) == read_file(link, follow_links=True) == b"content"
    with pytest.raises(OSError, match=r"a link, which is not followed.*link"):
        read_file(link)
    for follow_links, names in ((False, ["pipe", "."]), (True, ["pipe", "to_pipe", "device", "."])):
        for name in names:
            with pytest.raises(OSError, match="not a regular file"):
                read_file(tmp_path / name, follow_links=follow_links)
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "absent")


@POSIX
def test_a_file_that_becomes_a_pipe_while_it_is_opened_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = tmp_path / "a.json", os.open
    path.write_bytes(b"content")

    def exchanged(name: Path, flags: int) -> int:
        path.unlink()
        os.mkfifo(path)
        return real(name, flags)

    monkeypatch.setattr(os, "open", exchanged)
    with pytest.raises(OSError, match="not a regular file"):
        read_file(path)
