"""README.md is true: its commands, code and pictures. The links and marks of all pages are right too."""

import asyncio
import contextlib
import json
import re
import runpy
import sys
from functools import partial
from pathlib import Path

import pytest
from tornado.web import Application, create_signed_value

import tornado_fal_proxy
from tests.support.certificates import Authority
from tests.support.pages import MARKED, Page
from tests.support.proxy import KEY, ROUTE, Setup
from tests.support.raw_client import call
from tests.support.scripted_upstream import Exchange
from tests.support.tools import ROOT, tool
from tests.unit.test_house import SUBJECT
from tornado_fal_proxy import FalProxyHandler, ProxyConfig, close_upstreams, handler

README = Page("README.md")
# The pages whose blocks of code all have a mark. Of the others a test of their own reads all blocks.
MARKED_PAGES = [
    "README.md",
    *(f"docs/{name}.md" for name in ("start", "embed", "deploy", "secure", "troubleshoot", "migrate")),
]


async def respond(exchange: Exchange) -> None:
    assert exchange.header("authorization") == f"Key {KEY}".encode()
    await exchange.body()
    await exchange.respond(200, b'{"ok": 1}', [("content-type", "application/json")])


def test_length() -> None:
    """It is short enough to be read to the end."""
    assert len(README.text.splitlines()) <= 130
    assert len(README.text.split()) <= 1000


def test_commands() -> None:
    """Two commands are one line that needs only Python at first, and .ci/run takes them from here."""
    assert README.names("command") == ["sandbox", "nginx", "test"]
    script = (ROOT / ".ci/run").read_text("utf-8")
    assert "<!-- command: $1 -->" in script
    for name in ("sandbox", "test"):
        assert re.fullmatch(r"python3 -m venv \.venv && \.venv/bin/pip install .*", README.command(name))
        assert f"$(readme {name})" in script
        assert README.command(name) not in script


@pytest.mark.parametrize("path", MARKED_PAGES)
def test_marks(path: str) -> None:
    """Each block of code has a mark, by which a test finds it: its name stands in a test."""
    text = Page(path).text
    assert len(MARKED.findall(text)) == len(re.findall(r"^ *```\w+$", text, re.MULTILINE))
    tests = "".join(file.read_text("utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    assert not [name for _, name, _, _ in MARKED.findall(text) if f'"{name}"' not in tests]


def test_pictures() -> None:
    """The pictures are those that the script draws, and the labels of the sandbox's page are those of the page."""
    script = runpy.run_path(str(ROOT / "docs/pictures/make.py"))
    for name, draw in script["PICTURES"].items():
        assert (ROOT / "docs/pictures" / name).read_text("utf-8") == draw()
        assert f"](docs/pictures/{name})" in README.text
    page = (ROOT / "tornado_fal_proxy/sandbox/page.html").read_text("utf-8")
    for label in ("Make a picture through the queue", "A lighthouse in a snow storm", ">Run<", ">Cancel<"):
        assert label in page
        assert label.strip("<>") in script["sandbox"]()


@pytest.mark.gen_test
async def test_curl() -> None:
    """The curl line is the one that the sandbox prints, and it makes a picture."""
    curl = tool("curl")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tornado_fal_proxy", "--sandbox", "--port=0"), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        lines = [(await process.stdout.readline()).decode() for _ in range(3)]
        (port,) = re.findall(r"listens on http://127\.0\.0\.1:(\d+)/api/fal/proxy$", lines[0].strip())
        assert lines[2].strip() == README.part("curl").strip().replace(":8080", f":{port}")
        shown = await asyncio.create_subprocess_shell(
            f"{curl} --silent --noproxy '*'{lines[2].strip().removeprefix('curl')}", stdout=asyncio.subprocess.PIPE
        )
        assert json.loads((await shown.communicate())[0])["images"][0]["url"].startswith(f"http://127.0.0.1:{port}/")
    finally:
        process.terminate()
        assert await process.wait() == 0


@pytest.mark.gen_test
async def test_embedding(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shortest application works."""
    monkeypatch.setattr(handler, "_DEFAULT_CONFIG", setup.config(await setup.upstream(respond)))
    assert (await call(setup.serve(README.run("embed.py")["application"]))).status == 200


@pytest.mark.gen_test
async def test_guard(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard lets signed-in users in, to the models that it names, for ten calls a day."""
    upstream = await setup.upstream(respond)
    fixed = partial(setup.config, upstream, store="memory")
    monkeypatch.setattr(tornado_fal_proxy, "ProxyConfig", fixed)
    application = README.run("guard.py")["application"]
    application.settings["log_function"] = lambda handler: None
    port = setup.serve(application)
    assert (await call(port)).status == 401
    headers = [f"cookie: user={create_signed_value('change me', 'user', 'ann').decode()}"]
    assert [(await call(port, headers=headers)).status for _ in range(11)] == [200] * 10 + [402]
    assert (await call(port, target="https://fal.run/fal-ai/other", headers=headers)).status == 403


def slugs(document: Path) -> set[str]:
    """Return the anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)", document.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links() -> None:
    """Every relative link of the documents leads to a file, and to a heading there where it names one."""
    for document in (
        ROOT / "README.md",
        ROOT / "CHANGELOG.md",
        *(ROOT / "docs").rglob("*.md"),
        *ROOT.glob("*/README.md"),
    ):
        text = re.sub(r"\n *", " ", document.read_text("utf-8"))
        for link, anchor in re.findall(r"\]\((?!https://)([^)#]*)#?([^)]*)\)", text):
            target = document.parent / link if link else document
            assert target.exists(), f"{document.name}: {link}"
            assert not anchor or anchor in slugs(target), f"{document.name}: {link}#{anchor}"


@pytest.mark.parametrize("path", [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")], ids=lambda path: path.name)
def test_subjects(path: Path) -> None:
    """No sentence of a page begins with a relative word as its subject, as in the package."""
    text = re.sub(r"^ *```.*?^ *```$|^#.*?$|^\|.*?$", "", path.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    found = [match[1] for match in SUBJECT.finditer(re.sub(r"\n[\n\d. -]*\n*|\*\*", " . ", text))]
    assert not [words for words in found if not words.startswith("How to")], found


def test_threat_model() -> None:
    """Each test that docs/threat-model.md names exists, and each attack has one."""
    text = (ROOT / "docs/threat-model.md").read_text("utf-8")
    attacks = [row for row in text.splitlines() if row.count(" | ") == 3 and not row.startswith("| From ")]
    assert len(attacks) > 30
    for row in attacks:
        named = re.findall(r"(\w+/test_\w+)::(test_\w+)", row.rpartition(" | ")[2])
        assert named, row
        for module, function in named:
            code = (ROOT / "tests" / f"{module}.py").read_text("utf-8")
            assert re.search(rf"^(?:async )?def {function}\(", code, re.MULTILINE), f"{module}::{function}"


@pytest.mark.gen_test
async def test_egress_proxy(setup: Setup, authority: Authority, protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """libcurl uses the proxy that https_proxy names, and that proxy gets the name of a host, no key and no path."""
    upstream = await setup.upstream(respond, protocol)
    asked: list[bytes] = []

    async def tunnel(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        onward, outward = await asyncio.open_connection("127.0.0.1", upstream.port)
        writer.write(b"HTTP/1.1 200 Connected\r\nx-of-the-tunnel: 1\r\n\r\n")
        await asyncio.gather(copy(reader, outward), copy(onward, writer))

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError), contextlib.closing(writer):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()

    for name in ("no_proxy", "NO_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    async with await asyncio.start_server(tunnel, "127.0.0.1", 0) as server:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        config = ProxyConfig(key=KEY, ca_certs=authority.ca_file)
        application = Application([(ROUTE, FalProxyHandler, {"config": config})], log_function=lambda handler: None)
        got = await call(setup.serve(application))
        assert (got.status, got.body, got.header("x-of-the-tunnel")) == (200, b'{"ok": 1}', None)
        close_upstreams(application)
    (head,) = asked
    assert head.startswith(b"CONNECT fal.run:443 HTTP/1.1\r\n")
    assert KEY.encode() not in head
    assert b"flux" not in head


@pytest.mark.gen_test
async def test_cross_site(setup: Setup) -> None:
    """The preflight of a browser for a script of another origin is answered 405, with no permission."""
    port = setup.proxy("127.0.0.1:1")
    asked = ["origin: https://evil.example", "access-control-request-headers: x-fal-target-url"]
    refused = await call(port, "OPTIONS", target=None, headers=asked)
    assert refused.status == 405
    assert not [name for name, _ in refused.headers if name.startswith("access-control-")]
