"""The life of a process that serves: start, serve, drain, close.

Strategy. A :class:`ServiceContext` is made before anything is forked, and holds what all processes of the service
share. Each process that serves runs :func:`serve` in a loop of its own. A shutdown has three steps: calls in flight are
finished, calls that are left when time is up are aborted, and the responses to these are written before the process
ends.

This module forks nothing and prints nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tornado_fal_proxy import memory
from tornado_fal_proxy._sweep import Sweep
from tornado_fal_proxy.config import MIN_BUFFERED_BYTES, ProxyConfig
from tornado_fal_proxy.option_fields import TRUE
from tornado_fal_proxy.relay.backend import (
    backends_of,
    close_upstreams,
    flush_spending,
    shared_backend,
    store_failures,
)
from tornado_fal_proxy.service.access_log import AccessLog, access_logger
from tornado_fal_proxy.service.admin import AdminHandler, admin_application
from tornado_fal_proxy.service.application import ProxyApplication, make_application
from tornado_fal_proxy.service.key_alarm import KeyAlarm
from tornado_fal_proxy.service.log_output import LogHandler
from tornado_fal_proxy.service.recent import RecentCalls
from tornado_fal_proxy.service.reload import Reloader
from tornado_fal_proxy.service.server import NoNeighbours, Server
from tornado_fal_proxy.service.settings import Settings
from tornado_fal_proxy.service.status import StatusSources
from tornado_fal_proxy.service.status_page import StatusHandler
from tornado_fal_proxy.service.systemd import Notifier
from tornado_fal_proxy.service.trimming import Trimmer
from tornado_fal_proxy.service.usage_page import UsageHandler, UsageJsonHandler
from tornado_fal_proxy.service.worker import Shutdown, SingleProcess, Worker
from tornado_fal_proxy.spending.account import Ask
from tornado_fal_proxy.upstream.budget import DEFAULT_BUFFERED_PART
from tornado_fal_proxy.upstream.failover import bits_of, hosts_of

if TYPE_CHECKING:
    from tornado_fal_proxy.sandbox import Sandbox  # needs an extra

__all__ = ["ServiceContext", "http_url", "run_worker", "serve", "url_of"]

logger = logging.getLogger("tornado_fal_proxy")

# Time between two updates of a process's numbers on the scoreboard: a scrape may reach another process, which then
# reports numbers that are this old at most.
REFRESH_INTERVAL_S = 5.0
# Heartbeats within the time limit of systemd's watchdog, and within --worker-timeout-s: so many that some late ones do
# not matter.
HEARTBEATS_PER_WATCHDOG, HEARTBEATS_PER_TIMEOUT = 4, 10


@dataclass(frozen=True)
class ServiceContext:
    """The settings and open resources that all processes of the service share.

    ``metrics_directory`` is None unless several processes count together, and ``recent`` unless there is an admin port.
    """

    reloader: Reloader
    sockets: list[socket.socket]
    admin_sockets: list[socket.socket]
    metrics_directory: str | None
    sandbox: Sandbox | None
    notifier: Notifier
    log: LogHandler
    recent: RecentCalls | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.admin_sockets:
            object.__setattr__(self, "recent", RecentCalls(self.settings.processes))

    @property
    def settings(self) -> Settings:
        """Return the latest settings."""
        return self.reloader.settings

    @property
    def heartbeat_s(self) -> float | None:
        """Return the seconds between two heartbeats; None if nobody waits for them."""
        intervals = []
        if self.notifier.watchdog_s is not None:
            intervals.append(self.notifier.watchdog_s / HEARTBEATS_PER_WATCHDOG)
        if self.settings.processes > 1 and self.settings.worker_timeout_s:
            intervals.append(self.settings.worker_timeout_s / HEARTBEATS_PER_TIMEOUT)
        return min(intervals, default=None)

    def stopping(self) -> None:
        """Report that the service stops, and close the parent's listening sockets.

        A connection that only the parent could accept would wait until the parent ends, and get no response.
        """
        self.notifier.stopping()
        for listener in (*self.sockets, *self.admin_sockets):
            listener.close()


def run_worker(context: ServiceContext, worker: Worker) -> bool:
    """Serve as one of several processes. Return whether all calls were finished."""
    try:
        return asyncio.run(serve(context, worker))
    finally:
        if context.metrics_directory is not None and worker.is_orphan:  # else the parent removes it
            shutil.rmtree(context.metrics_directory, ignore_errors=True)


async def serve(context: ServiceContext, process: SingleProcess | Worker) -> bool:
    """Serve until a shutdown is requested, then drain and close. Return whether all calls were finished."""
    settings, sandbox = context.settings, context.sandbox
    shutdown = Shutdown()

    def use_settings() -> None:
        application.use(_with_buffer_share(context.settings), context.settings.trusted_proxies)

    process.handle_signals(shutdown, _on_hangup(context.reloader, process, use_settings))
    _resume_log_when_read(context.log, process)
    application = _application(context)
    application.key_alarm = KeyAlarm(process.scoreboard)
    access_log = AccessLog(access_logger)
    if access_logger.isEnabledFor(logging.INFO):
        application.access_log = access_log
    server = Server(application)
    application.trimmer = Trimmer(lambda: server.in_flight)
    server.listen_on(context.sockets, process, application.shed)
    admin = _serve_admin(context, process, application) if context.admin_sockets else None
    process.ready()
    heartbeat = asyncio.create_task(_send_heartbeats(process, context.heartbeat_s))
    await shutdown.requested.wait()
    process.stopping()
    server.stop()
    all_finished = await _drain(server, shutdown, settings.drain_timeout_s)
    application.closing = True
    close_upstreams(application)
    closing = [server.close()] if admin is None else [server.close(), admin.end()]
    await asyncio.gather(*closing)
    await flush_spending(application)
    if sandbox is not None:
        await sandbox.close()
    heartbeat.cancel()
    access_log.write()
    return all_finished


def _on_hangup(
    reloader: Reloader, process: SingleProcess | Worker, then: Callable[[], None]
) -> Callable[[], None] | None:
    """Return what SIGHUP does in this process; None where there is nothing to read again."""
    if not reloader.has_files:
        return None
    read = reloader.follow if isinstance(process, Worker) else reloader.read

    def on_hangup() -> None:
        if read():
            then()

    return on_hangup


def _resume_log_when_read(log: LogHandler, process: SingleProcess | Worker) -> None:
    """Finish the log, and write how many lines were lost, as soon as somebody reads it again. Count these lines."""
    loop, output = asyncio.get_running_loop(), log.output
    waiting = False

    def wait() -> None:
        nonlocal waiting
        if not waiting:
            waiting = True
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(loop.add_writer, output.fd, on_room)

    def on_room() -> None:
        nonlocal waiting
        log.flush()
        if not output.is_blocked:
            loop.remove_writer(output.fd)
            waiting = False

    log.on_blocked = wait
    log.on_lost = lambda count: process.scoreboard.count_lost_lines(process.slot, count)


def _application(context: ServiceContext) -> ProxyApplication:
    """Make the application, in sandbox mode with the sandbox started behind it."""
    settings, sandbox = context.settings, context.sandbox
    more = []
    if sandbox is not None:
        sandbox.start()
        sandbox.public_url = url_of(context.sockets[0])
        # The page cancels jobs, and a job here costs nothing.
        texts = {"allow_cancel": "yes"} | {name: text for name, text in settings.texts.items() if text}
        fails_over = (texts.get("failover") or "").lower() in TRUE
        addresses = [sandbox.address, sandbox.backup_address] if fails_over else [sandbox.address]
        texts |= {"ca_certs": sandbox.ca_certs, "connect_to": ",".join(addresses)}
        config = ProxyConfig.from_texts(texts, key=sandbox.key, more=settings.more)
        more = sandbox.page_rules(settings.route)
        settings = replace(settings, relay=config)
    application = make_application(_with_buffer_share(settings), settings.route, more, settings.trusted_proxies)
    application.host_header = None if sandbox is None else sandbox.host_header
    return application


def _with_buffer_share(settings: Settings) -> ProxyConfig:
    """Return the configuration with a limit of buffered bytes for one process, if the operator has set none."""
    config = settings.relay
    assert config is not None
    if config.max_buffered_bytes is None:
        config = replace(config, max_buffered_bytes=buffer_share(settings.processes))
    return config


def buffer_share(processes: int) -> int:
    """Return the limit of buffered bytes for one of so many processes, which share the memory of the service."""
    return max(memory.available_bytes() // DEFAULT_BUFFERED_PART // processes, MIN_BUFFERED_BYTES)


def _serve_admin(context: ServiceContext, process: SingleProcess | Worker, application: ProxyApplication) -> Server:
    """Count calls, and serve the admin port from now on."""
    from tornado_fal_proxy.service.metrics import Metrics  # needs an extra

    scoreboard = process.scoreboard

    def refresh() -> bool:
        backends = backends_of(application)
        scoreboard.update(
            process.slot,
            in_flight=sum(slots.in_use for slots in {backend.slots for backend in backends}),
            upstream_connections=sum(backend.client.connections() for backend in backends),
            down=bits_of([host for backend in backends for host in backend.client.down]),
            buffered_bytes=sum(budget.used for budget in {backend.client.budget for backend in backends}),
        )
        failures = store_failures(application)
        metrics.count_store_failures(failures)
        failures.clear()
        return True

    application.metrics = metrics = Metrics(scoreboard, process.slot, context.metrics_directory, application.config)
    refresh()
    Sweep(REFRESH_INTERVAL_S, refresh).start()

    def is_ready() -> tuple[bool, list[str]]:
        refresh()
        workers = scoreboard.workers()
        down = {host for worker in workers for host in hosts_of(worker.down)}
        return any(worker.connections is not None for worker in workers), sorted(down)

    assert context.recent is not None
    application.recent = context.recent.writer(process.slot)
    sources = StatusSources(
        *(metrics, scoreboard, context.recent, is_ready),
        config_of=lambda: application.config,
        ask_of=lambda: _usage_of(application),
    )
    usage: dict[str, Any] = {"ask_of": lambda: _usage_of(application)}
    pages: list[tuple[str, type[AdminHandler], dict[str, Any]]] = [
        ("/", StatusHandler, {"sources": sources}),
        ("/usage", UsageHandler, usage),
        ("/usage.json", UsageJsonHandler, usage),
    ]
    admin = Server(admin_application(metrics, is_ready, refresh, pages))
    admin.listen_on(context.admin_sockets, NoNeighbours(), set())
    return admin


def _usage_of(application: ProxyApplication) -> Ask | None:
    """Return what asks the store of the calls for its account; None where nothing is counted."""
    spending = application.config.spending
    if spending is None or not spending.needs_store:
        return None
    return lambda *period: shared_backend(application, application.config).ledger.usage(*period)


async def _send_heartbeats(process: SingleProcess | Worker, interval_s: float | None) -> None:
    """Send a heartbeat again and again, as long as the loop runs."""
    while interval_s is not None:
        process.heartbeat()
        await asyncio.sleep(interval_s)


async def _drain(server: Server, shutdown: Shutdown, timeout_s: float) -> bool:
    """Wait until all calls in flight are finished. Return False if time is up, or the shutdown is forced, before."""
    logger.info("drain: %d calls in flight, timeout %g s", server.in_flight, timeout_s)
    drained, forced = asyncio.create_task(server.drain()), asyncio.create_task(shutdown.forced.wait())
    await asyncio.wait((drained, forced), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    drained.cancel()
    forced.cancel()
    if aborted := server.in_flight:
        logger.warning("drain: %d calls aborted (a longer --drain-timeout-s gives them more time)", aborted)
    return not aborted


def url_of(listener: socket.socket) -> str:
    """Return the URL at which a browser on this machine finds the service."""
    if listener.family == socket.AF_UNIX:
        return f"http://unix:{listener.getsockname()}:"
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # noqa: S104  (recognized, not bound)
        host = "127.0.0.1" if listener.family == socket.AF_INET else "::1"
    return http_url(host, port)


def http_url(host: str, port: int) -> str:
    """Return the URL of an address or a name."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
