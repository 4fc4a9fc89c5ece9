"""A network device whose other end is this process: packets can be late, get lost, or be dropped silently.

Strategy. The device has the address :data:`NEAR`. A packet to :data:`FAR` comes out here, and goes back with source and
destination exchanged, which leaves its checksums right. So a server that listens at NEAR is reached at FAR, by real TCP
over a link that may be bad. The device needs /dev/net/tun, and a network in which this process may do everything.
"""

import asyncio
import fcntl
import os
import random
import struct
import subprocess
from contextlib import suppress

__all__ = ["DEVICE", "FAR", "NEAR", "Wire"]

DEVICE = "/dev/net/tun"
NEAR, FAR = "10.9.0.1", "10.9.0.2"

# linux/if_tun.h.
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
TCP = 6


class Wire:
    """The device. Make it inside the running loop."""

    def __init__(self, server_port: int) -> None:
        self.delay_s = 0.0
        self.loss = 0.0
        self._server_port = server_port
        self._known: set[int] = set()
        self._silenced: set[int] = set()
        self._device = os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(self._device, TUNSETIFF, struct.pack("16sH22x", b"wire", IFF_TUN | IFF_NO_PI))
        subprocess.run(["ip", "address", "add", f"{NEAR}/24", "dev", "wire"], check=True)
        subprocess.run(["ip", "link", "set", "wire", "up"], check=True)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._device, self._carry)

    def be_bad(self, delay_s: float, loss: float) -> str:
        """Delay each packet and lose some from now on, and return how: by the kernel's netem, or by this process."""
        command = ["tc", "qdisc", "add", "dev", "wire", "root", "netem"]
        netem = [*command, "delay", f"{delay_s * 1000:g}ms", "loss", f"{loss * 100:g}%"]
        if subprocess.run(netem, capture_output=True, check=False).returncode == 0:
            return "netem"
        self.delay_s, self.loss = delay_s, loss
        return "in user space"

    def be_good(self) -> None:
        """Delay and lose no more packets."""
        subprocess.run(["tc", "qdisc", "delete", "dev", "wire", "root"], capture_output=True, check=False)
        self.delay_s = self.loss = 0.0

    def silence(self) -> None:
        """Drop all packets of the connections that exist, both ways. New connections work."""
        self._silenced |= self._known

    def close(self) -> None:
        """Remove the device."""
        self._loop.remove_reader(self._device)
        os.close(self._device)

    def _carry(self) -> None:
        with suppress(BlockingIOError):
            while packet := os.read(self._device, 65_536):
                if packet[0] >> 4 == 4 and packet[9] == TCP and self._passes(packet):
                    back = packet[:12] + packet[16:20] + packet[12:16] + packet[20:]
                    if self.delay_s:
                        self._loop.call_later(self.delay_s, self._put, back)
                    else:
                        self._put(back)

    def _passes(self, packet: bytes) -> bool:
        ports = set(struct.unpack_from("!HH", packet, (packet[0] & 15) * 4))
        clients = ports - {self._server_port}
        self._known |= clients
        return not clients & self._silenced and random.random() >= self.loss

    def _put(self, packet: bytes) -> None:
        with suppress(OSError):
            os.write(self._device, packet)
