"""The header in which a proxy in front names the user counts from that proxy only, and never goes on to fal."""

import asyncio
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.proxy import Setup
from tests.support.raw_client import request
from tests.support.service_process import ACTIVATE, COMMAND, WITH_KEY, ServiceProcess, environment
from tests.support.stub_handlers import fine

TRUSTED, UNTRUSTED = "127.0.0.1", "127.0.0.2"
OPTIONS = ("--user-header=X-Forwarded-User", f"--trusted-proxies={TRUSTED},unix", "--store=memory")
FORWARDED = "x-forwarded-for: 203.0.113.7"

# The peer, its header lines, and the status and the user in the log; or, where there is no user, the log's detail.
CALLS: list[tuple[str, list[str], int, str]] = [
    (TRUSTED, ["X-Forwarded-User: alice"], 200, "alice"),
    (TRUSTED, ["x-FORWARDED-user:  alice \t", FORWARDED], 200, "alice"),
    (TRUSTED, ["x-forwarded-user: " + "Łucja, Zoë".encode().decode("latin-1")], 200, "Łucja, Zoë"),
    (TRUSTED, ["x-forwarded-user: Zo\xeb"], 200, "Zoë"),
    (TRUSTED, ["x-forwarded-user: " + "a" * 128], 200, "a" * 128),
    (TRUSTED, ["x_forwarded_user: alice"], 200, "address:127.0.0.1"),
    (TRUSTED, [], 200, "address:127.0.0.1"),
    (TRUSTED, [FORWARDED], 200, "address:203.0.113.7"),
    (TRUSTED, ["x-forwarded-user:", FORWARDED], 200, "address:203.0.113.7"),
    (TRUSTED, ["x-forwarded-user: alice", "connection: x-forwarded-user"], 200, "alice"),
    # Any client can send it.
    (UNTRUSTED, ["x-forwarded-user: alice"], 200, "address:127.0.0.2"),
    (UNTRUSTED, ["x-forwarded-user: alice", "x-forwarded-for: 127.0.0.1"], 200, "address:127.0.0.2"),
    (UNTRUSTED, ["x-forwarded-user: alice", "x-forwarded-user: bob"], 200, "address:127.0.0.2"),
    (UNTRUSTED, ["x-forwarded-user: \x85"], 200, "address:127.0.0.2"),
    # A client that trusts nothing in front comes through the proxy that is trusted: its own header stands beside.
    (TRUSTED, ["x-forwarded-user: bob", "x-forwarded-user: alice"], 500, "user_header: X-Forwarded-User comes twice"),
    (TRUSTED, ["x-forwarded-user: alice", "X-Forwarded-User: alice"], 500, "user_header: X-Forwarded-User comes twice"),
    (TRUSTED, ["x-forwarded-user: alice", "x-forwarded-user:"], 500, "user_header: X-Forwarded-User comes twice"),
    (TRUSTED, ["x-forwarded-user: " + "a" * 129], 500, "user_header: the value of X-Forwarded-User is not 1 to 128"),
    (TRUSTED, ["x-forwarded-user: \x85"], 500, "user_header: the value of X-Forwarded-User is not 1 to 128"),
    (
        TRUSTED,
        ["x-forwarded-user: address:::1"],
        500,
        "user_header: the value of X-Forwarded-User begins with address:",
    ),
]


async def status_of(peer: str, port: int, headers: list[str]) -> int:
    """Make a paid call from that address, and return the status."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(peer, 0))
    return await sent(reader, writer, headers)


async def sent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, headers: list[str]) -> int:
    writer.write(request(headers=[*headers, "x-unknown: 1"]))
    status = int((await reader.readline()).split()[1])
    writer.close()
    return status


def entries(lines: list[str]) -> list[dict[str, Any]]:
    """Return the lines of the access log."""
    return [entry for entry in map(json.loads, lines) if entry["logger"] == "tornado_fal_proxy.access"]


@pytest.mark.gen_test
async def test_users(setup: Setup) -> None:
    """The user is who a trusted peer names, once and fit for an id; and else the client's address."""
    upstream = await setup.upstream(fine)
    running = await ServiceProcess.in_front_of(setup, upstream, "--log-format=json", *OPTIONS)
    statuses = [await status_of(peer, running.port, headers) for peer, headers, _, _ in CALLS]
    _, stderr = await running.end()
    assert statuses == [status for _, _, status, _ in CALLS]
    for entry, (_, headers, status, shown) in zip(entries(stderr.splitlines()), CALLS, strict=True):
        if status == 200:
            assert (entry["user"], entry["outcome"]) == (shown, "ok"), headers
        else:
            assert (entry["user"], entry["error"]) == (None, "Misconfigured"), headers
            assert entry["detail"].startswith(shown)
    assert len(upstream.exchanges) == statuses.count(200)
    for exchange in upstream.exchanges:
        assert not {name.lower() for name, _ in exchange.headers} & {b"x-forwarded-user", b"x-forwarded-for"}


@pytest.mark.gen_test
async def test_limits_are_those_of_the_user(setup: Setup) -> None:
    """Each user has a limit of their own, whatever their address, and so has each address without a user."""
    upstream = await setup.upstream(fine)
    running = await ServiceProcess.in_front_of(setup, upstream, "--jobs-per-user=1/day", *OPTIONS)
    alice, bob = ["x-forwarded-user: alice"], ["x-forwarded-user: bob"]
    for peer, headers, status in (
        (TRUSTED, alice, 200),
        (TRUSTED, [*alice, FORWARDED], 402),
        (TRUSTED, bob, 200),
        (TRUSTED, [FORWARDED], 200),
        (TRUSTED, [FORWARDED], 402),
        (UNTRUSTED, bob, 200),
        (UNTRUSTED, ["x-forwarded-user: somebody"], 402),
    ):
        assert await status_of(peer, running.port, headers) == status
    await running.end()


@pytest.mark.gen_test
async def test_socket_file(setup: Setup, tmp_path: Path) -> None:
    """A peer on a socket file is trusted as unix. Without a user all such clients are one."""
    config = setup.config(await setup.upstream(fine))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path := str(tmp_path / "socket"))
        listener.listen()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", ACTIVATE, str(listener.fileno()), *COMMAND, "--log-format=json", *OPTIONS),
            env=environment(WITH_KEY | {"FAL_PROXY_CONNECT_TO": str(config.connect_to)})
            | {"FAL_PROXY_CA_CERTS": str(config.ca_certs)},
            pass_fds=[listener.fileno()],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for headers in (["x-forwarded-user: alice"], []):
            assert await sent(*await asyncio.open_unix_connection(path), headers) == 200
        process.terminate()
        stderr = (await process.communicate())[1].decode()
    assert process.returncode == 0, stderr
    assert [entry["user"] for entry in entries(stderr.splitlines())] == ["alice", "address:unix"]
