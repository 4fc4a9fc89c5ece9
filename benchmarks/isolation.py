"""A network of the benchmark's own, in which fal's names belong to this machine.

Strategy: run the whole benchmark again inside new network and mount namespaces. There ``fal.run`` is 127.0.0.1 by an
/etc/hosts that only this process tree sees, port 443 is free, and nothing can leave the machine. Proxies that insist on
``https://fal.run`` can be measured unchanged. Needs root, or a kernel that gives user namespaces to everyone.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

__all__ = ["enter", "is_inside"]

INSIDE = "TORNADO_FAL_PROXY_BENCHMARK_INSIDE"
HOSTS = "127.0.0.1 localhost fal.run queue.fal.run rest.fal.ai\n"
# Ports and backlogs: room for 10,000 clients and as many connections to the upstream, on each side.
NETWORK = {"ipv4/ip_local_port_range": "1024 65535", "core/somaxconn": "16384", "ipv4/tcp_max_syn_backlog": "16384"}

# linux/sockios.h and linux/if.h.
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1


def is_inside() -> bool:
    """Return whether this process runs in the namespaces."""
    return INSIDE in os.environ


def enter(argv: Sequence[str]) -> None:
    """Become the same benchmark, isolated, in this process. Return only if that is impossible."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return
    command = [unshare, "--net", "--mount"] + ([] if os.geteuid() == 0 else ["--map-root-user"])
    if subprocess.run([*command, "true"], check=False, capture_output=True).returncode:
        return
    again = [*command, sys.executable, "-m", "benchmarks", *argv]
    os.execve(unshare, again, {**os.environ, INSIDE: "1"})


def set_up() -> None:
    """Bring up loopback, name the hosts, and raise the limits, inside the namespaces. Raise OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        name = b"lo".ljust(16, b"\0")
        flags = struct.unpack("16xh", fcntl.ioctl(any_socket, SIOCGIFFLAGS, struct.pack("16sh", name, 0))[:18])[0]
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh", name, flags | IFF_UP))
    with tempfile.NamedTemporaryFile("w") as hosts:
        hosts.write(HOSTS)
        hosts.flush()
        os.chmod(hosts.name, 0o644)
        subprocess.run(["mount", "--bind", hosts.name, "/etc/hosts"], check=True)
    for name, value in NETWORK.items():
        path = Path("/proc/sys/net") / name
        if path.exists():
            path.write_text(value)
