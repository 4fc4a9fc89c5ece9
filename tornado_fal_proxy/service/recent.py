"""Calls of the last minutes, and the latest of each error, in memory that all processes of the service share.

Strategy. The memory is made before the workers fork. Each worker has a slot and writes only there; everyone reads, so
each worker can tell of all of them. Nothing is locked. A count may be a moment old. An error is read only if nobody
wrote it meanwhile, which its sequence number tells. Counts stand in a ring of short periods, and of each kind of error
there is one entry. So the memory has a fixed size, and a crowd of one error leaves the others in sight.

It keeps neither user, query nor body: see :class:`Fault` for all that is kept of a call. Its detail is that of the log,
which may have an excerpt of a target, an origin or a content-type that was refused.
"""

from __future__ import annotations

import json
import mmap
import time
from dataclasses import dataclass, replace
from http import HTTPStatus

from tornado_fal_proxy.rules.endpoints import kind_of
from tornado_fal_proxy.telemetry import Call

__all__ = ["KINDS", "OUTCOMES", "RECENT_S", "Fault", "RecentCalls", "RecentWriter"]

# The kinds of calls, as kind_of() has them, and their outcomes, as telemetry.py has them.
KINDS = (
    *("run", "stream", "ice", "queue_submit", "queue_status", "queue_stream", "queue_result", "queue_cancel"),
    *("session", "heartbeat", "token", "storage", "other", "none"),
)
OUTCOMES = ("ok", "refused", "upstream_error", "client_disconnected", "failed")
# The time that counts as recent, and the periods of which it is made: what is shown is 4.5 to 5 minutes.
RECENT_S, PERIOD_S = 300, 30
PERIODS = RECENT_S // PERIOD_S
# The statuses of fal's that have a name of their own: an app on fal.run may respond with any number.
CODES = frozenset(HTTPStatus)
# Limits the errors of a worker, of which the oldest makes room: all names of errors.py fit.
MAX_FAULTS = 48
# Limits an entry: name, a request id of 128 characters, and most of a detail.
TEXT_BYTES, MAX_DETAIL_CHARS = 480, 120

_CELL = {pair: cell for cell, pair in enumerate((kind, outcome) for kind in KINDS for outcome in OUTCOMES)}
# A period: its number, and a count for each kind and outcome.
_PERIOD_CELLS = 1 + len(_CELL)
_SLOT_CELLS = PERIODS * _PERIOD_CELLS
_ZEROS = memoryview(bytes(8 * len(_CELL))).cast("q")
# An entry: its sequence number, odd while it is being written; time in microseconds; count; length of the text; text.
_SEQUENCE, _AT, _COUNT, _LENGTH, _HEAD_CELLS = range(5)
# Calls that follow each other take less than a millisecond, and the later one is shown.
_MICRO = 1_000_000
_FAULT_CELLS = _HEAD_CELLS + TEXT_BYTES // 8
_SLOT_FAULT_CELLS = MAX_FAULTS * _FAULT_CELLS


@dataclass(frozen=True)
class Fault:
    """The latest call of one error: ``at`` in seconds since 1970, and how many of that error there were.

    ``name`` is that of the exception, or ``fal responded 503`` where a response of fal's was passed on.
    """

    name: str
    at: float
    count: int
    outcome: str
    kind: str
    status: int
    detail: str
    request_id: str


def fault_name(call: Call) -> str | None:
    """Return the name under which a call is kept: that of its error, or of a response that fal should not have given.

    Return None where nothing went wrong, or the client left.
    """
    if call.outcome == "client_disconnected":
        return None
    if call.error:
        return call.error
    status = 0 if call.head is None else call.head.status
    if status == 401 or status >= 500:
        return f"fal responded {status if status in CODES else '5xx'}"
    return None


class RecentCalls:
    """The memory of ``size`` workers, each in its slot from 0 on."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._counts = memoryview(mmap.mmap(-1, 8 * _SLOT_CELLS * size)).cast("q")
        self._bytes = memoryview(mmap.mmap(-1, 8 * _SLOT_FAULT_CELLS * size))
        self._faults = self._bytes.cast("q")

    def writer(self, slot: int) -> RecentWriter:
        """Return what notes the calls of one slot: the worker's own, which may go on with that of one that died."""
        counts = self._counts[slot * _SLOT_CELLS :][:_SLOT_CELLS]
        first = slot * _SLOT_FAULT_CELLS
        entries = [self._entry(first + place * _FAULT_CELLS) for place in range(MAX_FAULTS)]
        return RecentWriter(counts, entries)

    def counts(self) -> dict[tuple[str, str], int]:
        """Return the calls of all workers that ended in the last minutes, by kind and outcome."""
        now = int(time.monotonic()) // PERIOD_S
        totals = dict.fromkeys(_CELL, 0)
        for base in range(0, len(self._counts), _PERIOD_CELLS):
            if now - PERIODS < self._counts[base] <= now:
                for pair, cell in _CELL.items():
                    totals[pair] += self._counts[base + 1 + cell]
        return totals

    def faults(self) -> list[Fault]:
        """Return the latest of each error of all workers, the latest first."""
        latest: dict[str, Fault] = {}
        for base in range(0, len(self._faults), _FAULT_CELLS):
            fault = self._entry(base).read()
            if fault is None:
                continue
            if (other := latest.get(fault.name)) is not None:
                fault = replace(max(fault, other, key=lambda each: each.at), count=fault.count + other.count)
            latest[fault.name] = fault
        return sorted(latest.values(), key=lambda fault: -fault.at)

    def _entry(self, base: int) -> _Entry:
        text = 8 * (base + _HEAD_CELLS)
        return _Entry(self._faults[base : base + _HEAD_CELLS], self._bytes[text : text + TEXT_BYTES])


class RecentWriter:
    """Notes the calls of one worker."""

    def __init__(self, counts: memoryview[int], entries: list[_Entry]) -> None:
        self._counts, self._entries = counts, entries
        self._places = {fault.name: entry for entry in entries if (fault := entry.read()) is not None}

    def note(self, call: Call) -> None:
        """Note a call that is over."""
        kind = kind_of(call.target)
        period = int(time.monotonic()) // PERIOD_S
        base = period % PERIODS * _PERIOD_CELLS
        if self._counts[base] != period:
            self._counts[base + 1 : base + _PERIOD_CELLS] = _ZEROS
            self._counts[base] = period
        self._counts[base + 1 + _CELL[kind, call.outcome]] += 1
        if (name := fault_name(call)) is not None:
            self._note_fault(name, kind, call)

    def _note_fault(self, name: str, kind: str, call: Call) -> None:
        name = name[:64]
        entry = self._places.get(name)
        count = 1
        if entry is None:
            entry = min(self._entries, key=lambda each: each.at)
            self._places = {known: other for known, other in self._places.items() if other is not entry} | {name: entry}
        else:
            count += entry.count
        detail = call.detail[:MAX_DETAIL_CHARS]
        facts = [name, call.outcome, kind, call.status, detail, call.request_id]
        text = json.dumps(facts, ensure_ascii=False).encode("utf-8", "replace")
        if len(text) > TEXT_BYTES:
            text = json.dumps([*facts[:4], "", call.request_id]).encode()
        entry.write(time.time(), count, text)


class _Entry:
    """One error in the memory."""

    def __init__(self, head: memoryview[int], text: memoryview[int]) -> None:
        self._head, self._text = head, text

    @property
    def at(self) -> int:
        """Return when it was written; 0 if it never was."""
        return self._head[_AT]

    @property
    def count(self) -> int:
        """Return how many calls it stands for."""
        return self._head[_COUNT]

    def write(self, at: float, count: int, text: bytes) -> None:
        """Replace what it has. Only the slot's worker does that."""
        sequence = self._head[_SEQUENCE] | 1  # it is odd already where a worker was killed here
        self._head[_SEQUENCE] = sequence
        self._head[_AT], self._head[_COUNT], self._head[_LENGTH] = int(at * _MICRO), count, len(text)
        self._text[: len(text)] = text
        self._head[_SEQUENCE] = sequence + 1

    def read(self) -> Fault | None:
        """Return what it has; None if that is nothing, or is being written."""
        sequence, at, count, length = self._head
        text = bytes(self._text[:length])
        if not length or sequence % 2 or self._head[_SEQUENCE] != sequence:
            return None
        name, outcome, kind, status, detail, request_id = json.loads(text)
        return Fault(name, at / _MICRO, count, outcome, kind, status, detail, request_id)
