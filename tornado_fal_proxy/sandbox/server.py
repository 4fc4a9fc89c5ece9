"""The sandbox itself: its certificate, its listening socket, and all that it keeps, within bounds."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import secrets
import ssl
import tempfile
import time
import uuid
from collections import Counter
from http.client import responses
from pathlib import Path
from typing import Any

import trustme
from tornado.escape import xhtml_escape
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.routing import URLSpec
from tornado.web import Application

from tornado_fal_proxy.sandbox import fal, pages
from tornado_fal_proxy.sandbox.jobs import PICTURE_SIZE, Job, Wish, invalid, picture, refuse, text_of, trim

__all__ = ["Sandbox"]

MAX_TAGS = 10_000
MAX_FILES = 500
MAX_STORE_BYTES = 256 * 1024 * 1024
MAX_INPUT_BYTES = 32 * 1024 * 1024  # what the proxy lets through by default
APP = r"((?:(?:workflows|comfy)/)?[^/]+/[^/]+)"  # a queue id without its sub-path, which fal drops after the submit


class Sandbox:
    """The stand-in: ``start()`` within a running loop, ``await close()`` at the end.

    Attributes:
        key: the only key that is accepted; any other call is answered 401.
        address: ``127.0.0.1:PORT``, where upstream connections are to be directed (after ``start``).
        ca_certs: path of the CA's certificate, PEM (after ``start``, until ``close``).
        public_url: where browsers reach the proxy's own application, e.g. ``http://127.0.0.1:8080``; set by whoever
            listens. Without it pictures become ``data:`` URLs and uploads are answered 503.
        executions: how many jobs were really accepted, by tag.
    """

    def __init__(self, *, pace: float = 1.0) -> None:
        """``pace`` multiplies every believable delay; at 1 a run takes 1.2 s and a queued job 4 s."""
        self.pace = pace
        self.key = f"sandbox-{secrets.token_hex(8)}:{secrets.token_hex(16)}"
        self.address = ""
        self.ca_certs = ""
        self.public_url = ""
        self.executions: Counter[str] = Counter()
        self.jobs: dict[str, Job] = {}
        self.files: dict[str, tuple[str, bytes]] = {}
        self.calls: set[asyncio.Task[Any]] = set()
        self._failures: Counter[tuple[str, str]] = Counter()

    def start(self) -> None:
        """Make the CA and the certificate, and listen. Raises OSError without a free port or temporary directory."""
        authority = trustme.CA()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        authority.issue_cert("fal.run", "*.fal.run", "fal.ai", "*.fal.ai", "rest.alpha.fal.ai").configure_cert(context)
        self._directory = tempfile.TemporaryDirectory(prefix="tornado-fal-proxy-")  # made with mode 0700
        self.ca_certs = str(Path(self._directory.name, "ca.pem"))
        authority.cert_pem.write_to_path(self.ca_certs)
        self._closing = asyncio.Event()
        self._server = HTTPServer(self._application(), ssl_options=context, max_body_size=MAX_INPUT_BYTES)
        sockets = bind_sockets(0, "127.0.0.1", backlog=1024)
        self._server.add_sockets(sockets)
        self.address = f"127.0.0.1:{sockets[0].getsockname()[1]}"

    def _application(self) -> Application:
        """The routes of fal's hosts, which Tornado's host patterns keep apart."""
        job = rf"/{APP}/requests/([^/]+)"
        routes: dict[str, dict[str, type[fal.FalHandler]]] = {
            r"fal\.run": {r"/(.+)/stream": fal.Stream, r"/([^/]+/.+)": fal.Run},
            r"queue\.fal\.run": {
                job: fal.Result,
                rf"{job}/status": fal.Status,
                rf"{job}/status/stream": fal.StatusStream,
                rf"{job}/cancel": fal.Cancel,
                rf"/{APP}(?:/.+)?": fal.Submit,
            },
            r"rest\.(?:alpha\.)?fal\.ai": {
                r"/tokens/?": fal.Tokens,
                r"/storage/upload/initiate(?:-multipart)?": fal.Initiate,
            },
        }
        own = {"sandbox": self}
        settings: dict[str, Any] = {"default_handler_class": fal.Unknown, "default_handler_args": own}
        application = Application(log_function=lambda handler: None, **settings)
        for host, rules in routes.items():
            application.add_handlers(host, [(path, handler, own) for path, handler in rules.items()])
        return application

    def page_rules(self, route: str) -> list[URLSpec]:
        """Rules for the proxy's own application: ``/``, which is told the proxy's ``route``, and the CDN's stand-in."""
        html = Path(__file__).with_name("page.html").read_text("utf-8").replace("@ROUTE@", xhtml_escape(route))
        return [
            URLSpec(r"/", pages.Page, {"html": html}),
            URLSpec(r"/sandbox/files/(.+)", pages.Files, {"sandbox": self}),
        ]

    async def close(self) -> None:
        """Stop listening, drop every connection, wait for the handlers, remove the temporary directory."""
        self._closing.set()
        self._server.stop()
        await self._server.close_all_connections()
        if self.calls:
            await asyncio.wait(self.calls)
        self._directory.cleanup()

    async def sleep(self, seconds: float) -> bool:
        """Sleep, but not past ``close``, so that no handler outlives the sandbox: False when that has come."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._closing.wait(), seconds)
        return not self._closing.is_set()

    def accept(self, app: str, fields: dict[str, Any], believable_s: float) -> Job:
        """Fail as the input asks for, or count and keep the job."""
        wish = Wish.parse(fields.get("sandbox", {}))
        self.fail(wish, "call")
        self.executions[wish.tag] += 1
        trim(self.executions, MAX_TAGS)
        seed = fields["seed"] if isinstance(fields.get("seed"), int) else secrets.randbelow(1 << 32)
        duration_s = believable_s * self.pace if wish.think_s is None else wish.think_s
        prompt = text_of(fields.get("prompt"), "(no prompt)")
        return Job(str(uuid.uuid4()), app, prompt, seed, wish, time.time(), duration_s)

    def fail(self, wish: Wish, step: str) -> None:
        """Raise the error that was asked for at this step, if its turns are not used up."""
        if wish.error is None or wish.at != step:
            return
        self._failures[wish.tag, step] += 1
        trim(self._failures, MAX_TAGS)
        if wish.times is not None and self._failures[wish.tag, step] > wish.times:
            return
        if wish.error == 422:
            invalid("value_error", ["body", "prompt"], "This error was asked for")
        refuse(wish.error, f"This error was asked for: {responses.get(wish.error, wish.error)}")

    def result(self, job: Job) -> dict[str, object]:
        """What an image model answers; the picture is drawn again should it have been dropped."""
        name = f"{job.id}.png"
        _, png = self.files.get(name) or self.keep(name, "image/png", picture(job.prompt, job.seed))
        url = self.file_url(name) if self.public_url else "data:image/png;base64," + base64.b64encode(png).decode()
        return {
            "images": [{"url": url, "width": PICTURE_SIZE[0], "height": PICTURE_SIZE[1], "content_type": "image/png"}],
            "timings": {"inference": round(job.duration_s, 3)},
            "seed": job.seed,
            "has_nsfw_concepts": [False],
            "prompt": job.prompt,
        }

    def keep(self, name: str, content_type: str, body: bytes) -> tuple[str, bytes]:
        """Keep a file as the newest, at the expense of the oldest."""
        self.files.pop(name, None)
        self.files[name] = (content_type, body)
        trim(self.files, MAX_FILES)
        while sum(len(kept) for _, kept in self.files.values()) > MAX_STORE_BYTES:
            trim(self.files, len(self.files) - 1)
        return content_type, body

    def file_url(self, name: str) -> str:
        """Where browsers find that file."""
        return f"{self.public_url}/sandbox/files/{name}"
