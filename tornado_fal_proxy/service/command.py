"""The command ``tornado-fal-proxy``: from its arguments to its exit code.

Strategy. Everything that can be wrong with a start is found before anything is forked, and reported in one line on
stderr. ``tornado-fal-proxy check`` ends there. Then a single process serves by itself, or a parent that serves nothing
forks the processes that do (:mod:`~tornado_fal_proxy.service.supervisor`). The listening sockets are opened before.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import importlib.util
import itertools
import logging
import os
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

from tornado.netutil import bind_sockets

from tornado_fal_proxy import memory
from tornado_fal_proxy._extras import install
from tornado_fal_proxy._version import __version__
from tornado_fal_proxy.config import ProxyConfig
from tornado_fal_proxy.errors import ConfigError
from tornado_fal_proxy.logs import Fields, JsonFormatter, PlainFormatter
from tornado_fal_proxy.service.describe import ADVICE, describe, is_open_to_all
from tornado_fal_proxy.service.limits import raise_open_files
from tornado_fal_proxy.service.log_output import LogHandler, Output, log_crashes
from tornado_fal_proxy.service.options import log_format_of, parse_settings
from tornado_fal_proxy.service.process import ServiceContext, http_url, run_worker, serve, url_of
from tornado_fal_proxy.service.reload import Reloader
from tornado_fal_proxy.service.scoreboard import Scoreboard
from tornado_fal_proxy.service.server import CLOSE_GRACE_S, LISTEN_BACKLOG
from tornado_fal_proxy.service.settings import PROGRAM, Settings
from tornado_fal_proxy.service.supervisor import CannotStartWorkers, Supervisor
from tornado_fal_proxy.service.systemd import Notifier, NotListening, activated_sockets
from tornado_fal_proxy.service.usage import print_usage
from tornado_fal_proxy.service.worker import SingleProcess

if TYPE_CHECKING:
    from tornado_fal_proxy.sandbox import Sandbox  # needs an extra

__all__ = ["EXIT_ABORTED", "EXIT_CANNOT_LISTEN", "EXIT_OK", "EXIT_USAGE", "EXIT_WORKERS", "main"]

logger = logging.getLogger("tornado_fal_proxy")

# Limits how long the C library looks a name up (RES_OPTIONS, resolv.conf(5)), unless the operator has set the variable.
# With its own two tries of 5 s at each server, names that hang would keep libcurl's threads from other names too long.
RESOLVER_OPTIONS = "timeout:2 attempts:2"
# EXIT_ABORTED: the service ended as it was told to, but calls were left that had to be aborted.
EXIT_OK, EXIT_CANNOT_LISTEN, EXIT_USAGE, EXIT_ABORTED, EXIT_WORKERS = 0, 1, 2, 3, 4

# Size of a file in which a worker counts: several times as much as all labels together take.
METRICS_FILE_BYTES = 1024 * 1024


def main(argv: Sequence[str] | None = None) -> int:
    """Run the service, and return the exit code.

    0: all calls were finished after a signal. 1: cannot listen, or the doctor has found something wrong. 2: wrong
    options. 3: calls were aborted at the end. 4: worker processes do not start.
    """
    argv = sys.argv[1:] if argv is None else argv
    as_json = log_format_of(argv, os.environ) == "json"
    notifier = Notifier(os.environ)
    with contextlib.suppress(OSError):  # a working directory that was removed
        # --authorize and --resolve-key find the operator's modules there, after everything that is installed.
        sys.path.append(os.getcwd())
    try:
        if argv[:1] == ["usage"]:
            return print_usage(argv[1:], os.environ)
        if argv[:1] == ["doctor"]:
            from tornado_fal_proxy.doctor.command import print_findings  # costs memory, which is for those who ask

            return print_findings(argv[1:], PROGRAM, _config_of)
        if argv[:1] == ["completion"]:
            from tornado_fal_proxy.service.completion import completion  # needs an extra

            sys.stdout.write(completion(argv[1:]) + "\n")
            return EXIT_OK
        if argv[:1] == ["check"]:
            settings, _ = _settings(argv[1:])
            return _show_check(settings)
        return _start(argv, notifier)
    except NotListening as exc:
        return _fail(str(exc), EXIT_CANNOT_LISTEN, as_json)
    except ConfigError as exc:
        return _fail(str(exc), EXIT_USAGE, as_json)
    except CannotStartWorkers as exc:
        return _fail(f"{exc}; see the log for the reason", EXIT_WORKERS, as_json)


def _settings(argv: Sequence[str]) -> tuple[Settings, Sandbox | None]:
    """Return the settings, and the sandbox if there is to be one. Raise ConfigError, also for a missing package."""
    settings = parse_settings(argv, os.environ)
    if settings.admin_port is not None and importlib.util.find_spec("prometheus_client") is None:
        raise ConfigError([f"--admin-port needs prometheus_client: {install('metrics')}"])
    return settings, _make_sandbox() if settings.sandbox else None


def _config_of(given: argparse.Namespace) -> ProxyConfig:
    """Return the configuration of the service on this machine, for the doctor. Raise ConfigError."""
    files = {"--env-file": given.env_file, "--config": given.config}
    config = parse_settings([f"{name}={file}" for name, file in files.items() if file is not None], os.environ).relay
    if config is None:
        raise ConfigError(["--key: the sandbox has no key"])
    return config


def _start(argv: Sequence[str], notifier: Notifier) -> int:
    """Listen and serve, and return the exit code. Raise what :func:`main` reports."""
    settings, sandbox = _settings(argv)
    sockets = activated_sockets(os.environ)
    activated = bool(sockets)
    sockets = sockets or _bind(settings.port, settings.address, "")
    admin_sockets = _bind(settings.admin_port, settings.admin_address, "admin-")
    log = _set_up_logging(settings)
    if activated and (ignored := [f"--{name}" for name in ("address", "port") if settings.texts[name]]):
        logger.warning("%s not used: the listening sockets come from systemd", " and ".join(ignored))
    if settings.relay is not None and is_open_to_all(settings.relay):
        logger.warning("open to all: anyone who can reach this proxy may call every model (%s)", ADVICE)
    # The sandbox, which has no configuration of its own yet, never has many clients.
    raise_open_files(None if settings.relay is None else settings.relay.max_in_flight)
    os.environ.setdefault("RES_OPTIONS", RESOLVER_OPTIONS)
    memory.map_large_blocks()
    memory.collect_rarely()
    with _shared_metrics(settings) as directory:
        reloader = Reloader(argv, dict(os.environ), settings, [_address_of(listener) for listener in sockets])
        return _run(ServiceContext(reloader, sockets, admin_sockets, directory, sandbox, notifier, log))


def _make_sandbox() -> Sandbox:
    """Make the sandbox. Raise ConfigError if a package is missing that it needs."""
    try:
        from tornado_fal_proxy.sandbox import Sandbox  # needs an extra
    except ImportError as exc:
        raise ConfigError([f"--sandbox needs more packages ({exc}): {install('sandbox')}"]) from exc
    return Sandbox()


def _bind(port: int | None, address: str, kind: str) -> list[socket.socket]:
    """Return listening sockets. Raise NotListening, or ConfigError if the address is at fault."""
    if port is None:
        return []
    try:
        return bind_sockets(port, address, backlog=LISTEN_BACKLOG)
    except (OSError, UnicodeError) as exc:  # UnicodeError: a name that DNS cannot have
        what = f"cannot listen on {address} port {port}: {getattr(exc, 'strerror', None) or exc}"
        if getattr(exc, "errno", None) in (errno.EADDRINUSE, errno.EACCES):
            raise NotListening(f"{what}; choose another --{kind}port") from exc
        raise ConfigError([f"{what}; see --{kind}address"]) from exc


def _set_up_logging(settings: Settings) -> LogHandler:
    """Log to stderr, with the process id if there are several processes. Return the handler."""
    process = " [%(process)d]" if settings.processes > 1 else ""
    plain = PlainFormatter(f"%(asctime)s{process} %(levelname)s %(name)s: %(message)s")
    to_stderr = LogHandler(Output(sys.stderr))
    to_stderr.setFormatter(JsonFormatter() if settings.log_format == "json" else plain)
    logging.basicConfig(level=settings.log_level.upper(), handlers=[to_stderr])
    log_crashes()
    return to_stderr


@contextlib.contextmanager
def _shared_metrics(settings: Settings) -> Iterator[str | None]:
    """Make a directory in which workers count together; None if they do not. Raise ConfigError.

    All blocks of the files are written now: a write to a mapped file kills the process when the disk is full.
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
                [f"--admin-port: no room for metrics in the temporary directory ({exc.strerror}); see TMPDIR"]
            ) from exc
        yield directory


def _run(context: ServiceContext) -> int:
    """Serve in this process or in several, and return the exit code. Raise CannotStartWorkers."""
    settings, notifier = context.settings, context.notifier

    def on_ready() -> None:
        _announce(context)
        notifier.ready()

    if settings.processes == 1:
        process = SingleProcess(0, Scoreboard(1), on_ready, notifier.stopping, notifier.alive)
        return EXIT_OK if asyncio.run(serve(context, process)) else EXIT_ABORTED

    def on_alive() -> None:
        notifier.alive()
        context.log.flush()

    supervisor = Supervisor(
        settings.processes,
        lambda worker: EXIT_OK if run_worker(context, worker) else EXIT_ABORTED,
        on_ready=on_ready,
        on_stop=context.stopping,
        end_timeout_s=settings.drain_timeout_s + 2 * CLOSE_GRACE_S,
        worker_timeout_s=settings.worker_timeout_s,
        check_s=context.heartbeat_s,
        on_alive=on_alive,
        on_hangup=context.reloader.read if context.reloader.has_files else None,
    )
    return EXIT_OK if supervisor.run() else EXIT_ABORTED


def _announce(context: ServiceContext) -> None:
    """Print where the service listens, what is open and what is limited."""
    settings, url = context.settings, url_of(context.sockets[0])
    address = url + settings.route
    lines = describe(settings, [_address_of(listener) for listener in context.sockets])
    if context.sandbox is not None:
        lines["sandbox"] = f"no call leaves this machine. A page to try it: {url}/  Or:"
        lines["curl"] = (
            f"-H 'content-type: application/json' -H 'x-fal-target-url: https://fal.run/fal-ai/flux/dev' "
            f'-d \'{{"prompt": "a lighthouse"}}\' {address}'
        )
    if context.admin_sockets:
        lines["admin"] = _admin(url_of(context.admin_sockets[0]))
    _print_block(f"listens on {address}", lines, settings)


def _show_check(settings: Settings) -> int:
    """Print what the service would open and limit, and return the exit code."""
    lines = describe(settings, [settings.address])
    if settings.admin_port is not None:
        lines["admin"] = _admin(http_url(settings.admin_address, settings.admin_port))
    _print_block(f"would listen on {http_url(settings.address, settings.port)}{settings.route}", lines, settings)
    return EXIT_OK


def _address_of(listener: socket.socket) -> str:
    name = listener.getsockname()
    return str(name if listener.family == socket.AF_UNIX else name[0])


def _admin(url: str) -> str:
    return f"{url} has a status page, /metrics, /usage, /readyz and /healthz, for all who can reach it"


def _print_block(title: str, lines: dict[str, str], settings: Settings) -> None:
    """Print a line and then those that have a label, or one line of the log that has them all as its fields."""
    title = f"{PROGRAM} {__version__} {title}"
    if settings.log_format == "json":
        _print(Fields({"message": title, **lines}), sys.stdout, logging.INFO, as_json=True)
        return
    text = [title, *(f"{label}{' ' if label == 'curl' else ': '}{line}" for label, line in lines.items())]
    _print("\n".join(text), sys.stdout, logging.INFO, as_json=False)


def _fail(text: str, code: int, as_json: bool) -> int:
    """Print why the service ends, and return the exit code."""
    _print(f"{PROGRAM}: {' '.join(text.split())}", sys.stderr, logging.CRITICAL, as_json)
    return code


def _print(message: str | Fields, stream: TextIO | None, level: int, as_json: bool) -> None:
    """Print for the operator, as it is or as a line of the log. A stream that nobody reads stops nothing."""
    with contextlib.closing(Output(stream)) as output:
        record = logger.makeRecord(logger.name, level, "", 0, message, (), None)
        text = JsonFormatter().format(record) if as_json else str(message)
        output.write(text.encode("utf-8", "backslashreplace") + b"\n")
