"""Limits on spending of the service: who the user is, one count for all workers, and the account that tools read."""

import asyncio
import csv
import io
import json
import re
import sqlite3
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.support.metrics import started, until_totals
from tests.support.proxy import Setup
from tests.support.raw_client import Response, call
from tests.support.scripted_upstream import Exchange
from tests.support.service_process import COMMAND, ServiceProcess, environment
from tests.support.stub_handlers import JSON
from tests.support.waiting import TIMEOUT_S

RUN = "https://fal.run/fal-ai/flux/dev"
OPTIONS = """
jobs_per_user = "3/day"
trusted_proxies = ["127.0.0.1"]
user_header = "X-Forwarded-User"
store = "sqlite:{store}"

[plans.pro]
jobs_per_user = "5/day"

[prices]
"fal-ai/flux/*" = 0.025
"**" = 1
"""


async def bill(exchange: Exchange) -> None:
    await exchange.body()
    await exchange.respond(200, b"{}", [*JSON, ("x-fal-billable-units", "2")])


def usage(*argv: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, "usage", *argv],
        env=environment(environ),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


async def run(port: int, user: str | None = None, target: str = RUN) -> Response:
    return await call(port, target=target, headers=[] if user is None else [f"X-Forwarded-User: {user}"])


@pytest.mark.parametrize("processes", ["1", "4"])
@pytest.mark.gen_test
async def test_users_behind_a_proxy(setup: Setup, tmp_path: Path, processes: str) -> None:
    """Each user that the proxy in front names has limits of their own, the same in all workers; tools show them."""
    store, options = tmp_path / "spent.sqlite", tmp_path / "options.toml"
    options.write_text(OPTIONS.format(store=store))
    upstream = await setup.upstream(bill)
    running, admin = await started(setup, upstream, f"--config={options}", f"--processes={processes}")
    seen = Counter[int]()
    for response in await asyncio.gather(*(run(running.port, "ann@example.com") for _ in range(40))):
        seen[response.status] += 1
    assert seen == {200: 3, 402: 37}
    assert (await run(running.port, "bob")).status == 200
    assert (await run(running.port)).status == 200
    assert (await run(running.port, "grün".encode().decode("latin-1"), "https://fal.run/other/app")).status == 200
    both = await call(running.port, target=RUN, headers=["X-Forwarded-User: ann", "X-Forwarded-User: bob"])
    assert both.status == 500
    await until_totals(
        admin,
        (5, "fal_proxy_jobs_total", {"endpoint": "fal-ai/flux/*"}),
        (1, "fal_proxy_jobs_total", {"endpoint": "**"}),
        (10, "fal_proxy_billed_units_total", {"endpoint": "fal-ai/flux/*"}),
        (37, "fal_proxy_spending_refusals_total", {"limit": "jobs_per_user"}),
    )
    expected = [
        ("grün", 1, 0, 2.0),
        ("ann@example.com", 3, 37, 0.15),
        ("address:127.0.0.1", 1, 0, 0.05),
        ("bob", 1, 0, 0.05),
    ]
    found = None
    while found != expected:  # the process that admin speaks to may not be the one that has the last bill
        shown = json.loads((await call(admin, "GET", target=None, path="/usage.json?since=1d&by=user")).body)
        found = [(row["user"], row["jobs"], row["refused"], row["cost"]) for row in shown["rows"]]
    assert (await call(admin, "GET", target=None, path="/usage")).status == 200
    asked = usage(f"--config={options}", "--format=json", "--since=1d")
    assert json.loads(asked.stdout) == shown
    _, stderr = await running.end()
    assert stderr.count(" user=ann@example.com plan=- endpoint=fal-ai/flux/dev units=2.0 cost=0.05 billed=True") == 3
    assert "user_header: X-Forwarded-User comes twice" in stderr
    by_endpoint = usage("--by=endpoint", "--format=csv", FAL_PROXY_STORE=f"sqlite:{store}")
    assert list(csv.reader(io.StringIO(by_endpoint.stdout))) == [
        ["endpoint", "jobs", "refused", "units", "cost"],
        ["other/app", "1", "0", "2", "2.00"],
        ["fal-ai/flux/dev", "5", "0", "10", "0.25"],
        ["fal-ai/flux/*", "0", "37", "0", "0.00"],
    ]


@pytest.mark.gen_test
async def test_a_header_of_anyone(setup: Setup) -> None:
    """A client that is no trusted proxy is its address, whatever it says."""
    running = await ServiceProcess.in_front_of(
        setup,
        await setup.upstream(bill),
        *("--user-header=X-Forwarded-User", "--trusted-proxies=10.0.0.1", "--jobs-per-user=2/day", "--store=memory"),
    )
    assert [(await run(running.port, name)).status for name in ("a", "b", "c")] == [200, 200, 402]
    await running.end()


@pytest.mark.gen_test
async def test_sandbox_with_limits(tmp_path: Path) -> None:
    """The sandbox has a price for every model, bills pictures, and leaves no file behind."""
    running = await ServiceProcess.start(
        *("--sandbox", "--jobs-per-user=3/day", "--budget-per-user=0.30/day"), XDG_STATE_HOME=str(tmp_path)
    )
    lefts = []
    for body in (b"{}", b'{"num_images": 4}', b"{}", b"{}"):
        response = await call(running.port, "POST", body, target="https://fal.run/any/model")
        lefts.append((response.status, *re.findall(r";r=(\d+)", response.header("ratelimit") or "")))
    assert lefts == [(200, "2", "27"), (200, "1", "17"), (200, "0", "15"), (402, "0", "15")]
    await running.end()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gen_test
async def test_memory_and_nothing(setup: Setup) -> None:
    """The account of a store in memory is on the admin port; without limits there is none, and a line says why."""
    upstream = await setup.upstream(bill)
    running, admin = await started(setup, upstream, "--jobs-per-user=2/day", "--store=memory")
    assert (await run(running.port)).status == 200
    shown = json.loads((await call(admin, "GET", target=None, path="/usage.json")).body)
    assert shown["total"]["jobs"] == 1
    for query, message in (("since=x", "since: must be"), ("by=x", "by: must be one of day, user, endpoint")):
        refused = await call(admin, "GET", target=None, path=f"/usage?{query}")
        assert (refused.status, refused.message.startswith(message)) == (400, True)
    await running.end()
    running, admin = await started(setup, upstream)
    refused = await call(admin, "GET", target=None, path="/usage")
    assert (refused.status, "--jobs-per-user" in refused.message) == (404, True)
    await running.end()


@pytest.mark.gen_test
async def test_store_that_fails(setup: Setup, tmp_path: Path) -> None:
    """A store that fails refuses paid calls, or lets them pass; free calls never notice; tools say why."""
    store = tmp_path / "folder" / "spent.sqlite"
    upstream = await setup.upstream(bill)
    free = "https://queue.fal.run/fal-ai/flux/requests/764cabcf-b745-4b3e-ae38-1200304cf45b/status"
    for policy, status in (("refuse", 503), ("allow", 200)):
        argv = ("--jobs-per-user=2/day", f"--store=sqlite:{store}", f"--on-store-failure={policy}")
        running, admin = await started(setup, upstream, *argv)
        assert [(await run(running.port)).status for _ in range(3)] == [status] * 3
        assert (await call(running.port, "GET", target=free)).status == 200
        refused = await call(admin, "GET", target=None, path="/usage")
        assert (refused.status, refused.message.startswith("store: ")) == (503, True)
        await until_totals(
            admin,
            (3, "fal_proxy_store_failures_total", {"operation": "reserve"}),
            (1, "fal_proxy_store_failures_total", {"operation": "usage"}),
        )
        _, stderr = await running.end()
        assert stderr.count("store failed: ") == 1


def make_other(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE mine (a)")
    db.close()


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        (["--since=0d"], 2, "--since: must be a number of days such as 7d, or a day such as "),
        (["--since=2026-02-30"], 2, "--since: must be a number of days"),
        (["--by=month"], 2, "usage: argument --by: invalid choice: 'month'"),
        (["--colour"], 2, "usage: unrecognized arguments: --colour"),
        (["--store=sqlite:{dir}/none"], 2, "--store: there is no account yet: {dir}/none does not exist"),
        (["--store=memory"], 2, "--store: memory is inside the service: see /usage on its admin port"),
        (["--store=redsi://:very-secret@x"], 2, "--store: must be sqlite:PATH, "),
        (["--store=redis://:very-secret@127.0.0.1:1"], 1, "--store: redis://127.0.0.1:1: "),
        (["--store=sqlite:{dir}/other"], 1, "--store: {dir}/other: the file belongs to another program"),
        (["--config={dir}/none.toml"], 2, "--config: cannot read '{dir}/none.toml': No such file or directory"),
    ],
)
def test_usage_that_cannot_work(tmp_path: Path, argv: list[str], code: int, text: str) -> None:
    """A report that cannot be made ends with one line and an exit code, shows no password and makes no file."""
    make_other(tmp_path / "other")
    asked = usage(*(part.format(dir=tmp_path) for part in argv))
    assert (asked.returncode, asked.stdout) == (code, "")
    [line] = asked.stderr.splitlines()
    assert line.startswith(f"tornado-fal-proxy: {text.format(dir=tmp_path)}")
    assert "very-secret" not in line
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_usage_of_a_wrong_file(tmp_path: Path) -> None:
    """A store that the file names in a wrong way is not another store."""
    options = tmp_path / "options.toml"
    options.write_text("store = 5\n")
    asked = usage(f"--config={options}")
    assert (asked.returncode, asked.stdout) == (2, "")
    assert asked.stderr == f"tornado-fal-proxy: {options} line 1: store: must be a text in quotes, not a number\n"
