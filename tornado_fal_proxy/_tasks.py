"""Make tasks that take their first step at once, where Python can."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from functools import partial

__all__ = ["EagerTask"]

# From Python 3.12 on a task can take its first step when it is made, a turn of the loop earlier.
EagerTask: Callable[..., asyncio.Task[None]]
if sys.version_info >= (3, 12):
    EagerTask = partial(asyncio.Task, eager_start=True)
else:
    EagerTask = asyncio.Task
