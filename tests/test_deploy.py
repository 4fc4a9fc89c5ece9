"""deploy/: what the files say of the proxy is so, and what they start works as they start it.

nginx has tests/test_nginx.py, Prometheus and Grafana have tests/test_observability.py. Neither Docker nor Kubernetes
runs here: their files are validated, and what they start is started by hand, by their own words with the paths
replaced.
"""

import asyncio
import os
import re
import shlex
import shutil
import socket
import stat
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatch
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml
from caller import call
from conftest import KEY, Setup, tool
from load import answer
from running import TIMEOUT_S, Running, eventually
from upstream import Upstream

from tornado_fal_proxy.callers import UNIX
from tornado_fal_proxy.config import DEFAULT_HOLD_BYTES, DEFAULT_IDLE_TIMEOUT_S, DEFAULT_MAX_BODY_BYTES, DEFAULT_ROUTE
from tornado_fal_proxy.options import DEFAULT_ADDRESS, DEFAULT_DRAIN_TIMEOUT_S, DEFAULT_PORT, parse_settings
from tornado_fal_proxy.server import CLOSE_GRACE_S, LISTEN_BACKLOG, reserve
from tornado_fal_proxy.service import EXIT_CUT, EXIT_USAGE, OWN_FILES, STREAMS_PER_CONNECTION
from tornado_fal_proxy.workers import KILL_AFTER_S

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
NGINX = DEPLOY / "nginx/tornado-fal-proxy.conf"
UNIT, SOCKET = (DEPLOY / f"systemd/tornado-fal-proxy.{kind}" for kind in ("service", "socket"))
DOCKERFILE, COMPOSE = DEPLOY / "docker/Dockerfile", DEPLOY / "docker/compose.yaml"
KUBERNETES = DEPLOY / "kubernetes/tornado-fal-proxy.yaml"
PROMETHEUS, GRAFANA = DEPLOY / "prometheus/prometheus.yaml", DEPLOY / "grafana/dashboard.json"

INSTALLED = "/opt/tornado-fal-proxy"
# Where the files here put the metrics.
ADMIN_PORT = 9464
# From a signal to the end of the process, with default options: what whoever stops it must wait.
LONGEST_END_S = DEFAULT_DRAIN_TIMEOUT_S + 2 * CLOSE_GRACE_S + KILL_AFTER_S
# As "systemd-analyze security" counts, in tenths: below 2.0.
MOST_EXPOSURE = 19
# A release that is still served by clouds, and the newest whose schemas are there.
KUBERNETES_VERSIONS = ("1.29", "1.34")


def run(*command: str | Path, **more: Any) -> str:
    """What a command that must succeed says."""
    ended = subprocess.run(command, capture_output=True, text=True, check=False, **more)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return str(ended.stdout)


def test_all_files_are_known() -> None:
    """No file goes untested."""
    known = {NGINX, NGINX.with_name("auth-request.conf"), UNIT, SOCKET, DOCKERFILE, COMPOSE, KUBERNETES}
    known |= {PROMETHEUS, PROMETHEUS.with_name("alerts.yaml"), PROMETHEUS.with_name("alerts_test.yaml"), GRAFANA}
    assert {file for file in DEPLOY.rglob("*") if file.is_file() and file.name != "fal_key"} == known


def test_the_admin_port_is_one() -> None:
    """Prometheus looks where the files here put it."""
    (scrape,) = yaml.safe_load(PROMETHEUS.read_text())["scrape_configs"]
    assert scrape["static_configs"] == [{"targets": [f"{DEFAULT_ADDRESS}:{ADMIN_PORT}"]}]
    for file in (UNIT, COMPOSE):
        assert f"http://{DEFAULT_ADDRESS}:{ADMIN_PORT}/metrics" in file.read_text()


def test_nginx_agrees() -> None:
    """Route, port and bounds are the proxy's defaults, and its time limits lie behind the proxy's."""
    text = NGINX.read_text()

    def values(pattern: str) -> list[str]:
        return re.findall(rf"^ *{pattern};", text, re.MULTILINE)

    assert values(r"server ([\d.:]+)") == [f"{DEFAULT_ADDRESS}:{DEFAULT_PORT}"]
    assert f"location = {DEFAULT_ROUTE} {{" in text
    assert values(r"client_max_body_size (\d+)m") == [str(DEFAULT_MAX_BODY_BYTES // 2**20)]
    assert values(r"proxy_max_temp_file_size (\d+)m") == [str(DEFAULT_HOLD_BYTES // 2**20)]
    for name in ("proxy_read_timeout", "send_timeout"):
        (seconds,) = values(rf"{name} (\d+)s")
        assert int(seconds) > DEFAULT_IDLE_TIMEOUT_S


# systemd.


def settings_of(unit: Path) -> dict[str, list[str]]:
    """All that a unit sets, with the section's name before each."""
    settings: dict[str, list[str]] = {}
    section = ""
    for line in unit.read_text().splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            name, _, value = line.partition("=")
            settings.setdefault(f"{section}.{name}", []).append(value)
    return settings


def environment_of(service: dict[str, list[str]]) -> dict[str, str]:
    return dict(text.split("=", 1) for text in service["Service.Environment"])


def test_units_agree() -> None:
    """Address, backlog, exit codes, time and files to open are what the proxy has and takes by default."""
    listens, service = settings_of(SOCKET), settings_of(UNIT)
    assert listens["Socket.ListenStream"] == [f"{DEFAULT_ADDRESS}:{DEFAULT_PORT}"]
    assert listens["Socket.Backlog"] == [str(LISTEN_BACKLOG)]
    assert service["Unit.Requires"] == [SOCKET.name]
    assert service["Service.Type"] == ["notify"]
    assert service["Service.SuccessExitStatus"] == [str(EXIT_CUT)]
    assert service["Service.RestartPreventExitStatus"] == [str(EXIT_USAGE)]
    assert float(service["Service.TimeoutStopSec"][0]) > LONGEST_END_S
    program, *argv = shlex.split(service["Service.ExecStart"][0])
    assert program.startswith(INSTALLED)
    settings = parse_settings(argv, {"FAL_KEY": KEY} | environment_of(service))
    assert (settings.admin_address, settings.admin_port) == (DEFAULT_ADDRESS, ADMIN_PORT)
    assert settings.trusted_proxies.texts == (DEFAULT_ADDRESS, UNIX)
    config = settings.config
    assert config is not None
    files = int(service["Service.LimitNOFILE"][0])
    calls = config.max_in_flight
    assert files > OWN_FILES + reserve(files) + calls + calls // STREAMS_PER_CONNECTION


def test_units_are_right(tmp_path: Path) -> None:
    """systemd finds nothing to say about them."""
    program = tool("systemd-analyze")
    for unit in (UNIT, SOCKET):
        text = unit.read_text().replace(f"{INSTALLED}/bin/tornado-fal-proxy", sys.executable)
        (tmp_path / unit.name).write_text(text)
    ended = subprocess.run(
        [program, "verify", *sorted(tmp_path.iterdir())], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_exposure() -> None:
    """By systemd's own count the service is exposed to less than 2.0 of 10."""
    run(tool("systemd-analyze"), "security", "--offline=true", "--no-pager", f"--threshold={MOST_EXPOSURE}", UNIT)


def allowed_system_calls(filters: list[str]) -> set[str]:
    """What SystemCallFilter lets through, by the groups that systemd knows."""
    groups: dict[str, list[str]] = {}
    for line in run(tool("systemd-analyze"), "syscall-filter", "--no-pager").splitlines():
        if line.startswith("@"):
            group = groups.setdefault(line.split()[0], [])
        elif line.startswith("    ") and not line.strip().startswith("#"):
            group.append(line.strip())

    def members(name: str) -> set[str]:
        return {name} if name not in groups else set().union(*map(members, groups[name]))

    allowed = members("@default")
    for item in filters:
        allowed = allowed - members(item[1:]) if item.startswith("~") else allowed | members(item)
    return allowed


@pytest.mark.gen_test
async def test_the_service_as_the_unit_starts_it(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It serves with the key of the credential, which shows nowhere, and does nothing that the unit forbids."""
    service = settings_of(UNIT)
    (credential,) = service["Service.LoadCredential"]
    (tmp_path / credential.partition(":")[0]).write_text(KEY + "\n")
    environ = {name: text.replace("%d", str(tmp_path)) for name, text in environment_of(service).items()}
    assert environ["FAL_KEY_FILE"] == str(tmp_path / "fal_key")
    private = tmp_path / "private"
    private.mkdir()
    environ |= {"FAL_PROXY_ADMIN_PORT": "0", "TMPDIR": str(private)}
    command = shlex.split(service["Service.ExecStart"][0].replace(f"{INSTALLED}/bin", str(Path(sys.executable).parent)))
    trace = tmp_path / "trace"
    # -D: the process that is started is the service.
    monkeypatch.setattr("running.COMMAND", [tool("strace"), "-D", "-f", "-q", "-o", str(trace), *command])
    upstream = await setup.upstream(answer)
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    with manager, socket.create_server(("127.0.0.1", 0)) as listener:
        manager.bind(environ.setdefault("NOTIFY_SOCKET", str(tmp_path / "notify")))
        running = await start(setup, upstream, listener=listener, PYTHONDONTWRITEBYTECODE="1", **environ)
        assert manager.recv(100) == b"READY=1"
        got = await call(running.port, target="https://fal.run/short")
        assert got.status == 200
        assert upstream.exchanges[0].header("authorization") == f"Key {KEY}".encode()
        await has_counted(running)
        for pid in (running.pid, *running.workers()):
            for shows in ("cmdline", "environ"):
                assert KEY.encode() not in Path(f"/proc/{pid}/{shows}").read_bytes()
        said = await running.end()
    assert KEY not in running.line + "".join(said)

    # The numbers of processes stand in a column, with spaces behind those that are short.
    await eventually(
        lambda: re.search(rf"^{running.pid} +\+\+\+ exited with 0 \+\+\+", trace.read_text(), re.MULTILINE)
    )
    traced = trace.read_text()
    calls = set(re.findall(r"^\d+ +(\w+)\(", traced, re.MULTILINE))
    assert calls <= allowed_system_calls(" ".join(service["Service.SystemCallFilter"]).replace("=~", "=").split())
    families = set(re.findall(r" socket\((\w+)", traced))
    assert {"AF_INET", "AF_UNIX"} <= families <= set(service["Service.RestrictAddressFamilies"][0].split())
    assert service["Service.MemoryDenyWriteExecute"] == ["yes"]
    assert not re.findall(r" mmap\(.*PROT_WRITE\|PROT_EXEC.*| mprotect\(.*PROT_EXEC.*", traced)
    assert (service["Service.ProtectSystem"], service["Service.PrivateTmp"]) == (["strict"], ["yes"])
    written = re.findall(r' open(?:at)?\([^"]*"([^"]*)".*(?:O_WRONLY|O_RDWR|O_CREAT)', traced)
    assert [path for path in written if not path.startswith(f"{private}/")] == []
    assert written
    assert not list(private.iterdir())


async def has_counted(running: Running) -> None:
    """Until /metrics has the call: that is counted when its answer has left. Once, for the port is told once."""
    port = await running.admin_port()
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            answer = await call(port, "GET", target=None, path="/metrics")
            assert answer.status == 200
            if b"fal_proxy_calls_total{" in answer.body:
                return
            await asyncio.sleep(0.02)


async def start(setup: Setup, upstream: Upstream, *argv: str, **more: Any) -> Running:
    """The command with that upstream in fal's place, and no key."""
    config = setup.config(upstream)
    return await Running.start(
        *argv, FAL_PROXY_CA_CERTS=str(config.ca_certs), FAL_PROXY_CONNECT_TO=str(config.connect_to), **more
    )


# Docker.


def instructions() -> list[tuple[str, str]]:
    """The lines of the Dockerfile: what is to be done, and with what."""
    lines = re.sub(r"\\\n *", "", DOCKERFILE.read_text()).splitlines()
    pairs = [line.split(" ", 1) for line in lines if line and not line.startswith("#")]
    return [(name, rest) for name, rest in pairs]


def the(name: str) -> str:
    """The one instruction of that name."""
    (found,) = (rest for known, rest in instructions() if known == name)
    return found


def argv(text: str) -> list[str]:
    """A command in exec form: one in shell form would put a shell between the engine's signals and the proxy."""
    found = yaml.safe_load(text)
    assert isinstance(found, list)
    return found


def compose() -> dict[str, Any]:
    found = yaml.safe_load(COMPOSE.read_text())
    assert isinstance(found, dict)
    return found


def test_dockerfile_is_right() -> None:
    """A linter finds nothing to say about it."""
    assert run(tool("hadolint"), DOCKERFILE) == ""


def test_dockerfile_agrees() -> None:
    """It has a Python that the suite runs on, the proxy's port, no root, and no key."""
    (image,) = {rest.split()[0] for name, rest in instructions() if name == "FROM"}
    assert f"NEWEST_PYTHON={image.removeprefix('python:').removesuffix('-slim')}\n" in (ROOT / ".ci/run").read_text()
    assert the("EXPOSE") == str(DEFAULT_PORT)
    assert the("ENV").split("=")[0] == "FAL_PROXY_ADDRESS"
    assert int(the("USER").split(":")[0]) > 0
    assert the("STOPSIGNAL") == "SIGTERM"
    assert [name for name, _ in instructions()][-1] == "ENTRYPOINT"
    assert not [rest for name, rest in instructions() if name in ("ENV", "ARG") and "KEY" in rest]


def test_dockerignore() -> None:
    """The engine is sent what the Dockerfile copies, and neither git's files nor a key beside them."""
    rules = (ROOT / ".dockerignore").read_text().split()
    assert rules[0] == "*"
    sent = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = [rest.split()[:-1] for name, rest in instructions() if name == "COPY" and not rest.startswith("--from")]
    assert {source for sources in copied for source in sources} == sent
    assert all((ROOT / name).exists() for name in sent)


@pytest.fixture(scope="module")
def image() -> Iterator[Path]:
    """What the first stage of the Dockerfile makes, below a directory that all may read."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        os.chmod(root, 0o755)
        workdir = root / the("WORKDIR").strip("/")
        workdir.mkdir()
        (root / "bin").mkdir()
        # A script, because a Python that is called by a link of its own may not find its library.
        python = root / "bin/python"
        python.write_text(f'#!/bin/sh\nexec {shlex.quote(str(Path(sys.executable).resolve()))} "$@"\n')
        python.chmod(0o755)
        for name, rest in instructions():
            if name == "COPY" and not rest.startswith("--from"):
                for source in rest.split()[:-1]:
                    copy(ROOT / source, workdir / source)
        borrowed = sysconfig.get_path("purelib")
        environ = {"PATH": f"{root}/bin:{os.environ['PATH']}", "PYTHONPATH": borrowed, "HOME": directory}
        # What it requires is here already, and what builds it.
        environ |= {"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_WARN_SCRIPT": "1"}
        run("sh", "-ec", the("RUN").replace(INSTALLED, f"{root}{INSTALLED}"), cwd=workdir, env=environ)
        (site,) = (root / INSTALLED[1:]).glob("lib/python*/site-packages")
        (site / "borrowed.pth").write_text(borrowed + "\n")
        yield root


def copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)


def as_user(user: str) -> list[str]:
    """A command to run another as that user, without rights but to read where the tests' Python is."""
    if os.geteuid() != 0:
        return []
    uid, _, gid = user.partition(":")
    capability = "-all,+dac_read_search"
    return [
        *(tool("setpriv"), f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--no-new-privs"),
        *(f"--bounding-set={capability}", f"--inh-caps={capability}", "--ambient-caps=+dac_read_search"),
    ]


@pytest.mark.gen_test
async def test_container(setup: Setup, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the Dockerfile installs serves as it says, for a user without rights; its health check tells; it drains."""
    service = compose()["services"]["proxy"]
    secret, temporary = image / "secret", image / "tmp"
    secret.write_text(KEY)
    temporary.mkdir()
    temporary.chmod(0o1777)
    assert service["environment"]["FAL_KEY_FILE"] == "/run/secrets/" + service["secrets"][0]
    inside = [part.replace(INSTALLED, f"{image}{INSTALLED}") for part in argv(the("ENTRYPOINT"))]
    monkeypatch.setattr("running.COMMAND", [*as_user(the("USER")), *inside])
    name, address = the("ENV").split("=")
    upstream = await setup.upstream(answer)
    environ = service["environment"] | {name: address, "FAL_KEY_FILE": str(secret), "HOME": "/nonexistent"}
    environ |= {"FAL_PROXY_ADMIN_PORT": "0", "TMPDIR": str(temporary)}
    running = await start(setup, upstream, *service["command"], cwd=image, **environ)
    if os.geteuid() == 0:
        assert Path(f"/proc/{running.pid}").stat().st_uid == int(the("USER").split(":")[0])
    (where,) = {os.readlink(f"/proc/{pid}/exe") for pid in (running.pid, *running.workers())}
    assert fnmatch(Path(where).name, "python3*")
    assert (await call(running.port, target="https://fal.run/short")).status == 200
    await has_counted(running)
    assert await healthy(image, running.port)
    await running.end()
    assert not await healthy(image, running.port)


async def healthy(image: Path, port: int) -> bool:
    """What the health check of the Dockerfile says of the proxy on that port."""
    options, _, command = the("HEALTHCHECK").partition("CMD ")
    (seconds,) = re.findall(r"--timeout=(\d+)s", options)
    text = command.replace(INSTALLED, f"{image}{INSTALLED}")
    assert str(DEFAULT_PORT) in text
    process = await asyncio.create_subprocess_exec(
        *argv(text.replace(str(DEFAULT_PORT), str(port))), stderr=subprocess.DEVNULL
    )
    async with asyncio.timeout(float(seconds)):
        return await process.wait() == 0


def test_compose_is_right() -> None:
    """It is what the specification of compose files describes."""
    run(tool("check-jsonschema"), "--builtin-schema=vendor.compose-spec", COMPOSE)


def test_compose_agrees() -> None:
    """Files that it names are there, both services may take the time of a drain, and neither may more than it needs."""
    content = compose()
    proxy, nginx = content["services"]["proxy"], content["services"]["nginx"]
    assert (COMPOSE.parent / proxy["build"]["context"]).resolve() == ROOT
    assert ROOT / proxy["build"]["dockerfile"] == DOCKERFILE
    conf, certificate = (volume.split(":")[0] for volume in nginx["volumes"])
    assert (COMPOSE.parent / conf).resolve() == NGINX
    assert f"ssl_certificate {certificate}/" in NGINX.read_text()
    for service in (proxy, nginx):
        assert float(service["stop_grace_period"].removesuffix("s")) > LONGEST_END_S
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
    # Both are on one loopback, where the file of nginx looks for the proxy; only nginx's port is published.
    assert (nginx["network_mode"], proxy["environment"]["FAL_PROXY_ADDRESS"]) == ("service:proxy", DEFAULT_ADDRESS)
    assert proxy["ports"] == ["443:443"]
    settings = parse_settings(proxy["command"], proxy["environment"] | {"FAL_KEY": KEY})
    assert (settings.admin_address, settings.admin_port) == (DEFAULT_ADDRESS, ADMIN_PORT)
    assert settings.trusted_proxies.texts == (DEFAULT_ADDRESS,)
    assert proxy["tmpfs"] == ["/tmp"]
    assert content["secrets"].keys() == set(proxy["secrets"])


# Kubernetes.


@pytest.fixture
def kubernetes() -> dict[str, Any]:
    """The objects, by kind."""
    return {found["kind"]: found for found in yaml.safe_load_all(KUBERNETES.read_text())}


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_kubernetes_is_right(version: str) -> None:
    """Each object is what the schemas of Kubernetes describe, and has no field that they do not."""
    run(tool("kubernetes-validate"), "--strict", "--quiet", f"--kubernetes-version={version}", KUBERNETES)


def test_kubernetes_agrees(kubernetes: dict[str, Any]) -> None:
    """All objects mean the same pods; ports, paths, options and times are the proxy's."""
    pod = kubernetes["Deployment"]["spec"]["template"]
    (labels,) = {
        str(labels)
        for labels in (
            pod["metadata"]["labels"],
            kubernetes["Deployment"]["spec"]["selector"]["matchLabels"],
            pod["spec"]["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"],
            kubernetes["Service"]["spec"]["selector"],
            kubernetes["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
            kubernetes["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
        )
    }
    assert "tornado-fal-proxy" in labels
    scaled = kubernetes["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (scaled["kind"], scaled["name"]) == ("Deployment", kubernetes["Deployment"]["metadata"]["name"])

    (container,) = pod["spec"]["containers"]
    settings = parse_settings(container["args"], {"FAL_KEY": KEY})
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": settings.port, "admin": settings.admin_port}
    assert (settings.address, settings.admin_address, settings.admin_port) == ("0.0.0.0", "0.0.0.0", ADMIN_PORT)
    (served,) = kubernetes["Service"]["spec"]["ports"]
    assert served["targetPort"] == "http"
    (callers, callers_ports), (watchers, watchers_ports) = (
        (rule["from"], rule["ports"]) for rule in kubernetes["NetworkPolicy"]["spec"]["ingress"]
    )
    assert callers != watchers
    assert (callers_ports, watchers_ports) == ([{"port": "http"}], [{"port": "admin"}])
    probes = {name: container[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert {probe["port"] for probe in probes.values()} == {"admin"}
    assert [probe["path"] for probe in probes.values()] == ["/healthz", "/readyz", "/healthz"]
    # Its file system is read-only, and several processes would write to count together.
    assert settings.processes == 1
    (trusted,) = settings.trusted_proxies.texts
    assert ip_network(trusted).prefixlen >= 16
    _, waits = container["lifecycle"]["preStop"]["exec"]["command"]
    end = LONGEST_END_S - DEFAULT_DRAIN_TIMEOUT_S + settings.drain_timeout_s
    assert pod["spec"]["terminationGracePeriodSeconds"] > float(waits) + end

    (variable,) = container["env"]
    (mount,), (volume,) = container["volumeMounts"], pod["spec"]["volumes"]
    assert (variable["name"], variable["value"]) == ("FAL_KEY_FILE", f"{mount['mountPath']}/key")
    assert (mount["name"], volume["secret"]["secretName"]) == (volume["name"], "tornado-fal-proxy")
    assert not volume["secret"]["defaultMode"] & stat.S_IRWXO
    assert "--from-file=key=" in KUBERNETES.read_text()


@pytest.mark.gen_test
async def test_probes(setup: Setup, kubernetes: dict[str, Any]) -> None:
    """A pod that was told to end is alive and not ready while its last calls are answered."""
    (container,) = kubernetes["Deployment"]["spec"]["template"]["spec"]["containers"]
    arguments = [re.sub(r"port=\d+$", "port=0", argument) for argument in container["args"]]
    upstream = await setup.upstream(answer)
    running = await start(setup, upstream, *arguments, FAL_KEY=KEY)
    admin = await running.admin_port()

    async def statuses() -> list[int]:
        paths = [container[probe]["httpGet"]["path"] for probe in ("livenessProbe", "readinessProbe")]
        return [(await call(admin, "GET", target=None, path=path)).status for path in paths]

    assert await statuses() == [200, 200]
    last = asyncio.create_task(call(running.port, target="https://fal.run/poll"))
    await eventually(lambda: upstream.exchanges)
    running.process.terminate()
    await running.said("ending: 1 calls in flight")
    assert await statuses() == [200, 503]
    assert (await last).status == 200
    await running.ended()


def test_pods_have_no_rights(kubernetes: dict[str, Any]) -> None:
    """What the "restricted" pod security standard asks, a file system to read, and no token of the cluster's."""
    pod = kubernetes["Deployment"]["spec"]["template"]["spec"]
    assert (pod["automountServiceAccountToken"], pod["enableServiceLinks"]) == (False, False)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert str(pod["securityContext"]["runAsUser"]) == the("USER").split(":")[0]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["containers"][0]["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
