"""A tree that changes while it is read is reported; what is not ours to enter is not entered."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from cafs.errors import CafsError, NotFound
from cafs.walk import Walk
from tests.conftest import Run


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "d").mkdir(parents=True)
    for name in ("a", "d/b", "z"):
        (root / name).write_text(name)
    return root


def paths(walk: Walk) -> list[bytes]:
    found = []
    for one in walk.run():
        found.append(one.path)
        one.directory.release()
    return found


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_file_that_vanishes_while_the_tree_is_read_is_named(tree: Path) -> None:
    before = open_descriptors()
    walk = Walk(str(tree))
    with pytest.raises(NotFound, match="cannot read '/z': it vanished while the tree was read"):
        for one in walk.run():
            one.directory.release()
            if one.path == b"/a":
                (tree / "z").unlink()
    assert open_descriptors() == before


def test_a_directory_that_changes_while_it_is_read_is_named(tree: Path) -> None:
    os.utime(tree / "d", (1, 1))  # whose clock stands still for some milliseconds, before Linux 6.13
    with pytest.raises(CafsError, match="directory '/d' changed while it was read"):
        for one in Walk(str(tree)).run():
            one.directory.release()
            if one.path == b"/d/b":
                (tree / "d" / "new").touch()


def test_a_directory_that_becomes_a_link_is_not_followed(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.stat

    def late(name: object, **options: object) -> os.stat_result:
        status = real(name, **options)  # type: ignore[arg-type]
        if name == b"d":
            os.rename(tree / "d", tree / "moved")
            os.symlink("/etc", tree / "d")
        return status

    monkeypatch.setattr(os, "stat", late)
    with pytest.raises(CafsError, match="cannot read '/d'"):
        paths(Walk(str(tree)))


def test_excluded_paths_are_not_opened(tree: Path) -> None:
    assert paths(Walk(str(tree), exclude=lambda path: path == b"/d")) == [b"/", b"/a", b"/z"]


@pytest.mark.needs("root")
def test_one_file_system_lists_a_mount_point_and_does_not_enter_it(home: Path, tree: Path, cmd: Run) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "none", tree / "d"], check=True)
    (tree / "d" / "inner").touch()
    listed = cmd("cafs-index", "create", tree, "-o", "-", "-x").stdout
    assert b" /d\n" in listed and b"inner" not in listed
    assert b"/d/inner" in cmd("cafs-index", "create", tree, "-o", "-").stdout
    subprocess.run(["umount", tree / "d"], check=True)


@pytest.mark.needs("root", "setpriv")
def test_an_unreadable_directory_is_an_error_or_left_out_whole(home: Path, tree: Path) -> None:
    from tests.conftest import BIN

    subprocess.run(["mount", "-t", "tmpfs", "none", tree], check=True)  # the directories above are anybody's to pass
    try:
        (tree / "closed").mkdir(mode=0)
        (tree / "open").mkdir()
        run = [
            "setpriv",
            "--bounding-set=-dac_override,-dac_read_search",
            "--inh-caps=-all",
            BIN / "cafs-index",
            "create",
            tree,
            "-o",
            "-",
        ]
        done = subprocess.run(run, capture_output=True, check=False)
        assert done.returncode == 1 and b"cannot read '/closed': Permission denied" in done.stderr
        done = subprocess.run([*run, "--skip-unreadable"], capture_output=True, check=False)
        assert done.returncode == 3 and b"/open" in done.stdout and b"closed" not in done.stdout
    finally:
        subprocess.run(["umount", tree], check=True)


def test_an_error_while_holes_are_looked_for_is_no_hole(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cafs.indexing import Options, create_file

    (tree / "large").write_bytes(os.urandom(9 << 20))
    real, calls = os.lseek, []

    def failing(fd: int, offset: int, how: int) -> int:
        calls.append(offset)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        return real(fd, offset, how)

    monkeypatch.setattr(os, "lseek", failing)
    with pytest.raises(CafsError, match="cannot read '/large': Input/output error"):
        create_file(Options(str(tree)), str(tmp_path / "out"), "sha256")
