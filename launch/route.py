"""How this host and the head node of a job reach each other.

    python route.py HEAD [--alone]     prints: HEAD's address, this host's address towards it, the interface between

GLOO_SOCKET_IFNAME names the interface if it is set.
HEAD is a name or an address. Without `--alone` there are other hosts, and an address that only this host can use
(127.0.1.1, which Debian gives a host's own name) is refused. Bad input: one sentence and exit code 2.
"""

import ipaddress
import os
import socket
import sys
import time

import psutil

PATIENCE = 20.0  # seconds for a name to appear: a service of Kubernetes has none before its pod runs


def address_of(host: str) -> str:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
        except socket.gaierror as error:
            if error.errno != socket.EAI_AGAIN or time.monotonic() > deadline:
                sys.exit(_sentence(f"the head node's name '{host}' does not resolve here: give its address"))
            time.sleep(0.5)


def own_address_towards(address: str) -> str:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # chooses a route; nothing is sent
        except OSError as error:
            sys.exit(_sentence(f"there is no route from {socket.gethostname()} to {address} ({error.strerror})"))
        return str(probe.getsockname()[0])


def interface_with(address: str) -> str:
    if chosen := os.environ.get("GLOO_SOCKET_IFNAME"):
        return chosen
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in addresses):
            return name
    sys.exit(_sentence(f"no network interface has the address {address}: set GLOO_SOCKET_IFNAME yourself"))


def _sentence(text: str) -> int:
    print(f"launch: error: {text}", file=sys.stderr)
    return 2


def main(head: str, *flags: str) -> None:
    address = address_of(head)
    if ipaddress.ip_address(address).is_loopback:
        if "--alone" not in flags:
            sys.exit(
                _sentence(
                    f"the head node '{head}' is {address} on {socket.gethostname()}, where no other host finds it: "
                    "give the address that the others use, or correct /etc/hosts"
                )
            )
        print(address, address, "lo")
        return
    own = own_address_towards(address)
    print(address, own, interface_with(own))


if __name__ == "__main__":
    main(*sys.argv[1:])
