"""Checks that a process can reach rank 0 before it joins the job: a wrong address would hang silently."""

import errno
import ipaddress
import os
import socket
import time
from collections.abc import Mapping

from fastvit_engine.errors import RestartError, UserError

_NO_WAY = {errno.EHOSTUNREACH, errno.ENETUNREACH}
_NO_WAY_PATIENCE = 10.0  # seconds that a route may be missing; rank 0 itself may take much longer to start


def check_rendezvous(environment: Mapping[str, str] = os.environ, *, patience: float = 300.0) -> None:
    """Returns once this process can reach MASTER_ADDR:MASTER_PORT, or serve it.

    Raises UserError if the address cannot work, RestartError if rank 0 does not answer within `patience` seconds.
    """
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    here, world = int(environment.get("LOCAL_WORLD_SIZE", environment["WORLD_SIZE"])), int(environment["WORLD_SIZE"])
    where = f"rank 0 at MASTER_ADDR={address}, MASTER_PORT={port}"
    if not 0 < port < 65536:
        raise UserError(f"environment variable MASTER_PORT is {port}: a port is a number from 1 to 65535")
    resolved = _resolve(address)
    if resolved is None:
        raise UserError(
            f"MASTER_ADDR is '{address}', a name that {socket.gethostname()} cannot resolve: give its address"
        )
    rank = int(environment["RANK"])
    if here < world:
        if rank >= here and ipaddress.ip_address(resolved).is_loopback:
            raise UserError(
                f"MASTER_ADDR is '{address}', which is {resolved} on {socket.gethostname()}, so rank {rank} would look "
                "for rank 0 on its own host: give the address of rank 0's host"
            )
        _check_own_name(environment)
    served_by_torchrun = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if rank == 0 and not served_by_torchrun:
        _check_port_is_free(port)
    elif rank != 0:
        _wait_for(resolved, port, where, patience)


def _resolve(name: str) -> str | None:
    try:
        return str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except (socket.gaierror, UnicodeError):
        return None


def _check_own_name(environment: Mapping[str, str]) -> None:
    """Checks the name of this host: unless it is given an interface, Gloo sends the other hosts to that address."""
    own = _resolve(socket.gethostname())
    if "GLOO_SOCKET_IFNAME" not in environment and (own is None or ipaddress.ip_address(own).is_loopback):
        problem = "does not resolve" if own is None else f"resolves to {own}, where no other host finds it"
        raise UserError(
            f"the name of this host, {socket.gethostname()}, {problem}: set GLOO_SOCKET_IFNAME to the network "
            "interface that leads to the other hosts (the launchers in launch/ do), or correct /etc/hosts"
        )


def _check_port_is_free(port: int) -> None:
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise UserError(
            f"MASTER_PORT is {port}, which {socket.gethostname()} cannot open ({error.strerror}), perhaps because "
            "another run uses it: choose another port"
        ) from error


def _wait_for(address: str, port: int, where: str, patience: float) -> None:
    start = time.monotonic()
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except OSError as error:
            waited = time.monotonic() - start
            if error.errno in _NO_WAY and waited > _NO_WAY_PATIENCE:
                raise UserError(
                    f"{socket.gethostname()} has no way to {where} ({error.strerror}): check address and network"
                ) from error
            if waited > patience:
                raise RestartError(
                    f"{socket.gethostname()} cannot reach {where} after {waited:.0f} s ({error.strerror or error}): "
                    "check that it runs, and that no firewall is between them"
                ) from error
        time.sleep(0.2)
