"""Answer the requests of ``tornado-fal-proxy doctor``, which never reach fal.

Strategy. Events leave by the same code as fal's. At most :data:`MAX_AT_ONCE` responses are being made, and
:data:`MAX_PER_MINUTE` are begun in a minute, because anyone may ask. Something in front may take the other responses
for failures of the proxy, so the operator has to allow them.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tornado_fal_proxy.errors import ClientDisconnected, DiagnosticNotAllowed, TooManyDiagnostics
from tornado_fal_proxy.relay.response import RelayResponse
from tornado_fal_proxy.rules.diagnostics import EVENT_S, EVENTS, Diagnostic
from tornado_fal_proxy.rules.headers import ResponseHead

__all__ = ["Diagnostics", "diagnose"]

# Limits responses at once. One doctor asks for them one after another.
MAX_AT_ONCE = 4
# Limits responses in a minute: a doctor that finds a repeated POST needs about ten.
MAX_PER_MINUTE = 30
# Limits how late a client that leaves during a silence is noticed, in seconds.
STEP_S = 0.5

_HEAD = ResponseHead(
    status=200,
    protocol="1.1",
    headers=[("content-type", "text/event-stream"), ("cache-control", "no-store")],
    length=None,
    streams=True,
)


class Diagnostics:
    """Count the responses that are being made, and those of the last minute."""

    def __init__(self) -> None:
        self._running = 0
        self._begun: deque[float] = deque(maxlen=MAX_PER_MINUTE)

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Hold a slot. Raise TooManyDiagnostics."""
        now = asyncio.get_running_loop().time()
        full = len(self._begun) == MAX_PER_MINUTE and now - self._begun[0] < 60
        if full or self._running >= MAX_AT_ONCE:
            raise TooManyDiagnostics
        self._begun.append(now)
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1


class _Events:
    """The events, with what a response needs of a transfer."""

    def __init__(self) -> None:
        self._sent = 0

    async def read(self) -> bytes:
        """Return the next event when it is time for it; nothing at the end."""
        if self._sent == EVENTS:
            return b""
        if self._sent:
            await asyncio.sleep(EVENT_S)
        self._sent += 1
        return b'data: {"event": %d}\n\n' % self._sent

    def read_rest_of_line(self, chunk: bytes) -> bytes:
        """Return the event, which is whole."""
        return chunk


async def diagnose(response: RelayResponse, diagnostic: Diagnostic, diagnostics: Diagnostics) -> None:
    """Respond to a doctor. Raise DiagnosticNotAllowed, TooManyDiagnostics, ClientDisconnected or StreamClosedError."""
    if diagnostic.fails and not response._config.allow_diagnostics:
        raise DiagnosticNotAllowed(f"allow_diagnostics: {diagnostic.kind}")
    with diagnostics.slot():
        response.call.detail = f"diagnostic: {diagnostic.kind}"
        if diagnostic.kind == "events":
            events: Any = _Events()
            response._copy_head(_HEAD)
            response.call.mark_first_byte()
            await response._write_stream(_HEAD, events, None)
            response._end_call()
            return
        await _be_silent(response, diagnostic.seconds)
        if diagnostic.kind == "silence":
            response._respond(200, f"Silent for {diagnostic.seconds:g} s, as the request asked.")
        elif diagnostic.kind == "error":
            response._respond(500, "An error, as the request asked.")
        else:
            response.set_status(500)  # for logs; the client never receives it
            response._abort(None)


async def _be_silent(response: RelayResponse, seconds: float) -> None:
    loop, stream = asyncio.get_running_loop(), response._connection.stream
    end = loop.time() + seconds
    while (left := end - loop.time()) > 0:
        await asyncio.sleep(min(STEP_S, left))
        if stream.closed():
            raise ClientDisconnected
