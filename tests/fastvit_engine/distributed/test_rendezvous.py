"""Whether a process finds rank 0, and what it says if it does not."""

import socket
import time

import pytest

from fastvit_engine.distributed import rendezvous, supervise
from fastvit_engine.errors import RestartError, UserError


@pytest.fixture
def taken():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def ranks(port, *, rank=1, address="127.0.0.1", **more):
    variables = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": str(port)}
    return variables | more


def test_rank_0_that_answers_is_found(taken):
    rendezvous.check_rendezvous(ranks(taken))


def test_rank_0_may_come_late(taken):
    port = supervise.free_port()
    with pytest.raises(
        RestartError, match=f"cannot reach rank 0 at MASTER_ADDR=127.0.0.1, MASTER_PORT={port} after 1 s"
    ):
        rendezvous.check_rendezvous(ranks(port), patience=0.5)


def test_a_taken_port_is_named(taken):
    with pytest.raises(UserError, match=f"MASTER_PORT is {taken}, which .* cannot open"):
        rendezvous.check_rendezvous(ranks(taken, rank=0))


def test_the_port_that_torchrun_serves_itself_is_not_taken(taken):
    rendezvous.check_rendezvous(ranks(taken, rank=0, TORCHELASTIC_USE_AGENT_STORE="True"))


def test_no_port_at_all():
    with pytest.raises(UserError, match="MASTER_PORT is 99999: a port is a number from 1 to 65535"):
        rendezvous.check_rendezvous(ranks(99999))


def test_a_name_that_does_not_resolve():
    start = time.monotonic()
    with pytest.raises(UserError, match="MASTER_ADDR is 'nowhere.invalid', a name that .* cannot resolve"):
        rendezvous.check_rendezvous(ranks(1, address="nowhere.invalid"))
    assert time.monotonic() - start < 20


def test_loopback_leads_to_no_other_host(taken):
    with pytest.raises(UserError, match="rank 1 would look for rank 0 on its own host"):
        rendezvous.check_rendezvous(ranks(taken, LOCAL_WORLD_SIZE="1", GLOO_SOCKET_IFNAME="lo"))


@pytest.mark.parametrize(("own", "problem"), [("127.0.1.1", "resolves to 127.0.1.1"), (None, "does not resolve")])
def test_a_host_whose_own_name_misleads_the_others(monkeypatch, taken, own, problem):
    monkeypatch.setattr(rendezvous, "_resolve", lambda name: "10.0.0.1" if name == "head" else own)
    with pytest.raises(UserError, match=f"{problem}.*set GLOO_SOCKET_IFNAME"):
        rendezvous.check_rendezvous(ranks(taken, address="head", LOCAL_WORLD_SIZE="1"))
