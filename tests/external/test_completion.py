"""The scripts for shells complete options, groups, files and commands."""

import subprocess
from pathlib import Path

import pytest

from tests.support.service_process import environment, shell
from tests.support.tools import tool

# What was typed, and some of what the shell must offer for the last word.
TYPED = [
    (["--allowed-h"], {"--allowed-hosts"}),
    (["--help", "acc"], {"access"}),
    (["--config", "opt"], {"options.toml"}),
    (["ch"], {"check"}),
    (["check", "--proc"], {"--processes"}),
    (["usage", "--for"], {"--format"}),
    (["usage", "--by", "us"], {"user"}),
    (["completion", "fi"], {"fish"}),
    (["doctor", "--or"], {"--origin"}),
    (["doctor", "https://a.example/", "--ca-certs", "opt"], {"options.toml"}),
]
BASH = """
source ./script.bash
COMP_WORDS=(tornado-fal-proxy "$@") COMP_CWORD=$#
_shtab_tornado_fal_proxy tornado-fal-proxy "${!#}" "${COMP_WORDS[COMP_CWORD - 1]}" 2>/dev/null
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("completion")
    (directory / "options.toml").touch()
    return directory


def run(directory: Path, name: str, *argv: str) -> set[str]:
    """Return the first words of what a shell offers, with its script in the file ``script.<name>``."""
    program, script = tool(name), directory / f"script.{name}"
    if not script.exists():
        made = shell("", "completion", name)
        assert (made.returncode, made.stderr) == (0, "")
        script.write_text(made.stdout)
    ended = subprocess.run(
        [program, *argv],
        cwd=directory,
        env=environment({"HOME": str(directory)}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stderr == ""
    return {line.split()[0] for line in ended.stdout.splitlines() if line}


@pytest.mark.parametrize(("words", "offered"), TYPED)
def test_bash(directory: Path, words: list[str], offered: set[str]) -> None:
    """bash offers what can stand there, and nothing that begins otherwise."""
    found = run(directory, "bash", "-c", BASH, "bash", *words)
    assert offered <= found
    assert all(word.startswith(words[-1]) for word in found)


@pytest.mark.parametrize(("words", "offered"), TYPED)
def test_fish(directory: Path, words: list[str], offered: set[str]) -> None:
    """Likewise fish."""
    line = " ".join(["tornado-fal-proxy", *words])
    found = run(directory, "fish", "--no-config", "-c", f"source script.fish; complete -C '{line}'")
    assert offered <= found


def test_zsh(directory: Path) -> None:
    """The script for zsh has no fault in its syntax, and the options."""
    assert run(directory, "zsh", "-f", "-n", "script.zsh") == set()
    assert '"--allowed-hosts[hosts of' in (directory / "script.zsh").read_text()


@pytest.mark.parametrize("argv", [["completion"], ["completion", "tcsh"], ["completion", "bash", "fish"]])
def test_other_shells(argv: list[str]) -> None:
    """Other shells, or none, end with one line that names those that there are."""
    ended = shell("", *argv)
    line = "tornado-fal-proxy: completion: takes the name of a shell, one of bash, zsh, fish\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", line)
