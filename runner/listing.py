"""What is shown of containers: ps, inspect, port, top, stats."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time

from cafs.errors import CafsError, NotFound, UnsupportedError, UsageError, quote
from runner import cgroups, containers, etc, filters, logs, pidspace, programs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from cafs.options import Options
    from runner.containers import Container

_DIGEST_MIN = 8
_STATES = ("created", "running", "paused", "restarting", "exited", "removing", "dead")
_HEALTH = ("starting", "healthy", "unhealthy", "none")
_FILTERS: dict[str, tuple[str, ...]] = {
    "name": (), "id": (), "label": (), "status": _STATES, "health": _HEALTH, "ancestor": (), "exited": (), "before": (),
    "since": (), "volume": (), "network": (),
}  # fmt: skip
_UNITS = ((86400 * 7, "week"), (86400, "day"), (3600, "hour"), (60, "minute"), (1, "second"))


def ago(ns: int) -> str:
    """3 minutes, of the time since then."""
    seconds = max(int(time.time() - ns / 1e9), 0)
    size, unit = next((pair for pair in _UNITS if seconds >= pair[0]), _UNITS[-1])
    return f"{seconds // size} {unit}{'' if seconds // size == 1 else 's'}"


def summary(container: Container) -> dict[str, Any]:
    """A row of ps."""
    state, status = container.state(), container.status()
    code = state.get("exit_code")
    words = {
        "running": f"Up {ago(state.get('started_ns', 0))}",
        "paused": f"Up {ago(state.get('started_ns', 0))} (Paused)",
        "created": "Created",
        "restarting": f"Restarting ({code}) {ago(state.get('finished_ns', 0))} ago",
        "exited": f"Exited ({'unknown' if code is None else code}) {ago(state.get('finished_ns', time.time_ns()))} ago",
    }
    text = words[status]
    if status == "running" and state.get("health"):
        text += f" ({state['health'] if state['health'] != 'starting' else 'health: starting'})"
    return {
        "Id": container.id,
        "Names": container.name,
        "Image": container.asked["image"],
        "Command": shlex.join(container.asked["arguments"]),
        "CreatedAt": logs.stamp(container.asked["created_ns"]),
        "State": status,
        "Status": text,
        "Ports": ", ".join(_short_ports(container)) if status in ("running", "paused") else "",
        "Labels": container.asked["labels"],
        "ExitCode": code,
        "Pid": state.get("pid", 0) if status in ("running", "paused") else 0,
    }


def ps(options: Options) -> None:
    """Print the table."""
    wanted, last, is_json = filters.parse(options.all("filter"), _FILTERS), options.value("last"), wants_json(options)
    if last is not None and not last.isdigit():
        raise UsageError(f"--last is a number, not {quote(last)}")
    pairs = [(one, summary(one)) for one in containers.every()]
    rows = [row for one, row in pairs if filters.fits(wanted, _tests(one, row))]
    wants_all = options.has("all") or "status" in wanted
    if last is not None:
        rows = rows[: int(last)]
    elif not wants_all:
        rows = [row for row in rows if row["State"] in ("running", "paused", "restarting")]
    is_whole = options.has("no-trunc")
    if options.has("quiet"):  # whatever --format says, as scripts pipe it to rm
        sys.stdout.write("".join(f"{row['Id'] if is_whole else row['Id'][:12]}\n" for row in rows))
        return
    if is_json:
        _write_json_lines(rows)
        return
    table = [("CONTAINER ID", "IMAGE", "COMMAND", "CREATED", "STATUS", "PORTS", "NAMES")]
    for row in rows:
        command = row["Command"] if is_whole or len(row["Command"]) <= 20 else row["Command"][:19] + "…"
        identity = row["Id"] if is_whole else row["Id"][:12]
        created = ago(int(logs.parse_stamp(row["CreatedAt"]))) + " ago"
        table.append((identity, row["Image"], f'"{command}"', created, row["Status"], row["Ports"], row["Names"]))
    print_table(table)


def print_table(rows: Sequence[tuple[str, ...]]) -> None:
    """Columns, three spaces apart; control characters of names are not let through to a terminal."""
    clean = [[quote(cell)[1:-1] for cell in row] for row in rows]
    widths = [max(len(row[at]) for row in clean) for at in range(len(clean[0]))]
    for row in clean:
        line = "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        sys.stdout.write(line.rstrip() + "\n")


def wants_json(options: Options) -> bool:
    """Whether --format is json.  Raises UsageError for a template."""
    text = options.value("format") or "table"
    if text not in ("json", "table"):
        raise UsageError(f"--format {quote(text)}: there are no templates", hint="--format json, and jq(1)")
    return text == "json"


def _tests(container: Container, row: dict[str, Any]) -> dict[str, Callable[[str], bool]]:
    asked = container.asked
    volumes = {text for one in asked["mounts"] for text in (one.get("name"), one.get("source"), one["target"])}

    def made_ns(text: str) -> int:
        return int(containers.find(text).asked["created_ns"])

    return {
        "name": lambda text: filters.is_like(text, container.name, f"/{container.name}"),
        "id": lambda text: filters.is_like(text, container.id),
        "label": lambda text: filters.has_label(asked["labels"], text),
        "status": lambda text: row["State"] == text,
        "health": lambda text: (container.state().get("health") or ("starting" if asked["health"] else "none")) == text,
        "ancestor": lambda text: (
            text in (asked["image"], asked["image"].removesuffix(":latest"))
            or (len(text) >= _DIGEST_MIN and asked["digest"].startswith(text))
        ),
        "exited": lambda text: row["State"] == "exited" and str(row["ExitCode"]) == text,
        "before": lambda text: int(asked["created_ns"]) < made_ns(text),
        "since": lambda text: int(asked["created_ns"]) > made_ns(text),
        "volume": lambda text: text in volumes,
        "network": lambda text: text == container.network,
    }


def _write_json_lines(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        sys.stdout.write(json.dumps(row, sort_keys=True) + "\n")


def inspect(options: Options) -> None:
    """Docker's keys, where there is the same thing."""
    is_json = wants_json(options)
    rows = [document(containers.find(word)) for word in options.words]
    if is_json:
        _write_json_lines(rows)
    else:
        sys.stdout.write(json.dumps(rows[0] if len(rows) == 1 else rows, indent=4, sort_keys=True) + "\n")


def document(container: Container) -> dict[str, Any]:
    """One container for inspect."""
    state, status, asked = container.state(), container.status(), container.asked

    def when(key: str) -> str:
        return logs.stamp(state[key]) if state.get(key) else "0001-01-01T00:00:00Z"

    found: dict[str, Any] = {
        "Id": container.id,
        "Name": container.name,
        "Created": logs.stamp(asked["created_ns"]),
        "Image": asked["digest"],
        "Path": asked["arguments"][0],
        "Args": asked["arguments"][1:],
        "LogPath": container.path("log"),
        "RestartCount": state.get("restarts", 0),
        "State": {
            "Status": status,
            "Running": status in ("running", "paused"),
            "Paused": status == "paused",
            "Restarting": status == "restarting",
            "OOMKilled": bool(state.get("oom_killed")),
            "Pid": state.get("pid", 0) if status in ("running", "paused") else 0,
            "ExitCode": state.get("exit_code") if status == "exited" else 0,
            "Error": state.get("error", ""),
            "StartedAt": when("started_ns"),
            "FinishedAt": when("finished_ns"),
        },
        "Config": {
            "Image": asked["image"],
            "Hostname": _hostname(container),
            "User": asked["user"],
            "Env": [f"{name}={value}" for name, value in asked["env"].items()],
            "Cmd": asked["arguments"],
            "WorkingDir": asked["cwd"],
            "Labels": asked["labels"],
            "StopSignal": asked["stop_signal"],
            "StopTimeout": asked["stop_timeout_s"],
            "Tty": container.has("tty"),
            "OpenStdin": container.has("interactive"),
            "Healthcheck": asked["health"],
        },
        "HostConfig": {
            "NetworkMode": container.network,
            "RestartPolicy": {"Name": asked["restart"]["policy"], "MaximumRetryCount": asked["restart"]["most"]},
            "AutoRemove": container.has("rm"),
            "Privileged": container.has("privileged"),
            "ReadonlyRootfs": container.has("read-only"),
            "Memory": cgroups.size(container.value("memory") or "0"),
        },
        "NetworkSettings": _network_settings(container, state, status),
        "Mounts": asked["mounts"],
        "Usage": state.get("usage") or {},
    }
    if asked["health"]:
        found["State"]["Health"] = {
            "Status": state.get("health") or "starting",
            "FailingStreak": state.get("health_streak", 0),
            "Log": state.get("health_log", []),
        }
    return found


def _hostname(container: Container) -> str:
    try:
        return etc.hostname_of(container)
    except NotFound:  # whose network it shared
        return container.id[:12]


def _network_settings(container: Container, state: dict[str, Any], status: str) -> dict[str, Any]:
    about = (state.get("network") or {}) if status in ("running", "paused") else {}
    found: dict[str, list[dict[str, str]]] = {}
    for kind, at, number, _, inner in about.get("ports", []):
        found.setdefault(f"{inner}/{kind}", []).append({"HostIp": at or "0.0.0.0", "HostPort": str(number)})
    name, address = container.network, about.get("address", "")
    return {"IPAddress": address, "Ports": found, "Networks": {name: {"IPAddress": address}} if about else {}}


def _published(container: Container) -> list[str]:
    """80/tcp -> 0.0.0.0:8080, as docker writes it."""
    about = container.state().get("network") or {}
    return [f"{inner}/{kind} -> {at or '0.0.0.0'}:{number}" for kind, at, number, _, inner in about.get("ports", [])]


def _short_ports(container: Container) -> list[str]:
    return ["->".join(reversed(line.split(" -> "))) for line in _published(container)]


def ports(container: Container, wanted: list[str]) -> int:
    """All published ports, or where one is; 1 if that is not."""
    code = 0 if not wanted else 1
    for line in _published(container) if container.is_running() else []:
        inner, _, outer = line.partition(" -> ")
        if not wanted:
            sys.stdout.write(line + "\n")
        elif inner in (wanted[0], f"{wanted[0]}/tcp"):
            sys.stdout.write(outer + "\n")
            code = 0
    if code:
        sys.stderr.write(f"crun: no port {quote(wanted[0])} of container {quote(container.name)} is published\n")
    return code


def top(container: Container, arguments: list[str]) -> None:
    """Pid of the host, user, when it began, its command; or what ps(1) of the host says of them.  Raises CafsError."""
    os.close(container.process())
    pids = cgroups.processes(cgroups.path_for(container, container.id)) or pidspace.members(container)
    if arguments:
        sys.stdout.write(_ps_of(pids, arguments))
        return
    rows = [("PID", "PPID", "UID", "STARTED", "COMMAND")]
    for pid in pids:
        try:
            words = containers.read_proc(pid, "cmdline").rstrip(b"\0").split(b"\0")
            fields = containers.read_proc(pid, "stat").rpartition(b")")[2].split()
            uid = os.stat(f"/proc/{pid}").st_uid
        except OSError:
            continue
        began_s = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + int(fields[19]) / os.sysconf("SC_CLK_TCK")
        text = b" ".join(words).decode("utf-8", "surrogateescape")
        rows.append((str(pid), fields[1].decode(), str(uid), time.strftime("%H:%M", time.localtime(began_s)), text))
    print_table(rows)


def _ps_of(pids: list[int], arguments: list[str]) -> str:
    """The lines of ps(1) about some processes."""
    program = programs.find("ps")
    if program is None:
        raise UnsupportedError("no ps", hint="apt install procps")
    code, text = programs.call([program, *arguments])
    head, *lines = text.splitlines() or [""]
    names = head.split()
    if code or "PID" not in names:
        raise CafsError(f"ps {' '.join(map(quote, arguments))}: " + (head if code else "it shows no PID"))
    at, wanted = names.index("PID"), set(map(str, pids))
    return "".join(
        f"{line}\n" for line in [head, *(line for line in lines if line.split()[at : at + 1] and line.split()[at] in wanted)]
    )


def stats(names: list[str], options: Options) -> None:
    """Processor, memory and processes; again every second on a terminal."""
    is_json = wants_json(options)
    while True:
        found = [containers.find(name) for name in names]
        if not names:
            found = [one for one in containers.every() if options.has("all") or one.is_running()]
        groups = {one.id: cgroups.path_for(one, one.id) for one in found}
        before, began = {key: cgroups.usage(group).get("cpu_ns", 0) for key, group in groups.items()}, time.monotonic_ns()
        time.sleep(0.5)
        rows: list[dict[str, Any]] = []
        for one in found:
            usage = cgroups.usage(groups[one.id])
            share = 100 * max(usage.get("cpu_ns", 0) - before[one.id], 0) / (time.monotonic_ns() - began)
            rows.append({"Id": one.id, "Name": one.name, "CPUPerc": round(share, 2), **usage})
        if is_json:
            _write_json_lines(rows)
        else:
            table = [("CONTAINER ID", "NAME", "CPU %", "MEM USAGE / LIMIT", "PIDS")]
            for row in rows:
                limit = row.get("memory_limit", 0)
                text = f"{_amount(row.get('memory', 0))} / {_amount(limit) if 0 < limit < 1 << 60 else '-'}"
                table.append((row["Id"][:12], row["Name"], f"{row['CPUPerc']:.2f}%", text, str(row.get("pids", "-"))))
            print_table(table)
        if options.has("no-stream") or not sys.stdout.isatty():
            return
        sys.stdout.write("\n")
        sys.stdout.flush()


def _amount(size: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g}{unit}"
        size //= 1024
    return f"{size}GiB"
