"""Counters and histograms of all worker processes, as Prometheus reads them.

Strategy. ``prometheus_client`` (the extra ``metrics``) counts. With several workers its values are in files that all of
them read, one set for each worker's row and not for each process, so that whoever takes the place of one that died goes
on counting where that one was cut off. What is a number of the moment (calls in flight, connections) stands on the
workers' :class:`~tornado_fal_proxy.workers.Board`, which forgets a worker that dies. Every label has few values,
whatever callers send.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import prometheus_client
import pycurl
import tornado
from prometheus_client import CollectorRegistry, Counter, Histogram, values
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from tornado_fal_proxy._version import __version__
from tornado_fal_proxy.telemetry import Call, endpoint_class
from tornado_fal_proxy.workers import Board

__all__ = ["Metrics"]

# Short calls on one end, models that think for many minutes on the other.
BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The metrics of the worker in ``row``; in ``directory``, which the workers share, where there are several."""

    def __init__(self, board: Board, row: int, directory: str | None, max_in_flight: int) -> None:
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # several workers have none either
        registry = CollectorRegistry()
        if directory is not None:
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = directory
            values.ValueClass = values.MultiProcessValue(lambda: row)  # type: ignore[no-untyped-call]

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, namespace="fal_proxy", registry=registry)

        def seconds(name: str, text: str) -> Histogram:
            return Histogram(name, text, ["endpoint"], namespace="fal_proxy", registry=registry, buckets=BUCKETS_S)

        self._calls = counter("calls", "Calls that are over.", "method", "endpoint", "outcome", "why")
        self._answers = counter("upstream_answers", "Answers of fal's server.", "protocol", "status")
        self._bytes = counter("body_bytes", "Bytes of bodies from callers and to them.", "direction")
        self._cancellations = counter("cancellations", "Calls to fal that were ended because their caller left.")
        self._first_byte = seconds("first_byte_seconds", "From the head of a call to the first byte of fal's answer.")
        self._total = seconds("call_seconds", "From the head of a call to its end, where fal was asked.")
        # What labels() finds out for each call is kept: it takes as long as to count.
        self._calls_of = lru_cache(4096)(self._calls.labels)
        self._answers_of = lru_cache(1024)(lambda protocol, status: self._answers.labels(protocol, f"{status}xx"))
        self._first_byte_of = lru_cache(64)(self._first_byte.labels)
        self._total_of = lru_cache(64)(self._total.labels)
        self._received, self._sent = self._bytes.labels("received"), self._bytes.labels("sent")
        if directory is not None:
            registry = CollectorRegistry()
            MultiProcessCollector(registry, directory)  # type: ignore[no-untyped-call]
        registry.register(_OfTheBoard(board, max_in_flight))
        self._registry = registry

    def count(self, call: Call) -> None:
        """A call is over."""
        endpoint = endpoint_class(call.target)
        self._calls_of(call.method, endpoint, call.outcome, call.why).inc()
        if call.relayed:
            if call.head is not None and call.first_byte_s is not None:
                self._answers_of(call.head.protocol, call.head.status // 100).inc()
                self._first_byte_of(endpoint).observe(call.first_byte_s)
            self._total_of(endpoint).observe(call.seconds)
            if call.outcome == "caller_gone":
                self._cancellations.inc()
        if call.received_bytes:
            self._received.inc(call.received_bytes)
        if call.sent_bytes:
            self._sent.inc(call.sent_bytes)

    def text(self, accept: str) -> tuple[bytes, str]:
        """All workers' metrics, in the format that ``accept`` asks for, and its content type."""
        encode, content_type = prometheus_client.exposition.choose_encoder(accept)
        return encode(self._registry), content_type


class _OfTheBoard(Collector):
    def __init__(self, board: Board, max_in_flight: int) -> None:
        self._board, self._max_in_flight = board, max_in_flight

    def collect(self) -> Iterator[Metric]:
        def gauge(name: str, text: str, value: float) -> Metric:
            return GaugeMetricFamily("fal_proxy_" + name, text, value)

        everyone = self._board.rows()
        rows = [row for row in everyone if row.connections is not None]
        yield gauge("workers", "Worker processes that take calls.", len(rows))
        yield gauge("workers_wanted", "Worker processes that there are to be.", len(everyone))
        yield gauge("in_flight", "Calls that are being served.", sum(row.in_flight for row in everyone))
        yield gauge("max_in_flight", "Calls that can be served at once.", self._max_in_flight * len(rows))
        yield gauge("caller_connections", "Connections of callers.", sum(row.connections or 0 for row in rows))
        yield gauge("upstream_connections", "Connections to fal.", sum(row.upstream_connections for row in everyone))
        restarts = CounterMetricFamily("fal_proxy_worker_restarts", "Workers that took the place of one that ended.")
        restarts.add_metric([], self._board.restarts())
        yield restarts
        yield InfoMetricFamily("fal_proxy_build", "Versions.", _versions())


def _versions() -> dict[str, str]:
    libcurl: Any = pycurl.version_info()[1]
    return {
        "version": __version__,
        "python": platform.python_version(),
        "tornado": tornado.version,
        "libcurl": libcurl,
    }
