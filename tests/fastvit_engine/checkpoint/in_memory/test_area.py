"""The memory of a rank's copies: whatever moment a kill comes at, what counts is whole."""

import os

import pytest

from fastvit_engine.checkpoint.in_memory.area import newest_common
from fastvit_engine.checkpoint.in_memory.held import INHERITED, held_here
from fastvit_engine.checkpoint.in_memory.holder import can_hold, held_copies
from fastvit_engine.errors import UserError

pytestmark = pytest.mark.skipif(not can_hold(), reason="needs Linux's memfd_create")


@pytest.fixture
def areas():
    with held_copies(2) as holder:
        yield holder.areas


def write(area, sequence, step, content=b"weights", description=b"{}"):
    slot = area.begin(len(content), len(description))
    os.pwrite(area.descriptor, content, slot.start)
    area.commit(slot, sequence, step, description)


def content(area, sequence, size=7):
    return bytes(area.map(area.copies()[sequence].start, size)[:])


def test_a_new_area_holds_nothing(areas):
    assert areas[0].copies() == {}
    assert newest_common(areas) is None


def test_two_copies_are_kept_and_the_older_one_makes_way(areas):
    for sequence in (1, 2, 3):
        write(areas[0], sequence, 10 * sequence, b"weight%d" % sequence)
    assert {copy.sequence: copy.step for copy in areas[0].copies().values()} == {2: 20, 3: 30}
    assert content(areas[0], 2) == b"weight2" and content(areas[0], 3) == b"weight3"


def test_a_copy_that_was_not_finished_is_none_and_the_one_before_is_still_there(areas):
    write(areas[0], 1, 10, b"weight1")
    write(areas[0], 2, 20, b"weight2")
    slot = areas[0].begin(7, 2)
    os.pwrite(areas[0].descriptor, b"wei", slot.start)  # here the kill
    assert list(areas[0].copies()) == [2]
    assert content(areas[0], 2) == b"weight2"


@pytest.mark.parametrize("byte", [0, 8, 24, 47, 55])
def test_a_record_that_was_half_written_does_not_count(areas, byte):
    write(areas[0], 1, 10)
    os.pwrite(areas[0].descriptor, b"\xff", byte)
    assert areas[0].copies() == {}


def test_a_description_that_was_half_written_does_not_count(areas):
    write(areas[0], 1, 10, description=b"all of it")
    at = os.pread(areas[0].descriptor, os.fstat(areas[0].descriptor).st_size, 0).index(b"all of it")
    os.pwrite(areas[0].descriptor, b"\0", at + 5)
    assert areas[0].copies() == {}


def test_ranks_agree_on_the_newest_copy_that_all_have(areas):
    for sequence in (1, 2):
        write(areas[0], sequence, 10 * sequence)
    write(areas[1], 1, 10)
    areas[1].begin(7, 2)  # the second was cut short there
    assert newest_common(areas) == 1
    write(areas[1], 2, 20)
    assert newest_common(areas) == 2


def test_ranks_that_have_no_copy_in_common_have_none(areas):
    write(areas[0], 5, 50)
    write(areas[1], 4, 40)
    assert newest_common(areas) is None


def test_what_training_continues_from_is_kept_and_the_rest_dropped(areas):
    for sequence in (1, 2):
        write(areas[0], sequence, 10 * sequence)
    areas[0].keep_only(1)
    assert list(areas[0].copies()) == [1]
    areas[0].keep_only(None)
    assert areas[0].copies() == {}


def test_a_larger_copy_gets_room_and_no_stale_record_points_into_it(areas):
    write(areas[0], 1, 10)
    write(areas[0], 2, 20, b"w" * 10_000, b"d" * 5_000)
    assert list(areas[0].copies()) == [2]
    assert content(areas[0], 2, 10_000) == b"w" * 10_000
    write(areas[0], 3, 30, b"v" * 10_000, b"d" * 6_000)  # which fits now
    assert list(areas[0].copies()) == [2, 3]


def test_what_is_written_through_a_reading_map_stays_there(areas):
    write(areas[0], 1, 10)
    areas[0].map(areas[0].copies()[1].start, 7)[:] = b"changed"
    assert content(areas[0], 1) == b"weights"


def test_a_rank_finds_what_the_launcher_holds_and_without_one_nothing():
    with held_copies(3) as holder:
        found = held_here("auto", holder.environment).own
        assert [area.descriptor for area in found] == [area.descriptor for area in holder.areas]
        write(found[0], 1, 10)
        assert holder.newest_step is None
        write(found[1], 1, 10)
        write(found[2], 1, 10)
        assert holder.newest_step == 10
        holder.forget()
        assert holder.newest_step is None
    assert held_here("auto", {}).own == () == held_here(True, {INHERITED: ""}).own


def test_a_rank_of_an_agent_opens_what_that_holds_if_the_run_asks_for_it():
    with held_copies(2, guests=True) as holder:
        assert held_here("auto", holder.environment_of_node).areas == []
        found = held_here(True, holder.environment_of_node)
        assert [len(found.own), len(found.guests)] == [2, 2]
        write(found.own[1], 1, 10)
        write(found.guests[0], 1, 10)
        assert [list(area.copies()) for area in (*holder.areas, *holder.guests)] == [[], [1], [1], []]
        holder.forget()
        assert [area.copies() for area in found.areas] == [{}, {}, {}, {}]
    with pytest.raises(UserError, match=r"the memory that the agent of this node holds, .*: run agent and processes"):
        held_here(True, holder.environment_of_node)  # by now, it is closed
