"""Tornado's curl client, made to stream, pause, cancel and scale.

Strategy. :class:`UpstreamClient` keeps everything of :class:`tornado.curl_httpclient.CurlAsyncHTTPClient` that drives
libcurl from the IOLoop (sockets, timers, ``fetch()``) and adds a second, leaner way in: :meth:`UpstreamClient.start`
takes an easy handle that is configured already, sets what differs for this call, and returns a
:class:`~tornado_fal_proxy.transfer.Transfer`.

What libcurl would do by itself and must not: it follows no redirect, speaks no protocol but https, reads no .netrc,
keeps no cookie, and sends no POST a second time (``Transfer.on_connected``).

It parses only ``https://<checked host>/``. Path and query go out byte for byte as CURLOPT_REQUEST_TARGET (with
CURLOPT_PATH_AS_IS alone it rewrites ``%e6`` to ``%E6``), so it never sees a string of the caller's as a URL.

HTTP/2: calls to a host known to speak it wait for a connection that is being made (PIPEWAIT) and share it. Against a
host that speaks HTTP/1.1 PIPEWAIT would line up all calls behind the first answer; ``hosts`` decides who waits for
whom. What a handshake negotiated (ALPN) libcurl tells only in its verbose text, before the request is written; where
that text is missing the answer's status line tells it later.

A paused HTTP/2 stream would let its server send up to 10 MB more, for that is the window that libcurl opens as soon as
data comes. Its limit of the rate (MAX_RECV_SPEED_LARGE) also limits the window. Set anew whenever the reader has caught
up, before it can bind, it is no limit but a window: ``Transfer.window``. It must be set once more when the body has
begun: there libcurl spreads the rate over the length that was declared, and would make an answer of 60 kB take 0.2 s.

A POST that is written to a pooled connection which fal has closed meanwhile is lost, for it must not be sent again.
libcurl looks at a pooled connection at most once a second, so the idle ones are watched here as well, and POSTs avoid
the pool of a host of which one was closed just now. At one on which a paused transfer is, it does not look at all: what
is left of that is taken, however slow its reader is.

Nothing here is called inside libcurl but ``connected``, ``learn``, ``_handle_socket`` and ``_set_timeout``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import socket
from functools import partial
from typing import Any

import pycurl
from tornado.curl_httpclient import CurlAsyncHTTPClient

from tornado_fal_proxy import memory
from tornado_fal_proxy.config import ProxyConfig
from tornado_fal_proxy.decoding import ACCEPT_ENCODING
from tornado_fal_proxy.errors import (
    ConnectionLost,
    MalformedAnswer,
    ProxyError,
    TooManyCalls,
    UpstreamError,
    UpstreamTimeout,
)
from tornado_fal_proxy.hosts import HANDSHAKE_WAIT_S, HANG_S, IDLE_CONNECTION_S, Hosts
from tornado_fal_proxy.policy import Target
from tornado_fal_proxy.sockets import UpstreamSockets
from tornado_fal_proxy.transfer import (
    FIRST_WINDOW_BYTES,
    HIGH_WATER_BYTES,
    HTTP2_STREAM_ERROR,
    Transfer,
    upstream_error,
)

__all__ = ["UpstreamClient"]

logger = logging.getLogger("tornado_fal_proxy")

# Easy handles kept for the next call. A configured one saves 50 us and holds some 10 kB.
IDLE_HANDLES = 512
# A handle that sent more than this is not kept, for it keeps its buffer.
KEPT_BODY_BYTES = 16 * 1024
# libcurl keeps it for each POST until that has its answer. Where large blocks are mapped, only the pages that were
# written to count, mostly one; elsewhere all of it, so there it is the least that libcurl takes.
MAPPED_UPLOAD_BUFFER_BYTES, UPLOAD_BUFFER_BYTES = 256 * 1024, 16 * 1024
# For how long a connection takes new calls, and an address counts that was looked up: together less than a minute, so
# that a name that moves is followed in that, even by a connection that is never idle. libcurl's own are a day and 60 s.
CONNECTION_LIFETIME_S, ADDRESS_LIFETIME_S = IDLE_CONNECTION_S, 9
# How soon a peer that vanished without a word is noticed: 60 s of silence, then probes 15 s apart.
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S = 60, 15
# The same where something was sent to it that is not acknowledged. The kernel tries for 15 minutes, and over HTTP/2
# each call that comes meanwhile joins those that hang. A route that heals by itself takes less than this.
UNACKNOWLEDGED_S = 30.0
# Whether a limit of libcurl's rate serves as a window: tried with 8.23. In 8.16 it is a limit and nothing else.
RATE_IS_WINDOW = pycurl.version_info()[2] >= 0x081700
# libcurl wakes each transfer once a second. In steps of this many milliseconds thousands of them wake together, and
# nothing that it times (connecting, trying the next address) needs to be more exact. With 20 they cost twice as much.
TIMER_STEP_MS = 100
# Of a crowd whose time is over so many are ended every so many seconds: that is 5 ms of answers, and a quarter of the
# process. A call that others make meanwhile takes several turns of the loop.
ENDED_AT_ONCE, ENDING_INTERVAL_S = 16, 0.02
# How often to ask the kernel which idle connections were closed: less often than calls are made under load.
LOOK_INTERVAL_S = 0.001

# A transfer whose time is over, whether libcurl had it then, when a byte moved last, and what its caller is told.
_Over = tuple[Transfer, bool, float, UpstreamTimeout]


class UpstreamClient(CurlAsyncHTTPClient):
    """Connections to fal for one :class:`~tornado_fal_proxy.config.ProxyConfig` on one IOLoop.

    Make it inside the running loop and after any fork, with ``force_instance=True``. ``fetch()`` works as on its base
    class, with none of this module's rules.
    """

    def initialize(self, config: ProxyConfig) -> None:  # type: ignore[override]
        self._loop = asyncio.get_running_loop()
        self._due_now = False
        self._timer: asyncio.TimerHandle | None = None
        self._shut = False
        self._sockets = UpstreamSockets() if hasattr(select, "epoll") else None
        if self._sockets is not None:
            self._loop.add_reader(self._sockets.fileno(), self._serve_sockets)
        super().initialize()
        self._config = config
        # Below the number of calls in flight libcurl would close each connection of HTTP/1.1 after its call.
        self._multi.setopt(pycurl.M_MAXCONNECTS, config.max_in_flight)
        self._hosts: Hosts[Transfer] = Hosts()
        self._running: dict[pycurl.Curl, Transfer] = {}
        self._handles: dict[str, list[pycurl.Curl]] = {"GET": [], "POST": []}
        self._ports: dict[int, str] = {}  # which host a connection that leaves from this port goes to
        self._look_again_at = 0.0
        self._sweep: asyncio.TimerHandle | None = None
        self._sweep_interval_s = min(max(config.idle_timeout_s / 20, 0.02), config.connect_timeout_s, 5.0)
        self._to_open: list[Transfer] = []
        self._in_flight = 0
        self._prepare_socket = partial(_give_up_after, min(UNACKNOWLEDGED_S, config.idle_timeout_s))
        self._upload_buffer_bytes = MAPPED_UPLOAD_BUFFER_BYTES if memory.are_mapped() else UPLOAD_BUFFER_BYTES

    # For the handler.

    @property
    def in_flight(self) -> int:
        """Calls that were admitted and not released."""
        return self._in_flight

    def connections(self) -> int:
        """Connections that are open, as far as that can be known: 0 without epoll."""
        return 0 if self._sockets is None else self._sockets.count()

    def admit(self) -> None:
        """Take one of ``max_in_flight`` places. Raises TooManyCalls; else :meth:`release` gives it back."""
        if self._in_flight >= self._config.max_in_flight:
            raise TooManyCalls(f"{self._in_flight} calls in flight")
        self._in_flight += 1

    def release(self) -> None:
        """Give back a place."""
        self._in_flight -= 1

    def start(
        self,
        method: str,
        target: Target,
        headers: list[bytes],
        body: bytes = b"",
        *,
        high_water: int = HIGH_WATER_BYTES,
    ) -> Transfer:
        """Begin a call and return at once. ``headers`` are lines as :func:`policy.request_headers` makes them.

        ``high_water`` is the number of bytes after which libcurl is paused until they are read. Raises ConnectionLost
        after :meth:`close`.
        """
        if self._shut:
            raise ConnectionLost("the proxy is closing")
        with_body = method != "GET" or bool(body)
        # A handle stays of one kind: libcurl's options for bodies do not mix well on one that changes. A GET with a
        # body, which no client of fal's sends, gets one of its own.
        pool = None if with_body and method != "POST" else self._handles.get(method)
        if pool:
            curl = pool.pop()
        else:
            curl = self._configured_handle(with_body)
            if pool is None:
                curl.setopt(pycurl.CUSTOMREQUEST, method)
        if len(body) > KEPT_BODY_BYTES:
            pool = None
        transfer = Transfer(self, curl, pool, host=target.host, repeatable=method != "POST")
        transfer.high_water = high_water
        if len(body) <= FIRST_WINDOW_BYTES:
            transfer.uploaded = len(body)  # it leaves at once, so that seeing it gone later is no sign of life
        curl.setopt(pycurl.URL, f"https://{target.host}/")
        curl.setopt(pycurl.REQUEST_TARGET, target.request_target)
        curl.setopt(pycurl.HTTPHEADER, [*headers, ACCEPT_ENCODING])
        curl.setopt(pycurl.PREREQFUNCTION, transfer.on_connected)
        curl.setopt(pycurl.HEADERFUNCTION, transfer.on_header)
        curl.setopt(pycurl.WRITEFUNCTION, transfer.on_body)
        if with_body:
            curl.setopt(pycurl.POSTFIELDS, body)
        self._running[curl] = transfer
        self._enqueue(transfer)
        if self._sweep is None:
            self._sweep = self._loop.call_later(self._sweep_interval_s, self._end_idle_transfers)
        return transfer

    def close(self) -> None:
        """End all transfers, answering their callers, and close all connections."""
        if self._shut:
            return
        self._shut = True
        for transfer in list(self._running.values()):
            self.abandon(transfer, ConnectionLost("the proxy is closing", may_have_run=self._may_have_run(transfer)))
        for timer in (self._sweep, self._timer):
            if timer is not None:
                timer.cancel()
        for handles in self._handles.values():
            for curl in handles:
                curl.close()
            handles.clear()
        super().close()
        if self._sockets is not None:
            self._loop.remove_reader(self._sockets.fileno())
            self._sockets.close()

    # For transfers.

    def now(self) -> float:
        return self._loop.time()

    def connected(self, transfer: Transfer, local_port: int) -> None:
        self._ports[local_port] = transfer.host
        if transfer.leads or transfer.looks_up:
            # Not now, for this runs inside libcurl.
            self._loop.call_soon(self._reached, transfer)

    def learn(self, host: str, http2: bool) -> None:
        self._hosts.learn(host, http2)

    def resume(self, transfer: Transfer) -> None:
        curl = transfer.curl
        if curl is None:
            return
        with contextlib.suppress(pycurl.error):  # it has failed meanwhile: _finish will hear of it
            curl.pause(pycurl.PAUSE_CONT)
        # To set the rate of a transfer that has filled up again already would wrongly unpause it.
        if RATE_IS_WINDOW and not transfer.paused:
            curl.setopt(pycurl.MAX_RECV_SPEED_LARGE, 0 if transfer.remains else transfer.window)
        self._set_timeout(0)

    def open_window_soon(self, transfer: Transfer) -> None:
        self._to_open.append(transfer)

    def abandon(self, transfer: Transfer, reason: ProxyError) -> None:
        """Take ``transfer`` out of libcurl, wherever it is, and let its reader know why."""
        curl = transfer.curl
        if curl is None:
            return
        transfer.curl = None  # on_body drops what comes from here on
        del self._running[curl]
        hangs = False
        if transfer.started:
            if transfer.paused:
                # Removing a paused HTTP/2 stream would leave its RST_STREAM unsent.
                with contextlib.suppress(pycurl.error):
                    curl.pause(pycurl.PAUSE_CONT)
            self._multi.remove_handle(curl)
            hangs = transfer.looks_up
        self._leave(transfer, hangs=hangs)
        self._recycle(transfer, curl)
        transfer.end(reason)

    # Handles.

    def _configured_handle(self, with_body: bool) -> pycurl.Curl:
        config = self._config
        curl = self._curl_create()
        curl.setopt(pycurl.NOSIGNAL, 1)
        curl.setopt(pycurl.PROTOCOLS, pycurl.PROTO_HTTPS)
        curl.setopt(pycurl.UPLOAD_BUFFERSIZE, self._upload_buffer_bytes)
        curl.setopt(pycurl.FOLLOWLOCATION, 0)
        curl.setopt(pycurl.HTTP_VERSION, pycurl.CURL_HTTP_VERSION_2TLS)
        curl.setopt(pycurl.CONNECTTIMEOUT_MS, round(config.connect_timeout_s * 1000))
        if RATE_IS_WINDOW:
            curl.setopt(pycurl.MAX_RECV_SPEED_LARGE, FIRST_WINDOW_BYTES)
        curl.setopt(pycurl.MAXAGE_CONN, IDLE_CONNECTION_S)
        curl.setopt(pycurl.MAXLIFETIME_CONN, CONNECTION_LIFETIME_S)
        curl.setopt(pycurl.DNS_CACHE_TIMEOUT, ADDRESS_LIFETIME_S)
        curl.setopt(pycurl.TCP_KEEPALIVE, 1)
        curl.setopt(pycurl.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
        curl.setopt(pycurl.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
        curl.setopt(pycurl.SOCKOPTFUNCTION, self._prepare_socket)
        if config.ca_certs is not None:
            curl.setopt(pycurl.CAINFO, os.fspath(config.ca_certs))
        if config.connect_to is not None:
            curl.setopt(pycurl.CONNECT_TO, [f"::{config.connect_to}"])
            curl.setopt(pycurl.NOPROXY, "*")
        curl.setopt(pycurl.POST if with_body else pycurl.HTTPGET, 1)
        return curl

    def _recycle(self, transfer: Transfer, curl: pycurl.Curl) -> None:
        transfer.curl = None
        pool = transfer.pool
        if pool is None or len(pool) >= IDLE_HANDLES or self._shut:
            curl.close()
            return
        if RATE_IS_WINDOW and transfer.window != FIRST_WINDOW_BYTES:
            curl.setopt(pycurl.MAX_RECV_SPEED_LARGE, FIRST_WINDOW_BYTES)
        if transfer.fresh:
            curl.setopt(pycurl.FRESH_CONNECT, 0)
        if transfer.leads:
            curl.setopt(pycurl.VERBOSE, 0)
            curl.setopt(pycurl.DEBUGFUNCTION, None)
        # They would keep the transfer, and with it its decoder: of brotli that is up to 16 MB.
        for callback in (pycurl.PREREQFUNCTION, pycurl.HEADERFUNCTION, pycurl.WRITEFUNCTION):
            curl.setopt(callback, None)
        if pool is self._handles["POST"]:
            curl.setopt(pycurl.POSTFIELDS, b"")  # let go of the body
        pool.append(curl)

    # Connections.

    def _enqueue(self, transfer: Transfer) -> None:
        """Give the transfer to libcurl, or let it wait for the handshake of the call that leads to the same host."""
        now = self.now()
        self._look_at_idle_sockets(now)
        if self._hosts.arrive(transfer, now):
            self._add(transfer)

    def _add(self, transfer: Transfer) -> None:
        curl = transfer.curl
        assert curl is not None
        curl.setopt(pycurl.PIPEWAIT, 1 if self._hosts.speaks_http2(transfer.host) else 0)
        if transfer.leads:
            self._loop.call_later(HANDSHAKE_WAIT_S, self._lead_is_too_slow, transfer)
            curl.setopt(pycurl.DEBUGFUNCTION, transfer.on_debug)
            curl.setopt(pycurl.VERBOSE, 1)
        if not transfer.repeatable and self._hosts.is_suspect(transfer.host, self.now()):
            transfer.fresh = True
        if transfer.fresh:
            curl.setopt(pycurl.FRESH_CONNECT, 1)
        transfer.started = True
        self._multi.add_handle(curl)

    def _add_all(self, transfers: list[Transfer]) -> None:
        """Give those to libcurl that no longer have to wait for another."""
        for transfer in transfers:
            if transfer.curl is not None:
                self._add(transfer)

    def _reached(self, transfer: Transfer) -> None:
        self._add_all(self._hosts.reached(transfer))

    def _lead_is_too_slow(self, transfer: Transfer) -> None:
        self._add_all(self._hosts.too_slow(transfer))

    def _look_up_ended(self) -> None:
        if not self._shut:
            self._add_all(self._hosts.look_up_ended())

    def _leave(self, transfer: Transfer, *, hangs: bool) -> None:
        transfer.started = False
        if hangs:
            self._loop.call_later(HANG_S, self._look_up_ended)
        self._add_all(self._hosts.leave(transfer, self.now(), hangs=hangs))

    def _handle_socket(self, event: int, fd: int, multi: Any, data: Any) -> None:
        """Tornado's SOCKETFUNCTION: libcurl wants to know of a socket, or no longer does."""
        if self._sockets is None:
            super()._handle_socket(event, fd, multi, data)
        else:
            self._sockets.wait_for(event, fd)

    def _serve_sockets(self) -> None:
        """Let libcurl act on the sockets that are ready, and learn which idle ones fal has closed."""
        active = self._ready_sockets()
        for fd, action in active:
            self._act(fd, action)
        if active:
            self._finish_pending_requests()

    def _ready_sockets(self) -> list[tuple[int, int]]:
        assert self._sockets is not None
        active, closed = self._sockets.ready()
        ports = set()
        for fd in closed:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as duplicate:
                port = duplicate.getsockname()[1]
                self._hosts.suspect(self._ports.get(port, ""), self.now())
                ports.add(port)
                # libcurl 8.23 takes a connection over HTTP/2 that ended as TLS has it for alive, unless both sides have
                # closed it. On this one no answer can come any more.
                duplicate.shutdown(socket.SHUT_WR)
        if ports:
            self._take_remains(ports)
        return active

    def _take_remains(self, ports: set[int]) -> None:
        """Let libcurl find out that connections are closed on which there are only paused transfers, or none.

        As long as one is paused libcurl does not look, and over HTTP/2 would send other calls on the same connection.
        """
        for transfer in list(self._running.values()):
            shares = transfer.head is not None and transfer.head.protocol == "2"
            if transfer.paused and transfer.port in ports and shares:
                transfer.paused, transfer.remains = False, True
                self.resume(transfer)

    def _act(self, fd: int, action: int) -> None:
        try:
            self._multi.socket_action(fd, action)
        except pycurl.error as exc:
            logger.error("libcurl's multi interface failed: %s", exc)

    def _set_timeout(self, msecs: int) -> None:
        """Tornado's TIMERFUNCTION: libcurl wants to run in so many milliseconds; below zero it does not.

        Each added handle asks for zero, and of a crowd's requests in one turn of the loop one is enough. A timer that
        runs already is left alone when it is early enough: libcurl is asked then what comes next.
        """
        if msecs == 0:
            if not self._due_now:
                self._due_now = True
                self._loop.call_soon(self._run_due)
        elif msecs > 0:
            at = self._loop.time() + max(msecs, TIMER_STEP_MS) / 1000
            if self._timer is not None:
                if self._timer.when() <= at:
                    return
                self._timer.cancel()
            self._timer = self._loop.call_at(at, self._handle_timeout)

    def _run_due(self) -> None:
        self._due_now = False
        if not self._shut:
            self._act(pycurl.SOCKET_TIMEOUT, 0)
            self._finish_pending_requests()

    def _handle_timeout(self) -> None:
        self._timer = None
        if not self._shut:
            super()._handle_timeout()

    def _look_at_idle_sockets(self, now: float) -> None:
        """Before a call begins: see what has happened to the connections that it may get."""
        if self._sockets is not None and now >= self._look_again_at:
            self._look_again_at = now + LOOK_INTERVAL_S
            self._ready_sockets()

    # Ends.

    def _finish_pending_requests(self) -> None:
        """Tornado calls this when libcurl has returned from an action. Then its callbacks' wishes can be met."""
        super()._finish_pending_requests()
        if self._to_open:
            transfers, self._to_open = self._to_open, []
            for transfer in transfers:
                if not transfer.paused:
                    self.resume(transfer)

    def _finish(self, curl: pycurl.Curl, curl_error: int | None = None, curl_message: str | None = None) -> None:
        """Tornado calls this for each handle that libcurl is done with, ours and those of ``fetch()``."""
        transfer = self._running.get(curl)
        if transfer is None:
            super()._finish(curl, curl_error, curl_message)
            return
        failure: UpstreamError | None = None
        if curl_error is not None:
            # A connection may have been ready and nothing yet written to it.
            transfer.may_have_left = transfer.may_have_left and curl.getinfo(pycurl.REQUEST_SIZE) > 0
            failure = upstream_error(curl_error, curl_message or "", may_have_run=self._may_have_run(transfer))
        elif transfer.head is None:
            failure = MalformedAnswer("no head", may_have_run=self._may_have_run(transfer))
        if failure is not None and curl_error != HTTP2_STREAM_ERROR:
            self._hosts.suspect(transfer.host, self.now())
        self._multi.remove_handle(curl)
        retry = failure is not None and transfer.may_retry(failure)
        if failure is not None and not retry:
            for other in self._hosts.waiting_for(transfer):
                self.abandon(other, type(failure)(failure.detail))
        self._leave(transfer, hangs=transfer.looks_up and curl_error == pycurl.E_OPERATION_TIMEDOUT)
        if retry:
            transfer.fresh = True
            self._enqueue(transfer)
            return
        del self._running[curl]
        self._recycle(transfer, curl)
        transfer.end(failure)

    def _may_have_run(self, transfer: Transfer) -> bool:
        return transfer.may_have_left and not transfer.repeatable

    def _end_idle_transfers(self) -> None:
        """End the transfers on which no byte has moved for ``idle_timeout_s``. One timer serves all of them."""
        now = self.now()
        over: list[_Over] = []
        for transfer in self._running.values():
            if not transfer.started and now - transfer.touched > self._config.connect_timeout_s:
                reason = UpstreamTimeout("too many hosts that were not seen before are looked up")
                over.append((transfer, False, transfer.touched, reason))
                continue
            # While it is paused the caller is the slow one, and the handler watches that.
            if now - transfer.touched > self._config.idle_timeout_s and not transfer.paused:
                assert transfer.curl is not None
                uploaded = transfer.curl.getinfo(pycurl.SIZE_UPLOAD_T)
                if uploaded != transfer.uploaded:
                    transfer.uploaded, transfer.touched = uploaded, now
                    continue
                reason = UpstreamTimeout("no byte moved", may_have_run=self._may_have_run(transfer))
                over.append((transfer, transfer.started, transfer.touched, reason))
        self._end_some(over)
        self._sweep = None
        if self._running:
            self._sweep = self._loop.call_later(self._sweep_interval_s, self._end_idle_transfers)

    def _end_some(self, over: list[_Over]) -> None:
        """End some of those transfers, the oldest first, and the others soon."""
        for transfer, started, touched, reason in over[:ENDED_AT_ONCE]:
            if (transfer.started, transfer.touched) == (started, touched):  # else its time has come meanwhile
                self.abandon(transfer, reason)
        if more := over[ENDED_AT_ONCE:]:
            self._loop.call_later(ENDING_INTERVAL_S, self._end_some, more)


def _give_up_after(seconds: float, fd: int, _purpose: int) -> int:
    """SOCKOPTFUNCTION: let the kernel end a connection on which nothing was acknowledged for so long. Linux only."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as duplicate:
            duplicate.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(round(seconds * 1000), 1))
    return pycurl.SOCKOPT_OK
