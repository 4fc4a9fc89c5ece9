"""deploy/docker: the files are valid, agree with the proxy, and start a proxy that works.

Docker does not run here. The files are validated, and their commands are run without it, with the paths replaced.
"""

import asyncio
import configparser
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.deploy_files import (
    ADMIN_PORT,
    COMPOSE,
    DOCKERFILE,
    INSTALLED,
    LONGEST_END_S,
    NGINX,
    has_counted,
    instructions,
    run,
    start,
    the,
)
from tests.support.load import respond
from tests.support.proxy import KEY, Setup
from tests.support.raw_client import call
from tests.support.tools import ROOT, tool
from tornado_fal_proxy.service.options import parse_settings
from tornado_fal_proxy.service.settings import DEFAULT_ADDRESS, DEFAULT_PORT


def argv(text: str) -> list[str]:
    """Return a command in exec form: one in shell form would put a shell between the engine's signals and the proxy."""
    found = yaml.safe_load(text)
    assert isinstance(found, list)
    return found


def image_environment() -> dict[str, str]:
    """Return the variables that the image sets."""
    return dict(pair.split("=") for name, rest in instructions() if name == "ENV" for pair in rest.split())


def compose() -> dict[str, Any]:
    found = yaml.safe_load(COMPOSE.read_text())
    assert isinstance(found, dict)
    return found


def test_dockerfile_is_right() -> None:
    """A linter finds no fault in it."""
    assert run(tool("hadolint"), DOCKERFILE) == ""


def test_dockerfile_agrees() -> None:
    """It has a Python that the suite runs on, the proxy's port, no root, and no key."""
    (python,) = re.findall(r"^ARG PYTHON=python:(3\.\d+)\.\d+-slim-\w+$", DOCKERFILE.read_text(), re.MULTILINE)
    assert f"NEWEST_PYTHON={python}\n" in (ROOT / ".ci/run").read_text()
    assert {rest.split()[0] for name, rest in instructions() if name == "FROM"} == {"${PYTHON}", "base"}
    assert the("EXPOSE") == str(DEFAULT_PORT)
    assert list(image_environment()) == ["FAL_PROXY_ADDRESS", "FAL_PROXY_WITHHOLD_HEADERS", "STATE_DIRECTORY"]
    # The user may write to the volume, because it starts as a copy of a directory of theirs.
    assert the("VOLUME") == image_environment()["STATE_DIRECTORY"]
    assert f"COPY --from=build --chown={the('USER')} /src/state {the('VOLUME')}\n" in DOCKERFILE.read_text()
    assert int(the("USER").split(":")[0]) > 0
    assert the("STOPSIGNAL") == "SIGTERM"
    assert f"[{','.join(LOCKED[''])}]" in DOCKERFILE.read_text()
    assert [name for name, _ in instructions()][-1] == "ENTRYPOINT"
    assert not re.findall(r"^(?:ENV|ARG|    ).*KEY.*", DOCKERFILE.read_text(), re.MULTILINE)


def test_sandbox_image() -> None:
    """It is the same proxy with the sandbox's packages, and its command is one that runs."""
    (command,) = [argv(rest) for name, rest in instructions("sandbox") if name == "ENTRYPOINT"]
    assert command == [*argv(the("ENTRYPOINT")), "--sandbox"]
    variables = {pair for name, rest in instructions("sandbox") if name == "ENV" for pair in rest.split()}
    settings = parse_settings(command[1:], dict(pair.split("=") for pair in variables))
    assert (settings.sandbox, settings.address, settings.port) == (True, "0.0.0.0", DEFAULT_PORT)
    installed = [rest for name, rest in instructions("sandbox") if name == "RUN"]
    assert installed[:-1] == [rest for name, rest in instructions() if name == "RUN"]
    assert installed[-1].endswith("--require-hashes -r requirements-sandbox.txt")


# The extras of each file of requirements.
LOCKED = {"": ["br", "metrics", "redis"], "-sandbox": ["br", "metrics", "redis", "sandbox"]}


@pytest.mark.parametrize("suffix", LOCKED)
def test_requirements(suffix: str) -> None:
    """Each package that setup.cfg names is pinned to a version that setup.cfg allows, and everything has a hash."""
    text = DOCKERFILE.with_name(f"requirements{suffix}.txt").read_text()
    pins = dict(re.findall(r"^([\w-]+)==(\S+) \\\n    --hash=sha256:[0-9a-f]{64}", text, re.MULTILINE))
    assert len(pins) == len(re.findall(r"^[^ #]", text, re.MULTILINE))
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    wanted = setup["options"]["install_requires"]
    wanted += "".join(setup["options.extras_require"][extra] for extra in LOCKED[suffix])
    for requirement in map(Requirement, wanted.split()):
        version = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement}: scripts/lock takes another than {version}"


def test_dockerignore() -> None:
    """The engine gets the files that the Dockerfile copies, and neither git's files nor a key beside them."""
    rules = (ROOT / ".dockerignore").read_text().split()
    assert rules[0] == "*"
    sent = [rule[1:] for rule in rules if rule.startswith("!")]
    copied = {source for _, sources in copies() for source in sources}
    assert {rule for rule in sent if any(fnmatch(source, rule) for source in copied)} == set(sent)
    assert all(any(fnmatch(source, rule) for rule in sent) for source in copied)
    assert all((ROOT / source).exists() for source in copied)


def copies() -> Iterator[tuple[str, list[str]]]:
    """Yield where the Dockerfile copies files of the project to, and which."""
    for name, rest in instructions():
        if name == "COPY" and not rest.startswith("--from"):
            *sources, target = rest.split()
            yield target, sources


@pytest.fixture(scope="module")
def image() -> Iterator[Path]:
    """Yield the result of the Dockerfile's first stage, below a directory that all may read.

    The packages with hashes are left out, because those of the tests' Python are used.
    """
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
        (root / "bin/pip").write_text(f'#!/bin/sh\nexec {python} -m pip "$@"\n')
        (root / "bin/pip").chmod(0o755)
        (root / "opt").mkdir()
        for target, sources in copies():
            for source in sources:
                name = Path(source).name if target == "./" else target
                copy(ROOT / source, root / name[1:] if name.startswith("/") else workdir / name)
        borrowed = sysconfig.get_path("purelib")
        environ = {"PATH": f"{root}/bin:{os.environ['PATH']}", "PYTHONPATH": borrowed, "HOME": directory}
        requirements, project = (rest for name, rest in instructions() if name == "RUN")
        environment, *installed = requirements.split(" && ")
        assert all("pip install --no-cache-dir --require-hashes -r requirements" in command for command in installed)
        for command in (environment, project):
            run("sh", "-ec", command.replace(INSTALLED, f"{root}{INSTALLED}"), cwd=workdir, env=environ)
        (site,) = (root / INSTALLED[1:]).glob("lib/python*/site-packages")
        (site / "borrowed.pth").write_text(borrowed + "\n")
        yield root


def copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)


def as_user(user: str) -> list[str]:
    """Return a command that runs another as that user, with no right except to read the tests' Python."""
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
    """The installed proxy serves as a user without rights, its health check works, and it drains."""
    service = compose()["services"]["proxy"]
    secret, temporary = image / "secret", image / "tmp"
    secret.write_text(KEY)
    temporary.mkdir()
    temporary.chmod(0o1777)
    assert service["environment"]["FAL_KEY_FILE"] == "/run/secrets/" + service["secrets"][0]
    inside = [part.replace(INSTALLED, f"{image}{INSTALLED}") for part in argv(the("ENTRYPOINT"))]
    monkeypatch.setattr("tests.support.service_process.COMMAND", [*as_user(the("USER")), *inside])
    state = image / the("WORKDIR").strip("/") / "state"
    if os.geteuid() == 0:
        os.chown(state, *map(int, the("USER").split(":")))
    upstream = await setup.upstream(respond)
    given = {name: text for name, text in service["environment"].items() if not text.startswith("$")}
    environ = image_environment() | given | {"FAL_KEY_FILE": str(secret), "HOME": "/nonexistent"}
    environ |= {"STATE_DIRECTORY": str(state), "FAL_PROXY_JOBS_PER_USER": "1/day"}
    environ |= {"FAL_PROXY_ADMIN_PORT": "0", "TMPDIR": str(temporary), "PYTHONPATH": ""}
    running = await start(setup, upstream, *service["command"], cwd=image, **environ)
    if os.geteuid() == 0:
        assert Path(f"/proc/{running.pid}").stat().st_uid == int(the("USER").split(":")[0])
    (where,) = {os.readlink(f"/proc/{pid}/exe") for pid in (running.pid, *running.workers())}
    assert fnmatch(Path(where).name, "python3*")
    statuses = [(await call(running.port, target="https://fal.run/short")).status for _ in range(2)]
    assert statuses == [200, 402]
    assert (state / "spending.sqlite").stat().st_uid == (state.stat().st_uid)
    await has_counted(running)
    assert await healthy(image, running.port)
    await running.end()
    assert not await healthy(image, running.port)


async def healthy(image: Path, port: int) -> bool:
    """Return whether the health check passes for a proxy on that port, which is named in each of three ways."""
    options, _, command = the("HEALTHCHECK").partition("CMD ")
    (seconds,) = re.findall(r"--timeout=(\d+)s", options)
    program, *check = argv(command)
    (script,) = [target for target, sources in copies() if sources == ["deploy/docker/healthcheck.py"]]
    assert check[-1] == script
    found = set()
    for named, variable in (([], str(port)), (["--port", str(port)], "1"), ([f"--port={port}"], "")):
        # A process that waits, with the arguments of the proxy.
        proxy = await asyncio.create_subprocess_exec(sys.executable, "-c", "input()", *named, stdin=subprocess.PIPE)
        process = await asyncio.create_subprocess_exec(
            *(f"{image}/bin/{program}", *check[:-1], f"{image}{script}", str(proxy.pid)),
            env={"FAL_PROXY_PORT": variable},
            stderr=subprocess.DEVNULL,
        )
        async with asyncio.timeout(float(seconds)):
            found.add(await process.wait())
        await proxy.communicate(b"\n")
    assert len(found) == 1
    return found == {0}


def test_health_check_agrees() -> None:
    """Without a port among arguments and variables it asks at the proxy's own default, and waits less than Docker."""
    script = DOCKERFILE.with_name("healthcheck.py").read_text()
    assert f"\nDEFAULT_PORT = {DEFAULT_PORT}\n" in script
    (waits,) = re.findall(r"^TIMEOUT_S = (\d+)$", script, re.MULTILINE)
    assert f"--timeout={int(waits) + 1}s" in the("HEALTHCHECK")


def test_compose_is_right() -> None:
    """The file conforms to the specification of compose files."""
    run(tool("check-jsonschema"), "--builtin-schema=vendor.compose-spec", COMPOSE)


def test_compose_restarts_one_at_a_time() -> None:
    """Both share the loopback of a third service, so a restart of the proxy takes neither nginx nor its port away."""
    services = compose()["services"]
    network, proxy, nginx, redis = (services.pop(name) for name in ("network", "proxy", "nginx", "redis"))
    assert not services
    assert (redis["network_mode"], redis["profiles"]) == ("service:network", ["redis"])
    assert (["--bind", DEFAULT_ADDRESS], "ports" in redis) == (redis["command"][1:3], False)
    assert proxy["network_mode"] == nginx["network_mode"] == "service:network"
    assert (network["ports"], "ports" in proxy, "ports" in nginx) == (["443:443"], False, False)
    assert nginx["depends_on"] == {"proxy": {"condition": "service_healthy"}}  # once, at the start
    assert "depends_on" not in proxy
    # The third one never changes: it is built from nothing here, and mounts nothing.
    assert not {"build", "volumes", "environment", "secrets", "depends_on", "network_mode"} & network.keys()
    assert network["image"] == nginx["image"]


def test_compose_agrees() -> None:
    """The files that it names exist. Both services get the time of a drain, and no more rights than they need."""
    content = compose()
    proxy, nginx = content["services"]["proxy"], content["services"]["nginx"]
    assert (COMPOSE.parent / proxy["build"]["context"]).resolve() == ROOT
    assert ROOT / proxy["build"]["dockerfile"] == DOCKERFILE
    conf, certificate = (volume.split(":")[0] for volume in nginx["volumes"])
    assert (COMPOSE.parent / conf).resolve() == NGINX
    assert f"ssl_certificate {certificate}/" in NGINX.read_text()
    for service in (proxy, nginx):
        assert float(service["stop_grace_period"].removesuffix("s")) > LONGEST_END_S
    for service in content["services"].values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["restart"] == "unless-stopped"
    assert proxy["environment"]["FAL_PROXY_ADDRESS"] == DEFAULT_ADDRESS
    environ = {name: text for name, text in proxy["environment"].items() if not text.startswith("$")}
    substituted = {name: text for name, text in proxy["environment"].items() if name not in environ}
    assert substituted == {name: f"${{{name}:-}}" for name in substituted}
    environ |= {"FAL_KEY_FILE": "", "FAL_KEY": KEY}
    settings = parse_settings(proxy["command"], environ | dict.fromkeys(substituted, ""))
    assert settings.relay is not None
    assert settings.relay.jobs_per_user is None
    shown = dict(re.findall(r"^#   (FAL_\w+)=(.*)$", COMPOSE.read_text(), re.MULTILINE))
    assert shown.keys() < substituted.keys()
    limited = parse_settings(proxy["command"], environ | shown).relay
    assert limited is not None
    assert urlsplit(limited.store or "").netloc == f"{DEFAULT_ADDRESS}:6379"
    assert (settings.admin_address, settings.admin_port) == (DEFAULT_ADDRESS, ADMIN_PORT)
    assert settings.trusted_proxies.texts == (DEFAULT_ADDRESS,)
    assert proxy["tmpfs"] == ["/tmp"]
    (volume,), (counts,) = proxy["volumes"], content["services"]["redis"]["volumes"]
    assert volume.split(":") == ["state", image_environment()["STATE_DIRECTORY"]]
    assert [*content["volumes"]] == ["state", counts.partition(":")[0]]
    assert content["secrets"].keys() == set(proxy["secrets"])
