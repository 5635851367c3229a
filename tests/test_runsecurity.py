"""Attempts from inside a container, each a real one."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from runner import containers
from tests.conftest import BIN, Run
from tests.crunning import crun, leftovers, make_rootfs, until

pytestmark = pytest.mark.needs("root", "fuse", "runc", "busybox")


@pytest.mark.parametrize(
    "script",
    [
        "echo x > /proc/sysrq-trigger",
        "echo x > /proc/sys/kernel/core_pattern",
        "echo x > /sys/kernel/uevent_helper",
        "cat /proc/kcore | head -c 1 | grep .",
        "ls /sys/firmware | grep .",
        "grep . /proc/timer_list",
        "mount -t tmpfs none /tmp",
        "mount -o remount,rw /proc/sys",
        "mount -t proc proc /tmp",
        "echo 1 > /sys/fs/cgroup/memory/cgroup.procs",
        "mkdir /sys/fs/cgroup/memory/new",
        "mknod /tmp/disk b 254 0 && cat /tmp/disk",
        "mknod /tmp/kmsg c 1 11 && cat /tmp/kmsg",
        "ls /dev/kmsg /dev/mem",
        "hostname changed",
        "date -s 2000-01-01; date +%Y | grep 2000",
    ],
)
def test_what_a_container_may_not_do_fails(image: Path, script: str) -> None:
    done = crun("--network", "none", "b:1", "sh", "-c", script)
    assert done.returncode not in (0, 125, 126, 127), done.stdout


def test_processes_of_the_host_cannot_be_seen_or_touched(image: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as victim:
        done = crun("b:1", "sh", "-c", f"kill -9 {victim.pid}; cat /proc/{victim.pid}/environ; ls -d /proc/[0-9]*")
        assert victim.poll() is None
        assert len(done.stdout.split()) <= 3, "its own alone"
        victim.kill()


def test_the_runtimes_program_is_not_changed_by_running_it(image: Path) -> None:
    """CVE-2019-5736: the command is the runtime itself."""
    runc = shutil.which("runc")
    assert runc
    before = hashlib.sha256(Path(runc).read_bytes()).hexdigest()
    for command in (["/proc/self/exe", "init"], ["sh", "-c", "exec 9>>/proc/1/exe"], ["sh", "-c", "echo x > /proc/self/exe"]):
        crun("b:1", *command)
    assert hashlib.sha256(Path(runc).read_bytes()).hexdigest() == before


def test_no_descriptor_is_leaked_by_any_way_in(image: Path) -> None:
    """And nothing is reached by the descriptors of others: run, exec, in the background, with a terminal."""
    fd = os.open("/etc", os.O_RDONLY)
    os.set_inheritable(fd, True)
    try:
        assert crun("b:1", "ls", "/proc/self/fd", pass_fds=(fd,)).stdout.split() == ["0", "1", "2", "3"]
        subprocess.run(
            [BIN / "crun", "run", "-d", "--name", "fds", "b:1", "sleep", "60"], pass_fds=(fd,), capture_output=True, check=True
        )
        done = subprocess.run(
            [BIN / "crun", "exec", "fds", "ls", "/proc/self/fd"], pass_fds=(fd,), capture_output=True, check=True
        )
        assert done.stdout.split() == [b"0", b"1", b"2", b"3"]
        assert subprocess.run(
            [BIN / "crun", "exec", "fds", "ls", "/proc/1/fd"], capture_output=True, check=True
        ).stdout.split() == [b"0", b"1", b"2"]
        done = subprocess.run(
            [BIN / "crun", "exec", "-t", "fds", "ls", "/proc/self/fd"], pass_fds=(fd,), capture_output=True, check=True
        )
        assert done.stdout.split() == [b"0", b"1", b"2", b"3"]
        for where in ("/proc/self/fd/5", "/proc/self/cwd", "//proc/1/root"):
            assert (
                subprocess.run([BIN / "crun", "exec", "-w", where, "fds", "true"], capture_output=True, check=False).returncode
                == 125
            )
    finally:
        os.close(fd)
        subprocess.run([BIN / "crun", "rm", "-f", "fds"], capture_output=True, check=True)


def test_set_user_id_bits_count_unless_new_privileges_are_forbidden(home: Path, tmp_path: Path, cmd: Run) -> None:
    make_rootfs(tmp_path / "rootfs")
    (tmp_path / "rootfs" / "bin" / "grep").unlink()
    shutil.copy(tmp_path / "rootfs" / "bin" / "busybox", tmp_path / "rootfs" / "bin" / "grep")
    (tmp_path / "rootfs" / "bin" / "grep").chmod(0o4755)
    assert cmd("cafs-index", "create", tmp_path / "rootfs", "-t", "s:1").returncode == 0
    run = ["crun", "run", "--rm", "--network", "none", "-u", "joe"]
    look = ["s:1", "/bin/grep", "Uid:", "/proc/self/status"]
    assert cmd(*run, *look).stdout.split()[1:3] in ([b"1000", b"0"], [b"1000", b"1000"])
    assert cmd(*run, "--security-opt", "no-new-privileges", *look).stdout.split()[1:3] == [b"1000", b"1000"]
    assert b"NoNewPrivs:\t1" in cmd(*run, "--security-opt", "no-new-privileges", "s:1", "cat", "/proc/self/status").stdout


def test_links_of_the_image_lead_no_mount_out_of_it(home: Path, tmp_path: Path, cmd: Run) -> None:
    """Targets of volumes, of /etc/resolv.conf and of the working directory are links to the host's paths."""
    make_rootfs(tmp_path / "rootfs")
    outside = tmp_path / "outside"
    (outside / "sub").mkdir(parents=True)
    (outside / "file").write_text("the host's")
    up = "../../../../../../.."
    for name, target in (
        ("data", f"{up}{outside}"),
        ("etc/resolv.conf", f"{up}{outside}/file"),
        ("work", f"{up}{outside}/sub"),
    ):
        (tmp_path / "rootfs" / name).symlink_to(target)
    assert cmd("cafs-index", "create", tmp_path / "rootfs", "-t", "h:1").returncode == 0
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "f").write_text("given")
    script = "cat /data/f; echo new > /data/made; mkdir -p /work; cd /work; touch here; cat /etc/resolv.conf > /dev/null"
    done = cmd("crun", "run", "--rm", "-v", f"{tmp_path}/given:/data", "-v", "vol:/work/deep", "h:1", "sh", "-c", script)
    assert done.stdout == b"given", done.stderr
    assert sorted(str(path.relative_to(outside)) for path in outside.rglob("*")) == ["file", "sub"]
    assert (outside / "file").read_text() == "the host's" and (tmp_path / "given" / "made").exists()


def test_a_volume_is_not_seeded_through_a_link(home: Path, tmp_path: Path, cmd: Run) -> None:
    make_rootfs(tmp_path / "rootfs")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("secret")
    (tmp_path / "rootfs" / "data").mkdir()
    (tmp_path / "rootfs" / "data" / "in").symlink_to(f"{tmp_path}/secret")
    (tmp_path / "rootfs" / "link").symlink_to(f"../../../../../../..{tmp_path}/secret")
    assert cmd("cafs-index", "create", tmp_path / "rootfs", "-t", "v:1").returncode == 0
    for name in ("data", "link"):
        assert cmd("crun", "run", "--rm", "--network", "none", "-v", f"{name}:/{name}", "v:1", "true").returncode == 0
        kept = tmp_path / "state" / "volumes" / name / "_data"
        assert not any(path.name == "key" for path in kept.iterdir())
    assert os.readlink(tmp_path / "state" / "volumes" / "data" / "_data" / "in") == f"{tmp_path}/secret"


def test_others_cannot_look_into_containers(image: Path) -> None:
    subprocess.run(
        [BIN / "crun", "run", "-d", "--name", "priv", "-e", "SECRET=x", "b:1", "sleep", "60"], capture_output=True, check=True
    )
    for path in (image / "state" / "containers", image / "state" / "names", image / "run" / "runc"):
        assert path.stat().st_mode & 0o077 == 0, path
    for path in (image / "state" / "containers").glob("*/*.json"):
        assert path.stat().st_mode & 0o077 == 0, path
    environment = {**os.environ, "SECRET": "x"}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        assert b"SECRET=x" not in words or b"crun" not in words, "secrets are in no arguments"
    del environment
    subprocess.run([BIN / "crun", "rm", "-f", "priv"], capture_output=True, check=True)


def test_no_other_user_reaches_a_containers_files_also_after_one_with_ids_of_its_own(image: Path) -> None:
    """CVE-2021-41091: a file with the set-user-id bit is made inside, and run outside."""
    modes = {above: stat.S_IMODE(above.stat().st_mode) for above in (image, *image.parents)}
    for above, mode in modes.items():
        above.chmod(mode | 0o001)
    try:
        crun("--userns", "auto", "--network", "none", "b:1", "true")
        script = "cp /bin/busybox /tmp/id; chmod 4755 /tmp/id; touch /ready; exec sleep 60"
        subprocess.run(
            [BIN / "crun", "run", "-d", "--name", "suid", "--network", "none", "b:1", "sh", "-c", script], check=True
        )
        made = Path(containers.find("suid").path("upper/tmp/id"))
        assert until(lambda: made.parent.parent.joinpath("ready").exists()) and made.stat().st_mode & stat.S_ISUID
        with pytest.raises(PermissionError):
            subprocess.run([made, "-u"], user=65534, group=65534, extra_groups=[], check=False)
        for one in [*(image / "state").iterdir(), *(image / "run").iterdir(), made.parent.parent.parent]:
            assert one.stat().st_mode & 0o077 == 0, one
    finally:
        for above, mode in modes.items():
            above.chmod(mode)
        subprocess.run([BIN / "crun", "rm", "-f", "suid"], capture_output=True, check=False)


def test_what_is_mounted_below_a_read_only_directory_is_read_only(image: Path, tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", tmp_path / "below"], check=True)
    try:
        write = ["b:1", "touch", "/d/below/made"]
        mount = f"type=bind,source={tmp_path},target=/d,readonly"
        for flags in (("-v", f"{tmp_path}:/d:ro"), ("--mount", mount), ("--mount", f"{mount},bind-recursive=readonly")):
            assert "Read-only" in crun("--network", "none", *flags, *write).stderr, flags
        assert crun("--network", "none", "--mount", f"{mount},bind-recursive=writable", *write).returncode == 0
        (tmp_path / "below" / "made").unlink()
        assert crun("--network", "none", "--mount", f"{mount},bind-nonrecursive", "b:1", "ls", "/d/below").stdout == ""
    finally:
        subprocess.run(["umount", tmp_path / "below"], check=True)


@pytest.mark.parametrize("user", ["0", "1000"])
def test_pipes_of_the_caller_are_not_the_commands(image: Path, user: str) -> None:
    """It reads nothing that others write into the same pipe, and writes nothing into its input."""
    script = "cat; echo injected > /proc/self/fd/0; echo mine; sleep 1; exec head -n 1 < /proc/self/fd/1 >&2"
    command = [BIN / "crun", "run", "--rm", "-i", "--network", "none", "-u", user, "b:1", "timeout", "4", "sh", "-c", script]
    given, there = os.pipe()
    reader, writer = os.pipe()
    os.write(there, b"line\n")
    with subprocess.Popen(command, stdin=given, stdout=writer, stderr=subprocess.PIPE) as child:
        os.close(there)
        seen = b""
        while not seen.endswith(b"mine\n"):
            seen += os.read(reader, 100)
        os.write(writer, b"the caller's own\n")
        assert child.stderr and b"caller" not in child.stderr.read() and seen == b"line\nmine\n"
    assert os.read(given, 100) == b"" and os.fstat(writer).st_uid == os.fstat(given).st_uid == 0
    for fd in (given, reader, writer):
        os.close(fd)


def test_the_version_tells_runcs_and_warns_if_it_is_old(image: Path, tmp_path: Path) -> None:
    for version, warns in (
        ("1.1.5", True),
        ("1.2.7", True),
        ("1.2.9", True),
        ("1.3.5", True),
        ("1.3.6", False),
        ("1.4.2", True),
        ("1.4.3", False),
        ("1.5.0", False),
    ):
        (tmp_path / "runc").write_text(f"#!/bin/sh\necho runc version {version}\n")
        (tmp_path / "runc").chmod(0o755)
        done = subprocess.run(
            [BIN / "crun", "--version"],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        )
        assert f"runc version {version}" in done.stdout and ("CVE-2025-31133" in done.stderr) == warns, version


def test_a_container_that_fills_its_processes_does_not_fill_the_hosts(image: Path) -> None:
    done = crun("--pids-limit", "20", "b:1", "sh", "-c", "i=0; while [ $i -lt 100 ]; do sleep 5 & i=$((i+1)); done; echo all")
    assert "all" not in done.stdout or "can't fork" in done.stderr
    assert until(lambda: not leftovers(image)), "its cgroup goes when nothing is in it"
