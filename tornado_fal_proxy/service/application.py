"""The Tornado application of the service: the proxy's route, its health check, and 404 for everything else.

Strategy. The application finds out who the client is, sends away requests that come too late or are too many, and gives
each call that is over to the access log and the metrics. The relaying is all done by
:class:`~tornado_fal_proxy.handler.FalProxyHandler`.
"""

from __future__ import annotations

import asyncio
import json
import weakref
from collections.abc import Callable, Container, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tornado.http1connection import HTTP1Connection
from tornado.httputil import HTTPHeaders, HTTPServerRequest
from tornado.iostream import IOStream
from tornado.routing import URLSpec
from tornado.web import Application, RequestHandler, stream_request_body

from tornado_fal_proxy.config import ProxyConfig
from tornado_fal_proxy.errors import BodyTooLarge
from tornado_fal_proxy.handler import FalProxyHandler
from tornado_fal_proxy.relay.backend import close_backend, renew_backend, succeed_backend
from tornado_fal_proxy.rules.excerpt import excerpt
from tornado_fal_proxy.rules.trusted_proxies import TrustedProxies
from tornado_fal_proxy.service.access_log import AccessLog
from tornado_fal_proxy.service.admin import HealthHandler
from tornado_fal_proxy.service.connection import Request, close_after, peer_of
from tornado_fal_proxy.service.key_alarm import KeyAlarm
from tornado_fal_proxy.service.recent import RecentWriter
from tornado_fal_proxy.service.request_head import RequestFault
from tornado_fal_proxy.service.trimming import Trimmer
from tornado_fal_proxy.telemetry import Call

if TYPE_CHECKING:
    from tornado_fal_proxy.service.metrics import Metrics  # needs an extra

__all__ = ["CLOSING", "FULL", "NOT_FOUND", "ProxyApplication", "make_application"]

# The responses that the service gives without relaying. Nothing was sent to fal: after a 503 the client may try again,
# and finds another process.
NOT_FOUND = {"status": 404, "message": "Not found.", "error": "NotFound"}
UNKNOWN_METHOD = {"status": 501, "message": "This server does not know the method.", "error": "UnknownMethod"}
CLOSING = {"status": 503, "message": "The proxy is closing; try again.", "error": "Closing"}
FULL = {"status": 503, "message": "The proxy has no room for another connection; try again.", "error": "NoRoom"}

NO_PROXIES = TrustedProxies()


class Lease:
    """A configuration in use: it lives as long as calls come that have it, or one that came is not over."""


class LoggedHandler(FalProxyHandler):
    """The proxy's handler, which passes each call that is over to the application."""

    def initialize(self, config: ProxyConfig | None = None, **unknown: object) -> None:
        """Take the configuration with its lease, and the faults of the request's body."""
        self._lease = unknown.pop("lease", None)
        super().initialize(config, **unknown)
        if isinstance(self.request.connection, Request):
            self.request.connection.fault_handler = weakref.ref(self)

    async def prepare(self) -> None:
        """Decide as the handler does, and let the connection refuse a chunk that is too large before it comes."""
        await super().prepare()
        self._connection.set_max_body_size(self._config.max_body_bytes)

    def refuse(self, fault: RequestFault) -> None:
        """Respond to a body that cannot be read, or is larger than was declared."""
        self._drop_body()
        self._refuse(BodyTooLarge() if fault.status == BodyTooLarge.status else fault)

    def on_call_end(self, call: Call) -> None:
        """Log and count the call."""
        assert isinstance(self.application, ProxyApplication)
        self.application.record(call, self.request.remote_ip or "")


class _Any(Container[str]):
    """All methods: Tornado answers others by itself, with a page."""

    def __contains__(self, method: object) -> bool:
        return True


@stream_request_body
class MessageHandler(RequestHandler):
    """Responds to every request with a status and, like the proxy, with ``{"message": ...}``.

    The response leaves as soon as the head has come. No body is kept, and a request that has one is the last on its
    connection.
    """

    SUPPORTED_METHODS = _Any()  # type: ignore[assignment]

    def initialize(self, status: int, message: str, error: str) -> None:
        """Take the response, and the error's name in log and metrics."""
        self.set_status(status)
        self._message = message
        self.status, self.error = status, error
        self.set_header("Content-Type", "application/json")

    def prepare(self) -> None:
        """Respond, whatever the method is."""
        connection = self.request.connection
        assert isinstance(connection, HTTP1Connection)
        if not connection._read_finished:
            close_after(connection)
        self.finish(json.dumps({"message": self._message}))

    def data_received(self, chunk: bytes) -> None:
        """Drop a part of the body."""


class OptionsHandler(RequestHandler):
    """``OPTIONS *``: the methods that the server has (RFC 9110 section 9.3.7)."""

    SUPPORTED_METHODS = ("OPTIONS",)

    def options(self) -> None:
        """Respond 204."""
        self.set_status(204)
        self.set_header("Allow", "GET, HEAD, POST, PUT, OPTIONS")


class ProxyApplication(Application):
    """The application of one process.

    ``closing`` is set when the process ends, and concerns connections that are still open then. ``shed`` holds
    connections for which there are too few open files. ``host_header`` is the header, if any, in which the sandbox is
    told how the client calls this machine.
    """

    closing = False
    access_log: AccessLog | None = None
    metrics: Metrics | None = None
    recent: RecentWriter | None = None
    key_alarm: KeyAlarm | None = None
    host_header: str | None = None
    trimmer: Trimmer | None = None

    def __init__(self, config: ProxyConfig, route: str, trusted: TrustedProxies, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.config, self.route, self._trusted = config, route, trusted
        self._lease = Lease()
        self._handler_arguments = {"config": config, "lease": self._lease}
        self._leases: weakref.WeakValueDictionary[ProxyConfig, Lease] = weakref.WeakValueDictionary()
        self.shed: weakref.WeakSet[IOStream] = weakref.WeakSet()

    def use(self, config: ProxyConfig, trusted: TrustedProxies) -> None:
        """Serve requests that come from now on with this configuration. Needs a running loop.

        The connections of the one before are closed when its last call is over.
        """
        before = self.config
        self._trusted = trusted
        renew_backend(self, config)  # one that is equal may have had other prices, and calls that still run
        if config != before:
            succeed_backend(self, before, config)
            self._leases[before] = self._lease
            loop = asyncio.get_running_loop()
            weakref.finalize(self._lease, _call_soon, loop, self._close_unused, before).atexit = False
            self._lease = self._leases.get(config) or Lease()
        self.config, self._handler_arguments = config, {"config": config, "lease": self._lease}
        if self.metrics is not None:
            self.metrics.use(config)

    def _close_unused(self, config: ProxyConfig) -> None:
        if config != self.config:
            close_backend(self, config)

    def find_handler(self, request: HTTPServerRequest, **kwargs: Any) -> Any:
        """Choose who responds, and set the request's ``remote_ip`` to the client's address."""
        connection = request.connection
        assert isinstance(connection, HTTP1Connection)
        request.remote_ip = self._client(connection, request.headers)
        if self.closing or (self.shed and connection.stream in self.shed):
            close_after(connection)
            return self.get_handler_delegate(request, MessageHandler, CLOSING if self.closing else FULL)
        if request.path == self.route:
            if self.host_header is not None:
                request.headers[self.host_header] = request.headers.get("Host", "")
            return self.get_handler_delegate(request, LoggedHandler, self._handler_arguments)
        if request.method not in RequestHandler.SUPPORTED_METHODS:
            return self.get_handler_delegate(request, MessageHandler, UNKNOWN_METHOD)
        return super().find_handler(request, **kwargs)

    def _client(self, connection: HTTP1Connection, headers: HTTPHeaders | None) -> str:
        """Return the client's address. Without headers it is the peer's, because no proxy could name another."""
        return self._trusted.client(peer_of(connection), [] if headers is None else headers.get_list("X-Forwarded-For"))

    def log_request(self, handler: RequestHandler) -> None:
        """Log and count a request that was no call of the proxy."""
        if isinstance(handler, FalProxyHandler | HealthHandler):
            return  # on_call_end() has done it; and health checks come every few seconds
        request, status = handler.request, handler.get_status()
        call = Call(request.method or "", None)
        call.began -= request.request_time()
        call.mark_first_byte()
        call.sent_bytes = int(handler._headers.get("Content-Length", 0))
        if isinstance(handler, MessageHandler) and status == handler.status:
            call.error = handler.error
            call.detail = excerpt(request.path)
        elif status >= 400:
            call.error = "HTTPError"
        call.finish(status)
        self.record(call, request.remote_ip or "")

    def record_fault(self, request: Request, fault: RequestFault, sent_bytes: int) -> None:
        """Log and count a request that its connection has answered, because it cannot be read."""
        call = Call(request.method, None)
        call.mark_first_byte()
        call.sent_bytes = sent_bytes
        call.finish(fault.status, fault)
        self.record(call, self._client(request, request.headers))

    def record(self, call: Call, client: str) -> None:
        """Log and count a call that is over."""
        if self.key_alarm is not None:
            self.key_alarm.note(call)
        if self.access_log is not None:
            self.access_log.add(call, client)
        if self.metrics is not None:
            self.metrics.count(call)
        if self.recent is not None:
            self.recent.note(call)
        if self.trimmer is not None:
            self.trimmer.start()


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *args: object) -> None:
    """Call a function in the loop, from whatever thread; not any more when the loop has ended."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *args)


def make_application(
    config: ProxyConfig, route: str, more: Sequence[URLSpec] = (), trusted: TrustedProxies = NO_PROXIES
) -> ProxyApplication:
    """Make the application that relays on ``route``, with the rules ``more`` beside its own."""
    return ProxyApplication(
        config,
        route,
        trusted,
        [
            URLSpec("/healthz", HealthHandler),
            URLSpec(r"\*", OptionsHandler),
            *more,
        ],
        default_handler_class=MessageHandler,
        default_handler_args=NOT_FOUND,
    )
