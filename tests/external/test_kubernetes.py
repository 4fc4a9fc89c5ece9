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

from tests.support.deploy_files import (
    ADMIN_PORT,
    INGRESS,
    KUBERNETES,
    KUSTOMIZATION,
    LONGEST_END_S,
    NGINX,
    VALUES,
    run,
    start,
    the,
)
from tests.support.load import respond
from tests.support.proxy import KEY, Setup
from tests.support.raw_client import call
from tests.support.tools import tool
from tests.support.waiting import eventually
from tornado_fal_proxy.config import DEFAULT_ROUTE
from tornado_fal_proxy.service.options import parse_settings
from tornado_fal_proxy.service.settings import DEFAULT_DRAIN_TIMEOUT_S

# A release that clouds still offer, and the newest that has schemas.
KUBERNETES_VERSIONS = ("1.29", "1.34")


@pytest.fixture
def kubernetes() -> dict[str, Any]:
    """Return the objects by kind."""
    return {found["kind"]: found for file in (KUBERNETES, INGRESS) for found in yaml.safe_load_all(file.read_text())}


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_kubernetes_is_right(version: str) -> None:
    """Each object conforms to the schemas of Kubernetes, and has no field beyond them."""
    program = tool("kubernetes-validate")
    run(program, "--strict", "--quiet", f"--kubernetes-version={version}", KUBERNETES, INGRESS, VALUES)


def field_at(found: Any, path: str) -> tuple[Any, Any]:
    """Return where kustomize puts a value by that path, as a list or an object, and an index or a name of it."""
    *way, last = [name.replace("\\", "") for name in re.split(r"(?<!\\)\.", path)]
    for name in way:
        if match := re.fullmatch(r"\[(\w+)=(\w+)\]", name):
            (found,) = [each for each in found if each[match[1]] == match[2]]
        else:
            found = found[int(name) if isinstance(found, list) else name]
    return found, int(last) if isinstance(found, list) else last


def test_values(kubernetes: dict[str, Any]) -> None:
    """Each value has a place where the objects have the same value, and all that differs between clusters is one."""
    kustomization, values = (yaml.safe_load(file.read_text()) for file in (KUSTOMIZATION, VALUES))
    assert kustomization["resources"] == [KUBERNETES.name, INGRESS.name, VALUES.name]
    assert values["metadata"]["annotations"] == {"config.kubernetes.io/local-config": "true"}
    placed = {}
    for replacement in kustomization["replacements"]:
        source = replacement["source"]
        name = source["fieldPath"].removeprefix("data.")
        assert (source["kind"], source["name"]) == (values["kind"], values["metadata"]["name"])
        for target in replacement["targets"]:
            found = kubernetes[target["select"]["kind"]]
            assert found["metadata"]["name"] == target["select"]["name"]
            for path in target["fieldPaths"]:
                inside, key = field_at(found, path)
                text = values["data"][name]
                if "options" in target:
                    assert target["options"] == {"delimiter": "=", "index": 1}
                    text = f"--trusted-proxies={text}"
                assert inside[key] == text
                inside[key] = placed[name] = f"<{name}>"
    assert placed.keys() == values["data"].keys()
    # No value stands in a place beside those.
    assert not [text for text in values["data"].values() if re.search(rf"\b{re.escape(text)}\b(?!\.)", str(kubernetes))]


def test_ingress(kubernetes: dict[str, Any]) -> None:
    """The ingress has the route, the Service, and the sizes, limits and times of nginx's file."""
    ingress = kubernetes["Ingress"]
    name = {key.rpartition("/")[2]: text for key, text in ingress["metadata"]["annotations"].items()}
    nginx = NGINX.read_text()

    def of_nginx(pattern: str) -> str:
        (text,) = re.findall(pattern, nginx, re.MULTILINE)
        return str(text)

    assert name["proxy-body-size"] == of_nginx(r"^ *client_max_body_size (\w+);")
    assert {name["proxy-read-timeout"], name["proxy-send-timeout"]} == {of_nginx(r"^ *proxy_read_timeout (\d+)s;")}
    assert name["limit-rps"] == of_nginx(r" rate=(\d+)r/s;")
    assert int(name["limit-rps"]) * int(name["limit-burst-multiplier"]) == int(of_nginx(r" burst=(\d+) nodelay;"))
    assert name["limit-connections"] == of_nginx(r"^ *limit_conn \w+ (\d+);")
    assert (name["proxy-buffering"], name["proxy-next-upstream"]) == ("off", "off")
    (path,) = ingress["spec"]["rules"][0]["http"]["paths"]
    assert (path["path"], path["pathType"]) == (DEFAULT_ROUTE, "Exact")
    service = kubernetes["Service"]
    assert path["backend"]["service"]["name"] == service["metadata"]["name"]
    assert path["backend"]["service"]["port"] == {"name": service["spec"]["ports"][0]["name"]}


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
    ("10.96.0.10", 53, "UDP", True),
    ("10.96.0.10", 53, "TCP", True),
    ("10.96.0.10", 443, "TCP", False),
    ("10.96.0.11", 53, "UDP", False),
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
