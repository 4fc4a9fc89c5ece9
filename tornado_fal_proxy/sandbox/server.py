"""The server of the sandbox: its certificate, its listening socket, its routes, and how it closes."""

from __future__ import annotations

import asyncio
import socket
import ssl
import tempfile
from pathlib import Path
from typing import Any
from weakref import WeakSet

import trustme
from tornado.escape import xhtml_escape
from tornado.httpserver import HTTPServer
from tornado.routing import URLSpec
from tornado.web import Application

from tornado_fal_proxy.sandbox import fal, pages
from tornado_fal_proxy.sandbox.deliveries import KeySet
from tornado_fal_proxy.sandbox.state import SandboxState

__all__ = ["Sandbox"]

# The largest input of a call, as large as the default of the proxy in front.
MAX_INPUT_BYTES = 32 * 1024 * 1024
# Connections that wait to be accepted: a crowd of clients may connect in one moment.
LISTEN_BACKLOG = 1024
# The id of an application of the queue, without its sub-path, which fal drops after the submit.
APP = r"((?:(?:workflows|comfy)/)?[^/]+/[^/]+)"


class Sandbox(SandboxState):
    """The stand-in: call ``start()`` in a running event loop, and ``await close()`` at the end.

    It is the state that its handlers share, with a server in front. Attributes beside those of the state:
        address: ``127.0.0.1:PORT``, where upstream connections have to go (after ``start``).
        backup_address: the same for those to fal's backup domain.
        ca_certs: path of the CA's certificate, PEM (after ``start``, until ``close``).
    """

    def __init__(self, *, pace: float = 1.0) -> None:
        """Prepare a sandbox. ``pace`` multiplies every simulated delay; at 1 a run takes 1.2 s and a queued job 4 s."""
        super().__init__(pace)
        self.address = self.backup_address = ""
        self.ca_certs = ""
        # The loop keeps a server while it listens, and its connections keep it while they are open.
        self._servers: WeakSet[HTTPServer] = WeakSet()
        self._primary: HTTPServer | None = None

    def start(self) -> None:
        """Make the CA and the certificate, and listen. Raise OSError without a free port or temporary directory."""
        authority = trustme.CA()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        names = ("fal.run", "*.fal.run", "fal.ai", "*.fal.ai", "rest.alpha.fal.ai", "falrun.com", "*.falrun.com")
        authority.issue_cert(*names).configure_cert(context)
        self._directory = tempfile.TemporaryDirectory(prefix="tornado-fal-proxy-")  # made with mode 0700
        self.ca_certs = str(Path(self._directory.name, "ca.pem"))
        authority.cert_pem.write_to_path(self.ca_certs)
        self._server_options = {"ssl_options": context, "max_body_size": MAX_INPUT_BYTES}
        self._served = self._application()
        self._primary, self.address = self._listen()
        _, self.backup_address = self._listen()

    def _listen(self, port: int = 0) -> tuple[HTTPServer, str]:
        listener = socket.create_server(("127.0.0.1", port), backlog=LISTEN_BACKLOG)
        listener.setblocking(False)
        server = HTTPServer(self._served, **self._server_options)
        server.add_socket(listener)
        self._servers.add(server)
        return server, f"127.0.0.1:{listener.getsockname()[1]}"

    @property
    def primary(self) -> bool:
        """Tell whether the usual hosts can be reached."""
        return self._primary is not None

    def switch_primary(self, on: bool) -> None:
        """Begin or end an outage: no new connection to the usual hosts can be made, and calls that run go on.

        Raise OSError where another program has taken the port meanwhile.
        """
        if self._primary is not None and not on:
            self._primary.stop()
            self._primary = None
        elif self._primary is None and on:
            self._primary, _ = self._listen(int(self.address.rpartition(":")[2]))

    def _application(self) -> Application:
        """Return the routes of fal's hosts, which Tornado's host patterns keep apart."""
        job = rf"/{APP}/requests/([^/]+)"
        routes: dict[str, dict[str, type[fal.FalHandler]]] = {
            r"fal(?:\.run|run\.com)": {r"/(.+)/stream": fal.Stream, r"/(.+/.+)/ice": fal.Ice, r"/([^/]+/.+)": fal.Run},
            r"wma\.fal\.run": {r"/ice": fal.Ice, r"/session": fal.Session, r"/session/heartbeat": fal.Heartbeat},
            r"queue\.fal(?:\.run|run\.com)": {
                job: fal.Result,
                rf"{job}/status": fal.Status,
                rf"{job}/status/stream": fal.StatusStream,
                rf"{job}/cancel": fal.Cancel,
                rf"/{APP}(?:/.+)?": fal.Submit,
            },
            r"rest\.(?:alpha\.)?fal\.ai": {
                r"/tokens/?": fal.Tokens,
                r"/tokens/realtime": fal.PathTokens,
                r"/storage/auth/token": fal.UploadToken,
                r"/storage/upload/initiate(?:-multipart)?": fal.Initiate,
            },
        }
        arguments = {"state": self}
        settings: dict[str, Any] = {"default_handler_class": fal.Unknown, "default_handler_args": arguments}
        application = Application(log_function=lambda handler: None, **settings)
        for host, rules in routes.items():
            application.add_handlers(host, [(path, handler, arguments) for path, handler in rules.items()])
        return application

    def page_rules(self, route: str) -> list[URLSpec]:
        """Return rules for the proxy's application: a page that calls ``route``, the CDN's stand-in, and a switch."""
        html = Path(__file__).with_name("page.html").read_text("utf-8").replace("@ROUTE@", xhtml_escape(route))
        return [
            URLSpec(r"/", pages.Page, {"html": html}),
            URLSpec(r"/sandbox/files/(.+)", pages.Files, {"state": self}),
            URLSpec(r"/sandbox/jwks\.json", KeySet, {"deliveries": self.deliveries}),
            URLSpec(r"/sandbox/primary", pages.Primary, {"outages": self}),
        ]

    async def close(self) -> None:
        """Stop listening, close every connection, wait for the handlers, and remove the temporary directory."""
        self.closing.set()
        self.deliveries.close()
        for server in list(self._servers):
            server.stop()
            await server.close_all_connections()
        if self.calls:
            await asyncio.wait(self.calls)
        self._directory.cleanup()
