"""Tab completion: `fastvit --install-completion` gives it to a shell, and `answer` says what may follow on a line."""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastvit_engine.errors import UserError
from fastvit_engine.recipe_files import recipe_names, study_paths
from fastvit_engine.shown import say, shown

SHELLS = ("bash", "zsh")

_FIRST_LINE = "#compdef fastvit\n"  # of what we install
# What stands for a file or a folder.
_PATHS = ("DEST", "DIR", "FILE", "IMAGE", "MODEL", "RECIPE", "SHARDS", "SOURCE", "STUDY")


class InstallCompletion(argparse.Action):
    """Installs tab completion and ends the command, as --version does."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        try:
            say(install(str(values or "")))
        except UserError as error:
            parser.error(str(error))
        parser.exit()


def install(shell: str = "", environment: Mapping[str, str] = os.environ) -> str:
    """Writes the completions of a shell, or of $SHELL, into the user's folder for them; the same again changes nothing.

    Returns what to do next. Raises UserError for an unknown shell, and if the file is not ours or cannot be written.
    """
    from argcomplete import shellcode

    from fastvit_engine.files import atomic_write

    shell = shell or Path(environment.get("SHELL", "")).name
    if shell not in SHELLS:
        given = f"$SHELL is '{shell}'" if shell else "$SHELL is not set"
        raise UserError(f"{given}: say which shell, as --install-completion bash or --install-completion zsh")
    path = _completions(shell, environment)
    code = shellcode(["fastvit"], use_defaults=False, shell=shell)
    try:
        found = path.read_text(errors="replace") if path.exists() else None
        if found is not None and not found.startswith(_FIRST_LINE):
            raise UserError(f"{path} is not from this command: move it away, and run the command again")
        if found != code:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, code)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): make its folder writable for you") from error
    return f"{path}: {'already installed' if found == code else 'installed'}\n{_next(shell, path)}"


def _completions(shell: str, environment: Mapping[str, str]) -> Path:
    """The file that bash-completion loads when `fastvit` is first completed, or that compinit of zsh finds."""
    data = Path(environment.get("XDG_DATA_HOME", ""))
    if not data.is_absolute():  # which is to be ignored by the specification of these variables
        try:
            data = Path.home() / ".local" / "share"
        except RuntimeError as error:
            raise UserError("this user has no home directory: set XDG_DATA_HOME to a folder") from error
    if shell == "zsh":
        return data / "zsh" / "site-functions" / "_fastvit"
    folder = environment.get("BASH_COMPLETION_USER_DIR", "").partition(":")[0]  # of several, the first
    return (Path(folder).absolute() if folder else data / "bash-completion") / "completions" / "fastvit"


def _next(shell: str, path: Path) -> str:
    from shlex import quote

    if shell == "bash":
        return (
            "next: open a new shell. If `fastvit <Tab>` completes nothing there, bash-completion is not installed: "
            f"add this line to ~/.bashrc\n  source {quote(str(path))}"
        )
    return (
        "next: add these lines to ~/.zshrc, the first one before any compinit, and open a new shell\n"
        f"  fpath=({quote(str(path.parent))} $fpath)\n  autoload -Uz compinit && compinit"
    )


def is_asked() -> bool:
    """Whether a shell asks what may follow on its line, and nothing is to run."""
    return "_ARGCOMPLETE" in os.environ


def answer(parser: argparse.ArgumentParser) -> None:
    """Tells the shell that asks what may follow on its line, and ends the process."""
    import argcomplete
    from argcomplete.completers import BaseCompleter

    class Completer(BaseCompleter):
        def __call__(self, *, prefix: str, action: argparse.Action, **context: Any) -> list[str]:
            return candidates(prefix, action)

    argcomplete.autocomplete(parser, always_complete_options=False, default_completer=Completer())


def candidates(prefix: str, action: argparse.Action) -> list[str]:
    """What may complete `prefix` as a value of an argument, by the word that stands for the value in its help."""
    kind = action.metavar
    found: list[str] = []
    if kind == "RECIPE":
        found += recipe_names()
    if kind == "STUDY":
        found += study_paths()
    if kind in ("KEY", "KEY=VALUE"):
        found += _keys("=" if kind == "KEY=VALUE" else "")
    if kind == "RUN":
        found += run_folders(prefix)
    if kind in _PATHS:
        from argcomplete.completers import FilesCompleter

        found += FilesCompleter()(prefix)
    return [name for name in found if name.startswith(prefix)]


def run_folders(prefix: str) -> list[str]:
    """The run folders whose path begins with `prefix`, and with a slash at the end the folders that may hold some."""
    folder, slash, start = prefix.rpartition("/")
    try:
        places = sorted(Path(folder + slash).expanduser().iterdir())
    except (OSError, RuntimeError):  # no such folder, or one that may not be read; no such user
        return []
    found = []
    for place in places:
        hidden = place.name.startswith(".") and not start.startswith(".")
        if hidden or not place.name.startswith(start) or not place.is_dir() or shown(place.name) != place.name:
            continue  # names with control characters are left out, too: the shell would obey them
        run = (place / "environment.json").is_file()  # what `fastvit report` looks for, too
        found.append(folder + slash + place.name + ("" if run else "/"))
    return found


def _keys(end: str) -> list[str]:
    """Every key of the configuration that `--set` takes, with `end` behind it."""
    from fastvit_engine.config.keys import SOURCES, fields

    return [key + end for key in fields() if not key.startswith(f"{SOURCES}.")]
