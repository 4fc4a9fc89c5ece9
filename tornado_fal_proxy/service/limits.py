"""The limit of open files: raised at the start, with a part that clients' connections do not get."""

from __future__ import annotations

import contextlib
import logging
import resource
import sys

__all__ = ["OWN_FILES", "STREAMS_PER_CONNECTION", "max_open_files", "raise_open_files", "reserved_files"]

logger = logging.getLogger("tornado_fal_proxy")

# Files that a process without clients has open: the standard three, sockets, pipes, epolls, with room for more.
OWN_FILES = 32
# Calls that share a connection to fal over HTTP/2: servers commonly allow a hundred.
STREAMS_PER_CONNECTION = 100
# The part of the open files, within bounds, that clients do not get: connections to fal, name lookups and 503s need
# some when clients have taken all others. A sixteenth is hardly missed, and the bounds keep it from being too few under
# a low limit and idle under a high one.
RESERVED_PART = 16
MIN_RESERVED_FILES, MAX_RESERVED_FILES = 16, 256


def max_open_files() -> int:
    """Return how many files this process may have open."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit


def reserved_files(limit: int) -> int:
    """Return how many of ``limit`` open files clients do not get."""
    return min(max(limit // RESERVED_PART, MIN_RESERVED_FILES), MAX_RESERVED_FILES)


def raise_open_files(max_in_flight: int | None) -> None:
    """Allow as many open files as the hard limit permits, and warn if ``max_in_flight`` calls need more than that.

    None means that there is nothing to compare with.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if max_in_flight is None:
        return
    limit = max_open_files()
    spare = OWN_FILES + reserved_files(limit)
    needed = spare + max_in_flight + max_in_flight // STREAMS_PER_CONNECTION
    if needed > limit:
        fits = (limit - spare) * STREAMS_PER_CONNECTION // (STREAMS_PER_CONNECTION + 1)
        logger.warning(
            "limit of open files is %d: --max-in-flight=%d takes up to %d open files in a process over HTTP/2, %d over "
            "HTTP/1.1. Raise the limit (LimitNOFILE=%d in systemd, ulimit -n in a shell) or set --max-in-flight=%d",
            *(limit, max_in_flight, needed, spare + 2 * max_in_flight, needed, max(fits, 1)),
        )
