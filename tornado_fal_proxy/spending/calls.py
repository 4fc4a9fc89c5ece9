"""Follow one call from its reservation to its end: a paid call, or a free call of a queued job.

Strategy. The handler tells a call three things: each piece of the response's body, that the response is complete, and
that there is none or not all of it. This module decides, once for each call, which of that the store must know:

* fal's bill settles the call.
* A status by which fal says that nothing ran, or for which it does not charge, gives the call back.
* Any other complete response ends the call, and the estimate stays. A submit is no end: its job gets fal's id.
* Without a complete response the call is given back if it certainly did not leave. Otherwise it may still run: the
  estimate stays, and the call counts as unfinished up to its lifetime.

Sources: fal's pages on billing and on its queue.
"""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import suppress
from typing import Protocol

from tornado_fal_proxy.rules.endpoints import is_request_id
from tornado_fal_proxy.rules.headers import Pairs, ResponseHead
from tornado_fal_proxy.spending.ledger import Ledger
from tornado_fal_proxy.spending.plans import Terms
from tornado_fal_proxy.spending.prices import billed_units
from tornado_fal_proxy.spending.refusals import limit_fields, refusal
from tornado_fal_proxy.spending.store import END, GIVE_BACK, SETTLE, Note, Standing

__all__ = ["JobCall", "PaidCall", "SpendingCall", "submitted_id"]

# Limits what is kept of the response to a submit, which has a few hundred bytes.
MAX_SUBMIT_BYTES = 65_536
# The statuses by which fal, or what stands before it, says that a call did not run. It does not charge for its own
# errors (500 and more) either. A 504 says no more than that the result took too long.
_DID_NOT_RUN = frozenset({401, 403, 404, 405, 413, 415, 429})
_MAY_HAVE_RUN = 504
# A queued job's status in JSON, or in an event. In a string of JSON each quotation mark has a backslash before it, so
# nothing that a model has written matches.
_COMPLETED = re.compile(rb'"status"[ \t\r\n]{0,8}:[ \t\r\n]{0,8}"COMPLETED"')
_MAX_COMPLETED_BYTES = 40


def did_not_run(status: int) -> bool:
    """Return whether a response with this status, and without a bill, says that nothing is charged."""
    return status in _DID_NOT_RUN or (status >= 500 and status != _MAY_HAVE_RUN)


def submitted_id(head: ResponseHead, body: bytes) -> str | None:
    """Return the id that fal has given a job, from its response to the submit; None where there is none."""
    with suppress(ValueError, RecursionError):
        fields = json.loads(body)
        found = fields.get("request_id") if isinstance(fields, dict) else None
        if isinstance(found, str) and is_request_id(found):
            return found
    ids = [value for name, value in head.headers if name == "x-fal-request-id" and is_request_id(value)]
    return ids[0] if len(ids) == 1 else None


class SpendingCall(Protocol):
    """Describe what a response needs of the call that it belongs to.

    ``user`` and ``endpoint`` are those of the paid call.
    ``units`` and ``cost`` are millionths: an estimate, or the bill where that is known, and then ``billed`` is true.
    """

    job_id: str | None
    user: str | None
    endpoint: str | None
    units: int | None
    cost: int | None
    billed: bool

    def limit_fields(self, head: ResponseHead | None) -> Pairs:
        """Return what the client is told of its limits, with fal's response, or with one of the proxy's own."""

    def tap(self, data: bytes) -> None:
        """Take a piece of the response's body."""

    async def complete(self, head: ResponseHead) -> None:
        """Note that the response is complete, before its last byte leaves."""

    def abandon(self, head: ResponseHead | None, *, sent: bool) -> None:
        """Note that the response is not complete, unless it is. ``sent`` tells whether the request may have left."""


class PaidCall:
    """A paid call, from before its reservation. It may also pass unreserved, while the store fails."""

    def __init__(self, ledger: Ledger, terms: Terms, *, queued: bool) -> None:
        self.job_id: str | None = None
        self.user: str | None = terms.reservation.user
        self.endpoint: str | None = terms.reservation.endpoint
        self.units: int | None = terms.reservation.units
        self.cost: int | None = None if terms.price is None else terms.reservation.cost
        self.billed = False
        self._ledger, self._terms, self._queued = ledger, terms, queued
        self._id = terms.reservation.id
        self._standing: Standing | None = None
        self._over = self._given_back = False
        self._body = b""
        self._billed_by: ResponseHead | None = None
        self._known_bill: tuple[int, int | None] | None = None

    async def reserve(self) -> None:
        """Reserve the call. Raise SpendingRefused or StoreUnavailable."""
        ledger, terms = self._ledger, self._terms
        ledger.unfinished += 1
        try:
            standing = self._standing = await ledger.reserve(terms)
            if standing is not None and standing.refused_by is not None:
                raise refusal(terms, standing, ledger.now())
        except asyncio.CancelledError:
            self.abandon(None, sent=False)
            raise
        except BaseException:
            self._is_first_end()
            raise

    def limit_fields(self, head: ResponseHead | None) -> Pairs:
        """Return what is left of the user's limits, as it is when fal's response with that head is complete.

        A stream may still break, so nothing of it is known before its end.
        """
        if self._standing is None:
            return ()
        job = self._terms.reservation
        jobs, cost, unfinished = job.jobs, job.cost, 1
        if self._given_back:
            jobs = cost = unfinished = 0
        elif head is not None and not head.streams and not self._is_taken(head):
            unfinished = 0
            if (bill := self._bill(head)) is not None:
                cost = bill[1] or 0
            elif did_not_run(head.status):
                jobs = cost = 0
        used = self._standing.used
        if (jobs, cost) != (job.jobs, job.cost):
            more = [jobs - job.jobs] * len(job.job_counters) + [cost - job.cost] * len(job.cost_counters)
            used = [value + each for value, each in zip(used, more, strict=True)]
        standing = Standing(used, self._standing.unfinished - 1 + unfinished, None)
        return limit_fields(self._terms, standing, self._ledger.now())

    def tap(self, data: bytes) -> None:
        """Keep the response to a submit, which has the job's id."""
        if self._queued and len(self._body) <= MAX_SUBMIT_BYTES:
            self._body += data[: MAX_SUBMIT_BYTES + 1 - len(self._body)]  # a larger one is cut, and so no JSON

    async def complete(self, head: ResponseHead) -> None:
        """Settle, give back or end the call, or give its job fal's id."""
        if self._is_first_end() and (noted := self._note(head, ends=True)) is not None:
            await noted

    def abandon(self, head: ResponseHead | None, *, sent: bool) -> None:
        """Give the call back if it did not leave. Otherwise note what the head says, if that is all there is to say."""
        if not self._is_first_end():
            return
        if not sent:
            self._give_back()
        elif head is not None and not head.streams:
            self._note(head, ends=False)

    def _is_first_end(self) -> bool:
        first, self._over = not self._over, True
        self._ledger.unfinished -= first
        return first

    def _note(self, head: ResponseHead, *, ends: bool) -> asyncio.Future[None] | None:
        """Note what a head says of the call. Where it says nothing, ``ends`` tells whether the call is over."""
        job = self._terms.reservation
        if self._is_taken(head):
            return self._submitted(head)
        if (bill := self._bill(head)) is not None:
            (self.units, self.cost), self.billed = bill, True
            note = Note(SETTLE, self._id, *bill)
            return self._write(note, bool(job.cost_counters) and (self.cost or 0) < job.cost)
        if did_not_run(head.status):
            return self._give_back()
        return self._write(Note(END, self._id), False) if ends else None

    def _write(self, note: Note, makes_room: bool) -> asyncio.Future[None] | None:
        """Note it, and return what to wait for: only where another call may have room then."""
        if makes_room or self._terms.reservation.max_unfinished is not None:
            return self._ledger.note_now(note)
        self._ledger.note(note)
        return None

    def _is_taken(self, head: ResponseHead) -> bool:
        """Tell whether fal has taken a job into its queue."""
        return self._queued and 200 <= head.status < 300

    def _bill(self, head: ResponseHead) -> tuple[int, int | None] | None:
        """Return the units and the cost that a head bills; None where it has no bill."""
        if self._billed_by is not head:
            units, price = billed_units(head.headers), self._terms.price
            self._billed_by = head
            self._known_bill = None if units is None else (units, None if price is None else price.cost(units))
        return self._known_bill

    def _give_back(self) -> asyncio.Future[None] | None:
        self._given_back = True
        self.units, self.cost = 0, None if self.cost is None else 0
        return self._write(Note(GIVE_BACK, self._id), True)

    def _submitted(self, head: ResponseHead) -> asyncio.Future[None] | None:
        self.job_id = submitted_id(head, self._body)
        if self.job_id is None:
            return None
        job = self._terms.reservation
        return self._ledger.submitted(self._id, self.job_id, job.user, job.endpoint)


class JobCall:
    """A free call of a queued job: its status, as JSON or as events, its result, or its cancel."""

    def __init__(self, ledger: Ledger, job_id: str, kind: str) -> None:
        self.job_id: str | None = job_id
        self.user: str | None = None
        self.endpoint: str | None = None
        self.units: int | None = None
        self.cost: int | None = None
        self.billed = False
        self._ledger, self._id, self._kind = ledger, job_id, kind
        self._tail = b""
        self._completed = False

    def limit_fields(self, _head: ResponseHead | None) -> Pairs:
        """Return nothing: a free call tells nothing of limits, because it does not ask the store."""
        return ()

    def tap(self, data: bytes) -> None:
        """Look for the status that ends the job."""
        if self._completed or self._kind not in ("queue_status", "queue_stream"):
            return
        data = self._tail + data
        self._completed = _COMPLETED.search(data) is not None
        self._tail = data[-_MAX_COMPLETED_BYTES:]

    async def complete(self, head: ResponseHead) -> None:
        """Settle or end the job, where the response says so."""
        await self._ledger.wait(self._note(head))
        if self.units is not None:
            self.billed = True
            known = self._ledger.known(self._id)
            self.user, self.endpoint, self.cost = known.user, known.endpoint, known.cost

    def abandon(self, head: ResponseHead | None, *, sent: bool) -> None:
        """Do as if the response were complete: it says nothing else, and nothing is noted twice."""
        if head is not None and sent:
            self._note(head)

    def _note(self, head: ResponseHead) -> asyncio.Future[None] | None:
        accepted = 200 <= head.status < 300
        if self._kind == "queue_result":
            # 202 is the response to a request for a result that is not there yet, and 422 is a result that is an error.
            if head.status == 202 or not (accepted or head.status == 422):
                return None
            if (units := billed_units(head.headers)) is not None:
                settles = self._ledger.settle_job(self._id, units)
                self.units = None if settles is None else units  # else another call has reported it
                return settles
        elif not accepted or not (self._completed or self._kind == "queue_cancel"):
            return None
        return self._ledger.end_job(self._id)
