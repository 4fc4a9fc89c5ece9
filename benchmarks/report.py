"""The results as Markdown and as a plot."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.bench import FULL, Bench, Row, Scale
from benchmarks.figures import Figure, Verdict, judge
from benchmarks.peers import ROOT, TITLES

__all__ = ["markdown", "plot", "section", "with_rounds"]

PYTHON_PACKAGES = ("tornado", "pycurl", "aiohttp", "fastapi", "httpx", "uvicorn", "flask", "requests", "gunicorn")


_INTRODUCTION = """\
# Results of the benchmark

Written by `{command}` on {date:%Y-%m-%d}, in {minutes:.0f} minutes. Medians of rounds; ratios are taken in each round,
between servers that took turns. The module of each row in `benchmarks/rows/` describes how it is measured. Only ratios
carry over to other machines.
"""


def with_rounds(scale: Scale, rounds: int) -> Scale:
    """Return ``scale`` with that number of rounds in every row."""
    return dataclasses.replace(scale, rounds=rounds, memory_rounds=rounds)


def _number(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3}f}"


def _spread(values: Sequence[float]) -> str:
    return f"{_number(min(values))} to {_number(max(values))}" if len(values) > 1 else "one round"


def _ratio(figure: Figure, ours: Figure | None) -> str:
    """Return the median over rounds of the peer's value divided by this proxy's."""
    if ours is None or ours is figure or not all(ours.values):
        return ""
    ratios = [other / mine for other, mine in zip(figure.values, ours.values, strict=False)]
    return f"{_number(statistics.median(ratios))} x"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def _verdicts(results: Mapping[Row, Sequence[Figure]]) -> list[str]:
    rows = []
    for row, figures in results.items():
        for target in row.targets:
            verdict = judge(target, figures, "ours")
            if verdict is not None:
                rows.append(_verdict(verdict))
    head = ("measure", "against", "target", "reached", "spread over rounds", "")
    return _table(head, rows) if rows else []


def _verdict(verdict: Verdict) -> Sequence[str]:
    target = verdict.target
    unit = verdict.figure.unit if verdict.reference is None or target.difference else "x"
    against = TITLES[target.reference] if target.reference else ""
    if target.reference == "ours":
        against = target.reference_measure
    bound = f"at {'least' if target.at_least else 'most'} {target.bound:g} {unit}{' more' if target.difference else ''}"
    reached = f"{_number(verdict.median)} {unit}"
    return (target.measure, against, bound, reached, _spread(verdict.values), "met" if verdict.met else "**missed**")


def section(row: Row, figures: Sequence[Figure], bench: Bench) -> list[str]:
    """Return the lines of a row: a table for each measure, and the peers that could not be measured."""
    lines = ["", f"## {row.title}", ""]
    for measure in dict.fromkeys(figure.measure for figure in figures):
        these = [figure for figure in figures if figure.measure == measure]
        unit = f", {these[0].unit}" if these[0].unit else ""
        ours = next((figure for figure in these if figure.peer == "ours"), None)
        rows = [(TITLES[f.peer], _number(f.median), _spread(f.values), _ratio(f, ours), f.note) for f in these]
        lines += [*_table((measure, f"median{unit}", "spread over rounds", "of this proxy's", ""), rows), ""]
    for (row_name, peer), reason in bench.failures.items():
        if row_name == row.name:
            lines.append(f"- {TITLES[peer]}: not measured: {' '.join(reason.split())[:300]}")
    return lines if figures or lines[3:] else []


def markdown(results: Mapping[Row, Sequence[Figure]], bench: Bench, *, command: str, seconds: float) -> str:
    """Return the text of RESULTS.md."""
    lines = [_INTRODUCTION.format(command=command, date=datetime.now(UTC), minutes=seconds / 60)]
    lines += _table(("machine and versions", ""), _versions())
    if bench.scale.held == FULL.held:
        lines += ["", "## The targets", "", *_verdicts(results)]
    else:
        lines += ["", "**Tiny counts (`--quick`): these figures mean nothing.**"]
    for row, figures in results.items():
        lines += section(row, figures, bench)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def _versions() -> list[tuple[str, str]]:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    machine = [
        f"{os.cpu_count()} CPUs ({cpu[1] if cpu else platform.machine()})",
        f"{int(memory[1]) / 2**20 if memory else 0:.0f} GB",
        f"Linux {platform.release()}",
    ]
    rows = [
        ("machine", ", ".join(machine)),
        ("this proxy", _first_line("git", "-C", str(ROOT), "describe", "--always", "--dirty")),
        ("Python", f"{platform.python_version()}: " + ", ".join(map(_package, PYTHON_PACKAGES))),
        ("libcurl", _libcurl()),
    ]
    packages = json.loads((Path(__file__).parent / "package.json").read_text())["dependencies"]
    rows.append(("Node", f"{_first_line('node', '--version')}: " + ", ".join(f"{k} {v}" for k, v in packages.items())))
    nginx = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin") or "nginx"
    rows.append(("nginx", _first_line(nginx, "-v").removeprefix("nginx version: ")))
    return rows


def _package(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"no {name}"


def _libcurl() -> str:
    import pycurl

    return pycurl.version


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    except OSError:
        return "not installed"
    return ((done.stdout or done.stderr).splitlines() or ["unknown"])[0]


def plot(results: Mapping[Row, Sequence[Figure]], path: Path) -> bool:
    """Plot CPU per relay and memory per held poll of all peers, as SVG. Return False if neither was measured."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "benchmarks"
    from matplotlib import pyplot

    panels = [(row, figures) for row, figures in results.items() if row.name in ("cpu", "held") and figures]
    if not panels:
        return False
    canvas, axes = pyplot.subplots(len(panels), 1, figsize=(8, 3.6 * len(panels)), squeeze=False)
    for (_, figures), axis in zip(panels, axes[:, 0], strict=True):
        first = [figure for figure in figures if figure.measure == figures[0].measure]
        bars = sorted(first, key=lambda figure: figure.median, reverse=True)
        colours = ["tab:orange" if figure.peer == "ours" else "tab:gray" for figure in bars]
        drawn = axis.barh([TITLES[figure.peer] for figure in bars], [figure.median for figure in bars], color=colours)
        axis.bar_label(drawn, [f"{_number(figure.median)} {figure.unit}" for figure in bars], padding=3)
        axis.margins(x=0.15)
        axis.set_title(figures[0].measure)
        axis.set_xlabel(figures[0].unit)
    canvas.tight_layout()
    canvas.savefig(path, metadata={"Date": None})
    pyplot.close(canvas)
    return True
