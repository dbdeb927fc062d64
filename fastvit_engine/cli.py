"""The `fastvit` command: runs a subcommand, and ends with an exit code and, if it fails, one sentence."""

import argparse
import errno
import importlib.util
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial

from fastvit_engine import __version__
from fastvit_engine.commands import (
    bench,
    config,
    convert,
    data,
    doctor,
    evaluate,
    export,
    features,
    fewshot,
    plan,
    predict,
    report,
    stacks,
    train,
)
from fastvit_engine.commands.completion import SHELLS, InstallCompletion, answer
from fastvit_engine.commands.parser import Parser
from fastvit_engine.distributed.environment import speaks_for_all
from fastvit_engine.errors import EXIT_BAD_INPUT, EXIT_PREEMPTED, EXIT_RESTART, Preempted, RestartError, UserError
from fastvit_engine.shown import say, shown

# What a disk says that is full, and one that is broken or on a machine that cannot be reached.
_FULL = (errno.ENOSPC, errno.EDQUOT)
_LOST = (errno.EIO, errno.ESTALE, errno.ENOTCONN)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code, see `errors`. An expected failure prints one sentence."""
    parser = _parser()
    answer(parser)
    args = parser.parse_args(arguments)
    warnings.formatwarning = _format_warning
    try:
        return _run(args)
    except Exception:  # a bug: if other processes wait for this one, it must exit at once, see _fail
        if "RANK" not in os.environ:
            raise
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _run(args: argparse.Namespace) -> int:
    try:
        return int(args.run(args))
    except (UserError, RestartError, Preempted) as error:
        failed = getattr(args, "failed", None)  # what a command does then
        return _fail(str(error), error.exit_code, partial(failed, error) if failed else None)
    except BrokenPipeError:  # the reader of our output has left: `fastvit config list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in (*_FULL, *_LOST):
            raise
        where = f" of {error.filename}" if error.filename else ""
        code = EXIT_RESTART if args.command == "train" else EXIT_BAD_INPUT  # see observe/disk.py
        if error.errno in _FULL:
            return _fail(f"the disk{where} is full: make room and run the same command again", code)
        return _fail(f"the disk{where} fails ({error.strerror}): bring it back and run the same command again", code)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except ValueError as error:
        if not str(error).startswith("FASTVIT_KERNELS must "):  # which fastvit_kernels says when it is imported
            raise
        return _fail(f"environment variable {error}")
    except ModuleNotFoundError as error:
        if importlib.util.find_spec((error.name or "").partition(".")[0]) is not None:
            raise  # an installed package without one of its own parts is not the user's fault
        return _fail(f"this command needs the package '{error.name}': pip install 'fastvit-engine[train]'")


_usual_format = warnings.formatwarning


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning of ours as a line for people; one of a library as Python shows it, with its source."""
    if category is UserWarning and os.path.dirname(__file__) == os.path.commonpath(
        [os.path.abspath(filename), __file__]
    ):
        return f"warning: {shown(str(message))}\n"
    return _usual_format(message, category, filename, lineno, line)


def _fail(
    message: str, exit_code: int = EXIT_BAD_INPUT, end: Callable[[Callable[[str], None]], int] | None = None
) -> int:
    """Says what went wrong and returns the exit code. end: says it with the function it is given, or leaves it out."""

    def speak(text: str) -> None:
        if speaks_for_all():
            prefix = "" if exit_code == EXIT_PREEMPTED else "error: "
            say(f"fastvit: {prefix}{shown(text)}", file=sys.stderr)

    if end:
        exit_code = end(speak)
    else:
        speak(message)
    if "RANK" in os.environ:
        os._exit(exit_code)  # peers may be inside a collective, and an orderly exit would wait for them
    return exit_code


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="fastvit", description="Pretrain Vision Transformers at scale.")
    parser.add_argument("--version", action="version", version=f"fastvit-engine {__version__}")
    parser.add_argument("--install-completion", action=InstallCompletion, nargs="?", choices=SHELLS, help="complete "
                        "words of this command with the Tab key in bash or zsh (default: your $SHELL)")  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (
        train, evaluate, predict, fewshot, features, plan, doctor, data, config, report, export, convert, stacks, bench,
    ):  # fmt: skip
        command.add(commands)
    return parser
