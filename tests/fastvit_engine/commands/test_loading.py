"""What a command says while it loads PyTorch."""

import io

import pytest

from fastvit_engine.commands.loading import loading_pytorch
from fastvit_engine.observe import startup


class Screen(io.StringIO):
    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


@pytest.mark.parametrize(
    ("is_terminal", "rank", "says"), [(True, None, True), (True, "0", True), (True, "1", False), (False, None, False)]
)
def test_a_terminal_is_told_that_pytorch_is_being_loaded(monkeypatch, is_terminal, rank, says):
    screen = Screen(is_terminal)
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(startup, "_WORTH_A_LINE_SECONDS", 0.0)
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with loading_pytorch() as loading:
        loading.show()
        shown = screen.getvalue()
    assert ("loading PyTorch" in shown) == says
    assert says or screen.getvalue() == ""
    assert not says or screen.getvalue().endswith("\r\x1b[K")  # the line is gone
