"""The proxy as a service of its own: its application, the life of a process that serves, and the command.

Strategy. Options, connections, worker processes and systemd are modules of their own; here they meet. One process
serves by itself, and whoever started it sees how it ends; several are forked from a parent that binds the sockets first
and serves nothing (:mod:`~tornado_fal_proxy.workers`). An embedding application never imports this module; what it
needs is :class:`~tornado_fal_proxy.handler.FalProxyHandler`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import importlib.util
import itertools
import json
import logging
import os
import resource
import shutil
import socket
import sys
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from tornado.http1connection import HTTP1Connection
from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPServerRequest
from tornado.iostream import IOStream
from tornado.netutil import bind_sockets
from tornado.routing import URLSpec
from tornado.web import Application, RequestHandler

from tornado_fal_proxy import memory
from tornado_fal_proxy._version import __version__
from tornado_fal_proxy.admin import HealthHandler, admin_application
from tornado_fal_proxy.callers import UNIX, TrustedProxies
from tornado_fal_proxy.config import ProxyConfig
from tornado_fal_proxy.connection import close_after
from tornado_fal_proxy.errors import ConfigError
from tornado_fal_proxy.handler import FalProxyHandler, close_upstreams, upstreams
from tornado_fal_proxy.logs import AccessLog, JsonFormatter, PlainFormatter
from tornado_fal_proxy.options import PROGRAM, Settings, parse_settings
from tornado_fal_proxy.server import CLOSE_GRACE_S, LISTEN_BACKLOG, Server, open_files, reserve
from tornado_fal_proxy.systemd import Notifier, NotListening, activated_sockets
from tornado_fal_proxy.telemetry import Call
from tornado_fal_proxy.workers import Alone, Board, CannotStart, Crew, Ending, Worker

if TYPE_CHECKING:
    from tornado_fal_proxy.metrics import Metrics
    from tornado_fal_proxy.sandbox import Sandbox

__all__ = ["main", "make_application"]

logger = logging.getLogger("tornado_fal_proxy")
access_logger = logging.getLogger("tornado_fal_proxy.access")

# EXIT_CUT: the service ended as it was told, but not all calls were finished by then.
EXIT_OK, EXIT_CANNOT_LISTEN, EXIT_USAGE, EXIT_CUT, EXIT_WORKERS = 0, 1, 2, 3, 4

# Open files of a process that serves nobody: the standard three, sockets, pipes, epolls, with room for more.
OWN_FILES = 32
# Calls that share one connection to fal over HTTP/2, as servers commonly allow.
STREAMS_PER_CONNECTION = 100
NOBODY = TrustedProxies()
# Several times what all labels together take.
METRICS_FILE_BYTES = 1024 * 1024
# How long a connection to the admin port is kept without a request.
ADMIN_KEPT_S = 120.0
# How often a process shows how many calls and connections it has.
LOOK_S = 5.0


class LoggedHandler(FalProxyHandler):
    """Tells the service of each call."""

    def on_call_end(self, call: Call) -> None:
        assert isinstance(self.application, Service)
        self.application.call_ended(call, self.request)


class MessageHandler(RequestHandler):
    """Answers whatever is asked with a status and, as the proxy does, ``{"message": ...}``."""

    def initialize(self, status: int, message: str, why: str) -> None:
        self.set_status(status)
        self._message = message
        self.status, self.why = status, why
        self.set_header("Content-Type", "application/json")

    def prepare(self) -> None:
        self.finish(json.dumps({"message": self._message}))


NOT_FOUND = {"status": 404, "message": "Not found.", "why": "NotFound"}
# Nothing was sent to fal, so the caller may ask again, and finds another process.
CLOSING = {"status": 503, "message": "The proxy is closing; try again.", "why": "Closing"}
FULL = {"status": 503, "message": "The proxy has no room for another connection; try again.", "why": "NoRoom"}


class Service(Application):
    """The application of a process.

    ``closing`` is set when it ends, for connections that are still open then; ``shed`` are connections that are one too
    many.
    """

    closing = False
    access_log: AccessLog | None = None
    metrics: Metrics | None = None

    def __init__(self, config: ProxyConfig, route: str, trusted: TrustedProxies, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.config, self.route, self._trusted = config, route, trusted
        self.shed: weakref.WeakSet[IOStream] = weakref.WeakSet()

    def find_handler(self, request: HTTPServerRequest, **kwargs: Any) -> Any:
        connection = self._connection(request)
        family = getattr(connection.context, "address_family", None)  # the socket may be closed by now
        peer = UNIX if family == socket.AF_UNIX else request.remote_ip or ""
        request.remote_ip = self._trusted.caller(peer, request.headers.get_list("X-Forwarded-For"))
        if self.closing or (self.shed and connection.stream in self.shed):
            close_after(connection)
            return self.get_handler_delegate(request, MessageHandler, CLOSING if self.closing else FULL)
        if request.path == self.route:
            return self.get_handler_delegate(request, LoggedHandler, {"config": self.config})
        return super().find_handler(request, **kwargs)

    def log_request(self, handler: RequestHandler) -> None:
        if isinstance(handler, FalProxyHandler | HealthHandler):
            return  # on_call_end tells, and what is asked every few seconds is no news
        request, status = handler.request, handler.get_status()
        call = Call(request.method or "", None)
        call.began -= request.request_time()
        call.answer_begins()
        call.sent_bytes = int(handler._headers.get("Content-Length", 0))
        if isinstance(handler, MessageHandler) and status == handler.status:
            call.why = handler.why
        elif status >= 400:
            call.why = "HTTPError"
        call.ends(status)
        self.call_ended(call, request)

    def call_ended(self, call: Call, request: HTTPServerRequest) -> None:
        """Log and count it."""
        if self.access_log is not None:
            self.access_log.add(call, request.remote_ip or "")
        if self.metrics is not None:
            self.metrics.count(call)

    @staticmethod
    def _connection(request: HTTPServerRequest) -> HTTP1Connection:
        assert isinstance(request.connection, HTTP1Connection)
        return request.connection


def make_application(
    config: ProxyConfig, route: str, more: Sequence[URLSpec] = (), trusted: TrustedProxies = NOBODY
) -> Service:
    """The whole service as a Tornado application, with the rules ``more`` beside its own."""
    return Service(
        config,
        route,
        trusted,
        [
            URLSpec("/healthz", HealthHandler),
            *more,
        ],
        default_handler_class=MessageHandler,
        default_handler_args=NOT_FOUND,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the service, and return the exit code.

    0: all calls were finished after a signal. 1: cannot listen. 2: wrong options. 3: calls were cut at the end.
    4: worker processes do not start.
    """
    notifier = Notifier(os.environ)
    with contextlib.suppress(OSError):  # a working directory that was removed
        # Where --authorize and --resolve-key find a module of the operator's, after all that is installed.
        sys.path.append(os.getcwd())
    try:
        settings = parse_settings(sys.argv[1:] if argv is None else argv, os.environ)
        sandbox = _make_sandbox() if settings.sandbox else None
        if settings.admin_port is not None and importlib.util.find_spec("prometheus_client") is None:
            raise ConfigError(["--admin-port needs prometheus_client: pip install 'tornado-fal-proxy[metrics]'"])
    except ConfigError as exc:
        return _fail(str(exc), EXIT_USAGE)
    try:
        sockets = activated_sockets(os.environ)
        activated = bool(sockets)
        sockets = sockets or _bind(settings.port, settings.address, "")
        admin_sockets = _bind(settings.admin_port, settings.admin_address, "admin-")
    except NotListening as exc:
        return _fail(str(exc), EXIT_CANNOT_LISTEN)
    except ConfigError as exc:
        return _fail(str(exc), EXIT_USAGE)
    process = " [%(process)d]" if settings.processes > 1 else ""
    to_stderr = logging.StreamHandler(sys.stderr)
    plain = PlainFormatter(f"%(asctime)s{process} %(levelname)s %(name)s: %(message)s")
    to_stderr.setFormatter(JsonFormatter() if settings.log_format == "json" else plain)
    logging.basicConfig(level=settings.log_level.upper(), handlers=[to_stderr])
    if activated and (ignored := [f"--{name}" for name in ("address", "port") if settings.texts[name]]):
        logger.warning("%s not used: the listening sockets come from systemd", " and ".join(ignored))
    if settings.config is not None:
        restricted, line = what_is_open(settings.config)
        logger.log(logging.INFO if restricted else logging.WARNING, "%s", line)
    _raise_open_files(settings)
    memory.map_large_blocks()
    memory.collect_rarely()
    try:
        with _shared_metrics(settings) as directory:
            return _run(_Service(settings, sockets, admin_sockets, directory, sandbox, notifier))
    except ConfigError as exc:
        return _fail(str(exc), EXIT_USAGE)


def _bind(port: int | None, address: str, kind: str) -> list[socket.socket]:
    """Listening sockets. Raises NotListening, and ConfigError where the address is at fault."""
    if port is None:
        return []
    try:
        return bind_sockets(port, address, backlog=LISTEN_BACKLOG)
    except (OSError, UnicodeError) as exc:  # UnicodeError: a name that DNS cannot hold
        what = f"cannot listen on {address} port {port}: {getattr(exc, 'strerror', None) or exc}"
        if getattr(exc, "errno", None) in (errno.EADDRINUSE, errno.EACCES):
            raise NotListening(f"{what}; choose another --{kind}port") from exc
        raise ConfigError([f"{what}; see --{kind}address"]) from exc


@contextlib.contextmanager
def _shared_metrics(settings: Settings) -> Iterator[str | None]:
    """A directory in which workers count together, None where there is no need of one. Raises ConfigError.

    The files have all their blocks now: where there are none left, to write to a mapped file kills the process.
    """
    if settings.admin_port is None or settings.processes == 1:
        yield None
        return
    with contextlib.ExitStack() as stack:
        try:
            directory = stack.enter_context(
                tempfile.TemporaryDirectory(prefix=f"{PROGRAM}-", ignore_cleanup_errors=True)
            )
            for name in itertools.product(("counter", "histogram"), range(settings.processes)):
                with open(os.path.join(directory, "{}_{}.db".format(*name)), "wb") as file:
                    file.write(bytes(METRICS_FILE_BYTES))
        except OSError as exc:
            raise ConfigError(
                [f"--admin-port: no room for metrics in the temporary directory: {exc.strerror}; see TMPDIR"]
            ) from exc
        yield directory


def what_is_open(config: ProxyConfig) -> tuple[bool, str]:
    """Whether anything keeps strangers from spending the key's money, and a line that says what they may do."""
    access, cors = config.access, config.cors
    parts = ["every model" if config.allowed_endpoints is None else f"endpoints {', '.join(config.allowed_endpoints)}"]
    if config.allowed_endpoints is not None and config.allow_uploads:
        parts.append("uploads")
    if config.allowed_hosts is not None:
        parts.append(f"only on {', '.join(config.allowed_hosts)}")
    if config.allow_cancel:
        parts.append("cancel")
    if access is not None and access.webhooks is not None:
        parts.append(f"webhooks to {', '.join(access.webhooks) or 'nobody'}")
    parts.append("anyone" if config.authorize is None else "whom authorize lets in")
    if cors is not None and config.allowed_origins is not None:
        parts.append(f"pages of {', '.join(config.allowed_origins)}")
    restricted = config.allowed_endpoints is not None or config.authorize is not None
    return restricted, f"open: {', '.join(parts)}" + ("" if restricted else ": see README.md, 'Secure it'")


def _fail(text: str, code: int) -> int:
    _say(f"{PROGRAM}: {' '.join(text.split())}", sys.stderr)
    return code


def _make_sandbox() -> Sandbox:
    try:
        module = importlib.import_module("tornado_fal_proxy.sandbox")
    except ImportError as exc:
        raise ConfigError([f"--sandbox needs more packages ({exc}): pip install 'tornado-fal-proxy[sandbox]'"]) from exc
    sandbox: Sandbox = module.Sandbox()
    return sandbox


@dataclass(frozen=True)
class _Service:
    """What the parent, each worker, and a process that serves by itself have in common."""

    settings: Settings
    sockets: list[socket.socket]
    admin_sockets: list[socket.socket]
    metrics_directory: str | None
    sandbox: Sandbox | None
    notifier: Notifier

    @property
    def alive_s(self) -> float | None:
        """How often the watchdog is to hear that all is well: a late one is still in time."""
        return self.notifier.watchdog_s and self.notifier.watchdog_s / 4

    def ready(self) -> None:
        url = _url_of(self.sockets[0])
        _say(f"{PROGRAM} {__version__} listens on {url}{self.settings.route}", sys.stdout)
        if self.admin_sockets:
            _say(f"metrics: {_url_of(self.admin_sockets[0])}/metrics", sys.stdout)
        if self.sandbox is not None:
            _say(f"sandbox: no call leaves this machine. A page to try it: {url}/  Or:", sys.stdout)
            _say(
                f"curl -H 'content-type: application/json' -H 'x-fal-target-url: https://fal.run/fal-ai/flux/dev' "
                f'-d \'{{"prompt": "a lighthouse"}}\' {url}{self.settings.route}',
                sys.stdout,
            )
        self.notifier.ready()

    def stopping(self) -> None:
        self.notifier.stopping()
        for listener in self.sockets:
            listener.close()


def _run(service: _Service) -> int:
    settings, notifier = service.settings, service.notifier
    if settings.processes == 1:
        alone = Alone(0, Board(1), service.ready, notifier.stopping, notifier.alive)
        return asyncio.run(_serve(service, alone))
    crew = Crew(
        settings.processes,
        lambda worker: _live(service, worker),
        on_ready=service.ready,
        on_stop=service.stopping,
        end_timeout_s=settings.drain_timeout_s + 2 * CLOSE_GRACE_S,
        alive_s=service.alive_s,
        on_alive=notifier.alive,
    )
    try:
        return EXIT_OK if crew.run() else EXIT_CUT
    except CannotStart as exc:
        return _fail(f"{exc}; the log says why", EXIT_WORKERS)


def _live(service: _Service, worker: Worker) -> int:
    """The life of one of several workers."""
    try:
        return asyncio.run(_serve(service, worker))
    finally:
        if service.metrics_directory is not None and worker.is_orphan:  # else the parent clears up
            shutil.rmtree(service.metrics_directory, ignore_errors=True)


async def _serve(service: _Service, worker: Alone | Worker) -> int:
    """The life of a process that serves."""
    settings, sandbox = service.settings, service.sandbox
    ending = Ending()
    worker.end_as_told(ending)
    config, more = settings.config, []
    if sandbox is not None:
        sandbox.start()
        sandbox.public_url = _url_of(service.sockets[0])
        texts = {**settings.texts, "ca_certs": sandbox.ca_certs, "connect_to": sandbox.address}
        config, more = ProxyConfig.from_texts(texts, key=sandbox.key), sandbox.page_rules(settings.route)
    assert config is not None
    application = make_application(config, settings.route, more, settings.trusted_proxies)
    access_log = AccessLog(access_logger)
    if access_logger.isEnabledFor(logging.INFO):
        application.access_log = access_log
    server = Server(application)
    server.listen_on(service.sockets, worker, application.shed)
    admin = _serve_admin(service, worker, application, config.max_in_flight) if service.admin_sockets else None
    worker.ready()
    beat = asyncio.create_task(_beat(worker, service.alive_s))
    await ending.asked.wait()
    worker.stopping()
    server.stop()
    all_finished = await _finish(server, ending, settings.drain_timeout_s)
    application.closing = True
    close_upstreams(application)
    await server.end()
    if admin is not None:
        admin.stop()
        await admin.close_all_connections()
    if sandbox is not None:
        await sandbox.close()
    beat.cancel()
    access_log.write()
    return EXIT_OK if all_finished else EXIT_CUT


def _serve_admin(service: _Service, worker: Alone | Worker, application: Service, max_in_flight: int) -> HTTPServer:
    """Answer the operator's tools from now on."""
    from tornado_fal_proxy.metrics import Metrics  # an extra

    loop, board = asyncio.get_running_loop(), worker.board

    def look() -> None:
        clients = upstreams(application)
        board.show(
            worker.row,
            in_flight=sum(client.in_flight for client in clients),
            upstream_connections=sum(client.connections() for client in clients),
        )

    def look_again() -> None:
        look()
        loop.call_later(LOOK_S, look_again)

    look_again()
    application.metrics = metrics = Metrics(board, worker.row, service.metrics_directory, max_in_flight)

    def is_ready() -> bool:
        return any(row.connections is not None for row in board.rows())

    admin = HTTPServer(admin_application(metrics, is_ready, look), idle_connection_timeout=ADMIN_KEPT_S)
    admin.add_sockets(service.admin_sockets)
    return admin


async def _beat(worker: Alone | Worker, seconds: float | None) -> None:
    """Tell, as long as the loop turns."""
    while seconds is not None:
        worker.alive()
        await asyncio.sleep(seconds)


async def _finish(server: Server, ending: Ending, timeout_s: float) -> bool:
    """Let the calls in flight come to their end; whether all did before time was over or a signal said to stop."""
    logger.info("ending: %d calls in flight, and up to %g s for them", server.in_flight, timeout_s)
    drained, now = asyncio.create_task(server.drain()), asyncio.create_task(ending.now.wait())
    await asyncio.wait((drained, now), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    drained.cancel()
    now.cancel()
    if cut := server.in_flight:
        logger.warning("ending: %d calls are cut", cut)
    return not cut


def _raise_open_files(settings: Settings) -> None:
    """Allow as many open files as may be, and warn where that is too few."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if settings.config is None:
        return  # nobody brings a crowd to the sandbox
    calls, limit = settings.config.max_in_flight, open_files()
    spare = OWN_FILES + reserve(limit)
    needed = spare + calls + calls // STREAMS_PER_CONNECTION
    if needed > limit:
        fits = (limit - spare) * STREAMS_PER_CONNECTION // (STREAMS_PER_CONNECTION + 1)
        logger.warning(
            "--max-in-flight=%d takes up to %d open files in a process while fal speaks HTTP/2, and %d over HTTP/1.1; "
            "the limit is %d: raise it (systemd: LimitNOFILE=%d, a shell: ulimit -n) or set --max-in-flight=%d",
            *(calls, needed, spare + 2 * calls, limit, needed, max(fits, 1)),
        )


def _url_of(listener: socket.socket) -> str:
    """Where a browser on this machine finds the service."""
    if listener.family == socket.AF_UNIX:
        return f"http://unix:{listener.getsockname()}:"
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # noqa: S104  (recognized, not bound)
        host = "127.0.0.1" if listener.family == socket.AF_INET else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _say(line: str, stream: TextIO | None) -> None:
    """One line for the operator. A closed or full stream is no reason to stop."""
    if stream is None:
        return
    try:
        stream.write(line + "\n")
        stream.flush()
    except OSError:
        with contextlib.suppress(OSError):
            stream.close()  # or Python tries once more at its exit, and changes the exit code
