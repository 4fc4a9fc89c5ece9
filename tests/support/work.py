"""Count the work of a call in lines of Python that run: a busy machine runs no more of them."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

__all__ = ["lines_run"]


def lines_run(function: Callable[[], object]) -> int:
    """Call ``function``, and return how many lines ran in it and in all that it called."""
    count = 0

    def trace(_frame: FrameType, _event: str, _arg: object) -> Any:
        nonlocal count
        count += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count
