from itertools import islice

import pytest

from fastvit_engine.data.stream.skip import step_start, step_starts
from fastvit_engine.errors import UserError


def test_steps_jump_over_windows_wherever_a_run_goes_on():
    skipped = [(64, 96), (0, 32), (96, 128), (192, 224)]
    starts = list(islice(step_starts(0, 32, skipped), 5))
    assert starts == [32, 128, 160, 224, 256]
    for done, start in enumerate(starts):
        consumed = starts[done - 1] + 32 if done else 0
        assert step_start(consumed, skipped) == start
        assert list(islice(step_starts(consumed, 32, skipped), 5 - done)) == starts[done:]


def test_windows_behind_do_not_matter():
    assert step_start(256, [(0, 32), (64, 256)]) == 256


def test_windows_that_cut_through_a_step_are_refused():
    with pytest.raises(UserError, match=r"\[64, 100\), which are not whole steps of 32"):
        next(step_starts(32, 32, [(64, 100)]))
