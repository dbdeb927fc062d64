"""Several nodes: what they exchange, what differs between them, wrong clocks, and the slowest of them."""

import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from fastvit_engine.doctor.findings import Group, Status
from fastvit_engine.doctor.nodes import Node, compare, exchange, name_rendezvous

software, data = Group("software"), Group("data")


def meet(own, clocks=None):
    """What rank 0 hears of the nodes `own`, each with a clock that is so many seconds ahead; None: a rank without."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=20))
    clocks = clocks or [0.0] * len(own)
    heard = {}

    def rank(number):
        clock = lambda: time.time() + clocks[number]  # noqa: E731
        heard[number] = exchange(store, number, len(own), own[number], clock)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(len(own))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert all(heard[number] == [] for number in range(1, len(own)))
    return heard[0]


def node(host, *findings, skew=0.0):
    return Node(host, findings, skew)


def found(nodes):
    return {(one.finding.group, one.finding.subject, one.finding.status): one for one in compare(nodes)}


def of(nodes, subject, status):
    return next(one for (_, name, is_), one in found(nodes).items() if (name, is_) == (subject, status))


def test_rank_0_hears_all_nodes_and_their_clocks():
    nodes = meet(
        [node("a", software.ok("torch", "2.13")), None, node("b"), node("c")], clocks=[100.0, 0.0, 107.0, 60.0]
    )
    assert [one.host for one in nodes] == ["a", "b", "c"]
    assert nodes[0].findings == (software.ok("torch", "2.13"),)
    assert [one.skew for one in nodes] == pytest.approx([0.0, 7.0, -40.0], abs=0.5)


def test_versions_that_differ_are_a_problem_that_names_the_nodes():
    nodes = [node(f"n{number}", software.ok("torch", v, same=v)) for number, v in enumerate(["2.13", "2.12", "2.13"])]
    one = of(nodes, "torch", Status.PROBLEM)
    assert one.finding.found == "differs between nodes: 2.13 on n0, n2; 2.12 on n1"
    assert of([nodes[0], nodes[2]], "versions", Status.OK).finding.found == "the same on 2 nodes"


@pytest.mark.parametrize(
    ("skews", "status", "words"),
    [
        ([0.0, 0.2], Status.OK, "within 0.20 s of each other"),
        ([0.0, 5.0], Status.WARNING, "b is 5.0 s ahead of a: "),
        ([0.0, 5.0, 5.0], Status.WARNING, "a is 5.0 s behind most nodes: "),
        ([0.0, 0.0, -3600.0], Status.PROBLEM, "c is 1 h 0 min behind most nodes: object stores refuse"),
    ],
)
def test_clocks(skews, status, words):
    finding = of([node(host, skew=skew) for host, skew in zip("abc", skews, strict=False)], "clocks", status).finding
    assert finding.found.startswith(words)


def rate(host, value):
    figure = {"rate": value}
    return node(host, data.ok("reading", f"{value} MB/s", figures=figure, speed="rate"))


def test_the_slowest_node_is_named():
    nodes = [rate("a", 100.0), rate("b", 20.0), rate("c", 90.0)]
    slow = of(nodes, "slow: reading", Status.WARNING).finding
    assert slow.found == "much less than the median of the nodes: b (22 %)"
    assert of(nodes, "reading", Status.OK).finding.found == "20.0 MB/s (least of 3 nodes: b)"
    assert not any(name.startswith("slow") for _, name, _ in found([rate("a", 100.0), rate("b", 90.0)]))


def test_what_is_alike_is_said_once_with_its_hosts():
    warning = data.warning("store", "slow", "use a cache")
    nodes = [node("a", warning), node("b", data.ok("store", "fast")), node("c", warning)]
    assert of(nodes, "store", Status.WARNING).hosts == ("a", "c")
    assert of(nodes, "store", Status.OK).hosts == ("b",)


def test_one_node_has_nothing_to_be_compared_with():
    assert found([node("a", software.ok("torch", "1", same="1"))]).keys() == {("software", "torch", Status.OK)}


def test_tasks_of_srun_find_each_other():
    task = {"SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_JOB_ID": "1041", "SLURM_STEP_NODELIST": "n[1-2]"}
    environment = dict(task)
    name_rendezvous(environment, lambda hosts: {"n[1-2]": "n1"}[hosts])
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("n1", "29543")
    for more in ({"MASTER_ADDR": "x"}, {"SLURM_STEP_NUM_TASKS": "1"}, {"RANK": "0"}):
        environment = {**task, **more}
        name_rendezvous(environment, lambda hosts: "n1")
        assert environment == {**task, **more}
    environment = dict(task)
    name_rendezvous(environment, lambda hosts: None)
    assert environment == task
