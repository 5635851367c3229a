"""The agent on a worker: starts jobs, says how they end, and reports what is free.  cpool-agent(7).

Standard library only, Python 3.9: it is sent to the worker as one file.  Its only way in is a socket in its own directory.
"""

from __future__ import annotations

import base64
import ctypes
import errno
import os
import re
import selectors
import signal
import sys
import time

from cafs.removing import remove_tree
from pool import cgroup, frames, hostprocess, machine, single
from pool.launched import Launched
from pool.peers import Peer, Peers, log
from pool.processes import Job, found_in

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

REPORT_S = 2.0
ALONE_S = 600.0
_READ_MAX = 1 << 20
_BACKLOG = 100
"""Of so many jobs that ended while nobody listened the output is said with their end; of the others it is asked for."""

_SET_CHILD_SUBREAPER = 36
_TROUBLES = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EROFS", "EIO", "ESTALE", "EMFILE", "ENFILE", "EAGAIN", "ENOMEM", "EBUSY")
}


class Agent:
    """directory: its own.  build: of its program."""

    def __init__(self, directory: str, build: str) -> None:
        self.directory = directory
        self.build = build
        self.pool, self.worker = os.path.basename(directory).partition(".")[::2]
        self.epoch = _number(os.path.join(directory, "epoch"))
        self.jobs: dict[tuple[int, int], Job] = {}
        self.by_pid: dict[int, Job] = {}
        self.peers: Peers
        self.selector = selectors.DefaultSelector()
        self.sequence = 0
        self.is_leaving = self.is_to_leave = self.is_to_be_removed = False
        self._next_report = 0.0
        self._alone_since = time.monotonic()
        self._launched = Launched()
        self._gpus = machine.gpus()

    def run(self) -> None:
        """Until it is told to leave, or nobody wants anything for a long time."""
        jobs = os.path.join(self.directory, "jobs")
        os.makedirs(jobs, mode=0o700, exist_ok=True)
        wake, waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.selector.register(wake, selectors.EVENT_READ, lambda _: self._drain(wake))
        self.peers = Peers(self.directory, self.selector, self._obey)
        for job in found_in(jobs):
            self.jobs[job.key] = job
            self._adopt(job)
        cgroup.sweep(os.path.basename(self.directory), {str(job.asked.get("cgroup", "")) for job in self.jobs.values()})
        while not self.is_leaving:
            for key, events in self.selector.select(self._wait_s()):
                key.data(events)
            self._reap()
            self._mind_time()

    def _wait_s(self) -> float:
        times = [self._next_report, self._alone_since + ALONE_S]
        times += [min(job.deadline, job.kill_at) for job in self.jobs.values() if not job.ended]
        return max(min(times) - time.monotonic(), 0)

    @staticmethod
    def _drain(wake: int) -> None:
        os.read(wake, 4096)

    # Jobs.

    def _adopt(self, job: Job) -> None:
        """One of an agent before us: watch it, or note that it has ended."""
        if not job.is_alive():
            return self._ended(job)
        if job.asked.get("timeout_s"):
            job.deadline = time.monotonic() + job.asked["started_s"] + job.asked["timeout_s"] - time.time()
        if _is_child(job.pid):  # this process was an agent of another build before
            self.by_pid[job.pid] = job
            return
        try:
            fd = os.pidfd_open(job.pid)
        except OSError:
            return self._ended(job)

        def ended(_: int) -> None:
            self.selector.unregister(fd)
            os.close(fd)
            self._ended(job)

        self.selector.register(fd, selectors.EVENT_READ, ended)

    def _start(self, asked: dict[str, Any]) -> None:
        job = Job(os.path.join(self.directory, "jobs", f"{int(asked['id'])}.{int(asked['attempt'])}"), asked)
        known = self.jobs.get(job.key)
        if known:
            self.peers.say("running", id=job.id, attempt=job.attempt) if not known.ended else self._say_done(known)
            return
        many = int(asked.get("gpus", 0))
        asked["gpu_ids"], asked["has_gpus"] = self._free_gpus()[:many] if many else [], bool(self._gpus)
        asked["zygote_of"] = self._zygote_for(asked)
        self.jobs[job.key] = job
        try:
            if len(asked["gpu_ids"]) < many:
                raise OSError(errno.EBUSY, "not so many GPUs are free")
            job.start()
        except (OSError, ValueError) as error:
            return self._cannot_start(job, error)
        self.by_pid[job.pid] = job
        self.peers.say("running", id=job.id, attempt=job.attempt)

    def _cannot_start(self, job: Job, error: OSError | ValueError) -> None:
        """Nothing of it runs.  What is this machine's trouble does not end a job, which may have no such trouble elsewhere."""
        job.remove()
        if isinstance(error, OSError) and error.errno in _TROUBLES:
            del self.jobs[job.key]
            self.peers.say("refused", id=job.id, attempt=job.attempt, problem=error.strerror or str(error))
        else:
            job.fail(f"cpool-agent: cannot start: {error}\n")
            self._say_done(job)

    def _zygote_for(self, asked: dict[str, Any]) -> str:
        """The job of which this instance of a function may be a fork, '' for none: the same version of the same tenant's."""
        wanted = asked.get("fn", {})
        for job in self.jobs.values() if wanted.get("zygote") else ():
            fn = job.asked.get("fn", {})
            is_same = fn.get("id") == wanted.get("id") and job.asked["image"] == asked["image"]
            if is_same and not job.ended and not job.asked.get("zygote_of"):
                return f"{job.id}.{job.attempt}"
        return ""

    def _free_gpus(self) -> list[int]:
        """That no job has."""
        taken = {one for job in self.jobs.values() if not job.ended for one in job.asked.get("gpu_ids", ())}
        return [number for number in self._gpus if number not in taken]

    def _reap(self) -> None:
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if not pid:
                break
            job = self.by_pid.pop(pid, None)
            if job:
                code = os.waitstatus_to_exitcode(status)
                code = 128 - code if code < 0 else code
                self._ended(job, code, usage.ru_utime + usage.ru_stime, usage.ru_maxrss << 10)
        for job in [one for one in self.jobs.values() if one.outcome]:
            self._ended(job, *job.outcome)  # type: ignore[misc]

    def _ended(self, job: Job, code: int | None = None, cpu_s: float = 0.0, memory: int = 0) -> None:
        if not job.has_code():  # its shell was killed: nobody looks after what is left of it, and it may be done again
            job.kill_at = min(job.kill_at, time.monotonic())
        if job.kill_at < float("inf") and job.processes():
            job.outcome = code, cpu_s, memory  # it has ended when nothing of it is left
            return
        job.outcome, job.kill_at = None, float("inf")
        job.finish(code, cpu_s, memory)
        self._say_done(job)

    def _say_done(self, job: Job, *, with_output: bool = True) -> None:
        assert job.ended
        found = dict(job.ended)
        keep = int(job.asked.get("keep", 0)) if with_output else -1
        if found["out_size"] + found["err_size"] <= keep and not found["left_out"]:
            for stream in ("out", "err"):
                found[stream] = base64.b64encode(job.read(stream, 0, keep)[0]).decode() if found[f"{stream}_size"] else ""
        self.peers.say("done", **found, unable=job.inability())

    def _mind_time(self) -> None:
        now = time.monotonic()
        for job in list(self.jobs.values()):
            if job.deadline <= now and not job.ended:
                job.asked["timed_out"], job.deadline = True, float("inf")
                job.end(float(job.asked.get("grace_s", 10)))
            if job.kill_at <= now:
                job.kill_rest()
            if job.asked.get("alone_s") and not job.ended and now >= self.peers.heard + float(job.asked["alone_s"]):
                job.end(0)  # whoever wanted it may have it done elsewhere by now
        if now >= self._next_report:
            self._next_report = now + REPORT_S
            self._report()
            for job in [one for one in self.jobs.values() if not one.ended]:
                job.shorten()
        if self.is_to_leave and all(job.ended for job in self.jobs.values()):
            is_wanted = self.is_to_be_removed and self.jobs and self.peers.all  # what jobs have written is still fetched
            self.is_leaving = not is_wanted
        if self.peers.all or any(not job.ended for job in self.jobs.values()):
            self._alone_since = now
        elif now >= self._alone_since + ALONE_S:
            self.is_leaving = True

    def _report(self) -> None:
        self.sequence += 1
        self._gpus = machine.gpus()
        if any(peer.is_trusted for peer in self.peers.all):
            self._launched.is_needed()
        images = machine.why_no_images()
        running = sum(not job.ended for job in self.jobs.values())
        self.peers.say(
            "report",
            sequence=self.sequence,
            running=running,
            images=images,
            notice=self._launched.has_notice,
            toolkit=machine.toolkit(),
            **machine.report(self.directory),
        )

    # Controllers.

    def _obey(self, peer: Peer, said: dict[str, Any]) -> None:
        kind = said["is"]
        if kind == "hello":
            return self._greet(peer, said)
        if not peer.is_trusted:
            raise ValueError("no hello")
        if kind == "start":
            for asked in said["jobs"]:
                self._start(asked)
        elif kind == "cancel":
            job = self.jobs.get((int(said["id"]), int(said["attempt"])))
            if job and not job.ended:
                job.end(float(said["grace_s"]))
        elif kind == "forget":
            for one, attempt in said["jobs"]:
                job = self.jobs.pop((int(one), int(attempt)), None)
                if job:
                    job.remove()
        elif kind == "read":
            job = self.jobs.get((int(said["id"]), int(said["attempt"])))
            size = min(int(said["size"]), _READ_MAX)
            offset = int(said["offset"])
            data, following = job.read(str(said["stream"]), offset, size) if job else (b"", offset)
            self.peers.send(peer, frames.answer(int(said["request"]), following, data))
        elif kind == "leave":
            self.is_to_leave = True  # when no job runs any more
            self.is_to_be_removed = bool(said.get("remove"))

    def _become(self, build: str) -> None:
        """Go on as another build of this program, if the controller has brought one; jobs notice nothing (execve(2))."""
        if build == self.build or not re.fullmatch("[0-9a-f]{16}", build):
            return
        above = os.path.dirname(self.directory)
        for path in (os.path.join(self.directory, f"agent-{build}.pyz"), os.path.join(above, f"{build}.pyz")):
            if os.path.exists(path):
                os.execv(sys.executable, [sys.executable, path, "daemon", self.directory])

    def _greet(self, peer: Peer, said: dict[str, Any]) -> None:
        epoch = int(said["epoch"])
        is_mine = said["pool"] == self.pool and said["worker"] == self.worker and said["protocol"] == frames.PROTOCOL
        if not is_mine or epoch < self.epoch:
            self.peers.send(peer, frames.message("fenced", epoch=self.epoch, protocol=frames.PROTOCOL))
            return
        self._become(str(said.get("build", self.build)))
        if epoch > self.epoch:
            self.epoch = epoch
            _note(os.path.join(self.directory, "epoch"), epoch)
            self.peers.drop_trusted()
        peer.is_trusted, self.is_to_leave, self.is_to_be_removed = True, False, False
        fields = {"protocol": frames.PROTOCOL, "build": self.build, "pool": self.pool, "worker": self.worker}
        known = [{"id": job.id, "attempt": job.attempt, "ended": bool(job.ended)} for job in self.jobs.values()]
        self.peers.send(peer, frames.message("hello", boot_id=machine.boot_id(), jobs=known, **fields))
        self._report()
        for number, job in enumerate([one for one in self.jobs.values() if one.ended]):
            self._say_done(job, with_output=number < _BACKLOG)


def _is_child(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return int(file.read().rpartition(")")[2].split()[1]) == os.getpid()
    except (OSError, ValueError, IndexError):
        return False


def _number(path: str) -> int:
    try:
        with open(path, encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return 0


def _note(path: str, number: int) -> None:
    """In its place, where a full disk cannot refuse it.  If it was not there, and cannot be, it is known until this agent ends:
    a controller that is not heard cannot end what fills the disk."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.pwrite(fd, b"%-20d" % number, 0)
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        log(f"the epoch cannot be noted: {error}")


def daemon(directory: str, build: str) -> None:
    """Be the agent of a directory, if there is none."""
    if not single.be(directory):
        return
    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # so that we hear of the end of all that jobs leave
    found = Agent(directory, build)
    found.run()
    hostprocess.leave(directory)
    cgroup.sweep(os.path.basename(directory), set())
    if found.is_to_be_removed:
        remove_tree(directory)
    try:
        os.unlink(os.path.join(directory, "socket"))
    except OSError:
        pass
