"""Network interfaces of this machine: which one has an address, and which address one has (IPv4, Linux)."""

import fcntl
import socket
import struct

from megascale.errors import LaunchError

_SIOCGIFADDR = 0x8915


def address_of(interface: str) -> str:
    """The address of an interface.

    Raises:
        LaunchError: there is no such interface here, or it has no address; those that have one are listed.
    """
    found = _addresses()
    if interface not in found:
        have = ", ".join(f"{name} {address}" for name, address in found.items())
        raise LaunchError(f"interface {interface} has no IPv4 address on {socket.gethostname()}; these have: {have}."
                          " Set `interface` in the cluster's file to one of them, or leave it out")
    return found[interface]


def interface_of(address: str) -> str | None:
    """The interface that has an address; None for none."""
    if address.startswith("127."):
        return "lo"
    return next((name for name, own in _addresses().items() if own == address), None)


def address_towards(host: str) -> str:
    """This machine's own address on the way to another.

    Raises:
        LaunchError: the other's name isn't known here.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((socket.gethostbyname(host), 9))  # sends nothing
            return probe.getsockname()[0]
    except OSError as error:
        raise LaunchError(f"{host}: can't be reached from {socket.gethostname()}: {error}") from None


def _addresses() -> dict[str, str]:
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has none
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found
