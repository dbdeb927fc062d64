from itertools import islice

from fastvit_engine.data.stream.skip import step_start, step_starts


def test_steps_jump_over_windows_wherever_a_run_goes_on():
    skipped = [(64, 96), (0, 32), (96, 128), (192, 224)]
    starts = list(islice(step_starts(0, 32, skipped), 5))
    assert starts == [32, 128, 160, 224, 256]
    for done, start in enumerate(starts):
        consumed = starts[done - 1] + 32 if done else 0
        assert step_start(consumed, 32, skipped) == start
        assert list(islice(step_starts(consumed, 32, skipped), 5 - done)) == starts[done:]


def test_windows_behind_do_not_matter():
    assert step_start(256, 32, [(0, 32), (64, 256)]) == 256


def test_a_step_that_has_a_position_in_a_window_is_left_out_whole():
    """As when the batch has changed since the window was written."""
    assert list(islice(step_starts(32, 32, [(64, 100)]), 3)) == [32, 128, 160]
    assert list(islice(step_starts(0, 48, [(32, 64), (100, 101)]), 2)) == [144, 192]
    assert list(islice(step_starts(10, 7, [(11, 12), (24, 25)]), 3)) == [17, 31, 38]
    for consumed in range(0, 300, 7):
        start = step_start(consumed, 7, [(64, 100), (200, 201)])
        assert (start - consumed) % 7 == 0
        assert not {*range(start, start + 7)} & {*range(64, 100), 200}
        assert all({*range(s, s + 7)} & {*range(64, 100), 200} for s in range(consumed, start, 7))
