"""docs/deploy.md is true: its steps for systemd and nginx are executed, and agree with the files of deploy/ elsewhere.

The steps run in a copy of /etc and an empty /opt of their own. systemctl works on these files and starts nothing.
"""

import os
import re
import subprocess
from pathlib import Path

import yaml

from tests.support.certificates import Authority
from tests.support.deploy_files import COMPOSE, DOCKERFILE, KUBERNETES, NGINX, SOCKET, UNIT
from tests.support.pages import Page
from tests.support.proxy import KEY
from tests.support.tools import ROOT, isolated, tool
from tornado_fal_proxy.service.options import parse_settings

PAGE = Page("docs/deploy.md")
README = Page("README.md")
PROXY, WEB_PAGE = "fal.example.net", "www.example.net"
# Programs that stand in front of the host's own.
SYSTEMCTL = """#!/bin/sh
case "$*" in
    daemon-reload) ;;
    "enable --now "*) shift 2; exec {systemctl} --root=/ enable "$@" ;;
    *) exit 1 ;;
esac
"""
NGINX_PROGRAM = """#!/bin/sh
test "$*" = "-s reload" || exec {nginx} "$@"
"""
SUDO = """#!/bin/sh
exec "$@"
"""
PREPARE = """
set -e
cp -a /etc/. {etc}/ 2>/dev/null || true
mount --bind {etc} /etc
mount --bind {opt} /opt
ip link set lo up
"""


def run_steps(folder: Path, script: str, given: str = "") -> Path:
    """Run lines of the shell in the project's folder, with /etc and /opt of their own, and return that /etc."""
    etc, opt, programs = (folder / name for name in ("etc", "opt", "bin"))
    for each in (etc, opt, programs):
        each.mkdir()
    texts = {"sudo": SUDO, "nginx": NGINX_PROGRAM, "systemctl": SYSTEMCTL}
    for name, text in texts.items():
        path = programs / name
        path.write_text(text.format(systemctl=tool("systemctl"), nginx=tool("nginx")))
        path.chmod(0o755)
    script = PREPARE.format(etc=etc, opt=opt) + script.replace("PROXY.NAME", PROXY).replace("PAGE.NAME", WEB_PAGE)
    ended = subprocess.run(
        [*isolated(), "bash", "-e", "-c", script],
        cwd=ROOT,
        env={"PATH": f"{programs}:{os.environ['PATH']}:/usr/sbin"},
        input=given,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return etc


def test_systemd(tmp_path: Path) -> None:
    """The steps put key, options and units where the units expect them, and enable both units."""
    steps = "\n".join(PAGE.command(name) for name in ("key", "options", "units"))
    etc = run_steps(tmp_path, steps, KEY + "\n")
    key = etc / "tornado-fal-proxy/key"
    assert key.stat().st_mode & 0o777 == 0o600
    (line,) = (etc / "tornado-fal-proxy/options").read_text().splitlines()
    settings = parse_settings([], {"FAL_KEY_FILE": str(key), **dict([line.split("=", 1)])})
    assert settings.relay is not None
    assert (settings.relay.key, settings.relay.allowed_endpoints) == (KEY, ("fal-ai/flux/**",))
    for unit, target in ((UNIT, "multi-user.target"), (SOCKET, "sockets.target")):
        assert (etc / "systemd/system" / unit.name).read_bytes() == unit.read_bytes()
        assert (etc / "systemd/system" / f"{target}.wants" / unit.name).is_symlink()
    assert f"LoadCredential=fal_key:/{key.relative_to(etc.parent)}" in UNIT.read_text()
    assert "EnvironmentFile=-/etc/tornado-fal-proxy/options" in UNIT.read_text()


def test_systemd_is_installed_as_in_the_image() -> None:
    """The proxy is installed where the unit starts it, with the extras of the image."""
    make, install = PAGE.command("install").splitlines()
    (extras,) = re.findall(r"pip install .*\[(br,.*)\]", DOCKERFILE.read_text())
    assert install.endswith(f"/bin/pip install '.[{extras}]'")
    assert f"ExecStart={make.split()[-1]}/bin/tornado-fal-proxy " in UNIT.read_text()
    health, journal = PAGE.command("look").splitlines()
    (address,) = re.findall(r"^ListenStream=(.*)", SOCKET.read_text(), re.MULTILINE)
    assert health == f"curl http://{address}/healthz"
    assert journal == f"journalctl -u {UNIT.stem}"


def test_nginx(tmp_path: Path, authority: Authority) -> None:
    """nginx accepts the file after the steps, with the names in the places of the examples'."""
    folder = f"/etc/ssl/{PROXY}"
    issued = tmp_path / "issued.pem"
    authority.write_certificate(issued, PROXY)
    place = "".join(f"install -D {issued} {folder}/{name}.pem\n" for name in ("fullchain", "privkey"))
    etc = run_steps(tmp_path, place + PAGE.command("nginx"))
    text = (etc / "nginx/conf.d/tornado-fal-proxy.conf").read_text()
    assert "example.com" not in re.sub("#.*", "", text)
    assert f"server_name {PROXY};" in text
    assert f"https://{WEB_PAGE} $http_origin;" in text
    assert PAGE.command("nginx") == README.command("nginx")


def test_nginx_is_described() -> None:
    """The page has the limits and the names of nginx's file."""
    text = NGINX.read_text("utf-8")
    (rate,), (burst,) = re.findall(r"rate=(\d+)r/s;", text), re.findall(r"burst=(\d+) nodelay;", text)
    (at_once,) = re.findall(r"limit_conn \w+ (\d+);", text)
    assert f"{rate} calls a second (bursts of {burst}) and have {at_once} calls open" in PAGE.text
    names = set(re.findall(r"[\w.-]+\.example\.com", text.partition("upstream ")[2]))
    assert names == {"fal-proxy.example.com", "app.example.com"}
    assert PAGE.command("look-at-nginx") == "curl -i https://PROXY.NAME/api/fal/proxy"


def test_docker(tmp_path: Path) -> None:
    """The steps are those of the compose file, and put the key where it is read."""
    command = PAGE.command("docker-key")
    compose = yaml.safe_load(COMPOSE.read_text())
    path = (COMPOSE.parent / compose["secrets"]["fal_key"]["file"]).relative_to(ROOT)
    assert command.split()[-1] == str(path)
    metrics = PAGE.command("look-at-docker").splitlines()[1]
    for line in (PAGE.command("docker"), metrics.replace(f"-f {path.parent}/compose.yaml ", "")):
        assert line in COMPOSE.read_text()
    key = tmp_path / "fal_key"
    run_steps(tmp_path, command.replace(str(path), str(key)), KEY)
    assert (key.stat().st_mode & 0o777, key.read_text()) == (0o400, KEY)


def test_kubernetes() -> None:
    """The steps build the image and name the secret and the objects of the file."""
    build, push = PAGE.command("image").splitlines()
    objects = list(yaml.safe_load_all(KUBERNETES.read_text()))
    deployment = next(each for each in objects if each["kind"] == "Deployment")
    image = deployment["spec"]["template"]["spec"]["containers"][0]["image"]
    assert build == f"docker build -t {image} -f {DOCKERFILE.relative_to(ROOT)} ."
    assert push == f"docker push {image}"
    secret, apply = PAGE.command("kubernetes").splitlines()
    assert secret.split()[-2:] == ["tornado-fal-proxy", "--from-file=key=FILE"]
    assert deployment["spec"]["template"]["spec"]["volumes"][0]["secret"]["secretName"] == "tornado-fal-proxy"
    assert apply.split()[-1] == str(KUBERNETES.relative_to(ROOT))
    for line in PAGE.command("look-at-kubernetes").splitlines():
        assert line.endswith(f" deployment/{deployment['metadata']['name']}")
