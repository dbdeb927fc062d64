"""What a run shows before its first step."""

import io

import pytest

from fastvit_engine.observe.startup import StartUp


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def fileno(self):
        raise OSError


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def started(stream, clock, **options):
    """A StartUp whose thread is this test."""
    return StartUp("joining", stream, clock, **{"quiet": False} | options)


def test_in_a_log_a_phase_worth_it_is_one_line_with_its_seconds(clock):
    log = io.StringIO()
    shown = started(log, clock)
    clock.now += 1.9
    shown.phase("reading")
    clock.now += 3.2
    shown.show()
    assert log.getvalue() == ""
    shown.phase("loading")
    assert log.getvalue() == "reading: 3.2 s\n"
    shown.done()
    shown.done()
    shown.phase("loading again, after the first step")
    clock.now += 99
    shown.show()
    assert log.getvalue() == "reading: 3.2 s\n"


def test_in_a_log_a_phase_that_goes_on_is_seen_to(clock):
    log = io.StringIO()
    shown = started(log, clock)
    for _ in range(150):
        clock.now += 1
        shown.show()
    assert log.getvalue().splitlines() == [
        "joining: 10 s so far",
        "joining: 1 min 10 s so far",
        "joining: 2 min 10 s so far",
    ]
    shown.phase("joining")  # is no other
    assert len(log.getvalue().splitlines()) == 3


def test_on_a_terminal_a_line_is_replaced_and_nothing_stays(clock, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    screen = Terminal()
    shown = started(screen, clock)
    clock.now += 1
    shown.show()
    assert screen.getvalue() == ""
    clock.now += 3
    shown.show()
    assert screen.getvalue() == "\rjoining  4.0 s\x1b[K"
    shown.pause()
    assert screen.getvalue().endswith("\r\x1b[K")


def test_only_the_first_rank_shows_anything(clock, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    log = io.StringIO()
    with StartUp("joining", log, clock) as shown:
        clock.now += 20
        shown.show()
    assert log.getvalue() == ""
