"""What commands ask of the controller, each a function, and who may ask it."""

from __future__ import annotations

import base64

from cafs.errors import BusyError, NotFound, UnsupportedError, UsageError, os_error, quote
from pool import inputs, instance, metrics, outputs, secrets, specs, staging, state
from pool.address import LOCAL
from pool.state import Job
from pool.tenants import OWNER, tenant_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pool.commands import Client
    from pool.controller import Controller

CANCEL_ASKED = "cancelled while it ran"
_PIECE = 1 << 18
_SECRETS_MAX = 1000


def _submit(client: Client, controller: Controller, said: dict[str, Any]) -> None:
    ids = []
    files = said.get("files") or {}
    if sum(map(len, files.values())) > 2 * staging.SIZE_MAX:
        raise UsageError(f"the files of a job are larger than {staging.SIZE_MAX} bytes")
    inputs.keep(controller.directory, files)
    jobs = [_of_tenant(client, controller, one) for one in said["jobs"]]
    checked = [specs.check_one(controller.state, one) for one in jobs]  # all or none
    _check_quota(controller, checked)
    for one, spec in zip(jobs, checked, strict=True):
        how = state.HELD if one.get("hold") else state.QUEUED
        number = controller.state.submit(spec, one.get("key"), int(one.get("priority", 0)), how)
        ids.append(number)
        if number not in controller.jobs and (job := controller.state.job(number)).state not in state.ENDED:
            controller.add(job)
        if spec.get("attended"):
            client.attended.add(number)
            controller.waiting.is_open = True
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


def _check_quota(controller: Controller, asked: list[dict[str, Any]]) -> None:
    """Of jobs that have not ended.  Raises BusyError."""
    for name in {spec.get("tenant", OWNER) for spec in asked} & set(controller.tenants.all):
        most = controller.tenants.all[name].jobs
        known = sum(tenant_of(job) == name for job in controller.jobs.values()) if most else 0
        if most and known + sum(spec.get("tenant") == name for spec in asked) > most:
            raise BusyError(f"quota: {name} has {known} of {most} jobs")


def _job_of(client: Client, controller: Controller, number: object) -> Job:
    """One that the client may see.  Raises NotFound."""
    job = controller.jobs.get(int(str(number))) or controller.state.job(int(str(number)))
    if not client.is_owner and tenant_of(job) != client.tenant:
        raise NotFound(f"no job {number}", hint="cpool jobs --all")
    return job


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
        free, need = list(controller.waiting.free().values()), need_of(job.spec)
        coming = controller.fleet.why_not(need) if controller.fleet else ""
        quota = controller.tenants.over(job, controller.waiting.usage())
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
    controller.waiting.has_changed()
    client.answer({"done": True})


def _nodes(client: Client, controller: Controller, said: dict[str, Any]) -> None:
    client.answer({"nodes": [remote.shown() for remote in controller.remotes.values()]})


def _hosts(client: Client, controller: Controller, said: dict[str, Any]) -> None:
    """Add, change or remove one."""
    if said["what"] == "remove":
        if not controller.state.remove_host(said["name"]):
            raise NotFound(f"no host {quote(said['name'])}", hint="cpool nodes")
    elif said["what"] == "state":
        if not controller.state.set_worker_state(said["name"], said["state"]):
            raise NotFound(f"no worker {quote(said['name'])}", hint="cpool nodes")
    else:
        labels = [str(label) for label in said.get("labels", [])]
        controller.state.put_host(said["name"], said.get("address", LOCAL), said.get("state", "ready"), labels)
    controller.look_at_hosts()
    client.answer({"done": True})


def _read(client: Client, controller: Controller, said: dict[str, Any]) -> None:
    """A piece of what a job has written: from here if it is all here, else from where it runs."""
    number, stream, offset = int(said["id"]), str(said["stream"]), int(said["offset"])
    job, tag = _job_of(client, controller, number), client.tag
    if stream not in outputs.streams_of(job) and not (stream == instance.RECORD and job.spec.get("fn", {}).get("record")):
        raise UsageError(f"no stream {quote(stream)}")
    is_over = job.state in state.ENDED

    def reply(data: bytes, following: int, *, is_end: bool) -> None:
        text = base64.b64encode(data).decode()
        client.answer({"data": text, "next": following, "end": is_end, "job": job.shown()}, tag)

    attempt = int(said.get("attempt", 0)) if said.get("attempt") != job.attempt else 0
    found = outputs.stored(controller.state, job, stream, offset, attempt)
    if attempt and found is None:
        raise NotFound(f"nothing is kept of attempt {attempt} of job {number}")
    if found is not None:
        return reply(*found, is_end=found[1] == offset)
    if is_over:
        controller.outputs.expect(job)
    remote = controller.remotes.get(job.worker)
    if remote is None or remote.link is None or job.state not in (state.STARTING, state.RUNNING):
        return reply(b"", offset, is_end=False)
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


def _function(client: Client, controller: Controller, said: dict[str, Any]) -> None:
    """Deploy one, remove it, and what else becomes of it."""
    known, what = controller.functions, said["what"]
    tenant = str(said.get("tenant", client.tenant))
    if not client.is_owner and (tenant != client.tenant or what == "tried"):
        raise UnsupportedError("only the pool's owner may do that")
    if what == "deploy":
        one = _of_tenant(client, controller, {"spec": {**said["spec"], **({"tenant": tenant} if tenant != OWNER else {})}})
        spec = specs.check_one(controller.state, one)
        if "fn" not in spec:
            raise UsageError("that is no function")
        controller.functions.soon()
        return client.answer({"version": known.deploy(tenant, spec, is_sure=bool(said.get("is_sure")))})
    if what == "tried":
        known.tried(tenant, said["name"], int(said["version"]), str(said["problem"]))
    elif what == "rm":
        known.remove(tenant, said["name"])
    elif what == "rollback":
        return client.answer({"version": known.roll_back(tenant, said["name"])})
    elif what == "ls":
        return client.answer({"functions": known.rows(None if client.is_owner and "tenant" not in said else tenant)})
    elif what == "show":
        return client.answer({"functions": known.of(tenant, said["name"])})
    client.answer({"done": True})


def _watch(client: Client, controller: Controller, said: dict[str, Any]) -> None:
    """The router's: all of functions and their instances, and from now on what changes."""
    client.answer(controller.functions.watch(client, [str(one) for one in said["hosts"]]))


def _end(client: Client, controller: Controller, said: dict[str, Any]) -> None:
    """Stop the controller; with 'jobs', them too."""
    if said["jobs"]:
        for job in list(controller.jobs.values()):
            controller.cancel(job, float(said["grace_s"]))
        controller.functions.end()
    client.answer({"done": True})
    controller.leave(when_idle=bool(said["jobs"]), when_alone=not said["jobs"])


def _about(client: Client, controller: Controller, said: dict[str, Any]) -> None:
    """What somebody has to know who submits jobs."""
    client.answer({"store": controller.store, "tenant": client.tenant})


FOR_ALL = ("submit", "wait", "jobs", "job", "cancel", "release", "nodes", "read", "about", "secret", "function")
"""What tenants may ask for, of their own jobs."""

HANDLERS = {
    "submit": _submit, "wait": _wait, "jobs": _jobs, "job": _job, "cancel": _cancel, "release": _release, "nodes": _nodes,
    "hosts": _hosts, "read": _read, "end": _end, "cloud": _cloud, "metrics": _metrics, "about": _about, "secret": _secret,
    "function": _function, "watch": _watch,
}  # fmt: skip
