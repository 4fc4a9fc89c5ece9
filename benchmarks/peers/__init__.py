"""The proxies that are compared: for each a small program or a configuration, and the command that starts it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from benchmarks.servers import KEY, CannotStart

__all__ = [
    "FLOOR",
    "NGINX",
    "OURS",
    "PEERS",
    "ROOT",
    "Peer",
    "Setting",
    "find_program",
    "ours_before",
    "ours_in",
    "ours_with",
]

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NODE_MODULES = HERE.parent / "node_modules"
NEXT = NODE_MODULES / "next" / "dist" / "bin" / "next"
NEXT_BUILD_TIMEOUT_S = 300


@dataclass(frozen=True)
class Setting:
    """The setting of a peer: two ports, an empty directory, ``ca.pem``, and the number of calls that it must hold."""

    port: int
    upstream_port: int
    directory: Path
    ca_file: Path
    calls: int
    isolated: bool


@dataclass(frozen=True)
class Peer:
    """A server to compare. ``command`` makes its argument list, and raises CannotStart if it cannot run."""

    name: str
    title: str
    command: Callable[[Setting], Sequence[str]]
    relays: bool = True
    isolated: bool = True  # it insists on https://fal.run
    max_held: int | None = None  # the most long polls that it can hold
    files_per_call: int = 2  # connections of a held call: the client's and one to the upstream
    everywhere: bool = False  # it may use all CPUs, also those of the upstream and the clients
    checkout: Path = ROOT  # whose package it runs

    def environment(self, setting: Setting) -> Mapping[str, str]:
        """Return the environment variables of its process."""
        ours = {
            "CA_FILE": str(setting.ca_file),
            "FAL_KEY": KEY,
            "NODE_ENV": "production",
            "NODE_EXTRA_CA_CERTS": str(setting.ca_file),
            "NEXT_TELEMETRY_DISABLED": "1",
            "PYTHONPATH": str(self.checkout),
        }
        return {**os.environ, **ours}


def find_program(name: str) -> str:
    """Return the path of a program in this Python environment, PATH, or /usr/sbin. Raise CannotStart."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin"])
    found = shutil.which(name, path=path)
    if found is None:
        raise CannotStart(f"{name} is not installed")
    return found


def _needs(*modules: str) -> None:
    if missing := [module for module in modules if find_spec(module) is None]:
        raise CannotStart(f"needs {', '.join(missing)}: pip install -r benchmarks/requirements.txt")


def _needs_packages() -> None:
    if not (NODE_MODULES / "@fal-ai").exists():
        raise CannotStart("needs npm ci --prefix benchmarks")


def _python(file: str, *modules: str) -> Callable[[Setting], Sequence[str]]:
    def command(setting: Setting) -> Sequence[str]:
        _needs(*modules)
        return [sys.executable, str(HERE / file), str(setting.port), str(setting.ca_file)]

    return command


def _node(file: str) -> Callable[[Setting], Sequence[str]]:
    def command(setting: Setting) -> Sequence[str]:
        _needs_packages()
        return [find_program("node"), str(HERE / file), str(setting.port)]

    return command


def _ours(setting: Setting) -> Sequence[str]:
    # Without the access log, because none of the others writes one.
    options = [f"--port={setting.port}", f"--ca-certs={setting.ca_file}", "--log-level=warning"]
    if not setting.isolated:
        options.append(f"--connect-to=127.0.0.1:{setting.upstream_port}")
    # -P: the package is the one of PYTHONPATH, whatever the current directory has.
    return [sys.executable, "-P", "-m", "tornado_fal_proxy", *options]


def _embedded(setting: Setting) -> Sequence[str]:
    command = [sys.executable, str(HERE / "embedded.py"), str(setting.port), str(setting.ca_file)]
    return command if setting.isolated else [*command, f"127.0.0.1:{setting.upstream_port}"]


def _floor(setting: Setting) -> Sequence[str]:
    return [sys.executable, str(HERE / "floor.py"), str(setting.port)]


def _tornado_curl(setting: Setting) -> Sequence[str]:
    return [*_python("tornado_curl.py")(setting), str(setting.calls)]


def _flask(setting: Setting) -> Sequence[str]:
    _needs("flask", "requests", "gunicorn")
    limits = [f"--threads={setting.calls}", f"--worker-connections={setting.calls * 2}", "--timeout=900"]
    bind = f"--bind=127.0.0.1:{setting.port}"
    app = "benchmarks.peers.flask_requests:app"
    return [find_program("gunicorn"), "--workers=1", "--worker-class=gthread", *limits, bind, "--log-level=error", app]


def _next(setting: Setting) -> Sequence[str]:
    _needs_packages()
    node = find_program("node")
    app = HERE / "next"
    if not (app / ".next" / "BUILD_ID").exists():
        build = [node, str(NEXT), "build", str(app)]
        done = subprocess.run(build, check=False, capture_output=True, text=True, timeout=NEXT_BUILD_TIMEOUT_S)
        if done.returncode:
            raise CannotStart(f"next build failed: {done.stderr[-1000:]}")
    return [node, str(NEXT), "start", str(app), f"--port={setting.port}", "--hostname=127.0.0.1"]


def _nginx(setting: Setting) -> Sequence[str]:
    values = {
        "FILES": "40000",
        "DIRECTORY": setting.directory,
        "UPSTREAM_PORT": setting.upstream_port,
        "PORT": setting.port,
        "CA_FILE": setting.ca_file,
        "FAL_KEY": KEY,
    }
    text = (HERE / "nginx.conf").read_text()
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", str(value))
    (setting.directory / "nginx.conf").write_text(text)
    return [find_program("nginx"), "-c", str(setting.directory / "nginx.conf"), "-p", str(setting.directory)]


OURS = Peer("ours", "tornado_fal_proxy", _ours, isolated=False, files_per_call=1)


def ours_before(checkout: Path) -> Peer:
    """Return this proxy as another checkout has it, to tell whether a change made it more expensive."""
    return replace(OURS, name="before", title=TITLES["before"], checkout=checkout)


def ours_in(processes: int) -> Peer:
    """Return this proxy in that many processes, on all CPUs."""
    return replace(OURS, command=lambda setting: [*_ours(setting), f"--processes={processes}"], everywhere=True)


def ours_with(*options: str) -> Peer:
    """Return this proxy with more options, which override those that it has here.

    ``{directory}`` in an option is a directory of the server's own.
    """

    def command(setting: Setting) -> Sequence[str]:
        return [*_ours(setting), *(option.format(directory=setting.directory) for option in options)]

    return replace(OURS, command=command)


FLOOR = Peer("floor", "Tornado, relays nothing", _floor, relays=False, isolated=False, files_per_call=1)
NGINX = Peer("nginx", "nginx proxy_pass", _nginx, isolated=False)

PEERS = (
    OURS,
    Peer("embedded", "tornado_fal_proxy in an application", _embedded, isolated=False, files_per_call=1),
    FLOOR,
    Peer("tornado-curl", "Tornado + curl client as it comes", _tornado_curl),
    Peer("aiohttp", "aiohttp by hand", _python("aiohttp_relay.py", "aiohttp")),
    Peer("fastapi", "FastAPI + httpx", _python("fastapi_httpx.py", "fastapi", "httpx", "uvicorn")),
    Peer("flask", "Flask + requests, gunicorn threads", _flask, max_held=1000),
    Peer("express", "@fal-ai/server-proxy, Express", _node("express.mjs")),
    Peer("hono", "@fal-ai/server-proxy, Hono", _node("hono.mjs")),
    Peer("next", "@fal-ai/server-proxy, Next.js", _next),
    NGINX,
)

TITLES = {peer.name: peer.title for peer in PEERS} | {"before": f"{OURS.title} of another checkout"}
