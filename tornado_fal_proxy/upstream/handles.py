"""Configure libcurl's easy handles, lend them to transfers, and take them back for the next call.

Strategy. A configured handle saves 50 us. A handle stays of one kind, GET or POST, because libcurl's options for bodies
do not mix well on a handle that changes. Here is everything that libcurl would do by itself and must not: it follows no
redirect, speaks no protocol but https, reads no .netrc and keeps no cookie.

libcurl parses only ``https://<checked host>/``. Path and query go out byte for byte as CURLOPT_REQUEST_TARGET (with
CURLOPT_PATH_AS_IS alone libcurl rewrites ``%e6`` to ``%E6``), so it never parses a client's string as a URL.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
from collections.abc import Callable
from functools import partial

import pycurl

from tornado_fal_proxy import memory
from tornado_fal_proxy.config import ProxyConfig
from tornado_fal_proxy.rules.endpoints import BACKUP_HOSTS
from tornado_fal_proxy.rules.target import Target
from tornado_fal_proxy.upstream.body import FIRST_WINDOW_BYTES
from tornado_fal_proxy.upstream.decoding import ACCEPT_ENCODING
from tornado_fal_proxy.upstream.hosts import IDLE_CONNECTION_S
from tornado_fal_proxy.upstream.transfer import Transfer

__all__ = [
    "ADDRESS_LIFETIME_S",
    "CONNECTION_LIFETIME_S",
    "RATE_IS_WINDOW",
    "UNACKNOWLEDGED_S",
    "HandlePool",
    "forbid_reuse",
    "set_connection",
    "set_request",
    "set_window",
]

# Limits the handles that are kept for later calls: each holds some 10 kB.
MAX_IDLE_HANDLES = 512
# Limits the body after which a handle is kept, because the handle keeps the body's buffer.
MAX_KEPT_BODY_BYTES = 16 * 1024
# Limits a request that leaves in one record of TLS, of 16 kB with what libcurl adds: whole, or not at all. Where the
# write of a larger one fails behind its first record libcurl counts nothing of it, though the server has its head.
MAX_RECORD_BYTES = 12 * 1024
# Limits libcurl's upload buffer, which each POST keeps until it has its response. Where large blocks are mapped only
# the pages that were written count, mostly one. Elsewhere the whole buffer counts: there it is the least that libcurl
# accepts.
MAPPED_UPLOAD_BUFFER_BYTES, UPLOAD_BUFFER_BYTES = 256 * 1024, 16 * 1024
# Limit how long a connection takes new calls, and how long a looked-up address counts: together less than a minute, so
# a name that moves is followed in that time even by a connection that is never idle. libcurl's own are a day and 60 s.
CONNECTION_LIFETIME_S, ADDRESS_LIFETIME_S = IDLE_CONNECTION_S, 9
# Limit how late a peer that vanished is noticed: 60 s of silence, then probes 15 s apart.
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S = 60, 15
# Limits the same where something was sent to the peer and not acknowledged. The kernel tries for 15 minutes, and over
# HTTP/2 each call that comes meanwhile joins those that hang. A route that heals by itself takes less than this.
UNACKNOWLEDGED_S = 30.0
# CURLOPT_SUPPRESS_CONNECT_HEADERS (include/curl/curl.h), to which pycurl gives no name: an egress proxy's response to
# CONNECT is never taken for fal's, not even when libcurl repeats a request through a new tunnel.
_SUPPRESS_CONNECT_HEADERS = 265
# The open files that no connection to fal takes. The server needs some to accept a client and answer 503. Without them
# the client would wait for as long as the calls that have all files.
SPARE_FILES = 6
# Tells whether a limit of libcurl's rate works as a window: tried with 8.23. In 8.16 it is a limit and nothing else.
RATE_IS_WINDOW = pycurl.version_info()[2] >= 0x081700


class HandlePool:
    """Lend easy handles that are configured for one ProxyConfig. ``create`` makes a plain handle."""

    def __init__(self, config: ProxyConfig, create: Callable[[], pycurl.Curl]) -> None:
        self._config, self._create = config, create
        self._idle: dict[str, list[pycurl.Curl]] = {"GET": [], "POST": []}
        self._closed = False
        self._prepare_socket = partial(_prepare_socket, min(UNACKNOWLEDGED_S, config.idle_timeout_s))
        self._upload_buffer_bytes = MAPPED_UPLOAD_BUFFER_BYTES if memory.are_mapped() else UPLOAD_BUFFER_BYTES

    def take(self, method: str, body: bytes) -> tuple[pycurl.Curl, list[pycurl.Curl] | None]:
        """Return a handle for a call, and the list that it goes back to; None where it is used only once.

        A GET with a body, which fal's SDKs do not send, and other methods get a handle of their own.
        """
        with_body = method != "GET" or bool(body)
        pool = None if with_body and method != "POST" else self._idle.get(method)
        if pool:
            curl = pool.pop()
        else:
            curl = self._configured(with_body)
            if pool is None:
                curl.setopt(pycurl.CUSTOMREQUEST, method)
        return curl, None if len(body) > MAX_KEPT_BODY_BYTES else pool

    def give_back(self, transfer: Transfer, curl: pycurl.Curl) -> None:
        """Keep the transfer's handle for the next call, or close it."""
        transfer.curl = None
        pool = transfer.pool
        if pool is None or len(pool) >= MAX_IDLE_HANDLES or self._closed:
            curl.close()
            return
        if RATE_IS_WINDOW:  # always, because this also resets what libcurl has counted against the rate
            curl.setopt(pycurl.MAX_RECV_SPEED_LARGE, FIRST_WINDOW_BYTES)
        if transfer.fresh_connect:
            curl.setopt(pycurl.FRESH_CONNECT, 0)
        if transfer.first_host is not None:
            curl.setopt(pycurl.CONNECTTIMEOUT_MS, round(self._config.connect_timeout_s * 1000))
        if transfer.http1_only:
            curl.setopt(pycurl.HTTP_VERSION, pycurl.CURL_HTTP_VERSION_2TLS)
        if transfer.forbids_reuse:
            curl.setopt(pycurl.FORBID_REUSE, 0)
        if transfer.leads:
            curl.setopt(pycurl.VERBOSE, 0)
            curl.setopt(pycurl.DEBUGFUNCTION, None)
        # They would keep the transfer, and with it its decoder: up to 16 MB with brotli.
        for callback in (pycurl.PREREQFUNCTION, pycurl.HEADERFUNCTION, pycurl.WRITEFUNCTION):
            curl.setopt(callback, None)
        if pool is self._idle["POST"]:
            curl.setopt(pycurl.POSTFIELDS, b"")  # let go of the body
        pool.append(curl)

    def probe(self, host: str) -> pycurl.Curl:
        """Return a handle that makes a new connection to a host, and sends no request."""
        curl = self._configured(with_body=False)
        curl.setopt(pycurl.URL, f"https://{host}/")
        curl.setopt(pycurl.CONNECT_ONLY, 1)
        curl.setopt(pycurl.FRESH_CONNECT, 1)
        curl.setopt(pycurl.FORBID_REUSE, 1)
        curl.setopt(pycurl.DNS_CACHE_TIMEOUT, 0)  # the name may have another address now
        return curl

    def close(self) -> None:
        """Close the handles that are here, and from now on each one that comes back."""
        self._closed = True
        for handles in self._idle.values():
            for curl in handles:
                curl.close()
            handles.clear()

    def _configured(self, with_body: bool) -> pycurl.Curl:
        config = self._config
        curl = self._create()
        curl.setopt(pycurl.NOSIGNAL, 1)
        curl.setopt(pycurl.PROTOCOLS, pycurl.PROTO_HTTPS)
        curl.setopt(pycurl.UPLOAD_BUFFERSIZE, self._upload_buffer_bytes)
        curl.setopt(pycurl.FOLLOWLOCATION, 0)
        curl.setopt(_SUPPRESS_CONNECT_HEADERS, 1)
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
            address, _, backup = config.connect_to.partition(",")
            backups = [f"{host}::{backup}" for host in BACKUP_HOSTS.values()] if backup else []
            curl.setopt(pycurl.CONNECT_TO, [*backups, f"::{address}"])
            curl.setopt(pycurl.NOPROXY, "*")
        curl.setopt(pycurl.POST if with_body else pycurl.HTTPGET, 1)
        return curl


def set_request(
    curl: pycurl.Curl, transfer: Transfer, method: str, target: Target, headers: list[bytes], body: bytes
) -> None:
    """Set what differs from call to call on a handle from :meth:`HandlePool.take`."""
    size = len(target.request_target) + sum(map(len, headers)) + len(body)
    transfer.fits_in_a_record = size <= MAX_RECORD_BYTES
    curl.setopt(pycurl.URL, f"https://{target.host}/")
    curl.setopt(pycurl.REQUEST_TARGET, target.request_target)
    curl.setopt(pycurl.HTTPHEADER, [*headers, ACCEPT_ENCODING])
    curl.setopt(pycurl.PREREQFUNCTION, transfer.on_connected)
    curl.setopt(pycurl.HEADERFUNCTION, transfer.on_header)
    curl.setopt(pycurl.WRITEFUNCTION, transfer.on_body)
    if method != "GET" or body:
        curl.setopt(pycurl.POSTFIELDS, body)


def set_host(curl: pycurl.Curl, host: str, connect_timeout_s: float) -> None:
    """Direct a handle that is not in use yet, or not any more, to another host."""
    curl.setopt(pycurl.URL, f"https://{host}/")
    curl.setopt(pycurl.CONNECTTIMEOUT_MS, round(connect_timeout_s * 1000))


def set_connection(curl: pycurl.Curl, transfer: Transfer, *, shares: bool) -> None:
    """Set how the call gets its connection. ``shares``: it waits for one that is being made, to share it (HTTP/2)."""
    curl.setopt(pycurl.PIPEWAIT, 1 if shares else 0)
    if transfer.http1_only:
        curl.setopt(pycurl.HTTP_VERSION, pycurl.CURL_HTTP_VERSION_1_1)
    if transfer.forbids_reuse:
        forbid_reuse(curl)
    if transfer.leads:
        curl.setopt(pycurl.DEBUGFUNCTION, transfer.on_debug)
        curl.setopt(pycurl.VERBOSE, 1)
    if transfer.fresh_connect:
        curl.setopt(pycurl.FRESH_CONNECT, 1)


def forbid_reuse(curl: pycurl.Curl) -> None:
    """Close the handle's connection at the end of the call, because it speaks HTTP/1."""
    curl.setopt(pycurl.FORBID_REUSE, 1)


def set_window(curl: pycurl.Curl, transfer: Transfer) -> None:
    """Let the server send ``transfer.window`` bytes ahead.

    Set once more when the body has begun: at the start libcurl spreads the rate over the declared length, which would
    make a response of 60 kB take 0.2 s. A paused transfer must be left alone, because setting its rate unpauses it.
    """
    if RATE_IS_WINDOW and not transfer.paused:
        curl.setopt(pycurl.MAX_RECV_SPEED_LARGE, 0 if transfer.peer_closed else transfer.window)


def _prepare_socket(seconds: float, fd: int, _purpose: int) -> int:
    """Refuse the last open files, and end a connection on which nothing is acknowledged so long (SOCKOPTFUNCTION)."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != resource.RLIM_INFINITY and fd >= limit - SPARE_FILES:
        return pycurl.SOCKOPT_ERROR
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux only
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as duplicate:
            duplicate.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(round(seconds * 1000), 1))
    return pycurl.SOCKOPT_OK
