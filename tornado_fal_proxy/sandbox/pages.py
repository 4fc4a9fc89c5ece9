"""Handlers of the proxy's own application in sandbox mode: a page to try the proxy, the CDN's stand-in, a switch."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Protocol

from tornado.http1connection import HTTP1Connection
from tornado.web import HTTPError, RequestHandler, stream_request_body

from tornado_fal_proxy.sandbox.state import SandboxState

# The body of an upload: fal's JavaScript SDK sends up to 90 MiB in one PUT, and larger files in parts of 10 MiB.
MAX_UPLOAD_BYTES = 100 * 1024 * 1024


class _Handler(RequestHandler):
    """A handler whose ``SUPPORTED_METHODS`` are all that it has."""

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Respond as Tornado does. A 405 names what is allowed."""
        if status_code == 405:
            self.set_header("Allow", ", ".join(self.SUPPORTED_METHODS))
        super().write_error(status_code, **kwargs)


class Page(_Handler):
    """The page to try the proxy with."""

    SUPPORTED_METHODS = ("GET",)

    def initialize(self, html: str) -> None:
        self.html = html

    def get(self) -> None:
        self.finish(self.html)


class Outages(Protocol):
    """Describe what :class:`Primary` needs of the sandbox."""

    @property
    def primary(self) -> bool:
        """Tell whether the usual hosts can be reached."""

    def switch_primary(self, on: bool) -> None:
        """Begin or end an outage. Raise OSError where another program has taken the port."""


class Primary(_Handler):
    """Switch fal's usual hosts off or on with a POST of ``off`` or ``on``, to see a failover. A GET tells which it is.

    A page of another site cannot do it.
    """

    SUPPORTED_METHODS = ("GET", "POST")

    def initialize(self, outages: Outages) -> None:
        self.outages = outages

    def get(self) -> None:
        self.set_header("Content-Type", "text/plain")
        self.finish("on\n" if self.outages.primary else "off\n")

    def post(self) -> None:
        wanted = self.request.body.strip()
        if self.request.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            raise HTTPError(403)
        if wanted not in (b"on", b"off"):
            raise HTTPError(400, reason="The body must be on or off")
        try:
            self.outages.switch_primary(wanted == b"on")
        except OSError as exc:
            raise HTTPError(503, reason="Another program has taken the port; try again") from exc
        self.get()


@stream_request_body
class Files(_Handler):
    """The CDN's stand-in: downloads, and uploads as fal's SDKs make them, whole or in parts 1, 2, ... and ``complete``.

    Only a name that ``Initiate`` gave out can be written, and no file can run a script in the proxy's origin.
    """

    SUPPORTED_METHODS = ("GET", "PUT", "POST", "OPTIONS")

    def initialize(self, state: SandboxState) -> None:
        self.state = state
        self.chunks: list[bytes] = []

    def set_default_headers(self) -> None:
        for name, value in (("Origin", "*"), ("Methods", "GET, PUT, POST, OPTIONS"), ("Headers", "*")):
            self.set_header(f"Access-Control-Allow-{name}", value)
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Content-Security-Policy", "sandbox")

    def prepare(self) -> None:
        if isinstance(self.request.connection, HTTP1Connection):
            self.request.connection.set_max_body_size(MAX_UPLOAD_BYTES)  # the proxy's own limit may be lower

    def data_received(self, chunk: bytes) -> None:
        self.chunks.append(chunk)

    def file(self, name: str) -> tuple[str, bytes]:
        """Return the content type and the bytes, or raise a 404."""
        if name not in self.state.files:
            raise HTTPError(404)
        return self.state.files[name]

    def options(self, path: str) -> None:
        self.set_status(204)

    def get(self, path: str) -> None:
        kind, body = self.file(path)
        self.set_header("Content-Type", kind)
        self.finish(body)

    def put(self, path: str) -> None:
        name, _, part = path.partition("/")
        kind, body = self.file(name)[0], b"".join(self.chunks)
        self.state.keep(path, kind if part else self.request.headers.get("Content-Type", kind), body)
        self.finish({"partNumber": int(part), "etag": hashlib.sha256(body).hexdigest()} if part.isdecimal() else {})

    def post(self, path: str) -> None:
        name, _, verb = path.partition("/")
        kind, _ = self.file(name)
        try:
            parts = json.loads(b"".join(self.chunks))["parts"]
            etags = {f"{name}/{part['partNumber']}": part["etag"] for part in parts}
        except (ValueError, KeyError, TypeError):
            raise HTTPError(400) from None
        bodies = [self.file(part)[1] for part in etags]
        if verb != "complete" or [hashlib.sha256(body).hexdigest() for body in bodies] != list(etags.values()):
            raise HTTPError(400)
        for part in etags:
            del self.state.files[part]
        self.state.keep(name, kind, b"".join(bodies))
        self.finish({})
