"""Start calls to fal on libcurl, share connections between them, watch their progress, and end them.

Strategy. :class:`UpstreamClient` is Tornado's curl client with a second, leaner way in. :meth:`UpstreamClient.start`
takes an easy handle that is configured already, sets what differs for this call, and returns a
:class:`~tornado_fal_proxy.upstream.transfer.Transfer`. ``fetch()`` still works, with none of this module's rules.

HTTP/1: a connection serves one call. libcurl would take surplus bytes behind a response, such as a second response to
the same request, for the response to the next request on the connection: another client's data. Bytes that OpenSSL has
read ahead cannot be seen from here, so there is no check that would make a second call safe.

HTTP/2: calls to a host known to speak it wait for a connection that is being made (PIPEWAIT) and share it. Against a
host that speaks HTTP/1.1 PIPEWAIT would line up all calls behind the first response; ``hosts`` decides which call waits
for which. libcurl tells the protocol that a handshake negotiated (ALPN) only in its verbose text, before the request is
written. Where that text is missing the response's status line tells it later.

Paid calls avoid the pool of a host of which a connection was closed just now. libcurl does not check a connection on
which a paused transfer is: the rest of that transfer is taken, however slow its reader is.

Only ``connected``, ``protocol_known`` and ``open_window_soon`` run inside libcurl.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Iterable

import pycurl

from tornado_fal_proxy._sweep import Sweep
from tornado_fal_proxy.config import ProxyConfig
from tornado_fal_proxy.errors import (
    ConnectionLost,
    MalformedResponse,
    ProxyError,
    UpstreamError,
    UpstreamTimeout,
)
from tornado_fal_proxy.rules.endpoints import BACKUP_HOSTS, is_repeatable
from tornado_fal_proxy.rules.target import Target
from tornado_fal_proxy.upstream.body import FIRST_WINDOW_BYTES
from tornado_fal_proxy.upstream.budget import BufferBudget, buffer_limit
from tornado_fal_proxy.upstream.curl_errors import HTTP2_STREAM_ERROR, upstream_error
from tornado_fal_proxy.upstream.curl_loop import CurlLoop
from tornado_fal_proxy.upstream.failover import BACKUP_CONNECT_TIMEOUT_S, Failover
from tornado_fal_proxy.upstream.handles import (
    HandlePool,
    forbid_reuse,
    set_connection,
    set_host,
    set_request,
    set_window,
)
from tornado_fal_proxy.upstream.hosts import HANDSHAKE_WAIT_S, HANG_S, Hosts
from tornado_fal_proxy.upstream.transfer import Transfer, secret_of

__all__ = ["UpstreamClient"]

# Limit how many transfers of a crowd that timed out end at once, and how soon the next do: 5 ms of responses, and a
# quarter of the process's time. A call that another client makes meanwhile takes several turns of the loop.
MAX_ENDED_AT_ONCE, ENDING_INTERVAL_S = 16, 0.02
# Limits the connections that are made in one turn of the loop, because each takes some milliseconds of processor time
# for TLS, and libcurl works on all that it has been given without a pause.
MAX_NEW_CONNECTIONS = 2
# Limits how rarely idle transfers are swept.
MAX_SWEEP_INTERVAL_S = 5.0

# A transfer that timed out, whether libcurl had it then, when a byte moved last, and the error that its client gets.
_TimedOut = tuple[Transfer, bool, float, UpstreamTimeout]


class UpstreamClient(CurlLoop):
    """Keep the connections to fal for one :class:`~tornado_fal_proxy.config.ProxyConfig` on one IOLoop.

    Make it inside the running loop and after any fork, with ``force_instance=True``.
    """

    def initialize(self, config: ProxyConfig) -> None:  # type: ignore[override]
        """Set up libcurl for ``config``."""
        super().initialize()
        self._config = config
        self.budget = BufferBudget(buffer_limit(config))
        # Below the number of calls in flight libcurl would close each connection of HTTP/1.1 after its call.
        self._multi.setopt(pycurl.M_MAXCONNECTS, config.max_in_flight)
        self._shut = False
        self._handles = HandlePool(config, self._curl_create)
        self._hosts: Hosts[Transfer] = Hosts()
        self._running: dict[pycurl.Curl, Transfer] = {}
        self._ports: dict[int, str] = {}  # the host of the connection that leaves from this port
        self._to_open: list[Transfer] = []
        self._to_add: deque[Transfer] = deque()
        self.failover = Failover(self._loop, self._probe) if config.failover else None
        self._probes: dict[pycurl.Curl, str] = {}
        interval_s = min(max(config.idle_timeout_s / 20, 0.02), config.connect_timeout_s, MAX_SWEEP_INTERVAL_S)
        self._sweep = Sweep(interval_s, self._end_idle_transfers)

    # For the relay.

    def start(
        self,
        method: str,
        target: Target,
        headers: list[bytes],
        body: bytes = b"",
        *,
        client: str = "",
    ) -> Transfer:
        """Begin a call and return at once. ``headers`` are lines as :func:`headers.request_headers` makes them.

        ``client`` is the address of the client, whose calls to unproven hosts take turns with those of other clients.
        A response that must not break off, because a repetition of its call costs more, may be buffered up to
        ``response_buffer_bytes``. Raise ConnectionLost after :meth:`close`.
        """
        if self._shut:
            raise ConnectionLost("the proxy is closing")
        curl, pool = self._handles.take(method, body)
        repeatable = is_repeatable(method, target)
        transfer = Transfer(self, curl, pool, host=target.host, repeatable=repeatable, client=client)
        if not transfer.repeatable:
            transfer.high_water = self._config.response_buffer_bytes
        if len(body) > FIRST_WINDOW_BYTES:
            transfer.upload_bytes = len(body)  # a smaller one leaves in one write, whose end is the only progress
        if self._config.event_streams_over_http1:
            transfer.http1_only = any(line.startswith(b"accept:") and b"text/event-stream" in line for line in headers)
        transfer.secret = secret_of(headers)
        set_request(curl, transfer, method, target, headers, body)
        self._running[curl] = transfer
        self._enqueue(transfer)
        self._sweep.start()
        return transfer

    def close(self) -> None:
        """Abort all transfers, with a response to their clients, and close all connections."""
        if self._shut:
            return
        self._shut = True
        for transfer in list(self._running.values()):
            self.abort(transfer, ConnectionLost("the proxy is closing", may_have_run=_may_have_run(transfer)))
        self._sweep.stop()
        if self.failover is not None:
            self.failover.close()
            for curl in list(self._probes):
                self._multi.remove_handle(curl)
                curl.close()
            self._probes.clear()
        self._handles.close()
        super().close()

    @property
    def down(self) -> tuple[str, ...]:
        """Return the hosts whose calls go to a backup now."""
        return () if self.failover is None else self.failover.down

    # For transfers.

    def now(self) -> float:
        """Return the loop's time, in seconds."""
        return self._loop.time()

    def connected(self, transfer: Transfer, local_port: int) -> None:
        """Note which host the connection from that port goes to, and let the calls go that wait for the transfer."""
        self._ports[local_port] = transfer.host
        if transfer.leads or transfer.resolving:
            # Not now, because this runs inside libcurl.
            self._loop.call_soon(self._on_connected, transfer)

    def protocol_known(self, transfer: Transfer, http2: bool) -> None:
        """Note whether the transfer's host speaks HTTP/2, and let go of a connection that speaks HTTP/1 later."""
        # A status line may lie about HTTP/2 where a handshake has chosen HTTP/1.
        if not transfer.http1_only and not (http2 and self._hosts.speaks_http2(transfer.host) is False):
            self._hosts.set_protocol(transfer.host, http2)
        if not http2 and not transfer.forbids_reuse:
            # Not now, because this runs inside libcurl.
            self._loop.call_soon(_forbid_reuse, transfer)

    def resume(self, transfer: Transfer) -> None:
        """Let libcurl go on with the transfer."""
        curl = transfer.curl
        if curl is None:
            return
        with contextlib.suppress(pycurl.error):  # it has failed meanwhile, which _finish will report
            curl.pause(pycurl.PAUSE_CONT)
        set_window(curl, transfer)
        self.run_soon()

    def open_window_soon(self, transfer: Transfer) -> None:
        """Open the transfer's window as soon as libcurl has returned."""
        self._to_open.append(transfer)

    def abort(self, transfer: Transfer, reason: ProxyError) -> None:
        """Take ``transfer`` out of libcurl, wherever it is, and raise ``reason`` in its reader."""
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
            hangs = transfer.resolving
        self._leave(transfer, hangs=hangs)
        self._handles.give_back(transfer, curl)
        transfer.end(reason)

    # Connections.

    def _enqueue(self, transfer: Transfer) -> None:
        """Give the transfer to libcurl, or let it wait for the handshake of the call that leads to the same host."""
        now = self.now()
        self.refresh_idle(now)
        if self.failover is not None and self.failover.is_down(transfer.host):
            self._divert(transfer, now)
        if self._hosts.enter(transfer, now):
            self._add(transfer)

    def _add(self, transfer: Transfer) -> None:
        """Give the transfer to libcurl: at once, or with others that need a connection, a few in each turn."""
        self._note_suspicion(transfer)
        shares = self._hosts.speaks_http2(transfer.host) and not transfer.http1_only
        if shares and not transfer.fresh_connect:
            self._add_now(transfer)
        else:
            transfer.last_progress_at = math.inf  # it waits for its turn, which comes: no time-out of its own runs yet
            # A leader first, because calls that need no connection of their own wait for it.
            (self._to_add.appendleft if transfer.leads else self._to_add.append)(transfer)
            self.run_soon()

    def _note_suspicion(self, transfer: Transfer) -> None:
        if not transfer.repeatable and self._hosts.is_suspect(transfer.host, self.now()):
            transfer.fresh_connect = True

    def _run(self) -> None:
        for _ in range(min(len(self._to_add), MAX_NEW_CONNECTIONS)):
            transfer = self._to_add.popleft()
            if transfer.curl is not None:  # else it has ended meanwhile
                self._add_now(transfer)
        super()._run()
        if self._to_add:
            self.run_soon()

    def _add_now(self, transfer: Transfer) -> None:
        curl = transfer.curl
        assert curl is not None
        transfer.last_progress_at = self.now()
        self._note_suspicion(transfer)  # again, because it may have waited
        if transfer.leads:
            self._loop.call_later(HANDSHAKE_WAIT_S, self._on_lead_timeout, transfer)
        http2 = self._hosts.speaks_http2(transfer.host)
        transfer.forbids_reuse = transfer.http1_only or http2 is False
        set_connection(curl, transfer, shares=bool(http2) and not transfer.http1_only)
        transfer.started = True
        self._multi.add_handle(curl)

    def _add_all(self, transfers: list[Transfer]) -> None:
        """Give libcurl the transfers that no longer have to wait for another."""
        for transfer in transfers:
            if transfer.curl is None:
                continue
            if self.failover is not None and self.failover.is_down(transfer.host):
                self._enqueue(transfer)
            else:
                self._add(transfer)

    def _on_connected(self, transfer: Transfer) -> None:
        self._add_all(self._hosts.connected(transfer))

    def _on_lead_timeout(self, transfer: Transfer) -> None:
        self._add_all(self._hosts.lead_timed_out(transfer))

    def _on_lookup_timeout(self) -> None:
        if not self._shut:
            self._add_all(self._hosts.lookup_ended())

    def _leave(self, transfer: Transfer, *, hangs: bool) -> None:
        transfer.started = False
        if hangs:
            self._loop.call_later(HANG_S, self._on_lookup_timeout)
        self._add_all(self._hosts.leave(transfer, self.now(), hangs=hangs))

    def on_idle_closed(self, local_ports: Iterable[int]) -> None:
        """Suspect the hosts of these connections, and let libcurl find the connections closed.

        As long as a transfer on one of them is paused libcurl does not check the connection, and over HTTP/2 would send
        other calls on it. So the rest of such a transfer is read.
        """
        now = self.now()
        for port in local_ports:
            self._hosts.suspect(self._ports.get(port, ""), now)
        for transfer in list(self._running.values()):
            shares = transfer.head is not None and transfer.head.protocol == "2"
            if transfer.paused and transfer.local_port in local_ports and shares:
                transfer.paused, transfer.peer_closed = False, True
                self.resume(transfer)

    def on_idle_bytes(self, local_port: int) -> None:
        """Suspect the host, because the bytes may announce the end of the connection (GOAWAY, close_notify).

        libcurl reads them once a second, and until then would send a paid call on that connection. Where a transfer
        is paused they are its body: one client that does not read would cost each paid call of others a handshake.
        """
        if not any(other.paused and other.local_port == local_port for other in self._running.values()):
            self._hosts.suspect(self._ports.get(local_port, ""), self.now())

    # Ends.

    def _finish_pending_requests(self) -> None:
        """Handle finished handles, as Tornado's does, and then what callbacks asked for inside libcurl."""
        super()._finish_pending_requests()
        if self._to_open:
            transfers, self._to_open = self._to_open, []
            for transfer in transfers:
                if not transfer.paused:
                    self.resume(transfer)

    def _finish(self, curl: pycurl.Curl, curl_error: int | None = None, curl_message: str | None = None) -> None:
        """Handle a handle that libcurl is done with: a transfer's, a probe's, or one of ``fetch()``."""
        transfer = self._running.get(curl)
        if transfer is None:
            if curl in self._probes:
                self._end_probe(curl, reached=curl_error is None)
            else:
                super()._finish(curl, curl_error, curl_message)
            return
        failure = _failure(transfer, curl, curl_error, curl_message or "")
        if failure is not None and curl_error != HTTP2_STREAM_ERROR:
            self._hosts.suspect(transfer.host, self.now())
        self._multi.remove_handle(curl)
        retry = diverts = False
        if failure is not None:
            retry = transfer.may_retry(failure)
            if self.failover is not None and not transfer.may_have_been_sent:
                diverts = self.failover.begins(transfer.host, failure)
                if transfer.first_host is not None:  # the backup cannot be reached either
                    failure = self.failover.error(transfer.first_host) or failure
            if not retry and not diverts:
                for other in self._hosts.waiting_for(transfer):
                    self.abort(other, type(failure)(failure.detail))
        self._leave(transfer, hangs=transfer.resolving and curl_error == pycurl.E_OPERATION_TIMEDOUT)
        if retry or diverts:
            transfer.fresh_connect = retry
            self._enqueue(transfer)
            return
        del self._running[curl]
        self._handles.give_back(transfer, curl)
        transfer.end(failure)

    # Failover.

    def _divert(self, transfer: Transfer, now: float) -> None:
        """Send a call to the backup of its host, with the time that a connection there may take."""
        assert transfer.curl is not None
        transfer.first_host, transfer.host = transfer.host, BACKUP_HOSTS[transfer.host]
        transfer.last_progress_at = now
        set_host(transfer.curl, transfer.host, min(BACKUP_CONNECT_TIMEOUT_S, self._config.connect_timeout_s))

    def _probe(self, host: str) -> None:
        curl = self._handles.probe(host)
        self._probes[curl] = host
        self._multi.add_handle(curl)

    def _end_probe(self, curl: pycurl.Curl, *, reached: bool) -> None:
        host = self._probes.pop(curl)
        self._multi.remove_handle(curl)
        curl.close()
        if self.failover is not None:
            self.failover.probed(host, reached=reached)

    def _end_idle_transfers(self) -> bool:
        """End the transfers on which no byte has moved for ``idle_timeout_s``. Return whether others run."""
        now = self.now()
        timed_out: list[_TimedOut] = []
        for transfer in self._running.values():
            if transfer.upload_bytes and transfer.started:
                self._note_upload(transfer, now)
            since = now - transfer.last_progress_at
            if not transfer.started and since > self._config.connect_timeout_s:
                reason = UpstreamTimeout("too many lookups of unproven hosts at once")
                timed_out.append((transfer, False, transfer.last_progress_at, reason))
                continue
            # While it is paused the client is the slow side, which the handler watches. A session of realtime video is
            # quiet once its response has begun: it ends with its client, or with its connection to fal.
            if since > self._config.idle_timeout_s and not (transfer.paused or transfer.in_session):
                reason = UpstreamTimeout("no byte moved", may_have_run=_may_have_run(transfer))
                timed_out.append((transfer, transfer.started, transfer.last_progress_at, reason))
        self._end_some(timed_out)
        return bool(self._running)

    @staticmethod
    def _note_upload(transfer: Transfer, now: float) -> None:
        """Count it as progress that a part of the request's body has left since the last sweep."""
        assert transfer.curl is not None
        uploaded = transfer.curl.getinfo(pycurl.SIZE_UPLOAD_T)
        if uploaded != transfer.uploaded:
            transfer.uploaded, transfer.last_progress_at = uploaded, now
            if uploaded >= transfer.upload_bytes:
                transfer.upload_bytes = 0

    def _end_some(self, timed_out: list[_TimedOut]) -> None:
        """End some of those transfers, the oldest first, and the others soon."""
        for transfer, started, last_progress_at, reason in timed_out[:MAX_ENDED_AT_ONCE]:
            if (transfer.started, transfer.last_progress_at) == (started, last_progress_at):  # else it has moved since
                self.abort(transfer, reason)
        if rest := timed_out[MAX_ENDED_AT_ONCE:]:
            self._loop.call_later(ENDING_INTERVAL_S, self._end_some, rest)


def _failure(transfer: Transfer, curl: pycurl.Curl, curl_error: int | None, message: str) -> UpstreamError | None:
    """Return the error of a transfer that libcurl is done with; None where its response is whole."""
    if curl_error is not None:
        if curl_error == pycurl.E_ABORTED_BY_CALLBACK and not transfer.may_have_been_sent:
            return ConnectionLost("too few open files are left for a connection to fal")  # see handles.SPARE_FILES
        if transfer.fits_in_a_record and curl.getinfo(pycurl.REQUEST_SIZE) == 0:
            transfer.may_have_been_sent = False  # a connection was ready and nothing written to it yet
        return upstream_error(curl_error, transfer.without_secret(message), may_have_run=_may_have_run(transfer))
    if transfer.head is None:
        return MalformedResponse("no head", may_have_run=_may_have_run(transfer))
    if transfer.head.declared not in (None, transfer.received):
        detail = f"the body is not whole: {transfer.received} bytes of {transfer.head.declared}"
        return ConnectionLost(detail, may_have_run=_may_have_run(transfer))
    return None


def _forbid_reuse(transfer: Transfer) -> None:
    if transfer.curl is not None:
        transfer.forbids_reuse = True
        forbid_reuse(transfer.curl)


def _may_have_run(transfer: Transfer) -> bool:
    return transfer.may_have_been_sent and not transfer.repeatable
