"""Serve the proxy under test in the loop of the test."""

from collections.abc import Awaitable, Callable
from typing import Any

from tornado.httpserver import HTTPServer
from tornado.testing import bind_unused_port
from tornado.web import Application

from tests.support.certificates import Authority
from tests.support.scripted_upstream import Handler, Upstream
from tornado_fal_proxy import FalProxyHandler, ProxyConfig, close_upstreams, flush_spending
from tornado_fal_proxy.relay.backend import Backend, backends_of

__all__ = ["KEY", "ROUTE", "SECRET", "Setup"]

KEY = "key-id-of-a-test:secret-of-a-test"
SECRET = KEY.partition(":")[2]
ROUTE = "/api/fal/proxy"


class Setup:
    """The proxy in front of a scripted upstream, both in the loop of the test."""

    def __init__(self, authority: Authority) -> None:
        self._authority = authority
        self._closers: list[Callable[[], Awaitable[object]]] = []

    async def upstream(self, handler: Handler, protocol: str = "h2", **options: Any) -> Upstream:
        """Start an upstream that speaks only ``protocol``."""
        context = options.pop("ssl_context", None) or self._authority.context()
        upstream = Upstream(handler, ssl_context=context, protocols=[protocol], **options)
        await upstream.start()
        self._closers.append(upstream.close)
        return upstream

    def config(self, upstream: Upstream | str, **fields: Any) -> ProxyConfig:
        """Return a configuration that directs every target at ``upstream``, which may be an address."""
        address = upstream if isinstance(upstream, str) else upstream.address
        return ProxyConfig(**{"key": KEY, "ca_certs": self._authority.ca_file, "connect_to": address} | fields)

    def serve(self, application: Application, **options: Any) -> int:
        """Serve ``application`` on a free port, and return the port."""
        listener, port = bind_unused_port()
        server = HTTPServer(application, **options)
        server.add_sockets([listener])

        async def close() -> None:
            server.stop()
            close_upstreams(application)
            await server.close_all_connections()
            await flush_spending(application)

        self._closers.append(close)
        return port

    def proxy(self, upstream: Upstream | str, **fields: Any) -> int:
        """Serve the proxy in front of ``upstream`` in an application of its own, and return the port."""
        rule = (ROUTE, FalProxyHandler, {"config": self.config(upstream, **fields)})
        return self.serve(Application([rule], log_function=lambda handler: None))

    def proxy_and_backend(self, upstream: Upstream | str, **fields: Any) -> tuple[int, Callable[[], Backend]]:
        """Do as ``proxy``, and return also a function that returns the backend as soon as there was a call."""
        rule = (ROUTE, FalProxyHandler, {"config": self.config(upstream, **fields)})
        application = Application([rule], log_function=lambda handler: None)

        def backend() -> Backend:
            [backend] = backends_of(application)
            return backend

        return self.serve(application), backend

    async def close(self) -> None:
        """Close all that was started, the newest first."""
        for close in reversed(self._closers):
            await close()
