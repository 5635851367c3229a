"""The controller: one loop that hears agents and commands, decides, writes down what it has decided, and only then says it.

cpool-agent(7), cpool-state(5).  What is to be said in a turn waits in a list until the turn's changes are on disk.
"""

from __future__ import annotations

import os
import random
import selectors
import signal
import time

from cafs import paths
from cafs.errors import CafsError
from pool import commands, frames, inputs, outputs, requests, sockets, specs, state, workers
from pool.address import LOCAL, Pool
from pool.events import Events
from pool.functions import Functions
from pool.leases import Leases
from pool.state import ENDED, QUEUED, RUNNING, STARTING, Job, State
from pool.tenants import Tenants
from pool.turns import Turns
from pool.waiting import Waiting
from pool.wires import Wires
from pool.workers import Remote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from pool.commands import Client
    from pool.fleet import Fleet
    from pool.settings import Settings

_TICK_S = 1.0
_LOSSES_MAX = 3
_BACK_OFF_S, _BACK_OFF_MAX_S = 1.0, 60.0
_LOOKED_AT = 100
_FAILED_MANY = 5
_STARTED_AT_ONCE = 30
"""In one frame: as each job is bounded, so is that."""

GRACE_S = 10.0
_TIMED_OUT = 124
_LEAVING_S = 60.0
_UNATTENDED = "who waited for it has gone"


class Controller:
    """directory: of the pool, whose lock we hold.  settings: pool.toml."""

    def __init__(self, directory: str, settings: Settings) -> None:
        self.directory = directory
        self.state = State(directory)
        self.pool = self.state.meta("pool")
        self.epoch = self.state.next_epoch()
        self.selector = selectors.DefaultSelector()
        self.jobs: dict[int, Job] = {job.id: job for job in self.state.open_jobs()}
        self.remotes: dict[str, Remote] = {}
        self._gone: dict[Remote, float] = {}
        """Workers that were removed, and until when they may end what they have begun."""
        self.outputs = outputs.Outputs(self)
        answered, lost = self.outputs.answered, self.outputs.lost
        self.store, self.tenants, self._output_max = settings.store, Tenants(settings.tenants), settings.output_max
        place = Pool(directory, self.pool, _lent(settings))
        self.wires = Wires(place, self.epoch, self.selector, self._heed, answered, lost)
        self.leases = Leases(settings.store)
        self.clients: dict[int, Client] = {}
        self.events = Events(directory)
        self.functions = Functions(self)
        self.is_ending = self.is_leaving = self._when_idle = self._when_alone = False
        self.turns = Turns(self.state, self.jobs)
        self._look_at_queue = 0.0
        self._has_unwanted = False
        """A job has ended whose files on this machine no other may want."""
        self.waiting = Waiting(self, settings)
        self._to_say: list[Callable[[], None]] = []
        self.fleet = self._fleet(settings)
        self.look_at_hosts()
        for job in list(self.jobs.values()):
            if job.state in (STARTING, RUNNING) and job.worker in self.remotes:
                self.remotes[job.worker].jobs[job.id] = job
            elif job.state in (STARTING, RUNNING):
                self.lose(job, "its worker is no host of the pool any more")
            elif job.state == QUEUED and job.spec.get("attended"):
                self.finish(job, state.CANCELLED, _UNATTENDED, has_written=False)
            if job.spec.get("fn"):
                self.functions.jobs[job.id] = job
        self.waiting.put_in_order()
        inputs.remove_unwanted(directory, (job.spec for job in self.jobs.values()))

    def _fleet(self, settings: Settings) -> Fleet | None:
        """Machines that the pool launches, if pool.toml says where."""
        if not settings.cloud:
            return None
        from pool import clouds
        from pool.fleet import Fleet

        return Fleet(self, clouds.connect(settings.cloud, self.pool), settings)

    # The loop.

    def run(self) -> None:
        """Until SIGTERM or SIGINT, or a command ends it.  Jobs go on."""
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:  # Ctrl-C is not for the one of a map
                signal.signal(number, lambda *_: self.end())
        is_shared = bool(self.tenants.all)
        listener = sockets.listen(self.directory, mode=0o666 if is_shared else 0o600)
        os.chmod(self.directory, 0o711 if is_shared else 0o700)  # what is in it is its owner's alone all the same
        self.selector.register(listener, selectors.EVENT_READ, lambda _: commands.accept(self, listener))
        try:
            self.turn(0)
            while not self.is_ending:
                self.turn(_TICK_S)
                self.functions.mind()
            self.turn(0)  # not after an error: what is then still to be said is not on disk
        finally:
            self.wires.close()
            os.chmod(self.directory, 0o700)
            os.unlink(os.path.join(self.directory, "socket"))
            self.state.close()

    def run_for(self, seconds: float) -> None:
        """One step for cron: until all workers were heard or have failed, and nothing more can be started; SECONDS at most.

        A worker is lost only if it cannot be reached now, and was not for longer than LOST_S by the clock of the wall: what
        happens between two steps nobody has seen.
        """
        deadline = time.monotonic() + seconds
        quiet = 0
        while time.monotonic() < deadline and quiet < 2:
            self.turn(0.2)
            is_settled = all(remote.has_reported or remote.problem for remote in self.remotes.values())
            is_settled = is_settled and (self.fleet is None or self.fleet.is_settled())
            quiet = quiet + 1 if is_settled and not any(job.state == STARTING for job in self.jobs.values()) else 0
        for remote in self.remotes.values():
            heard_s = float(self.state.meta(f"heard.{remote.name}") or 0)
            if remote.has_reported or not heard_s:
                self.state.set_meta(f"heard.{remote.name}", str(time.time()))
            elif remote.problem:
                silent_s = time.time() - heard_s
                for job in list(remote.jobs.values()):
                    if silent_s > workers.LOST_S + (2 * workers.STRICT_S if job.spec.get("strict") else 0):
                        self.lose(job, f"worker {remote.name} was lost")
        self.turn(0)
        self.wires.close()
        self.state.close()

    def end(self) -> None:
        """Stop after this turn.  May be called by a signal handler."""
        self.is_ending = True
        self.wires.wake()

    def leave(self, *, when_idle: bool, when_alone: bool = False) -> None:
        """End, and let agents without jobs end.  when_idle: not before all jobs have; when_alone: nor while a command asks."""
        self.is_leaving, self._when_idle, self._when_alone = True, when_idle, when_alone
        if when_idle and self.fleet and not self.jobs:
            self.fleet.end_all()
            if self.fleet.has_any():
                return
        if not (when_idle and self.jobs) and not (when_alone and len(self.clients) > 0):
            for remote in self.remotes.values():
                self.send(remote, frames.message("leave"))
            self.is_ending = True

    def turn(self, wait_s: float) -> None:
        """Hear, decide, write, say."""
        for key, events in self.selector.select(0 if self.turns.is_due() else wait_s):
            key.data(events)
        self._mind_workers()
        self.fleet.turn() if self.fleet else None
        self._mind_queue()
        for name, jobs in self.waiting.place().items():
            self._tell_to_start(self.remotes[name], jobs)
        if self.is_leaving and not self.is_ending:
            self.leave(when_idle=self._when_idle, when_alone=self._when_alone)
        self.state.commit()
        changes = self.state.take_changes()
        self.events.write(changes)
        self.functions.changed(changes)
        if self._has_unwanted:
            self._has_unwanted = False
            inputs.remove_unwanted(self.directory, (one.spec for one in self.jobs.values()))
        said, self._to_say = self._to_say, []
        for one in said:
            one()

    def say(self, one: Callable[[], None]) -> None:
        """Do it when what was decided is on disk."""
        self._to_say.append(one)

    # Workers.

    def look_at_hosts(self) -> None:
        """What hosts there are may have changed.  A pool without any, and without a cloud, has this machine."""
        rows = self.state.hosts()
        if self.fleet:
            rows += self.fleet.rows()
        elif not rows:
            rows = [{"name": "local", "address": LOCAL, "state": "ready", "labels": []}]
        for row in rows:
            known = self.remotes.get(row["name"])
            if known and known.address != row["address"]:
                self._let_go(self.remotes.pop(known.name), "its worker is another machine now")
                known = None
            if known is None:
                is_draining = row["state"] != "ready"
                self.remotes[row["name"]] = Remote(row["name"], row["address"], row["labels"], is_draining=is_draining)
            else:
                known.is_draining, known.labels = row["state"] != "ready", frozenset(row["labels"])
        for name in set(self.remotes) - {row["name"] for row in rows}:
            self._let_go(self.remotes.pop(name), "its worker was removed", is_for_good=True)

    def _let_go(self, gone: Remote, why: str, *, is_for_good: bool = False) -> None:
        """A worker is none of the pool's any more: what runs there ends, and is done elsewhere."""
        for job in list(gone.jobs.values()):
            self.send(gone, frames.message("cancel", id=job.id, attempt=job.attempt, grace_s=GRACE_S))
            gone.jobs.pop(job.id)
            self.lose(job, why)
        self.send(gone, frames.message("leave", remove=is_for_good))
        gone.is_gone = True
        self._gone[gone] = time.monotonic() + _LEAVING_S  # its agent ends the connection when it has done all that

    def _mind_workers(self) -> None:
        for gone in [one for one, until in self._gone.items() if one.link is None or until < time.monotonic()]:
            del self._gone[gone]
            self.wires.drop(gone, "removed")
        for remote in self.remotes.values():
            if remote.state == workers.LOST and remote.jobs:
                for job in [one for one in remote.jobs.values() if remote.is_lost_for(one)]:
                    self.lose(job, f"worker {remote.name} was lost")
                if remote.link:
                    self.wires.drop(remote, "no report came")
            self.wires.open(remote)
        if any(job.spec["image"] for job in self.waiting.jobs[:_LOOKED_AT]):
            for remote in self.remotes.values():
                if remote.may_be_set_up:
                    self.wires.set_up(remote, for_s3=self.store.startswith("s3://"))

    def send(self, remote: Remote, frame: bytes) -> None:
        """When this turn is on disk."""
        self.say(lambda: self.wires.write(remote, frame))

    def _heed(self, remote: Remote, said: dict[str, Any]) -> None:
        """What an agent says.  Raises ValueError, KeyError, TypeError for nonsense."""
        kind = said["is"]
        if kind == "fenced":
            raise ValueError("another controller has it, or its agent is of another version")
        if kind == "hello":
            remote.has_greeted, remote.boot_id = True, str(said["boot_id"])[:64]
            known = {(_number(one["id"]), _number(one["attempt"])): bool(one["ended"]) for one in said["jobs"]}
            remote.known = frozenset(known)
            self._reconcile(remote, known)
        elif kind == "report":
            was_ready = not remote.reason
            remote.reported(said)
            self.send(remote, frames.message("heard"))
            self.waiting.may_place = self.waiting.may_place or not was_ready
        elif kind == "running":
            job = self._current(remote, said)
            if job and job.state == STARTING:
                if remote.failed_in_a_row < _FAILED_MANY:
                    remote.has_started()
                self.state.change(job, state=RUNNING, started_s=time.time())
        elif kind == "refused":
            job = self._current(remote, said)
            if job:
                self._refused(remote, job, str(said["problem"])[:200])
        elif kind == "done":
            self._done(remote, said)

    def _current(self, remote: Remote, said: dict[str, Any]) -> Job | None:
        """The job that an agent speaks of, if what it has is the attempt that counts."""
        job = remote.jobs.get(_number(said["id"]))
        return job if job and job.attempt == said["attempt"] and job.state in (STARTING, RUNNING) else None

    def _refused(self, remote: Remote, job: Job, problem: str) -> None:
        """A worker could not start it, by no fault of the job's: it waits for another, or for this one to be better."""
        del remote.jobs[job.id]
        remote.refused(problem)
        if job.reason == requests.CANCEL_ASKED:
            self.finish(job, state.CANCELLED, "cancelled", has_written=False)
        else:
            self.state.change(job, reason=f"worker {remote.name} could not start it: {problem}")
            self._again(job)

    def _reconcile(self, remote: Remote, known: dict[tuple[int, int], bool]) -> None:
        """What it has and we do not want any more ends; what we want and it does not have is started, or was lost."""
        for one, attempt in known:
            job = remote.jobs.get(one)
            if not known[one, attempt] and (job is None or job.attempt != attempt):
                self.send(remote, frames.message("cancel", id=one, attempt=attempt, grace_s=0))
        for job in list(remote.jobs.values()):
            if (job.id, job.attempt) in known:
                if job.reason == requests.CANCEL_ASKED:
                    self.send(remote, frames.message("cancel", id=job.id, attempt=job.attempt, grace_s=GRACE_S))
                continue
            if job.reason == requests.CANCEL_ASKED:
                del remote.jobs[job.id]
                self.finish(job, state.CANCELLED, "cancelled", has_written=False)
            elif job.state == STARTING:
                self._tell_to_start(remote, [job])
            else:
                self.lose(job, f"worker {remote.name} knows nothing of it any more")

    # Jobs.

    def add(self, job: Job) -> None:
        """One that was just submitted."""
        self.jobs[job.id] = job
        self.fleet.came(job) if self.fleet else None
        if job.spec.get("fn"):
            self.functions.jobs[job.id] = job
        if job.state == QUEUED:
            self.waiting.add(job)

    def _mind_queue(self) -> None:
        """Once a second: what has waited for longer than it was to."""
        if time.monotonic() < self._look_at_queue:
            return
        self._look_at_queue = time.monotonic() + _TICK_S
        self.outputs.mind()
        self.waiting.may_place = True
        images = {str(job.spec["image"]) for job in self.jobs.values() if job.spec.get("image")}
        self.leases.mind(frozenset(images | self.functions.images()))
        queued = (job for job in self.waiting.jobs if job.state == QUEUED)
        late = [job for job in queued if 0 < job.spec.get("queue_s", 0) < time.time() - job.submitted_s]
        for job in late:
            self.finish(job, state.CANCELLED, "waited too long for a worker", has_written=False)
        for job in [one for one in self.jobs.values() if one.state == STARTING and one.spec.get("start_s")]:
            remote = self.remotes.get(job.worker)
            if remote and remote.waits_s(job) > job.spec["start_s"]:
                self.send(remote, frames.message("cancel", id=job.id, attempt=job.attempt, grace_s=0))
                self.lose(job, "did not start in time")
        if late or self.tenants.all:  # what is fair changes as jobs end
            self.waiting.put_in_order()

    def _tell_to_start(self, remote: Remote, jobs: list[Job]) -> None:
        store = self.store if remote.address == LOCAL or "://" in self.store else specs.LENT
        given = self.pool, remote.name, store, self._output_max
        asked = [specs.asked(job, *given) for job in jobs if not specs.has_more(job)]
        for at in range(0, len(asked), _STARTED_AT_ONCE):
            self.send(remote, frames.message("start", jobs=asked[at : at + _STARTED_AT_ONCE]))
        for job in filter(specs.has_more, jobs):
            try:
                more = specs.more_of(job, self.directory)
            except (CafsError, OSError) as error:
                remote.jobs.pop(job.id, None)
                self.state.change(job, code=125)
                self.finish(job, state.FINISHED, str(error), has_written=False)
                continue
            one = {**specs.asked(job, *given), **more}
            self.send(remote, frames.message("start", jobs=[one]))

    def _done(self, remote: Remote, said: dict[str, Any]) -> None:
        number, attempt, code = _number(said["id"]), _number(said["attempt"]), said["code"]
        if type(code) is not int or not -1 <= code <= 255:
            raise ValueError("an exit code that is none")
        job = self._current(remote, said)
        if job is None:
            self.outputs.fetch_or_forget(remote, number, attempt, said)
            return
        self.waiting.may_place = True
        usage = {name: said[name] for name in ("wall_s", "cpu_s", "memory") if workers.is_amount(said[name])}
        if job.spec.get("out"):
            usage["files"] = [_number(one, -1) for one in said["files"]][: len(job.spec["out"])]
            usage["modes"] = [_number(one) & 0o777 for one in said["modes"]][: len(job.spec["out"])]
        if said.get("left_out"):
            usage["left_out"] = outputs.gaps_of(said)
        self.state.change(job, code=code, usage=usage, started_s=job.started_s or time.time() - usage.get("wall_s", 0))
        del remote.jobs[job.id]
        if job.reason != requests.CANCEL_ASKED and code != _TIMED_OUT:
            self._judge(remote, job, usage.get("wall_s", 0))
        if job.reason == requests.CANCEL_ASKED:
            self.finish(job, state.CANCELLED, "cancelled")
        elif said.get("unable") and self._others(remote, lambda other: other.free().images):
            remote.cannot_run_images(str(said["unable"])[:200])
            self.state.change(job, reason=f"worker {remote.name} cannot run images: {remote.unable}")
            self._again(job)
            self.forget(remote, number, attempt)
            return
        elif code < 0 and self._may_be_lost(job):
            self.lose(job, f"worker {remote.name} was booted, or what ran there was killed")
            self.forget(remote, number, attempt)
            return
        elif code and job.failures < int(job.spec["retries"]):
            self.state.change(job, failures=job.failures + 1)
            self._again(job, self._back_off(job.failures))
            self.outputs.fetch_earlier(remote, number, attempt, said)
            return
        else:
            more = ": it had no memory left, of --memory" if code and said.get("oom") else ""
            self.finish(job, state.FINISHED, _in_words(code) + more)
        self.outputs.fetch_or_forget(remote, number, attempt, said)

    def _others(self, remote: Remote, are_such: Callable[[Remote], bool]) -> bool:
        """Whether there is another worker that takes jobs now and is such."""
        return any(one is not remote and not one.reason and are_such(one) for one in self.remotes.values())

    def _judge(self, remote: Remote, job: Job, wall_s: float) -> None:
        """By how a job has ended there: where everything fails at once, and elsewhere it does not, no more go for a while."""
        remote.has_ended(job, wall_s)
        many = remote.failed_in_a_row
        if many < _FAILED_MANY:
            return
        if self._others(remote, lambda one: one.failed_in_a_row < _FAILED_MANY and one.did_well_s > remote.fails_since_s):
            remote.refused(f"the last {many} have failed at once")

    @staticmethod
    def _back_off(failures: int) -> float:
        return min(_BACK_OFF_S * 2.0 ** (failures - 1), _BACK_OFF_MAX_S) * (0.5 + random.random())

    def _again(self, job: Job, wait_s: float = 0.0) -> None:
        self.state.change(job, state=QUEUED, worker="")
        if wait_s:
            self.turns.try_later(job, wait_s)
        self.waiting.has_changed()

    @staticmethod
    def _may_be_lost(job: Job) -> bool:
        """Whether it is done again if its worker is."""
        return job.losses < _LOSSES_MAX and bool(job.spec.get("requeue", True))

    def lose(self, job: Job, why: str) -> None:
        """Its worker is not heard of: it is done again elsewhere, but not for ever."""
        remote = self.remotes.get(job.worker)
        if remote:
            remote.jobs.pop(job.id, None)
        if job.reason == requests.CANCEL_ASKED:
            self.finish(job, state.CANCELLED, "cancelled", has_written=False)
        elif not self._may_be_lost(job):
            self.state.change(job, code=-1)
            self.finish(job, state.FINISHED, why, has_written=False)
        else:
            self.state.change(job, losses=job.losses + 1, reason=why)
            self._again(job)

    def finish(self, job: Job, how: str, reason: str, *, has_written: bool = True) -> None:
        """It has ended.  Who waits for it is told.  has_written: what it wrote is still to come."""
        if job.state == RUNNING and not has_written:
            self.state.change(job, usage={**job.usage, "missing": [f"what it wrote was lost with worker {job.worker}"]})
        self.state.change(job, state=how, reason=reason, finished_s=time.time())
        if not has_written:
            self.state.keep_output(job.id, b"", b"")
        self.waiting.may_place = True
        self.jobs.pop(job.id, None)
        self._has_unwanted = self._has_unwanted or bool(job.spec.get("in"))
        self.turns.forget(job)
        for client in list(self.clients.values()):
            client.ended(job)

    def left(self, numbers: Iterable[int]) -> None:
        """Who waited for these has gone: those that have not begun are not wanted any more."""
        for number in numbers:
            job = self.jobs.get(number)
            if job and job.state in (QUEUED, state.HELD):
                self.finish(job, state.CANCELLED, _UNATTENDED, has_written=False)
                self.waiting.has_changed()

    def forget(self, remote: Remote, number: int, attempt: int) -> None:
        """Nothing more of it is wanted from its agent."""
        self.send(remote, frames.message("forget", jobs=[[number, attempt]]))

    def cancel(self, job: Job, grace_s: float) -> None:
        """End it, wherever it is."""
        if job.state in ENDED:
            return
        if job.state in (STARTING, RUNNING):
            self.state.change(job, reason=requests.CANCEL_ASKED)
            remote = self.remotes.get(job.worker)
            if remote:
                self.send(remote, frames.message("cancel", id=job.id, attempt=job.attempt, grace_s=grace_s))
        else:
            self.finish(job, state.CANCELLED, "cancelled", has_written=False)
            self.waiting.has_changed()


def _lent(settings: Settings) -> str:
    """The store that workers read over their connections: ours, if it is a directory."""
    store = settings.store or paths.store()
    return store if "://" not in store and os.path.isdir(store) else ""


def _number(value: object, least: int = 0) -> int:
    """Of a job, an attempt, or a size of a file (-1: there is none), as an agent says it.  Raises ValueError."""
    if type(value) is not int or not least <= value < 1 << 62:
        raise ValueError("a number that is none")
    return value


def _in_words(code: int) -> str:
    if code == 0:
        return ""
    if code == 124:
        return "ran out of time"
    return "killed; nobody knows its exit code" if code < 0 else f"exit code {code}"
