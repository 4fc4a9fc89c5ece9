"""Long polls that are held until they are released, for several rows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from benchmarks.bench import Bench
from benchmarks.calls import post
from benchmarks.clients import Client, Wrong, open_clients
from benchmarks.peers import Peer
from benchmarks.servers import Server

__all__ = ["held"]

# Polls that are opened at once: fewer than the listening backlog of every peer.
BATCH = 100
# Seconds that the upstream holds a poll: longer than any row, because the command "release" ends it.
POLL_S = 900
OPEN_TIMEOUT_S = 240.0
RESPONSE_TIMEOUT_S = 120.0


@asynccontextmanager
async def held(bench: Bench, peer: Peer, server: Server, count: int) -> AsyncIterator[None]:
    """Hold ``count`` long POSTs at the upstream; at the end release them, and check the response to each. Raise Wrong.

    The floor has no upstream, so its polls stay open until the clients disconnect.
    """
    responded: list[Client] = []
    all_responded = asyncio.Event()

    def on_response(client: Client) -> None:
        responded.append(client)
        if len(responded) == count:
            all_responded.set()

    clients: list[Client] = []
    try:
        async with asyncio.timeout(OPEN_TIMEOUT_S):
            for first in range(0, count, BATCH):
                numbers = range(first, min(first + BATCH, count))
                calls = [post(f"/bench/hold?s={POLL_S}", number, relayed=peer.relays) for number in numbers]
                clients += await open_clients(server.port, calls, on_response)
                if peer.relays and await bench.upstream.wait_for("held", len(clients), 30) != len(clients):
                    raise Wrong(f"not all of {len(clients):,} polls reached the upstream")
        yield
        if responded:
            raise Wrong(f"{len(responded):,} polls ended early, the first with: {responded[0].error}")
        if peer.relays:
            await bench.upstream.ask("release")
            async with asyncio.timeout(RESPONSE_TIMEOUT_S):
                await all_responded.wait()
            if failed := [client.error for client in responded if client.error]:
                raise Wrong(f"{len(failed):,} of {count:,} polls failed, the first with: {failed[0]}")
    finally:
        for client in clients:
            if not client.closed:
                client.close()
        await bench.upstream.ask("release")
