"""fal refuses the key: an ERROR in the log, once a minute at most, and its status as a number in the metrics."""

import logging
from typing import Any

import pytest

from tests.support.logs import Logs
from tests.support.metrics import ended_lines, started, until
from tests.support.proxy import Setup
from tests.support.raw_client import call
from tests.support.scripted_upstream import Exchange
from tornado_fal_proxy.rules.headers import ResponseHead
from tornado_fal_proxy.rules.target import parse_target
from tornado_fal_proxy.service.key_alarm import INTERVAL_S, KeyAlarm
from tornado_fal_proxy.service.scoreboard import Scoreboard
from tornado_fal_proxy.telemetry import Call

RESPONSES = "fal_proxy_upstream_responses_total"


async def respond(exchange: Exchange) -> None:
    """Respond with the status that the last segment of the target is."""
    await exchange.body()
    await exchange.respond(int(exchange.target.rpartition(b"/")[2]), b"{}")


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.gen_test
async def test_a_refused_key_is_an_error(setup: Setup, processes: str) -> None:
    """The first 401 is logged as an ERROR, with what to check. The metrics count each status by its number."""
    upstream = await setup.upstream(respond)
    running, admin = await started(setup, upstream, f"--processes={processes}", "--log-level=error")
    scrape = await until(admin, lambda scrape: RESPONSES in scrape.body.decode())
    assert scrape.total(RESPONSES, code="401") == 0
    for code in (401, 403):
        assert f'{RESPONSES}{{code="{code}",protocol="2",status="4xx"}} 0.0' in scrape.body.decode()
    for status in (200, 403, 401, 401, 401, 599):
        assert (await call(running.port, target=f"https://fal.run/a/b/{status}")).status == status
    scrape = await until(admin, lambda scrape: scrape.total(RESPONSES) == 6)
    counts = {code: scrape.total(RESPONSES, code=code) for code in ("200", "401", "403", "other", "599")}
    assert counts == {"200": 1, "401": 3, "403": 1, "other": 1, "599": 0}
    assert scrape.total(RESPONSES, status="4xx") == 4
    (line,) = [line for line in await ended_lines(running) if " ERROR " in line]
    assert "key refused: fal answers 401 to POST https://fal.run/a/b/401, 0 more" in line
    assert "check FAL_KEY" in line


def refused(status: int = 401) -> Call:
    made = Call("POST", None)
    head: dict[str, Any] = dict.fromkeys(ResponseHead._fields)
    made.head, made.target = ResponseHead(**head | {"status": status}), parse_target("https://fal.run/a/b")
    return made


def test_the_workers_take_turns(logs: Logs, monkeypatch: pytest.MonkeyPatch) -> None:
    """All workers together log one line a minute, which counts the calls that its worker has not logged."""
    logs.expect("^ERROR tornado_fal_proxy: key refused: ")
    now_ns = 5
    monkeypatch.setattr("time.monotonic_ns", lambda: now_ns)
    scoreboard = Scoreboard(2)
    alarms = [KeyAlarm(scoreboard), KeyAlarm(scoreboard)]
    for alarm in (*alarms, *alarms):
        alarm.note(refused())
        alarm.note(refused(403))
        alarm.note(Call("POST", None))
    now_ns += int(INTERVAL_S * 1e9)
    for alarm in reversed(alarms):
        alarm.note(refused())
    errors = [record.getMessage() for record in logs.records if record.levelno == logging.ERROR]
    assert [message.partition(", ")[2].partition(";")[0] for message in errors] == [
        "0 more since the last such line",
        "2 more since the last such line",
    ]
