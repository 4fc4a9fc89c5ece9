"""Do many reservations and notes of jobs in the SQLite store at once, in their order.

Strategy. A statement costs a few microseconds, the thread of the event loop must get Python's lock back after each, and
most users share counters. So a batch reads all rows that it needs with three statements, works on them in memory, and
writes what has changed with four. The caller has begun a transaction and commits it: nothing here begins, commits or
waits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import chain
from sqlite3 import Connection, Cursor
from typing import Any

from tornado_fal_proxy.spending.store import (
    END,
    GIVE_BACK,
    RENAME,
    SETTLE,
    Note,
    Reservation,
    Standing,
    day_of,
    first_without_room,
)

__all__ = ["Work", "do_all"]

Work = Reservation | Note

# The numbers of rows, and of keys, that one statement takes: few texts, which sqlite3 keeps compiled. The rest is
# NULL, which no key is.
_SIZES = (1, 2, 4, 8, 16, 32)

# Each returns one row, because the thread lets go of Python's lock for each row.
_JOBS = (
    "WITH asked (id) AS (VALUES {}) SELECT json_group_array(json_array(jobs.id, user, endpoint, day, jobs, units, cost,"
    " settled, ended, unfinished_until, job_counters, cost_counters)) FROM asked CROSS JOIN jobs ON jobs.id = asked.id"
)
# This is faster than IN, which sorts the keys first.
_COUNTERS = (
    "WITH asked (key) AS (VALUES {}) SELECT json_group_array(json_array(counters.key, value, ends))"
    " FROM asked CROSS JOIN counters ON counters.key = asked.key"
)
_UNFINISHED = (
    "WITH asked (user, at) AS (VALUES {}) SELECT json_group_array(json_array(user, at, (SELECT count(*) FROM jobs"
    " WHERE jobs.user = asked.user AND ended = 0 AND unfinished_until > asked.at))) FROM asked WHERE user IS NOT NULL"
)
_NEW_JOBS = (
    "INSERT INTO jobs (id, user, endpoint, day, jobs, units, cost, settled, ended, unfinished_until, job_counters,"
    " cost_counters, at) SELECT * FROM (VALUES {}) WHERE column1 IS NOT NULL"
)
_NEW_VALUES = (
    "INSERT INTO counters SELECT * FROM (VALUES {}) WHERE column1 IS NOT NULL"
    " ON CONFLICT (key) DO UPDATE SET value = excluded.value"
)
_NEW_SUMS = (
    "INSERT INTO account SELECT * FROM (VALUES {}) WHERE column1 IS NOT NULL"
    " ON CONFLICT (day, user, endpoint) DO UPDATE SET jobs = jobs + excluded.jobs,"
    " refused = refused + excluded.refused, units = units + excluded.units, cost = cost + excluded.cost"
)
_DELETE = "DELETE FROM jobs WHERE id IN (VALUES {})"
_SETTLE = "UPDATE jobs SET settled = 1, ended = 1 WHERE id IN (VALUES {})"
_END = "UPDATE jobs SET ended = 1 WHERE ended = 0 AND id IN (VALUES {})"
_NO_ROW = (
    "DELETE FROM account WHERE (day, user, endpoint) = (?, ?, ?)"
    " AND jobs = 0 AND refused = 0 AND units = 0 AND cost = 0"
)

_encode = json.JSONEncoder().encode  # keeps every character of a key in ASCII


class _Job:
    """A row of the table of jobs. Its estimate stays in it when the job is settled, because nobody needs the bill."""

    __slots__ = (
        *("cost", "cost_counters", "day", "ended", "endpoint", "job_counters", "jobs", "settled", "units"),
        *("unfinished_until", "user"),
    )

    def __init__(self, row: Sequence[Any]) -> None:
        self.user, self.endpoint, self.day, self.jobs, self.units, self.cost = row[:6]
        self.settled, self.ended, self.unfinished_until, self.job_counters, self.cost_counters = row[6:]

    def is_changed(self, note: Note) -> bool:
        """Tell whether a note that ends the job may change counters."""
        return note.kind == GIVE_BACK or (note.kind == SETTLE and note.cost not in (None, self.cost))

    def keys(self) -> list[str]:
        """Return the keys of all its counters."""
        return [*json.loads(self.job_counters), *json.loads(self.cost_counters)]


def do_all(db: Connection, work: Sequence[Work]) -> list[Standing | None]:
    """Do Store.reserve, and each note. Return what reservations return, and None for each note."""
    results: list[Standing | None] = []
    first = 0
    for index, each in enumerate(work):
        if isinstance(each, Note) and each.kind == RENAME:  # by itself, because others may mean the old id or the new
            results += _do_together(db, work[first:index])
            db.execute("UPDATE OR IGNORE jobs SET id = ? WHERE id = ?", (each.new_id, each.job_id))
            results.append(None)
            first = index + 1
    return [*results, *_do_together(db, work[first:])]


def _do_together(db: Connection, work: Sequence[Work]) -> list[Standing | None]:
    if not work:
        return []
    batch = _Batch(db, work)
    results: list[Standing | None] = []
    for each in work:
        if isinstance(each, Reservation):
            results.append(batch.reserve(each))
        else:
            batch.note(each)
            results.append(None)
    batch.write()
    return results


class _Batch:
    """The rows that a batch needs, as they are after what is done of it."""

    def __init__(self, db: Connection, work: Sequence[Work]) -> None:
        self._db = db
        keys: list[str] = []
        ids: list[str] = []
        times: set[tuple[str, int]] = set()
        notes: list[Note] = []
        for each in work:
            if isinstance(each, Reservation):
                ids.append(each.id)
                keys += [counter.key for counter in each.job_counters]
                keys += [counter.key for counter in each.cost_counters]
                if each.max_unfinished is not None:
                    times.add((each.user, each.at))
            else:
                ids.append(each.job_id)
                notes.append(each)
        self._jobs = {row[0]: _Job(row[1:]) for row in _found(db, _JOBS, [(job_id,) for job_id in ids])}
        for note in notes:
            if (known := self._jobs.get(note.job_id)) is not None and known.is_changed(note):
                keys += known.keys()
        self._counters = {
            key: [value, ends] for key, value, ends in _found(db, _COUNTERS, [(key,) for key in dict.fromkeys(keys)])
        }
        self._unfinished: dict[str, dict[int, int]] = {}  # of a user at a time
        for user, at, count in _found(db, _UNFINISHED, list(times)):
            self._unfinished.setdefault(user, {})[at] = count
        self._changed: set[str] = set()
        self._sums: dict[tuple[str, str, str], list[int]] = {}
        self._at: dict[str, int] = {}  # of new jobs
        self._deleted: list[str] = []
        self._settled: list[str] = []
        self._ended: list[str] = []

    def reserve(self, job: Reservation) -> Standing:
        """Do Store.reserve."""
        counters, used = self._counters, []
        for counter in (*job.job_counters, *job.cost_counters):
            found = counters.get(counter.key)
            used.append(0 if found is None else found[0])
        unfinished = 0 if job.max_unfinished is None else self._unfinished[job.user][job.at]
        if job.id in self._jobs:
            return Standing(used, unfinished, None)
        day = day_of(job.at)
        refused_by = first_without_room(job, used, unfinished)
        if refused_by is not None:
            self._account(day, job.user, job.refused_as, refused=1)
            return Standing(used, unfinished, refused_by)
        index = 0
        for add, of_kind in ((job.jobs, job.job_counters), (job.cost, job.cost_counters)):
            for counter in of_kind:
                used[index] += add
                counters[counter.key] = [used[index], counter.ends]
                self._changed.add(counter.key)
                index += 1
        keys = (_encode([each.key for each in each_kind]) for each_kind in (job.job_counters, job.cost_counters))
        row = (job.user, job.endpoint, day, job.jobs, job.units, job.cost, 0, 0, job.unfinished_until, *keys)
        new = self._jobs[job.id] = _Job(row)
        self._at[job.id] = job.at
        self._account(day, job.user, job.endpoint, job.jobs, 0, job.units, job.cost)
        self._count(new, 1)
        return Standing(used, 0 if job.max_unfinished is None else self._unfinished[job.user][job.at], None)

    def note(self, note: Note) -> None:
        """Do Store.settle, Store.end or Store.give_back."""
        job = self._jobs.get(note.job_id)
        if job is None or (job.settled and note.kind != END):
            return
        if not job.ended:
            job.ended = 1
            self._count(job, -1)
            if note.kind == END:
                self._ended.append(note.job_id)
        if note.kind == END:
            return
        if note.kind == GIVE_BACK:
            if self._at.pop(note.job_id, None) is None:
                self._deleted.append(note.job_id)
            del self._jobs[note.job_id]
            self._add(job.job_counters, -job.jobs)
            self._add(job.cost_counters, -job.cost)
            self._account(job.day, job.user, job.endpoint, -job.jobs, 0, -job.units, -job.cost)
            return
        job.settled = 1
        self._settled.append(note.job_id)
        more = 0 if note.cost is None else note.cost - job.cost
        self._add(job.cost_counters, more)
        self._account(job.day, job.user, job.endpoint, 0, 0, note.units - job.units, more)

    def write(self) -> None:
        """Write what has changed."""
        db, new = self._db, self._at.keys()
        for statement, ids in ((_DELETE, self._deleted), (_SETTLE, self._settled), (_END, self._ended)):
            _execute(db, statement, [(each,) for each in ids if each not in new])
        _execute(db, _NEW_JOBS, [self._row(job_id, at) for job_id, at in self._at.items()])
        _execute(db, _NEW_VALUES, [(key, *self._counters[key]) for key in self._changed])
        _execute(db, _NEW_SUMS, [(*place, *sums) for place, sums in self._sums.items() if any(sums)])
        for place, sums in self._sums.items():
            if min(sums) < 0 and max(sums) <= 0:
                db.execute(_NO_ROW, place)

    def _row(self, id: str, at: int) -> tuple[Any, ...]:
        job = self._jobs[id]
        return (
            *(id, job.user, job.endpoint, job.day, job.jobs, job.units, job.cost, job.settled, job.ended),
            *(job.unfinished_until, job.job_counters, job.cost_counters, at),
        )

    def _count(self, job: _Job, change: int) -> None:
        """Count a job as unfinished, or no more."""
        counts = self._unfinished.get(job.user, {})
        for at in counts:
            if at < job.unfinished_until:
                counts[at] += change

    def _add(self, keys: str, amount: int) -> None:
        """Add to the counters that are not forgotten yet. None of them falls below zero."""
        for key in json.loads(keys) if amount else ():
            counter = self._counters.get(key)
            if counter is not None:
                counter[0] = max(0, counter[0] + amount)
                self._changed.add(key)

    def _account(
        self, day: str, user: str, endpoint: str, jobs: int = 0, refused: int = 0, units: int = 0, cost: int = 0
    ) -> None:
        """Add to the row of the account of a day, a user and an endpoint."""
        sums = self._sums.setdefault((day, user, endpoint), [0, 0, 0, 0])
        sums[0] += jobs
        sums[1] += refused
        sums[2] += units
        sums[3] += cost


def _found(db: Connection, statement: str, keys: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
    """Yield the rows that a statement finds for these keys."""
    for cursor in _execute(db, statement, keys):
        yield from json.loads(cursor.fetchone()[0])


def _execute(db: Connection, statement: str, rows: Sequence[tuple[Any, ...]]) -> list[Cursor]:
    """Execute a statement that takes rows, or keys: once for as many as it can take."""
    cursors = []
    for first in range(0, len(rows), _SIZES[-1]):
        part = rows[first : first + _SIZES[-1]]
        columns = len(part[0])
        size = next(each for each in _SIZES if each >= len(part))
        values = [*chain.from_iterable(part), *[None] * ((size - len(part)) * columns)]
        cursors.append(db.execute(_text(statement, columns, size), values))
    return cursors


@cache
def _text(statement: str, columns: int, rows: int) -> str:
    return statement.format(", ".join([f"({', '.join('?' * columns)})"] * rows))
