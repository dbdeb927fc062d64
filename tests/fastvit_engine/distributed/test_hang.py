from fastvit_engine.distributed.hang import RankStatus, describe_hang, describe_loss

BACKWARD = {"step": 17, "phase": "backward", "marks": 3, "seconds": 300.0}


def statuses(**changes):
    """Three ranks in the backward pass, but for `r0`, `r1`, `r2`."""
    return [RankStatus(rank, f"host{rank}", **(BACKWARD | changes.get(f"r{rank}", {}))) for rank in range(3)]


def test_a_silent_rank_is_at_fault_wherever_the_others_are():
    message, ranks = describe_hang(statuses(r0={"marks": 1}), {2: 21.4}, 300.2)
    assert ranks == [2]
    assert message.startswith("no process has made progress for 300 s: rank 2 on host2 was last heard of 21 s ago")
    assert message.endswith("in 'backward' after step 17")


def test_the_rank_that_is_behind_is_at_fault():
    message, ranks = describe_hang(statuses(r1={"phase": "waiting for data", "marks": 1, "seconds": 299.0}), {}, 300.0)
    assert ranks == [1]
    assert "rank 1 on host1 is late, in 'waiting for data' after step 17 for 299 s" in message
    assert message.endswith("while rank 0 on host0 is in 'backward' after step 17")


def test_an_earlier_step_is_behind_whatever_the_marks():
    assert describe_hang(statuses(r2={"step": 16, "marks": 9}), {}, 300.0)[1] == [2]
    assert describe_hang(statuses(r2={"step": None, "marks": 9}), {}, 300.0)[1] == [2]


def test_nobody_is_accused_if_all_are_equally_far():
    message, ranks = describe_hang(statuses(), {}, 300.0)
    assert ranks == []
    assert "all ranks are alive in 'backward' after step 17" in message


def test_many_ranks_at_fault_are_counted():
    many = [RankStatus(rank, "host", step=1) for rank in range(100)]
    message, ranks = describe_hang(many, dict.fromkeys(range(10, 100), 30.0), 300.0)
    assert ranks == list(range(10, 100))
    assert "rank 13 on host" in message
    assert "rank 14 on host" not in message
    assert message.endswith("; and 86 more")


def test_a_lost_rank_is_named_with_the_cause():
    message = describe_loss(statuses()[2:], "Connection closed by peer")
    assert message == "rank 2 on host2 is gone, last heard of in 'backward' after step 17: Connection closed by peer"
    assert "every rank is alive" in describe_loss([], "Connection closed by peer")
