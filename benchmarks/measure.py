"""The CPU and memory of a tree of processes, as the kernel counts them.

CPU is user plus system time of all threads, living and ended, to the nanosecond: the same figure as ``utime + stime``
in /proc/PID/stat without its rounding to 10 ms. Memory is PSS, in which a page shared by n processes counts 1/n for
each. Memory that the kernel uses for sockets is not counted. As in /proc, a kB has 1024 bytes; a MB has 1024 kB. Linux
only.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

__all__ = ["Peak", "cpu_s", "process_cpu_s", "pss_kb", "tree"]

PROC = Path("/proc")
_PSS = re.compile(r"^Pss:\s+(\d+) kB", re.MULTILINE)
_RSS = re.compile(r"^VmRSS:\s+(\d+) kB", re.MULTILINE)
_PEAK = re.compile(r"^VmHWM:\s+(\d+) kB", re.MULTILINE)
# Written to /proc/PID/clear_refs: forget the peak (proc_pid_clear_refs(5)).
_RESET_PEAK = "5"
# clock_getcpuclockid(3): the clock of a process has its inverted number, and 2 for "user and system, precise".
_PRECISE = 2


def tree(pid: int) -> list[int]:
    """Return ``pid`` and all its living descendants."""
    found = [pid]
    for parent in found:
        for task in (PROC / str(parent) / "task").glob("*"):
            try:
                found += map(int, (task / "children").read_text().split())
            except OSError:  # the thread has ended
                continue
    return found


def cpu_s(pid: int) -> float:
    """Return the user and system time that the tree has used so far, in seconds, without children that have ended."""
    return sum(map(process_cpu_s, tree(pid)))


def process_cpu_s(pid: int) -> float:
    """Return the user and system time of one process, in seconds."""
    return time.clock_gettime((~pid << 3) | _PRECISE)


def pss_kb(pid: int) -> float:
    """Return the proportional set size of the tree, in kB."""
    return sum(_find(_PSS, process, "smaps_rollup") for process in tree(pid))


class Peak:
    """The growth of the memory of a tree of processes, from the creation of this object to the peak since then."""

    def __init__(self, pid: int) -> None:
        self._pids = tree(pid)
        for process in self._pids:
            (PROC / str(process) / "clear_refs").write_text(_RESET_PEAK)
        self._before = self._sum(_RSS)

    def growth_mb(self) -> float:
        """Return the growth of resident memory at its peak, in MB."""
        return (self._sum(_PEAK) - self._before) / 1024

    def _sum(self, field: re.Pattern[str]) -> int:
        return sum(_find(field, process, "status") for process in self._pids)


def _find(field: re.Pattern[str], pid: int, name: str) -> int:
    match = field.search((PROC / str(pid) / name).read_text())
    return int(match[1]) if match else 0
