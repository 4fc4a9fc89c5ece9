"""Endpoints for the operator's own tools, on an address that clients cannot reach: health, readiness, metrics.

Strategy. All workers listen on one socket, and each can answer for all of them. The socket is open until the calls in
flight are finished, which lets the tools see a drain as a drain. The server is that of clients, so connections that it
has accepted until then still get a response.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from http.client import responses
from typing import TYPE_CHECKING, Any

from tornado.web import Application, RequestHandler

from tornado_fal_proxy.service.connection import Request
from tornado_fal_proxy.service.request_head import RequestFault

if TYPE_CHECKING:
    from tornado_fal_proxy.service.metrics import Metrics  # needs an extra

__all__ = ["AdminApplication", "AdminHandler", "HealthHandler", "admin_application"]


# Returns whether calls are accepted, and the hosts whose calls go to a backup.
IsReady = Callable[[], tuple[bool, list[str]]]


class AdminHandler(RequestHandler):
    """The base of what the operator's tools read."""

    SUPPORTED_METHODS = ("GET", "HEAD")

    def respond(self, status: int, body: bytes, content_type: str = "application/json") -> None:
        """Send a response that nobody may cache."""
        self.set_status(status)
        self.set_header("Content-Type", content_type)
        self.set_header("Cache-Control", "no-store")
        self.finish(body)

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Respond as the proxy does, with ``{"message": ...}``. A 405 names what is allowed."""
        message = f"{responses.get(status_code, 'Error')}."
        if status_code == 405:
            self.set_header("Allow", ", ".join(self.SUPPORTED_METHODS))
            message = f"Only {' and '.join(self.SUPPORTED_METHODS)} are allowed."
        self.set_header("Content-Type", "application/json")
        self.finish(json.dumps({"message": message}))


class HealthHandler(AdminHandler):
    """``GET /healthz``: 200 while the process lives and its loop runs."""

    def get(self) -> None:
        """Respond 200."""
        self.respond(200, b'{"status": "ok"}')

    head = get


class ReadyHandler(AdminHandler):
    """``GET /readyz``: 200 while calls are accepted, 503 as soon as the drain begins.

    ``failed_over`` lists the hosts whose calls go to a backup, where there are any.
    """

    def initialize(self, is_ready: IsReady) -> None:
        """Take the function that decides between the two."""
        self._is_ready = is_ready

    def get(self) -> None:
        """Respond 200 or 503."""
        ready, down = self._is_ready()
        details = {"failed_over": down} if down else {}
        self.respond(
            200 if ready else 503, json.dumps({"status": "ready" if ready else "draining", **details}).encode()
        )

    head = get


class MetricsHandler(AdminHandler):
    """``GET /metrics``, for Prometheus."""

    def initialize(self, metrics: Metrics, refresh: Callable[[], object]) -> None:
        """Take the metrics, and the function that brings them up to date."""
        self._metrics, self._refresh = metrics, refresh

    def get(self) -> None:
        """Respond with the metrics as they are now."""
        self._refresh()
        self.respond(200, *self._metrics.text(self.request.headers.get("Accept", "")))

    head = get


class AdminApplication(Application):
    """The application of the admin port, whose requests are neither logged nor counted."""

    def record_fault(self, request: Request, fault: RequestFault, sent_bytes: int) -> None:
        """Do nothing."""


def admin_application(
    metrics: Metrics,
    is_ready: IsReady,
    refresh: Callable[[], object],
    more: Sequence[tuple[str, type[RequestHandler], dict[str, Any]]] = (),
) -> AdminApplication:
    """Make the application of the admin port. ``refresh`` is called before each reading of the metrics.

    ``more`` are rules beside its own.
    """
    return AdminApplication(
        [
            ("/healthz", HealthHandler),
            ("/readyz", ReadyHandler, {"is_ready": is_ready}),
            ("/metrics", MetricsHandler, {"metrics": metrics, "refresh": refresh}),
            *more,
        ],
        log_function=lambda handler: None,
    )
