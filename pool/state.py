"""What must survive: one SQLite file.  cpool-state(5).

One process writes, the holder of the lock; nothing is durable before `commit`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sqlite3
import time
from contextlib import contextmanager

from cafs import mountinfo
from cafs.errors import BusyError, CafsError, FormatError, NotFound, UnsupportedError, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any

VERSION = 3
QUEUED, HELD, STARTING, RUNNING, FINISHED, CANCELLED = "queued", "held", "starting", "running", "finished", "cancelled"
ENDED = (FINISHED, CANCELLED)
_NETWORKED = ("nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "ceph", "lustre", "glusterfs")
_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE hosts (
  name TEXT PRIMARY KEY, address TEXT NOT NULL, state TEXT NOT NULL, labels TEXT NOT NULL, added_s REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE jobs (
  id INTEGER PRIMARY KEY, key TEXT UNIQUE, spec TEXT NOT NULL, digest TEXT NOT NULL, state TEXT NOT NULL,
  priority INTEGER NOT NULL DEFAULT 0, attempt INTEGER NOT NULL DEFAULT 0, failures INTEGER NOT NULL DEFAULT 0,
  losses INTEGER NOT NULL DEFAULT 0, worker TEXT NOT NULL DEFAULT '', code INTEGER, reason TEXT NOT NULL DEFAULT '',
  submitted_s REAL NOT NULL, started_s REAL, finished_s REAL, usage TEXT NOT NULL DEFAULT '{}'
);
CREATE INDEX jobs_open ON jobs (state) WHERE state NOT IN ('finished', 'cancelled');
CREATE TABLE outputs (id INTEGER PRIMARY KEY, out BLOB NOT NULL, err BLOB NOT NULL);
"""
_MACHINES = """
CREATE TABLE IF NOT EXISTS machines (
  name TEXT PRIMARY KEY, kind TEXT NOT NULL, zone TEXT NOT NULL, price REAL NOT NULL, state TEXT NOT NULL,
  instance TEXT NOT NULL DEFAULT '', address TEXT NOT NULL DEFAULT '', reason TEXT NOT NULL DEFAULT '',
  intended_s REAL NOT NULL, launched_s REAL, seen_s REAL, ready_s REAL, idle_s REAL,
  ended_s REAL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS machines_open ON machines (state) WHERE state != 'ended';
"""
_FUNCTIONS = """
CREATE TABLE IF NOT EXISTS functions (
  tenant TEXT NOT NULL, name TEXT NOT NULL, version INTEGER NOT NULL, state TEXT NOT NULL, spec TEXT NOT NULL,
  reason TEXT NOT NULL DEFAULT '', made_s REAL NOT NULL, PRIMARY KEY (tenant, name, version)
) WITHOUT ROWID;
"""
_OF_INSTANCES = {"tenant": "tenant", "fn.name": "name", "cpus": "cpus"}
_CHANGES = {1: _MACHINES, 2: _FUNCTIONS}
"""From each version to the next."""


class LockedError(BusyError):
    """Somebody else is the one who writes."""


class WriteError(CafsError):
    """What was decided cannot be made durable: whoever decided has to end, and begin again from what is on disk."""


class Job:
    """A row of jobs.  Changed through State.change alone."""

    __slots__ = (
        "attempt", "code", "digest", "failures", "finished_s", "id", "key", "losses", "priority", "reason", "spec",
        "started_s", "state", "submitted_s", "usage", "worker",
    )  # fmt: skip

    def __init__(self, row: sqlite3.Row) -> None:
        for name in self.__slots__:
            setattr(self, name, row[name])
        self.spec: dict[str, Any] = json.loads(row["spec"])
        self.usage: dict[str, Any] = json.loads(row["usage"])
        self.id: int
        self.attempt: int
        self.failures: int
        self.losses: int
        self.priority: int
        self.code: int | None
        self.state: str
        self.worker: str
        self.reason: str
        self.key: str | None
        self.digest: str
        self.submitted_s: float
        self.started_s: float | None
        self.finished_s: float | None

    def shown(self) -> dict[str, Any]:
        """As commands print it."""
        return {name: getattr(self, name) for name in self.__slots__ if name != "digest"}


def _room(directory: str) -> str | None:
    """A hint for an error of SQLite's, which calls a full disk an I/O error."""
    return "there is no room on its file system" if not os.statvfs(directory).f_bavail else None


class State:
    """directory: of the pool.  Raises NotFound if there is none, FormatError, CafsError of the disk."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.changes: list[dict[str, Any]] = []
        """What has come to which state since somebody has taken them: what, id, state, and more."""
        path = os.path.join(directory, "state.db")
        if not os.path.exists(path):
            raise NotFound(f"no pool in {quote(directory)}", hint="cpool init")
        if not os.access(path, os.R_OK | os.W_OK):
            raise UnsupportedError(f"only the owner of the pool in {quote(directory)} may do that")
        try:
            self._db = sqlite3.connect(path, timeout=30, isolation_level=None)
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA synchronous=FULL")
            found = self._db.execute("PRAGMA user_version").fetchone()[0]
        except sqlite3.OperationalError as error:  # of the disk, as one without room for the file that readers share
            raise CafsError(f"cannot read {quote(path)}: {error}", hint=_room(directory)) from None
        except sqlite3.DatabaseError as error:
            raise FormatError(f"cannot read {quote(path)}: {error}") from None
        if not 1 <= found <= VERSION:
            raise FormatError(
                f"{quote(path)} has version {found}, not {VERSION}", hint="a newer release of these tools reads it"
            )
        if found < VERSION:
            self._change_schema(path, found)
        self._is_open = False

    def _change_schema(self, path: str, found: int) -> None:
        """To this version: a copy first, then all of it in one transaction."""
        with sqlite3.connect(f"{path}.{found}") as copy:
            os.chmod(f"{path}.{found}", 0o600)
            self._db.backup(copy)
        copy.close()
        changes = "".join(_CHANGES[version] for version in range(found, VERSION))
        self._db.executescript(f"BEGIN IMMEDIATE; {changes} PRAGMA user_version={VERSION}; COMMIT;")

    def close(self) -> None:
        """What was not committed is lost."""
        self._db.close()

    def _do(self, text: str, values: Iterable[Any] = ()) -> sqlite3.Cursor:
        try:
            if not self._is_open and not text.startswith("SELECT"):
                self._db.execute("BEGIN IMMEDIATE")
                self._is_open = True
            return self._db.execute(text, tuple(values))
        except sqlite3.OperationalError as error:
            raise WriteError(f"cannot write the state of the pool: {error}") from error

    def take_changes(self) -> list[dict[str, Any]]:
        """Of jobs and machines, since the last time."""
        found, self.changes = self.changes, []
        return found

    def commit(self) -> None:
        """From here on it survives."""
        if self._is_open:
            self._is_open = False
            try:
                self._db.execute("COMMIT")
            except sqlite3.OperationalError as error:
                raise WriteError(f"cannot write the state of the pool: {error}") from error

    def meta(self, name: str) -> str:
        row = self._do("SELECT value FROM meta WHERE name = ?", [name]).fetchone()
        return str(row[0]) if row else ""

    def set_meta(self, name: str, value: str) -> None:
        self._do("INSERT OR REPLACE INTO meta VALUES (?, ?)", [name, value])

    def next_epoch(self) -> int:
        """Of a controller that begins; durable."""
        epoch = int(self.meta("epoch")) + 1
        self._do("UPDATE meta SET value = ? WHERE name = 'epoch'", [str(epoch)])
        self.commit()
        return epoch

    # Hosts.

    def hosts(self) -> list[dict[str, Any]]:
        rows = [dict(row) for row in self._do("SELECT * FROM hosts ORDER BY name")]
        return [{**row, "labels": json.loads(row["labels"])} for row in rows]

    def put_host(self, name: str, address: str, state: str = "ready", labels: Iterable[str] = ()) -> None:
        values = [name, address, state, json.dumps(sorted(labels)), time.time()]
        self._do("INSERT OR REPLACE INTO hosts VALUES (?, ?, ?, ?, ?)", values)

    def set_worker_state(self, name: str, state: str) -> bool:
        """Of a host, of a machine that was launched, or of this machine where there are no hosts; False if there is none."""
        if self._do("UPDATE hosts SET state = ? WHERE name = ?", [state, name]).rowcount > 0:
            return True
        if self._do("SELECT 1 FROM machines WHERE name = ? AND state != 'ended'", [name]).fetchone():
            self.set_meta(f"state.{name}", state)
            return True
        if name != "local" or self.hosts() or self.machines():
            return False
        self.put_host(name, "", state)
        return True

    def remove_host(self, name: str) -> bool:
        return self._do("DELETE FROM hosts WHERE name = ?", [name]).rowcount > 0

    # Machines.

    def machines(self, *, all_of_them: bool = False) -> list[dict[str, Any]]:
        """Those that were begun, and have not ended."""
        where = "" if all_of_them else "WHERE state != 'ended'"
        return [dict(row) for row in self._do(f"SELECT * FROM machines {where} ORDER BY intended_s, name")]

    def put_machine(self, row: dict[str, Any]) -> None:
        """A new one, or one that has changed."""
        names = ", ".join(row)
        self._do(f"INSERT OR REPLACE INTO machines ({names}) VALUES ({', '.join('?' * len(row))})", row.values())

    def spent(self, since_s: float, now_s: float) -> float:
        """What machines have cost in a span of time, also while no controller ran."""
        share = "MAX(MIN(COALESCE(ended_s, :now), :now) - MAX(launched_s, :since), 0)"
        text = f"SELECT SUM(price * {share} / 3600) FROM machines WHERE launched_s IS NOT NULL"
        return float(self._db.execute(text, {"since": since_s, "now": now_s}).fetchone()[0] or 0)

    # Functions.

    def functions(self) -> list[dict[str, Any]]:
        """All versions of all."""
        rows = [dict(row) for row in self._do("SELECT * FROM functions ORDER BY tenant, name, version")]
        return [{**row, "spec": json.loads(row["spec"])} for row in rows]

    def instances_since(self, when_s: float) -> list[dict[str, Any]]:
        """tenant, name, worker, cpus, code and times of instances of functions that had not ended then."""
        names = ", ".join(f"json_extract(spec, '$.{at}') AS {name}" for at, name in _OF_INSTANCES.items())
        where = "json_extract(spec, '$.fn.name') IS NOT NULL AND (finished_s IS NULL OR finished_s >= ?)"
        wanted = f"SELECT {names}, worker, code, started_s, finished_s FROM jobs WHERE {where} ORDER BY id"
        return [dict(row) for row in self._do(wanted, [when_s])]

    def put_function(self, tenant: str, name: str, rows: Iterable[dict[str, Any]]) -> None:
        """Its versions are these."""
        self._do("DELETE FROM functions WHERE tenant = ? AND name = ?", [tenant, name])
        for row in rows:
            values = {**row, "spec": json.dumps(row["spec"], sort_keys=True)}
            self._do(f"INSERT INTO functions ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})", values.values())

    # Jobs.

    def submit(self, spec: dict[str, Any], key: str | None = None, priority: int = 0, state: str = QUEUED) -> int:
        """The id of a new job, or of the one that has this key.  Raises BusyError if that is another."""
        known = self.with_key(spec, key)
        if known is not None:
            return known
        names = "key, spec, digest, state, priority, submitted_s"
        values = [key, json.dumps(spec, sort_keys=True), _digest(spec), state, priority, time.time()]
        number = int(self._do(f"INSERT INTO jobs ({names}) VALUES (?, ?, ?, ?, ?, ?)", values).lastrowid or 0)
        self.changes.append({"what": "job", "id": number, "state": state})
        return number

    def with_key(self, spec: dict[str, Any], key: str | None) -> int | None:
        """The id of the job that has this key, if any.  Raises BusyError if that is another."""
        row = self._do("SELECT id, digest FROM jobs WHERE key = ?", [key]).fetchone() if key is not None else None
        if row and row["digest"] != _digest(spec):
            raise BusyError(f"key {quote(str(key))} is that of job {row['id']}, which is another")
        return int(row["id"]) if row else None

    def job(self, number: int) -> Job:
        """Raises NotFound."""
        row = self._do("SELECT * FROM jobs WHERE id = ?", [number]).fetchone()
        if row is None:
            raise NotFound(f"no job {number}", hint="cpool jobs --all")
        return Job(row)

    def has_job(self, number: int) -> bool:
        return self._do("SELECT 1 FROM jobs WHERE id = ?", [number]).fetchone() is not None

    def open_jobs(self) -> list[Job]:
        """All that have not ended, in the order in which they are due."""
        wanted = "SELECT * FROM jobs WHERE state NOT IN ('finished', 'cancelled') ORDER BY priority DESC, id"
        return [Job(row) for row in self._do(wanted)]

    def jobs(self, limit: int, *, all_of_them: bool, tenant: str | None = None) -> list[Job]:
        """The latest, oldest first.  tenant: whose, None for all."""
        where = "1" if all_of_them else "state NOT IN ('finished', 'cancelled')"
        whose = "(?1 IS NULL OR json_extract(spec, '$.tenant') = ?1)"
        wanted = f"SELECT * FROM jobs WHERE {where} AND {whose} ORDER BY id DESC LIMIT ?2"
        rows = self._do(wanted, [tenant, limit]).fetchall()
        return [Job(row) for row in reversed(rows)]

    def jobs_since(self, when_s: float) -> list[dict[str, Any]]:
        """state, code, worker, cpus and times of those that had not ended then."""
        names = "state, code, worker, submitted_s, started_s, finished_s, json_extract(spec, '$.cpus') AS cpus"
        rows = self._do(f"SELECT {names} FROM jobs WHERE finished_s IS NULL OR finished_s >= ? ORDER BY id", [when_s])
        return [dict(row) for row in rows]

    def change(self, job: Job, **fields: Any) -> None:
        """Of the row and of JOB."""
        for name, value in fields.items():
            setattr(job, name, value)
        if "state" in fields:
            row = {"what": "job", "id": job.id, "state": job.state, "worker": job.worker, "attempt": job.attempt}
            self.changes.append(row | {"code": job.code, "reason": job.reason})
        text = ", ".join(f"{name} = ?" for name in fields)
        values = [json.dumps(value) if name == "usage" else value for name, value in fields.items()]
        self._do(f"UPDATE jobs SET {text} WHERE id = ?", [*values, job.id])

    def keep_output(self, number: int, out: bytes, err: bytes) -> None:
        self._do("INSERT OR REPLACE INTO outputs VALUES (?, ?, ?)", [number, out, err])

    def output(self, number: int) -> tuple[bytes, bytes] | None:
        """(out, err) of a job whose output was little, and has ended."""
        row = self._do("SELECT out, err FROM outputs WHERE id = ?", [number]).fetchone()
        return (bytes(row["out"]), bytes(row["err"])) if row else None


def _digest(spec: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()


def create(directory: str) -> None:
    """Make the state of a new pool.  Raises BusyError if there is one, UnsupportedError, CafsError."""
    path = os.path.join(directory, "state.db")
    if os.path.exists(path):
        raise BusyError(f"there is a pool in {quote(directory)}")
    kind = mountinfo.fstype(directory)
    if kind in _NETWORKED:
        raise UnsupportedError(
            f"{quote(directory)} is on {kind}, where SQLite's log is not safe", hint="set CAFS_POOL to a local directory"
        )
    new = path + ".new"
    for name in (new, new + "-wal", new + "-shm"):
        if os.path.exists(name):
            os.unlink(name)
    db = sqlite3.connect(new, isolation_level=None)
    os.chmod(new, 0o600)
    db.executescript(f"PRAGMA journal_mode=WAL; BEGIN; {_SCHEMA}{_MACHINES}{_FUNCTIONS} PRAGMA user_version={VERSION}; COMMIT;")
    db.executemany("INSERT INTO meta VALUES (?, ?)", [("pool", os.urandom(8).hex()), ("epoch", "0")])
    db.close()
    os.rename(new, path)


def is_locked(directory: str) -> bool:
    """Whether somebody is the one who writes, as far as we may know."""
    try:
        fd = os.open(os.path.join(directory, "lock"), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


@contextmanager
def locked(directory: str, *, wait_s: float = 1.0, unless: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Be the one who writes.  unless: what ends the waiting for it.  Raises LockedError if somebody else is."""
    lock = os.open(os.path.join(directory, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + wait_s
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline or unless():
                    raise LockedError("a controller runs for this pool") from None
                time.sleep(0.02)
        yield
    finally:
        os.close(lock)
