"""docs/migrate.md is true: fal's own proxy for Node does what the page says of it, and ours has the options named."""

import asyncio
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.support.node import run_script
from tests.support.pages import Page
from tests.support.proxy import Setup
from tests.support.raw_client import call
from tests.support.service_process import WITH_KEY
from tests.support.stub_handlers import fine
from tornado_fal_proxy.rules.patterns import Pattern
from tornado_fal_proxy.service.options import parse_settings

PAGE = Page("docs/migrate.md")
# Patterns and endpoints for which both must agree.
PATTERNS = ["fal-ai/flux/**", "fal-ai/flux/*", "fal-ai/flux/dev", "fal-ai/*", "fal-ai/**", "**", "fal-ai/fl*/dev"]
ENDPOINTS = ["fal-ai/flux", "fal-ai/flux/dev", "fal-ai/flux/dev/image-to-image", "fal-ai/fast-sdxl", "other/flux/dev"]


@pytest.fixture(scope="module")
def package() -> Any:
    """Run ``migrate.mjs`` once, and return what fal's proxy did."""
    return asyncio.run(run_script("migrate.mjs", json.dumps(PATTERNS), json.dumps(ENDPOINTS)))


def test_options(package: Any) -> None:
    """The page has each option of the package, and of ours only such as exist."""
    rows = [row for row in PAGE.text.splitlines() if row.startswith("| ") and row.count(" | ") >= 2]
    named = {name for row in rows for name in re.findall(r"`(\w+)", row.split(" | ")[0])}
    assert set(package["options"]) <= named
    ours = parse_settings([], WITH_KEY).texts
    for option in re.findall(r"--([a-z][a-z-]+)", PAGE.text):
        assert option.replace("-", "_") in ours, option


def test_patterns(package: Any) -> None:
    """A pattern of fal's proxy allows the same endpoints here."""
    ours = [[Pattern.parse(text).matches(each.split("/")) for each in ENDPOINTS] for text in PATTERNS]
    assert ours == package["matches"]


def test_bugs(package: Any) -> None:
    """fal's proxy has each fault that a request of its own can show."""
    assert (package["express"]["status"], package["express"]["headers"]["set-cookie"]) == (200, "b=2")
    assert package["noUrl"] == "TypeError"
    sent = package["plain"]["headers"]
    assert (sent["authorization"], sent["accept"]) == ("Key undefined", "application/json")
    assert ("x-fal-a" in sent, "x-app-fal-a" in sent) == (True, False)
    assert package["authorization"] == "Bearer of-the-client"
    assert package["clearText"].startswith("http://")
    assert package["posted"] == 400
    assert package["got"] == package["everyone"] == "https://fal.run/fal-ai/flux/dev"
    assert "x-fal-queue-priority" not in package["hono"]["sent"]
    assert package["hono"]["encoding"] == "gzip"
    assert (package["token"], package["upload"]) == (400, 400)


@pytest.mark.gen_test
async def test_functions(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two functions decide and find the key as they did in JavaScript, and both commands are right."""
    PAGE.write_module("my_rules", tmp_path, monkeypatch)
    monkeypatch.setenv("KEY_OF_ANN", "of-ann:secret")
    relay = parse_settings(shlex.split(PAGE.command("functions"))[1:], {}).relay
    assert relay is not None
    upstream = await setup.upstream(fine)
    port = setup.proxy(upstream, key=None, authorize=relay.authorize, resolve_key=relay.resolve_key)
    assert (await call(port)).status == 401
    assert (await call(port, headers=["cookie: session=0f9a"])).status == 200
    assert upstream.exchanges[0].header("authorization") == b"Key of-ann:secret"
    assert parse_settings(shlex.split(PAGE.command("start"))[1:], WITH_KEY).relay is not None


def test_route() -> None:
    """Next.js sends the route that fal's SDKs get to the port of the first command."""
    (source, destination) = re.findall(r'(?:source|destination): "(.*?)"', PAGE.file("next.config.mjs"))
    assert destination == f"http://127.0.0.1:8080{source}"
    assert "--port=8080" in PAGE.command("start")
