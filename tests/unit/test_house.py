"""The layout of the package (docs/design.md) and two rules of its prose (CONTRIBUTING.md), read from the source."""

import ast
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tornado_fal_proxy"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Which room or module may import which, beside itself. The command may import everything, and nothing the command.
CROSSINGS = {
    "_version": set(),
    "_extras": set(),
    "_sweep": set(),
    "_tasks": set(),
    "errors": set(),
    "memory": set(),
    "logs": set(),
    "rules": {"errors", "_version"},
    "credentials": {"errors"},
    "option_fields": {"rules"},
    "config": {"rules", "spending", "option_fields", "credentials", "errors"},
    "spending": {"rules", "errors", "_extras", "_tasks"},
    "telemetry": {"rules", "errors"},
    "upstream": {"rules", "config", "memory", "errors", "_sweep"},
    "relay": {"upstream", "rules", "spending", "config", "telemetry", "errors", "_sweep"},
    "handler": {"relay", "upstream", "rules", "spending", "config", "credentials", "telemetry", "errors", "_tasks"},
    "webhooks": {"relay", "rules", "config"},
    "doctor": {"rules", "config", "errors"},
    "sandbox": set(),
    "__init__": {"handler", "relay", "rules", "config", "telemetry", "errors", "_version"},
    "__main__": {"service"},
}
# The words that no sentence has as its subject.
SUBJECT = re.compile(r"(?:\A|[.!?]\s+)((?:What|Of|Who|How|Whether|That|Such|Those) \w+(?: \w+)?)")


def room(module: str) -> str:
    """Return the room, or the module at the top, that holds ``tornado_fal_proxy.<module>``."""
    return module.partition(".")[0]


def imports(path: Path) -> Iterator[str]:
    """Yield the modules of the package that a file imports for any purpose, without the package's name."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tornado_fal_proxy"):
            found = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if is_module(name) else node.module for name in found]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("tornado_fal_proxy")]
        yield from (name.partition(".")[2] or "__init__" for name in names)


def is_module(name: str) -> bool:
    """Tell whether ``name`` is a module or a folder of the package."""
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def module_of(path: Path) -> str:
    """Return the name of a file's module, without the package's name."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_crossings(path: Path) -> None:
    """A module imports from the rooms that its own may import from, and from no other."""
    own = room(module_of(path))
    if own != "service":
        assert {room(module) for module in imports(path)} - {own} <= CROSSINGS[own]


def test_sandbox_is_imported_when_it_is_asked_for() -> None:
    """The command imports the sandbox, which needs more packages, inside functions only."""
    for path in (PACKAGE / "service").glob("*.py"):
        top = ast.parse(path.read_text("utf-8")).body
        assert not [node for node in top if isinstance(node, ast.ImportFrom) and "sandbox" in str(node.module)]


def test_no_circle() -> None:
    """No module imports itself by way of others, not even for types."""
    edges = {module_of(path).removesuffix(".__init__"): set(imports(path)) for path in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for other in edges.get(module, ()):
                visit(other, (*path, module))
            done.add(module)

    for module in edges:
        visit(module, ())


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_length(path: Path) -> None:
    """A file can be read in one sitting."""
    assert len(path.read_text("utf-8").splitlines()) <= 450


def prose(path: Path) -> Iterator[str]:
    """Yield the docstrings of a file, and its comments that begin a line."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""
    with tokenize.open(path) as file:
        comment = ""
        for token in tokenize.generate_tokens(file.readline):
            if token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip():
                comment += token.string.lstrip("#:") + " "
            elif token.type != tokenize.NL and comment:
                yield comment.strip()
                comment = ""


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_subjects(path: Path) -> None:
    """No sentence begins with a relative word as its subject, which is hard to read."""
    found = [match[1] for text in prose(path) for match in SUBJECT.finditer(text)]
    assert not [text for text in found if not text.startswith(("How to", "Of these"))]


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_functions_have_imperative_docstrings(path: Path) -> None:
    """A function's docstring begins with a verb: no article, pronoun or third person."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_docstring(node)):
            if any(isinstance(each, ast.Name) and each.id == "property" for each in node.decorator_list):
                continue
            first = text.split()[0].strip(".,:`*")
            assert not re.fullmatch(r"(The|A|An|This|It|Where|When|As|All|One|In|For|From|\w+[^su]s)", first), text


@pytest.mark.parametrize("path", sorted((PACKAGE / "rules").glob("*.py")), ids=module_of)
def test_rules_are_pure(path: Path) -> None:
    """The rules use nothing that does I/O, reads the clock or the environment, or logs."""
    names = {
        alias.name if isinstance(node, ast.Import) else str(node.module)
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    pure = {"__future__", "collections", "dataclasses", "functools", "ipaddress", "json", "re", "typing", "urllib"}
    assert {name.partition(".")[0] for name in names} - pure <= {"tornado_fal_proxy"}
