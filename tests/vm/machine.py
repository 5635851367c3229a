"""A virtual machine with another Debian: its own kernel, systemd, cgroup v2; its power can be cut.

By emulation (qemu's TCG), since KVM is not everywhere: some 5 to 10 times slower than the host.  The disk of a suite is made once, in
a directory that is kept (CAFS_VM, default ~/.cache/cafs-vm), with every program of packages.sh and a Python environment of what the
tests import; each boot writes to a copy-on-write layer that is thrown away.

usage: python -m tests.vm.machine make SUITE | shell SUITE
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

from cafs import linux

ROOT = Path(__file__).resolve().parent.parent.parent
SUITES = ("bookworm", "trixie", "sid")
PYTHON = "/opt/tests/bin/python"
_LIBRARIES = "click xxhash zstandard rich urllib3 boto3 paramiko cryptography pyyaml pytest pytest-xdist hypothesis moto[ec2,iam,s3,server]"
_PROGRAMS = "systemd-sysv dbus dbus-user-session libpam-systemd udev linux-image-cloud-amd64 ca-certificates xfsprogs e2fsprogs zstd sudo"
_NOT_NEEDED = {"debootstrap", "iptables"}
_VERSION = b"1"
"""Of what is done here to make a machine: another one, another machine."""

_DISK = "16G"
_MEMORY = "3G"
_BOOT_LIMIT_S = 900


class VmError(Exception):
    """A machine cannot be made, or does not answer."""


def missing() -> list[str]:
    """The programs that are needed here and are not there."""
    return [name for name in ("qemu-system-x86_64", "qemu-img", "debootstrap", "ssh", "mkfs.ext4") if not shutil.which(name)]


def directory(suite: str) -> Path:
    """Where the machine of a suite is kept; another one when what it is made of changes."""
    made_of = (ROOT / "packages.sh").read_bytes() + _VERSION
    top = Path(os.environ.get("CAFS_VM") or Path.home() / ".cache/cafs-vm")
    return top / f"{suite}-{hashlib.sha256(made_of).hexdigest()[:12]}"


def make(suite: str) -> Path:
    """The machine of a suite, made unless it is there.  Raise VmError."""
    place = directory(suite)
    if (place / "made").exists():
        return place
    shutil.rmtree(place, ignore_errors=True)
    root = place / "root"
    root.mkdir(parents=True)
    log = open(place / "make.log", "wb")
    print(f"vm: making {suite}: {place / 'make.log'} has the details", file=sys.stderr, flush=True)

    def run(*command: object, **options: object) -> None:
        done = subprocess.run(
            [str(one) for one in command], stdout=log, stderr=log, stdin=subprocess.DEVNULL, check=False, **options
        )  # type: ignore[call-overload]
        if done.returncode:
            raise VmError(
                f"cannot make {suite}: {' '.join(map(str, command))[:200]}: exit code {done.returncode}, see {place / 'make.log'}"
            )

    names = re.search(r'^packages="([^"]+)"', (ROOT / "packages.sh").read_text(), re.MULTILINE)
    assert names
    programs = [name for name in names[1].split() if name not in _NOT_NEEDED] + _PROGRAMS.split()
    run("debootstrap", "--variant=minbase", suite, root, _mirror())
    shutil.copy("/etc/ssl/certs/ca-certificates.crt", root / "root/host-certificates.crt")
    for name in ("/etc/pip.conf", "/etc/resolv.conf"):
        if os.path.exists(name):
            shutil.copy(name, root / name[1:])
    (root / "usr/sbin/policy-rc.d").write_text("#!/bin/sh\nexit 101\n")
    (root / "usr/sbin/policy-rc.d").chmod(0o755)
    inside = {
        **os.environ,
        "DEBIAN_FRONTEND": "noninteractive",
        "PIP_CERT": "/root/host-certificates.crt",
        "LC_ALL": "C",
        "HOME": "/root",
    }
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_DIR", "PIP_FIND_LINKS"):
        inside.pop(name, None)
    have = subprocess.run(["chroot", root, "apt-cache", "pkgnames"], capture_output=True, text=True, check=True).stdout.split()
    programs = [name for name in programs if name in have]
    (root / "proc").is_dir() and run("mount", "-t", "proc", "proc", root / "proc")
    try:
        run("chroot", root, "apt-get", "install", "-y", "-qq", "--no-install-recommends", *programs, env=inside)
        run("chroot", root, "python3", "-m", "venv", "/opt/tests")
        run("chroot", root, "/opt/tests/bin/pip", "install", "-q", *_LIBRARIES.split(), env=inside)
    finally:
        subprocess.run(["umount", root / "proc"], check=False)
    (root / "usr/sbin/policy-rc.d").unlink()
    _configure(root, place)
    kernel = sorted((root / "boot").glob("vmlinuz-*"))[-1]
    for name in (kernel, root / "boot" / kernel.name.replace("vmlinuz", "initrd.img")):
        shutil.copy(name, place / name.name.split("-")[0])
    run("truncate", "-s", _DISK, place / "disk")
    run("mkfs.ext4", "-q", "-d", root, place / "disk")
    shutil.rmtree(root)
    (place / "made").touch()
    return place


def _mirror() -> str:
    """Where this host has its packages from."""
    for name in ("/etc/apt/sources.list.d/debian.sources", "/etc/apt/sources.list"):
        found = (
            re.search(r"^(?:URIs: |deb (?:\[.*?\] )?)(\S+)", Path(name).read_text(), re.MULTILINE)
            if os.path.exists(name)
            else None
        )
        if found:
            return found[1]
    raise VmError("this host says no mirror of Debian's packages")


def _configure(root: Path, place: Path) -> None:
    """A host called vm: network by DHCP, root by our key, a user with subordinate ids whose session outlives a login."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", place / "key"], check=True)
    (root / "root/.ssh").mkdir(mode=0o700, exist_ok=True)
    shutil.copy(place / "key.pub", root / "root/.ssh/authorized_keys")
    files = {
        "etc/systemd/network/10.network": "[Match]\nName=en* eth*\n[Network]\nDHCP=yes\n",
        "etc/hostname": "vm\n",
        "etc/hosts": "127.0.0.1 localhost vm\n",
        "etc/fstab": "/dev/vda / ext4 defaults 0 1\n",
        "etc/resolv.conf": "nameserver 10.0.2.3\n",
        "etc/systemd/system.conf.d/fast.conf": "[Manager]\nDefaultTimeoutStopSec=10s\n",
        "etc/ssh/sshd_config.d/tests.conf": "MaxStartups 100\nMaxSessions 100\nUseDNS no\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).unlink(missing_ok=True)
        (root / name).write_text(text)
    for command in (
        ["systemctl", "enable", "systemd-networkd", "ssh"],
        [
            "systemctl",
            "mask",
            "apt-daily.timer",
            "apt-daily-upgrade.timer",
            "man-db.timer",
            "e2scrub_all.timer",
            "fstrim.timer",
        ],
        ["useradd", "-m", "-s", "/bin/bash", "u1"],
    ):
        subprocess.run(["chroot", root, *command], capture_output=True, check=True)


class Machine:
    """A running machine.  data: a second disk, kept by the caller; system: what is written to the first one, kept if it is named.

    system is a qcow2 file over the disk of the suite, made if it is not there; `resume` reads it and keeps nothing of what is written.
    """

    def __init__(self, place: Path, data: Path | None = None, system: Path | None = None) -> None:
        self._place, self._data, self._system = place, data, system
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0

    def _start(self, *more: str, is_kept: bool = False) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        monitor = self._place / f"monitor.{os.getpid()}"
        monitor.unlink(missing_ok=True)
        command = ["qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", _MEMORY]
        command += ["-kernel", f"{self._place}/vmlinuz", "-initrd", f"{self._place}/initrd.img"]
        command += ["-append", "root=/dev/vda rw console=ttyS0 quiet cafs.vm"]
        disk, kind = (self._system, "qcow2") if self._system else (f"{self._place}/disk", "raw")
        command += ["-drive", f"file={disk},if=virtio,format={kind},snapshot={'off' if is_kept else 'on'}"]
        if self._data:
            command += ["-drive", f"file={self._data},if=virtio,format=raw,cache=writeback"]
        command += [
            "-nic",
            f"user,model=virtio-net-pci,hostfwd=tcp:127.0.0.1:{self._port}-:22",
            "-nographic",
            "-monitor",
            "none",
        ]
        command += ["-serial", f"file:{self._place}/console.{os.getpid()}", "-qmp", f"unix:{monitor},server=on,wait=off", *more]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=linux.die_with_parent)

    def boot(self) -> None:
        """Start it, and wait until it answers.  Raise VmError."""
        if self._system:
            over = ["-q", "-f", "qcow2", "-b", f"{self._place}/disk", "-F", "raw"]
            subprocess.run(["qemu-img", "create", *over, self._system], check=True)
        self._start(is_kept=self._system is not None)
        self._wait_for_ssh()

    def _wait_for_ssh(self) -> None:
        assert self._process
        deadline = time.monotonic() + _BOOT_LIMIT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            if self.run("true", limit_s=90).returncode == 0:
                return
            time.sleep(0.5)
        self.cut()
        raise VmError("the machine does not answer")

    def command(self, *words: str) -> list[str]:
        """What runs a shell command there, as root."""
        options = [
            "StrictHostKeyChecking=no",
            "UserKnownHostsFile=/dev/null",
            "LogLevel=ERROR",
            "ConnectTimeout=60",
            "ServerAliveInterval=30",
            "ServerAliveCountMax=10",
        ]
        ssh = ["ssh", "-i", f"{self._place}/key", "-p", str(self._port), *(word for one in options for word in ("-o", one))]
        return [*ssh, "root@127.0.0.1", *words]

    def run(self, script: str, *, limit_s: float = 600, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """Run a shell command there.  Exit code 255: it could not be reached, or took longer than LIMIT_S."""
        try:
            return subprocess.run(self.command(script), input=given, capture_output=True, timeout=limit_s, check=False)
        except subprocess.TimeoutExpired as error:
            return subprocess.CompletedProcess(
                error.cmd, 255, error.stdout or b"", (error.stderr or b"") + b"vm: took too long\n"
            )

    def check(self, script: str, *, limit_s: float = 600, given: bytes = b"") -> bytes:
        """As `run`; raise VmError where it fails."""
        done = self.run(script, limit_s=limit_s, given=given)
        if done.returncode:
            raise VmError(f"{script}: exit code {done.returncode}: {done.stderr.decode(errors='replace')[-2000:]}")
        return done.stdout

    def install(self) -> None:
        """Build the wheel of this tree and install it there, without the tree; the tests lie in /root/tree/tests."""
        with tempfile.TemporaryDirectory() as made:
            names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
            copy = ["tar", "-C", str(ROOT), "-c", "--null", "--ignore-failed-read", "-T", "-"]
            tree = subprocess.run(copy, input=names, capture_output=True, check=True).stdout
            subprocess.run(["tar", "-C", made, "-x"], input=tree, check=True)
            subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", made, made], check=True)
            kept = ["tests", "man", "examples", "README.md", "pyproject.toml", *(one.name for one in Path(made).glob("*.whl"))]
            data = subprocess.run(["tar", "-C", made, "-cz", *kept], capture_output=True, check=True).stdout
        unpack = "mkdir -p /root/tree && tar -C /root/tree -xzf - && chmod 755 /root /root/tree"
        self.check(unpack, given=data)
        self.check(
            "/opt/tests/bin/pip install -q --no-deps --no-index --force-reinstall /root/tree/*.whl && ln -sf /opt/tests/bin/c* /usr/local/bin/"
        )

    def cut(self) -> None:
        """Cut its power: what it had not written is lost."""
        if self._process:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None
            for name in ("monitor", "console"):
                (self._place / f"{name}.{os.getpid()}").unlink(missing_ok=True)

    stop = cut
    """Nothing on its own disk is kept."""

    # A machine that has booted once can be had again in a second, without its second disk having been looked at.

    def save(self, path: Path) -> None:
        """Write the state of the running machine to PATH and end it."""
        self._ask("stop")
        self._ask("migrate", uri=f"exec:cat >{path}")
        while self._ask("query-migrate").get("status") not in ("completed", "failed"):
            time.sleep(0.2)
        self.cut()

    def resume(self, path: Path) -> None:
        """Start from a state that was saved.  Raise VmError."""
        self._start("-incoming", f"exec:cat {path}")
        deadline = time.monotonic() + _BOOT_LIMIT_S
        while time.monotonic() < deadline:
            try:
                if self._ask("query-status").get("status") == "running":
                    break
                self._ask("cont")
            except (OSError, VmError):
                pass
            time.sleep(0.2)
        self._wait_for_ssh()
        boot = "/proc/sys/kernel/random/boot_id"  # it is another boot to who reads that
        self.check(f"date -s @{int(time.time())}; echo {uuid.uuid4()} >/run/boot_id; mount --bind /run/boot_id {boot}")

    def _ask(self, command: str, **arguments: object) -> dict[str, object]:
        """One command of QMP, the control protocol of qemu."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(60)
            connection.connect(str(self._place / f"monitor.{os.getpid()}"))
            lines = connection.makefile("rw")
            lines.readline()
            for word, more in (("qmp_capabilities", {}), (command, arguments)):
                lines.write(json.dumps({"execute": word, "arguments": more}) + "\n")
                lines.flush()
                reply = json.loads(lines.readline())
                while "event" in reply:
                    reply = json.loads(lines.readline())
            if "error" in reply:
                raise VmError(f"{command}: {reply['error']}")
            return reply["return"] if isinstance(reply["return"], dict) else {}


def main(words: list[str]) -> int:
    if len(words) != 2 or words[0] not in ("make", "shell") or words[1] not in SUITES:
        print(__doc__, file=sys.stderr)
        return 2
    place = make(words[1])
    if words[0] == "shell":
        machine = Machine(place)
        machine.boot()
        machine.install()
        subprocess.run(machine.command(), check=False)
        machine.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
