"""docs/start.md is true: its files are a page that draws, through Vite and the proxy, and its snippets work."""

import asyncio
import os
import re
import shlex
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tornado.httpclient import AsyncHTTPClient

from tests.support.certificates import Authority
from tests.support.node import SCRIPTS, find_node, run_script, serve_sandbox
from tests.support.pages import Page
from tests.support.proxy import ROUTE, Setup
from tests.support.service_process import WITH_KEY, connects
from tests.support.tools import tool, unused_port
from tests.support.waiting import eventually
from tornado_fal_proxy.service.options import parse_settings

PAGE = Page("docs/start.md")
README = Page("README.md")
FILES = ("index.html", "main.js", "vite.config.mjs")


def folder(path: Path) -> Path:
    """Give the folder the packages that ``npm install`` would put there, and return it."""
    find_node()
    packages = path / "node_modules"
    packages.mkdir()
    for package in (SCRIPTS / "node_modules").iterdir():
        if not package.name.startswith(".vite"):
            (packages / package.name).symlink_to(package)
    return path


@asynccontextmanager
async def served_by_vite(page: Path, proxy_url: str) -> AsyncIterator[tuple[int, asyncio.subprocess.Process]]:
    """Serve the files of the page with Vite, which sends calls on to that proxy. Give its port and its process."""
    vite = tool("vite", path=folder(page) / "node_modules/vite/bin/vite.js")
    for name in FILES:
        (page / name).write_text(PAGE.file(name).replace("http://127.0.0.1:8080", proxy_url), "utf-8")
    port = unused_port()
    running = await asyncio.create_subprocess_exec(
        *(find_node(), vite, "--host=127.0.0.1", f"--port={port}", "--strictPort"),
        cwd=page,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        await eventually(lambda: connects(port))
        yield port, running
    finally:
        os.killpg(running.pid, signal.SIGKILL)
        await running.communicate()


@pytest.fixture(scope="module")
def drawn(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Serve the page with Vite, draw once in Chromium, and return what was seen."""
    chromium = tool("chromium")
    page = tmp_path_factory.mktemp("my-page")

    async def draw() -> Any:
        async with (
            serve_sandbox(Setup(authority), 0.3) as sandbox,
            served_by_vite(page, sandbox.public_url) as (port, _),
        ):
            return await run_script("start.mjs", f"http://127.0.0.1:{port}/", chromium)

    return asyncio.run(draw())


def test_the_page_draws(drawn: Any) -> None:
    """The page shows the job's progress and the picture, and calls nothing but its own origin's route."""
    assert drawn["width"] == 512
    assert drawn["shown"][-1] == ""
    assert {"Step 2 of 3", "Done"} & set(drawn["shown"])
    assert f"POST {ROUTE}" in drawn["calls"]


@pytest.mark.gen_test
async def test_without_a_proxy(tmp_path: Path) -> None:
    """Where the proxy does not run Vite answers and prints what docs/troubleshoot.md says."""
    async with served_by_vite(tmp_path, f"http://127.0.0.1:{unused_port()}") as (port, running):
        url = f"http://127.0.0.1:{port}{ROUTE}"
        response = await AsyncHTTPClient().fetch(url, method="POST", body=b"{}", raise_error=False)
        assert (response.code, response.body) == (502, b"")
        assert running.stderr is not None
        line = re.sub(r"\x1b\[[0-9;]*m", "", (await running.stderr.readline()).decode())
        (printed,) = re.findall(r"`(http proxy error: .*?)`", Page("docs/troubleshoot.md").text)
        assert line.rstrip().endswith(printed)


def test_commands() -> None:
    """The packages are those of the tests, Vite is started as the page shows, and the options exist."""
    assert PAGE.command("packages").splitlines()[1] == "npm install vite @fal-ai/client"
    assert PAGE.command("vite") == "npx vite"
    assert PAGE.file("vite.config.mjs") == README.file("vite.config.mjs")
    first = README.command("sandbox").split(" && ")
    assert PAGE.command("proxy") == f"{first[0]} && {first[1]}\n{first[2]}"
    _, line = PAGE.command("key").splitlines()
    settings = parse_settings(shlex.split(line)[1:], WITH_KEY)
    assert settings.texts["allowed_endpoints"] == "fal-ai/flux/**"


# The files of the page that run in Node too, with the start of what each prints.
PRINTED = {
    "run.js": "http://127.0.0.1:",
    "stream.js": "",
    "upload.js": "http://127.0.0.1:",
    "refused.js": "402 Your limit of 1 job a day is used up; the next job can start at ",
}


@pytest.mark.gen_test
async def test_snippets(authority: Authority, tmp_path: Path) -> None:
    """Each snippet does what the page says, as does README.md's configuration for Node."""
    assert PAGE.names("file") == [*FILES, *PRINTED]
    configuration = README.part("clients")
    packages = folder(tmp_path)
    limited = Setup(authority)
    async with serve_sandbox(Setup(authority), 0.01) as sandbox:
        right = {"key": sandbox.key, "ca_certs": sandbox.ca_certs}
        port = limited.proxy(sandbox.address, jobs_per_user="1/day", store="memory", **right)
        for name, start in PRINTED.items():
            code, url = PAGE.file(name), sandbox.public_url
            if name == "refused.js":
                code, url = f"{PAGE.file('run.js')}{code}", f"http://127.0.0.1:{port}"
            script = packages / f"{name}.mjs"
            script.write_text(configuration.replace("https://fal-proxy.example.com", url) + code, "utf-8")
            process = await asyncio.create_subprocess_exec(find_node(), script, stdout=asyncio.subprocess.PIPE)
            *_, last = (await process.communicate())[0].decode().splitlines()
            assert process.returncode == 0, name
            assert last, name
            assert last.startswith(start), name
        await limited.close()
