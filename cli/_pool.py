"""What the verbs of cpool share: jobs from options, asking the controller or doing without, tables."""

from __future__ import annotations

import json
import os
import re
import sys

import click

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from pool.client import Client, Stored
    from pool.state import State

_ARRAY_MAX = 1_000_000
_AT_ONCE = 200
_WAIT_S = 3.0
"""For a controller that is perhaps being started: cpool serve & cpool wait 1."""


def directory() -> str:
    """Of the pool."""
    from cafs import paths

    return paths.pool()


def client(*, wait_s: float = _WAIT_S) -> Client:
    """A connection to the controller, for which a command waits that cannot do without.  Raises NoController."""
    from pool.client import Client

    return Client(directory(), wait_s=wait_s)


def ask(do: str, **fields: Any) -> dict[str, Any]:
    """Of the controller; if none runs, of its state, for what can be done without.  Raises CafsError."""
    from pool.client import NoController

    can_do_without = do in ("jobs", "job", "nodes")
    try:
        with client(wait_s=0 if can_do_without else _WAIT_S) as connection:
            return connection.ask(do, **fields)
    except NoController:
        if not can_do_without:
            raise
    from pool.state import State

    state = State(directory())
    if do == "nodes":
        return {"nodes": _known_nodes(state)}
    if do == "job":
        return {"job": state.job(fields["id"]).shown()}
    return {"jobs": [one.shown() for one in state.jobs(fields["limit"], all_of_them=fields["all"])]}


def _known_nodes(state: State) -> list[dict[str, Any]]:
    """Workers as they are known where no controller runs: not what is free there now."""
    rows = state.hosts() + [row for row in state.machines() if row["address"]]
    rows = rows or [{"name": "local", "address": ""}]
    here = [job.worker for job in state.open_jobs()]
    return [
        {
            "name": row["name"],
            "address": row["address"] or "local",
            "state": "unknown",
            "jobs": here.count(row["name"]),
            "labels": row.get("labels", []),
            "reason": "no controller runs",
        }
        for row in rows
    ]


def ended(numbers: Sequence[int]) -> list[dict[str, Any]]:
    """Jobs, if no controller runs and all of them have ended; else none.  Raises CafsError."""
    from pool.client import NoController
    from pool.state import ENDED, State

    try:
        client(wait_s=0).__exit__()
        return []
    except NoController:
        jobs = [State(directory()).job(number) for number in numbers]
        return [job.shown() for job in jobs] if all(job.state in ENDED for job in jobs) else []


def submit(jobs: list[dict[str, Any]], files: dict[str, str] | None = None) -> list[int]:
    """Their numbers.  Without a controller they are queued all the same.  files: as of inputs.keep.  Raises CafsError."""
    from pool import inputs, specs, state
    from pool.client import by_either

    def asked(connection: Client) -> list[int]:
        pieces = [jobs[at : at + _AT_ONCE] for at in range(0, len(jobs), _AT_ONCE)]
        return [number for piece in pieces for number in connection.ask("submit", jobs=piece, files=files)["ids"]]

    def alone(found: State) -> list[int]:
        inputs.keep(directory(), files or {})
        how = {True: state.HELD, False: state.QUEUED}
        checked = [specs.check_one(found, one) for one in jobs]
        ids = [
            found.submit(spec, one["key"], one["priority"], how[one["hold"]]) for one, spec in zip(jobs, checked, strict=True)
        ]
        found.commit()
        sys.stderr.write("cpool: queued; no controller runs for this pool\ncpool: hint: cpool serve &\n")
        return ids

    return by_either(directory(), asked, alone)


def change_host(**fields: Any) -> None:
    """By the controller, or in the state if none runs.  Raises CafsError."""
    from cafs.errors import NotFound
    from pool.client import by_either

    def alone(found: State) -> None:
        if fields["what"] == "state":
            if not found.set_worker_state(fields["name"], fields["state"]):
                raise NotFound(f"no worker {fields['name']!r}", hint="cpool nodes")
        elif fields["what"] != "remove":
            found.put_host(fields["name"], fields["address"], fields["state"], fields["labels"])
        elif not found.remove_host(fields["name"]):
            raise NotFound(f"no host {fields['name']!r}", hint="cpool host ls")
        found.commit()

    by_either(directory(), lambda connection: connection.ask("hosts", **fields), alone)


def hosts() -> list[dict[str, Any]]:
    """Those that were added."""
    from pool.state import State

    return State(directory()).hosts()


def pool_id() -> str:
    """Of the pool here."""
    from pool.state import State

    return State(directory()).meta("pool")


def secret(what: str, name: str = "", value: bytes = b"") -> list[str]:
    """The names of all, after one was kept ('put') or forgotten ('remove').  Raises CafsError."""
    import base64

    from pool import secrets
    from pool.client import NoController

    try:
        with client(wait_s=0) as connection:
            fields = {"name": name, "value": base64.b64encode(value).decode()}
            found: list[str] = connection.ask("secret", what=what, **fields)["names"]
            return found
    except NoController:
        pass
    if what == "put":
        secrets.put(directory(), "", name, value)
    elif what == "remove":
        secrets.remove(directory(), "", name)
    return secrets.names(directory(), "")


def machines(*, all_of_them: bool, as_json: bool, is_quiet: bool) -> None:
    """Print those that were launched, and to stderr what is amiss."""
    from pool.client import NoController
    from pool.state import State

    try:
        with client(wait_s=0) as connection:
            said = connection.ask("cloud", what="ls")
    except NoController:
        said = {"machines": State(directory()).machines(), "problem": "", "is_stopped": False}
    rows = State(directory()).machines(all_of_them=True) if all_of_them else said["machines"]
    columns = {
        "name": "NAME",
        "kind": "KIND",
        "zone": "ZONE",
        "state": "STATE",
        "instance": "INSTANCE",
        "price": "PRICE",
        "reason": "",
    }
    table(rows, columns, as_json=as_json, only="name" if is_quiet else "")
    if said["is_stopped"]:
        sys.stderr.write(
            "cpool: ten machines in a row did not come up, so no more are launched\ncpool: hint: cpool cloud resume\n"
        )
    elif said["problem"]:
        sys.stderr.write(f"cpool: {said['problem']}\n")
    if not (as_json or is_quiet) and "price" in said:
        click.echo(f"{said['price']:.4f} an hour, {said['spent_today']:.2f} today")


def show_events(*, is_followed: bool) -> None:
    """Print the file of events, and what is added to it."""
    from cafs import atomic, stopping

    path = os.path.join(directory(), "events")
    for old in (path + ".1", path):
        try:
            with open(old, "rb") as file:
                while data := file.read(1 << 16):
                    atomic.write_all(1, data)
                at, inode = file.tell(), os.fstat(file.fileno()).st_ino
        except FileNotFoundError:
            at, inode = 0, 0
    while is_followed:
        try:
            with open(path, "rb") as file:
                at = at if os.fstat(file.fileno()).st_ino == inode else 0
                inode = os.fstat(file.fileno()).st_ino
                file.seek(at)
                atomic.write_all(1, file.read())
                at = file.tell()
        except FileNotFoundError:
            pass  # nothing has happened yet
        stopping.wait(seconds=0.2)


def set_host_state(name: str, state: str) -> None:
    """Raises NotFound."""
    change_host(what="state", name=name, state=state)


def set_up_host(name: str, *, is_quiet: bool) -> None:
    """Bring what runs images to a host.  Raises NotFound, CafsError."""
    from cafs.errors import NotFound, os_error
    from pool import settings, toolkit
    from pool.address import Pool

    row = next((one for one in hosts() if one["name"] == name), None)
    if row is None:
        raise NotFound(f"no host {name!r}", hint="cpool host ls")
    for_s3 = settings.read(directory()).store.startswith("s3://")
    try:
        version = toolkit.setup(Pool(directory(), pool_id()), name, row["address"], for_s3=for_s3)
    except OSError as error:
        raise os_error(f"cannot reach {name!r}", error) from error
    if not is_quiet:
        sys.stderr.write(f"cpool: {name} has toolkit {version}\n")


def add_host(name: str, address: str | None, identity: str | None, labels: tuple[str, ...], *, is_sure: bool) -> None:
    """Its host key is shown, and pinned if the user agrees.  Raises CafsError."""
    from cafs.errors import CafsError, UsageError

    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", name):
        raise UsageError(f"{name!r} is not a name for a host")
    if address is None:
        if name != "local":
            raise UsageError(f"where is {name!r}?", hint=f"cpool host add {name} [USER@]HOST[:PORT]")
        return change_host(what="put", name=name, address="", state="ready", labels=labels)
    from pool import ssh

    whole = address + (f"?{os.path.abspath(identity)}" if identity else "")
    key, fingerprint = ssh.host_key(whole)
    sys.stderr.write(f"cpool: the host key of {address} is {key.partition(' ')[0]} {fingerprint}\n")
    if not is_sure and not (sys.stdin.isatty() and click.confirm("Is that so?", err=True)):
        raise CafsError("the host key was not accepted", hint="--yes, if it is the right one")
    ssh.pin(directory(), name, key)
    change_host(what="put", name=name, address=whole, state="ready", labels=labels)


def spec(*, command: tuple[str, ...], image: str | None, is_plain: bool, env: tuple[str, ...], **given: Any) -> dict[str, Any]:
    """A job from options."""
    if (image is None) == (not is_plain):
        raise click.UsageError("one of --image IMAGE and --no-container is needed")
    variables = {}
    for text in env:
        name, equals, value = text.partition("=")
        if not name:
            raise click.UsageError(f"-e {text!r} is not K=V")
        if equals or name in os.environ:
            variables[name] = value if equals else os.environ[name]
    return {
        "command": list(command[1:] if command[0] == "--" else command),
        "image": _digest(image) if image is not None else "",
        "env": variables,
        "cwd": given["workdir"] or ("" if image or given.get("has_files") else os.getcwd()),
        "cpus": given["cpus"],
        "memory": given["memory"],
        "gpus": given["gpus"],
        "timeout_s": given["timeout"],
        "retries": given["retries"],
        "requeue": not given["no_requeue"],
        "name": given.get("name", ""),
        "queue_s": given["queue_timeout"],
        "constraint": sorted(given["labels"]),
        "exclude": sorted(given["exclude"]),
        "after": sorted(given.get("after", ())),
        "disk": given["disk"],
        "strict": given["strict"],
        "start_s": given["start_timeout"],
        **({"secrets": sorted(set(given["secrets"]))} if given["secrets"] else {}),
        **({"is_here": True} if is_plain and not given["workdir"] and not given.get("has_files") else {}),
        **({"tenant": given["tenant"]} if given["tenant"] is not None else {}),
    }


def in_its_place(path: str) -> str:
    """The name that FILE has below the directory of a job too, '' if there can be none."""
    from pool import staging

    return os.path.normpath(path) if staging.is_name(os.path.normpath(path)) else ""


def files(given: Iterable[tuple[str, str]], back: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """(what a job says of its files, as of inputs.keep).  Raises CafsError, click.UsageError.

    given: (FILE, NAME), '' for that of the file, of each --in.  back: the name of each --out.
    """
    import base64
    import hashlib

    from cafs.errors import os_error
    from pool import staging

    entries, contents, size = [], {}, 0
    for path, name in given:
        try:
            with open(path, "rb") as file:
                data, mode = file.read(staging.SIZE_MAX + 1), os.fstat(file.fileno()).st_mode & 0o777
        except OSError as error:
            raise os_error(f"cannot read {path!r}", error) from error
        size += len(data)
        digest = hashlib.sha256(data).hexdigest()
        contents[digest] = base64.b64encode(data).decode()
        entries.append([name or os.path.basename(path), digest, mode])
    if size > staging.SIZE_MAX:
        raise click.UsageError(f"--in: more than {staging.SIZE_MAX >> 20} MiB; larger things belong into an image, or a store")
    names = list(back)
    for kind in (names, [str(one[0]) for one in entries]):
        if not all(map(staging.is_name, kind)):
            raise click.UsageError("a file of a job has a name below its directory")
        if len(set(kind)) < len(kind):
            raise click.UsageError(f"two files of a job are called {max(kind, key=kind.count)!r}")
    found: dict[str, Any] = {}
    if entries:
        found["in"] = entries
    if names:
        found["out"] = names
    return found, contents


def run_beside(number: int, words: tuple[str, ...], flags: str) -> int:
    """A command beside a job; its exit code.  Raises CafsError."""
    from cafs.errors import NotFound
    from pool import beside

    job = ask("job", id=number)["job"]
    address = next((one["address"] for one in ask("nodes")["nodes"] if one["name"] == job["worker"]), None)
    if address is None:
        raise NotFound(f"job {number} is on no worker")
    where = "" if address == "local" else address
    command = list(words[1:] if words[0] == "--" else words)
    return beside.run(directory(), pool_id(), where, job, command, flags)


def fetch(number: int, place: str) -> int:
    """Wait for a job, and write the files that it was to leave below a directory; how many there are not.  Raises CafsError."""
    from pool.client import Client, reading

    with reading(directory(), number) as connection:
        if isinstance(connection, Client):
            connection.wait_for([number])
            connection.event()
        return bring(connection, connection.ask("job", id=number)["job"], place)


def bring(connection: Client | Stored, job: dict[str, Any], place: str = ".") -> int:
    """Write the files of an ended job; how many there are not, which is said.  Raises CafsError."""
    from cafs import atomic
    from cafs.errors import IncompleteError, os_error
    from pool.client import output

    absent, umask, number = 0, os.umask(0), job["id"]
    os.umask(umask)
    sizes, modes = (job["usage"].get(name, []) for name in ("files", "modes"))
    for at, name in enumerate(job["spec"].get("out", ())):
        if at >= len(sizes) or sizes[at] < 0:
            sys.stderr.write(f"cpool: job {number} has left no {name!r}\n")
            absent += 1
            continue
        try:
            path = os.path.abspath(os.path.join(place, name))
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with atomic.replacing(path, (modes[at] if at < len(modes) else 0o644) & ~umask) as file:
                file.writelines(output(connection, number, f"file{at}"))
                missing = sizes[at] - file.tell()
                if missing:
                    raise IncompleteError(f"job {number}: {missing} bytes of {name!r} are not there any more")
        except OSError as error:
            raise os_error(f"cannot write {name!r}", error) from error
    return absent


def lacks(job: dict[str, Any]) -> bool:
    """Whether some of what a job has written is not there; then that is said."""
    from pool.client import incomplete

    for one in incomplete(job):
        sys.stderr.write(f"cpool: {one}\n")
    return bool(incomplete(job))


def _digest(name: str) -> str:
    """What a ref means now.  Raises CafsError."""
    from cafs import image, paths
    from cafs.store import Store
    from pool import settings
    from pool.client import NoController

    try:
        with client(wait_s=0) as connection:
            store = connection.ask("about")["store"]
    except NoController:
        store = settings.read(directory()).store
    return image.resolve(Store(store or paths.store()), name).digest.hex()


def numbers(text: str | None) -> range:
    """Of --array N-M[%L]; one, 0, without."""
    if text is None:
        return range(1)
    match = re.fullmatch("([0-9]{1,7})-([0-9]{1,7})(?:%[1-9][0-9]{0,6})?", text)
    if not match or int(match[2]) < int(match[1]) or int(match[2]) - int(match[1]) >= _ARRAY_MAX:
        raise click.UsageError(f"--array {text!r} is not N-M")
    return range(int(match[1]), int(match[2]) + 1)


def at_once(text: str) -> int:
    """L of it, 0 without."""
    return int(text.partition("%")[2] or 0)


def exit_code(job: dict[str, Any]) -> int:
    """Of who waits for it."""
    if job["state"] == "cancelled":
        return 143
    return 1 if job["code"] is None or job["code"] < 0 else int(job["code"])


def report(days: float, page: str | None, *, as_json: bool) -> None:
    """Print it, or write a page.  Raises CafsError."""
    from pool import report, settings
    from pool.state import State

    state, given = State(directory()), settings.read(directory())
    found = report.make(state, given, days)
    found["functions"] = with_measured(report.functions(state, given, found["since_s"]))
    if page:
        write(page, report.as_html(found))
    elif as_json:
        click.echo(json.dumps(found))
    else:
        print_fields(
            {name: value for name, value in found.items() if name not in ("pieces", "functions", "at_s")}, as_json=False
        )


def with_measured(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of functions, with what the router has measured, if there is one."""
    from cafs.errors import CafsError
    from pool import calling

    try:
        measured = {(one["tenant"], one["name"]): one for one in calling.stats(directory())} if rows else {}
    except CafsError:
        measured = {}
    return [{**measured.get((row["tenant"], row["name"]), {}), **row} for row in rows]


def print_fields(found: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(found))
        return
    for name, value in found.items():
        click.echo(f"{name:<16} {round(value, 4) if isinstance(value, float) else value}")


def write(path: str, text: str) -> None:
    from cafs import atomic
    from cafs.errors import os_error

    try:
        atomic.replace_file(os.path.abspath(path), text.encode(), 0o644)
    except OSError as error:
        raise os_error(f"cannot write {path!r}", error) from error


def table(rows: list[dict[str, Any]], columns: dict[str, str], *, as_json: bool, only: str) -> None:
    """Rows, one a line.  only: the one column that is printed."""
    if as_json:
        for row in rows:
            click.echo(json.dumps(row, sort_keys=True))
        return
    if only:
        for row in rows:
            click.echo(row[only])
        return
    cells = [list(columns.values())] + [[_cell(row, name) for name in columns] for row in rows]
    widths = [max(len(line[at]) for line in cells) for at in range(len(columns))]
    for line in cells:
        click.echo("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(row: dict[str, Any], name: str) -> str:
    value = row["spec"]["command"] if name == "command" else row.get(name)
    text = " ".join(value) if isinstance(value, list) else "" if value is None else str(value)
    return "".join(char if char.isprintable() else "?" for char in text)[:60]


def describe(job: dict[str, Any], *, as_json: bool) -> None:
    """A job, a line a field."""
    if as_json:
        click.echo(json.dumps(job, sort_keys=True))
        return
    spec = job.pop("spec")
    for name, value in {**job, **spec}.items():
        if value not in (None, "", {}, []):
            click.echo(f"{name:<12} {json.dumps(value) if isinstance(value, dict | list) else value}")
