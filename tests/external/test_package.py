"""Published files: a wheel that has the package and nothing else, and an sdist that makes the same wheel."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email.message import Message
from email.parser import BytesParser
from pathlib import Path

import pytest

from tests.support.tools import ROOT, tool
from tornado_fal_proxy import __version__

DIST_INFO = f"tornado_fal_proxy-{__version__}.dist-info/"
# No variable of Python or pip may change a build: with those of a test run, a build tool's warning may be an error.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}


def run(*command: str | Path, cwd: Path) -> str:
    """Return the output of a command that must succeed."""
    result = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def project() -> set[str]:
    """Return the files of the project, without those that git ignores."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    listed = run(tool("git"), "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    return {name for name in listed if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def copy(project: set[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a clean copy of the project: building would leave files in the tree."""
    copy = tmp_path_factory.mktemp("project")
    for name in project:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def sdist(copy: Path) -> Path:
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", "sdist", cwd=copy)
    (path,) = (copy / "sdist").iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(copy: Path) -> Path:
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", "wheel", cwd=copy)
    (path,) = (copy / "wheel").iterdir()
    return path


def test_wheel(project: set[str], wheel: Path) -> None:
    """The wheel is for every platform and has the package's files, each as it is in the tree, and nothing else."""
    assert wheel.name == f"tornado_fal_proxy-{__version__}-py3-none-any.whl"
    files = contents(wheel)
    package = {name: (ROOT / name).read_bytes() for name in project if name.startswith("tornado_fal_proxy/")}
    assert {name: data for name, data in files.items() if not name.startswith(DIST_INFO)} == package
    assert {"tornado_fal_proxy/py.typed", "tornado_fal_proxy/sandbox/page.html"} <= package.keys()
    licences = [name for name in files if name.startswith(DIST_INFO) and name.endswith("/LICENSE")]
    assert [files[name] for name in licences] == [(ROOT / "LICENSE").read_bytes()]
    assert files[DIST_INFO + "entry_points.txt"].decode().split() == [
        *("[console_scripts]", "tornado-fal-proxy", "=", "tornado_fal_proxy.service:main")
    ]


def test_metadata(wheel: Path) -> None:
    """Name, version, licence, Python range, extras and the page that an index shows are as declared."""
    metadata: Message = BytesParser().parsebytes(contents(wheel)[DIST_INFO + "METADATA"])
    assert (metadata["Name"], metadata["Version"]) == ("tornado-fal-proxy", __version__)
    assert metadata.get("License-Expression", metadata["License"]) == "MIT"
    assert metadata["Requires-Python"] == ">=3.11"
    extras = {"sandbox", "metrics", "br", "redis", "webhooks", "completion", "fuzz", "test"}
    assert set(metadata.get_all("Provides-Extra", [])) == extras
    required = {
        requirement.partition(">")[0].partition("<")[0]
        for requirement in metadata.get_all("Requires-Dist", [])
        if "extra" not in requirement
    }
    assert required == {"tornado", "pycurl"}
    assert metadata["Description-Content-Type"] == "text/markdown"
    text = metadata.get_payload(decode=True)
    assert isinstance(text, bytes)
    assert text.strip() == (ROOT / "README.md").read_bytes().strip()


def test_sdist(project: set[str], sdist: Path, wheel: Path, tmp_path: Path) -> None:
    """The sdist has all files that builds and tests need, none from outside the project, and makes the same wheel."""
    run("tar", "-xzf", sdist, cwd=tmp_path)
    (top,) = tmp_path.iterdir()
    files = {str(path.relative_to(top)) for path in top.rglob("*") if path.is_file()}
    made = {name for name in files if name == "PKG-INFO" or name.startswith("tornado_fal_proxy.egg-info/")}
    assert files - made <= project
    folders = ("tornado_fal_proxy/", "tests/", "docs/", "examples/", "deploy/", "fuzz/", "soak/", ".ci/", "scripts/")
    single = {"CHANGELOG.md", "LICENSE", "README.md", "ruff.toml", "setup.cfg", "setup.py"}
    assert {name for name in project if name.startswith(folders) or name in single} <= files

    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path / "wheel", cwd=top)
    (again,) = (tmp_path / "wheel").iterdir()
    assert contents(again) == contents(wheel)


def test_installs(wheel: Path, tmp_path: Path) -> None:
    """The wheel installs into a fresh environment, and both ways to start the command work there."""
    environment = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    python = environment / "bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", wheel, cwd=tmp_path)
    # Its requirements are borrowed from here, and found after the packages that are installed there.
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = run(python, "-c", "import tornado_fal_proxy; print(tornado_fal_proxy.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(site)
    for command in ([environment / "bin/tornado-fal-proxy"], [python, "-m", "tornado_fal_proxy"]):
        assert run(*command, "--version", cwd=tmp_path) == f"tornado-fal-proxy {__version__}\n"
