import pytest

from fastvit_engine.errors import UserError
from fastvit_engine.sizing.communication import Network
from fastvit_engine.sizing.gpus import GPU_MEMORY_GIB
from fastvit_engine.sizing.interconnects import BETWEEN, USUAL_WITHIN, WITHIN, named, of_figures, usual
from fastvit_engine.sizing.step_time import play
from fastvit_engine.sizing.traffic import Await, Compute, Message, Send

MB = 10**6


def network(processes, per_node, library="nccl", bandwidth=(100, 10), latency=(0, 0)):
    return Network(processes, per_node, of_figures(bandwidth, latency), library)


@pytest.mark.parametrize("library", ["nccl", "gloo"])
@pytest.mark.parametrize("processes", [2, 3, 8])
def test_a_ring_moves_all_but_ones_own_part(library, processes):
    there = network(processes, processes, library)
    moved = 800 * MB * (processes - 1) / processes / 100e9
    late = 800 * MB / processes / 2 / 100e9 if library == "gloo" else 0  # a notice that waits behind a segment
    assert there.seconds(Message("all_gather", 800 * MB)) == pytest.approx(moved + late)
    assert there.seconds(Message("all_reduce", 800 * MB)) == pytest.approx(2 * moved)
    assert there.wire_bytes(Message("all_reduce", 800 * MB)) == pytest.approx(2 * moved * 100e9)
    scattered = there.seconds(Message("reduce_scatter", 800 * MB))
    assert scattered == pytest.approx(2 * moved if library == "gloo" else moved)


def test_one_process_sends_nothing():
    assert network(1, 1).seconds(Message("all_reduce", MB)) == 0
    assert network(8, 1).seconds(Message("all_gather", MB, within_node=True)) == 0


def test_a_node_is_left_by_all_adapters_at_once():
    """Eight of 10 GB/s carry 80 GB/s, of 20 GB/s no more than the 100 GB/s of one GPU."""
    moved = 1000 * MB * 15 / 16
    for between, rate in ((10, 80e9), (20, 100e9)):
        there = network(16, 8, bandwidth=(100, between))
        assert there.seconds(Message("all_gather", 1000 * MB)) == pytest.approx(moved / rate)
    shared = Network(16, 8, named("nvlink4+ethernet-100"), "nccl")
    assert shared.seconds(Message("all_gather", 1000 * MB)) == pytest.approx(moved / (0.8 * 12.5e9), rel=0.01)
    inside = network(16, 8).seconds(Message("all_gather", 1000 * MB, within_node=True))
    assert inside == pytest.approx(1000 * MB * 7 / 8 / 100e9)


def test_latency_counts_hops():
    def hops(kind, processes, per_node):
        return network(processes, per_node, latency=(1, 100)).seconds(Message(kind, 0)) * 1e6

    assert hops("all_gather", 8, 8) == pytest.approx(7)
    assert hops("all_gather", 16, 8) == pytest.approx(14 + 100)
    assert hops("all_reduce", 8, 8) == pytest.approx(14)
    assert hops("all_reduce", 512, 8) == pytest.approx(2 * (7 + 600))  # by trees: 64 nodes are 6 levels
    assert hops("all_gather", 512, 8) == pytest.approx(448 + 6300)


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_gloo_announces_each_segment(processes):
    there = network(processes, 1, "gloo", bandwidth=(1, 0.01), latency=(0, 1000))
    assert there.seconds(Message("all_gather", 0)) == pytest.approx(2e-3 * (processes - 1))
    assert there.seconds(Message("all_reduce", 12)) == pytest.approx(4e-3 * (processes - 1), rel=0.01)
    tiny = {2: 2e-3, 3: 5e-3, 4: 6e-3}[processes]  # with three, the last to have the sum is the next to be sent one
    assert there.seconds(Message("all_reduce", 8)) == pytest.approx(tiny)
    # 100 MB at 10 MB/s have much to do while they wait
    long = 100 * MB * (processes - 1 / 2) / processes / 10e6  # the latest process's notice waits behind a segment
    assert there.seconds(Message("all_gather", 100 * MB)) == pytest.approx(long, rel=0.001)


@pytest.mark.parametrize(
    ("kind", "processes", "megabytes", "bandwidth", "latency", "measured"),
    [  # MB/s; milliseconds, by a tiny gather; milliseconds, the least of five, with TCP as benchmarks/plan_accuracy.py
        ("all_gather", 2, 4, 11.7, 8.74, 270.3),  # one calls 12 ms after the other
        ("all_gather", 3, 4, 11.8, 8.52, 315.7),
        ("all_reduce", 2, 0.6, 11.7, 8.74, 85.1),
        ("all_reduce", 2, 8, 11.7, 8.74, 722.6),
        ("all_reduce", 2, 20, 48.6, 5.78, 488.7),
        ("all_reduce", 3, 0.6, 9.7, 21.28, 236.8),
        ("all_reduce", 3, 8, 24.3, 2.53, 451.9),
        ("all_reduce", 3, 8, 9.7, 21.28, 1283.7),
    ],
)
def test_gloo_takes_as_long_as_was_measured(kind, processes, megabytes, bandwidth, latency, measured):
    there = network(processes, 1, "gloo", bandwidth=(1, bandwidth / 1e3), latency=(0, 1e3 * latency))
    assert 1e3 * there.seconds(Message(kind, int(megabytes * MB))) == pytest.approx(measured, rel=0.05)


def test_a_notice_of_gloo_waits_behind_segments():
    """Each segment takes a second: that of the latest process, and for the second pair the other one of the first."""
    there = network(3, 1, "gloo", bandwidth=(1, 0.025), latency=(0, 1e5))
    assert there.seconds(Message("all_gather", 150 * MB)) == pytest.approx(5 + 0.3)
    there = network(2, 1, "gloo", bandwidth=(1, 0.025), latency=(0, 1e5))
    assert there.seconds(Message("all_gather", 100 * MB)) == pytest.approx(3 + 0.2)


def test_more_bandwidth_or_less_latency_is_never_slower():
    for library in ("nccl", "gloo"):
        for kind in ("all_reduce", "all_gather", "reduce_scatter"):
            message = Message(kind, 10 * MB)
            base = network(16, 8, library, (100, 10), (2, 8)).seconds(message)
            assert network(16, 8, library, (100, 20), (2, 8)).seconds(message) <= base
            assert network(16, 8, library, (100, 10), (2, 4)).seconds(message) < base


def test_every_gpu_has_a_usual_interconnect():
    assert USUAL_WITHIN.keys() == GPU_MEMORY_GIB.keys()
    for gpu in GPU_MEMORY_GIB:
        assert usual(gpu).assumed and usual(gpu).within in WITHIN.values()
    assert named("ethernet-25", "A100").within == WITHIN["nvlink3"]
    assert named("infiniband-hdr200+nvlink4").between == BETWEEN["infiniband-hdr200"]
    with pytest.raises(UserError, match="name what is within a node"):
        named("nvlink", "A100")
    with pytest.raises(UserError, match="no usual link"):
        named("ethernet-25")


# ---- a step


def seconds(*events):
    """One byte takes a second between two processes; a micro-batch computes for 3 s, one forward and two backward."""
    return play(events, network(2, 1, bandwidth=(1, 1e-9)), 3.0)


def one(waits):
    return Send(Message("all_gather", 2), waits)  # half of it moves


def test_what_is_waited_for_is_exposed():
    step = seconds(Compute(True, 1), Compute(False, 1), one(waits=True))
    assert (step.computing, step.communicating, step.exposed, step.total) == pytest.approx((3, 1, 1, 4))
    assert (step.messages, step.sent_bytes, step.hidden) == (1, 1, 0)


def test_what_nobody_waits_for_is_hidden_as_long_as_something_is_computed():
    step = seconds(Compute(True, 1), one(waits=False), Compute(False, 1))
    assert (step.total, step.exposed, step.hidden) == pytest.approx((3, 0, 1))
    step = seconds(Compute(True, 1), *[one(waits=False)] * 5, Compute(False, 1))  # 5 s behind 2 s
    assert (step.total, step.exposed, step.hidden) == pytest.approx((6, 3, 2))


def test_two_messages_of_gloo_share_the_bandwidth_and_wait_together():
    def gathers(count, bandwidth):
        sends = [Send(Message("all_gather", 2), waits=False)] * count
        there = network(2, 1, "gloo", bandwidth=(1, bandwidth), latency=(0, 1e6))  # 2 s for each, to be announced
        return play([*sends, *map(Await, range(count))], there, 0.0)

    assert gathers(6, bandwidth=1).total == pytest.approx(3 * 2)
    alone = gathers(1, bandwidth=1e-9).total  # a byte takes a second, and the later process waits for half of one
    assert alone == pytest.approx(3.5) and gathers(2, bandwidth=1e-9).total == pytest.approx(3.5)
    assert gathers(2, bandwidth=1e-10).total == pytest.approx(20)  # 17 s each, 20 of them on the wire


def test_a_module_waits_for_its_weights():
    step = seconds(one(waits=False), one(waits=False), Await(0), Compute(True, 1), Await(1), Compute(False, 1))
    assert (step.total, step.exposed) == pytest.approx((4, 1))
