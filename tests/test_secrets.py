"""Secrets of jobs: they reach the command, and nothing else: no argument, no file on disk, no log."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool import hiding
from pool.processes import Job
from tests.conftest import wait_until
from tests.pooling import PLAIN, cp, job, ok, read_proc

VALUE = "hunter2-verysecret"


def files_with(place: Path, text: str) -> list[Path]:
    return [one for one in place.rglob("*") if one.is_file() and not one.is_symlink() and text.encode() in one.read_bytes()]


def test_a_job_reads_its_secret_and_nobody_else_does(pool: Path, controller: object, tmp_path: Path) -> None:
    ok("secret", "set", "TOKEN", input=VALUE)
    ok("secret", "set", "other", input="x" * 100)
    assert ok("secret", "ls") == "TOKEN\nother\n"
    half = len("hunter2")
    script = (
        "cat $CPOOL_SECRETS/TOKEN; echo; ls $CPOOL_SECRETS; stat -c %a,%U $CPOOL_SECRETS/TOKEN\n"
        f"echo $CPOOL_SECRETS >{tmp_path}/place; echo a$(cat $CPOOL_SECRETS/TOKEN)b >&2\n"
        f"printf %s {VALUE[:half]}; until test -f {tmp_path}/go; do sleep 0.05; done; printf %s {VALUE[half:]}"
    )
    number = ok("submit", *PLAIN, "--secret", "TOKEN", "--", "sh", "-c", script).strip()
    wait_until(lambda: (tmp_path / "place").exists() and "a" in cp("logs", number).stderr)
    assert cp("logs", number).stdout.endswith(f"400,{pwd.getpwuid(os.geteuid()).pw_name}\n"), (
        "what may be the beginning of it is held back"
    )
    place = Path((tmp_path / "place").read_text().strip())
    assert place.is_relative_to("/dev/shm") and (place / "TOKEN").read_text() == VALUE
    arguments = b"".join(read_proc(pid, "cmdline") for pid in filter(str.isdigit, os.listdir("/proc")))
    assert VALUE.encode() not in arguments
    (tmp_path / "go").touch()
    assert cp("wait", number).returncode == 0
    found = cp("logs", "-f", number)
    stars = "*" * len(VALUE)
    assert found.stdout == f"{stars}\nTOKEN\n400,root\n{stars}" and found.stderr == f"a{stars}b\n"
    wait_until(lambda: not place.exists())
    kept = files_with(tmp_path / "pool", VALUE)
    assert kept == [tmp_path / "pool" / "secrets" / "owner" / "TOKEN"] and kept[0].stat().st_mode & 0o777 == 0o600
    assert "TOKEN" in str(job(number)["spec"]) and VALUE not in str(job(number))


def test_a_secret_that_is_not_there_is_said_when_it_is_asked_for_and_when_it_is_gone(pool: Path, controller: object) -> None:
    refused = cp("submit", *PLAIN, "--secret", "NONE", "--", "true")
    assert refused.returncode == 4 and "no secret 'NONE'" in refused.stderr
    ok("secret", "set", "A", input="value")
    number = ok("submit", *PLAIN, "--hold", "--secret", "A", "--", "true").strip()
    ok("secret", "rm", "A")
    ok("release", number)
    assert cp("wait", number).returncode == 125 and "no secret 'A'" in str(job(number)["reason"])
    for words, text in ((("secret", "set", "../x"), "x"), (("secret", "set", "A"), ""), (("secret", "set", "A"), "x" * 70_000)):
        assert cp(*words, input=text).returncode == 2
    assert cp("secret", "rm", "A").returncode == 4 and ok("secret", "ls") == ""


def test_secrets_are_kept_without_a_controller_too(pool: Path) -> None:
    ok("secret", "set", "A", input="value")
    assert ok("secret", "ls") == "A\n" and (pool / "secrets" / "owner").stat().st_mode & 0o777 == 0o700
    ok("secret", "rm", "A")
    assert ok("secret", "ls") == ""


@pytest.mark.needs("root", "fuse", "runc", "busybox")
def test_in_an_image_secrets_are_below_run_secrets_for_whatever_user(image: Path, pool: Path, controller: object) -> None:
    ok("secret", "set", "A", input="some value")
    number = ok(
        "submit",
        "--image",
        "b:1",
        "--secret",
        "A",
        "--",
        "sh",
        "-c",
        "echo $CPOOL_SECRETS; stat -c %s $CPOOL_SECRETS/A; cat /run/secrets/A; touch /run/secrets/x 2>/dev/null; echo $?",
    ).strip()
    assert cp("wait", number).returncode == 0, cp("logs", number).stderr
    assert ok("logs", number) == "/run/secrets\n10\n**********1\n"


def test_somebody_elses_directory_in_memory_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hiding, "_MEMORY", str(tmp_path))
    place = hiding.place_of(str(tmp_path / "p.w" / "jobs" / "1.1"))
    top = tmp_path / f"cafs-agent-{os.geteuid()}"
    top.mkdir(mode=0o755)
    with pytest.raises(PermissionError):
        hiding.put(place, {"A": "eA=="}, is_for_all=False)
    top.rmdir()
    top.symlink_to("/")
    with pytest.raises(PermissionError):
        hiding.put(place, {"A": "eA=="}, is_for_all=False)


@given(
    st.lists(st.sampled_from([b"abcd", b"abcdabce", b"ab", b"x", b"dabc", b"\n"]), max_size=20),
    st.lists(st.integers(1, 9), max_size=60),
    st.integers(0, 60),
)
def test_secrets_are_hidden_however_a_log_is_cut_and_however_far_it_is_written(
    parts: list[bytes], cuts: list[int], written: int
) -> None:
    """Pieces of a log that grows are, put together, the whole log with each secret hidden."""
    import tempfile

    secrets, whole = [b"abcdabce", b"abcd"], b"".join(parts)
    with tempfile.TemporaryDirectory() as place:
        one = Job(place, {"id": 1, "attempt": 1, "has_secrets": True})
        one._secrets = secrets
        path, found = Path(place) / "out", b""
        path.write_bytes(whole[:written])
        for size in cuts:
            found += one.read("out", len(found), size)[0]
        assert not any(secret in found for secret in secrets)
        path.write_bytes(whole)
        one.ended = {"code": 0}
        while data := one.read("out", len(found), 7)[0]:
            found += data
        wanted = hiding.hidden(whole, secrets)
        assert len(found) == len(whole) and not any(secret in found for secret in secrets)
        assert all(a == b or a == ord("*") or b == ord("*") for a, b in zip(found, wanted, strict=True))
