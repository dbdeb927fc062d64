"""The hosts themselves: what the other tests of this folder stand on."""

import os
import signal
import subprocess
import sys

import pytest

from tests.cluster.hosts import FILES_OF_HOSTS, NAMESPACES, wait_until

# A server that answers every line with the same line, and a client that prints its round trip's seconds.
ECHO = "import socketserver as s; s.TCPServer.allow_reuse_address = True\n" + (
    "class H(s.StreamRequestHandler):\n"
    "    def handle(self):\n"
    "        for line in self.rfile: self.wfile.write(line)\n"
    "s.ThreadingTCPServer(('', 5000), H).serve_forever()"
)
ASK = (
    "import socket, sys, time\n"
    "start = time.monotonic()\n"
    "with socket.create_connection((sys.argv[1], 5000), timeout=2) as c:\n"
    "    c.settimeout(20); sent = b'x' * int(sys.argv[2]) + b'\\n'; c.sendall(sent)\n"
    "    got = b''\n"
    "    while len(got) < len(sent): got += c.recv(1 << 20)\n"
    "    assert got == sent\n"
    "print(time.monotonic() - start)"
)


def ask(hosts, asking, asked, size=10):
    done = hosts.run(asking, [sys.executable, "-c", ASK, hosts.name(asked), str(size)])
    return float(done.stdout) if done.returncode == 0 else None


@pytest.fixture
def echo(hosts):
    server = hosts.start(1, [sys.executable, "-c", ECHO])
    wait_until(lambda: ask(hosts, 0, 1) is not None, what="the echo server")
    yield hosts
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def test_a_host_has_a_name_and_finds_the_others_by_theirs(hosts):
    assert hosts.run(2, ["hostname"]).stdout == "node-2\n"
    assert hosts.run(2, ["getent", "hosts", "node-0"]).stdout.split() == [hosts.address(0), "node-0"]
    routes = hosts.run(2, ["ip", "route"]).stdout
    assert "default" not in routes  # nothing leads out


def test_a_cut_cable_is_noticed_only_by_who_asks_and_mends(echo):
    for silently in (False, True):
        echo.cut(1, silently=silently)
        link = echo.run(1, ["cat", "/sys/class/net/eth0/carrier"]).stdout.strip()
        assert link == ("1" if silently else "0")
        assert ask(echo, 0, 1) is None
        echo.mend(1)
        assert ask(echo, 0, 1) is not None


def test_a_bad_cable_delays_and_loses(echo):
    echo.degrade(1, delay=0.1)
    assert ask(echo, 0, 1) >= 0.4  # connecting and asking are two round trips
    assert ask(echo, 0, 1, size=300_000) is not None  # large segments come through whole
    echo.degrade(1, loss=1.0)
    assert ask(echo, 0, 1) is None
    echo.degrade(1, loss=0.02)
    assert ask(echo, 0, 1, size=300_000) is not None  # TCP sends again what was lost
    echo.mend(1)
    assert ask(echo, 0, 1) is not None


def test_a_narrow_cable_carries_what_it_should(echo):
    """A megabyte comes at any rate, and goes back at 2 MB/s: half a second, or more on a busy machine."""
    echo.degrade(1, rate=2e6)
    assert 0.5 <= ask(echo, 0, 1, size=1_000_000) < 2.5
    echo.degrade(0, rate=2e6)
    assert ask(echo, 0, 1, size=1_000_000) >= 1.0
    echo.mend(0)
    echo.mend(1)


def test_a_killed_owner_leaves_hosts_that_the_next_one_removes(hosts):
    code = "import time; from hosts import Hosts; h = Hosts(1); h.start(0, ['sleep', '600'], stdout=-3)\n"
    code += "print('up', flush=True); time.sleep(600)"
    here = os.path.dirname(__file__)
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=here)
    assert owner.stdout.readline() == b"up\n"
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()

    def left():
        return [path for folder in (NAMESPACES, FILES_OF_HOSTS) for path in folder.glob(f"fastvit-{owner.pid}-*")]

    assert left()
    subprocess.run([sys.executable, "-c", "from hosts import Hosts; Hosts(1).close()"], check=True, cwd=here)
    assert not left()
