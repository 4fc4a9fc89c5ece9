"""The proxies that are compared: for each a small program of ours, or a configuration, and how it is started."""

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

__all__ = ["FLOOR", "NGINX", "OURS", "PEERS", "ROOT", "Peer", "Place", "ours_in", "ours_with"]

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NODE_MODULES = HERE.parent / "node_modules"
NEXT = NODE_MODULES / "next" / "dist" / "bin" / "next"
NEXT_BUILD_TIMEOUT_S = 300


@dataclass(frozen=True)
class Place:
    """Where a peer runs: its port, the upstream's, an empty directory, ``ca.pem``, and how many calls it must hold."""

    port: int
    upstream_port: int
    directory: Path
    ca_file: Path
    calls: int
    isolated: bool


@dataclass(frozen=True)
class Peer:
    """A server to compare. ``command`` makes its argument list, and raises CannotStart where it cannot run."""

    name: str
    title: str
    command: Callable[[Place], Sequence[str]]
    relays: bool = True
    isolated: bool = True  # it insists on https://fal.run
    most_held: int | None = None  # long polls that it can hold
    files_per_call: int = 2  # connections that a held call takes, the caller's and one to the upstream
    everywhere: bool = False  # it may use all CPUs, those of the upstream and the callers too

    def environment(self, place: Place) -> Mapping[str, str]:
        ours = {
            "CA_FILE": str(place.ca_file),
            "FAL_KEY": KEY,
            "NODE_ENV": "production",
            "NODE_EXTRA_CA_CERTS": str(place.ca_file),
            "NEXT_TELEMETRY_DISABLED": "1",
            "PYTHONPATH": str(ROOT),
        }
        return {**os.environ, **ours}


def _program(name: str) -> str:
    """Where a program is: in this environment of Python's, in PATH, or where Debian has what only root runs."""
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


def _python(file: str, *modules: str) -> Callable[[Place], Sequence[str]]:
    def command(place: Place) -> Sequence[str]:
        _needs(*modules)
        return [sys.executable, str(HERE / file), str(place.port), str(place.ca_file)]

    return command


def _node(file: str) -> Callable[[Place], Sequence[str]]:
    def command(place: Place) -> Sequence[str]:
        _needs_packages()
        return [_program("node"), str(HERE / file), str(place.port)]

    return command


def _ours(place: Place) -> Sequence[str]:
    # No line in the log for each call, as none of the others writes one.
    options = [f"--port={place.port}", f"--ca-certs={place.ca_file}", "--log-level=warning"]
    if not place.isolated:
        options.append(f"--connect-to=127.0.0.1:{place.upstream_port}")
    return [sys.executable, "-m", "tornado_fal_proxy", *options]


def _floor(place: Place) -> Sequence[str]:
    return [sys.executable, str(HERE / "floor.py"), str(place.port)]


def _tornado_curl(place: Place) -> Sequence[str]:
    return [*_python("tornado_curl.py")(place), str(place.calls)]


def _flask(place: Place) -> Sequence[str]:
    _needs("flask", "requests", "gunicorn")
    limits = [f"--threads={place.calls}", f"--worker-connections={place.calls * 2}", "--timeout=900"]
    bind = f"--bind=127.0.0.1:{place.port}"
    app = "benchmarks.peers.flask_requests:app"
    return [_program("gunicorn"), "--workers=1", "--worker-class=gthread", *limits, bind, "--log-level=error", app]


def _next(place: Place) -> Sequence[str]:
    _needs_packages()
    node = _program("node")
    app = HERE / "next"
    if not (app / ".next" / "BUILD_ID").exists():
        build = [node, str(NEXT), "build", str(app)]
        done = subprocess.run(build, check=False, capture_output=True, text=True, timeout=NEXT_BUILD_TIMEOUT_S)
        if done.returncode:
            raise CannotStart(f"next build failed: {done.stderr[-1000:]}")
    return [node, str(NEXT), "start", str(app), f"--port={place.port}", "--hostname=127.0.0.1"]


def _nginx(place: Place) -> Sequence[str]:
    values = {
        "FILES": "40000",
        "DIRECTORY": place.directory,
        "UPSTREAM_PORT": place.upstream_port,
        "PORT": place.port,
        "CA_FILE": place.ca_file,
        "FAL_KEY": KEY,
    }
    text = (HERE / "nginx.conf").read_text()
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", str(value))
    (place.directory / "nginx.conf").write_text(text)
    return [_program("nginx"), "-c", str(place.directory / "nginx.conf"), "-p", str(place.directory)]


OURS = Peer("ours", "tornado_fal_proxy", _ours, isolated=False, files_per_call=1)


def ours_in(processes: int) -> Peer:
    """This proxy in so many processes, on all CPUs."""
    return replace(OURS, command=lambda place: [*_ours(place), f"--processes={processes}"], everywhere=True)


def ours_with(*options: str) -> Peer:
    """This proxy with more options, which win over those that it has here."""
    return replace(OURS, command=lambda place: [*_ours(place), *options])


FLOOR = Peer("floor", "Tornado, relays nothing", _floor, relays=False, isolated=False, files_per_call=1)
NGINX = Peer("nginx", "nginx proxy_pass", _nginx, isolated=False)

PEERS = (
    OURS,
    FLOOR,
    Peer("tornado-curl", "Tornado + curl client as it comes", _tornado_curl),
    Peer("aiohttp", "aiohttp by hand", _python("aiohttp_relay.py", "aiohttp")),
    Peer("fastapi", "FastAPI + httpx", _python("fastapi_httpx.py", "fastapi", "httpx", "uvicorn")),
    Peer("flask", "Flask + requests, gunicorn threads", _flask, most_held=1000),
    Peer("express", "@fal-ai/server-proxy, Express", _node("express.mjs")),
    Peer("hono", "@fal-ai/server-proxy, Hono", _node("hono.mjs")),
    Peer("next", "@fal-ai/server-proxy, Next.js", _next),
    NGINX,
)
