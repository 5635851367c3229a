"""What is shown of containers: ps, inspect, top, stats, logs, events, diff."""

from __future__ import annotations

import json
import os
import shlex
import stat
import sys
import time

from cafs import atomic
from cafs.errors import UsageError, quote
from runner import alive, cgroups, containers, logs
from runner.create import duration

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    from runner.containers import Container
    from runner.options import Options

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
    rows = []
    for one in containers.every():
        row = summary(one)
        if _matches(options.all("filter"), one, row):
            rows.append(row)
    wants_all = options.has("all") or any(text.startswith("status=") for text in options.all("filter"))
    last = options.value("last")
    if last is not None:
        rows = rows[: int(last)] if last.isdigit() else rows
    elif not wants_all:
        rows = [row for row in rows if row["State"] in ("running", "paused", "restarting")]
    if options.value("format") == "json":
        _write_json_lines(rows)
        return
    is_whole = options.has("no-trunc")
    if options.has("quiet"):
        sys.stdout.write("".join(f"{row['Id'] if is_whole else row['Id'][:12]}\n" for row in rows))
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


def _matches(filters: list[str], container: Container, row: dict[str, Any]) -> bool:
    for text in filters:
        key, equals, value = text.partition("=")
        if not equals or key not in ("name", "id", "label", "status", "ancestor", "exited"):
            raise UsageError(f"unknown filter {quote(text)}", hint="name=, id=, label=, status=, ancestor=, exited=")
        name, has_value, wanted = value.partition("=")
        found = container.asked["labels"].get(name)
        is_so = {
            "name": value in container.name,
            "id": container.id.startswith(value),
            "label": found is not None and (not has_value or found == wanted),
            "status": row["State"] == value,
            "ancestor": value in (container.asked["image"], container.asked["digest"]),
            "exited": str(row["ExitCode"]) == value and row["State"] == "exited",
        }
        if not is_so[key]:
            return False
    return True


def _write_json_lines(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        sys.stdout.write(json.dumps(row, sort_keys=True) + "\n")


def inspect(found: list[Container], options: Options) -> None:
    """Docker's keys, where there is the same thing."""
    rows = [document(one) for one in found]
    if options.value("format") not in (None, "json"):
        raise UsageError("templates are not there", hint="crun inspect X | jq .State.ExitCode")
    if options.value("format") == "json":
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
            "Hostname": container.value("hostname") or container.id[:12],
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


def top(container: Container) -> None:
    """Pid of the host, user, when it began, its command."""
    cgroups.check_freezable(container)
    rows = [("PID", "PPID", "UID", "STARTED", "COMMAND")]
    for pid in cgroups.processes(cgroups.path_for(container, container.id)):
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


def stats(names: list[str], options: Options) -> None:
    """Processor, memory and processes; again every second on a terminal."""
    while True:
        found = [containers.find(name) for name in names] or [one for one in containers.every() if one.is_running()]
        groups = {one.id: cgroups.path_for(one, one.id) for one in found}
        before, began = {key: cgroups.usage(group).get("cpu_ns", 0) for key, group in groups.items()}, time.monotonic_ns()
        time.sleep(0.5)
        rows: list[dict[str, Any]] = []
        for one in found:
            usage = cgroups.usage(groups[one.id])
            share = 100 * max(usage.get("cpu_ns", 0) - before[one.id], 0) / (time.monotonic_ns() - began)
            rows.append({"Id": one.id, "Name": one.name, "CPUPerc": round(share, 2), **usage})
        if options.value("format") == "json":
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


def moment(text: str) -> int:
    """Nanoseconds since 1970 of 10m (ago), seconds since 1970, or RFC 3339.  Raises UsageError."""
    try:
        if text.replace(".", "", 1).isdigit():
            return int(float(text) * 1e9)
        if "T" in text or text.count("-") == 2:
            return logs.parse_stamp(text if "T" in text else f"{text}T00:00:00Z")
        return time.time_ns() - int(duration(text) * 1e9)
    except (ValueError, UsageError):
        raise UsageError(f"{quote(text)} is not a time", hint="10m, 2026-01-31T12:00:00Z, or seconds since 1970") from None


def show_logs(container: Container, options: Options) -> None:
    """Its output and errors, to ours."""
    if container.asked["log"]["driver"] == "none":
        raise UsageError(f"container {quote(container.name)} keeps no log", hint="it was made with --log-driver none")
    since = moment(options.value("since") or "0")
    until = moment(str(options.value("until"))) if options.value("until") else None
    tail = options.value("tail")
    if tail not in (None, "all") and not str(tail).isdigit():
        raise UsageError(f"--tail is a number of lines, not {quote(str(tail))}")
    printer = _Printer(with_time=options.has("timestamps"))
    path = container.path("log")
    if options.has("follow"):
        skip = _LastLines(path, tail)
        for when, stream, data in logs.follow(path, lambda: not alive.is_watched(container.id)):
            kept = skip.cut(data)
            if kept and when >= since and (until is None or when <= until):
                printer.write(when, stream, kept)
        return
    skip = _LastLines(path, tail)
    for when, stream, data in logs.read(path):
        kept = skip.cut(data)
        if kept and when >= since and (until is None or when <= until):
            printer.write(when, stream, kept)


class _LastLines:
    """Leaves out all but the last TAIL lines of what is in a log now."""

    def __init__(self, path: str, tail: str | None) -> None:
        self.left = 0
        if tail not in (None, "all"):
            total, is_whole = 0, True
            for _, _, data in logs.read(path):
                total, is_whole = total + data.count(b"\n"), data.endswith(b"\n")
            self.left = max(total + (not is_whole) - int(str(tail)), 0)

    def cut(self, data: bytes) -> bytes:
        """What is left of a record."""
        while self.left and data:
            _, newline, data = data.partition(b"\n")
            self.left -= bool(newline)
        return data


class _Printer:
    def __init__(self, *, with_time: bool) -> None:
        self._with_time = with_time
        self._is_new_line = {"stdout": True, "stderr": True}

    def write(self, when: int, stream: str, data: bytes) -> None:
        fd = 2 if stream == "stderr" else 1
        if self._with_time:
            mark = logs.stamp(when).encode() + b" "
            lines = data.splitlines(keepends=True)
            starts = [self._is_new_line.get(stream, True), *([True] * (len(lines) - 1))]
            self._is_new_line[stream] = data.endswith(b"\n")
            data = b"".join((mark if is_new else b"") + line for line, is_new in zip(lines, starts, strict=True))
        atomic.write_all(fd, data)


def events(options: Options) -> None:
    """JSON lines."""
    since = moment(options.value("since") or "0")
    until = moment(str(options.value("until"))) if options.value("until") else None
    wanted = dict(text.partition("=")[::2] for text in options.all("filter"))
    path, at, inode = containers.events_path(), 0, 0
    while True:
        try:
            with open(path, "rb") as file:
                at = at if os.fstat(file.fileno()).st_ino == inode else 0  # it was begun anew
                inode = os.fstat(file.fileno()).st_ino
                file.seek(at)
                for line in file:
                    at += len(line)
                    row = json.loads(line)
                    names = row["event"], row["id"], row["id"][:12], row["name"]
                    if (
                        all(value in names for value in wanted.values())
                        and row["time_ns"] >= since
                        and (until is None or row["time_ns"] <= until)
                    ):
                        sys.stdout.write(json.dumps(row | {"time": logs.stamp(row["time_ns"])}, sort_keys=True) + "\n")
        except (FileNotFoundError, ValueError):
            pass
        sys.stdout.flush()
        if not options.has("follow") or (until is not None and time.time_ns() > until):
            return
        time.sleep(0.1)


def diff(container: Container) -> None:
    """A: added, C: changed, D: removed; as docker prints it."""
    try:
        config = json.loads(atomic.read_file(container.path("config.json"), 1 << 24))
        targets = {one["destination"] for one in config["mounts"]}
    except (OSError, ValueError, KeyError):
        targets = set()
    shown: list[tuple[str, str]] = []
    made = targets | {os.path.dirname(target) for target in targets}  # by the runtime, to mount on
    for kind, path in sorted(_changes(container.path("upper")), key=lambda pair: pair[1], reverse=True):
        if path not in made or any(below.startswith(path + "/") for _, below in shown):
            shown.append((kind, path))
    for kind, path in reversed(shown):
        sys.stdout.write(f"{kind} {quote(path)[1:-1]}\n")  # a name must not look like another line


def _changes(upper: str) -> Iterator[tuple[str, str]]:
    """Of an upper directory of overlayfs: a character device 0:0 is a removal; what is from below says so (overlay.origin).

    By descriptors, however deep: the container may put links where directories were.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(upper, flags)
    levels = [("/", fd, iter(os.listdir(fd)))]
    try:
        while levels:
            top, fd, names = levels[-1]
            name = next(names, None)
            if name is None:
                os.close(levels.pop()[1])
                continue
            where = os.path.join(top, name)
            try:
                status = os.stat(name, dir_fd=fd, follow_symlinks=False)
                if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
                    yield "D", where
                    continue
                yield ("C" if _has_origin(f"/proc/self/fd/{fd}/{name}") else "A"), where
                if stat.S_ISDIR(status.st_mode):
                    inner = os.open(name, flags, dir_fd=fd)
                    levels.append((where, inner, iter(os.listdir(inner))))
            except OSError:
                continue  # it was changed just now
    finally:
        for _, fd, _ in levels:
            os.close(fd)


def _has_origin(path: str) -> bool:
    try:
        os.getxattr(path, "trusted.overlay.origin", follow_symlinks=False)
        return True
    except OSError:
        return False
