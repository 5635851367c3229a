"""What commands ask of the controller, over a socket in the pool's directory: a JSON object a line each way."""

from __future__ import annotations

import base64
import json
import math
import os
import selectors
import socket
import struct

from cafs.errors import BusyError, CafsError, NotFound, UnsupportedError, UsageError, os_error, quote
from pool import inputs, links, metrics, outputs, secrets, sockets, staging, state
from pool.state import Job
from pool.tenants import OWNER, tenant_of
from pool.workers import STRICT_S

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pool.controller import Controller

CANCEL_ASKED = "cancelled while it ran"
_LINE_MAX = 64 << 20
_PIECE = 1 << 18
_KEEP = 64 << 10
"""Output of a job up to so many bytes comes with its end."""
_SPEC_MAX = 128 << 10
_SECRETS_MAX = 1000
_LATER = ("tenant", "secrets", "disk", "strict", "start_s", "in", "out")
"""What is in a job only if it has it."""

_CLIENTS_MAX = 64
"""Commands of one user who is not the owner, at once."""


LENT = "lent"
"""For the address of a store: that which the controller lends."""


def asked(job: Job, pool: str, worker: str, store: str) -> dict[str, Any]:
    """What an agent is told of a job.  store: address, '' for its own."""
    spec = job.spec
    own = {
        "CPOOL_POOL": pool,
        "CPOOL_WORKER": worker,
        "CPOOL_INDEX": str(spec.get("index", "")),
        "CPOOL_TENANT": str(spec.get("tenant", "")),
    }
    return {
        "id": job.id,
        "attempt": job.attempt,
        "command": spec["command"],
        "image": spec["image"],
        "store": store,
        "cpus": spec["cpus"],
        "memory": spec["memory"],
        "gpus": spec.get("gpus", 0),
        "env": {**spec["env"], **own},
        "cwd": spec["cwd"],
        "timeout_s": spec["timeout_s"],
        "alone_s": STRICT_S if spec.get("strict") else 0,
        "keep": _KEEP,
    }


def has_more(job: Job) -> bool:
    """Whether its agent is told more than what is in the state."""
    return any(name in job.spec for name in ("secrets", "in", "out"))


def more_of(job: Job, directory: str) -> dict[str, Any]:
    """That: secrets by name, files.  directory: of the pool.  Raises CafsError, OSError."""
    found: dict[str, Any] = {}
    if "secrets" in job.spec:
        tenant = tenant_of(job)
        values = {name: secrets.get(directory, tenant, name) for name in job.spec["secrets"]}
        found["secrets"] = {name: base64.b64encode(value).decode() for name, value in values.items()}
    if "in" in job.spec or "out" in job.spec:
        found |= {"in": inputs.of_job(directory, job.spec), "out": job.spec.get("out", [])}
    return found


def accept(controller: Controller, listener: socket.socket) -> None:
    """A command."""
    try:
        connection, _ = listener.accept()
    except OSError:
        return  # too many files are open: it is tried again
    uid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
    tenant = OWNER if uid in (os.geteuid(), 0) else controller.tenants.of_user(uid)
    many = sum(one.uid == uid for one in controller.clients.values())
    if tenant is None or (tenant != OWNER and many >= _CLIENTS_MAX):
        connection.close()
        return
    connection.setblocking(False)
    Client(controller, connection, uid, tenant)


class Client:
    """A command that is connected.  tenant: whose jobs it sees; the owner's sees all."""

    def __init__(self, controller: Controller, connection: socket.socket, uid: int, tenant: str) -> None:
        self._controller = controller
        self.uid, self.tenant, self.is_owner = uid, tenant, tenant == OWNER
        self._socket = connection
        self._held, self._unsent = bytearray(), bytearray()
        self._waits: dict[int, bool] = {}
        self.tag: object = None
        """Of the request that is being seen to; its answer bears it."""
        controller.clients[id(self)] = self
        controller.selector.register(connection, selectors.EVENT_READ, self._serve)

    def _serve(self, events: int) -> None:
        try:
            if events & selectors.EVENT_WRITE:
                self._flush()
            if events & selectors.EVENT_READ:
                data = self._socket.recv(_PIECE)
                if not data:
                    raise ConnectionResetError
                self._held += data
                while b"\n" in self._held:
                    line, _, rest = self._held.partition(b"\n")
                    self._held = rest
                    self._obey(bytes(line))
                if len(self._held) > _LINE_MAX:
                    raise ConnectionResetError
        except BlockingIOError:
            pass
        except OSError:
            self._drop()

    def _drop(self) -> None:
        if self._controller.clients.pop(id(self), None):
            self._controller.selector.unregister(self._socket)
            self._socket.close()

    def answer(self, found: dict[str, Any], tag: object = None) -> None:
        """When what was decided is on disk.  tag: of a request before."""
        tag = self.tag if tag is None else tag
        self._controller.say(lambda: self._answer_now({**found, "tag": tag}))

    def _answer_now(self, found: dict[str, Any]) -> None:
        if id(self) in self._controller.clients:
            self._unsent += json.dumps(found, separators=(",", ":")).encode() + b"\n"
            try:
                self._flush()
            except OSError:
                self._drop()

    def _flush(self) -> None:
        sockets.send(self._controller.selector, self._socket, self._unsent)

    def _obey(self, line: bytes) -> None:
        if line.startswith(b"GET /metrics") and self.is_owner:
            return self._answer_http()
        try:
            self.tag = None
            said = json.loads(line)
            self.tag = said.get("tag")
            handler = _HANDLERS.get(said["do"])
            if not self.is_owner and said["do"] not in _FOR_ALL:
                raise UnsupportedError("only the pool's owner may do that")
            if handler is None:
                raise UsageError(f"unknown request {quote(str(said['do']))}", hint="is the controller of another release?")
            handler(self, self._controller, said)
        except state.WriteError:
            raise  # half of it may have been done
        except CafsError as error:
            self.answer({"error": str(error), "code": error.exit_code, "hint": error.hint})
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            self.answer({"error": f"bad request: {error!r}", "code": 2, "hint": None})

    def _answer_http(self) -> None:
        """For curl --unix-socket, and whatever scrapes so: one answer, then the end."""
        body = metrics.text(self._controller).encode()
        head = f"HTTP/1.0 200 OK\r\nContent-Type: {metrics.TYPE}\r\nContent-Length: {len(body)}\r\n\r\n"
        self._socket.setblocking(True)
        self._socket.settimeout(1)
        self._socket.sendall(head.encode() + body)
        raise ConnectionResetError

    def ended(self, job: Job) -> None:
        """A job has; say so if it is waited for."""
        with_output = self._waits.pop(job.id, None)
        if with_output is not None:
            self._controller.say(lambda: self._answer_now({"job": job.shown(), **(self._output(job) if with_output else {})}))

    def _output(self, job: Job) -> dict[str, Any]:
        kept = self._controller.state.output(job.id)
        return {name: base64.b64encode(data).decode() for name, data in zip(("out", "err"), kept, strict=True)} if kept else {}

    def wait_for(self, number: int, *, with_output: bool) -> None:
        """Have its end said, without a tag, once it comes."""
        self._waits[number] = with_output


def _submit(client: Client, controller: Controller, said: dict[str, Any]) -> None:
    ids = []
    files = said.get("files") or {}
    if sum(map(len, files.values())) > 2 * staging.SIZE_MAX:
        raise UsageError(f"the files of a job are larger than {staging.SIZE_MAX} bytes")
    inputs.keep(controller.directory, files)
    jobs = [_of_tenant(client, controller, one) for one in said["jobs"]]
    specs = [check_one(controller.state, one) for one in jobs]  # all or none
    _check_quota(controller, specs)
    for one, spec in zip(jobs, specs, strict=True):
        how = state.HELD if one.get("hold") else state.QUEUED
        number = controller.state.submit(spec, one.get("key"), int(one.get("priority", 0)), how)
        ids.append(number)
        if number not in controller.jobs and (job := controller.state.job(number)).state not in state.ENDED:
            controller.add(job)
    client.answer({"ids": ids})


def _of_tenant(client: Client, controller: Controller, one: dict[str, Any]) -> dict[str, Any]:
    """The job as its tenant's.  Raises CafsError."""
    tenant = str(one["spec"].get("tenant", client.tenant))
    if not client.is_owner:
        if tenant != client.tenant:
            raise UnsupportedError("only the pool's owner may submit jobs of others")
        if not one["spec"].get("image"):
            raise UnsupportedError("only the pool's owner may run plain commands", hint="--image IMAGE")
    elif tenant != OWNER and tenant not in controller.tenants.all:
        raise NotFound(f"no tenant {quote(tenant)}", hint="[tenants] in pool.toml")
    key = f"{tenant}/{one['key']}" if tenant != OWNER and one.get("key") is not None else one.get("key")
    return {**one, "spec": {**one["spec"], "tenant": tenant}, "key": key}


def _check_quota(controller: Controller, specs: list[dict[str, Any]]) -> None:
    """Of jobs that have not ended.  Raises BusyError."""
    for name in {spec.get("tenant", OWNER) for spec in specs} & set(controller.tenants.all):
        most = controller.tenants.all[name].jobs
        known = sum(tenant_of(job) == name for job in controller.jobs.values()) if most else 0
        if most and known + sum(spec.get("tenant") == name for spec in specs) > most:
            raise BusyError(f"quota: {name} has {known} of {most} jobs")


def _job_of(client: Client, controller: Controller, number: object) -> Job:
    """One that the client may see.  Raises NotFound."""
    job = controller.jobs.get(int(str(number))) or controller.state.job(int(str(number)))
    if not client.is_owner and tenant_of(job) != client.tenant:
        raise NotFound(f"no job {number}", hint="cpool jobs --all")
    return job


def check_one(known: state.State, one: dict[str, Any]) -> dict[str, Any]:
    """The job, as it is kept, if it can be submitted.  Raises CafsError."""
    spec = check(one["spec"])
    for name in spec.get("secrets", ()):
        secrets.get(known.directory, spec.get("tenant", OWNER), name)
    if len(json.dumps(spec)) > _SPEC_MAX:
        raise UsageError(f"a job is larger than {_SPEC_MAX} bytes")
    if abs(int(one.get("priority", 0))) >= 1 << 31:
        raise UsageError(f"priority {one['priority']} is out of range")
    for number in spec["after"]:
        known.job(number)  # it has to be there
    known.with_key(spec, one.get("key"))
    return spec


def check(spec: dict[str, Any]) -> dict[str, Any]:
    """A job as it is kept.  Raises UsageError."""
    kinds: dict[str, tuple[Any, Any]] = {
        "command": (list, None), "image": (str, ""), "env": (dict, {}), "cwd": (str, ""), "cpus": ((int, float), 1),
        "memory": (int, 0), "gpus": (int, 0), "timeout_s": ((int, float), 0), "retries": (int, 0), "name": (str, ""),
        "array": (int, 0), "index": (int, 0), "at_once": (int, 0), "requeue": (bool, True), "queue_s": ((int, float), 0),
        "tenant": (str, OWNER), "after": (list, []), "constraint": (list, []), "exclude": (list, []),
        "disk": (int, 0), "strict": (bool, False), "start_s": ((int, float), 0), "secrets": (list, []),
        "in": (list, []), "out": (list, []),
    }  # fmt: skip
    unknown = set(spec) - set(kinds)
    if unknown:
        raise UsageError(f"a job has no {quote(sorted(unknown)[0])}")
    found = {name: spec.get(name, default) for name, (_, default) in kinds.items()}
    for name, (kind, _) in kinds.items():
        if not isinstance(found[name], kind) or (isinstance(found[name], int | float) and found[name] < 0):
            raise UsageError(f"a job's {name} cannot be {found[name]!r}")
    if not all(type(number) is int and 0 < number < 1 << 62 for number in found["after"]):
        raise UsageError("a job comes after numbers of jobs")
    for name in _LATER:
        if not found[name]:
            del found[name]  # so that one key means the same as before there was such a thing
    names = found.get("secrets", [])
    if not all(isinstance(one, str) and secrets.check_name(one) for one in names) or len(names) > secrets.MANY:
        raise UsageError(f"a job has at most {secrets.MANY} secrets")
    inputs.check(found)
    if not all(math.isfinite(found[name]) for name in ("cpus", "timeout_s", "queue_s")):
        raise UsageError("a job needs what can be counted")
    words = [*found["command"], *found["env"], *found["env"].values(), *found["constraint"], *found["exclude"]]
    if not found["command"] or not all(isinstance(word, str) and "\0" not in word for word in words):
        raise UsageError("a job's command is a list of words")
    return found


def _wait(client: Client, controller: Controller, said: dict[str, Any]) -> None:
    for number in said["ids"]:
        job = _job_of(client, controller, number)
        client.wait_for(job.id, with_output=bool(said.get("output")))
        if job.state in state.ENDED:
            client.ended(job)


def _jobs(client: Client, controller: Controller, said: dict[str, Any]) -> None:
    tenant = None if client.is_owner else client.tenant
    found = controller.state.jobs(int(said["limit"]), all_of_them=bool(said["all"]), tenant=tenant)
    client.answer({"jobs": [job.shown() for job in found]})


def _job(client: Client, controller: Controller, said: dict[str, Any]) -> None:
    from pool.placement import why_not
    from pool.workers import need_of

    job = _job_of(client, controller, said["id"])
    found = job.shown()
    if job.state == state.QUEUED:
        free, need = [one.free() for one in controller.remotes.values()], need_of(job.spec)
        coming = controller.fleet.why_not(need) if controller.fleet else ""
        quota = controller.tenants.over(job, controller.usage())
        found["waits"] = controller.turns.why_not(controller.jobs[job.id]) or quota or coming or why_not(need, free)
    client.answer({"job": found})


def _cancel(client: Client, controller: Controller, said: dict[str, Any]) -> None:
    for number in said["ids"]:
        job = _job_of(client, controller, number)
        controller.cancel(job, float(said["grace_s"]))
    client.answer({"done": True})


def _release(client: Client, controller: Controller, said: dict[str, Any]) -> None:
    """Hold what is queued, or let go what is held."""
    before, after = (state.QUEUED, state.HELD) if said["hold"] else (state.HELD, state.QUEUED)
    for number in said["ids"]:
        job = _job_of(client, controller, number)
        if job.state == before:
            controller.state.change(job, state=after)
    controller.requeue()
    client.answer({"done": True})


def _nodes(client: Client, controller: Controller, said: dict[str, Any]) -> None:
    client.answer({"nodes": [remote.shown() for remote in controller.remotes.values()]})


def _hosts(client: Client, controller: Controller, said: dict[str, Any]) -> None:
    """Add, change or remove one."""
    if said["what"] == "remove":
        if not controller.state.remove_host(said["name"]):
            raise CafsError(f"no host {quote(said['name'])}")
    else:
        labels = [str(label) for label in said.get("labels", [])]
        controller.state.put_host(said["name"], said.get("address", links.LOCAL), said.get("state", "ready"), labels)
    controller.look_at_hosts()
    client.answer({"done": True})


def _read(client: Client, controller: Controller, said: dict[str, Any]) -> None:
    """A piece of what a job has written: from here if it is all here, else from where it runs."""
    number, stream, offset = int(said["id"]), str(said["stream"]), int(said["offset"])
    job, tag = _job_of(client, controller, number), client.tag
    if stream not in outputs.streams_of(job):
        raise UsageError(f"no stream {quote(stream)}")
    is_over = job.state in state.ENDED

    def reply(data: bytes, following: int, *, is_end: bool) -> None:
        text = base64.b64encode(data).decode()
        client.answer({"data": text, "next": following, "end": is_end, "job": job.shown()}, tag)

    kept = controller.state.output(number)
    path = controller.outputs.path(number, stream)
    if kept is not None:
        data = kept[stream == "err"][offset : offset + _PIECE]
        return reply(data, offset + len(data), is_end=not data)
    if os.path.exists(path):
        data, following = controller.outputs.read(number, stream, offset, _PIECE)
        return reply(data, following, is_end=not data)
    remote = controller.remotes.get(job.worker)
    if remote is None or remote.link is None or job.state not in (state.STARTING, state.RUNNING):
        return reply(b"", offset, is_end=is_over and remote is None)  # if it is over, all of it is on its way
    ask, lost = controller.outputs.ask, lambda: reply(b"", offset, is_end=False)
    ask(remote, number, job.attempt, stream, offset, lambda data, following: reply(data, following, is_end=False), lost)


def _cloud(client: Client, controller: Controller, said: dict[str, Any]) -> None:
    """What machines were launched; or launch some again after too many have failed; or end one."""
    fleet = controller.fleet
    if fleet is None:
        raise UsageError("pool.toml names no cloud", hint="[cloud]")
    if said["what"] == "resume":
        fleet.resume()
    elif said["what"] == "end":
        fleet.end(str(said["name"]))
    client.answer(fleet.shown())


def _secret(client: Client, controller: Controller, said: dict[str, Any]) -> None:
    """Keep one, forget one, or say which there are; never what one is."""
    directory, tenant = controller.directory, client.tenant
    try:
        if said["what"] == "put":
            if said["name"] not in secrets.names(directory, tenant) and len(secrets.names(directory, tenant)) >= _SECRETS_MAX:
                raise BusyError(f"there are {_SECRETS_MAX} secrets already", hint="cpool secret rm NAME")
            secrets.put(directory, tenant, str(said["name"]), base64.b64decode(said["value"]))
        elif said["what"] == "remove":
            secrets.remove(directory, tenant, str(said["name"]))
        client.answer({"names": secrets.names(directory, tenant)})
    except OSError as error:
        raise os_error("cannot keep the secret", error) from error


def _metrics(client: Client, controller: Controller, said: dict[str, Any]) -> None:
    client.answer({"text": metrics.text(controller)})


def _end(client: Client, controller: Controller, said: dict[str, Any]) -> None:
    """Stop the controller; with 'jobs', them too."""
    if said["jobs"]:
        for job in list(controller.jobs.values()):
            controller.cancel(job, float(said["grace_s"]))
    client.answer({"done": True})
    controller.leave(when_idle=bool(said["jobs"]), when_alone=not said["jobs"])


def _about(client: Client, controller: Controller, said: dict[str, Any]) -> None:
    """What somebody has to know who submits jobs."""
    client.answer({"store": controller.store, "tenant": client.tenant})


_FOR_ALL = ("submit", "wait", "jobs", "job", "cancel", "release", "nodes", "read", "about", "secret")
"""What tenants may ask for, of their own jobs."""

_HANDLERS = {
    "submit": _submit, "wait": _wait, "jobs": _jobs, "job": _job, "cancel": _cancel, "release": _release, "nodes": _nodes,
    "hosts": _hosts, "read": _read, "end": _end, "cloud": _cloud, "metrics": _metrics, "about": _about, "secret": _secret,
}  # fmt: skip
