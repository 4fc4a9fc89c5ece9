"""Find what a test needs of the machine: programs, namespaces, a free port, and the files of the project."""

import contextlib
import os
import random
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

__all__ = ["ROOT", "isolated", "tool", "unused_port"]

ROOT = Path(__file__).parents[2]
# Set by .ci/run, where a missing tool is a failure.
REQUIRE_TOOLS = "TORNADO_FAL_PROXY_REQUIRE_TOOLS"


def tool(name: str, path: str | Path | None = None) -> str:
    """Return the path of that program, or of the file ``path``. Without it skip the test, or fail it in CI."""
    found = (str(path) if Path(path).exists() else None) if path else shutil.which(name)
    if found is None:
        (pytest.fail if os.environ.get(REQUIRE_TOOLS) else pytest.skip)(f"{name} is not installed")
    return str(found)


def isolated() -> list[str]:
    """Return a command that runs another in a network and with mounts of its own.

    Skip the test where that is impossible, or fail it in CI.
    """
    command = [tool("unshare"), *([] if os.geteuid() == 0 else ["--map-root-user"]), "--net", "--mount"]
    tried = subprocess.run(
        [*command, tool("mount"), "--bind", "/etc", "/etc"], capture_output=True, text=True, check=False
    )
    if tried.returncode:
        (pytest.fail if os.environ.get(REQUIRE_TOOLS) else pytest.skip)(f"no namespaces: {tried.stderr.strip()}")
    return command


def unused_port() -> int:
    """Return a port on which no process listens.

    It is below the ports that systems give to a socket which asks for any: so no other process of the machine, such as
    a second suite, gets it by chance before the test has used it.
    """
    for port in random.SystemRandom().sample(range(10_000, 32_768), 100):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise OSError("no unused port was found")
