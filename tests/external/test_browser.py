"""The sandbox's page works in a real Chromium: pictures through the queue, streams, errors, Cancel.

A page of another origin may call the proxy only if allowed_origins has that origin.
"""

import asyncio
import json
import re
import sys
from collections.abc import Collection
from http.client import responses
from itertools import pairwise
from typing import Any

import pytest
from tornado.httpserver import HTTPServer
from tornado.testing import bind_unused_port
from tornado.web import Application, RequestHandler

from tests.support.certificates import Authority
from tests.support.node import SCRIPTS, find_node, run_script, serve_sandbox
from tests.support.proxy import ROUTE, Setup
from tests.support.spending_model import added_up
from tests.support.tools import tool
from tests.support.waiting import TIMEOUT_S
from tornado_fal_proxy.service.status import Section, Share, Status
from tornado_fal_proxy.service.status_page import StatusHandler
from tornado_fal_proxy.service.usage_page import UsageHandler
from tornado_fal_proxy.spending.store import DIMENSIONS, Account, Usage

PACE = 0.5  # a queued job takes 2 s, a stream 0.7 s: long enough for a user to cancel it

POSITIONS = ["Submitting …", "In the queue, 2 ahead", "In the queue, 1 ahead", "In the queue, 0 ahead", "In progress"]
LOG = ["Loading the model", "Step 1 of 3", "Step 2 of 3", "Step 3 of 3", "Done"]
TEXT = (
    "Grüße aus dem Sandkasten! 🌊 Übermut! 日本語のテキスト。 👩‍🚀 中文也可以。 Привет! Ça va? 🎉"
    "(Say something in many scripts)"
)
# The status that is chosen in the list, and the text that is shown.
ERRORS = [(422, "422: body.prompt: This error was asked for")]
ERRORS += [(status, f"{status}: This error was asked for: {responses[status]}") for status in (429, 500)]


# How each language of the page is run.
COMMANDS = {
    "JavaScript": ("node", "--input-type=module", "-e"),
    "curl": ("bash", "-c"),
    "Python": (sys.executable, "-c"),
}


async def run_code(language: str, code: str) -> str:
    """Run code of the page, and return what it printed, or that it failed."""
    program, *arguments = COMMANDS[language]
    output, error = asyncio.subprocess.PIPE, asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *(tool(program), *arguments, code), cwd=SCRIPTS, stdout=output, stderr=error
    )
    async with asyncio.timeout(TIMEOUT_S):
        printed, complaint = await process.communicate()
    return f"failed: {complaint.decode()}" if process.returncode or complaint else printed.decode()


@pytest.fixture(scope="module")
def page(authority: Authority) -> Any:
    """Run ``page.mjs`` once, and return its outcome for the tests below."""
    chromium = tool("chromium")

    async def make() -> Any:
        async with serve_sandbox(Setup(authority), PACE, allow_cancel=True) as sandbox:
            page = await run_script("page.mjs", sandbox.public_url, chromium)
            cancelled = [job.prompt for job in sandbox.jobs.values() if job.cancelled]
            sandbox.pace = 0.01
            own = len(sandbox.jobs)
            ran = [await asyncio.gather(*(run_code(*code) for code in codes)) for codes in page["code"]]
            prompts = [job.prompt for job in sandbox.jobs.values()][own:]
            return page | {"cancelled": cancelled, "ran": ran, "prompts": prompts}

    return asyncio.run(make())


@pytest.mark.parametrize(
    ("name", "prompt"), [("run", "A lighthouse in a snow storm"), ("run_again", "Ein Kätzchen 🐱")]
)
def test_run_form(page: Any, name: str, prompt: str) -> None:
    """The form shows positions in the queue, the log line by line, and the picture, also after errors and a cancel."""
    seen = page["seen"][name]
    shown = seen["queue-position"]
    assert shown == [
        *(position for position in POSITIONS if position in shown),
        "Completed",
    ]  # a slow machine misses some
    assert shown[0] == POSITIONS[0]
    assert len(shown) > 2
    lines = seen["logs"][-1].splitlines()
    assert [line.partition("  ")[2] for line in lines] == LOG
    assert seen["picture"] == [512, 384, prompt]
    assert (seen["error"], seen["idle"]) == ("", True)


def test_stream_form(page: Any) -> None:
    """The text grows, never ends with part of a character, and is whole at the end."""
    seen = page["seen"]["stream"]
    shown = seen["stream-output"]
    assert len(shown) > 2
    assert all(longer.startswith(text) for text, longer in pairwise(shown))
    assert shown[-1] == TEXT
    assert (seen["error"], seen["idle"]) == ("", True)


@pytest.fixture(scope="module")
def limited(authority: Authority) -> Any:
    """Run ``limits.mjs`` once, against a proxy that limits each user."""
    chromium = tool("chromium")

    async def make() -> Any:
        fields = {"jobs_per_user": "3/day", "budget_per_user": "1.00/day", "prices": {"**": "0.025"}, "store": "memory"}
        async with serve_sandbox(Setup(authority), 0.01, **fields) as sandbox:
            return await run_script("limits.mjs", sandbox.public_url, chromium)

    return asyncio.run(make())


def test_what_is_left(limited: Any) -> None:
    """The page shows what is left after each call: a stream, one that failed, and jobs; then the words of a refusal."""
    first, none = "Left: 2 of 3 jobs today, $0.97 of $1.00 today.", "Left: 0 of 3 jobs today, $0.92 of $1.00 today."
    assert limited["left"] == [first, first, "Left: 1 of 3 jobs today, $0.95 of $1.00 today.", none, none, none]
    fine, failed, result, invalid, *refused = limited["errors"]
    assert (fine, result) == ("", "")
    assert failed.startswith("500: ")
    assert invalid.startswith("422: ")
    for words in refused:
        assert re.fullmatch(
            r"402: Your limit of 3 jobs a day is used up; the next job can start at 2\S+T00:00:00Z\.", words
        )


def test_nothing_is_shown_without_limits(page: Any) -> None:
    """A proxy without limits has nothing to show."""
    assert page["left"] is True


ACCOUNT = [
    Usage("2026-11-27", "<script>alert(1)</script>", "fal-ai/flux/dev", 10, 2, 10_000_000, 250_000),
    Usage("2026-11-27", "x" * 128, "fal-ai/a-model-with-a-rather-long-name/and-a-path", 2, 0, 2_500_000, 125_000),
    Usage("2026-11-27", "ünï & \u202eco", "fal-ai/flux/dev", 1, 0, 1_000_000, 0),
]


@pytest.mark.gen_test
async def test_account() -> None:
    """The account is readable at 390 pixels, in the light and in the dark; ids are text; nothing runs or loads."""

    async def ask(since: str, until: str, by: Collection[str] = DIMENSIONS, most: int | None = None) -> Account:
        return added_up(ACCOUNT, by, most)

    application = Application([("/usage", UsageHandler, {"ask_of": lambda: ask})], log_function=lambda handler: None)
    chromium, _ = tool("chromium"), find_node()
    listener, port = bind_unused_port()
    server = HTTPServer(application)
    server.add_sockets([listener])
    url = f"http://127.0.0.1:{port}/usage"
    seen = await run_script("usage.mjs", url, chromium)
    server.stop()
    await server.close_all_connections()
    assert seen["problems"] == []
    assert {address.partition("?")[0] for address in seen["requests"]} == {url}
    for scheme in ("light", "dark"):
        look = seen[scheme]
        assert look["fits"]
        assert look["contrast"] >= 4.5  # WCAG 2.2, 1.4.3
        assert look["dark"] is (scheme == "dark")
        assert look["rows"] == [
            ["<script>alert(1)</script>", "10", "2", "10", "0.25"],
            ["x" * 128, "2", "0", "2.5", "0.125"],
            ["ünï & \u202eco", "1", "0", "1", "0.00"],
        ]
        assert look["bars"][0] > look["bars"][1] > look["bars"][2]
        assert look["total"] == ["total", "13", "2", "13.5", "0.375"]
        assert look["endpoints"] == 2


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)> \u202e" + "x" * 100


class Sources:
    """The state of a service, with a call more each time that it is read."""

    read_times = 0

    async def read(self) -> Status:
        self.read_times += 1
        rows: list[tuple[str | Share, ...]] = [
            ("queue_submit", "client_disconnected", "2000000000", str(self.read_times))
        ]
        limits: list[tuple[str | Share, ...]] = [
            ("max_buffered_bytes (fullest process)", "6,319,128,576 of 6,319,128,576", Share(part)) for part in (0, 1.5)
        ]
        errors: list[tuple[str | Share, ...]] = [(HOSTILE[:64], "-", "1", "-", HOSTILE)]
        return Status(
            at="2026-11-27 03:00:00 UTC",
            attention=[HOSTILE, "fal responded 401"],
            summary=f"Calls in flight: {self.read_times}.",
            sections=[
                Section("Calls", ("kind", "outcome", "last 5 minutes", "since the start"), rows),
                Section("Limits", ("limit", "in use", "share"), limits, note=HOSTILE),
                Section("Errors", ("error", "last", "count", "outcome, kind, status", "detail"), errors),
                Section("Empty", ("none",), [], HOSTILE),
            ],
            has_account=True,
        )


@pytest.mark.gen_test
async def test_status() -> None:
    """The state of the service can be read on each screen and refreshes by itself; texts are text; nothing else loads.

    A refresh leaves the focus where it is, can be paused, and says when it fails.
    """
    application = Application([("/", StatusHandler, {"sources": Sources()})], log_function=lambda handler: None)
    chromium, _ = tool("chromium"), find_node()
    listener, port = bind_unused_port()
    server = HTTPServer(application)
    server.add_sockets([listener])
    url = f"http://127.0.0.1:{port}/"
    seen = await run_script("status.mjs", url, chromium)
    server.stop()
    await server.close_all_connections()
    assert (seen["problems"], seen["found"]) == ([], [])
    assert set(seen["requests"]) == {url}
    first, refreshed = seen["first"], seen["refreshed"]
    assert first["attention"] == [HOSTILE, "fal responded 401"]
    assert first["rows"][0] == ["queue_submit", "client_disconnected", "2000000000", "1"]
    assert first["rows"][3] == [HOSTILE[:64], "-", "1", "-", HOSTILE]
    assert [row[2] for row in first["rows"][1:3]] == ["0 % 0 %", "150 % 150 %"]
    assert (first["scripts"], first["stale"]) == (1, "")
    assert refreshed["rows"][0][3] == "3"
    assert refreshed["rows"][1:] == first["rows"][1:]
    assert (seen["focus"], seen["while_paused"]) == ("usage", 0)
    assert seen["offline"]["stale"] == "The service does not respond: the numbers below are old."


@pytest.mark.parametrize("form", ["run", "stream"])
@pytest.mark.parametrize(("status", "text"), ERRORS)
def test_errors_are_shown(page: Any, form: str, status: int, text: str) -> None:
    """An error of fal's is shown with its status and its text, and the form can be used again."""
    seen = page["seen"][f"{form}_{status}"]
    assert (seen["error"], seen["idle"]) == (text, True)


@pytest.mark.parametrize(("form", "output", "whole"), [("run", "logs", LOG[-1]), ("stream", "stream-output", TEXT)])
def test_cancel(page: Any, form: str, output: str, whole: str) -> None:
    """Cancel cancels the running call, is reported, and leaves the form ready."""
    seen = page["seen"][f"{form}_cancelled"]
    assert (seen["error"], seen["idle"]) == ("Cancelled.", True)
    assert whole not in seen[output][-1]
    assert form == "stream" or seen["picture"] is None


def test_cancel_reaches_the_queue(page: Any) -> None:
    """Cancel cancels the queued job itself, also while the job is submitted, and no other job."""
    assert page["cancelled"] == ["A lighthouse in a snow storm", "Cancelled at once"]
    assert page["seen"]["run_cancelled_at_once"]["error"] == "Cancelled."
    assert page["seen"]["run_cancelled_at_once"]["queue-position"][-1] == ""


def test_a_stream_fails_below_a_picture(page: Any) -> None:
    """The picture stays, and the error is in sight all the same."""
    seen = page["seen"]["stream_after_picture"]
    assert seen["picture"] is not None
    assert (seen["error"], seen["error_form"], seen["error_in_sight"]) == (ERRORS[-1][1], "stream-form", True)


@pytest.mark.parametrize("form", ["run", "stream"])
@pytest.mark.parametrize("name", ["422", "429", "500", "cancelled"])
def test_an_error_is_shown_beside_its_form(page: Any, form: str, name: str) -> None:
    """A user of a small screen sees the error, also of a stream below a picture."""
    seen = page["seen"][f"{form}_{name}"]
    assert (seen["error"] != "", seen["error_form"], seen["error_in_sight"]) == (True, f"{form}-form", True)


def test_the_focus_stays(page: Any) -> None:
    """A user of the keyboard keeps the focus on the button, and gets it there after Cancel."""
    assert page["seen"]["run_by_enter"]["focus"] == ["run", "run", "run"]
    assert page["seen"]["run_by_enter"]["executions"] == 1
    assert page["seen"]["run_cancelled"]["focus"][-1] == "run"
    assert page["seen"]["stream_cancelled"]["focus"][-1] == "stream"


def test_the_code_of_a_call(page: Any) -> None:
    """Each form shows its call in three languages, and each of them makes that call again, whatever the prompt has."""
    prompts = page["code"]
    assert [[language for language, _ in codes] for codes in prompts] == [list(COMMANDS)] * 2
    run, stream = page["ran"]
    assert not [printed for printed in (*run, *stream) if printed.startswith("failed: ")]
    assert len(set(page["prompts"])) == 1
    assert len(page["prompts"]) == 3
    assert page["prompts"][0] == page["seen"]["odd_run"]["picture"][2]
    for printed in run:
        assert re.search(r"COMPLETED(?s:.*)http://127.0.0.1:[0-9]+/sandbox/files/[0-9a-f-]+\.png", printed)
    shown = page["seen"]["odd_stream"]["stream-output"][-1]
    java_script, curl, python = stream
    assert java_script.splitlines()[-1] == python.splitlines()[-1] == shown
    assert json.loads(curl.split("data: ")[-1])["output"] == shown


def test_the_code_is_copied(page: Any) -> None:
    """A button copies it. Where a page has no clipboard, its text is selected."""
    (run, _, _), (_, stream, _) = page["code"]
    assert page["copied"] == [run[1], stream[1].rstrip("\n")]


def test_the_page_can_be_read_and_used(page: Any) -> None:
    """axe-core finds nothing, on two screens, in the light and in the dark; and borders have a contrast of 3."""
    assert page["found"] == []


@pytest.mark.parametrize("form", ["run", "stream"])
def test_a_connection_that_fails(page: Any, form: str) -> None:
    """The page says what to check, in place of the words of the browser."""
    offline, cut = page["seen"][f"{form}_offline"], page["seen"][f"{form}_cut"]
    assert re.fullmatch(r"The proxy at 127\.0\.0\.1:[0-9]+ does not respond\. Check that .*", offline["error"])
    assert cut["error"].startswith("The connection to the proxy was lost before the response was complete.")
    assert (offline["idle"], cut["idle"]) == (True, True)


def test_the_page_calls_no_other_origin(page: Any) -> None:
    """All requests of the page go to the proxy's own origin, and no script fails."""
    (origin,) = page["origins"]
    assert origin.startswith("http://127.0.0.1:")
    assert page["problems"] == []


class Page(RequestHandler):
    def get(self) -> None:
        self.finish("<!doctype html><title>A page of another origin</title>")


@pytest.fixture(scope="module")
def pages(authority: Authority) -> Any:
    """Run ``cors.mjs`` once: the same page at two origins, of which the proxy allows the first."""
    chromium = tool("chromium")

    async def make() -> Any:
        listener, port = bind_unused_port()
        server = HTTPServer(Application([("/", Page)], log_function=lambda handler: None))
        server.add_sockets([listener])
        allowed, other = (f"http://{host}:{port}" for host in ("127.0.0.1", "localhost"))
        try:
            async with serve_sandbox(Setup(authority), PACE, allowed_origins=(allowed,)) as sandbox:
                return await run_script("cors.mjs", sandbox.public_url + ROUTE, allowed, other, chromium)
        finally:
            server.stop()
            await server.close_all_connections()

    return asyncio.run(make())


def test_a_page_of_an_allowed_origin(pages: Any) -> None:
    """The page may send any headers. It reads the result, fal's request id and why a call was refused, and no more."""
    run, refused = pages["allowed"]["run"], pages["allowed"]["refused"]
    assert run["status"] == 200
    assert run["body"]["images"]
    assert len(run["headers"]["x-fal-request-id"]) == 36
    assert run["headers"]["server"] is None
    assert refused["status"] == 412
    assert "x-fal-target-url" in refused["body"]["message"]


def test_a_page_of_another_origin(pages: Any) -> None:
    """The browser does not even send its call."""
    assert pages["other"] == {name: {"error": "TypeError: Failed to fetch"} for name in ("run", "refused")}
