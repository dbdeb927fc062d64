"""A check in a process of its own: what it sends arrives, and nothing that it does ends the report."""

import ctypes
import os
import signal
import subprocess
import time
from functools import partial

import pytest

from fastvit_engine.doctor.isolated import Isolated, Outcome, run_isolated, stopping
from fastvit_engine.errors import UserError
from tests.fastvit_engine.doctor.limits import Limit, state_of


def test_messages_arrive_in_order_and_what_is_printed_goes_nowhere(capfd):
    def check(send):
        print("noise on stdout")
        os.write(2, b"noise on stderr\n")
        for number in range(3):
            send({"number": number, "long": "x" * 100_000})

    outcome = run_isolated(check, 20)
    assert [message["number"] for message in outcome.messages] == [0, 1, 2]
    assert outcome.failure is None
    assert capfd.readouterr() == ("", "")


def fail(send, error):
    send("before")
    raise error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ImportError("libcudart.so.13: cannot open"), "it failed: ImportError: libcudart.so.13: cannot open"),
        (UserError("the store is away: wait"), "it failed: the store is away: wait"),
        (SystemExit(3), "it failed: SystemExit: 3"),
    ],
)
def test_a_check_that_fails_says_why_and_what_it_had_sent_stays(error, words):
    outcome = run_isolated(partial(fail, error=error), 20)
    assert (outcome.messages, outcome.failure) == (["before"], words)


def test_a_crash_of_a_library_is_named_with_its_last_words():
    def crash(send):
        os.write(2, b"terminate called after throwing\n")
        os.kill(os.getpid(), signal.SIGABRT)

    assert run_isolated(crash, 20).failure == "it was killed by SIGABRT: terminate called after throwing"


def test_a_check_that_holds_the_interpreter_ends_at_its_limit_with_all_that_it_has_started(tmp_path):
    """As a driver's call that never returns does."""

    def hang(send):
        child = subprocess.Popen(["sleep", "600"])
        send(child.pid)
        limit.near()
        ctypes.PyDLL(None).sleep(600)  # without releasing the lock of the interpreter

    limit = Limit("S")
    outcome = limit.run(hang, 0.5)
    assert (outcome.failure, outcome.timely, outcome.busy) == ("it did not end within 0.5 s", False, False)
    (child,) = outcome.messages
    assert is_gone(child)


def test_a_check_is_waited_for_no_longer_than_its_limit():
    outcome = run_isolated(lambda send: time.sleep(600), 0.2)
    assert (outcome.failure, outcome.timely) == ("it did not end within 0.2 s", False)


def test_a_check_that_ended_in_time_is_timely_even_if_this_process_had_no_core_to_see_it():
    with stopping([Isolated(lambda send: send("done"), 60)]) as (one,):
        assert is_gone(one._process)
        one._deadline = time.monotonic()
        assert one.wait() == Outcome(["done"], None)


def is_gone(process):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if state_of(process) in ("Z", "gone"):
            return True
        time.sleep(0.01)
    return False


def test_a_check_that_nobody_waits_for_ends(monkeypatch):
    """The kernel ends it, if the process that started it was killed."""
    monkeypatch.setattr("fastvit_engine.doctor.isolated._SPARE", 0.1)
    check = Isolated(lambda send: time.sleep(600), 0.2)
    assert is_gone(check._process)
    check.stop()
