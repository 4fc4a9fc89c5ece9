"""A sampling profiler inside a peer, by CPU time: Python runs this file at its start (see ``profile.py``).

SIGUSR1 starts it. SIGUSR2 stops it and writes each stack with its count to the file named by SAMPLES. Time in C code
counts for the Python function that runs next.
"""

import collections
import os
import signal
from types import FrameType

INTERVAL_S = 0.001

stacks: collections.Counter[str] = collections.Counter()


def sample(_number: int, frame: FrameType | None) -> None:
    """Count the current stack."""
    names = []
    while frame is not None:
        code = frame.f_code
        names.append(f"{code.co_qualname} ({os.path.basename(code.co_filename)})")
        frame = frame.f_back
    stacks[";".join(reversed(names))] += 1


def begin(*_args: object) -> None:
    """Start to sample."""
    stacks.clear()
    signal.setitimer(signal.ITIMER_PROF, INTERVAL_S, INTERVAL_S)


def end(*_args: object) -> None:
    """Stop, and write the counts."""
    signal.setitimer(signal.ITIMER_PROF, 0)
    with open(os.environ["SAMPLES"], "w") as file:
        file.writelines(f"{stack}\t{count}\n" for stack, count in stacks.items())


if "SAMPLES" in os.environ:
    signal.signal(signal.SIGPROF, sample)
    signal.signal(signal.SIGUSR1, begin)
    signal.signal(signal.SIGUSR2, end)
