"""The state of the service in words and tables, for people without a dashboard: the page ``/`` of the admin port.

Strategy. All numbers are those of the metrics, of the scoreboard and of
:class:`~tornado_fal_proxy.service.recent.RecentCalls`, which all workers share, so any worker can tell of all of them.
The tables of this module are all that is shown, and the rows of each are bounded. Users, queries and bodies are in
none of them, and of headers no more than an excerpt of one that was refused. The account, which has users, is a page of
its own.

It writes no HTML.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tornado_fal_proxy.config import ProxyConfig
from tornado_fal_proxy.errors import StoreUnavailable
from tornado_fal_proxy.rules.endpoints import BACKUP_HOSTS
from tornado_fal_proxy.service.recent import KINDS, OUTCOMES, RECENT_S, Fault, RecentCalls
from tornado_fal_proxy.service.scoreboard import Scoreboard, WorkerLife, WorkerStats
from tornado_fal_proxy.spending.account import Ask, make_report
from tornado_fal_proxy.spending.limits import MILLION, dollars
from tornado_fal_proxy.spending.plans import SpendingRules
from tornado_fal_proxy.spending.store import StoreFailed
from tornado_fal_proxy.upstream.failover import hosts_of

if TYPE_CHECKING:
    from tornado_fal_proxy.service.metrics import Metrics  # needs an extra

__all__ = ["Section", "Share", "Status", "StatusSources"]

# The part of a limit from which on it is close to full.
CLOSE_TO_FULL = 0.8
# Limits how long the page waits for the store of what was spent, and how old its report may be: it adds up rows.
STORE_TIMEOUT_S, ACCOUNT_KEPT_S = 2.0, 30.0

# Advice on errors that came in the last minutes.
ADVICE = {
    "fal responded 401": "fal refuses the key: check FAL_KEY, FAL_KEY_FILE or --resolve-key (or the app answers so)",
    "NameNotFound": "the name of fal's server is not found: check the DNS of this machine",
    "ConnectFailed": "no connection to fal can be made: check the network and its firewall",
    "TlsFailed": "the TLS connection to fal is not trusted: check this machine's clock and certificates, --ca-certs",
    "ConnectionLost": "connections to fal break before the response is complete",
    "MalformedResponse": "responses of fal cannot be understood: check what stands between this machine and fal",
    "UpstreamTimeout": "fal takes too long",
    "TooManyCalls": "all slots were taken: raise --max-in-flight, or use more --processes",
    "BuffersFull": "all buffers were full: raise --max-buffered-bytes, if there is memory for it",
    "StoreUnavailable": "the store of what was spent fails: the log says why, see store failed",
    "KeyMissing": "the proxy has no key: set FAL_KEY or FAL_KEY_FILE",
}


class Share(float):
    """A part of a limit, from 0 on."""


@dataclass(frozen=True)
class Section:
    """A table, with the names of its columns. ``empty`` stands in its place where it has no rows."""

    title: str
    names: tuple[str, ...]
    rows: list[tuple[str | Share, ...]]
    empty: str = ""
    note: str = ""


@dataclass(frozen=True)
class Status:
    """The state at one moment: what needs attention, the numbers of the moment in a line, and the tables."""

    at: str
    attention: list[str]
    summary: str
    sections: list[Section]
    has_account: bool


@dataclass
class StatusSources:
    """Everything from which the state is read.

    ``is_ready`` brings the scoreboard up to date. ``config_of`` and ``ask_of`` return the configuration of the moment,
    and what asks the store for the account; None where nothing is counted.
    """

    metrics: Metrics
    scoreboard: Scoreboard
    recent: RecentCalls
    is_ready: Callable[[], tuple[bool, list[str]]]
    config_of: Callable[[], ProxyConfig]
    ask_of: Callable[[], Ask | None]
    _account: tuple[float, list[tuple[str, float, float]] | str] = field(default=(float("-inf"), []), init=False)

    async def read(self) -> Status:
        """Return the state as it is now."""
        ready, down = self.is_ready()
        now, config, ask = time.time(), self.config_of(), self.ask_of()
        workers, lives, faults = self.scoreboard.workers(), self.scoreboard.lives(), self.recent.faults()
        recent = self.recent.counts()
        samples = list(self.metrics.samples())
        limits = [*_process_limits(workers, config), *(await self._budgets(config, ask, now))]
        sections = [
            _calls(recent, _totals(samples, "fal_proxy_calls_total", "kind", "outcome")),
            _upstream(workers, down, samples),
            _workers(workers, lives, config.max_in_flight, samples),
            _limits(limits),
            _errors(faults, now),
        ]
        if ask is not None:
            sections.append(_spending(samples, self._account[1]))
        return Status(
            at=_clock(now),
            attention=list(_attention(ready, down, recent, lives, limits, faults, now)),
            summary=_summary(workers, recent),
            sections=sections,
            has_account=ask is not None,
        )

    async def _budgets(self, config: ProxyConfig, ask: Ask | None, now: float) -> list[tuple[str, float, float]]:
        """Return the limits of all users together that the account can tell of: those of a day or a month."""
        if ask is None or config.spending is None:
            return []
        if time.monotonic() - self._account[0] > ACCOUNT_KEPT_S or isinstance(self._account[1], str):
            try:
                async with asyncio.timeout(STORE_TIMEOUT_S):
                    found: list[tuple[str, float, float]] | str = await _ask_budgets(config.spending, ask, now)
            except (StoreFailed, StoreUnavailable, TimeoutError) as exc:
                found = f"The store does not tell: {str(exc) or 'it does not respond in time'}."
            self._account = time.monotonic(), found
        return [] if isinstance(self._account[1], str) else self._account[1]


def _process_limits(workers: list[WorkerStats], config: ProxyConfig) -> Iterator[tuple[str, float, float]]:
    """Yield the limits that each process has for itself, with the number of the process that is closest to it."""
    fullest = " (fullest process)" if len(workers) > 1 else ""
    yield f"max_in_flight{fullest}", max(worker.in_flight for worker in workers), config.max_in_flight
    if config.max_buffered_bytes is not None:
        used = max(worker.buffered_bytes for worker in workers)
        yield f"max_buffered_bytes{fullest}", used, config.max_buffered_bytes


async def _ask_budgets(rules: SpendingRules, ask: Ask, now: float) -> list[tuple[str, float, float]]:
    """Return the limits of all users of a day or a month, with what is used up."""
    found: list[tuple[str, float, float]] = []
    today = datetime.fromtimestamp(now, UTC).date().isoformat()
    for period, when, since in (("day", "today", today), ("month", "this month", f"{today[:8]}01")):
        jobs = [] if rules.counts_units else [limit.amount for limit in rules.jobs if limit.period == period]
        budgets = [limit.amount / MILLION for limit in rules.budget if limit.period == period]
        if jobs or budgets:
            total = (await make_report(ask, since, "day", now)).as_json()["total"]
            found += [(f"jobs of all users, {when}", total["jobs"], amount) for amount in jobs]
            found += [(f"dollars of all users, {when}", total["cost"], amount) for amount in budgets]
    return found


Samples = list[tuple[str, dict[str, str], float]]


def _totals(samples: Samples, metric: str, *labels: str) -> Counter[tuple[str, ...]]:
    """Return the sums of a metric by these labels."""
    totals: Counter[tuple[str, ...]] = Counter()
    for name, values, value in samples:
        if name == metric:
            totals[tuple(values.get(label, "") for label in labels)] += round(value)
    return totals


def _summary(workers: list[WorkerStats], recent: dict[tuple[str, str], int]) -> str:
    connections = sum(worker.connections or 0 for worker in workers)
    return (
        f"Calls in flight: {sum(worker.in_flight for worker in workers)}. Connections of clients: {connections}. "
        f"Calls that ended in the last {RECENT_S // 60} minutes: {sum(recent.values())}."
    )


def _attention(
    ready: bool,
    down: list[str],
    recent: dict[tuple[str, str], int],
    lives: list[WorkerLife],
    limits: list[tuple[str, float, float]],
    faults: list[Fault],
    now: float,
) -> Iterator[str]:
    """Yield what an operator should know first."""
    if not ready:
        yield "The service drains: it takes no new calls."
    for host in down:
        yield f"Failover: {host} cannot be reached, its calls go to {BACKUP_HOSTS[host]}."
    yield from _replaced(lives)
    for name, used, limit in limits:
        if used >= CLOSE_TO_FULL * limit:
            yield f"Close to full: {name}, {_number(used)} of {_number(limit)}."
    for fault in faults:
        if now - fault.at < RECENT_S and fault.name in ADVICE:
            yield f"{fault.name}, {_ago(now - fault.at)}: {ADVICE[fault.name]}."
    for outcome in ("upstream_error", "failed"):
        if count := sum(number for (_, each), number in recent.items() if each == outcome):
            total = sum(recent.values())
            yield f"{count} of {total} calls in the last {RECENT_S // 60} minutes ended with outcome {outcome}."


def _replaced(lives: list[WorkerLife]) -> Iterator[str]:
    """Yield which workers are silent, or new."""
    for slot, life in enumerate(lives):
        if life.silent:
            yield f"Worker {slot} is silent: after --worker-timeout-s it is replaced, and the log says worker hung."
        if life.restarts and life.age_s is not None and life.age_s < RECENT_S:
            yield f"Worker {slot} was replaced {_ago(life.age_s)}: see worker hung or worker replaced in the log."


def _calls(recent: dict[tuple[str, str], int], totals: Counter[tuple[str, ...]]) -> Section:
    rows: list[tuple[str | Share, ...]] = [
        (kind, outcome, str(recent[kind, outcome]), str(totals[kind, outcome]))
        for kind in KINDS
        for outcome in OUTCOMES
        if recent[kind, outcome] or totals[kind, outcome]
    ]
    names = ("kind", "outcome", f"last {RECENT_S // 60} minutes", "since the start")
    return Section("Calls", names, rows, "No call is over yet.")


def _upstream(workers: list[WorkerStats], down: list[str], samples: Samples) -> Section:
    rows: list[tuple[str | Share, ...]] = [("connections", str(sum(worker.upstream_connections for worker in workers)))]
    for host, backup in BACKUP_HOSTS.items():
        count = sum(host in hosts_of(worker.down) for worker in workers)
        state = f"down for {count} of {len(workers)} processes: calls go to {backup}" if host in down else "no failover"
        rows.append((host, state))
    rows.append(("calls to the backup", str(_totals(samples, "fal_proxy_failovers_total")[()])))
    codes = _totals(samples, "fal_proxy_upstream_responses_total", "code")
    rows.append(("key refused (responses 401)", str(codes.pop(("401",), 0))))
    rows += [(f"responses {code}", str(count)) for (code,), count in sorted(codes.items()) if count]
    return Section("fal", ("fact", "since the start, or now"), rows)


def _workers(workers: list[WorkerStats], lives: list[WorkerLife], max_in_flight: int, samples: Samples) -> Section:
    rows: list[tuple[str | Share, ...]] = []
    for slot, (worker, life) in enumerate(zip(workers, lives, strict=True)):
        state = "accepts calls" if worker.connections is not None else "silent" if life.silent else "starts or drains"
        age = "" if life.age_s is None else f", since {_span(life.age_s)}"
        calls = f"{worker.in_flight} of {max_in_flight}"
        rows.append((str(slot), f"{state}{age}", calls, str(worker.connections or 0), f"{life.restarts}, {life.hangs}"))
    lost = _totals(samples, "fal_proxy_log_lines_lost_total")[()]
    names = ("worker", "state", "in flight", "connections", "restarts, hung")
    note = "Numbers of other workers may be 5 s old." if len(rows) > 1 else ""
    return Section("Workers", names, rows, note=f"{note} Lines of the log that were lost: {lost}.".strip())


def _limits(limits: list[tuple[str, float, float]]) -> Section:
    rows: list[tuple[str | Share, ...]] = [
        (name, f"{_number(used)} of {_number(limit)}", Share(used / limit if limit else 1.0))
        for name, used, limit in limits
    ]
    return Section("Limits", ("limit", "in use", "share"), rows)


def _errors(faults: list[Fault], now: float) -> Section:
    rows: list[tuple[str | Share, ...]] = []
    for fault in faults:
        said = f"{fault.outcome}, {fault.kind}, status {fault.status}"
        about = f"{fault.detail or '-'} (request_id={fault.request_id})"
        rows.append((fault.name, f"{_clock(fault.at)}, {_ago(now - fault.at)}", str(fault.count), said, about))
    names = ("error", "last", "count", "outcome, kind, status", "detail")
    note = "The latest of each error since the start. The log has all of them: look for the request_id."
    return Section("Last errors", names, rows, "There was no error yet.", note if rows else "")


def _spending(samples: Samples, account: object) -> Section:
    billed = sum(value for name, _, value in samples if name == "fal_proxy_billed_dollars_total")
    rows: list[tuple[str | Share, ...]] = [
        ("paid calls that went to fal", str(sum(_totals(samples, "fal_proxy_jobs_total").values()))),
        ("dollars that fal has billed", _number(float(billed))),
    ]
    refusals = _totals(samples, "fal_proxy_spending_refusals_total", "limit")
    rows += [(f"refused by {limit}", str(count)) for (limit,), count in sorted(refusals.items()) if count]
    rows.append(("failures of the store", str(_totals(samples, "fal_proxy_store_failures_total")[()])))
    return Section("Spending", ("fact", "since the start"), rows, note=account if isinstance(account, str) else "")


def _clock(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _ago(seconds: float) -> str:
    return f"{_span(seconds)} ago"


def _span(seconds: float) -> str:
    """Return a time span in its largest unit."""
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{max(int(seconds), 0)} s"


def _number(number: float) -> str:
    """Return a number of things or bytes, or, if it is no integer, dollars."""
    return f"{number:,}" if isinstance(number, int) else dollars(round(number * MILLION))
