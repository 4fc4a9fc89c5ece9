"""The proxy as a process of its own: options in, one listening socket, an orderly end.

Strategy. Every option is a text from the command line or from ``FAL_PROXY_<NAME>``, checked in one place, so that a
wrong one ends the start with a line that says what to change and never with a traceback. An embedding application
never imports this module; what it needs is :class:`~tornado_fal_proxy.handler.FalProxyHandler`.

The key is no option: an argument list is for everyone on the machine to read.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import importlib
import json
import logging
import os
import re
import signal
import socket
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPServerRequest
from tornado.iostream import IOStream
from tornado.netutil import bind_sockets
from tornado.routing import URLSpec
from tornado.web import Application, RequestHandler

from tornado_fal_proxy._version import __version__
from tornado_fal_proxy.config import DEFAULT_ROUTE, ENV_PREFIX, FALSE, TRUE, ProxyConfig, key_from, relay_options
from tornado_fal_proxy.errors import ConfigError
from tornado_fal_proxy.handler import FalProxyHandler, close_upstreams

if TYPE_CHECKING:
    from tornado_fal_proxy.sandbox import Sandbox

__all__ = ["Settings", "main", "make_application", "parse_settings"]

PROGRAM = "tornado-fal-proxy"

logger = logging.getLogger("tornado_fal_proxy")

# Only this machine: who exposes a paid key to the world should say so.
DEFAULT_ADDRESS = "127.0.0.1"
DEFAULT_PORT = 8080
DEFAULT_LOG_LEVEL = "info"
TAKEN_ROUTES = ("/", "/healthz")
LOG_LEVELS = ("debug", "info", "warning", "error")
# A crowd that arrives at once waits here for its turn; the kernel caps it at net.core.somaxconn.
LISTEN_BACKLOG = 4096
# The options that say who may call what; the others say how a call is relayed.
ACCESS_OPTIONS = (
    *("allowed_endpoints", "allow_uploads", "max_token_expiration_s", "allowed_hosts", "allow_cancel"),
    *("allowed_webhooks", "authorize", "resolve_key", "allowed_origins", "allow_credentials"),
)
# How long answers that are being written when the process ends may take, and how often that is looked at.
CLOSE_GRACE_S, CLOSE_POLL_S = 1.0, 0.02

EXIT_OK, EXIT_CANNOT_LISTEN, EXIT_USAGE = 0, 1, 2

_OPTION = re.compile(r"--[a-z-]+(?==|\Z)")
_PORT = re.compile(r"[0-9]{1,5}")
_ROUTE = re.compile(r"/[A-Za-z0-9._~/-]*")

# The options that are no field of ProxyConfig, with what an empty or missing text stands for.
_DEFAULTS = {
    "address": DEFAULT_ADDRESS,
    "port": str(DEFAULT_PORT),
    "route": DEFAULT_ROUTE,
    "log_level": DEFAULT_LOG_LEVEL,
    "sandbox": "no",
}
# Which texts they may have, and how to say so. The address is for the operating system to judge.
_RULES: dict[str, tuple[Callable[[str], bool], str]] = {
    "port": (lambda text: bool(_PORT.fullmatch(text)) and int(text) < 65_536, "a number from 0 to 65535"),
    "route": (
        lambda text: bool(_ROUTE.fullmatch(text)) and text not in TAKEN_ROUTES,
        f"a path such as {DEFAULT_ROUTE}, and none of {', '.join(TAKEN_ROUTES)}",
    ),
    "log_level": (lambda text: text.lower() in LOG_LEVELS, f"one of {', '.join(LOG_LEVELS)}"),
    "sandbox": (lambda text: text.lower() in TRUE + FALSE, f"one of {', '.join(TRUE + FALSE)}"),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the process does, checked. ``config`` is None in sandbox mode, where the sandbox decides it."""

    address: str
    port: int
    route: str
    log_level: str
    sandbox: bool
    config: ProxyConfig | None
    texts: Mapping[str, str | None]


class _Parser(argparse.ArgumentParser):
    """One line on stderr and exit code 2, instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError([message])


def _parser() -> _Parser:
    parser = _Parser(
        prog=PROGRAM,
        allow_abbrev=False,
        description="A proxy for fal.ai: adds the key in FAL_KEY (or FAL_KEY_ID and FAL_KEY_SECRET) to calls of fal's "
        "clients and relays them.",
        epilog=f"Every option is also an environment variable: --max-in-flight is {ENV_PREFIX}MAX_IN_FLIGHT. "
        "An option wins over its variable.",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")

    def add(group: Any, name: str, help: str, metavar: str, default: object) -> None:
        text = help if default is None else f"{help} (default: {default})"
        group.add_argument("--" + name.replace("_", "-"), metavar=metavar, help=text)

    def add_switch(group: Any, name: str, help: str) -> None:
        group.add_argument("--" + name.replace("_", "-"), action="store_const", const="1", help=f"{help} (default: no)")

    listen = parser.add_argument_group("listening")
    add(listen, "address", "address or host name to listen on", "ADDRESS", DEFAULT_ADDRESS)
    add(listen, "port", "port to listen on; 0 takes a free one", "PORT", DEFAULT_PORT)
    add(listen, "route", "path that the clients' proxyUrl names", "PATH", DEFAULT_ROUTE)
    relay = parser.add_argument_group("relaying")
    access = parser.add_argument_group("access", "lists are separated by commas; README.md, 'Secure it', explains them")
    for option in relay_options():
        group = access if option.name in ACCESS_OPTIONS else relay
        if option.default is False:
            add_switch(group, option.name, option.metadata["help"])
        else:
            add(group, option.name, option.metadata["help"], option.metadata["metavar"], option.default)
    other = parser.add_argument_group("other")
    add(other, "log_level", "least level to log: " + ", ".join(LOG_LEVELS), "LEVEL", DEFAULT_LOG_LEVEL)
    other.add_argument(
        "--sandbox",
        action="store_const",
        const="1",
        help="relay to a stand-in for fal on this machine: needs neither key nor network; / shows a page to try it",
    )
    return parser


def parse_settings(argv: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """The settings that options and environment ask for. Raises ConfigError, naming every problem.

    ``--help`` and ``--version`` print and raise SystemExit, as argparse does.
    """
    options, unknown = _parser().parse_known_args(argv)
    if unknown:
        # Only their names: somebody may have tried to pass the key.
        names = [match[0] if (match := _OPTION.match(text)) else "an argument" for text in unknown]
        raise ConfigError([f"unknown: {', '.join(names)}; --help shows what there is (the key is read from FAL_KEY)"])
    texts: dict[str, str | None] = {
        name: environ.get(ENV_PREFIX + name.upper()) if value is None else value
        for name, value in vars(options).items()
    }
    own = {name: texts[name] or default for name, default in _DEFAULTS.items()}
    problems = [
        f"{name}: must be {form}, not {own[name]!r}" for name, (holds, form) in _RULES.items() if not holds(own[name])
    ]
    sandbox = own["sandbox"].lower() in TRUE
    config = None
    try:
        config = _relay_config(texts, environ, sandbox)
    except ConfigError as exc:
        problems.extend(exc.problems)
    if problems:
        raise ConfigError([_in_options(problem) for problem in problems])
    return Settings(
        address=own["address"],
        port=int(own["port"]),
        route=own["route"],
        log_level=own["log_level"].lower(),
        sandbox=sandbox,
        config=config,
        texts=texts,
    )


def _relay_config(texts: Mapping[str, str | None], environ: Mapping[str, str], sandbox: bool) -> ProxyConfig | None:
    """The part of the settings that is the proxy's; in sandbox mode it is checked only. Raises ConfigError."""
    problems = []
    key = None if sandbox else key_from(environ)
    if sandbox:
        set_by_it = [name for name in ("ca_certs", "connect_to") if texts[name]]
        problems = [f"{name}: the sandbox sets it" for name in set_by_it]
        texts = {**texts, **dict.fromkeys(set_by_it)}
    elif key is None and not texts["resolve_key"]:
        problems = ["no key: set FAL_KEY, or FAL_KEY_ID and FAL_KEY_SECRET (or try --sandbox)"]
    try:
        config = ProxyConfig.from_texts(texts, key=key)
    except ConfigError as exc:
        problems.extend(exc.problems)
    if problems:
        raise ConfigError(problems)
    return None if sandbox else config


def _in_options(problem: str) -> str:
    """A problem that begins with a field's name, with the option's name instead."""
    return re.sub(r"\A[a-z_]+(?=: )", lambda name: "--" + name[0].replace("_", "-"), problem).replace(
        "--key:", "FAL_KEY:"
    )


class HealthHandler(RequestHandler):
    """``GET /healthz``: the process is alive and its loop turns."""

    def get(self) -> None:
        self.set_header("Content-Type", "application/json")
        self.set_header("Cache-Control", "no-store")
        self.finish(b'{"status": "ok"}')

    head = get


class MessageHandler(RequestHandler):
    """Answers whatever is asked with a status and, as the proxy does, ``{"message": ...}``."""

    def initialize(self, status: int, message: str, **headers: str) -> None:
        self.set_status(status)
        self._message = message
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.set_header(name, value)

    def prepare(self) -> None:
        self.finish(json.dumps({"message": self._message}))


NOT_FOUND = {"status": 404, "message": "Not found."}
# Nothing was sent to fal, so the caller may ask again, and finds another process.
CLOSING = {"status": 503, "message": "The proxy is closing; try again.", "Connection": "close"}


class Service(Application):
    """The application of the process. ``closing`` is set when it ends, for connections that are still open then."""

    closing = False

    def find_handler(self, request: HTTPServerRequest, **kwargs: Any) -> Any:
        if self.closing:
            return self.get_handler_delegate(request, MessageHandler, CLOSING)
        return super().find_handler(request, **kwargs)


class Server(HTTPServer):
    """An HTTP server that can end without cutting off the answers that it is writing."""

    def initialize(self, *args: Any, **kwargs: Any) -> None:
        super().initialize(*args, **kwargs)
        self._streams: weakref.WeakSet[IOStream] = weakref.WeakSet()

    def handle_stream(self, stream: IOStream, address: Any) -> None:
        self._streams.add(stream)
        super().handle_stream(stream, address)

    async def end(self) -> None:
        """Close all connections, as soon as what handlers write now has left or CLOSE_GRACE_S are over."""
        for _ in range(round(CLOSE_GRACE_S / CLOSE_POLL_S)):
            await asyncio.sleep(CLOSE_POLL_S)
            if not any(stream.writing() for stream in self._streams):
                break
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.close_all_connections(), CLOSE_GRACE_S)


def make_application(config: ProxyConfig, route: str, more: Sequence[URLSpec] = ()) -> Service:
    """The whole service as a Tornado application, with the rules ``more`` beside its own."""
    return Service(
        [
            URLSpec(re.escape(route), FalProxyHandler, {"config": config}),
            URLSpec("/healthz", HealthHandler),
            *more,
        ],
        default_handler_class=MessageHandler,
        default_handler_args=NOT_FOUND,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the service. The exit code is 0 after SIGTERM or SIGINT, 1 when the port is taken, 2 on wrong options."""
    with contextlib.suppress(OSError):  # a working directory that was removed
        # Where --authorize and --resolve-key find a module of the operator's, after all that is installed.
        sys.path.append(os.getcwd())
    try:
        settings = parse_settings(sys.argv[1:] if argv is None else argv, os.environ)
        sandbox = _make_sandbox() if settings.sandbox else None
    except ConfigError as exc:
        return _fail(str(exc), EXIT_USAGE)
    try:
        sockets = bind_sockets(settings.port, settings.address, backlog=LISTEN_BACKLOG)
    except (OSError, UnicodeError) as exc:  # UnicodeError: a name that DNS cannot hold
        what = f"cannot listen on {settings.address} port {settings.port}: {getattr(exc, 'strerror', None) or exc}"
        about_the_port = getattr(exc, "errno", None) in (errno.EADDRINUSE, errno.EACCES)
        return _fail(
            f"{what}; choose another --port" if about_the_port else f"{what}; see --address",
            EXIT_CANNOT_LISTEN if about_the_port else EXIT_USAGE,
        )
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    if settings.config is not None:
        restricted, line = what_is_open(settings.config)
        logger.log(logging.INFO if restricted else logging.WARNING, "%s", line)
    asyncio.run(_serve(settings, sockets, sandbox))
    return EXIT_OK


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


async def _serve(settings: Settings, sockets: list[socket.socket], sandbox: Sandbox | None) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    url = _url_of(sockets[0])
    config, more = settings.config, []
    if sandbox is not None:
        sandbox.start()
        sandbox.public_url = url
        texts = {**settings.texts, "ca_certs": sandbox.ca_certs, "connect_to": sandbox.address}
        config, more = ProxyConfig.from_texts(texts, key=sandbox.key), sandbox.page_rules(settings.route)
    assert config is not None
    application = make_application(config, settings.route, more)
    server = Server(application)
    server.add_sockets(sockets)
    _say(f"{PROGRAM} {__version__} listens on {url}{settings.route}", sys.stdout)
    if sandbox is not None:
        _say(f"sandbox: no call leaves this machine. A page to try it: {url}/  Or:", sys.stdout)
        _say(
            f"curl -H 'content-type: application/json' -H 'x-fal-target-url: https://fal.run/fal-ai/flux/dev' "
            f'-d \'{{"prompt": "a lighthouse"}}\' {url}{settings.route}',
            sys.stdout,
        )
    await stop.wait()
    server.stop()
    application.closing = True
    close_upstreams(application)
    await server.end()
    if sandbox is not None:
        await sandbox.close()


def _url_of(listener: socket.socket) -> str:
    """Where a browser on this machine finds the service."""
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
