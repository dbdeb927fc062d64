"""Hosts on one machine: network namespaces with an address, a name and a cable each, all plugged into one switch.

    with Hosts(3) as hosts:
        hosts.run(0, ["ping", "-c1", "node-1"])
        hosts.cut(1)

Nothing outside the namespaces made here is touched; no packet leaves them. Needs root and iproute2: `missing()` says
what is not there. Whatever ends the process that made them, the next `Hosts` on the machine removes what it left.
"""

import atexit
import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

NAMESPACES = Path("/run/netns")
FILES_OF_HOSTS = Path("/etc/netns")  # `ip netns exec NAME` mounts /etc/netns/NAME/* over /etc/*
_NUMBERS = itertools.count()  # of the networks of this process, of which a test may have two
CABLE = Path(__file__).with_name("cable.py")
PATIENCE = 400.0  # seconds that anything may take on a machine that does other things too


def missing() -> str | None:
    """Why there can be no hosts here, or None when there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2"
    probe = f"fastvit-{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode == 0:
        command = ["ip", "-n", probe, "link", "add", "switch", "type", "bridge"]
        made = subprocess.run(command, capture_output=True, text=True)
        _remove(probe)
    return None if made.returncode == 0 else f"no network namespaces here: {made.stderr.strip()}"


class Hosts:
    """`count` hosts called node-0, node-1, ... on a network of their own, 10.77.x.0/24."""

    def __init__(self, count: int = 3) -> None:
        _remove_leftovers()
        self.count = count
        self.prefix = f"fastvit-{os.getpid()}-{next(_NUMBERS)}"
        self.network = f"10.77.{os.getpid() % 250 + 1}"
        self.switch = f"{self.prefix}-switch"
        self.cables: dict[int, subprocess.Popen[bytes]] = {}
        atexit.register(self.close)
        _ip("netns", "add", self.switch)
        _ip("-n", self.switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", self.switch, "link", "set", "switch", "up")
        for host in range(count):
            self._add(host)

    def _add(self, host: int) -> None:
        namespace = self.namespace(host)
        _ip("netns", "add", namespace)
        peer = ["type", "veth", "peer", "name", "eth0", "netns", namespace]
        _ip("-n", self.switch, "link", "add", f"port{host}", *peer)
        _ip("-n", self.switch, "link", "set", f"port{host}", "master", "switch", "up")
        _ip("-n", namespace, "link", "set", "lo", "up")
        _ip("-n", namespace, "address", "add", f"{self.address(host)}/24", "dev", "eth0")
        _ip("-n", namespace, "link", "set", "eth0", "up")
        self.etc(host).mkdir(parents=True)
        (self.etc(host) / "hosts").touch()
        self.know_each_other()

    def know_each_other(self, *, own_name_is_loopback: Sequence[int] = ()) -> None:
        """Writes /etc/hosts of every host. Debian's installer gives a host's own name the address 127.0.1.1."""
        for host in range(self.count):
            if self.etc(host).exists():
                lines = ["127.0.0.1 localhost"]
                for other in range(self.count):
                    loopback = other == host and host in own_name_is_loopback
                    lines.append(f"{'127.0.1.1' if loopback else self.address(other)} {self.name(other)}")
                (self.etc(host) / "hosts").write_text("\n".join(lines) + "\n")

    def __enter__(self) -> "Hosts":
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def close(self) -> None:
        """Kills every process inside and removes all; may be called again."""
        atexit.unregister(self.close)
        for name in _names_that_start_with(f"{self.prefix}-"):
            _remove(name)
        for cable in self.cables.values():
            cable.wait()
        self.cables.clear()

    def name(self, host: int) -> str:
        return f"node-{host}"

    def address(self, host: int) -> str:
        return f"{self.network}.{host + 10}"

    def namespace(self, host: int) -> str:
        return f"{self.prefix}-{self.name(host)}"

    def etc(self, host: int) -> Path:
        """A folder whose files and folders stand in for those of the same name in /etc, for processes of this host."""
        return FILES_OF_HOSTS / self.namespace(host)

    # ---- processes

    def command(self, host: int, command: Sequence[str]) -> list[str]:
        """`command` as it must be started to run on a host, under the host's name."""
        named = ["unshare", "--uts", "sh", "-c", f'hostname {self.name(host)} && exec "$@"', "sh", *command]
        return ["ip", "netns", "exec", self.namespace(host), *named]

    def run(
        self, host: int, command: Sequence[str], *, timeout: float = 120, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end. subprocess.TimeoutExpired after `timeout` seconds, when all it started is dead."""
        process = self.start(host, command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def start(self, host: int, command: Sequence[str], **options: Any) -> "subprocess.Popen[Any]":
        """Starts a command as the first process of a session; `options` are those of subprocess.Popen."""
        return subprocess.Popen(self.command(host, command), start_new_session=True, **options)

    def processes(self, host: int) -> list[int]:
        return _processes_in(self.namespace(host))

    def kill_all(self, host: int) -> None:
        """Ends every process of a host at once, as a power cut does to them; its network stack stays and says so."""
        for process in self.processes(host):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    # ---- the network

    def cut(self, host: int, *, silently: bool = False) -> None:
        """Pulls a host's cable. `silently`: its link stays up, but no packet comes through in either direction."""
        if silently:
            _ip("-n", self.switch, "link", "set", f"port{host}", "nomaster")
        else:
            _ip("-n", self.switch, "link", "set", f"port{host}", "down")

    def mend(self, host: int) -> None:
        """Gives a host its good cable back, after `cut` or `degrade`."""
        if host in self.cables:
            cable = self.cables.pop(host)
            cable.kill()
            cable.wait()
            _ip("-n", self.switch, "link", "delete", f"bad{host}")
        _ip("-n", self.switch, "link", "set", f"port{host}", "master", "switch", "up")

    def degrade(self, host: int, *, delay: float = 0.0, loss: float = 0.0, rate: float = 0.0) -> None:
        """Gives a host a bad cable: each packet takes `delay` more seconds in each direction, a share `loss` is lost.

        What the host sends leaves at `rate` bytes per second; 0: at any.
        Done by a process between port and switch, not by tc netem, which many kernels are built without.
        """
        self.mend(host)
        near, far = f"near{host}", f"bad{host}"
        _ip("-n", self.switch, "link", "add", far, "type", "veth", "peer", "name", near)
        _ip("-n", self.switch, "link", "set", near, "up")
        _ip("-n", self.switch, "link", "set", far, "master", "switch", "up")
        _ip("-n", self.switch, "link", "set", f"port{host}", "nomaster")
        command = [sys.executable, str(CABLE), f"port{host}", near, str(delay), str(loss), str(rate)]
        process = subprocess.Popen(["ip", "netns", "exec", self.switch, *command], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"plugged in\n"
        self.cables[host] = process


def wait_until(condition: Callable[[], Any], seconds: float = PATIENCE, what: str = "the condition") -> Any:
    """Polls until `condition()` is true and returns its value; AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not come within {seconds} s"
        time.sleep(0.05)
    return value


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def _names_that_start_with(prefix: str) -> list[str]:
    return sorted({path.name for folder in (NAMESPACES, FILES_OF_HOSTS) for path in folder.glob(f"{prefix}*")})


def _processes_in(namespace: str) -> list[int]:
    listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True)
    return [int(process) for process in listed.stdout.split()]


def _remove(namespace: str) -> None:
    for _ in range(100):  # a process may start another while it is being killed
        alive = _processes_in(namespace)
        if not alive:
            break
        for process in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)
    subprocess.run(["ip", "netns", "delete", namespace], capture_output=True)
    shutil.rmtree(FILES_OF_HOSTS / namespace, ignore_errors=True)


def _remove_leftovers() -> None:
    """Removes the hosts of processes that are gone (a SIGKILL runs no clean-up)."""
    for name in _names_that_start_with("fastvit-"):
        owner = name.split("-")[1]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            _remove(name)
