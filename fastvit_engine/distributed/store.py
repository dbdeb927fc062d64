"""The store through which the processes of a job find each other; for a job on one machine, on loopback only."""

import ipaddress
import socket
from typing import Any

import torch.distributed as dist


def is_loopback(host: str) -> bool:
    """Whether a name or an address leads to this machine only."""
    try:
        address = str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except (socket.gaierror, UnicodeError):
        return False
    return ipaddress.ip_address(address).is_loopback


class JobStore(dist.TCPStore):
    """PyTorch's TCPStore, which listens on loopback only if `host_name` is there.

    PyTorch's own listens on every interface whatever its address is, and the store has no authentication.
    """

    def __init__(
        self, host_name: str, port: int = 0, world_size: int | None = None, is_master: bool = False, **options: Any
    ) -> None:
        """As TCPStore's; a port of 0 takes any free one."""
        if is_master and is_loopback(host_name):
            family, _, _, _, address = socket.getaddrinfo(host_name, port, type=socket.SOCK_STREAM)[0]
            listener = socket.create_server(address[:2], family=family)
            port, options["master_listen_fd"] = listener.getsockname()[1], listener.detach()  # the store closes it
        super().__init__(host_name, port, world_size, is_master, **options)
