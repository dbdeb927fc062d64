"""How a rank finds the memory that the launcher of its node holds."""

import os

import pytest

from fastvit_engine.checkpoint.in_memory import can_hold, held_copies
from fastvit_engine.checkpoint.in_memory.held import OF_NODE, held_here
from fastvit_engine.errors import UserError

pytestmark = pytest.mark.skipif(not can_hold(), reason="needs Linux's memfd_create")


def test_areas_of_an_agent_are_opened_only_for_true():
    with held_copies(2, guests=True) as holder:
        environment = holder.environment_of_node
        assert held_here("auto", environment).areas == [] and held_here(True, {}).areas == []
        held = held_here(True, environment)
        assert (len(held.own), len(held.guests)) == (2, 2)
        inodes = [os.fstat(area.descriptor).st_ino for area in held.areas]
        assert inodes == [os.fstat(area.descriptor).st_ino for area in (*holder.areas, *holder.guests)]
        for area in held.areas:
            os.close(area.descriptor)


def test_a_file_in_the_place_of_an_area_is_left_alone(tmp_path):
    """The agent has ended, and its process number is another process's now."""
    file = tmp_path / "thesis"
    file.write_text("three years of work")
    with open(file, "r+") as opened:
        descriptor = opened.fileno()
        environment = {OF_NODE: f"/proc/{os.getpid()}/fd {descriptor} {descriptor}"}
        with pytest.raises(UserError, match=r"cannot be opened \(it is another file, so the agent that held it has"):
            held_here(True, environment)
    assert file.read_text() == "three years of work"


def test_an_agent_that_is_gone_is_a_sentence():
    environment = {OF_NODE: "/proc/self/fd/nowhere 3 4"}
    with pytest.raises(UserError, match=r"cannot be opened \(.*\): run agent and processes as one user in one cont"):
        held_here(True, environment)
