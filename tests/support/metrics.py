"""The service with its port for the operator, and what /metrics says there."""

import asyncio
import re
from collections.abc import Callable
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.support.proxy import KEY, Setup
from tests.support.raw_client import Response, call
from tests.support.service_process import ServiceProcess
from tests.support.waiting import TIMEOUT_S

__all__ = ["Scrape", "ended_lines", "scrape_text", "started", "until"]


def scrape_text(answer: Response) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Each sample, by its name and labels."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.body.decode())
        for sample in family.samples
    }


class Scrape(dict[str, Any]):
    """What /metrics says."""

    @classmethod
    async def of(cls, port: int) -> "Scrape":
        answer = await call(port, "GET", target=None, path="/metrics")
        assert answer.status == 200
        assert KEY not in answer.body.decode()
        scrape = cls()
        scrape.samples = scrape_text(answer)
        scrape.body = answer.body
        return scrape

    samples: dict[tuple[str, frozenset[tuple[str, str]]], float]
    body: bytes

    def total(self, name: str, **labels: str) -> float:
        """The sum of the samples with these labels, and any others."""
        wanted = set(labels.items())
        return sum(value for (key, pairs), value in self.samples.items() if key == name and wanted <= pairs)


async def started(setup: Setup, upstream: Any, *argv: str, **environ: Any) -> tuple[ServiceProcess, int]:
    """The service with an admin port, and that port."""
    running = await ServiceProcess.in_front_of(setup, upstream, "--admin-port=0", *argv, **environ)
    assert running.process.stdout is not None
    line = (await running.process.stdout.readline()).decode()
    match = re.fullmatch(r"metrics: http://127\.0\.0\.1:([0-9]+)/metrics\n", line)
    assert match is not None, line
    return running, int(match[1])


async def until(admin: int, holds: Callable[[Scrape], bool]) -> Scrape:
    """What /metrics says as soon as that holds: a call is counted when its answer has left."""
    async with asyncio.timeout(TIMEOUT_S):
        while not holds(scrape := await Scrape.of(admin)):
            await asyncio.sleep(0.05)
        return scrape


async def ended_lines(running: ServiceProcess) -> list[str]:
    _, stderr = await running.end()
    assert KEY not in stderr
    return stderr.splitlines()
