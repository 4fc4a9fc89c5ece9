"""docs/reference.md, docs/spending.md and docs/usage.md are true: tables, names, code, and what a command prints."""

import asyncio
import contextlib
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tornado.web import create_signed_value

import tornado_fal_proxy
from tests.support.metrics import Scrape, started
from tests.support.pages import Page
from tests.support.proxy import KEY, Setup
from tests.support.raw_client import call
from tests.support.service_process import WITH_KEY
from tests.support.spending_model import NOON, reservation
from tests.support.stub_handlers import JSON, fine, responds
from tests.support.tools import ROOT
from tornado_fal_proxy import ConfigError, errors
from tornado_fal_proxy.config import ENV_PREFIX, relay_options
from tornado_fal_proxy.errors import ProxyError
from tornado_fal_proxy.rules.access import access_rules
from tornado_fal_proxy.rules.policy import decide
from tornado_fal_proxy.rules.target import parse_target
from tornado_fal_proxy.service import main, usage
from tornado_fal_proxy.service.access_log import access_logger
from tornado_fal_proxy.service.arguments import COMMANDS
from tornado_fal_proxy.service.options import parse_settings
from tornado_fal_proxy.spending.sqlite_store import SqliteStore
from tornado_fal_proxy.telemetry import Call

REFERENCE = (ROOT / "docs/reference.md").read_text("utf-8")
SPENDING = (ROOT / "docs/spending.md").read_text("utf-8")
USAGE = (ROOT / "docs/usage.md").read_text("utf-8")


def blocks(text: str, language: str) -> list[str]:
    """Return the code blocks of that language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def table(*header: str) -> list[list[str]]:
    """Return the rows of the table with that header, as lists of cells."""
    rows = REFERENCE.partition("\n| " + " | ".join(header) + " |\n|" + "---|" * len(header) + "\n")[2].partition(
        "\n\n"
    )[0]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows.splitlines()]
    assert cells
    assert {len(row) for row in cells} == {len(header)}
    return cells


def test_options() -> None:
    """The table names every option with its variable, its field and its default, and no other."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
        main(["--help-all"])
    defaults = dict.fromkeys(re.findall(r"^  (--[a-z0-9-]+)", text.getvalue(), re.MULTILINE), "")
    del defaults["--version"], defaults["--help-all"]
    for entry in re.split(r"\n  (?=--)", re.sub(r"\n {3,}", " ", text.getvalue())):
        name = entry.split()[0]
        default = re.search(r"\(default: (.*?)\)", entry)
        if name in defaults and default:
            defaults[name] = default[1]
    defaults["--sandbox"] = "no"

    key, *rows = table("Option", "Variable", "Field", "Default", "Meaning")
    assert key[:4] == ["", "`FAL_KEY`", "`key`", ""]
    fields = {option.name: option for option in relay_options()}
    assert [row[0].strip("`") for row in rows] == list(defaults)
    for option, variable, field, stated, meaning in rows:
        name = option.strip("`-").replace("-", "_")
        assert variable == f"`{ENV_PREFIX}{name.upper()}`"
        assert field == (f"`{name}`" if name in fields else "")
        actual = defaults[option.strip("`")]
        assert stated == actual or float(stated) == float(actual), option
        assert meaning
        if name.endswith("_s"):
            assert meaning.startswith("seconds ")
    assert {row[2].strip("`") for row in rows if row[2]} == set(fields)


def test_commands() -> None:
    """The table has every command."""
    assert [row[0].strip("`") for row in table("Command", "What it does")] == list(COMMANDS)


def test_statuses() -> None:
    """The table of statuses is that of errors.py, in the order in which the rules apply."""
    kinds = [getattr(errors, name) for name in errors.__all__]
    own = {
        (kind.status, kind.message)
        for kind in kinds
        if issubclass(kind, errors.ProxyError)
        and kind not in (errors.ProxyError, errors.AccessRefused, errors.UpstreamError, errors.ClientDisconnected)
        and not issubclass(kind, errors.SpendingRefused)  # their messages name the limit
    }
    rows = [(int(status), message) for status, message, _ in table("Status", "Message", "What to do")]
    assert set(rows) == own
    assert len(rows) == len(own)
    assert [status for status, _ in rows[:14]] == [405, 400, 412, *[403] * 10, 404]
    assert (
        f'**500 instead of 502 or 504**, with "{errors.ConnectionLost("", may_have_run=True).message}'.replace(
            errors.ConnectionLost.message + " ", ""
        )
        in REFERENCE
    )


def test_kubernetes() -> None:
    """A variable that Kubernetes makes for a Service named fal-proxy ends the start with the line that is quoted."""
    with pytest.raises(ConfigError) as caught:
        parse_settings([], {"FAL_KEY": KEY, "FAL_PROXY_PORT": "tcp://10.0.0.1:8080"})
    (problem,) = caught.value.problems
    (quoted,) = re.findall(r"start fails with `(.*?)`", REFERENCE)
    assert problem.startswith(quoted)


@pytest.mark.parametrize("text", [*blocks(REFERENCE, "toml"), *blocks(SPENDING, "toml")])
def test_files(tmp_path: Path, text: str) -> None:
    """Each file that is shown can be used as it is."""
    path = tmp_path / "options.toml"
    path.write_text(text)
    settings = parse_settings([f"--config={path}"], WITH_KEY)
    assert settings.relay is not None
    assert settings.relay.spending is not None
    assert set(settings.relay.spending.plans) == {"pro"}


def test_log_fields() -> None:
    """The table has the fields of the access log, in their order."""
    call = Call("POST", None)
    call.accounted = True
    names = [name for row in table("Field", "Meaning") for name in re.findall(r"`(\w+)`", row[0])]
    assert names == list(call.fields(""))


@pytest.mark.gen_test
async def test_metrics(setup: Setup) -> None:
    """The table has every metric of the service, with its labels."""
    bill = responds(200, b"{}", [*JSON, ("x-fal-billable-units", "1")])
    argv = ("--jobs-per-user=1/day", "--store=memory")
    running, admin = await started(setup, await setup.upstream(bill), *argv)
    assert [(await call(running.port)).status for _ in range(2)] == [200, 402]
    scrape = await Scrape.of(admin)
    await running.end()
    seen: dict[str, set[str]] = {}
    for name, pairs in scrape.samples:
        if not name.endswith("_created"):
            name = re.sub("_(bucket|count|sum)$", "", name.removeprefix("fal_proxy_"))
            seen.setdefault(name, set()).update(label for label, _ in pairs if label != "le")
    named: dict[str, set[str]] = {}
    for names, labels, _ in table("Metric", "Labels", "Meaning"):
        for name in re.findall(r"`(\w+)`", names):
            named[name] = set(filter(None, labels.split(", ")))
    assert named == seen


ALLOWED, FORBIDDEN = ["fal-ai/flux/dev"], ["fal-ai/other"]
BODIES = {
    "/tokens/": {"allowed_apps": ["flux"], "token_expiration": 120},
    "/tokens/realtime": {"allowed_apps": ["fal-ai/flux/dev"], "duration": 120},
    "/ice": {"app_id": "fal-ai/flux/dev"},
    "/session": {"app_id": "fal-ai/flux/dev", "sdp": "v=0", "type": "offer"},
}


def passes(request: str, **fields: Any) -> bool:
    """Return whether a request passes the rules of these fields."""
    method, url = request.split(" ")
    access = access_rules(**fields)
    headers = [("x-fal-target-url", url), ("content-type", "application/json"), ("content-length", "9")]
    target = parse_target(url, method)
    try:
        decide(method, headers, max_body_bytes=100, access=access)
        if access is not None and access.needs_body(target):
            access.check_body(target, json.dumps(BODIES[target.path]).encode())
    except ProxyError:
        return False
    return True


@pytest.mark.parametrize("row", table("Call", "Who", "Request", "By default", "With `allowed_endpoints`"))
def test_calls_of_sdks(row: list[str]) -> None:
    """Each call that an SDK makes has the outcome that the table has, by default and where endpoints are restricted."""
    request, default, restricted = row[2:]
    open_to_all = ["fal-ai/flux/**"] if "/tokens/ " in f"{request} " else ALLOWED
    switch = {restricted.strip("`"): True} if restricted.startswith("`") else {}
    assert passes(request) is (default == "allowed")
    assert passes(request, **{default.strip("`"): True}) if default.startswith("`") else True
    assert passes(request, allowed_endpoints=tuple(open_to_all), **switch)
    assert passes(request, allowed_endpoints=tuple(FORBIDDEN), **switch) is (
        restricted == "allowed" or restricted == "`allow_uploads`"
    )
    if switch:
        assert not passes(request, allowed_endpoints=tuple(open_to_all))


@pytest.mark.gen_test
async def test_application_with_limits(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The application that is shown checks inputs, and limits users by their plans."""
    upstream = await setup.upstream(fine)
    store = f"sqlite:{tmp_path / 'spent.sqlite'}"
    monkeypatch.setattr(
        tornado_fal_proxy, "ProxyConfig", lambda **fields: setup.config(upstream, store=store, **fields), raising=True
    )
    names: dict[str, Any] = {"__name__": "docs"}
    exec(compile(blocks(SPENDING, "python")[0], "spending.md", "exec"), names)
    names["application"].settings["log_function"] = lambda handler: None
    port = setup.serve(names["application"])

    async def statuses(user: str, count: int, body: bytes = b"{}") -> list[int]:
        cookie = create_signed_value(names["application"].settings["cookie_secret"], "user", user).decode()
        headers = [f"cookie: user={cookie}"]
        return [(await call(port, "POST", body, headers=headers)).status for _ in range(count)]

    assert await statuses("ann", 11) == [200] * 10 + [402]
    assert await statuses("bob", 1, b'{"prompt": "forbidden"}') == [422]
    assert await statuses("eve@example.com", 11) == [200] * 11
    assert (await call(port)).status == 401


@pytest.mark.gen_test
async def test_functions_for_limits(setup: Setup) -> None:
    """The module that is shown names plans, counts pictures, and lets no odd input pass for less."""
    names: dict[str, Any] = {"__name__": "my_limits"}
    exec(compile(blocks(SPENDING, "python")[1], "spending.md", "exec"), names)
    functions = {name: names[name] for name in ("identify", "input_units")}
    plans = {"pro": {"jobs_per_user": "8/day"}}
    port = setup.proxy(
        await setup.upstream(fine), jobs_per_user="4/day", plans=plans, count="units", store="memory", **functions
    )

    async def left(user: str | None, body: bytes) -> str:
        headers = [] if user is None else [f"X-Forwarded-User: {user}"]
        response = await call(port, "POST", body, headers=headers)
        return f"{response.status} {re.findall(';r=([0-9]+)', response.header('ratelimit') or '')}"

    assert await left("ann@example.com", b'{"num_images": 3}') == "200 ['5']"
    assert await left("ann@example.com", b'{"num_images": "4"}') == "200 ['1']"
    assert await left("eve", b"{}") == "200 ['3']"
    for odd in (b'{"num_images": -5}', b'{"num_images": true}', b'{"num_images": [1]}', b'{"num_images": null}'):
        assert await left("eve", odd) == "402 ['3']"
    assert await left(None, b"") == "200 ['3']"


def test_command_lines() -> None:
    """Each command line that is shown has options that exist."""
    for line in re.findall(r"^tornado-fal-proxy (--[^`\n]+)|`tornado-fal-proxy (--[^`\n]+)`", SPENDING, re.MULTILINE):
        argv = "".join(line).strip().split()
        settings = parse_settings(argv, {} if "--sandbox" in argv else WITH_KEY)
        assert settings.texts["jobs_per_user"]


async def account_of_three(path: Path) -> None:
    """Make the account that docs/usage.md shows."""
    store = SqliteStore(path)
    await store.open()
    yesterday, flux, sdxl = NOON - 86_400, "fal-ai/flux/dev", "fal-ai/fast-sdxl"
    for number, (user, endpoint, at, cost) in enumerate(
        (
            *[("ann@example.com", flux, yesterday, 25_000)] * 2,
            *[("ann@example.com", flux, NOON, 25_000)] * 3,
            *[("eve@example.com", sdxl, NOON, 11_000)] * 2,
            ("address:203.0.113.7", flux, NOON, 10_000),
        )
    ):
        await store.reserve(reservation(str(number), user, endpoint=endpoint, at=at, cost=cost, limit=99))
    for number in range(2):
        await store.reserve(reservation(f"refused-{number}", "ann@example.com", endpoint="fal-ai", cost=1, limit=0))
    await store.close()


def test_usage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command prints what is shown, and its options are those in the table."""
    path = tmp_path / "spending.sqlite"
    asyncio.run(account_of_three(path))
    monkeypatch.setattr(usage, "time", SimpleNamespace(time=lambda: NOON))
    shown = re.findall(r"```sh\ntornado-fal-proxy usage (.*)\n```\n(?:\n.*)?\n```\w+\n((?:.*\n)*?)```", USAGE)
    assert len(shown) == 2
    for argv, text in shown:
        assert usage.run_usage(argv.split(), {"FAL_PROXY_STORE": f"sqlite:{path}"}) == (0, text.removesuffix("\n"))
    with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as printed:
        usage.run_usage(["--help"], {})
    rows = re.findall(r"^\| (`--.*?) \|", USAGE, re.MULTILINE)
    options = re.findall(r"^  (--[a-z-]+)", printed.getvalue(), re.MULTILINE)
    assert re.findall(r"--[a-z-]+", "".join(rows)) == options


def test_log_line() -> None:
    """The line that is shown has the fields of a call that nobody pays for, in their order."""
    logger, _, fields = Page("docs/reference.md").part("log-line").partition(": ")
    assert logger.endswith(f" INFO {access_logger.name}")
    assert re.findall(r"(\w+)=\S+", fields) == list(Call("POST", None).fields(""))


def test_public_names() -> None:
    """The table has each name that the package exports."""
    named = {name for names, _ in table("Name", "For") for name in re.findall(r"`([\w.]+)`", names)}
    modules = {f"tornado_fal_proxy.{name}" for name in ("webhooks", "errors", "logs")}
    assert named == {*tornado_fal_proxy.__all__, *modules} - {"__version__"}
