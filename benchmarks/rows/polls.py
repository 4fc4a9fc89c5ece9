"""Long polls that are held until they are released: what several rows need."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from benchmarks.bench import Bench
from benchmarks.callers import Caller, Wrong, open_callers
from benchmarks.calls import post
from benchmarks.peers import Peer
from benchmarks.servers import Server

__all__ = ["held"]

# Opened at once: below every listening backlog.
BATCH = 100
# Longer than any row; the upstream answers when it is told to.
POLL_S = 900
OPEN_TIMEOUT_S = 240.0
ANSWER_TIMEOUT_S = 120.0


@asynccontextmanager
async def held(bench: Bench, peer: Peer, server: Server, count: int) -> AsyncIterator[None]:
    """``count`` long POSTs that the upstream holds; at the end they are released, and each must be answered rightly.

    The floor asks no upstream: there they just stay until the callers leave. Raises Wrong.
    """
    answered: list[Caller] = []
    all_answered = asyncio.Event()

    def on_answer(caller: Caller) -> None:
        answered.append(caller)
        if len(answered) == count:
            all_answered.set()

    callers: list[Caller] = []
    try:
        async with asyncio.timeout(OPEN_TIMEOUT_S):
            for first in range(0, count, BATCH):
                numbers = range(first, min(first + BATCH, count))
                calls = [post(f"/bench/hold?s={POLL_S}", number, relayed=peer.relays) for number in numbers]
                callers += await open_callers(server.port, calls, on_answer)
                if peer.relays and await bench.upstream.wait_for("held", len(callers), 30) != len(callers):
                    raise Wrong(f"not all of {len(callers):,} polls reached the upstream")
        yield
        if answered:
            raise Wrong(f"{len(answered):,} polls ended early, one with: {answered[0].error}")
        if peer.relays:
            await bench.upstream.ask("release")
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await all_answered.wait()
            if failed := [caller.error for caller in answered if caller.error]:
                raise Wrong(f"{len(failed):,} of {count:,} polls failed, one with: {failed[0]}")
    finally:
        for caller in callers:
            if not caller.ended:
                caller.close()
        await bench.upstream.ask("release")
