"""`fastvit doctor` started on several hosts by torchrun: one report, which names what is odd and where."""

import json
import sys

import pytest

from tests.in_full import only_in_full

pytestmark = [pytest.mark.distributed, pytest.mark.slow, only_in_full]

# On one host only: a clock that is wrong, and another version of a package.
ODD = """
import importlib.metadata, time
clock, version = time.time, importlib.metadata.version
time.time = lambda: clock() + 30
importlib.metadata.version = lambda name: "0.20.1" if name == "deepspeed" else version(name)
"""


def test_three_hosts_of_which_two_are_odd(hosts, jobs, environment, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(ODD)
    hosts.degrade(2, delay=0.05)
    head = hosts.address(0)
    for host in range(3):
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "3", "--nproc-per-node", "1"),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{head}:29400", "--rdzv-id", "doctor"),
            *("--rdzv-conf", f"is_host={str(host == 0).lower()}", "--local-addr", hosts.address(host)),
            *("-m", "fastvit_engine", "doctor", "--json"),
        ]
        path = f"{tmp_path}:{environment['PYTHONPATH']}" if host == 1 else environment["PYTHONPATH"]
        jobs.start(host, command, PYTHONPATH=path, GLOO_SOCKET_IFNAME="eth0")
    codes, output = jobs.wait()
    assert codes[0] == 1, output
    logs = [process.log.read_text() for process in jobs.started]
    assert ['"findings"' in log for log in logs].count(True) == 1, "one report"
    text = logs[0][logs[0].index("{\n") : logs[0].rindex("\n}") + 2]
    found = {(one["subject"], one["status"]): one for one in json.loads(text)["findings"]}
    assert "differs between nodes: 0.19.8 on node-0, node-2; 0.20.1 on node-1" in found["deepspeed", "problem"]["found"]
    assert "node-1 is 30 s ahead of most nodes" in found["clocks", "warning"]["found"]
    assert "node-2 (" in found["between nodes", "warning"]["found"]
    assert "node-1" not in found["between nodes", "warning"]["found"]
