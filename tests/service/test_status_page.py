"""The page / of the admin port: the state of the service for people, from all workers, without users or secrets."""

import asyncio
import html
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.metrics import started
from tests.support.proxy import KEY, Setup
from tests.support.raw_client import RawClient, call
from tests.support.scripted_upstream import Exchange
from tests.support.stub_handlers import JSON, Gate
from tests.support.waiting import TIMEOUT_S, eventually
from tornado_fal_proxy.config import ProxyConfig
from tornado_fal_proxy.service.recent import RecentCalls
from tornado_fal_proxy.service.scoreboard import Scoreboard
from tornado_fal_proxy.service.status import Status, StatusSources
from tornado_fal_proxy.spending.store import StoreFailed

SECRETS = (KEY, "PROMPT-", "USER-", "QUERY-", "HEADER-")


class Page:
    """The page as text: its items of attention, and the rows of each table by the table's title."""

    def __init__(self, text: str) -> None:
        self.text = html.unescape(text)
        self.attention = [html.unescape(item) for item in re.findall(r"<li>(.*?)</li>", text)]
        self.tables: dict[str, list[list[str]]] = {}
        for part in text.split("<h2>")[1:]:
            rows = re.findall(r"<tr>(<th scope=\"row\">.*?)</tr>", part)
            cells = [re.split(r"</t[hd]>", row)[:-1] for row in rows]
            self.tables[part.partition("<")[0]] = [
                [html.unescape(re.sub(r"<[^>]*>", "", cell)) for cell in row] for row in cells
            ]

    @classmethod
    async def of(cls, port: int) -> "Page":
        response = await call(port, "GET", target=None, path="/")
        assert response.status == 200
        assert response.header("cache-control") == "no-store"
        assert "default-src 'none'" in (response.header("content-security-policy") or "")
        text = response.body.decode()
        assert not [secret for secret in SECRETS if secret in text]
        assert "<script>alert" not in text
        return cls(text)

    def facts(self, title: str) -> dict[str, str]:
        """Return a table's second column by the first one."""
        return {row[0]: row[1] for row in self.tables[title]}


async def until(admin: int, condition: Callable[[Page], bool]) -> Page:
    """Return the first page of which ``condition`` is true."""
    page = await Page.of(admin)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            while not condition(page):
                await asyncio.sleep(0.05)
                page = await Page.of(admin)
    except TimeoutError:
        raise AssertionError(page.text) from None
    return page


async def by_segment(exchange: Exchange) -> None:
    """Respond with the status that the last segment of the target is, or break the connection."""
    await exchange.body()
    last = exchange.target.partition(b"?")[0].rpartition(b"/")[2]
    if last.isdigit():
        await exchange.respond(int(last), b"{}", [*JSON, ("x-fal-billable-units", "2")])
    else:
        exchange.reset()


@pytest.mark.gen_test
async def test_status_page(setup: Setup, processes: str) -> None:
    """It has the calls of all workers by kind and outcome, and the latest of each error; and no secret."""
    running, admin = await started(setup, await setup.upstream(by_segment), processes, "--log-level=error")
    fresh = await Page.of(admin)
    assert fresh.attention == []
    assert "Nothing needs attention." in fresh.text
    assert (fresh.tables["Calls"], fresh.tables["Last errors"]) == ([], [])
    run = "https://fal.run/a/b/"
    secret: dict[str, Any] = {"headers": ["x-fal-note: HEADER-", "cookie: USER-"], "body": b'{"prompt": "PROMPT-"}'}
    for last in ("200?q=QUERY-", "200", "401", "503", "resets"):
        await call(running.port, target=run + last, **secret)
    for number in range(6):
        await call(running.port, target=f"https://evil.example/<script>alert({number})</script>", **secret)
    page = await until(admin, lambda page: sum(int(row[2]) for row in page.tables["Calls"]) == 11)
    assert page.tables["Calls"] == [
        ["run", "ok", "4", "4"],
        ["run", "upstream_error", "1", "1"],
        ["none", "refused", "6", "6"],
    ]
    errors = {name: (count, what, detail) for name, _, count, what, detail in page.tables["Last errors"]}
    assert set(errors) == {"TargetRefused", "ConnectionLost", "fal responded 401", "fal responded 503"}
    assert errors["TargetRefused"][:2] == ("6", "refused, none, status 412")
    assert "evil.example/<script>alert(5)" in errors["TargetRefused"][2]
    assert errors["fal responded 401"][1] == "ok, run, status 401"
    facts = page.facts("fal")
    assert (facts["key refused (responses 401)"], facts["responses 200"], facts["responses 503"]) == ("1", "2", "1")
    assert [line.partition(",")[0] for line in page.attention][:2] == ["ConnectionLost", "fal responded 401"]
    assert page.attention[-1] == "1 of 11 calls in the last 5 minutes ended with outcome upstream_error."
    assert len(page.tables["Workers"]) == int(processes[-1])
    assert "Spending" not in page.tables
    assert (await call(running.port, "GET", target=None, path="/")).status == 404  # it is not for clients
    await running.end()


@pytest.mark.gen_test
async def test_limits_and_the_end(setup: Setup, processes: str) -> None:
    """A limit that is close to full is named, and so is a drain."""
    upstream = await setup.upstream(gate := Gate())
    running, admin = await started(setup, upstream, processes, "--max-in-flight=4", "--max-buffered-bytes=2000000")
    clients = [await RawClient.open(running.port) for _ in range(4 * int(processes[-1]))]
    for client in clients:
        await client.send(body=b"x" * 220_000)
    await eventually(lambda: len(upstream.exchanges) > 3)
    full = re.compile(r"Close to full: max_in_flight(?: \(fullest process\))?, 4 of 4\.")
    page = await until(admin, lambda page: any(map(full.fullmatch, page.attention)))
    assert page.tables["Limits"][0][1:] == ["4 of 4", "100 % 100 %"]
    assert re.fullmatch(r"[0-9,]+ of 2,000,000", page.tables["Limits"][1][1])
    running.process.terminate()
    await until(admin, lambda page: "The service drains: it takes no new calls." in page.attention)
    gate.open.set()
    for client in clients:
        await client.response()
        await client.close()
    await running.ended()


@pytest.mark.gen_test
async def test_workers(setup: Setup) -> None:
    """A worker that hung is counted as hung and replaced, and its calls and errors stay counted."""
    options = ("--processes=2", "--worker-timeout-s=1", "--log-level=error")
    running, admin = await started(setup, await setup.upstream(by_segment), *options)
    for _ in range(5):
        await call(running.port, target="https://fal.run/a/b/503")
    await until(admin, lambda page: page.tables["Calls"] == [["run", "ok", "5", "5"]])
    before = running.workers()
    os.kill(before[0], signal.SIGSTOP)
    page = await until(admin, lambda page: any("was replaced" in line for line in page.attention))
    assert sorted(row[4] for row in page.tables["Workers"]) == ["0, 0", "1, 1"]
    await eventually(lambda: before[0] not in running.workers() and len(running.workers()) == 2)
    for _ in range(5):
        await call(running.port, target="https://fal.run/a/b/503")
    page = await until(admin, lambda page: page.tables["Calls"] == [["run", "ok", "10", "10"]])
    assert [row[2] for row in page.tables["Last errors"]] == ["10"]
    await running.end()


@pytest.mark.gen_test
async def test_spending(setup: Setup, processes: str, tmp_path: Path) -> None:
    """Limits of all users together are beside the others, and there is a way to the account."""
    options = ("--jobs=5/day,1000/month,9/minute", "--budget=9.00/month", f"--store=sqlite:{tmp_path}/spent.db")
    (tmp_path / "prices.toml").write_text('"**" = 0.025\n')
    user = ("--trusted-proxies=127.0.0.1", "--user-header=X-User", f"--prices={tmp_path}/prices.toml")
    running, admin = await started(
        setup, await setup.upstream(by_segment), processes, *options, *user, "--log-level=error"
    )
    for _ in range(6):
        await call(running.port, target="https://fal.run/a/b/200", headers=["X-User: USER-"])
    month = "dollars of all users, this month"  # a bill reaches the store a moment after its response

    def is_whole(page: Any) -> bool:
        known = (page.facts("Limits").get(month), page.facts("Spending").get("refused by jobs"))
        return known == ("0.25 of 9.00", "1") and page.facts("Spending").get("dollars that fal has billed") == "0.25"

    page = await until(admin, is_whole)
    limits = page.facts("Limits")
    assert limits["jobs of all users, today"] == "5 of 5"
    assert limits["jobs of all users, this month"] == "5 of 1,000"
    assert limits["dollars of all users, this month"] == "0.25 of 9.00"
    assert "Close to full: jobs of all users, today, 5 of 5." in page.attention
    assert page.facts("Spending") == {
        "paid calls that went to fal": "5",
        "dollars that fal has billed": "0.25",
        "refused by jobs": "1",
        "failures of the store": "0",
    }
    assert 'href="usage"' in page.text
    await running.end()


async def fails(*period: Any) -> Any:
    raise StoreFailed("Connection refused")


async def hangs(*period: Any) -> Any:
    await asyncio.Event().wait()


class NoMetrics:
    def samples(self) -> list[Any]:
        return []


async def state(scoreboard: Scoreboard, ready: bool, down: list[str], ask: Any) -> Status:
    """Return the state of a service with that scoreboard, in this process."""
    config = ProxyConfig(key=KEY, jobs="5/day", store="memory")
    recent: Any = RecentCalls(len(scoreboard.workers()))
    metrics: Any = NoMetrics()
    return await StatusSources(
        metrics, scoreboard, recent, lambda: (ready, down), config_of=lambda: config, ask_of=lambda: ask
    ).read()


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (fails, "The store does not tell: Connection refused."),
        (hangs, "The store does not tell: it does not respond in time."),
    ],
)
@pytest.mark.gen_test
async def test_a_store_that_fails(ask: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page comes all the same, and says so."""
    monkeypatch.setattr("tornado_fal_proxy.service.status.STORE_TIMEOUT_S", 0.05)
    status = await state(Scoreboard(1), True, [], ask)
    tables = {section.title: section for section in status.sections}
    assert tables["Spending"].note == words
    assert [row[0] for row in tables["Limits"].rows] == ["max_in_flight"]
    assert status.attention == []


@pytest.mark.gen_test
async def test_what_needs_attention_now() -> None:
    """Failover, a worker that is silent, one that was replaced, and a host that is down for a part of them."""
    scoreboard = Scoreboard(3, silent_after_s=0)
    for slot in range(3):
        scoreboard.count_start(slot)
        scoreboard.set_connections(slot, 2)
        scoreboard.update(slot, in_flight=1, upstream_connections=1, down=1)
    scoreboard.heartbeat(0)
    scoreboard.count_start(1)
    status = await state(scoreboard, False, ["fal.run"], None)
    assert status.attention == [
        "The service drains: it takes no new calls.",
        "Failover: fal.run cannot be reached, its calls go to falrun.com.",
        "Worker 0 is silent: after --worker-timeout-s it is replaced, and the log says worker hung.",
        "Worker 1 was replaced 0 s ago: see worker hung or worker replaced in the log.",
    ]
    tables = {section.title: section.rows for section in status.sections}
    assert ("fal.run", "down for 2 of 3 processes: calls go to falrun.com") in tables["fal"]
    assert [row[1:3] for row in tables["Workers"]] == [
        ("silent, since 0 s", "0 of 20000"),
        ("accepts calls, since 0 s", "1 of 20000"),
        ("accepts calls, since 0 s", "1 of 20000"),
    ]
