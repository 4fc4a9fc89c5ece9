"""One command that measures, prints a table, and writes RESULTS.md and a plot.

``python -m benchmarks`` in the root of the checkout runs everything; ``--help`` shows how to choose.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import resource
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import isolation, report
from benchmarks.bench import FULL, QUICK, Bench, Row, cpus
from benchmarks.figures import Figure
from benchmarks.peers import PEERS, ours_before
from benchmarks.rows import ROWS
from benchmarks.servers import make_certificates, upstream

__all__ = ["main"]

HTTPS_PORT = 443
# Open files of each process: 10,000 held calls take 20,000 in a proxy that makes a connection for each.
OPEN_FILES = 65_536


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    rows, peers = [row.name for row in ROWS], [peer.name for peer in PEERS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=_names, default=rows, help=f"some of {','.join(rows)}")
    parser.add_argument("--peers", type=_names, default=peers, help=f"some of {','.join(peers)}")
    parser.add_argument(
        "--quick", action="store_true", help="tiny counts, to show that everything works; the figures mean nothing"
    )
    parser.add_argument("--rounds", type=int, help="rounds of each row instead of its own number")
    parser.add_argument("--no-isolation", action="store_true", help="stay in this network; several peers cannot run")
    parser.add_argument(
        "--output", type=Path, help="directory for RESULTS.md and plot.svg (default: benchmarks/, none with --quick)"
    )
    parser.add_argument(
        "--before", type=Path, metavar="CHECKOUT", help="measure this proxy of another checkout too, beside this one"
    )
    options = parser.parse_args(argv)
    for given, known in ((options.rows, rows), (options.peers, peers)):
        if unknown := sorted(set(given) - set(known)):
            parser.error(f"unknown: {', '.join(unknown)}; choose from {','.join(known)}")
    return options


def _log(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _raise_open_files() -> int:
    """Allow as many open files as possible, for this process and those it starts, and return their number."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in (max(hard, OPEN_FILES), hard):
        with contextlib.suppress(ValueError, PermissionError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
            return limit
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


async def _measure(options: argparse.Namespace, directory: Path) -> tuple[dict[Row, list[Figure]], Bench]:
    isolated = isolation.is_inside()
    os.sched_setaffinity(0, cpus()[1])
    make_certificates(directory)
    scale = QUICK if options.quick else FULL
    if options.rounds:
        scale = report.with_rounds(scale, options.rounds)
    before = [ours_before(options.before.resolve())] if options.before else []
    with upstream(directory, HTTPS_PORT if isolated else 0, cpus()[1]) as started:
        bench = Bench(
            scale=scale,
            upstream=started,
            peers=(*(peer for peer in PEERS if peer.name in options.peers), *before),
            directory=directory,
            isolated=isolated,
            open_files=_raise_open_files(),
            log=_log,
        )
        results = {}
        for row in ROWS:
            if row.name in options.rows:
                _log(f"{row.name}: {row.title}")
                bench.row = row.name
                results[row] = await row.run(bench)
                for line in report.section(row, results[row], bench)[2:]:
                    _log(line)
        return results, bench


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark. Return the exit code: 0 when every response was right and every peer ran, else 1."""
    argv = sys.argv[1:] if argv is None else argv
    options = _parse(argv)
    if not options.no_isolation and not isolation.is_inside():
        isolation.enter(argv)
        _log("no namespaces: peers that insist on https://fal.run are left out (run as root to include them)")
    if isolation.is_inside():
        isolation.set_up()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # to stop the servers too
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="benchmark") as directory:
        results, bench = asyncio.run(_measure(options, Path(directory)))
    command = shlex.join(["python", "-m", "benchmarks", *(arg for arg in argv if not arg.startswith("--output="))])
    text = report.markdown(results, bench, command=command, seconds=time.monotonic() - start)
    _log("")
    _log(text)
    output = options.output or (None if options.quick else Path(__file__).parent)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "RESULTS.md").write_text(text)
        report.plot(results, output / "plot.svg")
    return 1 if bench.failures else 0
