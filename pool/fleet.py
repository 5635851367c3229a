"""The machines that the pool has launched: what is decided about them, and what the cloud says of them.

What is to be done is on disk before the cloud is asked, and may be asked again: a machine's name is its identity there.
Calls are made in threads and their answers heard by the loop; what a cloud does not say changes nothing.

launching -> booting (the cloud has it) -> ready (its agent has reported) -> ending -> ended
"""

from __future__ import annotations

import math
import os
import threading
import time
from dataclasses import replace
from functools import partial
from queue import SimpleQueue

from cafs.errors import NotFound, quote
from pool import cloud, scaling, workers
from pool.boot import DEADMAN_S
from pool.market import DAY_S, Market

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pool.cloud import Cloud, Instance
    from pool.controller import Controller
    from pool.placement import Need, Worker
    from pool.scaling import Kind
    from pool.settings import Settings
    from pool.state import Job
    from pool.workers import Remote

LAUNCHING, BOOTING, READY, ENDING, ENDED = "launching", "booting", "ready", "ending", "ended"
_TICK_S = 2.0
_LISTED_S, _LISTED_MAX_S = 5.0, 60.0
_POLL_MIN_S = 0.1
_AGAIN_S, _AGAIN_MAX_S = 2.0, 20.0
_GIVEN_UP_S = 600.0
"""How long a launch is tried whose outcome nobody knows."""
_VISIBLE_S = 60.0
_ORPHAN_S = 120.0
_SEEN_S = 60.0
_FAILURES_MAX = 10
_SETUPS_MAX = 3
_CALLS_AT_ONCE = 8
_LOOKED_AT = 1000


class Fleet:
    """controller: whose jobs they do.  cloud: where they are.  settings: pool.toml."""

    def __init__(self, controller: Controller, there: Cloud, settings: Settings) -> None:
        from pool import keys

        self._controller, self._cloud, self._settings = controller, there, settings
        self.market = Market(settings, controller.state)
        self._poll_s = max(float(settings.cloud.get("poll_s", _LISTED_S)), _POLL_MIN_S)
        self._secret = keys.secret(controller.directory)
        self.machines = {row["name"]: row for row in controller.state.machines()}
        self._failures = int(controller.state.meta("boot_failures") or 0)
        self.problem = ""
        """What the cloud has last refused, in words."""
        self._demand = scaling.Demand(self.market.policy.launch_s)
        self._room = threading.BoundedSemaphore(_CALLS_AT_ONCE)
        self._answers: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._busy: set[str] = set()
        self._try_after: dict[str, tuple[float, int]] = {}
        self._unsure = {name for name, row in self.machines.items() if not row["instance"]}
        """Launched, perhaps: an answer was lost."""
        self._ending_since: dict[str, float] = {}
        self._began = time.monotonic()
        self._next, self._next_list, self._misses = 0.0, 0.0, 0
        self._is_known = self._has_decided = False
        self._known_since = 0.0

    # What the controller asks.

    def rows(self) -> list[dict[str, Any]]:
        """Workers, as of State.hosts: the machines that have an address."""
        found = []
        for row in self.machines.values():
            if row["address"] and row["state"] in (BOOTING, READY, ENDING):
                said = self._controller.state.meta(f"state.{row['name']}") or "ready"  # by cpool node
                state = "drain" if row["state"] == ENDING else said
                kind = self.market.kinds.get(row["kind"])
                found.append(
                    {"name": row["name"], "address": row["address"], "state": state, "labels": kind.labels if kind else ()}
                )
        return found

    def came(self, job: Job) -> None:
        """One was submitted."""
        most = max((kind.cpus for kind in self.market.policy.kinds), default=0.0)  # of a larger one no machine has room
        self._demand.came(time.monotonic() - self._began, min(float(job.spec["cpus"]), most))

    def why_not(self, need: Need) -> str:
        """Why no machine comes for a job, or when one does; '' if that is not known."""
        if self.is_stopped():
            return f"{self._failures} machines in a row did not come up, so no more are launched: cpool cloud resume"
        if not any(kind.worker("new").could_fit(need) for kind in self.market.kinds.values()):
            return ""
        begun = [row for row in self.machines.values() if row["state"] in (LAUNCHING, BOOTING)]
        if begun:
            oldest_s = time.time() - min(row["intended_s"] for row in begun)
            return f"launching, about {max(self.market.policy.launch_s - oldest_s, 1):.0f} s"
        policy, price = self.market.open_policy(), sum(row["price"] for row in self.machines.values())
        able = [kind for kind in policy.kinds if kind.worker("new").could_fit(need)]
        if len(self.machines) >= policy.machines:
            return f"there are {len(self.machines)} machines, which is the most that may be"
        if not any(price + kind.price <= policy.price for kind in able):
            cap = "price_day" if policy.price < self.market.policy.price else "price"
            return self.problem or f"no machine may be launched now: what it would cost is over a cap, {cap}"
        return self.problem

    def shown(self) -> dict[str, Any]:
        """As `cpool cloud ls` prints it."""
        now = time.time()
        spent = self._controller.state.spent(now - now % DAY_S, now)
        price = sum(row["price"] for row in self.machines.values())
        return {"machines": list(self.machines.values()), "spent_today": spent, "price": price, "problem": self.problem,
                "is_stopped": self.is_stopped()}  # fmt: skip

    def is_stopped(self) -> bool:
        """Whether nothing is launched until somebody has looked."""
        return self._failures >= _FAILURES_MAX

    def resume(self) -> None:
        """Somebody has."""
        self._failed(0)
        self.market.reset()

    def is_settled(self) -> bool:
        """Whether nothing is being asked."""
        return self._has_decided and not self._busy

    def end(self, name: str) -> None:
        """One is wanted no more.  Raises NotFound."""
        if name not in self.machines:
            raise NotFound(f"no machine {quote(name)}", hint="cpool cloud ls")
        self._end(self.machines[name], "somebody has ended it")

    def end_all(self) -> None:
        """They are wanted no more."""
        for row in list(self.machines.values()):
            self._end(row, "the pool was ended")

    def has_any(self) -> bool:
        """Whether some have not ended, as far as is known."""
        return bool(self.machines)

    # The loop.

    def turn(self) -> None:
        """Hear, and every two seconds decide."""
        while not self._answers.empty():
            self._answers.get()()
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + min(_TICK_S, self._poll_s)
        if now >= self._next_list:
            self._next_list = now + self._poll_s
            self._call("", self._cloud.instances, self._listed)
        for row in list(self.machines.values()):
            self._mind(row, now)
        if self._is_known and not self._misses and not self._controller.is_leaving and self._controller.waiting.is_open:
            self._scale(now)
            self._has_decided = True

    def _call(self, name: str, function: Callable[[], Any], then: Callable[[Any, Exception | None], None]) -> None:
        """Ask the cloud something of a machine ('': of all), in a thread, one thing at a time; THEN is called by the loop."""
        if name in self._busy:
            return
        self._busy.add(name)

        def done(found: Any, error: Exception | None) -> None:
            self._busy.discard(name)
            then(found, error)

        def work() -> None:
            try:
                with self._room:
                    found, error = function(), None
            except Exception as failure:  # whatever a library raises is an answer
                found, error = None, failure
            self._answers.put(lambda: done(found, error))
            self._controller.wires.wake()

        self._controller.say(threading.Thread(target=work, daemon=True).start)

    # One machine.

    def _mind(self, row: dict[str, Any], now: float) -> None:
        """What time does to it."""
        name, since_s = row["name"], time.time() - (row["launched_s"] or row["intended_s"])
        remote = self._controller.remotes.get(name)
        if self._try_after.get(name, (0.0, 0))[0] > now:
            return
        if row["state"] == LAUNCHING:
            if since_s > _GIVEN_UP_S:
                self._end(row, "its launch has had no answer")
            else:
                self._launch(row)
        elif row["state"] == BOOTING and remote and remote.has_reported:
            self._came_up(row)
        elif row["state"] == BOOTING and self._is_late(since_s, remote):
            self._failed(self._failures + 1)
            self._end(row, f"it did not come up{': ' + remote.problem if remote and remote.problem else ''}")
        elif row["state"] == READY and remote:
            is_gone = remote.state == workers.LOST and time.monotonic() - remote.heard > _GIVEN_UP_S
            self._end(row, "it was not heard of") if is_gone and not self._misses else None
        elif row["state"] == ENDING:
            self._ask_to_end(row)

    def _is_late(self, since_s: float, remote: Remote | None) -> bool:
        """Whether a machine should have come up by now, and this controller has looked for long enough to say so."""
        boot_s = float(self._settings.cloud.get("boot_s", 300))
        if since_s <= boot_s or not self._is_known or self._misses:
            return False
        return time.monotonic() - self._known_since > boot_s or bool(remote and remote.problem)

    def _launch(self, row: dict[str, Any]) -> None:
        from pool import boot, keys

        table = self.market.tables.get(row["kind"])
        if table is None:
            return self._end(row, "pool.toml has no machine of this kind any more")
        settings, is_spot = self._settings.cloud, bool(table.get("spot"))
        make = boot.cloud_config if settings["provider"] == "ec2" else boot.startup_script
        text = make(self._secret, row["name"], settings["user"], is_spot=is_spot)
        order = cloud.Order(
            row["name"], table.get("type", row["kind"]), row["zone"], is_spot, text, keys.client_public(self._secret)
        )
        self._call(row["name"], lambda: self._cloud.launch(order), lambda found, error: self._launched(row, found, error))

    def _launched(self, row: dict[str, Any], found: Instance | None, error: Exception | None) -> None:
        if found is not None:
            self._try_after.pop(row["name"], None)
            if row["state"] == LAUNCHING:
                self._note(row, state=BOOTING, instance=found.id, launched_s=row["launched_s"] or _since(found))
                self.problem = ""
            elif row["state"] == ENDED:
                self._call(f"late {found.id}", lambda: self._cloud.end([found]), lambda _, error: None)
            elif not row["instance"]:
                self._note(row, instance=found.id, launched_s=row["launched_s"] or _since(found))  # it is to end already
        elif isinstance(error, cloud.NoCapacityError | cloud.RefusedError):
            self.problem = str(error)
            self.market.close(row["kind"], row["zone"])
            self._end(row, str(error)) if row["name"] in self._unsure else self._gone(row, str(error))
        else:
            self.problem = str(error)
            self._unsure.add(row["name"])
            self._later(row["name"])

    def _later(self, name: str) -> None:
        """Whatever was tried is tried again, later each time."""
        tries = self._try_after.get(name, (0.0, 0))[1]
        self._try_after[name] = time.monotonic() + min(_AGAIN_S * 2**tries, _AGAIN_MAX_S), tries + 1

    def _came_up(self, row: dict[str, Any]) -> None:
        self._failed(0)
        self._note(row, state=READY, ready_s=time.time())

    def _learn(self) -> None:
        """What the machines that are there say of their kinds."""
        reports: dict[str, list[dict[str, Any]]] = {}
        for row in self.machines.values():
            remote = self._controller.remotes.get(row["name"])
            if row["state"] == READY and remote and remote.report:
                images = not remote.report["images"] or remote.setup_failures < _SETUPS_MAX
                reports.setdefault(row["kind"], []).append({**remote.report, "images": images})
        self.market.learn(reports)

    def _failed(self, count: int) -> None:
        """So many machines in a row have not come up."""
        if count != self._failures:
            self._failures = count
            self._controller.state.set_meta("boot_failures", str(count))

    def _end(self, row: dict[str, Any], why: str) -> None:
        if row["state"] in (ENDING, ENDED):
            return
        self._note(row, state=ENDING, reason=why)
        self._try_after.pop(row["name"], None)
        self._ending_since[row["name"]] = time.monotonic()
        self._controller.look_at_hosts()
        self._ask_to_end(row)

    def _ask_to_end(self, row: dict[str, Any]) -> None:
        if not row["instance"]:  # nobody knows whether there is one; the list will say
            now = time.monotonic()
            if row["name"] in self._busy:
                return  # its launch is under way
            is_old = now - self._ending_since.setdefault(row["name"], now) > _ORPHAN_S
            if self._is_known and not self._misses and (is_old or time.time() - row["intended_s"] > _GIVEN_UP_S):
                self._gone(row, row["reason"])
            return
        one = self._instance(row)

        def ended(_: object, error: Exception | None) -> None:
            self._later(row["name"])  # asked again until the cloud shows that it has ended
            if error:
                self.problem = str(error)
            elif row["state"] == ENDING:
                self._confirm(row)

        self._call(row["name"], lambda: self._cloud.end([one]), ended)

    def _confirm(self, row: dict[str, Any]) -> None:
        """Ask for it alone: no list says that a machine is not there."""

        def looked(found: Instance | None, error: Exception | None) -> None:
            if error is None and (found is None or found.state == cloud.ENDED) and row["name"] in self.machines:
                self._gone(row, row["reason"] or "the cloud has ended it")

        one = self._instance(row)
        self._call(row["name"], lambda: self._cloud.look(one), looked)

    @staticmethod
    def _instance(row: dict[str, Any]) -> Instance:
        return cloud.Instance(row["instance"], row["name"], "", "", row["zone"], row["intended_s"])

    def _gone(self, row: dict[str, Any], why: str) -> None:
        """It is no more, or never was."""
        from pool import ssh

        if row["name"] not in self.machines:
            return
        if row["state"] == BOOTING:  # whatever has ended it, it did not come up
            self._failed(self._failures + 1)
        self._note(row, state=ENDED, reason=why, ended_s=self._bill_end(row))
        del self.machines[row["name"]]
        self._unsure.discard(row["name"])
        self._try_after.pop(row["name"], None)
        self._ending_since.pop(row["name"], None)
        if row["address"]:
            ssh.unpin(self._controller.directory, row["name"])
        self._controller.look_at_hosts()

    @staticmethod
    def _bill_end(row: dict[str, Any]) -> float:
        """Until when it is paid for: now, or, if nobody has looked for long, when it has powered itself off at the latest."""
        seen_s = row["seen_s"] or row["launched_s"]
        return time.time() if seen_s is None else min(time.time(), seen_s + DEADMAN_S)

    def _note(self, row: dict[str, Any], **fields: Any) -> None:
        row.update(fields)
        if "state" in fields:
            names = ("state", "kind", "zone", "instance", "price", "reason")
            self._controller.state.changes.append({"what": "machine", "id": row["name"], **{name: row[name] for name in names}})
        self._controller.state.put_machine(row)

    # What the cloud says of all.

    def _listed(self, found: list[Instance] | None, error: Exception | None) -> None:
        if found is None:
            self.problem = str(error)
            self._misses += 1
            self._next_list = time.monotonic() + min(self._poll_s * 2**self._misses, _LISTED_MAX_S)
            return
        self.problem = "" if self._misses else self.problem
        if not self._is_known or self._misses:
            self._known_since = time.monotonic()
        self._misses, self._is_known = 0, True
        by_name = {one.name: one for one in found if one.state != cloud.ENDED or one.name in self.machines}
        for row in list(self.machines.values()):
            one = by_name.pop(row["name"], None)
            if one is not None:
                self._seen(row, one)
            elif row["instance"] and time.time() - (row["launched_s"] or 0) > _VISIBLE_S:
                self._confirm(row)
        self._end_strangers(list(by_name.values()))

    def _seen(self, row: dict[str, Any], one: Instance) -> None:
        if one.state == cloud.ENDED:
            return self._gone(row, row["reason"] or "the cloud has ended it")
        if not row["instance"]:
            self._note(row, instance=one.id, launched_s=row["launched_s"] or _since(one))
        if row["state"] == LAUNCHING:
            self._note(row, state=BOOTING)
        if one.state == cloud.STOPPED:
            if row["state"] == BOOTING:
                self._failed(self._failures + 1)
            return self._end(row, "it was stopped")
        if time.time() - (row["seen_s"] or 0) > _SEEN_S:
            self._note(row, seen_s=time.time())
        if one.state == cloud.RUNNING and one.address and row["state"] == BOOTING and not row["address"]:
            self._reach(row, one.address)

    def _reach(self, row: dict[str, Any], address: str) -> None:
        """It has an address: its key is known before anybody has connected."""
        from pool import keys, ssh

        settings, directory = self._settings.cloud, self._controller.directory
        public = keys.host_key(self._secret, row["name"])[1]
        ssh.pin(directory, row["name"], " ".join(public.split()[:2]))
        whole = f"{settings['user']}@{address}:{int(settings.get('port', 22))}?{os.path.join(directory, keys.IDENTITY)}"
        self._note(row, address=whole)
        self._controller.look_at_hosts()

    def _end_strangers(self, found: list[Instance]) -> None:
        """Machines with the mark of this pool of which nothing is known: after a while they end."""
        now = time.time()
        old = [one for one in found if one.state != cloud.ENDING and now - one.launched_s > _ORPHAN_S]
        for one in old:
            self._call(f"stranger {one.id}", partial(self._cloud.end, [one]), self._stranger_ended)

    def _stranger_ended(self, _: object, error: Exception | None) -> None:
        if error:
            self.problem = f"a machine with this pool's mark does not end: {error}"

    # How many.

    def _scale(self, now: float) -> None:
        controller = self._controller
        self._learn()
        every = [kind.worker("new") for kind in self.market.kinds.values()]
        free = controller.waiting.free()
        machines = [
            self._as_machine(number, row, now, free.get(row["name"])) for number, row in enumerate(self.machines.values())
        ]
        every += [machine.worker for machine in machines]
        waiting = controller.waiting.due(_LOOKED_AT, lambda need: any(one.could_fit(need) for one in every))
        others = [one for name, one in free.items() if name not in self.machines]
        running = sum(float(job.spec["cpus"]) for remote in controller.remotes.values() for job in remote.jobs.values())
        policy = self.market.open_policy()
        spare = scaling.spare_cpus(policy, running, self._demand, now - self._began)
        begin, end = scaling.decide(now, policy, machines, waiting, spare, others)
        if not self.is_stopped() and policy.kinds:
            for kind in begin:
                self._intend(kind)
        names = list(self.machines)
        for machine in end:
            self._end(self.machines[names[machine.number]], "it was not needed")

    def _as_machine(self, number: int, row: dict[str, Any], now: float, free: Worker | None) -> scaling.Machine:
        kind = self.market.kinds.get(row["kind"]) or scaling.Kind(row["kind"], 0.0, price=row["price"])
        remote = self._controller.remotes.get(row["name"])
        is_ready = row["state"] == READY and remote is not None and bool(remote.report)
        is_idle = is_ready and not (remote and (remote.jobs or self._controller.outputs.is_fetching(remote)))
        if is_idle != (row["idle_s"] is not None):
            self._note(row, idle_s=time.time() if is_idle else None)
        idle_s = now - max(time.time() - row["idle_s"], 0) if is_idle else math.inf
        found = scaling.Machine(number, replace(kind, price=row["price"]), now if is_ready else math.inf, idle_s)
        if is_ready and remote and free:
            found.worker = free
            is_leaving = remote.is_draining or remote.is_stuck or remote.state == workers.LOST or remote.report["notice"]
            found.worker.reason = "x" if is_leaving else ""
            can_be_set_up = not remote.report["images"] or remote.setup_failures < _SETUPS_MAX
            found.worker.images = not remote.unable and can_be_set_up
        elif row["state"] == ENDING:
            found.worker.reason = "x"
        return found

    def _intend(self, kind: Kind) -> None:
        """One more: from here on it is on disk, and the cloud is asked when that is so."""
        zones = self.market.zones(kind.name)
        name = f"m-{os.urandom(6).hex()}"
        row = {"name": name, "kind": kind.name, "zone": zones[len(self.machines) % len(zones)], "price": kind.price}
        row |= {"state": LAUNCHING, "instance": "", "address": "", "reason": "", "intended_s": time.time()}
        row |= {"seen_s": None, "launched_s": None, "ready_s": None, "idle_s": None, "ended_s": None}
        self.machines[name] = row
        self._note(row, state=LAUNCHING)
        self._launch(row)


def _since(one: Instance) -> float:
    """Since when it is paid for, as the cloud says, if that can be."""
    now = time.time()
    return one.launched_s if now - DAY_S < one.launched_s <= now else now
