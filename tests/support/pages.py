"""Read the pages of the documentation: tests run the blocks of code that stand there.

A comment before each block says what it is, and names it: ``<!-- command: NAME -->`` for the shell,
``<!-- file: NAME -->`` for a file to write, and ``<!-- part: NAME -->`` for a part of a file or of an output.
"""

import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.support.tools import ROOT

__all__ = ["MARKED", "Page"]

# A block of code with its comment: kind and name, then language and text.
MARKED = re.compile(r"^ *<!-- (command|file|part): ([\w./-]+) -->\n *```(\w+)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)


class Page:
    """A page, and the blocks of code that it has."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.text = (ROOT / path).read_text("utf-8")
        self._blocks = {(kind, name): textwrap.dedent(code) for kind, name, _, code in MARKED.findall(self.text)}

    def names(self, kind: str) -> list[str]:
        """Return the names of all blocks of that kind, in their order."""
        return [name for each, name in self._blocks if each == kind]

    def command(self, name: str) -> str:
        """Return the lines for the shell."""
        return self._blocks["command", name].strip()

    def file(self, name: str) -> str:
        """Return the text of a file."""
        return self._blocks["file", name]

    def part(self, name: str) -> str:
        """Return the text of a part."""
        return self._blocks["part", name]

    def run(self, name: str) -> dict[str, Any]:
        """Run a file of Python as a program of its own would be run, and return its names."""
        names: dict[str, Any] = {"__name__": "docs"}
        exec(compile(self.file(name), f"{self.path}: {name}", "exec"), names)
        return names

    def write_module(self, name: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Write a file of Python to ``directory``, from where the test alone imports it."""
        (directory / f"{name}.py").write_text(self.file(f"{name}.py"))
        monkeypatch.syspath_prepend(str(directory))
        monkeypatch.setitem(sys.modules, name, sys)  # what is imported in its place is forgotten with it
        del sys.modules[name]
