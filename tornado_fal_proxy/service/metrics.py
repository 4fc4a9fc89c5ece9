"""Counters and histograms of all worker processes, for Prometheus.

Strategy. ``prometheus_client`` (the extra ``metrics``) counts. With several workers its values are in files that all of
them read. There is a set of files for each slot and not for each process, so the worker that replaces one that died
goes on with its counts. Numbers of the moment, such as calls in flight and connections, are on the workers'
:class:`~tornado_fal_proxy.service.scoreboard.Scoreboard`, from which those of a dead worker are cleared. Every label
has few values, whatever clients send.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from functools import lru_cache
from http import HTTPStatus
from typing import Any

import prometheus_client
import pycurl
import tornado
from prometheus_client import CollectorRegistry, Counter, Histogram, values
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from tornado_fal_proxy._version import __version__
from tornado_fal_proxy.config import ProxyConfig
from tornado_fal_proxy.errors import LimitReached, QuotaUsedUp
from tornado_fal_proxy.rules.endpoints import BACKUP_HOSTS, kind_of
from tornado_fal_proxy.service.scoreboard import Scoreboard
from tornado_fal_proxy.spending.ledger import OPERATIONS
from tornado_fal_proxy.spending.plans import NO_RULES
from tornado_fal_proxy.telemetry import Call
from tornado_fal_proxy.upstream.failover import hosts_of

__all__ = ["Metrics"]

# Upper bounds of the histograms' buckets: refusals take milliseconds, slow models many minutes.
BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

# The statuses that have a number of their own in a label. An app on fal.run may answer with any number, and a label has
# few values: those that HTTP defines, and nginx's for a client that left.
CODES = frozenset({*HTTPStatus, 499})


# The errors of calls that a limit has refused.
LIMITED = (LimitReached.__name__, QuotaUsedUp.__name__)


class Metrics:
    """The metrics of the worker in ``slot``. ``directory`` is shared by the workers, and None if there is only one."""

    def __init__(self, scoreboard: Scoreboard, slot: int, directory: str | None, config: ProxyConfig) -> None:
        # Metrics of several workers do not have these either.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        registry = CollectorRegistry()
        # The library chooses by PROMETHEUS_MULTIPROC_DIR, which may name a directory that is not ours, or none.
        values.ValueClass = values.MutexValue
        if directory is not None:
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = directory
            values.ValueClass = values.MultiProcessValue(lambda: slot)  # type: ignore[no-untyped-call]

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, namespace="fal_proxy", registry=registry)

        def seconds(name: str, text: str) -> Histogram:
            return Histogram(name, text, ["kind"], namespace="fal_proxy", registry=registry, buckets=BUCKETS_S)

        self._calls = counter("calls", "Calls that are over.", "method", "kind", "outcome", "error")
        self._responses = counter("upstream_responses", "Responses of fal's servers.", "protocol", "status", "code")
        self._bytes = counter("body_bytes", "Bytes of bodies from clients and to them.", "direction")
        self._cancellations = counter("cancellations", "Calls to fal that were cancelled because the client left.")
        self._first_byte = seconds("first_byte_seconds", "From a call's head to the first byte of fal's response.")
        self._total = seconds("call_seconds", "From a call's head to its end, if fal was called.")
        self._jobs = counter("jobs", "Paid calls that went to fal.", "endpoint")
        self._units = counter("billed_units", "Units that fal has billed.", "endpoint")
        self._dollars = counter("billed_dollars", "Dollars of fal's bills, by the configured prices.", "endpoint")
        self._failovers = counter("failovers", "Calls that went to fal's backup domain.")
        self._refusals = counter("spending_refusals", "Paid calls that a limit has refused.", "limit")
        self._store_failures = counter("store_failures", "Operations that the store failed to do.", "operation")
        # The results of labels() are cached, because one takes as long as counting does.
        self._calls_of = lru_cache(4096)(self._calls.labels)
        self._responses_of = lru_cache(1024)(self._labels_of_response)
        for protocol in ("1.1", "2"):
            for status in (401, 403):  # from 0 on, because Prometheus takes a counter's first value for none
                self._responses_of(protocol, status)
        if config.spending is not None and config.spending.needs_store:
            for operation in OPERATIONS:
                self._store_failures.labels(operation)
            if config.spending.budget:
                self._refusals.labels("budget")
        self._first_byte_of = lru_cache(64)(self._first_byte.labels)
        self._total_of = lru_cache(64)(self._total.labels)
        self._received, self._sent = self._bytes.labels("received"), self._bytes.labels("sent")
        if directory is not None:
            registry = CollectorRegistry()
            MultiProcessCollector(registry, directory)  # type: ignore[no-untyped-call]
        self._on_scoreboard = _ScoreboardCollector(scoreboard)
        registry.register(self._on_scoreboard)
        self._registry = registry
        self.use(config)

    def use(self, config: ProxyConfig) -> None:
        """Take the labels of endpoints, and the most calls at once, from this configuration."""
        self._label_of = lru_cache(1024)((config.spending or NO_RULES).label)
        self._on_scoreboard.max_in_flight = config.max_in_flight

    def count(self, call: Call) -> None:
        """Count a call that is over."""
        kind = kind_of(call.target)
        self._calls_of(call.method, kind, call.outcome, call.error).inc()
        if call.relayed:
            if call.head is not None and call.first_byte_s is not None:
                self._responses_of(call.head.protocol, call.head.status).inc()
                self._first_byte_of(kind).observe(call.first_byte_s)
            self._total_of(kind).observe(call.seconds)
            if call.failed_over:
                self._failovers.inc()
            if call.outcome == "client_disconnected":
                self._cancellations.inc()
        if call.received_bytes:
            self._received.inc(call.received_bytes)
        if call.sent_bytes:
            self._sent.inc(call.sent_bytes)
        if call.accounted:
            self._count_spending(call)

    def _count_spending(self, call: Call) -> None:
        if call.error in LIMITED:
            self._refusals.labels(call.detail.partition(":")[0]).inc()
        if call.endpoint is None:
            return
        endpoint = self._label_of(call.endpoint)
        if call.relayed and call.target is not None and call.target.paid:
            self._jobs.labels(endpoint).inc()
        if call.billed:
            self._units.labels(endpoint).inc(float(call.units or 0))
            self._dollars.labels(endpoint).inc(float(call.cost or 0))

    def count_store_failures(self, failures: Mapping[str, int]) -> None:
        """Count failures of a store, by the operation that failed."""
        for operation, count in failures.items():
            self._store_failures.labels(operation).inc(count)

    def _labels_of_response(self, protocol: str, status: int) -> Any:
        """Return the counter of the responses with that protocol and status."""
        code = str(status) if status in CODES else "other"
        return self._responses.labels(protocol, f"{status // 100}xx", code)

    def samples(self) -> Iterator[tuple[str, dict[str, str], float]]:
        """Yield all workers' metrics: name, labels and value of each."""
        for family in self._registry.collect():
            yield from ((sample.name, sample.labels, sample.value) for sample in family.samples)

    def text(self, accept: str) -> tuple[bytes, str]:
        """Return all workers' metrics, in the format that ``accept`` asks for, and their content type."""
        encode, content_type = prometheus_client.exposition.choose_encoder(accept)
        return encode(self._registry), content_type


class _ScoreboardCollector(Collector):
    """The numbers of the moment, and the build."""

    max_in_flight = 0

    def __init__(self, scoreboard: Scoreboard) -> None:
        self._scoreboard = scoreboard

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as they are now."""

        def gauge(name: str, text: str, value: float) -> Metric:
            return GaugeMetricFamily("fal_proxy_" + name, text, value)

        def counter(name: str, text: str, value: float) -> Metric:
            return CounterMetricFamily("fal_proxy_" + name, text, value)

        workers = self._scoreboard.workers()
        accepting = [worker for worker in workers if worker.connections is not None]
        connections = sum(worker.connections or 0 for worker in accepting)
        upstream_connections = sum(worker.upstream_connections for worker in workers)
        yield gauge("workers", "Worker processes that accept calls.", len(accepting))
        yield gauge("workers_expected", "Worker processes that there should be.", len(workers))
        yield gauge("in_flight", "Calls that are being served.", sum(worker.in_flight for worker in workers))
        yield gauge("max_in_flight", "Calls that can be served at once.", self.max_in_flight * len(accepting))
        yield gauge("client_connections", "Connections of clients.", connections)
        yield gauge("upstream_connections", "Connections to fal.", upstream_connections)
        failed_over = GaugeMetricFamily(
            "fal_proxy_failed_over", "Worker processes whose calls to a host go to its backup.", labels=["host"]
        )
        for host in BACKUP_HOSTS:
            failed_over.add_metric([host], sum(host in hosts_of(worker.down) for worker in workers))
        yield failed_over
        yield counter("worker_restarts", "Workers that replaced one that ended.", self._scoreboard.restarts())
        yield counter("worker_hangs", "Workers that were killed because they hung.", self._scoreboard.hangs())
        yield counter("log_lines_lost", "Lines of the log that nobody read in time.", self._scoreboard.lost_lines())
        yield InfoMetricFamily("fal_proxy_build", "Versions.", _versions())


def _versions() -> dict[str, str]:
    libcurl: Any = pycurl.version_info()[1]
    return {
        "version": __version__,
        "python": platform.python_version(),
        "tornado": tornado.version,
        "libcurl": libcurl,
    }
