"""A crowd of clients that arrive at once at a process that has served no call.

All clients connect in the same moment, each with a long poll of 3 s. The figures are the time until the last one has
its response, and the number of connections to the upstream.
"""

from __future__ import annotations

import asyncio
import time

from benchmarks.bench import Bench, Row
from benchmarks.calls import post
from benchmarks.clients import Client, Wrong, open_clients
from benchmarks.figures import Figure, Target
from benchmarks.peers import Peer

MEASURE = "last response to a cold crowd"
CONNECTIONS = "upstream connections for a cold crowd"
TIMEOUT_S = 90.0


async def run(bench: Bench) -> list[Figure]:
    count = bench.scale.crowd
    values: dict[tuple[str, str, str], list[float]] = {}

    async def once(peer: Peer) -> None:
        bench.log(f"  {peer.name}")
        responded: list[Client] = []
        over = asyncio.Event()

        def on_response(client: Client) -> None:
            responded.append(client)
            if len(responded) == count:
                over.set()

        calls = [
            post(f"/bench/hold?s={bench.scale.crowd_poll_s}", number, relayed=peer.relays) for number in range(count)
        ]
        async with bench.running(peer, calls=count) as server:
            await bench.upstream.ask("stats")
            start = time.perf_counter()
            try:
                clients = await open_clients(server.port, calls, on_response)
                async with asyncio.timeout(TIMEOUT_S):
                    await over.wait()
            finally:
                await bench.upstream.ask("release")
            for client in clients:
                if not client.closed:
                    client.close()
            if failed := [client.error for client in responded if client.error]:
                raise Wrong(f"{len(failed):,} of {count:,} clients failed, the first with: {failed[0]}")
            opened = (await bench.upstream.ask("stats"))["opened"]
        values.setdefault((MEASURE, peer.name, "s"), []).append(max(c.responded_at for c in responded) - start)
        if peer.relays:
            values.setdefault((CONNECTIONS, peer.name, ""), []).append(opened)

    for _ in range(bench.scale.memory_rounds):
        await bench.each(bench.wanted("ours", "floor", "tornado-curl", "aiohttp", "hono", "nginx"), once)
    return [Figure(*key, tuple(all_of_it)) for key, all_of_it in values.items()]


ROW = Row(
    "crowd",
    "4,000 clients at once to a cold process, each a 3 s long poll: the last response",
    run,
    (Target(MEASURE, 1.5, reference="floor", difference=True), Target(CONNECTIONS, 64)),
)
