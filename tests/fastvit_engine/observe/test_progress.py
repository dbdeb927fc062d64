import contextlib
import io
import os
import pty
import re

import pytest

from fastvit_engine.observe.progress import Display, TrainingProgress, WorkProgress
from fastvit_engine.shown import say
from tests.fastvit_engine.observe.conftest import eval_row, few_shot_row, loss_row, own_row, train_row


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A terminal of COLUMNS columns that remembers what was sent to it."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """The lines a person sees, from movements of the cursor and erasures."""
        lines, row, column = [""], 0, 0
        for token in re.findall(r"\r|\n|\x1b\[[0-9]*[A-Z]|[^\r\n\x1b]+", self.getvalue()):
            if token == "\n":
                row, column = row + 1, 0
                lines += [""] * (row + 1 - len(lines))
            elif token == "\r":
                column = 0
            elif token == "\x1b[K":
                lines[row] = lines[row][:column]
            elif token == "\x1b[J":
                lines[row:] = [lines[row][:column]]
            elif token[0] == "\x1b":
                row += int(token[2:-1]) * {"A": -1, "B": 1}[token[-1]]
                assert 0 <= row < len(lines)
            else:
                lines[row] = (lines[row].ljust(column))[:column] + token + lines[row][column + len(token) :]
                column += len(token)
        return lines


@pytest.fixture(autouse=True)
def terminal_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")


def test_plain_lines_when_not_a_terminal() -> None:
    stream, clock = io.StringIO(), Clock()
    with contextlib.closing(TrainingProgress(840, stream=stream, clock=clock)) as progress:
        for step in range(1, 101):
            clock.now += 0.1
            progress.advance(step)
            if step % 50 == 0:
                progress.log(train_row(step))
        progress.message("checkpoint saved")
    first, second, third = stream.getvalue().splitlines()
    assert first.startswith("step 50/840  loss 0.0400  ETA 1 min 19 s  750 images/s  MFU 15.5 %  data wait 1.0 %")
    assert second.startswith("step 100/840  loss 0.0200  ETA 1 min 14 s")
    assert third == "checkpoint saved"
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    TrainingProgress(10, stream=stream).log(train_row(1))
    assert "\r" not in stream.getvalue()


def test_a_held_out_loss_is_shown_where_accuracy_is_not_known() -> None:
    stream, clock = Terminal(), Clock()
    with contextlib.closing(TrainingProgress(10, stream=stream, clock=clock)) as progress:
        progress.log(train_row(5, mfu=None))
        progress.log_evaluation(loss_row(5, 0.75))
    screen = stream.screen()
    assert screen[0] == "evaluation (step 5): loss 0.75  (360 images in 0.4 s)"
    assert any("held-out loss 0.75 (step 5)" in line for line in screen[1:])


def test_live_lines_are_rewritten_in_place_below_messages() -> None:
    stream, clock = Terminal(), Clock()
    with contextlib.closing(TrainingProgress(10, stream=stream, clock=clock)) as progress:
        for step in range(1, 11):
            clock.now += 1.0
            progress.log(train_row(step, mfu=None))
            if step == 5:
                progress.log_evaluation(eval_row(5, 0.972))
                progress.log_evaluation(eval_row(5, 0.975, eval="eval_ema", top5=None))
                progress.log_evaluation(few_shot_row(5, 0.25, 0.5))
                progress.log_evaluation(own_row(5, recall=0.5))
                progress.message("checkpoint saved")
                assert stream.screen()[6].endswith("5/10  ETA 5.0 s  epoch 0.22")
                assert stream.screen()[6].startswith("━" * 15 + "─" * 15 + " ")
    assert stream.screen() == [
        "evaluation (step 5): top-1 97.2 %  top-5 99.0 %  loss 0.1  (360 images in 0.4 s)",
        "evaluation (EMA weights, step 5): top-1 97.5 %  loss 0.1  (360 images in 0.4 s)",
        "few-shot accuracy (step 5): 1-shot 25.0 %  5-shot 50.0 %  (360 images in 2.0 s)",
        "mine (step 5): recall 0.5  (in 0.5 s)",
        "checkpoint saved",
        "",
        "━" * 30 + " 10/10  epoch 0.45",
        "loss 0.2000  █▄▃▂▁▁▁▁▁▁  lr 0.001  gradient norm 0.5",
        "750 images/s  data wait 1.0 %  memory 300.0 MiB",
        "top-1 97.2 % (step 5)  EMA top-1 97.5 % (step 5)  1-shot 25.0 %  5-shot 50.0 %  recall 0.5",
        "",
    ]


def test_what_others_write_stays_above_the_live_lines() -> None:
    """The cursor waits on an empty line, so another process's message is whole, and the next redraw is below it."""
    stream, clock = Terminal(), Clock()
    progress = TrainingProgress(10, stream=stream, clock=clock)
    progress.log(train_row(5))
    stream.write("rank 1: something is odd\n")
    clock.now += 1.0
    progress.advance(6)
    assert stream.screen()[0] == "rank 1: something is odd"
    assert [line.partition("  ")[0] for line in stream.screen()[1:]] == [
        "",
        "━" * 18 + "─" * 12 + " 6/10",
        "loss 0.4000",
        "750 images/s",
    ]


def test_what_the_process_itself_says_takes_the_place_of_the_live_lines(capsys: pytest.CaptureFixture[str]) -> None:
    stream = Terminal()
    progress = TrainingProgress(10, stream=stream)
    progress.log(train_row(5))
    say("two\nlines", file=stream)
    assert stream.screen() == ["two", "lines", ""]
    progress.close()
    say("more", file=stream)
    assert stream.screen() == ["two", "lines", "more", ""]


@pytest.mark.parametrize("ends", ["closed", "killed"])
def test_the_next_prompt_is_on_a_line_of_its_own(ends: str) -> None:
    """Without a mode of the terminal that anybody would have to reset: killed, it is above what was drawn."""
    stream = Terminal()
    progress = TrainingProgress(10, stream=stream)
    progress.log(train_row(5))
    if ends == "closed":
        progress.close()
    before = stream.screen()
    stream.write("$ ")
    changed = [line for line, then in zip(stream.screen(), before, strict=True) if line != then]
    assert changed == ["$ "]
    assert set(re.findall(r"\x1b\[[0-9]*([A-Za-z])", stream.getvalue())) <= set("KJAB")


@pytest.mark.parametrize("columns", [1, 7, 12, 25, 40, 60, 79, 200])
def test_no_live_line_wraps(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    progress = TrainingProgress(1_000_000, start_step=999_998, stream=stream)
    progress.log(train_row(999_999))
    progress.log_evaluation(eval_row(999_999, 0.5))
    drawn = stream.screen()[-4:]
    assert all(len(line) < columns or columns == 1 for line in drawn)
    assert drawn[0].startswith("999999/1000000"[: columns - 1]) or "━" in drawn[0]


@pytest.mark.parametrize(("lines", "drawn"), [(24, 4), (5, 3), (3, 1), (1, 1)])
def test_no_more_lines_are_drawn_than_the_terminal_has(monkeypatch: pytest.MonkeyPatch, lines: int, drawn: int) -> None:
    monkeypatch.setenv("LINES", str(lines))
    stream = Terminal()
    progress = TrainingProgress(10, stream=stream)
    progress.log(train_row(5))
    progress.log_evaluation(eval_row(5, 0.5))
    assert len(stream.screen()[2:]) == drawn


def test_wide_characters_count_as_two_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "10")
    stream = Terminal()
    Display(stream).draw("写真" * 10)
    assert stream.screen() == ["写真写真"]


def test_a_narrow_terminal_keeps_the_most_important_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "36")
    stream, clock = Terminal(), Clock()
    progress = TrainingProgress(840, stream=stream, clock=clock)
    for step in (1, 2):
        clock.now += 1.0
        progress.log(train_row(step))
    first, second, third = stream.screen()[1:]
    assert first.endswith("2/840  ETA 13 min 58 s") and "epoch" not in first
    assert second == "loss 1.0000  █▁  lr 0.001" and third == "750 images/s  MFU 15.5 %"


def test_redraws_are_limited() -> None:
    stream, clock = Terminal(), Clock()
    progress = TrainingProgress(1000, stream=stream, clock=clock)
    for step in range(1, 1000):
        clock.now += 0.001
        progress.advance(step)
    assert stream.getvalue().count("\r") <= 2 * 11


def test_eta_leaves_out_the_first_step_and_evaluations() -> None:
    clock = Clock()
    progress = TrainingProgress(100, stream=io.StringIO(), clock=clock)
    assert progress.eta_seconds is None
    clock.now += 300.0  # the first step compiles
    progress.advance(1)
    assert progress.eta_seconds is None
    clock.now += 2.0
    progress.advance(2)
    assert progress.eta_seconds == pytest.approx(98 * 2.0)
    clock.now += 500.0
    progress.log_evaluation(eval_row(2, 0.5))
    clock.now += 2.0
    progress.advance(3)
    assert progress.eta_seconds == pytest.approx(97 * 2.0)


def test_eta_follows_a_change_of_speed() -> None:
    clock = Clock()
    progress = TrainingProgress(10_000, stream=io.StringIO(), clock=clock)
    for step in range(1, 1001):
        clock.now += 1.0 if step <= 500 else 3.0
        progress.advance(step)
    assert progress.eta_seconds == pytest.approx(9000 * 3.0, rel=1e-3)


def test_eta_after_a_restart_counts_only_its_own_steps() -> None:
    clock = Clock()
    progress = TrainingProgress(1000, start_step=900, stream=io.StringIO(), clock=clock)
    for step in (901, 902):
        clock.now += 1.0
        progress.advance(step)
    assert progress.eta_seconds == pytest.approx(98.0)


def test_a_stream_without_unicode_gets_an_ascii_bar() -> None:
    class Latin(Terminal):
        encoding = "latin-1"

    stream = Latin()
    TrainingProgress(10, stream=stream).log(train_row(5))
    assert stream.screen()[1].startswith("#" * 15 + "-" * 15 + " 5/10")
    assert stream.screen()[2] == "loss 0.4000  lr 0.001  gradient norm 0.5"


def test_the_width_is_that_of_the_stream_itself() -> None:
    import fcntl
    import struct
    import termios

    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 30, 0, 0))
    with os.fdopen(terminal, "w", encoding="utf-8") as stream:
        TrainingProgress(840, stream=stream).log(train_row(420))
        shown = os.read(controller, 10_000).decode()
    os.close(controller)
    lines = re.sub(r"\x1b\[[0-9]*[A-Z]|\r", "", shown).splitlines()
    assert lines[1].endswith("420/840  epoch 18.71") and "loss 0.0048  lr 0.001" in lines
    assert max(map(len, lines)) < 30


def test_plain_lines_of_data_work_tell_rate_and_time_left() -> None:
    stream = io.StringIO()
    clock = Clock()
    progress = WorkProgress(stream, clock=clock)
    progress.start("writing", 1200, "images")
    for second in range(1, 66):
        clock.now = 100.0 + second
        progress.update(10 * second, "3 failed")
    assert stream.getvalue().splitlines() == [
        "writing 300 of 1,200 images (25 %)  10 images/s  ETA 1 min 30 s  3 failed",
        "writing 600 of 1,200 images (50 %)  10 images/s  ETA 1 min 0 s  3 failed",
    ]


def test_the_rate_of_data_work_follows_what_happens_now() -> None:
    stream = io.StringIO()
    clock = Clock()
    progress = WorkProgress(stream, clock=clock)
    progress.start("writing", 100_000, "images")
    for second in range(30, 600, 30):
        clock.now = 100.0 + second
        progress.update(30 * second if second <= 300 else 9000 + 3 * (second - 300))
    assert "3 images/s" in stream.getvalue().splitlines()[-1].replace("3.0 ", "3 ")


def test_the_live_line_of_data_work_is_redrawn_and_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    stream = Terminal()
    clock = Clock()
    progress = WorkProgress(stream, clock=clock)
    progress.start("writing", 10, "images")
    progress.update(1)
    progress.update(2)  # too soon
    clock.now += 1.0
    progress.update(5)
    drawn = stream.getvalue().split("\r")
    assert len(drawn) == 3 and all(len(line.removesuffix("\x1b[K")) <= 29 for line in drawn)
    progress.clear()
    assert stream.getvalue().endswith("\r\x1b[K")


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_quiet_writes_nothing(stream: io.StringIO) -> None:
    clock = Clock()
    work = WorkProgress(stream, clock, quiet=True)
    work.start("writing", 10, "images")
    clock.now += 100.0
    work.update(5)
    work.clear()
    with contextlib.closing(TrainingProgress(10, stream=stream, clock=clock, quiet=True)) as training:
        training.log(train_row(10))
        training.log_evaluation(eval_row(10, 0.5))
        training.message("checkpoint saved")
    assert stream.getvalue() == ""
