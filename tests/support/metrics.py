"""Start the service with its port for the operator, and read /metrics there."""

import asyncio
from collections.abc import Callable
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.support.proxy import KEY, Setup
from tests.support.raw_client import Response, call
from tests.support.service_process import ServiceProcess
from tests.support.waiting import TIMEOUT_S

__all__ = ["Scrape", "ended_lines", "scrape_text", "started", "until", "until_totals"]


def scrape_text(response: Response) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return the value of each sample by its name and labels."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(response.body.decode())
        for sample in family.samples
    }


class Scrape(dict[str, Any]):
    """The samples of /metrics at one moment."""

    @classmethod
    async def of(cls, port: int) -> "Scrape":
        response = await call(port, "GET", target=None, path="/metrics")
        assert response.status == 200
        assert KEY not in response.body.decode()
        scrape = cls()
        scrape.samples = scrape_text(response)
        scrape.body = response.body
        return scrape

    samples: dict[tuple[str, frozenset[tuple[str, str]]], float]
    body: bytes

    def total(self, name: str, **labels: str) -> float:
        """Return the sum of all samples that have these labels, whatever other labels they have."""
        wanted = set(labels.items())
        return sum(value for (key, pairs), value in self.samples.items() if key == name and wanted <= pairs)


async def started(setup: Setup, upstream: Any, *argv: str, **environ: Any) -> tuple[ServiceProcess, int]:
    """Start the service with an admin port, and return both."""
    running = await ServiceProcess.in_front_of(setup, upstream, "--admin-port=0", *argv, **environ)
    return running, await running.admin_port()


async def until(admin: int, condition: Callable[[Scrape], bool]) -> Scrape:
    """Wait until ``condition`` is true of /metrics, and return that scrape: a call is counted after its response."""
    async with asyncio.timeout(TIMEOUT_S):
        while not condition(scrape := await Scrape.of(admin)):
            await asyncio.sleep(0.05)
        return scrape


async def until_totals(admin: int, *totals: tuple[float, str, dict[str, str]]) -> Scrape:
    """Return the first scrape with these totals, by name and labels. A worker writes its numbers one by one."""
    try:
        return await until(
            admin, lambda scrape: all(scrape.total(name, **labels) == total for total, name, labels in totals)
        )
    except TimeoutError:
        scrape = await Scrape.of(admin)
        assert [(scrape.total(name, **labels), name, labels) for _, name, labels in totals] == list(totals)
        raise


async def ended_lines(running: ServiceProcess) -> list[str]:
    _, stderr = await running.end()
    assert KEY not in stderr
    return stderr.splitlines()
