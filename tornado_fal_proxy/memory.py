"""Tune the memory of a process of one's own: large blocks of the C library, and Python's garbage collection.

**Blocks.** libcurl keeps the buffer for a request's body until the response is complete. Most bodies fill a small part
of it, and a page that nothing was written to costs no memory. Only a block that is mapped by itself has such pages.
glibc maps blocks from 128 kB on, but only until the first of them is freed: then it takes blocks of that size from the
heap, where all of their size counts. Setting the threshold, even to its default, keeps it from moving (mallopt(3)).

**Garbage.** No call leaves a cycle behind (a test holds that), so there is next to nothing to collect. But Python looks
through all objects whenever a quarter more of them has grown old, and calls that are held for long do grow old: with
6,000 of them it stops everything for 0.24 s, as often as 1,500 have come. Here that is a hundred times rarer. Measured:
the first full collection comes after 24 million new objects that stay, in Python 3.11, 3.13, 3.14.8 and 3.15.0 alike;
with Python's own thresholds it comes after 0.27 million (0.09 million in 3.11). Python 3.14.0 to 3.14.4 have another
collector, which goes through the old objects in small steps. According to Python's documentation that collector ignores
the third threshold, so there only the freezing of :func:`collect_rarely` has an effect. This was not measured.

Both are for the whole process, so an embedding application decides. It calls :func:`map_large_blocks` before the first
call, or sets MALLOC_MMAP_THRESHOLD_=131072 in the environment, or accepts 12 kB more for each POST that waits. It calls
:func:`collect_rarely` or leaves Python's own settings.
"""

from __future__ import annotations

import ctypes
import gc
import os

__all__ = ["are_mapped", "collect_rarely", "give_back", "map_large_blocks"]

MAPPED_FROM_BYTES = 128 * 1024
_M_MMAP_THRESHOLD = -3  # malloc.h
_VARIABLE = "MALLOC_MMAP_THRESHOLD_"

# New objects, and how many collections of the young it takes for one of the middle-aged, and of all. Python's own are
# 2000 (700 before 3.13), 10 and 10.
THRESHOLDS = (2_000, 10, 1_000)

_set = False


def map_large_blocks() -> None:
    """Map each block of 128 kB and more by itself from now on. Do nothing where this is not glibc."""
    global _set
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    _set = mallopt is not None and mallopt(_M_MMAP_THRESHOLD, MAPPED_FROM_BYTES) == 1


def are_mapped() -> bool:
    """Tell whether blocks from 128 kB on, or smaller ones, stay mapped."""
    threshold = os.environ.get(_VARIABLE, "")
    return _set or (threshold.isdecimal() and int(threshold) <= MAPPED_FROM_BYTES)


def collect_rarely() -> None:
    """Leave what exists now out of every later collection, and collect old objects rarely.

    Call it before a fork, and the pages of what exists now stay shared.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)


def give_back() -> None:
    """Give free pages of the C library's heap back to the system. Do nothing where this is not glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
