"""The command, with a window: ``python -m soak.service`` in the place of ``python -m tornado_fal_proxy``.

Strategy: the service runs as it is. On SIGUSR2 a process of it collects its garbage, counts what lives in it between
two turns of its loop, and leaves that as JSON in the directory that SOAK_WINDOW names, in a file with its number.
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
from tornado_fal_proxy.service import main
from tornado_fal_proxy.upstream.client import UpstreamClient
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
    """What lives in this process. ``handles`` are those of libcurl's that serve a call, ``kept`` those that wait."""
    gc.collect()
    objects = gc.get_objects()
    result = {name: sum(issubclass(type(item), kind) for item in objects) for name, kind in KINDS.items()}
    clients = [item for item in objects if type(item) is UpstreamClient]
    kept = sum(len(pool) for client in clients for pool in client._handles.values())
    fetching = sum(len(client._curls) for client in clients)  # fetch()'s, which the proxy does not use
    curls = sum(type(item) is pycurl.Curl for item in objects)
    objects.clear()  # among them, before Python 3.12, is what holds this list
    return result | {
        "handles": curls - kept - fetching,
        "in flight": sum(client.in_flight for client in clients),
        "tasks": len(asyncio.all_tasks()),
        "kept": kept,
        "garbage": _found["garbage"],
    }


def _leave_counts() -> None:
    path = Path(os.environ["SOAK_WINDOW"], str(os.getpid()))
    new = path.with_suffix(".new")
    new.write_text(json.dumps(counts()))
    new.rename(path)


def _on_signal(*_signal: Any) -> None:
    # Not now, for this may run inside libcurl.
    asyncio.get_running_loop().call_soon_threadsafe(_leave_counts)


if __name__ == "__main__":
    gc.callbacks.append(_on_collection)
    signal.signal(signal.SIGUSR2, _on_signal)
    sys.exit(main())
