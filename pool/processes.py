"""The processes of jobs on a worker: a shell each, which needs no agent to end well.  cpool-agent(7), AGENT.

Part of the agent's program: standard library only, Python 3.9.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import signal
import time

from cafs.removing import remove_tree
from pool import cgroup, forking, hiding, instance, machine, staging, streams
from pool.entering import container_of
from pool.hosted import OUTCOME

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

UMASK = "CPOOL_UMASK"
"""In the agent's environment: the account's umask, for plain jobs.  The agent's own files are closed."""

_SHELL = (
    'umask "$1"; shift; test -z "$1" || echo $$ >"$1/cgroup.procs"; shift; '
    'cd "$1" && { status=$2; shift 2; (exec "$@"); code=$?; } || { code=125; status=$2; }; '
    'printf "%-3s\\n" $code 1<>"$status"; exit $code'
)
"""The code is one write of a few bytes, a newline last, in the place of as many spaces: it is there as a whole or not at all,
needs no room on the disk, and costs no other process.  exec: the shell's own commands of the same name are not asked for."""

_NO_CODE = "    "
_ROOM = 200
"""Bytes of job.json for what is known only when it runs."""


_LENT = "lent"
_SECRETS, _IN_IMAGE = "CPOOL_SECRETS", "/run/secrets"
_KILL_S = 0.05
_GUARD, _GUARD_S = "cafs-guard", 5.0
_UNABLE, _CRUN = 8, "crun: "
"""Exit code and beginning of what it says where a privilege, a feature of the kernel or a program is missing."""

_BLOCK = 4096
_STREAMS = ("out", "err")
_PUNCH_HOLE = 0x03
_libc = ctypes.CDLL(None, use_errno=True)
LOST = -1
"""The code of a job whose shell was killed: nobody knows."""


class Job:
    """One attempt at a job.  directory: its own; pid: of the shell; ended: what is to be said of its end."""

    def __init__(self, directory: str, asked: dict[str, Any]) -> None:
        self.directory = directory
        self.pool = os.path.basename(os.path.dirname(os.path.dirname(directory))).partition(".")[0]
        self.asked = asked
        self.id, self.attempt = int(asked["id"]), int(asked["attempt"])
        self.pid = int(asked.get("pid", 0))
        self.deadline = float("inf")
        self.kill_at = float("inf")
        self.ended: dict[str, Any] | None = None
        self._kill_since = float("inf")
        self.outcome: tuple[int | None, float, int] | None = None
        """What is known of the end of a shell of which other processes are being killed."""
        self._secrets: list[bytes] | None = None
        self._said: bytes | None = None
        """Why it was not started."""

    @property
    def key(self) -> tuple[int, int]:
        return self.id, self.attempt

    def path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def start(self) -> None:
        """Raises OSError, and then nothing of it runs: whatever needs room on the disk is there before."""
        asked = self.asked
        os.makedirs(self.directory, mode=0o700)
        environment = {**os.environ, **({} if asked["image"] else asked["env"])}
        umask = environment.pop(UMASK, "022") if not asked["image"] else "077"
        environment |= {"CPOOL_JOB": str(self.id), "CPOOL_ATTEMPT": str(self.attempt), "CPOOL_POOL": self.pool}
        if asked["image"]:  # for its container: in the environment of crun, LD_PRELOAD would be a program of ours on the host
            with open(os.open(self.path("env"), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(b"".join(os.fsencode(f"{name}={value}\0") for name, value in asked["env"].items()))
        if asked.get("has_gpus") and not asked["image"]:  # a container has those that it is given, and no others
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, asked.get("gpu_ids", ())))
        secrets = asked.pop("secrets", None)  # before it is written down
        if secrets:
            place = hiding.place_of(self.directory)
            hiding.put(place, secrets, is_for_all=bool(asked["image"]))
            environment[_SECRETS] = _IN_IMAGE if asked["image"] else place
            asked["has_secrets"] = True
        files = asked.pop("in", None)
        if files is not None:
            staging.put(self.path(staging.WORK), files)
            asked["has_work"] = True
        if asked.get("fn"):
            instance.prepare(self.directory, asked)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, self.path("out"), flags, 0o600),
            (os.POSIX_SPAWN_OPEN, 2, self.path("err"), flags, 0o600),
        ]
        home = self.path(staging.WORK) if asked.get("has_work") else os.path.expanduser("~")
        place = "/" if asked["image"] else asked["cwd"] or home
        if asked.get("is_here") and not os.path.isdir(place):
            place = home  # nobody has asked for it: it is only where the job was submitted, on another machine
        if asked.get("memory") and not asked["image"]:  # to be put into one takes 10 ms: others go without
            agent = os.path.basename(os.path.dirname(os.path.dirname(self.directory)))
            asked["cgroup"] = cgroup.make(f"{agent}/{self.id}.{self.attempt}", int(asked["memory"]))
        with open(self.path("status"), "x", encoding="ascii") as file:
            file.write(_NO_CODE)
        asked.update(pid=0, pid_start=0, started_s=0.0, boot_id=machine.boot_id())
        self._note()
        words = [
            "/bin/sh",
            "-c",
            _SHELL,
            "cpool-job",
            umask,
            asked.get("cgroup", ""),
            place,
            self.path("status"),
            *self._command(),
        ]
        defaults = [signal.SIGPIPE, signal.SIGINT, signal.SIGTERM, signal.SIGCHLD]
        if asked.get("zygote_of"):
            forking.make_cgroups(self.directory, asked)
            self.pid = forking.start(self.directory, asked, lambda: os.execve("/bin/sh", words, environment))
        else:
            self.pid = os.posix_spawn("/bin/sh", words, environment, file_actions=actions, setsid=True, setsigdef=defaults)
        asked.update(pid=self.pid, pid_start=machine.start_time(self.pid), started_s=time.time())
        if asked.get("timeout_s"):
            self.deadline = time.monotonic() + asked["timeout_s"]
        try:
            self._note()
        except OSError:
            pass  # of a file system that writes nothing in its place: an agent that comes after us ends it

    def _note(self) -> None:
        """What an agent that comes after us has to know; when it runs, in the place of what was written before, where a full
        disk cannot refuse it.  Raises OSError."""
        data = json.dumps(self.asked).encode()
        fd = os.open(self.path("job.json"), os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            data = data.ljust(os.fstat(fd).st_size or len(data) + _ROOM)
            if os.pwrite(fd, data, 0) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.path("job.json"))
        finally:
            os.close(fd)

    def fail(self, text: str) -> None:
        """It cannot be started, by what it asks for.  That is kept in memory: who is asked again finds the same."""
        self._said = text.encode()
        self.ended = {"id": self.id, "attempt": self.attempt, "code": 126, "wall_s": 0, "cpu_s": 0, "memory": 0, "left_out": {}}
        self.ended |= {"out_size": 0, "err_size": len(self._said)}
        many = len(self.asked.get("out", ()))
        self.ended |= {"files": [-1] * many, "modes": [0] * many}

    def _command(self) -> list[str]:
        """What the shell runs: the command, or crun with it."""
        asked = self.asked
        if not asked["image"]:
            return list(asked["command"])
        words = [machine.runner() or "cafs-run", "run", "--rm", "--network", "host"]
        words += ["--cpus", f"{asked['cpus']:g}"] if cgroup.may_limit("cpu") else []
        words += ["--name", container_of(self.pool, self.id, self.attempt)]
        if asked.get("gpu_ids"):
            words += ["--gpus", "device=" + ",".join(map(str, asked["gpu_ids"]))]
        words += ["--memory", str(asked["memory"])] if asked["memory"] and cgroup.may_limit("memory") else []
        if asked.get("has_work"):
            words += ["-v", f"{self.path(staging.WORK)}:{staging.IN_IMAGE}"]
        where = asked["cwd"] or (staging.IN_IMAGE if asked.get("has_work") else "")
        words += ["--workdir", where] if where else []
        store = asked.get("store", "")
        if store == _LENT:
            store = "http+unix://" + os.path.join(os.path.dirname(os.path.dirname(self.directory)), streams.PLACE)
        words += ["--store", store] if store else []
        if asked.get("has_secrets"):
            words += ["-v", f"{hiding.place_of(self.directory)}:{_IN_IMAGE}:ro", "-e", _SECRETS]
        words += ["--outcome", self.path(OUTCOME), "--env-file", self.path("env"), "-e", "CPOOL_JOB", "-e", "CPOOL_ATTEMPT"]
        if asked.get("fn"):
            return instance.words(self.directory, asked, words)
        return [*words, asked["image"], *asked["command"]]

    def is_alive(self) -> bool:
        """Whether the shell that was started is still there, and no other process with its number."""
        if self.asked.get("boot_id", machine.boot_id()) != machine.boot_id():  # numbers and times begin anew with each boot
            return False
        return self.pid > 0 and machine.start_time(self.pid) == self.asked.get("pid_start") != 0

    def has_code(self) -> bool:
        """Whether its shell has noted how it ended."""
        return _read_code(self.path("status")) is not None

    def finish(self, code: int | None = None, cpu_s: float = 0.0, memory: int = 0) -> None:
        """It has ended.  code: of the shell, if we know."""
        written = _read_code(self.path("status"))
        found = written if written is not None else LOST if code is None or code == 0 else code
        self.shorten()
        gaps = {name: self._gap_in(self.path(name)) for name in _STREAMS}
        self.ended = {
            "id": self.id,
            "attempt": self.attempt,
            "code": 124 if self.asked.get("timed_out") else found,
            "wall_s": round(max(time.time() - self.asked.get("started_s", time.time()), 0), 3),
            "cpu_s": round(cpu_s, 3),
            "memory": max(memory, cgroup.peak(self.asked["cgroup"]) if self.asked.get("cgroup") else 0),
            "out_size": _size(self.path("out")),
            "err_size": _size(self.path("err")),
            "left_out": {name: gap for name, gap in gaps.items() if gap[1]},
            "oom": bool(self.asked.get("cgroup")) and cgroup.has_run_out(self.asked["cgroup"]),
        }
        if self.asked.get("has_work"):
            left = staging.look(self.path(staging.WORK), self.asked.get("out", []))
            self.ended["files"], self.ended["modes"] = [size for size, _ in left], [mode for _, mode in left]

    def inability(self) -> str:
        """Why no job in an image can run on this machine, as crun has said, and nothing else was written; '' if one can."""
        assert self.ended
        is_begun = self.ended["out_size"] or _size(self.path(OUTCOME))
        if not self.asked.get("image") or self.asked.get("fn") or self.ended["code"] != _UNABLE or is_begun:
            return ""
        lines = self.read("err", 0, 1 << 16)[0].decode(errors="replace").splitlines()
        is_all = bool(lines) and all(line.startswith(_CRUN) for line in lines)
        return lines[0][len(_CRUN) :] if is_all else ""

    def read(self, stream: str, offset: int, size: int) -> tuple[bytes, int]:
        """(what it has written so far, where the rest of it begins: further on than that is long if some was left out).

        stream: out, err, or fileN, the Nth to come back.
        """
        if self._said is not None:
            data = self._said[offset : offset + size] if stream == "err" else b""
            return data, offset + len(data)
        if stream.startswith("file"):
            names = dict(enumerate(self.asked.get("out", [])))
            data = staging.read(self.path(staging.WORK), names[int(stream[4:])], offset, size)
            return data, offset + len(data)
        name = stream if stream in ("err", instance.RECORD) else "out"
        try:
            fd = os.open(self.path(name), os.O_RDONLY)
        except OSError:
            return b"", offset
        try:
            start, end = self._gap(fd) if name in _STREAMS else (0, 0)
            if start <= offset < end:
                return b"", end
            data = self._read(fd, min(size, start - offset) if offset < start else size, offset)
            return data, offset + len(data)
        finally:
            os.close(fd)

    def _read(self, fd: int, size: int, offset: int) -> bytes:
        """Without the job's secrets, also where a piece begins or ends in one."""
        if not self.asked.get("has_secrets"):
            return os.pread(fd, size, offset)
        if self._secrets is None:
            self._secrets = hiding.values(hiding.place_of(self.directory))
        around = max((len(one) for one in self._secrets), default=1) - 1
        begin = max(offset - around, 0)
        data = os.pread(fd, offset - begin + size + around, begin)
        if not self.ended:
            data = data[: len(data) - hiding.unsure(data, self._secrets)]
        return hiding.hidden(data, self._secrets)[offset - begin :][:size]

    @property
    def _kept_half(self) -> int:
        """Of its output the first and the last so many bytes are kept; 0: all of it is."""
        most = int(self.asked.get("output_max", 0))
        return max(most // 2 // _BLOCK, 1) * _BLOCK if most else 0

    def _gap(self, fd: int) -> tuple[int, int]:
        """What was left out of a stream, (0, 0) for nothing: it is a hole in the file, which no end of an agent forgets."""
        half = self._kept_half
        if not half or os.fstat(fd).st_size <= 2 * half:
            return 0, 0
        try:
            end = os.lseek(fd, half, os.SEEK_DATA)
        except OSError:  # ENXIO: up to its end there is none
            end = os.fstat(fd).st_size
        return (half, end) if end > half else (0, 0)

    def _gap_in(self, path: str) -> tuple[int, int]:
        try:
            fd = os.open(path, os.O_RDONLY)
        except OSError:
            return 0, 0
        try:
            return self._gap(fd)
        finally:
            os.close(fd)

    def shorten(self) -> None:
        """Give back what is between the first and the last part of too much output (fallocate(2), FALLOC_FL_PUNCH_HOLE).

        Where the file system cannot do that all of it is kept.
        """
        half = self._kept_half
        for name in _STREAMS if half else ():
            end = (_size(self.path(name)) - half) // _BLOCK * _BLOCK
            if end <= half:
                continue
            try:
                fd = os.open(self.path(name), os.O_WRONLY)
            except OSError:
                continue  # the job has changed its mode
            try:
                _libc.fallocate(fd, _PUNCH_HOLE, ctypes.c_long(half), ctypes.c_long(end - half))
            finally:
                os.close(fd)

    def end(self, grace_s: float) -> None:
        """Begin to end it: SIGTERM to all of it now; `kill_rest` does the rest when its time has come."""
        for pid in self.processes():
            _send(pid, signal.SIGTERM)
        self.kill_at = min(self.kill_at, time.monotonic() + grace_s)

    def kill_rest(self) -> bool:
        """SIGKILL to what is left; whether nothing was.  A container's guard is left for last: it cleans up."""
        left = self.processes()
        self._kill_since = min(self._kill_since, time.monotonic())
        is_spared = bool(self.asked.get("image")) and time.monotonic() < self._kill_since + _GUARD_S
        for pid in left:
            if not (is_spared and machine.name_of(pid) == _GUARD):
                _send(pid, signal.SIGKILL)
        self.kill_at = time.monotonic() + _KILL_S if left else float("inf")
        return not left

    def processes(self) -> list[int]:
        """All that has the job in its environment, and what is below such a process."""
        mine = {b"CPOOL_JOB=%d" % self.id, b"CPOOL_ATTEMPT=%d" % self.attempt, b"CPOOL_POOL=" + self.pool.encode()}
        parents: dict[int, int] = {}
        found = cgroup.pids(self.asked.get("cgroup", ""))
        for name in os.listdir("/proc"):
            if name.isdigit():
                pid = int(name)
                try:
                    with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                        state, parent = file.read().rpartition(")")[2].split()[:2]
                    if state == "Z":
                        continue
                    parents[pid] = int(parent)
                    with open(f"/proc/{name}/environ", "rb") as environ:
                        if mine <= set(environ.read(1 << 20).split(b"\0")):
                            found.add(pid)
                except OSError:
                    continue
        if self.is_alive():
            found.add(self.pid)
        grown = True
        while grown:
            more = {pid for pid, parent in parents.items() if parent in found and pid not in found}
            found |= more
            grown = bool(more)
        return sorted(found - {os.getpid()})

    def remove(self) -> None:
        """Nothing of it is wanted any more."""
        cgroup.remove(self.asked.get("cgroup", ""))
        cgroup.remove(self.asked.get("cgroup_cpu", ""))
        if self.asked.get("has_secrets"):
            hiding.remove(hiding.place_of(self.directory))
        remove_tree(self.directory)


def found_in(directory: str) -> list[Job]:
    """What agents before have started; what was never started completely is removed."""
    jobs = []
    for name in sorted(os.listdir(directory)):
        path = os.path.join(directory, name)
        number, _, attempt = name.partition(".")
        asked = {"id": number, "attempt": attempt}
        try:
            with open(os.path.join(path, "job.json"), encoding="utf-8") as file:
                asked |= json.load(file)
        except (OSError, ValueError):
            pass
        if asked.get("pid"):
            jobs.append(Job(path, asked))
        elif re.fullmatch(r"[0-9]+\.[0-9]+", name):
            half = Job(path, asked)
            half.kill_rest()
            half.remove()
    return jobs


def _read_code(path: str) -> int | None:
    try:
        with open(path, encoding="ascii") as file:
            text = file.read(16)
        return int(text) if text.endswith("\n") else None
    except (OSError, ValueError):
        return None


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except OSError:
        pass  # it has ended, or is another user's
