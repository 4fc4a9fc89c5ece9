"""The tables of the SQLite store, and each operation on them as a function of the connection.

Strategy. An operation is a few statements, because each of them lets the thread of the event loop have Python's lock
and must get it back. The caller has begun a transaction and commits it: nothing here begins, commits or waits.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from sqlite3 import Connection

from tornado_fal_proxy.spending.store import (
    COUNTER_KEPT_S,
    DIMENSIONS,
    JOB_KEPT_S,
    Account,
    Reservation,
    Standing,
    Usage,
    day_of,
    first_without_room,
)

__all__ = [
    "APPLICATION_ID",
    "SCHEMA",
    "SCHEMA_VERSION",
    "end",
    "endpoint",
    "forget_counters",
    "forget_days",
    "forget_jobs",
    "give_back",
    "owner",
    "rename",
    "reserve",
    "settle",
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


def reserve(db: Connection, job: Reservation) -> Standing:
    """Do Store.reserve."""
    counters = [*job.job_counters, *job.cost_counters]
    adds = [job.jobs] * len(job.job_counters) + [job.cost] * len(job.cost_counters)
    keys = [counter.key for counter in counters]
    (_, unfinished), (_, known), *found = db.execute(
        "SELECT '', count(*) FROM jobs WHERE user = ? AND ended = 0 AND unfinished_until > ?"
        " UNION ALL SELECT '', EXISTS (SELECT 1 FROM jobs WHERE id = ?)"
        f" UNION ALL SELECT key, value FROM counters WHERE key IN ({_marks(keys)})",
        (job.user, job.at, job.id, *keys),
    )
    values = dict(found)
    used = [values.get(key, 0) for key in keys]
    if known:
        return Standing(used, unfinished, None)
    day = day_of(job.at)
    refused_by = first_without_room(job, used, unfinished)
    if refused_by is not None:
        _account(db, (day, job.user, job.refused_as), refused=1)
        return Standing(used, unfinished, refused_by)
    if counters:
        db.execute(
            f"INSERT INTO counters VALUES {', '.join(['(?, ?, ?)'] * len(counters))}"
            " ON CONFLICT (key) DO UPDATE SET value = value + excluded.value",
            [each for counter, add in zip(counters, adds, strict=True) for each in (counter.key, add, counter.ends)],
        )
    db.execute(
        "INSERT INTO jobs (id, user, endpoint, at, day, jobs, units, cost, unfinished_until, job_counters,"
        f" cost_counters) VALUES ({_marks(range(11))})",
        (
            *(job.id, job.user, job.endpoint, job.at, day, job.jobs, job.units, job.cost, job.unfinished_until),
            json.dumps([counter.key for counter in job.job_counters]),
            json.dumps([counter.key for counter in job.cost_counters]),
        ),
    )
    _account(db, (day, job.user, job.endpoint), jobs=job.jobs, units=job.units, cost=job.cost)
    return Standing([value + add for value, add in zip(used, adds, strict=True)], unfinished + 1, None)


def rename(db: Connection, job_id: str, new_id: str) -> None:
    """Do Store.rename."""
    db.execute("UPDATE OR IGNORE jobs SET id = ? WHERE id = ?", (new_id, job_id))


def settle(db: Connection, job_id: str, units: int, cost: int | None) -> None:
    """Do Store.settle."""
    row = db.execute(
        "SELECT day, user, endpoint, units, cost, cost_counters FROM jobs WHERE id = ? AND settled = 0", (job_id,)
    ).fetchone()
    if row is None:
        return
    *place, estimated_units, estimated_cost, cost_counters = row
    cost = estimated_cost if cost is None else cost
    db.execute(
        "UPDATE jobs SET settled = 1, ended = 1, units = ?, cost = ? WHERE id = ?",
        (units, cost, job_id),
    )
    _add(db, json.loads(cost_counters), cost - estimated_cost)
    _account(db, place, units=units - estimated_units, cost=cost - estimated_cost)


def end(db: Connection, job_id: str) -> None:
    """Do Store.end."""
    db.execute("UPDATE jobs SET ended = 1 WHERE id = ? AND ended = 0", (job_id,))


def give_back(db: Connection, job_id: str) -> None:
    """Do Store.give_back."""
    row = db.execute(
        "SELECT day, user, endpoint, jobs, units, cost, job_counters, cost_counters FROM jobs"
        " WHERE id = ? AND settled = 0",
        (job_id,),
    ).fetchone()
    if row is None:
        return
    *place, jobs, units, cost, job_counters, cost_counters = row
    db.execute("DELETE FROM jobs WHERE id = ?", (job_id,))
    _add(db, json.loads(job_counters), -jobs)
    _add(db, json.loads(cost_counters), -cost)
    _account(db, place, jobs=-jobs, units=-units, cost=-cost)


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


def _marks(values: Sequence[object]) -> str:
    return ", ".join("?" * len(values))


def _add(db: Connection, keys: Sequence[str], amount: int) -> None:
    """Add to the counters that are not forgotten yet. None of them falls below zero."""
    if keys and amount:
        db.execute(f"UPDATE counters SET value = max(0, value + ?) WHERE key IN ({_marks(keys)})", (amount, *keys))


def _account(
    db: Connection, place: Iterable[str], jobs: int = 0, refused: int = 0, units: int = 0, cost: int = 0
) -> None:
    """Add to the row of the account at ``place``: day, user and endpoint. Delete a row that has only zeros."""
    place = tuple(place)
    if not (jobs or refused or units or cost):
        return
    db.execute(
        f"INSERT INTO account VALUES ({_marks(range(7))}) ON CONFLICT (day, user, endpoint) DO UPDATE SET"
        " jobs = jobs + excluded.jobs, refused = refused + excluded.refused,"
        " units = units + excluded.units, cost = cost + excluded.cost",
        (*place, jobs, refused, units, cost),
    )
    if jobs + refused <= 0 and units <= 0 and cost <= 0:
        db.execute(
            "DELETE FROM account WHERE (day, user, endpoint) = (?, ?, ?)"
            " AND jobs = 0 AND refused = 0 AND units = 0 AND cost = 0",
            place,
        )
