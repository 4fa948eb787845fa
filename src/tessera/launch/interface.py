"""Which network interface leads to the other machines: gloo otherwise binds the loopback one."""

import os
import socket
import struct
import sys

from tessera.core import terminal

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
ELSEWHERE = "192.0.2.1"  # an address for documentation, which the default route leads to


LOOPBACK = "127.0.0.1"


def listening(address: str, port: int = 0) -> socket.socket:
    """A socket that listens at this address of this machine alone, at any free port for 0. Raises OSError."""
    family, kind, _, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    made = socket.socket(family, kind)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a run before may have used it a moment ago
        made.bind(target)
        made.listen(1024)
    except OSError:
        made.close()
        raise
    return made


def loopback_variables() -> dict[str, str]:
    """What ranks of one machine need in their environment to listen where no other machine reaches them.

    Without it gloo listens at the address that the machine's name stands for. Nothing where the user has said it.
    """
    missing = [name for name in VARIABLES if name not in os.environ]
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    return dict.fromkeys(missing, names[0]) if names else {}


def own_address(main: str) -> str:
    """This machine's own address on the way to `main` (an address or a host name). Raises OSError where none leads."""
    address = _towards(main)
    # Many a machine's own name means 127.0.1.1 to itself, where no other machine finds it.
    if address.startswith("127.") and not main.startswith("127.") and main != "localhost":
        return _towards(ELSEWHERE)
    return address


def _towards(host: str) -> str:
    family, kind, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)  # sends nothing, but has the kernel choose a route
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """The name of the interface that has this IPv4 address; None when that cannot be told (IPv6, not Linux)."""
    if sys.platform != "linux":
        return None
    import fcntl  # Unix alone has it

    get_interface_address = 0x8915  # SIOCGIFADDR of <linux/sockios.h>
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(any_socket.fileno(), get_interface_address, request)
            except OSError:  # it has no IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def interface_variables(main: str) -> dict[str, str]:
    """What ranks need in their environment to talk through the interface that leads to `main`, and a line that says so.

    Empty where the user has said it already, or where the interface cannot be told.
    """
    missing = [name for name in VARIABLES if name not in os.environ]
    address = own_address(main)
    name = interface_of(address)
    if not missing or name is None:
        return {}
    terminal.say(f"talking to the other machines through {name} ({address}): {' and '.join(missing)} set")
    return dict.fromkeys(missing, name)
