"""Serve with the command's own server and application in the loop of the test."""

import socket
from collections.abc import Sequence
from typing import Any

from tornado.routing import URLSpec

from tests.support.proxy import ROUTE, Setup
from tests.support.scripted_upstream import Upstream
from tornado_fal_proxy import close_upstreams
from tornado_fal_proxy.service.application import ProxyApplication, make_application
from tornado_fal_proxy.service.server import NoNeighbours, Server
from tornado_fal_proxy.telemetry import Call

__all__ = ["HEALTH", "Entries", "serve", "serve_and_log"]

HEALTH = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"


class Entries(list[dict[str, Any]]):
    """An access log that keeps the fields of its lines."""

    def add(self, call: Call, client: str) -> None:
        """Keep the fields of a call that is over."""
        self.append(call.fields(client))


def serve(setup: Setup, upstream: Upstream | None = None, **fields: Any) -> int:
    """Serve in front of ``upstream``, or of none, and return the port."""
    return serve_and_log(setup, upstream, **fields)[0]


def serve_and_log(
    setup: Setup,
    upstream: Upstream | None = None,
    more: Sequence[URLSpec] = (),
    listener: socket.socket | None = None,
    **fields: Any,
) -> tuple[int, Entries]:
    """Do as ``serve`` with the rules ``more`` beside its own, and return the access log too.

    ``listener`` is a socket that listens already.
    """
    config = setup.config(upstream or "127.0.0.1:1", **fields)
    application: ProxyApplication = make_application(config, ROUTE, more)
    entries = Entries()
    application.access_log = entries  # type: ignore[assignment]
    listener = listener or socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    running = Server(application)
    running.listen_on([listener], NoNeighbours(), application.shed)

    async def close() -> None:
        running.stop()
        close_upstreams(application)
        await running.close_all_connections()

    setup._closers.append(close)
    return int(listener.getsockname()[1]), entries
