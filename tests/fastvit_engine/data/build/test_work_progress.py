import io

from fastvit_engine.data.build.work_progress import WorkProgress


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_tell_rate_and_time_left():
    now = [0.0]
    stream = io.StringIO()
    progress = WorkProgress(stream, clock=lambda: now[0])
    progress.start("writing", 1200, "images")
    for second in range(1, 66):
        now[0] = float(second)
        progress.update(10 * second, "3 failed")
    assert stream.getvalue().splitlines() == [
        "writing 300 of 1,200 images (25 %)  10 images/s  ETA 1 min 30 s  3 failed",
        "writing 600 of 1,200 images (50 %)  10 images/s  ETA 1 min 0 s  3 failed",
    ]


def test_rate_follows_what_happens_now():
    now = [0.0]
    stream = io.StringIO()
    progress = WorkProgress(stream, clock=lambda: now[0])
    progress.start("writing", 100_000, "images")
    for second in range(30, 600, 30):
        now[0] = float(second)
        progress.update(30 * second if second <= 300 else 9000 + 3 * (second - 300))
    assert "3 images/s" in stream.getvalue().splitlines()[-1].replace("3.0 ", "3 ")


def test_terminal_line_is_redrawn_and_cleared(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "30")
    now = [0.0]
    stream = _Terminal()
    progress = WorkProgress(stream, clock=lambda: now[0])
    progress.start("writing", 10, "images")
    progress.update(1)
    progress.update(2)  # too soon
    now[0] = 1.0
    progress.update(5)
    drawn = stream.getvalue().split("\r")
    assert len(drawn) == 3 and all(len(line.removesuffix("\x1b[K")) <= 29 for line in drawn)
    progress.clear()
    assert stream.getvalue().endswith("\r\x1b[K")
    quiet = WorkProgress(stream, quiet=True)
    before = stream.getvalue()
    quiet.start("x", 1, "y")
    quiet.update(1)
    quiet.clear()
    assert stream.getvalue() == before
