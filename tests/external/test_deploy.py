"""deploy/: every file is tested, and the files agree with each other and with the proxy."""

import re

import yaml

from tests.support.deploy_files import (
    ADMIN_PORT,
    COMPOSE,
    DEPLOY,
    DOCKERFILE,
    GRAFANA,
    INGRESS,
    KUBERNETES,
    KUSTOMIZATION,
    NGINX,
    PROMETHEUS,
    SOCKET,
    UNIT,
    VALUES,
)
from tests.unit.test_endpoints import CALLS
from tornado_fal_proxy.config import (
    DEFAULT_IDLE_TIMEOUT_S,
    DEFAULT_MAX_BODY_BYTES,
    DEFAULT_RESPONSE_BUFFER_BYTES,
    DEFAULT_ROUTE,
)
from tornado_fal_proxy.rules.endpoints import is_repeatable
from tornado_fal_proxy.rules.target import parse_target
from tornado_fal_proxy.service.settings import DEFAULT_ADDRESS, DEFAULT_PORT


def test_all_files_are_known() -> None:
    """Every file of deploy/ is one that a test reads."""
    known = {NGINX, NGINX.with_name("auth-request.conf"), UNIT, SOCKET, DOCKERFILE, COMPOSE, KUBERNETES}
    known |= {INGRESS, KUSTOMIZATION, VALUES}
    known |= {DOCKERFILE.with_name("healthcheck.py"), *DOCKERFILE.parent.glob("requirements*.txt")}
    known |= {PROMETHEUS, PROMETHEUS.with_name("alerts.yaml"), PROMETHEUS.with_name("alerts_test.yaml"), GRAFANA}
    assert {file for file in DEPLOY.rglob("*") if file.is_file() and file.name != "fal_key"} == known


def test_the_admin_port_is_one() -> None:
    """Prometheus scrapes the port at which the other files put the metrics."""
    (scrape,) = yaml.safe_load(PROMETHEUS.read_text())["scrape_configs"]
    assert scrape["static_configs"] == [{"targets": [f"{DEFAULT_ADDRESS}:{ADMIN_PORT}"]}]
    for file in (UNIT, COMPOSE):
        assert f"http://{DEFAULT_ADDRESS}:{ADMIN_PORT}/metrics" in file.read_text()


def test_nginx_agrees() -> None:
    """Route, port and sizes are the proxy's defaults, and its time limits are longer than the proxy's."""
    text = NGINX.read_text()

    def values(pattern: str) -> list[str]:
        return re.findall(rf"^ *{pattern};", text, re.MULTILINE)

    assert values(r"server ([\d.:]+)") == [f"{DEFAULT_ADDRESS}:{DEFAULT_PORT}"]
    assert f"location = {DEFAULT_ROUTE} {{" in text
    assert values(r"client_max_body_size (\d+)m") == [str(DEFAULT_MAX_BODY_BYTES // 2**20)]
    assert values(r"proxy_max_temp_file_size (\d+)m") == [str(DEFAULT_RESPONSE_BUFFER_BYTES // 2**20)]
    for name in ("proxy_read_timeout", "send_timeout"):
        (seconds,) = values(rf"{name} (\d+)s")
        assert int(seconds) > DEFAULT_IDLE_TIMEOUT_S


def test_nginx_repeats_what_may_be_repeated() -> None:
    """nginx repeats the calls that the proxy repeats, and no other."""
    text = NGINX.read_text()
    (body,) = re.findall(r"\$tornado_fal_proxy_is_repeatable \{\n(.*?)\n\}", text, re.DOTALL)
    default, *rules = body.splitlines()
    assert default == '    default "";'
    patterns = [re.fullmatch(r' +"~(.*)" yes;', rule) for rule in rules]
    for method, url, _ in CALLS:
        found = any(re.search(pattern[1], f"{method} {url}", re.ASCII) for pattern in patterns if pattern)
        assert found is is_repeatable(method, parse_target(url)), url
