"""What the operator's own tools ask, on an address that callers cannot reach: is it alive, is it ready, how is it.

Strategy. All workers listen on one socket, and whoever answers speaks for all of them. It listens until the process has
ended, so that a drain is seen as one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tornado.web import Application, RequestHandler

if TYPE_CHECKING:
    from tornado_fal_proxy.metrics import Metrics

__all__ = ["HealthHandler", "admin_application"]


class HealthHandler(RequestHandler):
    """``GET /healthz``: the process is alive and its loop turns."""

    def get(self) -> None:
        self.answer(200, b'{"status": "ok"}')

    head = get

    def answer(self, status: int, body: bytes, content_type: str = "application/json") -> None:
        self.set_status(status)
        self.set_header("Content-Type", content_type)
        self.set_header("Cache-Control", "no-store")
        self.finish(body)


class ReadyHandler(HealthHandler):
    """``GET /readyz``: 200 while calls are taken, 503 as soon as the service ends."""

    def initialize(self, is_ready: Callable[[], bool]) -> None:
        self._is_ready = is_ready

    def get(self) -> None:
        if self._is_ready():
            self.answer(200, b'{"status": "ready"}')
        else:
            self.answer(503, b'{"status": "draining"}')

    head = get


class MetricsHandler(HealthHandler):
    """``GET /metrics``, for Prometheus."""

    def initialize(self, metrics: Metrics, look: Callable[[], None]) -> None:
        self._metrics, self._look = metrics, look

    def get(self) -> None:
        self._look()
        self.answer(200, *self._metrics.text(self.request.headers.get("Accept", "")))

    head = get


def admin_application(
    metrics: Metrics, is_ready: Callable[[], bool], look: Callable[[], None], **settings: Any
) -> Application:
    """``look`` is called before the metrics are read, to bring what stands on the board up to date."""
    return Application(
        [
            ("/healthz", HealthHandler),
            ("/readyz", ReadyHandler, {"is_ready": is_ready}),
            ("/metrics", MetricsHandler, {"metrics": metrics, "look": look}),
        ],
        log_function=lambda handler: None,
        **settings,
    )
