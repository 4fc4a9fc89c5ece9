"""Stand in for fal as a process: ``python -m soak.upstream PORT GENERATION DIRECTORY``.

It listens on that port (0 takes a free one), with the certificate in the directory. It writes lines to stdout: its
port, then the number of each POST that is whole, because fal would run the job from then on, and after an exclamation
mark each failure of its own and each violation of HTTP. SIGTERM closes it properly.
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

from soak.scenario import Scenario, speaks_http2
from tests.support.scripted_upstream import Exchange, Upstream
from tests.support.stub_handlers import EVENT_STREAM, JSON

# The file in the directory with the key and the certificate. The CA's certificate is beside it, in ca.pem.
CERTIFICATE = "server.pem"
GZIP = ("content-encoding", "gzip")
PIECE_BYTES = 64 * 1024
# Limits how late failures are written: soon enough for a soak of seconds.
POLL_INTERVAL_S = 0.5


async def respond(exchange: Exchange, scenario: Scenario, body: bytes) -> None:  # noqa: C901  (one case for each way)
    """Respond as the scenario has it. Each fault is one that fal, or something on the way to fal, may have."""
    h2 = exchange.protocol == "h2"
    match scenario.how:
        case "plain":
            await asyncio.sleep(scenario.pause_ms / 1000)
            await respond_whole(exchange, scenario, body)
        case "zipped":
            await exchange.respond(scenario.status, gzip.compress(body, 1), [*JSON, GZIP])
        case "corrupt":
            await exchange.respond(scenario.status, body, [*JSON, GZIP])
        case "stream" | "abort_stream":
            await exchange.start(scenario.status, EVENT_STREAM)
            for event in scenario.events():
                await asyncio.sleep(scenario.pause_ms / 1000)
                await exchange.send(event)
            await exchange.end() if scenario.how == "stream" else exchange.reset()
        case "stall_in_body" | "abort_in_body":
            await exchange.start(scenario.status, JSON, length=len(body))
            await exchange.send(body[: len(body) // 2])
            if scenario.how == "abort_in_body":
                exchange.reset()
        case "reset_stream":
            exchange.reset(ErrorCodes.INTERNAL_ERROR)
        case "refuse_stream":
            exchange.reset(ErrorCodes.REFUSED_STREAM)
        case "reset":
            exchange.abort_connection()
        case "close":
            if h2 and scenario.number % 2:
                exchange.goaway(code=ErrorCodes.ENHANCE_YOUR_CALM)
            await exchange.close_connection()
        case "go_away":  # properly: requests that have arrived get their response
            if h2:
                exchange.goaway()
            await exchange.respond(scenario.status, body, JSON)
        case _:
            assert scenario.how == "stall", scenario


async def respond_whole(exchange: Exchange, scenario: Scenario, body: bytes) -> None:
    """Send the response, every second one without its length."""
    if scenario.number % 2:
        await exchange.respond(scenario.status, body, JSON)
        return
    await exchange.start(scenario.status, JSON)
    for start in range(0, len(body), PIECE_BYTES):
        await exchange.send(body[start : start + PIECE_BYTES])
    await exchange.end()


def write_line(line: object) -> None:
    """Write a line to stdout at once, because this process may be killed at any time."""
    os.write(1, f"{line}\n".encode())


def tls(generation: int, directory: Path) -> ssl.SSLContext:
    """Return a context that chooses HTTP/2 or HTTP/1.1 by the name of the host."""
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
    async def handle(exchange: Exchange) -> None:
        upstream.exchanges.clear()  # only tests read them, and here they would pile up
        scenario = Scenario.from_path(exchange.target)
        body = await exchange.body()
        if exchange.method == "POST":
            write_line(scenario.number)
        await respond(exchange, scenario, scenario.response_body(body))

    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns when something is written to a closed connection
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    upstream = Upstream(handle, ssl_context=tls(generation, directory), protocols=(), port=port)
    await upstream.start()
    write_line(upstream.port)
    while not stop.is_set():
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), POLL_INTERVAL_S)
        for failure in upstream.failures:
            write_line(f"!{failure!r}")
        upstream.failures.clear()
    await upstream.close()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])))
