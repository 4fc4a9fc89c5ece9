"""A crowd that arrives at once at a process that has served nothing yet.

All callers connect in the same moment, each with a long poll of 3 s. When the last one has its answer, and how many
connections to the upstream were made for them.
"""

from __future__ import annotations

import asyncio
import time

from benchmarks.bench import Bench, Row
from benchmarks.callers import Caller, Wrong, open_callers
from benchmarks.calls import post
from benchmarks.figures import Figure, Target
from benchmarks.peers import Peer

MEASURE = "last answer to a cold crowd"
CONNECTIONS = "upstream connections for a cold crowd"
TIMEOUT_S = 90.0


async def run(bench: Bench) -> list[Figure]:
    count = bench.scale.crowd
    values: dict[tuple[str, str, str], list[float]] = {}

    async def once(peer: Peer) -> None:
        bench.say(f"  {peer.name}")
        answered: list[Caller] = []
        over = asyncio.Event()

        def on_answer(caller: Caller) -> None:
            answered.append(caller)
            if len(answered) == count:
                over.set()

        calls = [
            post(f"/bench/hold?s={bench.scale.crowd_poll_s}", number, relayed=peer.relays) for number in range(count)
        ]
        async with bench.running(peer, calls=count) as server:
            await bench.upstream.ask("stats")
            start = time.perf_counter()
            try:
                callers = await open_callers(server.port, calls, on_answer)
                async with asyncio.timeout(TIMEOUT_S):
                    await over.wait()
            finally:
                await bench.upstream.ask("release")
            for caller in callers:
                if not caller.ended:
                    caller.close()
            if failed := [caller.error for caller in answered if caller.error]:
                raise Wrong(f"{len(failed):,} of {count:,} callers failed, one with: {failed[0]}")
            opened = (await bench.upstream.ask("stats"))["opened"]
        values.setdefault((MEASURE, peer.name, "s"), []).append(max(c.answered_at for c in answered) - start)
        if peer.relays:
            values.setdefault((CONNECTIONS, peer.name, ""), []).append(opened)

    for _ in range(bench.scale.memory_rounds):
        await bench.each(bench.wanted("ours", "floor", "tornado-curl", "aiohttp", "hono", "nginx"), once)
    return [Figure(*key, tuple(all_of_it)) for key, all_of_it in values.items()]


ROW = Row(
    "crowd",
    "4,000 callers at once to a cold process, each a 3 s long poll: the last answer",
    run,
    (Target(MEASURE, 1.5, reference="floor", difference=True), Target(CONNECTIONS, 64)),
)
