"""The tables of the SQLite store, and its rarer operations on them as functions of the connection.

Strategy. An operation is one statement. ``sqlite_batch`` has reservations, and the notes of what became of them. The
caller has begun a transaction and commits it: nothing here begins, commits or waits.
"""

from __future__ import annotations

from collections.abc import Collection
from sqlite3 import Connection

from tornado_fal_proxy.spending.store import COUNTER_KEPT_S, DIMENSIONS, JOB_KEPT_S, Account, Usage

__all__ = [
    "APPLICATION_ID",
    "SCHEMA",
    "SCHEMA_VERSION",
    "endpoint",
    "forget_counters",
    "forget_days",
    "forget_jobs",
    "owner",
    "usage",
]

# Marks the file as this package's: "falp".
APPLICATION_ID = 0x66616C70
SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE counters (key TEXT PRIMARY KEY, value INTEGER NOT NULL, ends INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX counters_by_end ON counters (ends);
CREATE TABLE jobs (
    id TEXT NOT NULL UNIQUE, user TEXT NOT NULL, endpoint TEXT NOT NULL, at INTEGER NOT NULL, day TEXT NOT NULL,
    jobs INTEGER NOT NULL, units INTEGER NOT NULL, cost INTEGER NOT NULL,
    settled INTEGER NOT NULL DEFAULT 0, ended INTEGER NOT NULL DEFAULT 0, unfinished_until INTEGER NOT NULL,
    job_counters TEXT NOT NULL, cost_counters TEXT NOT NULL
);
CREATE INDEX jobs_by_time ON jobs (at);
CREATE INDEX unfinished_jobs ON jobs (user, unfinished_until) WHERE ended = 0;
CREATE TABLE account (
    day TEXT NOT NULL, user TEXT NOT NULL, endpoint TEXT NOT NULL, jobs INTEGER NOT NULL, refused INTEGER NOT NULL,
    units INTEGER NOT NULL, cost INTEGER NOT NULL, PRIMARY KEY (day, user, endpoint)
) WITHOUT ROWID;
"""
# Limits the rows that one transaction forgets: other operations wait meanwhile, for a few milliseconds.
_FORGOTTEN_AT_ONCE = 500


def owner(db: Connection, job_id: str) -> str | None:
    """Do Store.owner."""
    row = db.execute("SELECT user FROM jobs WHERE id = ?", (job_id,)).fetchone()
    return None if row is None else str(row[0])


def endpoint(db: Connection, job_id: str) -> str | None:
    """Do Store.endpoint."""
    row = db.execute("SELECT endpoint FROM jobs WHERE id = ?", (job_id,)).fetchone()
    return None if row is None else str(row[0])


def usage(db: Connection, since: str, until: str, by: Collection[str], most: int | None) -> Account:
    """Do Store.usage."""
    columns = ", ".join(name if name in by else f"'' AS {name}" for name in DIMENSIONS)
    groups = ", ".join(name for name in DIMENSIONS if name in by) or "NULL"
    # One statement, and so the account of one moment. SQLite makes the sums once, though they are used twice.
    *shown, (count, *sums) = db.execute(
        f"WITH sums AS (SELECT {columns}, sum(jobs) AS jobs, sum(refused) AS refused, sum(units) AS units,"
        f" sum(cost) AS cost FROM account WHERE day BETWEEN ? AND ? GROUP BY {groups})"
        " SELECT * FROM (SELECT * FROM sums ORDER BY cost DESC, jobs DESC, day, user, endpoint LIMIT ?)"
        " UNION ALL SELECT count(*), '', '', coalesce(sum(jobs), 0), coalesce(sum(refused), 0),"
        " coalesce(sum(units), 0), coalesce(sum(cost), 0) FROM sums",
        (since, until, -1 if most is None else most),
    )
    rows, total = [Usage(*row) for row in shown], Usage("", *sums)
    rest = Usage(
        *("", "", ""),
        total.jobs - sum(row.jobs for row in rows),
        total.refused - sum(row.refused for row in rows),
        total.units - sum(row.units for row in rows),
        total.cost - sum(row.cost for row in rows),
    )
    return Account(rows, count - len(rows), rest, total)


def forget_jobs(db: Connection, now: int) -> bool:
    """Forget some of the jobs that are too old. Return True if there may be more of them."""
    return _forget(db, "jobs", "rowid", "at < ?", now - JOB_KEPT_S)


def forget_counters(db: Connection, now: int) -> bool:
    """Forget some of the counters that ended too long ago. Return True if there may be more of them."""
    return _forget(db, "counters", "key", "ends < ?", now - COUNTER_KEPT_S)


def forget_days(db: Connection, before: str) -> bool:
    """Forget some of the account's rows before that day. Return True if there may be more of them."""
    return _forget(db, "account", "(day, user, endpoint)", "day < ?", before)


def _forget(db: Connection, table: str, key: str, condition: str, bound: int | str) -> bool:
    columns = key.strip("()")
    cursor = db.execute(
        f"DELETE FROM {table} WHERE {key} IN (SELECT {columns} FROM {table} WHERE {condition} LIMIT ?)",
        (bound, _FORGOTTEN_AT_ONCE),
    )
    return cursor.rowcount == _FORGOTTEN_AT_ONCE
