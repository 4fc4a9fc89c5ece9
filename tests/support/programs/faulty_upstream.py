"""An upstream in a process of its own for tests.support.recovery: it can be killed, stopped, and made to misbehave.

A line on stdin names how it acts from then on, one of :data:`MODES`. The same line on stdout confirms that this has
begun. The number of each request goes to a file as soon as the request is whole, because from then on a job could run.
So the executed requests are known even if this process is killed. On SIGTERM it closes its connections properly and
ends.
"""

import asyncio
import os
import signal
import ssl
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress

from h2.exceptions import StreamClosedError

from tests.support.scripted_upstream import Exchange, Gone, Upstream
from tests.support.stub_handlers import JSON

__all__ = ["BYTE_S", "EVENT", "EVENTS", "POLL_S"]

POLL_S = 0.4
EVENTS, EVENT_S = 6, 0.1
EVENT = b'data: {"n": %d}\n\n'
BYTE_S = 1.0
# One connection in RESET_EACH is reset after RESET_AFTER requests, because libcurl repeats by itself a request that was
# lost on a connection used before. The others serve REQUESTS_EACH requests, and then new connections replace them.
RESET_EACH, RESET_AFTER, REQUESTS_EACH = 3, 1, 6
MAX_STREAMS = 2**31 - 1


class Faulty:
    """The upstream and its mode."""

    def __init__(self, certificate: str, host: str, port: int, protocol: str, log: str) -> None:
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate)
        self.upstream = Upstream(self.respond, ssl_context=context, protocols=[protocol], host=host, port=port)
        self._executed: set[asyncio.Task[None]] = set()
        self._mode = "fine"
        self._changed = asyncio.Event()
        self._requests = 0  # since then
        self._old = 0  # connections that there were before
        self._notified: set[int] = set()

    def do(self, mode: str) -> None:
        """Act in that mode from now on."""
        self._mode = mode
        self._requests = 0
        self._old = self.upstream.connections
        self._notified.clear()
        self.upstream.max_concurrent_streams = 1 if mode == "one stream" else 100
        self._changed.set()
        self._changed = asyncio.Event()

    async def respond(self, exchange: Exchange) -> None:
        """Note the request as executed when it is whole, and act as the mode has it."""
        executed = asyncio.create_task(self._execute(exchange))
        self._executed.add(executed)
        executed.add_done_callback(self._executed.discard)
        self._requests += 1
        await MODES[self._mode](self, exchange)

    async def _execute(self, exchange: Exchange) -> None:
        with suppress(Gone):
            await exchange.body()
            os.write(self._log, b"%b %b\n" % (exchange.method.encode(), number_of(exchange)))

    def must_notify(self, exchange: Exchange) -> bool:
        """Tell whether the connection is older than the mode and not notified of the change. From now on it is."""
        number = exchange.connection_number
        if number >= self._old or number in self._notified:
            return False
        self._notified.add(number)
        return True

    async def fine(self, exchange: Exchange, *more: tuple[str, str]) -> None:
        await exchange.body()
        number = number_of(exchange)
        if exchange.target.startswith(b"/stream"):
            await exchange.start(200, [("content-type", "text/event-stream"), ("x-served-by", self.upstream.host)])
            for n in range(EVENTS):
                await exchange.send(EVENT % n)
                await asyncio.sleep(EVENT_S)
            await exchange.end()
            return
        if exchange.target.startswith(b"/poll"):
            await asyncio.sleep(POLL_S)
        await exchange.respond(200, b"[%b]" % number, [*JSON, ("x-served-by", self.upstream.host), *more])

    async def resets_connections(self, exchange: Exchange) -> None:
        if exchange.connection_number % RESET_EACH == 0 and exchange.number_on_connection >= RESET_AFTER:
            await exchange.body()
            exchange.abort_connection()
        elif exchange.number_on_connection < REQUESTS_EACH:
            await self.fine(exchange)
        elif exchange.protocol == "h2":
            exchange.goaway(MAX_STREAMS)
            await self.fine(exchange)
        else:
            await self.fine(exchange, ("connection", "close"))

    async def goes_away(self, exchange: Exchange) -> None:
        if self.must_notify(exchange):
            exchange.goaway(MAX_STREAMS)
        await self.fine(exchange)

    async def goes_away_and_closes(self, exchange: Exchange) -> None:
        if self.must_notify(exchange):
            exchange.goaway()
            await exchange.close_connection()
        else:
            await self.fine(exchange)

    async def resets_streams(self, exchange: Exchange) -> None:
        if self._requests % RESET_EACH:
            await self.fine(exchange)
            return
        await exchange.body()
        if exchange.target.startswith(b"/stream"):
            await exchange.start(200, [("content-type", "text/event-stream")])
            await exchange.send(EVENT % 0)
            await asyncio.sleep(EVENT_S)
        exchange.reset()

    async def one_stream(self, exchange: Exchange) -> None:
        if self.must_notify(exchange):
            exchange.limit_streams(1)
        await self.fine(exchange)

    async def trickles(self, exchange: Exchange) -> None:
        """Send a byte a second, and the rest when the mode changes."""
        await exchange.body()
        if exchange.target.startswith(b"/stream"):
            kind, data = "text/event-stream", b"".join(EVENT % n for n in range(EVENTS))
        else:
            kind, data = "application/json", b"[%b]" % number_of(exchange)
        await exchange.start(200, [("content-type", kind)], None if kind != "application/json" else len(data))
        changed = self._changed
        while len(data) > 1 and not changed.is_set():
            await exchange.send(data[:1])
            data = data[1:]
            with suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), BYTE_S)
        await exchange.send(data)
        await exchange.end()

    async def responds_early(self, exchange: Exchange) -> None:
        """Refuse a body before it is read, as servers do with a body that is too large."""
        if exchange.method == "GET":
            await self.fine(exchange)
            return
        await exchange.respond(413, b'{"detail": "too large"}', [*JSON, ("x-served-by", self.upstream.host)])
        if exchange.protocol == "h2":
            with suppress(StreamClosedError):  # the whole body has arrived nevertheless
                exchange.reset(0)
        else:
            await exchange.close_connection()


MODES: dict[str, Callable[[Faulty, Exchange], Awaitable[None]]] = {
    "fine": Faulty.fine,
    "connection resets": Faulty.resets_connections,
    "goaway": Faulty.goes_away,
    "goaway and close": Faulty.goes_away_and_closes,
    "stream resets": Faulty.resets_streams,
    "one stream": Faulty.one_stream,
    "trickle": Faulty.trickles,
    "early response": Faulty.responds_early,
}


def number_of(exchange: Exchange) -> bytes:
    return exchange.target.partition(b"?id=")[2]


async def main(certificate: str, host: str, port: str, protocol: str, log: str) -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    faulty = Faulty(certificate, host, int(port), protocol, log)
    await faulty.upstream.start()
    commands = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)

    async def obey() -> None:
        while line := (await commands.readline()).decode().strip():
            faulty.do(line)
            print(line, flush=True)  # noqa: T201
        ended.set()  # no process is left that could send commands

    print(faulty.upstream.port, flush=True)  # noqa: T201
    obeying = asyncio.create_task(obey())
    await ended.wait()
    obeying.cancel()
    with suppress(OSError):
        await faulty.upstream.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
