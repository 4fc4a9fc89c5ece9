"""Run the command with a window: ``python -m soak.service`` in the place of ``python -m tornado_fal_proxy``.

Strategy: the service runs as it is. On SIGUSR2 a process of the service collects its garbage and counts its objects
between two turns of its loop. It writes the counts as JSON to a file that has the process id as its name, in the
directory that SOAK_WINDOW names.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pycurl
from tornado.http1connection import HTTP1Connection, HTTP1ServerConnection
from tornado.iostream import BaseIOStream

from tornado_fal_proxy.handler import FalProxyHandler
from tornado_fal_proxy.relay.backend import Backend
from tornado_fal_proxy.service import main
from tornado_fal_proxy.upstream.transfer import Transfer

KINDS = {
    "transfers": Transfer,
    "handlers": FalProxyHandler,
    "requests": HTTP1Connection,
    "connections": HTTP1ServerConnection,
    "streams": BaseIOStream,
}

_found = Counter[str]()  # "garbage": objects in cycles, since the process began


def _on_collection(phase: str, info: dict[str, int]) -> None:
    if phase == "stop":
        _found["garbage"] += info["collected"]


def counts() -> dict[str, int]:
    """Count the objects of this process. ``handles`` are libcurl's that serve a call, ``kept`` those that wait."""
    gc.collect()
    objects = gc.get_objects()
    result = {name: sum(issubclass(type(item), kind) for item in objects) for name, kind in KINDS.items()}
    backends = [item for item in objects if type(item) is Backend]
    kept = sum(len(pool) for backend in backends for pool in backend.client._handles._idle.values())
    fetching = sum(len(backend.client._curls) for backend in backends)  # fetch()'s, which the proxy does not use
    curls = sum(type(item) is pycurl.Curl for item in objects)
    objects.clear()  # before Python 3.12 the frame that refers to this list is in the list
    return result | {
        "handles": curls - kept - fetching,
        "in flight": sum(backend.slots.in_use for backend in backends),
        "tasks": len(asyncio.all_tasks()),
        "kept": kept,
        "garbage": _found["garbage"],
    }


def _write_counts() -> None:
    path = Path(os.environ["SOAK_WINDOW"], str(os.getpid()))
    new = path.with_suffix(".new")
    new.write_text(json.dumps(counts()))
    new.rename(path)


def _on_signal(*_signal: Any) -> None:
    # Not now, because this may run inside libcurl.
    asyncio.get_running_loop().call_soon_threadsafe(_write_counts)


if __name__ == "__main__":
    gc.callbacks.append(_on_collection)
    signal.signal(signal.SIGUSR2, _on_signal)
    sys.exit(main())
