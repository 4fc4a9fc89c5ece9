"""Soak the service: ``python -m soak [--seconds=60] [--rate=40] [--processes=1] [--seed=NUMBER]``, see docs/design.md.

The exit code is 0 when all is well. Otherwise it is 1, and each problem is a line of the output. Ctrl-C ends the calls
early, and the service is still checked for what they left. A second Ctrl-C ends the soak at once.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import sys

from soak.run import Options, soak


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m soak", description="All kinds of calls, aborts and faults.")
    parser.add_argument("--seconds", type=float, default=60, help="how long (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=40, help="calls a second (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="of the service (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of an earlier soak, to repeat it")
    options = Options(**vars(parser.parse_args()))
    print(options, flush=True)
    try:
        report, problems = asyncio.run(_interruptible(options))
    except asyncio.CancelledError:
        return 1
    print(*report, *(problems or ["All is well."]), sep="\n")
    return 1 if problems else 0


async def _interruptible(options: Options) -> tuple[list[str], list[str]]:
    stop, soaking = asyncio.Event(), asyncio.current_task()
    assert soaking is not None

    def interrupt() -> None:
        (soaking.cancel if stop.is_set() else stop.set)()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, interrupt)
    return await soak(options, stop)


if __name__ == "__main__":
    sys.exit(main())
