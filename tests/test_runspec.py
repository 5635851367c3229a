"""What the runtime is told: config.json from images and flags, the seccomp profile, limits; and what flags mean."""

from __future__ import annotations

import errno
import json
import os
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cafs.errors import CafsError, UsageError
from cafs.options import Options, parse
from runner import cgroups, gpus, mounts, seccomp
from runner.containers import signal_number
from runner.create import duration
from runner.flags import ALIASES, DEFAULT_IF_EMPTY, MAY_BE_EMPTY, RUN
from runner.joining import Detacher, keys
from runner.ports import parse_ports
from tests.conftest import BIN, Run
from tests.crunning import crun, make_rootfs
from tests.test_containers import cr

pytestmark = pytest.mark.needs("root", "fuse", "runc", "busybox")
DEBIANS = Path("/usr/share/containers/seccomp.json")
DOCKERS = (
    "AUDIT_WRITE CHOWN DAC_OVERRIDE FOWNER FSETID KILL MKNOD NET_BIND_SERVICE NET_RAW SETFCAP SETGID SETPCAP SETUID SYS_CHROOT"
)


def options(*words: str) -> Options:
    return parse([*words, "i:1"], RUN, ALIASES, program="crun run", stop_at=1)


def config(image: Path, *words: object) -> dict[str, object]:
    """config.json of a container that was made with these flags."""
    done = subprocess.run(
        [BIN / "crun", "run", "--name", "spec", "--network", "none", *map(str, words), "b:1", "true"],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    identity = os.readlink(image / "state" / "names" / "spec")
    found = json.loads((image / "state" / "containers" / identity / "config.json").read_text())
    subprocess.run([BIN / "crun", "rm", "spec"], capture_output=True, check=True)
    assert isinstance(found, dict)
    return found


def check_schema(found: object) -> None:
    """The facts of config-schema.json, version 1.0.2, about what we write: required members, types, closed lists."""

    def is_list(value: object, kind: type) -> bool:
        return isinstance(value, list) and all(isinstance(one, kind) for one in value)

    assert isinstance(found, dict) and set(found) <= {
        "ociVersion",
        "root",
        "process",
        "mounts",
        "hostname",
        "linux",
        "annotations",
    }
    process, linux = found["process"], found["linux"]
    assert is_list(process["args"], str) and process["args"] and is_list(process["env"], str) and process["cwd"].startswith("/")
    assert all("=" in word for word in process["env"])
    assert all(isinstance(process["user"][name], int) for name in ("uid", "gid")) and is_list(
        process["user"]["additionalGids"], int
    )
    for name, held in process["capabilities"].items():
        assert name in ("bounding", "effective", "permitted", "inheritable", "ambient")
        assert is_list(held, str) and all(one.startswith("CAP_") for one in held)
    for limit in process.get("rlimits", []):
        assert limit["type"].startswith("RLIMIT_") and limit["soft"] <= limit["hard"] < 1 << 64
    for mount in found["mounts"]:
        assert mount["destination"].startswith("/") and is_list(mount["options"], str) and isinstance(mount["source"], str)
    assert isinstance(found["root"]["path"], str) and isinstance(found["root"]["readonly"], bool)
    kinds = {"pid", "network", "mount", "ipc", "uts", "user", "cgroup"}
    assert all(one["type"] in kinds for one in linux["namespaces"])
    assert len({one["type"] for one in linux["namespaces"]}) == len(linux["namespaces"])
    for device in linux.get("devices", []):
        assert device["type"] in "cbup" and isinstance(device["major"], int) and set(device) <= {
            "path", "type", "major", "minor", "fileMode", "uid", "gid"
        }  # fmt: skip
    for rule in linux["resources"]["devices"]:
        assert isinstance(rule["allow"], bool) and set(rule["access"]) <= set("rwm")
    if profile := linux.get("seccomp"):
        actions = {"SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL"}
        assert profile["defaultAction"] in actions and profile["architectures"]
        assert all(rule["action"] in actions and is_list(rule["names"], str) for rule in profile["syscalls"])


def test_the_configuration_is_dockers_and_keeps_to_the_schema(image: Path) -> None:
    found = config(image)
    check_schema(found)
    process, linux = found["process"], found["linux"]
    assert process["capabilities"]["bounding"] == [f"CAP_{name}" for name in DOCKERS.split()]  # type: ignore[index]
    assert set(process["capabilities"]) == {"bounding", "effective", "permitted"}  # type: ignore[index]
    assert process["noNewPrivileges"] is False and "rlimits" not in process  # type: ignore[index,operator]
    assert {one["type"] for one in linux["namespaces"]} == {"pid", "ipc", "uts", "mount", "network"}  # type: ignore[index]
    assert "/proc/kcore" in linux["maskedPaths"] and "/proc/sys" in linux["readonlyPaths"]  # type: ignore[index]
    depth = [one["destination"].count("/") for one in found["mounts"]]  # type: ignore[union-attr,attr-defined]
    assert depth == sorted(depth)


def test_every_flag_lands_where_it_belongs(image: Path, tmp_path: Path) -> None:
    found = config(
        image, "-m", "64m", "--memory-reservation", "32m", "--cpus", "0.5", "--cpu-shares", "512", "--cpuset-cpus", "0",
        "--pids-limit", "99", "--ulimit", "nofile=100:200", "--cap-add", "sys_ptrace", "--cap-drop", "CAP_CHOWN",
        "--security-opt", "no-new-privileges", "--read-only", "--tmpfs", "/t:size=1m,exec", "--shm-size", "1m", "-v", f"{tmp_path}:/v:ro",
        "--mount", f"type=bind,src={tmp_path},dst=/m,readonly,bind-propagation=rslave", "--sysctl", "kernel.shmmax=4096",
        "--annotation", "a=b", "--device", "/dev/fuse:/dev/other:r", "-u", "joe", "--group-add", "extra", "--oom-score-adj", "500",
        "--hostname", "box", "-e", "A=b", "--init",
    )  # fmt: skip
    check_schema(found)
    process, linux = found["process"], found["linux"]
    resources = linux["resources"]  # type: ignore[index]
    assert resources["memory"]["limit"] == 64 << 20 and resources["memory"]["reservation"] == 32 << 20
    assert resources["cpu"] == {"period": 100_000, "quota": 50_000, "shares": 512, "cpus": "0"}
    assert resources["pids"] == {"limit": 99}
    assert process["rlimits"] == [{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200}]  # type: ignore[index]
    held = process["capabilities"]  # type: ignore[index]
    assert "CAP_SYS_PTRACE" in held["bounding"] and "CAP_CHOWN" not in held["bounding"] and held["effective"] == []
    assert process["noNewPrivileges"] is True and process["oomScoreAdj"] == 500  # type: ignore[index]
    assert process["user"] == {"uid": 1000, "gid": 1001, "additionalGids": [1001, 2000]}  # type: ignore[index]
    assert process["args"] == ["/dev/.init", "--", "true"]  # type: ignore[index]
    assert found["root"]["readonly"] is True and found["hostname"] == "box" and found["annotations"] == {"a": "b"}  # type: ignore[index]
    by_place = {one["destination"]: one for one in found["mounts"]}  # type: ignore[union-attr,attr-defined,index]
    assert "ro" in by_place["/v"]["options"] and by_place["/m"]["options"] == ["rbind", "ro", "rslave", "rro"]
    assert by_place["/t"]["type"] == "bind" and {"exec", "nosuid"} <= set(by_place["/t"]["options"])
    assert "noexec" not in by_place["/t"]["options"]
    assert f"size={1 << 20}" in by_place["/dev/shm"]["options"]
    assert linux["sysctl"] == {"kernel.shmmax": "4096"}  # type: ignore[index]
    (device,) = linux["devices"]  # type: ignore[index]
    assert (
        device["path"] == "/dev/other"
        and {"allow": True, "access": "r", "type": "c", "major": 10, "minor": 229} in resources["devices"]
    )


def test_what_is_empty_or_zero_is_the_default_where_docker_has_it_so(image: Path) -> None:
    found = config(image, "-u", "", "-w", "", "--platform", "", "--shm-size", "0", "--hostname", "h", "--pid=")
    plain = config(image, "--hostname", "h")
    assert [one for one in found["mounts"] if one["destination"] == "/dev/shm"] == [  # type: ignore[attr-defined]
        one
        for one in plain["mounts"]
        if one["destination"] == "/dev/shm"  # type: ignore[attr-defined]
    ]
    assert found["process"] == plain["process"]


def test_privileged_masks_nothing_and_has_what_this_host_grants(image: Path) -> None:
    found = config(image, "--privileged")
    check_schema(found)
    assert "seccomp" not in found["linux"] and found["linux"]["maskedPaths"] == []  # type: ignore[operator,index]
    assert {"allow": True, "access": "rwm"} in found["linux"]["resources"]["devices"]  # type: ignore[index]
    assert len(found["process"]["capabilities"]["bounding"]) > 20  # type: ignore[index]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ulimit", "nofile=1:99999999999"], "this host grants at most"),
        (["--ulimit", "nofile=9:1"], "soft limit is over"),
        (["--oom-score-adj", "-999"], "this host grants no less than"),
        (["--cap-add", "flying"], "unknown capability 'flying'"),
        (["--memory", "1k"], "at least 6m"),
        (["--memory", "lots"], "is not a size"),
        (["--cpus", "9999"], "more than this host has"),
        (["--memory-swap", "1g"], "needs --memory"),
        (["--sysctl", "vm.swappiness=1"], "not of a namespace"),
        (["--security-opt", "magic"], "unknown security option"),
        (["--security-opt", "seccomp=/nonexistent"], "cannot read seccomp profile"),
        (["--mount", "type=bind,src=/tmp,dst=/x,bind-propagation=rprivate:suid"], "unknown propagation"),
        (["--mount", "type=bind,src=/tmp,dst=/x,lowerdir=/etc"], "unknown option 'lowerdir'"),
        (["--tmpfs", "/x:size=1m,context=y"], "unknown tmpfs option"),
        (["-v", "/tmp:/x", "-v", "/etc:/x"], "two mounts on '/x'"),
        (["-v", "a/../..:/"], "is not SRC:DST"),
        (["--device", "/etc/passwd"], "is not a device"),
        (["--device", "no.such/thing=1"], "no CDI device"),
        (["--network", "nowhere"], "no network 'nowhere'"),
        (["--network", "none", "--network", "host"], "--network is given twice"),
        (["--network", "container:x", "--dns", "1.1.1.1"], "means nothing with --network container:x"),
        (["--uts", "host", "--hostname", "x"], "means nothing with --uts host"),
        (["--no-healthcheck", "--health-cmd", "x"], "means nothing with --no-healthcheck"),
        (["--health-interval", "3s"], "there is no check"),
        (["--health-interval", "soon"], "is not a time"),
        (["--gpus", ""], "--gpus is empty"),
        (["--record="], "--record is empty"),
        (["-v", "", "-v", "/:/x"], "--volume is empty"),
        (["--pull", "always"], "is of the store"),
        (["--platform", "linux/amd64/v9"], "not this host's"),
        (["--expose", "banana"], "is not"),
        (["--security-opt", "no-new-privileges=maybe"], "cannot be 'maybe'"),
        (["--security-opt", "systempaths=open"], "cannot be 'open'"),
        (["--memory", ""], "--memory is empty"),
        (["--mount", "type=bind,src=/tmp,dst=/x,readonly=banana"], "true or false, not 'banana'"),
        (["--mount", "type=bind,src=/tmp,dst=/x,readnly"], "is not K=V"),
        (["--mount", "type=bind,src=/tmp,dst=/x,readonyl=1"], "did you mean readonly?"),
        (["--mount", "type=bind,src=/tmp,src=/etc,dst=/x"], "source is given twice"),
        (["--mount", "type=volume,src=v,dst=/x,volume-driver=nfs"], "unknown driver 'nfs'"),
        (["--mount", "type=bind,src=/tmp,dst=/x,volume-label=a=b"], "unknown option 'volume-label' of a bind mount"),
        (["-v", "/tmp:/x:nocopy"], "nocopy is of named volumes"),
        (["-v", "named:/x:rshared"], "rshared is of directories"),
        (["-v", "/tmp:/x:ro,rw"], "go not together"),
        (["-v", "/tmp:/x:delegeted"], "did you mean delegated?"),
        (["--pid", "container:nobody"], "no container 'nobody'"),
        (["--platform", "linux/s390x"], "not this host's"),
        (["--restart", "sometimes"], "unknown restart policy"),
        (["--restart", "always"], "go not together"),
        (["--stop-signal", "NOTHING"], "unknown signal"),
        (["--cgroup-parent", "../../x"], ""),
        (["--health-retries", "few", "--health-cmd", "x"], "is a number"),
    ],
)
def test_what_makes_no_sense_is_125_and_says_why(image: Path, words: list[str], said: str) -> None:
    done = crun(*words, "b:1", "true")
    if said:
        assert done.returncode == 125 and said in done.stderr, done.stderr
    else:
        assert done.returncode == 0 or "cgroup" in done.stderr, "a parent is below the top, whatever it says"
    assert "Traceback" not in done.stderr


def test_our_seccomp_profile_against_debians() -> None:
    """Theirs is of podman; what differs is what is newer than theirs, and what docker denies."""
    held = [f"CAP_{name}" for name in DOCKERS.split()]
    theirs, ours = seccomp.load(str(DEBIANS), held), seccomp.profile(held)
    assert ours is not None

    def allowed(profile: dict[str, object]) -> set[str]:
        rules = profile["syscalls"]
        assert isinstance(rules, list)
        return {name for rule in rules if rule["action"] == "SCMP_ACT_ALLOW" and not rule.get("args") for name in rule["names"]}

    newer = "cachestat fchmodat2 futex_requeue futex_wait futex_waitv futex_wake getxattrat io_pgetevents io_pgetevents_time64 "
    newer += "listmount listxattrat map_shadow_stack mseal removexattrat riscv_hwprobe setxattrat statmount uretprobe vmsplice"
    assert allowed(ours) - allowed(theirs) <= set(newer.split())
    denied = {
        "bpf",
        "mount",
        "umount2",
        "setns",
        "unshare",
        "keyctl",
        "add_key",
        "kexec_load",
        "init_module",
        "open_by_handle_at",
    }
    assert (
        allowed(ours) & (denied | {"reboot", "swapon", "ptrace_host", "userfaultfd", "io_uring_setup", "perf_event_open"})
        == set()
    )
    assert {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38} in ours["syscalls"]
    assert ours["architectures"] == ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]
    more = seccomp.profile([*held, "CAP_SYS_ADMIN"])
    assert more and {"mount", "clone", "clone3", "setns"} <= allowed(more)


PROBE = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(*a):
    r = libc.syscall(*a)
    return 0 if r >= 0 else ctypes.get_errno()
print(call(435, 0, 0), call(272, 0x10000000), call(165, 0, 0, 0, 0, 0), call(321, 0, 0, 0), call(425, 1, 0), call(135, ctypes.c_ulong(0xffffffff)), call(135, ctypes.c_ulong(0x40000)))
import socket
try: socket.socket(40, socket.SOCK_STREAM); print("vsock")
except OSError as e: print(e.errno)
print(open("/proc/self/status").read().count("Seccomp:\\t2"))
"""
HOST = [
    word
    for name in ("usr", "lib", "lib64", "root/.pyenv")
    if os.path.isdir(f"/{name}")
    for word in ("-v", f"/{name}:/{name}:ro")
]


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers of the calls are x86-64's")
def test_the_kernel_enforces_the_profile(image: Path) -> None:
    """clone3, unshare, mount, bpf, io_uring_setup, personality (asked, refused), vsock."""
    done = crun(*HOST, "b:1", "/usr/bin/python3", "-c", PROBE)
    assert done.stdout == "38 1 1 1 1 0 1\n1\n1\n", done.stderr
    done = crun(*HOST, "--security-opt", "seccomp=unconfined", "b:1", "/usr/bin/python3", "-c", PROBE)
    assert done.stdout.split()[0] == "22" and done.stdout.endswith("\n0\n"), "clone3 is there, and says EINVAL"


def test_a_profile_of_the_users_is_resolved_by_its_conditions(tmp_path: Path) -> None:
    rules = [
        {"names": ["a"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_X"]}},
        {"names": ["b"], "action": "SCMP_ACT_ALLOW", "excludes": {"caps": ["CAP_X"]}},
        {"names": ["c"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "99.0"}},
        {"name": "d", "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "2.6"}, "args": None, "comment": "x"},
        {"names": ["e"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["s390x"]}},
    ]
    (tmp_path / "p").write_text(json.dumps({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": rules}))

    def names(*held: str) -> list[str]:
        return [name for rule in seccomp.load(str(tmp_path / "p"), list(held))["syscalls"] for name in rule["names"]]

    assert names("CAP_X") == ["a", "d"] and names() == ["b", "d"]
    for bad in ("[]", "{", '{"syscalls": 1}', '{"defaultAction": "x", "syscalls": [3]}'):
        (tmp_path / "p").write_text(bad)
        with pytest.raises(CafsError, match="is not a seccomp profile"):
            names()


def test_the_last_value_counts_where_an_empty_one_means_the_default() -> None:
    for words, wanted in ((("-u", "1", "-u", ""), None), (("-u", "", "-u", "1"), "1")):
        found = options(*words, "--entrypoint", "")
        found.settle_empty(default=DEFAULT_IF_EMPTY, kept=MAY_BE_EMPTY)
        assert (found.value("user"), found.value("entrypoint")) == (wanted, "")


def test_flags_are_parsed_as_docker_parses_them() -> None:
    found = parse(
        ["-it", "-eA=1", "-e", "B=2", "--name=x", "--rm=false", "img", "-e", "--rm"],
        RUN,
        ALIASES,
        program="crun run",
        stop_at=1,
    )
    assert found.words == ["img", "-e", "--rm"] and found.all("env") == ["A=1", "B=2"] and found.value("name") == "x"
    assert found.has("interactive") and found.has("tty") and not found.has("rm")
    assert parse(["--", "img", "x"], RUN, ALIASES, program="crun run", stop_at=1).words == ["img", "x"]
    for words in (["--rm=maybe", "i"], ["-e"], ["--nam", "x", "i"], ["-itZ", "i"]):
        with pytest.raises(UsageError):
            parse(words, RUN, ALIASES, program="crun run", stop_at=1)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("80", [("tcp", "", 0, 80)]),
        ("8080:80", [("tcp", "", 8080, 80)]),
        ("8080:80/udp", [("udp", "", 8080, 80)]),
        ("127.0.0.1:8080:80", [("tcp", "127.0.0.1", 8080, 80)]),
        ("127.0.0.1::80", [("tcp", "127.0.0.1", 0, 80)]),
        ("0.0.0.0:1:2", [("tcp", "", 1, 2)]),
        ("7000-7001:80-81", [("tcp", "", 7000, 80), ("tcp", "", 7001, 81)]),
        ("7000-7005:80", [("tcp", "", (7000, 7005), 80)]),
    ],
)
def test_ports(text: str, wanted: list[tuple[str, str, int, int]]) -> None:
    assert parse_ports([text]) == wanted


@pytest.mark.parametrize(
    "text", ["", "x", "80:", ":80:", "0", "65536", "1-3:1-2", "3:1-2", "3-1", "300.1.1.1:1:2", "80/sctp", "::80", "1:2:3:4"]
)
def test_what_is_no_port(text: str) -> None:
    with pytest.raises(UsageError):
        parse_ports([text])


def test_sizes_times_signals_and_keys() -> None:
    assert [cgroups.size(text) for text in ("1", "2b", "3k", "4M", "1.5g", "1GiB")] == [1, 2, 3072, 4 << 20, 3 << 29, 1 << 30]
    assert [duration(text) for text in ("90", "1m30s", "500ms", "1h")] == [90, 90, 0.5, 3600]
    assert [signal_number(text) for text in ("9", "KILL", "SIGTERM", "sigusr1", "RTMIN+1")] == [9, 9, 15, 10, 35]
    assert keys(None) == b"\x10\x11" and keys("ctrl-a,d") == b"\x01d" and keys("") == b""
    detacher = Detacher(b"\x10\x11")
    assert [detacher.feed(data) for data in (b"a\x10", b"b\x10\x10", b"\x11c")] == [
        (b"a", False),
        (b"\x10b\x10", False),
        (b"", True),
    ]
    for bad in ("ctrl-", "ab", "ctrl-ab"):
        with pytest.raises(UsageError):
            keys(bad)


def test_volumes_are_sorted_and_images_volumes_give_way(tmp_path: Path) -> None:
    found = mounts.asked(
        options("-v", f"{tmp_path}:/b/c", "-v", "name:/a", "--tmpfs", "/z"), {"Volumes": {"/a/": {}, "/new": {}, "/": {}}}
    )
    assert [(one["target"], one["type"]) for one in found] == [
        ("/a", "volume"),
        ("/b/c", "bind"),
        ("/new", "volume"),
        ("/z", "tmpfs"),
    ]


def test_the_images_configuration_is_used(home: Path, tmp_path: Path, cmd: Run) -> None:
    """By way of an archive that another tool would make: Entrypoint, Cmd, Env, WorkingDir, User, Volumes, Labels, Healthcheck."""
    make_rootfs(tmp_path / "rootfs")
    (tmp_path / "rootfs" / "data").mkdir()
    (tmp_path / "rootfs" / "data" / "seed").write_text("from the image")
    os.chown(tmp_path / "rootfs" / "data", 1000, 1001)
    subprocess.run(["tar", "cf", tmp_path / "layer.tar", "-C", tmp_path / "rootfs", "."], check=True)
    settings = {
        "Entrypoint": ["/bin/sh", "-c"], "Cmd": ["id -u; pwd; echo $FROM; cat /data/seed; touch /data/new"], "Env": ["FROM=image"],
        "WorkingDir": "/home/joe", "User": "joe", "Volumes": {"/data": {}}, "Labels": {"l": "v"}, "StopSignal": "SIGUSR2",
        "Healthcheck": {"Test": ["CMD", "true"], "Interval": 10**9},
    }  # fmt: skip
    (tmp_path / "c.json").write_text(json.dumps({"architecture": "amd64", "os": "linux", "config": settings, "rootfs": {"type": "layers", "diff_ids": [_digest(tmp_path / "layer.tar")]}}))  # fmt: skip
    (tmp_path / "manifest.json").write_text(json.dumps([{"Config": "c.json", "RepoTags": ["i:1"], "Layers": ["layer.tar"]}]))
    subprocess.run(["tar", "cf", tmp_path / "i.tar", "-C", tmp_path, "manifest.json", "c.json", "layer.tar"], check=True)
    assert cmd("cafs-index", "create", f"docker-archive:{tmp_path}/i.tar", "-t", "i:1").returncode == 0
    done = cmd("crun", "run", "--name", "box", "--network", "none", "i:1")
    assert done.stdout == b"1000\n/home/joe\nimage\nfrom the image", done.stderr
    about = json.loads(cmd("crun", "inspect", "box").stdout)
    assert about["Config"]["Labels"] == {"l": "v"} and about["Config"]["StopSignal"] == 12
    assert about["Config"]["Healthcheck"]["test"] == ["true"] and about["Config"]["Healthcheck"]["interval_s"] == 1
    (volume,) = cmd("crun", "volume", "ls", "-q").stdout.split()
    data = tmp_path / "state" / "volumes" / volume.decode() / "_data"
    assert sorted(path.name for path in data.iterdir()) == ["new", "seed"] and (data.stat().st_uid, data.stat().st_gid) == (
        1000,
        1001,
    )
    assert cmd("crun", "run", "--rm", "--network", "none", "--entrypoint", "/bin/echo", "i:1", "only").stdout == b"only\n"
    assert cmd("crun", "rm", "-v", "box").returncode == 0 and cmd("crun", "volume", "ls", "-q").stdout == b""


def _digest(path: Path) -> str:
    return "sha256:" + subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]


CDI = {
    "cdiVersion": "0.6.0", "kind": "nvidia.com/gpu",
    "devices": [
        {"name": "0", "containerEdits": {"deviceNodes": [{"path": "/dev/nvidia0", "hostPath": "/dev/zero"}]}},
        {"name": "1", "containerEdits": {"deviceNodes": [{"path": "/dev/nvidia1", "hostPath": "/dev/full"}]}},
    ],
    "containerEdits": {
        "env": ["NVIDIA_VISIBLE_DEVICES=void"], "deviceNodes": [{"path": "/dev/nvidiactl", "hostPath": "/dev/null"}],
        "hooks": [{"hookName": "createContainer", "path": "/bin/false", "args": ["x", "create-symlinks", "--link", "libcuda.so.1::/usr/lib/libcuda.so"]}],
    },
}  # fmt: skip


def test_gpus_and_devices_come_from_cdi_specifications_without_their_hooks(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing here is a GPU: the specification names other devices."""
    for name in ("etc", "run"):
        (tmp_path / name).mkdir()
    library = next(Path("/lib/x86_64-linux-gnu").glob("libz.so.1.*")) if os.uname().machine == "x86_64" else None
    spec = json.loads(json.dumps(CDI))
    if library:
        spec["containerEdits"]["mounts"] = [{"hostPath": str(library), "containerPath": f"/gpu/{library.name}"}]
    (tmp_path / "etc" / "nvidia.json").write_text(json.dumps(spec))
    monkeypatch.setenv("CAFS_CDI", f"{tmp_path}/etc:{tmp_path}/run")
    show = "cd /dev; echo nvidia*; readlink /usr/local/lib/cafs-devices/libcuda.so; readlink /usr/local/lib/cafs-devices/libz.so.1; echo $LD_LIBRARY_PATH"
    done = crun("--gpus", "all", "b:1", "sh", "-c", show)
    lines = done.stdout.splitlines()
    assert lines[0] == "nvidia0 nvidia1 nvidiactl" and lines[1] == "/usr/lib/libcuda.so.1", done.stderr
    assert library is None or (lines[2] == f"/gpu/{library.name}" and lines[3] == "/usr/local/lib/cafs-devices:/gpu")
    assert (
        crun("--gpus", "1", "b:1", "sh", "-c", "cd /dev; echo nvidia*; head -c 2 nvidia0 | wc -c").stdout
        == "nvidia0 nvidiactl\n2\n"
    )
    assert crun("--gpus", "device=1", "b:1", "sh", "-c", "cd /dev; echo nvidia*").stdout == "nvidia1 nvidiactl\n"
    assert crun("--device", "nvidia.com/gpu=0", "b:1", "sh", "-c", "cd /dev; echo nvidia*").stdout == "nvidia0 nvidiactl\n"
    spec["devices"][0]["containerEdits"]["deviceNodes"][0]["hostPath"] = "/dev/random"
    (tmp_path / "run" / "later.yaml").write_text(json.dumps(spec))  # YAML holds all of JSON
    done = crun("--device", "nvidia.com/gpu=0", "b:1", "stat", "-c", "%t,%T", "/dev/nvidia0")
    assert done.stdout == "1,8\n", "the later directory wins"
    for words, said in (
        (["--gpus", "3"], "this host has 2"),
        (["--gpus", "device=9"], "no CDI device"),
        (["--gpus", "few"], "--gpus 'few'"),
    ):
        done = crun(*words, "b:1", "true")
        assert done.returncode == 125 and said in done.stderr
    for bad in ("{", json.dumps(spec | {"cdiVersion": "9.0"}), json.dumps(spec | {"devices": [{"nme": 1}]}), "a: [b"):
        (tmp_path / "run" / "later.yaml").write_text(bad)
        done = crun("--gpus", "all", "b:1", "true")
        assert done.returncode == 125 and "CDI specification" in done.stderr and "Traceback" not in done.stderr
    monkeypatch.setenv("CAFS_CDI", "/nonexistent")
    assert "nvidia-ctk cdi generate" in crun("--gpus", "all", "b:1", "true").stderr


def test_gpus_without_a_specification_are_found_in_dev_and_their_libraries_by_ldconfig(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing here is a GPU: the nodes are those of /dev/zero, and the driver's library is libz under another name."""
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-caps"):
        os.mknod(tmp_path / "dev" / name, 0o666 | stat.S_IFCHR, os.makedev(1, 5))
    (tmp_path / "bin").mkdir()
    library = tmp_path / "libcuda.so.999.1"
    library.write_bytes(next(Path("/lib").glob("*-linux-gnu/libz.so.1.*")).read_bytes())
    (tmp_path / "libcuda.so.1").symlink_to(library)
    kind = {"x86_64": "libc6,x86-64", "aarch64": "libc6,AArch64"}[os.uname().machine]
    lines = [
        f"libcuda.so.1 ({kind}) => {tmp_path}/libcuda.so.1",
        f"libz.so.1 ({kind}) => /lib/libz.so.1",
        "libcuda.so.1 (libc6) => /lib32/libcuda.so.1",
    ]
    (tmp_path / "bin" / "ldconfig").write_text(
        "#!/bin/sh\ncat <<'E'\n3 libs found\n" + "".join(f"\t{line}\n" for line in lines) + "E\n"
    )
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\necho smi\n")
    for name in ("ldconfig", "nvidia-smi"):
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("CAFS_CDI", "/nonexistent")
    monkeypatch.setenv("CAFS_GPU_DEVICES", str(tmp_path / "dev"))
    show = f"cd /dev; echo nvidia*; readlink /usr/local/lib/cafs-devices/libz.so.1; echo $LD_LIBRARY_PATH; {tmp_path}/bin/nvidia-smi; echo $NVIDIA_VISIBLE_DEVICES"
    done = crun("--gpus", "all", "b:1", "sh", "-c", show)
    assert done.stdout.splitlines() == [
        "nvidia0 nvidia1 nvidiactl", str(library), f"/usr/local/lib/cafs-devices:{tmp_path}", "smi", "void",
    ], done.stderr  # fmt: skip
    assert (
        crun("--gpus", "device=1", "b:1", "sh", "-c", "cd /dev; echo nvidia*; head -c 2 nvidia1 | wc -c").stdout
        == "nvidia1 nvidiactl\n2\n"
    )
    assert "this host has 2" in crun("--gpus", "3", "b:1", "true").stderr


def test_the_inventory_of_a_host_without_a_driver_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.path.exists("/dev/nvidiactl"):
        assert gpus.inventory(), "a driver that knows no GPU"
    else:
        assert gpus.inventory() == []
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpus.inventory() == []


def test_a_device_directory_gives_its_devices(image: Path, tmp_path: Path) -> None:
    (tmp_path / "devices").mkdir()
    os.mknod(tmp_path / "devices" / "one", 0o600 | stat.S_IFCHR, os.makedev(1, 5))
    (tmp_path / "devices" / "file").touch()
    assert (
        crun(
            "--device", f"{tmp_path}/devices:/dev/mine", "b:1", "sh", "-c", "cd /dev/mine; echo *; head -c 3 one | wc -c"
        ).stdout
        == "one\n3\n"
    )


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--tmpfs", "/s"], "1777 0"),
        (["--tmpfs", "/s:mode=0700"], "700 0"),
        (["--tmpfs", "/s:mode=0750,uid=1000"], "750 1000"),
        (["--mount", "type=tmpfs,dst=/s,tmpfs-mode=711"], "711 0"),
        (["--tmpfs", "/s", "--userns", "auto"], "1777 0"),
    ],
)
def test_a_tmpfs_has_the_mode_that_was_asked_for_whatever_runc_does(image: Path, words: list[str], wanted: str) -> None:
    done = crun("--network", "none", *words, "b:1", "stat", "-c", "%a %u", "/s")
    assert done.stdout == wanted + "\n", done.stderr
    there = [word.replace("/s", "/tmp") for word in words]
    assert crun("--network", "none", *there, "b:1", "stat", "-c", "%a %u", "/tmp").stdout == wanted + "\n"
    there = [word.replace("/s", "/home/joe") for word in words]
    if "mode" not in str(words):
        assert crun("--network", "none", *there, "b:1", "stat", "-c", "%a", "/home/joe").stdout == "755\n", "the image's"


def test_an_ordinary_user_can_write_to_a_tmpfs_of_a_read_only_container_also_the_second_time(image: Path) -> None:
    words = ["--name", "again", "--network", "none", "-u", "1000", "--read-only", "--tmpfs", "/s:size=64k"]
    assert cr("run", *words, "b:1", "sh", "-c", "echo x > /s/f && cat /s/f; head -c 99999 /dev/zero > /s/g").returncode == 1
    assert cr("start", "-a", "again").stdout == "x\n"
    assert cr("rm", "again").returncode == 0


def test_whose_shared_memory_a_container_has(image: Path) -> None:
    assert "No such file" in crun("--network", "none", "--ipc", "none", "b:1", "ls", "/dev/shm").stderr
    assert cr("run", "-d", "--name", "shm", "--network", "none", "b:1", "sleep", "60").returncode == 0
    assert crun("--network", "none", "--ipc", "container:shm", "b:1", "touch", "/dev/shm/it").returncode == 0
    assert cr("exec", "shm", "ls", "/dev/shm").stdout == "it\n"
    assert cr("rm", "-f", "shm").returncode == 0


def test_mounts_are_read_as_docker_reads_them(image: Path, tmp_path: Path) -> None:
    (tmp_path / "a,b").mkdir()
    (tmp_path / "a,b" / "f").write_text("x")
    mount = f'type=bind,"source={tmp_path}/a,b",dst=/x,ro,consistency=cached'
    assert crun("--network", "none", "--mount", mount, "b:1", "ls", "/x").stdout == "f\n"
    assert crun("--network", "none", "-v", f"{tmp_path}:/x:ro,cached,z", "b:1", "ls", "/x").returncode == 0
    (found,) = mounts.asked(options("--mount", "type=bind,src=/tmp,dst=/x,bind-nonrecursive"), {})
    assert found["options"] == ["bind"]
    assert (
        crun("--network", "none", "--mount", "src=marked,dst=/x,volume-label=a=b,volume-label=c", "b:1", "true").returncode == 0
    )
    assert json.loads(cr("volume", "inspect", "marked").stdout)[0]["Labels"] == {"a": "b", "c": ""}
    assert cr("volume", "rm", "marked").returncode == 0


def test_what_is_mounted_in_a_shared_directory_is_seen_on_both_sides(image: Path, tmp_path: Path) -> None:
    place = tmp_path / "shared"
    (place / "a").mkdir(parents=True)
    assert "not on a shared mount" in crun("--network", "none", "-v", f"{place}:/x:rshared", "b:1", "true").stderr
    subprocess.run(["mount", "--bind", place, place], check=True)
    try:
        subprocess.run(["mount", "--make-rshared", place], check=True)
        (place / "b").mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "none", place / "b"], check=True)
        (place / "b" / "kept").touch()
        script = "mount -t tmpfs none /x/a && touch /x/a/inner; ls /x/b"
        words = ["--network", "none", "--cap-add", "SYS_ADMIN", "-v", f"{place}:/x:rshared"]
        assert crun(*words, "b:1", "sh", "-c", script).stdout == "kept\n"
        assert os.listdir(place / "a") == ["inner"] and os.listdir(place / "b") == ["kept"], "also when it has ended"
    finally:
        subprocess.run(["umount", "-R", place], check=True)


def test_a_program_of_32_bits_runs_in_an_image_of_64(image: Path, tmp_path: Path) -> None:
    if os.uname().machine != "x86_64":
        pytest.skip("of x86-64")
    words = b"\x28\0\0\0\x01\0\0\0\0\0\0\0"  # AF_VSOCK, SOCK_STREAM, 0
    base = 0x08048000
    code = (
        b"\xb8\x66\0\0\0\xbb\x01\0\0\0\xb9" + struct.pack("<I", base + 84 + 23) + b"\xcd\x80"
    )  # socketcall(SYS_SOCKET, words)
    code += b"\xf7\xd8" + b"\x89\xc3" + b"\xeb\x0c"  # neg eax; mov ebx, eax; jmp over the words
    code += words + b"\xb8\x01\0\0\0\xcd\x80"  # exit
    head = struct.pack("<16sHHIIIIIHHHHHH", b"\x7fELF\1\1\1", 2, 3, 1, base + 84, 52, 0, 0, 52, 32, 1, 0, 0, 0)
    head += struct.pack("<8I", 1, 0, base, base, 84 + len(code), 84 + len(code), 5, 4096)
    (tmp_path / "small").write_bytes(head + code)
    (tmp_path / "small").chmod(0o755)
    assert crun("--network", "none", "-v", f"{tmp_path}:/p", "b:1", "/p/small").returncode == errno.ENOSYS, (
        "by which it would reach any family"
    )


def test_a_time_has_the_zone_that_it_names_or_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    from runner.logview import moment

    monkeypatch.setenv("TZ", "UTC-3")
    time.tzset()
    try:
        utc = 1_769_860_800 * 10**9
        assert moment("2026-01-31T12:00:00Z") == moment("2026-01-31T14:00:00+02:00") == moment("2026-01-31T12:00Z") == utc
        assert moment("2026-01-31T15:00:00.5") == utc + 500_000_000 and moment("2026-01-31") == utc - 15 * 3600 * 10**9
        assert moment("2026-01-31T12:00:00.123456789Z") == utc + 123_456_789
        for text in ("2026-01-31T12", "2026-13-31", "2026-01-31T12:00:00+2"):
            with pytest.raises(UsageError):
                moment(text)
    finally:
        monkeypatch.undo()
        time.tzset()
