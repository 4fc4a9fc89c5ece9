"""deploy/prometheus and deploy/grafana: they use series that the service has, and alerts fire when they should.

promtool runs the alerts' own tests on series that are written there, and the dashboard's expressions on series from a
real scrape.
"""

import asyncio
import json
import re
import subprocess
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.support.deploy_files import DEPLOY
from tests.support.proxy import KEY, Setup
from tests.support.raw_client import RawClient, call
from tests.support.scripted_upstream import Exchange
from tests.support.service_process import ServiceProcess
from tests.support.tools import tool
from tests.support.waiting import eventually
from tornado_fal_proxy import errors
from tornado_fal_proxy.service.application import CLOSING, FULL, NOT_FOUND

PROMETHEUS = DEPLOY / "prometheus"
CONFIG, ALERTS, ALERTS_TEST = (PROMETHEUS / f"{name}.yaml" for name in ("prometheus", "alerts", "alerts_test"))
DASHBOARD = json.loads((DEPLOY / "grafana/dashboard.json").read_text())
JOB = "tornado-fal-proxy"

# Grafana's grid.
COLUMNS = 24

RULES = """
def authorize(handler, target):
    if "x-bug" in handler.request.headers:
        raise ValueError
    return "x-unknown" not in handler.request.headers
"""
# One target of each kind.
TARGETS = [
    "https://fal.run/a/b",
    "https://fal.run/a/b/stream",
    "https://queue.fal.run/a/b",
    "https://queue.fal.run/a/b/requests/1/status",
    "https://queue.fal.run/a/b/requests/1/status/stream",
    "https://queue.fal.run/a/b/requests/1",
    "https://wma.fal.run/ice",
    "https://wma.fal.run/session",
    "https://wma.fal.run/session/heartbeat",
    "https://rest.fal.ai/tokens/",
    "https://rest.fal.ai/storage/upload/initiate",
]


async def respond(exchange: Exchange) -> None:
    """Act as the last segment of the target names."""
    await exchange.body()
    action = exchange.target.rpartition(b"/")[2]
    if action == b"resets":
        exchange.reset()
    elif action != b"silent":
        status = int(action) if action.isdigit() and len(action) == 3 else 200
        await exchange.respond(status, b"{}", [("x-fal-billable-units", "1")] if status == 200 else [])


@dataclass(frozen=True)
class Series:
    """A series of the service, its value, and the name of its metric."""

    name: str
    labels: dict[str, str]
    value: float
    family: str


async def scraped(setup: Setup, directory: Path) -> list[Series]:
    """Return all series of the service after calls of every kind, with every outcome."""
    (directory / "my_rules.py").write_text(RULES)
    (directory / "prices.toml").write_text('"**" = 1\n')
    config = setup.config(upstream := await setup.upstream(respond))
    running = await ServiceProcess.start(
        *("--admin-port=0", "--authorize=my_rules:authorize", "--log-level=error"),
        *("--jobs=8/day", "--budget=100/day", "--store=memory", "--prices=prices.toml"),
        cwd=directory,
        FAL_KEY=KEY,
        FAL_PROXY_CA_CERTS=str(config.ca_certs),
        FAL_PROXY_CONNECT_TO=str(config.connect_to),
    )
    admin = await running.admin_port()
    for target in TARGETS:
        method = "GET" if "/requests/" in target else "POST"
        assert (await call(running.port, method, target=target)).status == 200
    for action, status in (("422", 422), ("503", 503), ("resets", 500)):
        assert (await call(running.port, target=f"https://fal.run/a/b/{action}")).status == status
    assert (await call(running.port, target="https://evil.example/")).status == 412
    for header, status in (("x-bug: 1", 500), ("x-unknown: 1", 401)):
        assert (await call(running.port, headers=[header])).status == status
    client = await RawClient.open(running.port)
    await client.send(target="https://fal.run/a/b/silent")
    await eventually(lambda: upstream.exchanges[-1].target.endswith(b"silent"))
    client.leave()
    assert (await call(running.port, target=TARGETS[0])).status == 402
    async with asyncio.timeout(10):
        while (
            b'outcome="client_disconnected"'
            not in (text := await call(admin, "GET", target=None, path="/metrics")).body
        ):
            await asyncio.sleep(0.02)
    await running.end()
    return [
        Series(sample.name, sample.labels, sample.value, family.name)
        for family in text_string_to_metric_families(text.body.decode())
        for sample in family.samples
        if not sample.name.endswith("_created")  # the time at which a series began, which only OpenMetrics uses
    ]


# The files.


def promtool(*arguments: str | Path) -> None:
    """Run promtool, which must find no fault."""
    ended = subprocess.run([tool("promtool"), *arguments], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    return list(group["rules"])


def cases() -> list[dict[str, Any]]:
    return list(yaml.safe_load(ALERTS_TEST.read_text())["tests"])


def targets() -> list[tuple[str, dict[str, Any]]]:
    """Return all targets of the dashboard, each with the title of its panel."""
    return [(panel["title"], target) for panel in DASHBOARD["panels"] for target in panel["targets"]]


def selectors(expression: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the service's metrics in an expression, each with the labels and values that select its series."""
    return [
        (name, re.findall(r'(\w+)(?:=~|!~|!=|=)"([^"]*)"', matchers))
        for name, matchers in re.findall(r"\b(fal_proxy_\w+)(?:\{([^}]*)\})?", expression)
    ]


EXPRESSIONS = [
    *(rule["expr"] for rule in alerts()),
    *(target["expr"] for _, target in targets()),
    *(variable["query"]["query"] for variable in DASHBOARD["templating"]["list"] if variable["type"] == "query"),
    *(series["series"] for case in cases() for series in case["input_series"]),
]


@pytest.mark.gen_test
async def test_expressions_use_series_of_the_service(setup: Setup, tmp_path: Path) -> None:
    """Each metric, label and value in an expression, and in the series of the alerts' tests, is the service's."""
    labels: dict[str, set[str]] = {}
    values: dict[str, set[str]] = {"job": {JOB}}
    found = await scraped(setup, tmp_path)
    for series in found:
        labels.setdefault(series.name, {"job", "instance"}).update(series.labels)
        for label, value in series.labels.items():
            values.setdefault(label, set()).add(value)
    assert values["outcome"] == {"ok", "refused", "failed", "upstream_error", "client_disconnected"}
    # Errors and a protocol that no call here has.
    values["error"] |= {*errors.__all__, *(str(message["error"]) for message in (CLOSING, FULL, NOT_FOUND))}
    values["protocol"].add("1.1")
    for expression in EXPRESSIONS:
        for name, matchers in selectors(expression):
            assert name in labels, expression
            for label, value in matchers:
                assert label in labels[name], expression
                if label != "instance" and not value.startswith("$"):
                    assert set(value.split("|")) <= values[label] | {""}, expression
    # The dashboard shows every metric of the service.
    shown = {name for _, target in targets() for name, _ in selectors(target["expr"])}
    families = {series.name: series.family for series in found}
    assert {families[name] for name in shown} == set(families.values())


def test_alerts() -> None:
    """Prometheus accepts the configuration. Each alert fires in its own case, and none while all is well."""
    promtool("check", "config", CONFIG)
    promtool("test", "rules", ALERTS_TEST)
    tested = set(re.findall(r'alertname="(\w+)"', ALERTS_TEST.read_text()))
    assert [rule["alert"] for rule in alerts() if rule["alert"] not in tested] == []


def test_alerts_agree() -> None:
    """Each alert has a summary, a description and a severity, names panels that exist, and selects the scraped job."""
    (scrape,) = yaml.safe_load(CONFIG.read_text())["scrape_configs"]
    assert scrape["job_name"] == JOB
    for rule in alerts():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"].keys() == {"summary", "description"}
        for text in re.findall(r'up\{job="([^"]*)"\}', rule["expr"]):
            assert text == JOB
    titles = {panel["title"] for panel in DASHBOARD["panels"]}
    named = {name for rule in alerts() for name in re.findall(r'"(.*?)"', rule["annotations"]["description"])}
    for name in named:
        assert not name[0].isupper() or any(title.startswith(name) for title in titles), name


def test_dashboard_is_right() -> None:
    """It queries the chosen Prometheus, its panels do not overlap, and its legends use labels that exist."""
    assert {"uid", "title", "schemaVersion", "templating", "time"} <= DASHBOARD.keys()
    datasource, *variables = DASHBOARD["templating"]["list"]
    assert (datasource["name"], datasource["type"], datasource["query"]) == ("datasource", "datasource", "prometheus")
    panels = DASHBOARD["panels"]
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    assert all(each["datasource"] == chosen for each in (*panels, *variables))
    known = {f"${variable['name']}" for variable in variables} | {"$__rate_interval"}
    for key in ("id", "title"):
        assert len({panel[key] for panel in panels}) == len(panels)
    for title, target in targets():
        assert set(re.findall(r"\$\w+", target["expr"])) <= known, title
        by = {label for labels in re.findall(r"by \((.*?)\)", target["expr"]) for label in labels.split(", ")}
        assert set(re.findall(r"{{(\w+)}}", target.get("legendFormat", ""))) <= by, title
    areas = [{(x, y) for x in span(panel, "x", "w") for y in span(panel, "y", "h")} for panel in panels]
    assert all(x < COLUMNS for area in areas for x, _ in area)
    assert sum(panel["gridPos"]["w"] for panel in panels if panel["gridPos"]["y"] == 0) == COLUMNS
    assert all(one.isdisjoint(other) for one, other in combinations(areas, 2))
    named = {alert for panel in panels for alert in re.findall(r"\bFal\w+", panel["description"])}
    assert named <= {rule["alert"] for rule in alerts()}


def span(panel: dict[str, Any], start: str, length: str) -> range:
    area = panel["gridPos"]
    return range(area[start], area[start] + area[length])


@pytest.mark.gen_test
async def test_dashboard_shows(setup: Setup, tmp_path: Path) -> None:
    """Each expression of the dashboard has a number as its value after calls of every kind."""
    series = []
    for found in await scraped(setup, tmp_path):
        labels = {"job": JOB, "instance": "a"} | found.labels
        selector = ",".join(f"{label}={json.dumps(value)}" for label, value in labels.items())
        counts = found.name.endswith(("_total", "_bucket", "_count", "_sum"))
        values = f"0+{found.value}x60" if counts else f"{found.value}x60"
        series.append({"series": f"{found.name}{{{selector}}}", "values": values})
    once = {"eval_time": "1h", "exp_samples": [{"labels": "{}", "value": 1}]}
    expected = [{"expr": f"count(({concrete(target['expr'])}) >= 0) > bool 0"} | once for _, target in targets()]
    test = tmp_path / "test.yaml"
    test.write_text(
        yaml.safe_dump({"tests": [{"interval": "1m", "input_series": series, "promql_expr_test": expected}]})
    )
    promtool("test", "rules", test)


def concrete(expression: str) -> str:
    """Return an expression as Grafana sends it when all is chosen."""
    return re.sub(r"\$\w+", ".*", expression.replace("$__rate_interval", "5m"))
