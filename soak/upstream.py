"""The stand-in for fal, as a process: ``python -m soak.upstream PORT GENERATION DIRECTORY``.

It listens on that port (0 takes a free one), with the certificate in the directory. On stdout it says, a line each: its
port; the number of each POST that is whole, for then fal would run the job; and after an exclamation mark what went
wrong here, or broke HTTP. SIGTERM closes it properly.
"""

from __future__ import annotations

import asyncio
import gzip
import logging
import os
import signal
import ssl
import sys
from contextlib import suppress
from pathlib import Path

from h2.errors import ErrorCodes

from soak.wish import Wish, speaks_http2
from tests.support.scripted_upstream import Exchange, Upstream
from tests.support.stub_handlers import EVENT_STREAM, JSON

# The file in the directory with the key and the certificate; beside it is the CA's, ca.pem.
CERTIFICATE = "server.pem"
GZIP = ("content-encoding", "gzip")
PIECE_BYTES = 64 * 1024
LOOK_S = 0.5


async def respond(exchange: Exchange, wish: Wish, answer: bytes) -> None:  # noqa: C901  (one case for each way)
    """What the wish says; every fault is one that fal, or what is on the way to it, may have."""
    h2 = exchange.protocol == "h2"
    match wish.how:
        case "plain":
            await asyncio.sleep(wish.pause_ms / 1000)
            await respond_whole(exchange, wish, answer)
        case "zipped":
            await exchange.respond(wish.status, gzip.compress(answer, 1), [*JSON, GZIP])
        case "corrupt":
            await exchange.respond(wish.status, answer, [*JSON, GZIP])
        case "stream" | "cut_stream":
            await exchange.start(wish.status, EVENT_STREAM)
            for event in wish.events():
                await asyncio.sleep(wish.pause_ms / 1000)
                await exchange.send(event)
            await exchange.end() if wish.how == "stream" else exchange.reset()
        case "stall_in_body" | "cut":
            await exchange.start(wish.status, JSON, length=len(answer))
            await exchange.send(answer[: len(answer) // 2])
            if wish.how == "cut":
                exchange.reset()
        case "reset_stream":
            exchange.reset(ErrorCodes.INTERNAL_ERROR)
        case "refuse_stream":
            exchange.reset(ErrorCodes.REFUSED_STREAM)
        case "reset":
            exchange.abort_connection()
        case "close":
            if h2 and wish.number % 2:
                exchange.goaway(code=ErrorCodes.ENHANCE_YOUR_CALM)
            await exchange.close_connection()
        case "go_away":  # properly: what is here already is answered
            if h2:
                exchange.goaway()
            await exchange.respond(wish.status, answer, JSON)
        case _:
            assert wish.how == "stall", wish


async def respond_whole(exchange: Exchange, wish: Wish, answer: bytes) -> None:
    """Every second answer does not say how long it is."""
    if wish.number % 2:
        await exchange.respond(wish.status, answer, JSON)
        return
    await exchange.start(wish.status, JSON)
    for start in range(0, len(answer), PIECE_BYTES):
        await exchange.send(answer[start : start + PIECE_BYTES])
    await exchange.end()


def say(line: object) -> None:
    """At once, for this process may be killed at any time."""
    os.write(1, f"{line}\n".encode())


def tls(generation: int, directory: Path) -> ssl.SSLContext:
    """HTTP/2 or HTTP/1.1, as the name says that is called."""
    both = {}
    for protocol in ("h2", "http/1.1"):
        context = both[protocol] = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(directory / CERTIFICATE)
        context.set_alpn_protocols([protocol])

    def choose(connection: ssl.SSLObject, name: str | None, _context: ssl.SSLContext) -> None:
        connection.context = both["h2" if speaks_http2(name or "", generation) else "http/1.1"]

    both["h2"].sni_callback = choose
    return both["h2"]


async def main(port: int, generation: int, directory: Path) -> None:
    async def answer(exchange: Exchange) -> None:
        upstream.exchanges.clear()  # a test looks at them; here they would pile up
        wish = Wish.of(exchange.target)
        body = await exchange.body()
        if exchange.method == "POST":
            say(wish.number)
        await respond(exchange, wish, wish.answer(body))

    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of what is written to callers that have left
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    upstream = Upstream(answer, ssl_context=tls(generation, directory), protocols=(), port=port)
    await upstream.start()
    say(upstream.port)
    while not ended.is_set():
        with suppress(TimeoutError):
            await asyncio.wait_for(ended.wait(), LOOK_S)
        for failure in upstream.failures:
            say(f"!{failure!r}")
        upstream.failures.clear()
    await upstream.close()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])))
