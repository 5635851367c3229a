"""Files that go to jobs and come back, and commands beside jobs."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path

import pytest

from cafs.errors import UsageError
from pool import inputs, staging
from tests.conftest import BIN, wait_until
from tests.crunning import leftovers
from tests.pooling import PLAIN, cp, job, ok


def test_files_go_to_a_job_and_come_back_from_it(pool: Path, controller: object, tmp_path: Path) -> None:
    (tmp_path / "script.sh").write_text("#!/bin/sh\ntr a-z A-Z <data/in.txt >out.txt; head -c 700000 /dev/zero >big; pwd; ls")
    (tmp_path / "script.sh").chmod(0o755)
    (tmp_path / "in.txt").write_text("some words\n")
    number = ok(
        "submit",
        *PLAIN,
        "--in",
        "script.sh",
        "--in",
        "in.txt:data/in.txt",
        "--out",
        "out.txt",
        "--out",
        "big",
        "--",
        "./script.sh",
    ).strip()
    (tmp_path / "got").mkdir()
    ok("fetch", number, "got")
    assert (tmp_path / "got" / "out.txt").read_text() == "SOME WORDS\n" and (tmp_path / "got" / "big").read_bytes() == bytes(
        700_000
    )
    assert ok("logs", "-f", number).splitlines()[1:] == ["big", "data", "out.txt", "script.sh"]
    assert job(number)["usage"]["files"] == [11, 700_000]  # type: ignore[index]
    wait_until(lambda: not os.listdir(pool / "inputs") and not os.listdir(next((pool / "agents").glob("*/jobs"))))
    ok("fetch", number, "again")
    assert (tmp_path / "again" / "out.txt").read_text() == "SOME WORDS\n", "also when the agent has forgotten it"


def test_what_a_job_leaves_that_is_no_file_of_its_own_does_not_come_back(
    pool: Path, controller: object, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("secret")
    script = f"ln -s {tmp_path}/secret link; ln -s {tmp_path} above; mkdir dir; mkfifo pipe; echo x >file"
    names = ("link", "above/secret", "dir", "pipe", "none", "file")
    number = ok("submit", *PLAIN, *(word for name in names for word in ("--out", name)), "--", "sh", "-c", script).strip()
    done = cp("fetch", number, "got")
    assert done.returncode == 3 and "has left no 'link'" in done.stderr and done.stderr.count("has left no") == 5
    assert [one.name for one in (tmp_path / "got").rglob("*")] == ["file"]


@pytest.mark.needs("root", "fuse", "runc", "busybox")
def test_in_an_image_files_are_where_the_command_runs(image: Path, pool: Path, controller: object, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("words")
    number = ok(
        "submit",
        "--image",
        "b:1",
        "--in",
        "in.txt",
        "--out",
        "out/x",
        "--",
        "sh",
        "-c",
        "pwd; mkdir out; cat in.txt in.txt >out/x",
    ).strip()
    assert cp("wait", number).returncode == 0, cp("logs", number).stderr
    assert ok("fetch", number, "got") == "" and (tmp_path / "got" / "out" / "x").read_text() == "wordswords"
    assert ok("logs", "-f", number) == "/work\n"


def test_inputs_outlive_the_controller_and_are_kept_once(pool: Path, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("same")
    for _ in range(3):
        cp("submit", *PLAIN, "--hold", "--in", "a", "--in", "a:b", "--", "cat", "a", "b")
    assert len(os.listdir(pool / "inputs")) == 1
    spec = json.loads(ok("job", 1, "--json"))["spec"]
    assert [one[0] for one in spec["in"]] == ["a", "b"] and "same" not in str(spec)


@pytest.mark.parametrize("name", ["", "/etc/x", "../x", "a/../b", "a//b", ".", "x\0y", "a" * 300, 7, None])
def test_names_that_lead_elsewhere_are_refused(name: object, tmp_path: Path) -> None:
    assert not staging.is_name(name)
    with pytest.raises(UsageError):
        inputs.check({"in": [[name, "0" * 64, 0o644]]})
    with pytest.raises(UsageError):
        inputs.check({"out": [name]})
    with pytest.raises(ValueError, match="cannot be"):
        staging.put(str(tmp_path / "work"), [[name, "", 0o644]])


def test_a_file_that_is_too_large_or_another_than_was_said_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        inputs.keep(str(tmp_path), {"0" * 64: "eA=="})
    assert not (tmp_path / "inputs").exists()
    staging.put(str(tmp_path / "work"), [["a/b", "eA==", 0o7755]])
    assert stat.S_IMODE((tmp_path / "work" / "a" / "b").stat().st_mode) == 0o755


def test_more_than_fits_into_a_message_is_refused_at_once(pool: Path, tmp_path: Path) -> None:
    with open(tmp_path / "big", "wb") as file:
        file.truncate(staging.SIZE_MAX + 1)
    refused = cp("submit", *PLAIN, "--in", "big", "--", "true")
    assert refused.returncode == 2 and "more than 4 MiB" in refused.stderr
    assert cp("submit", *PLAIN, "--in", "absent", "--", "true").returncode == 4
    assert cp("submit", *PLAIN, "--out", "../x", "--", "true").returncode == 2


def test_a_command_runs_beside_a_job_with_its_directory_and_environment(pool: Path, controller: object, tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    number = ok("submit", *PLAIN, "-e", "A=b c", "--", "sleep", "60").strip()
    wait_until(lambda: job(number)["state"] == "running")
    done = cp("exec", number, "--", "sh", "-c", 'echo "$A" $CPOOL_JOB; ls; cat; echo err >&2; exit 5', input="not for it")
    assert (done.returncode, done.stdout, done.stderr) == (5, f"b c {number}\npool\nx\n", "err\n")
    assert ok("exec", "-i", number, "cat", input="words") == "words"
    assert cp("exec", number, "no-such-program").returncode == 127
    assert "is not a terminal" in cp("exec", "-t", number, "true", stdin=subprocess.DEVNULL).stderr
    ok("cancel", number, "--grace", "0")
    cp("wait", number)
    assert "is cancelled" in cp("exec", number, "true").stderr and cp("exec", 99, "true").returncode == 4


@pytest.mark.needs("root", "fuse", "runc", "busybox")
def test_a_command_runs_in_the_container_of_a_job(image: Path, pool: Path, controller: object) -> None:
    number = ok("submit", "--image", "b:1", "--", "sh", "-c", "echo 1 >/tmp/mark; sleep 60").strip()
    wait_until(lambda: cp("exec", number, "cat", "/tmp/mark").stdout == "1\n")
    assert ok("exec", "-i", number, "sh", "-c", "cat; echo $CPOOL_JOB; hostname >/dev/null", input="in\n") == f"in\n{number}\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TERM", "xterm")
        main, other = os.openpty()
        with subprocess.Popen([BIN / "cpool", "exec", "-it", number, "tty"], stdin=other, stdout=other, stderr=other) as child:
            assert child.wait(30) == 0
        assert b"/dev/pts/" in os.read(main, 4096)
    ok("cancel", number, "--grace", "0")
    cp("wait", number)
    wait_until(lambda: not leftovers(image))
