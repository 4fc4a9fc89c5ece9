"""Prepare a network namespace for the program that runs in it."""

import fcntl
import socket
import struct

__all__ = ["lift_loopback"]


def lift_loopback() -> None:
    """Bring the loopback interface up, which is down in a new network."""
    flags_of, set_flags, up = 0x8913, 0x8914, 1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        flags = struct.unpack("16sh", fcntl.ioctl(any_socket, flags_of, struct.pack("16sh", b"lo", 0)))[1]
        fcntl.ioctl(any_socket, set_flags, struct.pack("16sh", b"lo", flags | up))
