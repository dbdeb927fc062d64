"""What is measured between processes, each of which stands for a node."""

import socket
import time
from functools import partial

import pytest

from fastvit_engine.distributed.supervise import free_port, rank_environment
from fastvit_engine.doctor import examine, links
from fastvit_engine.doctor.findings import Finding, Status
from fastvit_engine.doctor.isolated import Isolated, stopping

pytestmark = pytest.mark.distributed


def rank(number, ranks, port, slow, send):
    """One rank on a host of its own."""
    socket.gethostname = lambda: f"node-{number}"
    swap = links._swap

    def slowly(*arguments):
        time.sleep(0.03)
        swap(*arguments)

    links._BYTES, links._SECONDS = {"cpu": 2**16}, 0.05
    links._swap = slowly if number == slow else swap
    examine._measure({**rank_environment(number, ranks, port), "LOCAL_RANK": "0"}, send)


def measure(ranks, slow=None):
    port = free_port()
    with stopping([Isolated(partial(rank, n, ranks, port, slow), 60) for n in range(ranks)]) as started:
        outcome = started[0].wait()
    assert outcome.failure is None
    return {one.subject: one for one in map(Finding.from_dict, outcome.messages)}


def test_a_node_with_a_slow_link_is_named_and_its_neighbours_are_not():
    found = measure(3, slow=1)
    assert found["all-reduce"].figures["bytes_per_second"] > 0
    assert "Gloo on 3 processes of 3 nodes" in found["all-reduce"].found
    assert found["between nodes"].status == Status.WARNING
    assert "node-1 (" in found["between nodes"].found
    assert "node-0" not in found["between nodes"].found and "node-2" not in found["between nodes"].found


def test_nodes_with_equal_links():
    finding = links.judge_nodes("between nodes", {"a": 1e9, "b": 0.9e9}, "from node to node", "see the cable")
    assert finding.status == Status.OK and "b is slowest, 858.3 MiB/s" in finding.found
