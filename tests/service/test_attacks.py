"""Attacks on the command by a client or by fal: memory, log and environment of its process."""

import asyncio
import base64
import contextlib
import gzip
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.certificates import Authority
from tests.support.proxy import KEY, SECRET, Setup
from tests.support.raw_client import RawClient, call
from tests.support.scripted_upstream import Exchange
from tests.support.service_process import ServiceProcess
from tests.support.stub_handlers import JSON, fine
from tests.support.tools import ROOT
from tests.support.waiting import eventually

ZEROS = 30_000_000
BOMBS: dict[str, bytes] = {
    "gzip": gzip.compress(bytes(ZEROS)),
    # The same number of zeros in 39 bytes.
    "br": base64.b64decode("z///f/gnAOKxQCD3/j//hpPxTwDEYQGAzm4y"),
    "gzip, gzip": gzip.compress(gzip.compress(bytes(ZEROS))),
    ", ".join(["gzip"] * 6): b"passed on as it is",
}


def peak_kb(pid: int) -> int:
    """Return the most memory that the process ever had."""
    return int(re.findall(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)[0])


@pytest.mark.parametrize("coding", list(BOMBS))
@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.gen_test
async def test_bombs(setup: Setup, method: str, coding: str) -> None:
    """A response that is small until it is decoded takes a bounded amount of memory while its client does not read."""
    # Twice response_buffer_bytes, and for brotli a window of 16 MB as well (RFC 7932 section 9.1).
    clients, max_kb = 2, 16_000 + (16 * 1024 if coding == "br" else 0)

    async def respond(exchange: Exchange) -> None:
        await exchange.body()
        if exchange.target == b"/bomb":
            await exchange.respond(200, BOMBS[coding], [*JSON, ("content-encoding", coding)])
        else:
            await exchange.respond(200, b"{}", JSON)

    upstream = await setup.upstream(respond)
    running = await ServiceProcess.in_front_of(setup, upstream)
    for _ in range(4):
        assert (await call(running.port, method)).status == 200
    before = peak_kb(running.pid)
    stalled = [await RawClient.open(running.port, receive_buffer=4096) for _ in range(clients)]
    for client in stalled:
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await client.send(method, target="https://fal.run/bomb")
    while len(upstream.exchanges) < 4 + clients:
        await asyncio.sleep(0.01)
    assert (await call(running.port, method)).status == 200  # what came before it has been decoded
    await asyncio.sleep(0.1)
    used = (peak_kb(running.pid) - before) // clients
    for client in stalled:
        client.leave()
    await running.end()
    assert used < max_kb


@pytest.mark.gen_test
async def test_a_reset_between_two_records(setup: Setup, authority: Authority, tmp_path: Path) -> None:
    """A paid call whose body was still leaving is sent once. The moment is luck, which most of these calls have."""
    authority.write_certificate(tmp_path / "server.pem")
    program = [sys.executable, "-m", "tests.support.programs.hasty_upstream", str(tmp_path / "server.pem")]
    with subprocess.Popen(program, cwd=ROOT, stdout=subprocess.PIPE, text=True) as upstream:
        assert upstream.stdout is not None
        running = await ServiceProcess.in_front_of(setup, upstream.stdout.readline().strip())
        statuses = [(await call(running.port, "POST", b"7" * 400_000)).status for _ in range(5)]
        await running.end()
        upstream.kill()
        assert (statuses, len(upstream.stdout.readlines())) == ([500] * 5, 5)


# Logs.

NASTY = [
    *(
        b"\x1b[31m",
        b"\x9b31m",
        b"\x85",
        "\u2028".encode(),
        b"\r\n2026-01-01 fake",
        b"\nfake",
        b"\rfake",
        b"\0",
        b"\x7f",
    ),
    *(b"%0d%0afake", b"\x07", "\u202e".encode()),
]
TEMPLATES = [
    b"GET%b /api/fal/proxy HTTP/1.1\r\nhost: a\r\n\r\n",
    b"GET /api/fal/proxy%b HTTP/1.1\r\nhost: a\r\n\r\n",
    b"GET /api/fal/proxy?%b HTTP/1.1\r\nhost: a\r\nx-fal-target-url: https://fal.run/a/b\r\n\r\n",
    b"GET /elsewhere/%b HTTP/1.1\r\nhost: a\r\n\r\n",
    b"GET /api/fal/proxy HTTP/1.1%b\r\nhost: a\r\n\r\n",
    b"GET /api/fal/proxy HTTP/1.1\r\nhost: a%b\r\n\r\n",
    b"GET /api/fal/proxy HTTP/1.1\r\nhost: a\r\nx-fal-target-url: https://fal.run/a/b?%b\r\n\r\n",
    b"GET /api/fal/proxy HTTP/1.1\r\nhost: a\r\nx-fal-target-url: https://fal.run/a/b\r\nx-fal-a: %b\r\n\r\n",
    b"GET /api/fal/proxy HTTP/1.1\r\nhost: a\r\nx-forwarded-for: %b\r\norigin: %b\r\ncookie: %b\r\n\r\n",
    b"GET /api/fal/proxy HTTP/1.1\r\nhost: a\r\nx%b: b\r\n\r\n",
    b"POST /api/fal/proxy HTTP/1.1\r\nhost: a\r\ncontent-length: %b\r\n\r\n",
    b"POST /api/fal/proxy HTTP/1.1\r\nhost: a\r\ntransfer-encoding: %b\r\n\r\n",
    b"POST /api/fal/proxy HTTP/1.1\r\nhost: a\r\ncontent-type: %b\r\ncontent-length: 2\r\n\r\n{}",
]


@pytest.mark.gen_test
async def test_nobody_writes_to_the_log(setup: Setup) -> None:
    """No byte that a client sends is a control character in the log, or begins a line there."""
    running = await ServiceProcess.in_front_of(
        setup, "127.0.0.1:1", "--log-level=debug", "--allowed-origins=https://a.example"
    )
    for template in TEMPLATES:
        for nasty in NASTY:
            client = await RawClient.open(running.port)
            client.writer.write(template.replace(b"%b", nasty))
            client.writer.write_eof()
            with contextlib.suppress(ConnectionError):
                await client.reader.read()
            await client.close()
    _, log = await running.end()
    assert len(log.splitlines()) == log.count("\n") > len(TEMPLATES) * len(NASTY) // 2
    for line in log.splitlines():
        assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ [a-z._]+: ", line)
        assert not re.search("[\x00-\x1f\x7f-\x9f\u2028-\u202e]", line)


@pytest.mark.gen_test
async def test_a_key_from_a_file_is_in_no_environment(setup: Setup, tmp_path: Path) -> None:
    """The key is neither in the environment nor in the arguments of any of several processes."""
    upstream = await setup.upstream(fine)
    config = setup.config(upstream)
    (tmp_path / "key").write_text(f"{KEY}\n")
    running = await ServiceProcess.start(
        "--processes=2",
        FAL_KEY_FILE=str(tmp_path / "key"),
        FAL_PROXY_CA_CERTS=str(config.ca_certs),
        FAL_PROXY_CONNECT_TO=str(config.connect_to),
    )
    assert (await call(running.port)).status == 200
    assert upstream.exchanges[0].header("authorization") == f"Key {KEY}".encode()
    for pid in (running.pid, *await eventually(running.workers)):
        for name in ("cmdline", "environ"):
            text = Path(f"/proc/{pid}/{name}").read_bytes()
            assert text
            assert SECRET.encode() not in text
    for output in await running.end():
        assert SECRET not in output
