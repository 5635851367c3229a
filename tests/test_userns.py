"""crun --userns auto: a container's ids are nobody's on the host, and on disk they are those of the image."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cafs import linux, paths
from runner import containers, idmapping
from tests.conftest import BIN
from tests.crunning import crun, shared_at, until
from tests.test_containers import cr, ok
from tests.waiting import SLOW

pytestmark = [pytest.mark.needs("root", "fuse", "runc", "busybox", "unshare"), pytest.mark.usefixtures("entered")]
AUTO = ("--userns", "auto", "--network", "none")
BASE = "b:1"


@pytest.fixture(scope="module")
def shared() -> Iterator[Path]:
    """Not below pytest's own directory, which every run of it closes to others again."""
    with tempfile.TemporaryDirectory(prefix="cafs-ids-") as place, shared_at(Path(place)) as base:
        yield base


@pytest.fixture
def entered(image: Path) -> Iterator[None]:
    """The directory of the state is one that others may enter, as /var/lib/cafs is."""
    image.chmod(0o711)
    yield
    assert os.listdir(image / "run" / "ids") == []


def test_it_has_the_ids_of_the_image_inside_and_others_on_the_host_and_on_disk() -> None:
    seen = crun(
        *AUTO,
        BASE,
        "sh",
        "-c",
        "id -u; tr -s ' ' < /proc/self/uid_map | cut -d' ' -f3; stat -c %u:%g /home/joe /bin/data /etc/hosts",
    )
    lines = seen.stdout.split()
    assert lines[0] == "0" and int(lines[1]) >= 524288 and lines[2:] == ["0:0"] * 3, seen
    ok("run", "-d", "--name", "n1", *AUTO, BASE, "sh", "-c", "touch /made; chown 7:8 /made; touch /ready; exec sleep 1000")
    ok("exec", "n1", "sh", "-c", "until test -f /ready; do sleep 0.01; done")
    container = containers.find("n1")
    first, pid = idmapping.first_of(container), container.state()["pid"]
    assert os.stat(f"/proc/{pid}").st_uid == first
    upper = os.stat(container.path("upper/made"))
    assert (upper.st_uid, upper.st_gid) == (7, 8), "so its range may be another the next time, and a commit needs no change"
    ok("commit", "n1", "made:n")
    ok("rm", "-f", "n1")
    assert crun("--network", "none", "made:n", "stat", "-c", "%u:%g", "/made").stdout == "7:8\n"


def test_two_have_different_ids_and_a_killed_one_gives_its_own_back(image: Path) -> None:
    ok("run", "-d", "--name", "n2", *AUTO, BASE, "sleep", "1000")
    command = [BIN / "crun", "run", "--rm", "--name", "n3", *AUTO, BASE, "sleep", "1000"]
    with subprocess.Popen(command) as other:
        assert until(lambda: len(os.listdir(image / "run" / "ids")) == 2)
        assert until(lambda: containers.find("n3").is_running())
        one, two = (idmapping.first_of(containers.find(name)) for name in ("n2", "n3"))
        assert one != two and one % idmapping.WIDTH == two % idmapping.WIDTH == 0
        other.send_signal(signal.SIGKILL)
    assert until(lambda: os.listdir(image / "run" / "ids") == [str(one)])
    ok("rm", "-f", "n2")


def test_a_volume_has_the_ids_of_the_image_for_all_and_a_directory_of_the_host_has_its_own(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    secret.chmod(0o600)
    for above in (tmp_path, tmp_path.parent):
        above.chmod(0o755)
    volume = ("-v", "owned:/home", "-v", f"{tmp_path}:/host")
    assert crun(*AUTO, *volume, BASE, "sh", "-c", "touch /home/joe/f && chown 5:6 /home/joe/f").returncode == 0
    for flags in (AUTO, ("--network", "none")):
        assert crun(*flags, *volume, BASE, "stat", "-c", "%u:%g", "/home/joe/f").stdout == "5:6\n"
    refused = crun(*AUTO, *volume, BASE, "sh", "-c", "stat -c %u /host/secret; cat /host/secret || touch /host/new")
    assert refused.stdout == "65534\n" and refused.returncode, refused.stderr
    ok("run", "-d", "--name", "n5", *AUTO, *volume, BASE, "sleep", "1000")
    listed = subprocess.run([BIN / "crun", "cp", "n5:/host/secret", "-"], capture_output=True, check=True).stdout
    assert b" 0/0 " in subprocess.run(["tar", "-tvn"], input=listed, capture_output=True, check=True).stdout, (
        "it stays whose it is"
    )
    ok("rm", "-f", "n5")
    assert crun("--network", "none", *volume, BASE, "cat", "/host/secret").stdout == "x"
    ok("volume", "rm", "owned")


def test_what_the_source_of_a_mount_may_not_do_its_mount_may_not_either(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    linux.mount("tmpfs", str(tmp_path / "t"), "tmpfs", linux.MS_NOSUID | linux.MS_NODEV)
    try:
        (tmp_path / "t" / "a").write_text("a")
        done = crun(*AUTO, "-v", f"{tmp_path}/t:/t:ro", BASE, "sh", "-c", "cat /t/a; grep ' /t ' /proc/mounts; ! touch /t/b")
        assert done.returncode == 0 and done.stdout.startswith("atmpfs /t tmpfs ro,nosuid,nodev"), done
    finally:
        linux.umount(str(tmp_path / "t"), linux.MNT_DETACH)


def test_what_is_copied_has_the_ids_of_each_side(tmp_path: Path) -> None:
    ok("run", "-d", "--name", "n4", *AUTO, BASE, "sleep", "1000")
    (tmp_path / "in").write_text("in")
    os.chown(tmp_path / "in", 3, 4)
    ok("cp", tmp_path / "in", "n4:/plain")
    ok("cp", "-a", tmp_path / "in", "n4:/kept")
    archive = subprocess.run(["tar", "-c", "in"], cwd=tmp_path, capture_output=True, check=True).stdout
    subprocess.run([BIN / "crun", "cp", "-", "n4:/tmp"], input=archive, check=True)
    assert ok("exec", "n4", "stat", "-c", "%u:%g", "/plain", "/kept", "/tmp/in").split() == ["0:0", "3:4", "3:4"]
    assert ok("exec", "n4", "sh", "-c", "echo again > /dev/stdout") == "again\n"
    ok("cp", "-a", "n4:/kept", tmp_path / "out")
    assert ((tmp_path / "out").stat().st_uid, (tmp_path / "out").stat().st_gid) == (3, 4)
    listed = subprocess.run([BIN / "crun", "cp", "n4:/kept", "-"], capture_output=True, check=True).stdout
    assert b" 3/4 " in subprocess.run(["tar", "-tvn"], input=listed, capture_output=True, check=True).stdout
    ok("rm", "-f", "n4")


def test_a_network_and_a_terminal_are_its_own_and_what_needs_the_hosts_ids_is_refused(image: Path) -> None:
    said = crun(
        "--userns",
        "auto",
        "--cap-add",
        "NET_ADMIN",
        BASE,
        "sh",
        "-c",
        "ip addr add 10.9.8.7/32 dev lo && ip addr; echo out > /dev/stdout",
    )
    assert "10.9.8.7" in said.stdout and "eth0" in said.stdout and said.stdout.endswith("out\n"), said
    assert crun("-t", *AUTO, BASE, "tty").stdout.strip() == "/dev/pts/0"
    for flags in (("--network", "host"), ("--pid", "host"), ("--privileged",)):
        refused = crun("--userns", "auto", *flags, BASE, "true")
        assert refused.returncode == 125 and f"goes not with {' '.join(flags)}" in refused.stderr
    assert cr("run", "--userns", "keep-id", BASE, "true").returncode == 125


def test_a_range_of_who_was_killed_too_early_is_free_again(image: Path) -> None:
    (image / "run" / "ids").mkdir(exist_ok=True)
    (image / "run" / "ids" / "524288").write_text("f" * 64)
    ok("gc")
    assert os.listdir(image / "run" / "ids") == []


def test_ids_that_the_administrator_gives_to_containers_are_taken(tmp_path: Path) -> None:
    (tmp_path / "sub").write_text("joe:100000:65536\ncontainers:1000000:131072\n")
    binds = "touch /etc/subuid /etc/subgid; " + "".join(
        f"mount --bind {tmp_path}/sub /etc/sub{kind}; " for kind in ("uid", "gid")
    )
    crun_run = [BIN / "crun", "run", "--rm", *AUTO, BASE, "cat", "/proc/self/uid_map"]
    command = ["unshare", "-m", "/bin/sh", "-c", binds + 'exec "$@"', "sh", *crun_run]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60 * SLOW)
    assert done.stdout.split() == ["0", "1000000", "65536"], done.stderr
    assert os.path.isdir(paths.run())
