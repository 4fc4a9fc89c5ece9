"""Let the store of a service fail while it runs, and assert who notices."""

import asyncio
import json
import re
from collections.abc import Callable

from tests.support.proxy import Setup
from tests.support.raw_client import call
from tests.support.scripted_upstream import Exchange
from tests.support.service_process import ServiceProcess
from tests.support.stub_handlers import JSON
from tests.support.waiting import TIMEOUT_S

__all__ = ["suffer"]

RUN, QUEUE = "https://fal.run/fal-ai/flux/dev", "https://queue.fal.run/fal-ai/flux/dev"
JOB_ID = "764cabcf-b745-4b3e-ae38-1200304cf45b"
JOB = f"https://queue.fal.run/fal-ai/flux/requests/{JOB_ID}"
MESSAGE = "The proxy cannot count this call at the moment; try again."


async def fal(exchange: Exchange) -> None:
    """Take each submit under the same id, and have its status and its result."""
    await exchange.body()
    status = "COMPLETED" if b"/status" in exchange.target else "IN_QUEUE"
    body = json.dumps({"status": status, "request_id": JOB_ID}).encode()
    await exchange.respond(200, body, [*JSON, ("x-fal-billable-units", "1")])


async def suffer(
    setup: Setup, store: str, break_it: Callable[[], object] | None, mend: Callable[[], object], line: str
) -> None:
    """Break the store of a service, and mend it. Without ``break_it`` it is broken from the beginning.

    Paid calls are 503 meanwhile, and never reach fal. Polls and results pass. One line, which matches ``line``, says
    why, and never a password.
    """
    upstream = await setup.upstream(fal)
    argv = ("--jobs-per-user=9/day", "--unfinished-jobs-per-user=5")
    running = await ServiceProcess.in_front_of(setup, upstream, *argv, FAL_PROXY_STORE=store)
    if break_it is not None:
        assert (await call(running.port, target=QUEUE)).status == 200
        break_it()
    before = len(upstream.exchanges)
    for target in (RUN, QUEUE):
        refused = await call(running.port, target=target)
        assert (refused.status, refused.message, refused.header("retry-after")) == (503, MESSAGE, "2")
        assert refused.header("ratelimit") is None
    assert len(upstream.exchanges) == before
    for target in (f"{JOB}/status", JOB, f"{JOB}/status/stream"):
        assert (await call(running.port, "GET", target=target)).status == 200
    mend()
    async with asyncio.timeout(TIMEOUT_S):
        while (response := await call(running.port)).status == 503:
            await asyncio.sleep(0.05)
    assert response.status == 200
    _, stderr = await running.end()
    lines = [each for each in stderr.splitlines() if "store failed: " in each]
    assert len(lines) == 1, stderr
    assert re.search(rf" WARNING tornado_fal_proxy: store failed: .*{line}", lines[0])
    assert "s3cret" not in stderr
