"""The files of deploy/, and the processes that they start."""

import asyncio
import re
import subprocess
from pathlib import Path
from typing import Any

from tests.support.proxy import Setup
from tests.support.raw_client import call
from tests.support.scripted_upstream import Upstream
from tests.support.service_process import ServiceProcess
from tests.support.tools import ROOT
from tests.support.waiting import TIMEOUT_S
from tornado_fal_proxy.service.server import CLOSE_GRACE_S
from tornado_fal_proxy.service.settings import DEFAULT_DRAIN_TIMEOUT_S
from tornado_fal_proxy.service.supervisor import KILL_AFTER_S

DEPLOY = ROOT / "deploy"
NGINX = DEPLOY / "nginx/tornado-fal-proxy.conf"
UNIT, SOCKET = (DEPLOY / f"systemd/tornado-fal-proxy.{kind}" for kind in ("service", "socket"))
DOCKERFILE, COMPOSE = DEPLOY / "docker/Dockerfile", DEPLOY / "docker/compose.yaml"
KUBERNETES = DEPLOY / "kubernetes/tornado-fal-proxy.yaml"
INGRESS, KUSTOMIZATION, VALUES = (
    KUBERNETES.with_name(f"{name}.yaml") for name in ("ingress", "kustomization", "values")
)
PROMETHEUS, GRAFANA = DEPLOY / "prometheus/prometheus.yaml", DEPLOY / "grafana/dashboard.json"

INSTALLED = "/opt/tornado-fal-proxy"
# The port of the metrics in these files.
ADMIN_PORT = 9464
# Limits the time from a signal to the end of the process with default options: a supervisor must wait as long.
LONGEST_END_S = DEFAULT_DRAIN_TIMEOUT_S + 2 * CLOSE_GRACE_S + KILL_AFTER_S


def run(*command: str | Path, **more: Any) -> str:
    """Return the output of a command that must succeed."""
    ended = subprocess.run(command, capture_output=True, text=True, check=False, **more)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return str(ended.stdout)


def instructions(target: str = "") -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions for that stage, or for the last, each as its name and its arguments."""
    lines = re.sub(r"\\\n *", "", DOCKERFILE.read_text()).splitlines()
    stages: dict[str, list[tuple[str, str]]] = {}
    for line in lines:
        name, _, rest = line.partition(" ")
        if name == "FROM":
            stage = stages.setdefault(rest.partition(" AS ")[2], [])
        if name.isupper() and name != "ARG":
            stage.append((name, rest))
    first, *_ = stages[target]
    needed = {first[1].split(" ")[0], *re.findall(r"--from=(\S+)", str(stages[target]))} & stages.keys()
    return [line for stage_name in stages if stage_name in needed for line in instructions(stage_name)] + stages[target]


def the(name: str) -> str:
    """Return the arguments of the only instruction of that name."""
    (found,) = (rest for known, rest in instructions() if known == name)
    return found


async def has_counted(running: ServiceProcess) -> None:
    """Wait until /metrics has a call, which is counted when its response has left. The service prints its port once."""
    port = await running.admin_port()
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            response = await call(port, "GET", target=None, path="/metrics")
            assert response.status == 200
            if b"fal_proxy_calls_total{" in response.body:
                return
            await asyncio.sleep(0.02)


async def start(setup: Setup, upstream: Upstream, *argv: str, **more: Any) -> ServiceProcess:
    """Start the command with that upstream in fal's place, and no key."""
    config = setup.config(upstream)
    return await ServiceProcess.start(
        *argv, FAL_PROXY_CA_CERTS=str(config.ca_certs), FAL_PROXY_CONNECT_TO=str(config.connect_to), **more
    )
