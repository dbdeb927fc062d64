"""Tab completion: what is installed for a shell, and what the Tab key then does in a real bash or zsh."""

import argparse
import os
import pty
import re
import select
import shutil
import stat
import sys
import time
from pathlib import Path

import pytest

from fastvit_engine.cli import main
from fastvit_engine.commands.completion import candidates, install, run_folders
from fastvit_engine.config import recipe_names
from fastvit_engine.errors import UserError
from tests.fastvit_engine.test_cli import HEAVY, modules_after
from tests.in_full import in_full

# What is typed, and the words of the command that runs once the Tab keys have completed it.
LINES = {
    "train vit_h14_jf\t--set train.global_b\t64": ["train", "vit_h14_jft", "--set", "train.global_batch_size=64"],
    "rep\tru\tfi\t": ["report", "runs/first"],
    "data make a\\ f\t": ["data", "make", "a folder/"],
}
STARTS = {  # of a shell that reads no files but these, and says when it waits for a line
    "bash": (".bashrc", ["--noprofile", "--rcfile", ".bashrc", "-i"], "source '{file}'"),
    "zsh": (".zshrc", ["-d", "-i"], "fpath=('{file.parent}' $fpath); autoload -Uz compinit; compinit -u -D"),
}
FASTVIT = """#!/bin/sh
if [ -n "$_ARGCOMPLETE" ]; then exec '{python}' -m fastvit_engine "$@"; fi
printf 'RAN'; printf ' [%s]' "$@"; echo
"""


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """The environment of a user without any completions."""
    return {"XDG_DATA_HOME": str(tmp_path / "data"), "SHELL": "/usr/bin/zsh"}


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the run folders runs/first and runs/.hidden, an empty folder, and a file."""
    for name in ("first", ".hidden"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "environment.json").touch()
    (tmp_path / "runs" / "fifth").touch()
    (tmp_path / "runs" / "sweep").mkdir()
    (tmp_path / "a folder").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def typed(program: str, file: Path, folder: Path) -> list[str]:
    """What the shell prints after each of LINES, typed on a terminal in `folder`, with the completions of `file`."""
    rc, options, load = STARTS[Path(program).name]
    (folder / rc).write_text(f"PS1='READY> '; {load.format(file=file)}\n")
    command = folder / "bin" / "fastvit"
    command.parent.mkdir()
    command.write_text(FASTVIT.format(python=sys.executable))
    command.chmod(stat.S_IRWXU)
    environment = {
        "HOME": str(folder),
        "ZDOTDIR": str(folder),
        "PATH": f"{command.parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TERM": "dumb",
    }
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(folder)
        os.execve(program, [program, *options], environment)
    deadline = time.monotonic() + 120

    def output(pattern: str) -> str:
        """What comes next and ends with the first match of `pattern`, whose group is returned."""
        seen = ""
        while not (found := re.search(pattern, seen, re.DOTALL)):
            assert select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))[0], seen
            seen += os.read(terminal, 4096).decode()
        return found[1]

    printed = []
    try:
        output("(READY)> ")
        for line in LINES:
            os.write(terminal, f"fastvit {line}\n".encode())
            printed.append(output("RAN ([^\r\n]*).*READY> "))
    finally:
        os.close(terminal)
        os.waitpid(process, 0)
    return printed


@pytest.mark.parametrize("shell", ["bash", in_full("zsh")])
def test_the_tab_key_completes_a_line(shell: str, runs: Path, home: dict[str, str]) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"no {shell}")
    install(shell, home)
    (file,) = (path for path in Path(home["XDG_DATA_HOME"]).rglob("*fastvit") if path.is_file())
    ran = [" ".join(f"[{word}]" for word in words) for words in LINES.values()]
    assert typed(program, file, runs) == ran


def test_the_files_lie_in_the_folders_of_the_user(tmp_path: Path, home: dict[str, str]) -> None:
    assert f"{tmp_path}/data/bash-completion/completions/fastvit: installed\n" in install("bash", home)
    said = install("", home)  # $SHELL
    assert f"{tmp_path}/data/zsh/site-functions/_fastvit: installed\n" in said
    assert f"fpath=({tmp_path}/data/zsh/site-functions $fpath)" in said
    own = home | {"BASH_COMPLETION_USER_DIR": f"{tmp_path}/my own:{tmp_path}/other"}
    assert f"source '{tmp_path}/my own/completions/fastvit'" in install("bash", own)


@pytest.mark.parametrize("data", [None, "", "not/absolute"])
def test_without_an_absolute_data_folder_it_is_the_usual_one(
    data: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    install("bash", {} if data is None else {"XDG_DATA_HOME": data})
    assert (tmp_path / ".local" / "share" / "bash-completion" / "completions" / "fastvit").is_file()


def test_a_second_installation_changes_nothing_and_one_of_another_version_is_replaced(home: dict[str, str]) -> None:
    file = Path(install("bash", home).partition(":")[0])
    before = file.stat()
    assert "fastvit: already installed\n" in install("bash", home)
    assert file.stat().st_mtime_ns == before.st_mtime_ns and file.stat().st_ino == before.st_ino
    code = file.read_text()
    file.write_text("#compdef fastvit\nfrom a version before\n")
    assert "fastvit: installed\n" in install("bash", home)
    assert file.read_text() == code


@pytest.mark.parametrize("in_the_way", ["a file of others", "a folder"])
def test_what_is_not_ours_stays(in_the_way: str, home: dict[str, str]) -> None:
    file = Path(install("bash", home).partition(":")[0])
    file.unlink()
    if in_the_way == "a folder":
        file.mkdir()
    else:
        file.write_text("complete -W 'a b' fastvit\n")
    with pytest.raises(UserError, match=f"{file}.* is not from this command: move it away|cannot write {file}"):
        install("bash", home)
    assert file.is_dir() or file.read_text() == "complete -W 'a b' fastvit\n"


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path, home: dict[str, str]) -> None:
    (tmp_path / "data").touch()
    with pytest.raises(
        UserError, match=r"cannot write .*/data/bash-completion/completions/fastvit \(Not a directory\)"
    ):
        install("bash", home)


@pytest.mark.parametrize(("shell", "said"), [("/bin/fish", "is 'fish'"), (None, "is not set")])
def test_another_shell_is_refused(
    shell: str | None, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SHELL", raising=False)
    if shell:
        monkeypatch.setenv("SHELL", shell)
    with pytest.raises(SystemExit) as stop:
        main(["--install-completion"])
    errors = capsys.readouterr().err
    assert stop.value.code == 2 and errors.count("\n") == 1
    assert f"fastvit: error: $SHELL {said}: say which shell, as --install-completion bash" in errors


def test_a_recipe_is_one_that_comes_with_the_engine_or_a_file(runs: Path) -> None:
    action = argparse.Action([], "recipe", metavar="RECIPE")
    assert set(recipe_names()) <= set(candidates("", action))
    (runs / "quick.yaml").touch()
    assert candidates("quick", action) == ["quickstart", "quick.yaml"]


def test_a_run_folder_is_told_from_a_folder_that_may_hold_some(runs: Path) -> None:
    assert run_folders("runs/") == ["runs/first", "runs/sweep/"]
    assert run_folders("ru") == ["runs/"] and run_folders(f"{runs}/runs/f") == [f"{runs}/runs/first"]
    assert (
        run_folders("runs/.") == ["runs/.hidden"] and run_folders("gone/") == run_folders("~nobody-of-that-name/") == []
    )
    (runs / "runs" / "f\x1b[2J").mkdir()
    assert run_folders("runs/f") == ["runs/first"]


def test_a_number_has_no_candidates() -> None:
    assert candidates("", argparse.Action([], "gpus", metavar="N")) == []


def test_recipes_and_runs_are_completed_without_the_large_packages() -> None:
    code = (
        "    import argparse\n    from fastvit_engine import cli\n    from fastvit_engine.commands import completion\n"
    )
    code += "".join(
        f"    completion.candidates('', argparse.Action([], 'a', metavar='{kind}'))\n" for kind in ("RECIPE", "RUN")
    )
    assert modules_after(code).isdisjoint(HEAVY)
