"""deploy/systemd: the units are valid, agree with the proxy, and the service runs within their limits."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.deploy_files import ADMIN_PORT, INSTALLED, LONGEST_END_S, SOCKET, UNIT, has_counted, run, start
from tests.support.load import respond
from tests.support.proxy import KEY, Setup
from tests.support.raw_client import call
from tests.support.service_process import COMMAND
from tests.support.tools import tool
from tests.support.waiting import eventually
from tornado_fal_proxy.rules.trusted_proxies import UNIX
from tornado_fal_proxy.service.command import EXIT_ABORTED, EXIT_USAGE
from tornado_fal_proxy.service.limits import OWN_FILES, STREAMS_PER_CONNECTION, reserved_files
from tornado_fal_proxy.service.options import parse_settings
from tornado_fal_proxy.service.server import LISTEN_BACKLOG
from tornado_fal_proxy.service.settings import DEFAULT_ADDRESS, DEFAULT_PORT

# Limits the exposure level that "systemd-analyze security" computes, in tenths: below 2.0 of 10.
MAX_EXPOSURE = 19


def settings_of(unit: Path) -> dict[str, list[str]]:
    """Return all settings of a unit, with the section's name before each."""
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
    """Address, backlog, exit codes, time and open files fit the proxy's own and its defaults."""
    listens, service = settings_of(SOCKET), settings_of(UNIT)
    assert listens["Socket.ListenStream"] == [f"{DEFAULT_ADDRESS}:{DEFAULT_PORT}"]
    assert listens["Socket.Backlog"] == [str(LISTEN_BACKLOG)]
    assert service["Unit.Requires"] == [SOCKET.name]
    assert service["Service.Type"] == ["notify"]
    assert service["Service.SuccessExitStatus"] == [str(EXIT_ABORTED)]
    assert service["Service.RestartPreventExitStatus"] == [str(EXIT_USAGE)]
    assert float(service["Service.TimeoutStopSec"][0]) > LONGEST_END_S
    assert service["Service.MemoryMax"] == ["75%"]
    assert f"systemctl enable --now {SOCKET.name} {UNIT.name}\n" in UNIT.read_text()
    program, *argv = shlex.split(service["Service.ExecStart"][0])
    assert program.startswith(INSTALLED)
    settings = parse_settings(argv, environment_of(service) | {"FAL_KEY_FILE": "", "FAL_KEY": KEY})
    assert (settings.admin_address, settings.admin_port) == (DEFAULT_ADDRESS, ADMIN_PORT)
    assert settings.trusted_proxies.texts == (DEFAULT_ADDRESS, UNIX)
    config = settings.relay
    assert config is not None
    files = int(service["Service.LimitNOFILE"][0])
    calls = config.max_in_flight
    assert files > OWN_FILES + reserved_files(files) + calls + calls // STREAMS_PER_CONNECTION


def test_units_are_right(tmp_path: Path) -> None:
    """systemd finds no fault in them."""
    program = tool("systemd-analyze")
    for unit in (UNIT, SOCKET):
        text = unit.read_text().replace(f"{INSTALLED}/bin/tornado-fal-proxy", sys.executable)
        (tmp_path / unit.name).write_text(text)
    ended = subprocess.run(
        [program, "verify", *sorted(tmp_path.iterdir())], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_exposure() -> None:
    """The exposure level that systemd computes for the service is below 2.0 of 10."""
    run(tool("systemd-analyze"), "security", "--offline=true", "--no-pager", f"--threshold={MAX_EXPOSURE}", UNIT)


def allowed_system_calls(filters: list[str]) -> set[str]:
    """Return the system calls that SystemCallFilter allows, with systemd's own groups."""
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
    """It serves with the key of the credential, which is shown nowhere, and does nothing that the unit forbids."""
    service = settings_of(UNIT)
    (credential,) = service["Service.LoadCredential"]
    (tmp_path / credential.partition(":")[0]).write_text(KEY + "\n")
    environ = {name: text.replace("%d", str(tmp_path)) for name, text in environment_of(service).items()}
    assert environ["FAL_KEY_FILE"] == str(tmp_path / "fal_key")
    private, state = tmp_path / "private", tmp_path / "state"
    private.mkdir()
    state.mkdir(int(service["Service.StateDirectoryMode"][0], 8))
    environ |= {"FAL_PROXY_ADMIN_PORT": "0", "TMPDIR": str(private)}
    # systemd sets it, because the unit has a StateDirectory.
    environ |= {"STATE_DIRECTORY": str(state), "FAL_PROXY_JOBS_PER_USER": "1/day"}
    program, *argv = shlex.split(service["Service.ExecStart"][0])
    assert program == f"{INSTALLED}/bin/tornado-fal-proxy"
    trace = tmp_path / "trace"
    # -D: the process that is started is the service.
    monkeypatch.setattr(
        "tests.support.service_process.COMMAND", [tool("strace"), "-D", "-f", "-q", "-o", str(trace), *COMMAND, *argv]
    )
    upstream = await setup.upstream(respond)
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    with manager, socket.create_server(("127.0.0.1", 0)) as listener:
        manager.bind(environ.setdefault("NOTIFY_SOCKET", str(tmp_path / "notify")))
        running = await start(setup, upstream, listener=listener, PYTHONDONTWRITEBYTECODE="1", **environ)
        assert manager.recv(100) == b"READY=1"
        statuses = [(await call(running.port, target="https://fal.run/short")).status for _ in range(2)]
        assert statuses == [200, 402]
        assert upstream.exchanges[0].header("authorization") == f"Key {KEY}".encode()
        await has_counted(running)
        for pid in (running.pid, *running.workers()):
            for shows in ("cmdline", "environ"):
                assert KEY.encode() not in Path(f"/proc/{pid}/{shows}").read_bytes()
        assert service["Service.ExecReload"] == ["/bin/kill -HUP $MAINPID"]
        running.process.send_signal(signal.SIGHUP)
        reloaded = await running.log_line("reload: ")
        assert (await call(running.port, target="https://fal.run/short")).status == 402
        output = (reloaded, *await running.end())
    assert KEY not in running.line + "".join(output)

    # Process ids are in a column, padded with spaces.
    await eventually(
        lambda: re.search(rf"^{running.pid} +\+\+\+ exited with 0 \+\+\+", trace.read_text(), re.MULTILINE)
    )
    traced = trace.read_text()
    calls = set(re.findall(r"^\d+ +(\w+)\(", traced, re.MULTILINE))
    if os.geteuid() == 0:
        calls.discard("fchown")  # of SQLite's, as root only, which the unit's user is not
    assert calls <= allowed_system_calls(" ".join(service["Service.SystemCallFilter"]).replace("=~", "=").split())
    families = set(re.findall(r" socket\((\w+)", traced))
    assert {"AF_INET", "AF_UNIX"} <= families <= set(service["Service.RestrictAddressFamilies"][0].split())
    assert service["Service.MemoryDenyWriteExecute"] == ["yes"]
    assert not re.findall(r" mmap\(.*PROT_WRITE\|PROT_EXEC.*| mprotect\(.*PROT_EXEC.*", traced)
    assert (service["Service.ProtectSystem"], service["Service.PrivateTmp"]) == (["strict"], ["yes"])
    assert service["Service.StateDirectory"] == ["tornado-fal-proxy"]
    written = re.findall(r' open(?:at)?\([^"]*"([^"]*)".*(?:O_WRONLY|O_RDWR|O_CREAT)', traced)
    # Its own stdout and stderr, opened again to write there without waiting.
    assert [path for path in written if not path.startswith((f"{private}/", f"{state}/", "/proc/self/fd/"))] == []
    # SQLite's other files stay where two workers close the store at once.
    file = "spending.sqlite"
    assert {file} <= {path.name for path in state.iterdir()} <= {file, f"{file}-wal", f"{file}-shm"}
    assert not list(private.iterdir())
