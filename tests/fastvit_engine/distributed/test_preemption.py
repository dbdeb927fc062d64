import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from fastvit_engine.distributed.preemption import Preemption

pytestmark = pytest.mark.usefixtures("hangups_arrive")


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_request_is_noted_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with Preemption() as preemption:
        assert preemption.signal is None
        os.kill(os.getpid(), number)
        wait_for(lambda: preemption.signal == number)
        os.kill(os.getpid(), number)  # forwarded by the parent: no second request
        time.sleep(0.2)
    assert signal.getsignal(number) is before


def test_a_process_that_ignores_sighup_continues_to_do_so():
    """As nohup has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Preemption() as preemption:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.2)
            assert preemption.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_closes_asks_to_leave_and_takes_no_output_any_more(tmp_path):
    """The process finishes its step and prints; on the terminal that would be an error."""
    done = tmp_path / "done"
    code = (
        "import os, sys, time\nfrom fastvit_engine.distributed.preemption import Preemption\n"
        "with Preemption() as preemption:\n    print('ready', flush=True)\n"
        "    while preemption.signal is None:\n        time.sleep(0.01)\n    time.sleep(0.2)\n"
        "    print('saving', flush=True)\n    print('saved', file=sys.stderr, flush=True)\n"
        f"    open({str(done)!r}, 'w').write(preemption.signal.name)\n"
    )
    terminal, inside = pty.openpty()
    own_terminal = "import fcntl, termios\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", own_terminal + code], stdin=inside, stdout=inside, stderr=inside, start_new_session=True
    )
    os.close(inside)
    try:
        seen = b""
        while b"\n" not in seen:  # all of it: a write that the close cuts off would be an error
            seen += os.read(terminal, 1000)
    finally:
        os.close(terminal)
        process.wait(60)
    assert (process.returncode, done.read_text()) == (0, "SIGHUP")


def test_sigquit_asks_for_stack_traces_and_does_not_end_the_run():
    asked = []
    with Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGQUIT)  # before anybody is there to answer
        preemption.on_stack_request = lambda: asked.append(1)
        os.kill(os.getpid(), signal.SIGQUIT)
        wait_for(lambda: asked)
        assert preemption.signal is None


def test_a_second_request_ends_the_process_at_once_even_inside_c_code():
    code = (
        "import ctypes\nfrom fastvit_engine.distributed.preemption import Preemption\n"
        "with Preemption():\n    print('ready', flush=True)\n"
        "    lock = ctypes.create_string_buffer(64)\n    libc = ctypes.CDLL(None)\n"
        "    libc.sem_init(lock, 0, 0)\n"
        "    set = ctypes.create_string_buffer(128)\n    libc.sigfillset(set)\n"
        # The main thread stays in C code and lets no signal interrupt it, as in a collective operation.
        "    libc.pthread_sigmask(0, set, None)\n    libc.sem_wait(lock)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(2.5)
        assert process.poll() is None
        process.send_signal(signal.SIGUSR1)
        assert process.wait(20) == 128 + signal.SIGUSR1
    finally:
        process.kill()
        process.stdout.close()
