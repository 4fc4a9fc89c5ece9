"""deploy/kubernetes: the objects are valid, agree with the proxy, and their probes work.

Kubernetes does not run here. The file is validated, and its command is run without it.
"""

import asyncio
import re
import stat
from ipaddress import ip_address, ip_network
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from tests.support.deploy_files import ADMIN_PORT, KUBERNETES, LONGEST_END_S, run, start, the
from tests.support.load import respond
from tests.support.proxy import KEY, Setup
from tests.support.raw_client import call
from tests.support.tools import tool
from tests.support.waiting import eventually
from tornado_fal_proxy.service.options import parse_settings
from tornado_fal_proxy.service.settings import DEFAULT_DRAIN_TIMEOUT_S

# A release that clouds still offer, and the newest that has schemas.
KUBERNETES_VERSIONS = ("1.29", "1.34")


@pytest.fixture
def kubernetes() -> dict[str, Any]:
    """Return the objects by kind."""
    return {found["kind"]: found for found in yaml.safe_load_all(KUBERNETES.read_text())}


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_kubernetes_is_right(version: str) -> None:
    """Each object conforms to the schemas of Kubernetes, and has no field beyond them."""
    run(tool("kubernetes-validate"), "--strict", "--quiet", f"--kubernetes-version={version}", KUBERNETES)


def test_kubernetes_agrees(kubernetes: dict[str, Any]) -> None:
    """All objects select the same pods, and ports, paths, options and times are the proxy's."""
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
    (clients, clients_ports), (watchers, watchers_ports) = (
        (rule["from"], rule["ports"]) for rule in kubernetes["NetworkPolicy"]["spec"]["ingress"]
    )
    assert clients != watchers
    assert (clients_ports, watchers_ports) == ([{"port": "http"}], [{"port": "admin"}])
    probes = {name: container[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert {probe["port"] for probe in probes.values()} == {"admin"}
    assert [probe["path"] for probe in probes.values()] == ["/healthz", "/readyz", "/healthz"]
    # Several processes would write files to count together, and the file system is read-only.
    assert settings.processes == 1
    (trusted,) = settings.trusted_proxies.texts
    assert ip_network(trusted).prefixlen >= 16
    _, waits = container["lifecycle"]["preStop"]["exec"]["command"]
    end = LONGEST_END_S - DEFAULT_DRAIN_TIMEOUT_S + settings.drain_timeout_s
    assert pod["spec"]["terminationGracePeriodSeconds"] > float(waits) + end

    variable, store = container["env"]
    (mount,), (volume,) = container["volumeMounts"], pod["spec"]["volumes"]
    assert (variable["name"], variable["value"]) == ("FAL_KEY_FILE", f"{mount['mountPath']}/key")
    assert (mount["name"], volume["secret"]["secretName"]) == (volume["name"], "tornado-fal-proxy")
    assert not volume["secret"]["defaultMode"] & stat.S_IRWXO
    # Pods share no disk, so without a Redis there are no limits, and a secret without it is no fault.
    assert store["name"] == "FAL_PROXY_STORE"
    assert store["valueFrom"]["secretKeyRef"] == {"name": "tornado-fal-proxy", "key": "store", "optional": True}
    (url,) = re.findall(r"--from-literal=store=(\S+)", KUBERNETES.read_text())
    settings = parse_settings([], {"FAL_KEY": KEY, "FAL_PROXY_STORE": url, "FAL_PROXY_JOBS_PER_USER": "1/day"})
    assert settings.relay is not None
    (opened,) = [rule for rule in kubernetes["NetworkPolicy"]["spec"]["egress"] if "podSelector" in rule["to"][0]]
    assert opened["ports"] == [{"port": urlsplit(url).port, "protocol": "TCP"}]
    assert "--from-file=key=" in KUBERNETES.read_text()


@pytest.mark.gen_test
async def test_probes(setup: Setup, kubernetes: dict[str, Any]) -> None:
    """A pod that is being stopped is alive and not ready while its last calls are finished."""
    (container,) = kubernetes["Deployment"]["spec"]["template"]["spec"]["containers"]
    arguments = [re.sub(r"port=\d+$", "port=0", argument) for argument in container["args"]]
    upstream = await setup.upstream(respond)
    running = await start(setup, upstream, *arguments, FAL_KEY=KEY)
    admin = await running.admin_port()

    async def statuses() -> list[int]:
        paths = [container[probe]["httpGet"]["path"] for probe in ("livenessProbe", "readinessProbe")]
        return [(await call(admin, "GET", target=None, path=path)).status for path in paths]

    assert await statuses() == [200, 200]
    last = asyncio.create_task(call(running.port, target="https://fal.run/poll"))
    await eventually(lambda: upstream.exchanges)
    running.process.terminate()
    await running.log_line("drain: 1 calls in flight")
    assert await statuses() == [200, 503]
    assert (await last).status == 200
    await running.ended()


# Destinations, as the namespace or the name of a pod, or an address, with port and protocol, and whether a pod may send
# there.
EGRESS = [
    ("kube-system", 53, "UDP", True),
    ("kube-system", 53, "TCP", True),
    ("dns", 53, "UDP", True),
    ("169.254.20.10", 53, "UDP", True),
    ("169.254.20.10", 53, "TCP", True),
    ("203.0.113.7", 443, "TCP", True),
    ("2001:db8::7", 443, "TCP", True),
    ("redis", 6379, "TCP", True),
    ("redis", 443, "TCP", False),
    ("default", 6379, "TCP", False),
    ("10.96.0.1", 6379, "TCP", False),
    ("kube-system", 443, "TCP", False),
    ("default", 8080, "TCP", False),
    ("169.254.169.254", 53, "UDP", False),
    ("169.254.169.254", 80, "TCP", False),
    ("169.254.169.254", 443, "TCP", False),
    ("169.254.20.10", 443, "TCP", False),
    ("203.0.113.7", 53, "UDP", False),
    ("10.96.0.1", 443, "TCP", False),
    ("fd00::1", 443, "TCP", False),
]


@pytest.mark.parametrize(("to", "port", "protocol", "passes"), EGRESS)
def test_egress(kubernetes: dict[str, Any], to: str, port: int, protocol: str, passes: bool) -> None:
    """Pods reach DNS, wherever the cluster has it, fal and a Redis, and neither other pods nor a cloud's metadata."""

    def is_peer(peer: dict[str, Any]) -> bool:
        """Tell whether the peer of a rule has that destination."""
        if "podSelector" in peer:
            assert peer.keys() == {"podSelector"}  # in the namespace of the proxy
            return bool(peer["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": to})
        if "ipBlock" not in peer:
            assert peer.keys() == {"namespaceSelector"}
            labels = peer["namespaceSelector"].get("matchLabels", {})
            return not re.search("[.:]", to) and labels in ({}, {"kubernetes.io/metadata.name": to})
        block = peer["ipBlock"]
        within = (
            [ip_address(to) in ip_network(net) for net in (block["cidr"], *block.get("except", []))] if is_ip else []
        )
        return bool(within) and within[0] and not any(within[1:])

    is_ip = bool(re.search("[.:]", to))
    rules = kubernetes["NetworkPolicy"]["spec"]["egress"]
    found = any(
        {"port": port, "protocol": protocol} in rule["ports"] and any(map(is_peer, rule["to"])) for rule in rules
    )
    assert found is passes


def test_pods_have_no_rights(kubernetes: dict[str, Any]) -> None:
    """Pods meet the "restricted" pod security standard, cannot write files, and have no token of the cluster."""
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
