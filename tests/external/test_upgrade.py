"""docs/upgrade.md is true: its commands are those of docs/deploy.md, and docs/README.md leads to each page."""

import re
import sqlite3
import subprocess
from pathlib import Path

from tests.support.deploy_files import UNIT
from tests.support.pages import Page
from tests.support.tools import ROOT, tool

PAGE = Page("docs/upgrade.md")
DEPLOY = Page("docs/deploy.md")
TROUBLESHOOT = Page("docs/troubleshoot.md")


def test_commands() -> None:
    """An upgrade installs and starts as the first installation did, except that it upgrades and restarts."""
    install = DEPLOY.command("install").splitlines()[1].replace("pip install", "pip install --upgrade")
    copy, reload, _ = DEPLOY.command("units").splitlines()
    restart = f"sudo systemctl restart {UNIT.name}"
    assert PAGE.command("systemd").splitlines() == [install, copy, reload, restart]
    assert restart in DEPLOY.text
    assert PAGE.command("docker") == DEPLOY.command("docker")
    assert PAGE.command("after") == TROUBLESHOOT.command("log")


def test_backup(tmp_path: Path) -> None:
    """The command copies a file of SQLite."""
    tool("sqlite3")
    store, copy = tmp_path / "spending.sqlite", tmp_path / "copy.sqlite"
    with sqlite3.connect(store) as database:
        database.execute("CREATE TABLE t (x)")
    database.close()
    command = PAGE.command("backup").removeprefix("sudo ")
    for path, own in (("/var/lib/tornado-fal-proxy/spending.sqlite", store), ("/root/spending.sqlite", copy)):
        assert path in command
        command = command.replace(path, str(own))
    subprocess.run(["sh", "-c", command], check=True)
    assert copy.stat().st_size == store.stat().st_size


def test_index() -> None:
    """docs/README.md leads to each page of docs/."""
    links = set(re.findall(r"\]\(([\w-]+\.md)\)", Page("docs/README.md").text))
    assert links == {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
