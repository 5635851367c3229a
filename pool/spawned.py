"""Calls that were accepted and that nobody waits for: on disk before their ids are said.  cpool-function(7), ROUTER.

A file of the router's own: what a turn of its loop has accepted, given to hosts and answered is one commit, before any of it is
sent.  A router that begins takes up what has no answer.
"""

from __future__ import annotations

import os
import sqlite3
import sys
from dataclasses import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pool.loop import Wire
    from pool.routed import Call

_SCHEMA = """
PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;
CREATE TABLE IF NOT EXISTS calls (
  number INTEGER PRIMARY KEY, id BLOB NOT NULL UNIQUE, tenant TEXT NOT NULL, name TEXT NOT NULL, flags INTEGER NOT NULL,
  ms INTEGER NOT NULL, body BLOB NOT NULL, worker TEXT NOT NULL DEFAULT '', answer BLOB
);
CREATE INDEX IF NOT EXISTS calls_open ON calls (number) WHERE answer IS NULL;
"""
_KEPT_MANY, _KEPT_BYTES = 100_000, 256 << 20
"""Answers; the oldest go first."""


@dataclass(frozen=True, slots=True)
class Noted:
    """A call without an answer.  ms: within which it was to be done; worker: to which it was given, '' if to none."""

    id: bytes
    tenant: str
    name: str
    flags: int
    ms: int
    body: bytes
    worker: str


class Spawned:
    """directory: of the router."""

    def __init__(self, directory: str) -> None:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        self._path = os.path.join(directory, "calls.db")
        try:
            self._db = self._opened()
        except sqlite3.OperationalError:
            raise  # a full disk, most likely: it may be read later
        except sqlite3.DatabaseError as error:
            for suffix in ("", "-wal", "-shm"):  # the log would be applied to the new file
                if os.path.exists(self._path + suffix):
                    os.replace(self._path + suffix, f"{self._path}.damaged{suffix}")
            sys.stderr.write(f"cpool: {self._path} is damaged: {error}; what it had is in {self._path}.damaged\n")
            self._db = self._opened()
        self._new: list[tuple[Call, int, Wire]] = []
        self._given: dict[bytes, str] = {}
        self._done: dict[bytes, tuple[str, str, int, bytes]] = {}
        self._many, self._bytes = self._db.execute(
            "SELECT count(*), coalesce(sum(length(answer)), 0) FROM calls WHERE answer IS NOT NULL"
        ).fetchone()

    def _opened(self) -> sqlite3.Connection:
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        db = sqlite3.connect(self._path, timeout=30, isolation_level=None)
        db.executescript(_SCHEMA)
        (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(str(found))
        return db

    def without_answer(self) -> list[Noted]:
        """What a router before us has accepted, in that order."""
        text = "SELECT id, tenant, name, flags, ms, body, worker FROM calls WHERE answer IS NULL ORDER BY number"
        return [Noted(*row) for row in self._db.execute(text)]

    def workers(self) -> set[str]:
        """To which some of those were given."""
        return {row[0] for row in self._db.execute("SELECT DISTINCT worker FROM calls WHERE answer IS NULL AND worker != ''")}

    def answer(self, call: bytes) -> tuple[str, bytes] | None:
        """(its tenant, the frame), if it has one."""
        row = self._db.execute("SELECT tenant, answer FROM calls WHERE id = ? AND answer IS NOT NULL", [call]).fetchone()
        return (str(row[0]), bytes(row[1])) if row else None

    def note(self, call: Call, ms: int, wire: Wire) -> None:
        """One that is to be accepted at the end of this turn.  wire: of its caller."""
        self._new.append((call, ms, wire))

    def given(self, call: bytes, worker: str) -> None:
        """To a host; '': it waits again."""
        self._given[call] = worker

    def answered(self, call: bytes, tenant: str, name: str, flags: int, frame: bytes) -> None:
        self._done[call] = tenant, name, flags, frame

    def commit(self) -> tuple[list[tuple[Call, Wire]], str]:
        """(those that were new, why they are not on disk).  Everything else is tried again the next time."""
        new, self._new = self._new, []
        if not (new or self._given or self._done):
            return [], ""
        before = self._many, self._bytes
        try:
            self._write(new)
        except sqlite3.Error as error:
            self._many, self._bytes = before
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            return [(call, wire) for call, _, wire in new], str(error)
        self._given, self._done = {}, {}
        return [(call, wire) for call, _, wire in new], ""

    def _write(self, new: list[tuple[Call, int, Wire]]) -> None:
        execute, many = self._db.execute, self._db.executemany
        execute("BEGIN IMMEDIATE")
        rows = [(one.id, one.function.tenant, one.function.name, one.flags, ms, one.body) for one, ms, _ in new]
        many("INSERT INTO calls (id, tenant, name, flags, ms, body) VALUES (?, ?, ?, ?, ?, ?)", rows)
        many("UPDATE calls SET worker = ? WHERE id = ?", [(worker, call) for call, worker in self._given.items()])
        many(
            "INSERT INTO calls (id, tenant, name, flags, ms, body, answer) VALUES (?, ?, ?, ?, 0, x'', ?) "
            "ON CONFLICT (id) DO UPDATE SET body = x'', answer = excluded.answer",
            [(call, *fields) for call, fields in self._done.items()],
        )
        more = sum(len(frame) for *_, frame in self._done.values())
        self._forget_oldest(len(self._done), more)
        execute("COMMIT")

    def _forget_oldest(self, many: int, size: int) -> None:
        """Before so many answers more are too much."""
        self._many, self._bytes = self._many + many, self._bytes + size
        if self._many <= _KEPT_MANY and self._bytes <= _KEPT_BYTES:
            return
        text = "SELECT number, length(answer) FROM calls WHERE answer IS NOT NULL ORDER BY number"
        for number, length in self._db.execute(text).fetchall():
            if self._many <= _KEPT_MANY * 9 // 10 and self._bytes <= _KEPT_BYTES * 9 // 10:
                return
            self._db.execute("DELETE FROM calls WHERE number = ?", [number])
            self._many, self._bytes = self._many - 1, self._bytes - length
