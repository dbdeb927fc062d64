"""The `fastvit` command: runs a subcommand, and ends with an exit code and, if it fails, one sentence."""

import argparse
import errno
import gc
import importlib.util
import os
import signal
import sys
import warnings
from collections.abc import Callable, Container, Sequence
from functools import partial

from fastvit_engine import __version__
from fastvit_engine.commands.completion import SHELLS, InstallCompletion, answer, is_asked
from fastvit_engine.commands.parser import Parser
from fastvit_engine.distributed.environment import speaks_for_all
from fastvit_engine.errors import EXIT_BAD_INPUT, EXIT_PREEMPTED, EXIT_RESTART, Preempted, RestartError, UserError
from fastvit_engine.shown import say, shown

# What `fastvit --help` says of each command, which is a module of `commands`.
_PURPOSES = {
    "train": "train a model, from scratch or from weights",
    "evaluate": "accuracy and loss of trained models on labelled images",
    "predict": "classes of images, with probabilities",
    "fewshot": "accuracy of a linear classifier on a model's features, from a few images per class",
    "features": "what a model sees in images, as an .npz file",
    "inspect": "pictures of what a model has learned and where it looks",
    "robustness": "accuracy with parts of the images missing, exchanged, or made to deceive",
    "study": "train runs that differ in some settings, and compare what they reached",
    "flops": "parameters and operations of models, and the paper's table of what pretraining costs",
    "plan": "what a run would need and what the engine would choose, without starting it",
    "doctor": "check machine, software, data and network, and say what to fix",
    "data": "make, index, verify and look at shards",
    "config": "list recipes, show one as it will be used, or explain the keys",
    "report": "write an HTML report of a run, or compare several",
    "export": "write a checkpoint's weights as one safetensors file",
    "convert": "write a model in the layout of another program",
    "stacks": "write the stack traces of a run in progress",
    "bench": "measure kernels, training steps and data loading against other libraries",
}

# What a disk says that is full, and one that is broken or on a machine that cannot be reached.
_FULL = (errno.ENOSPC, errno.EDQUOT)
_LOST = (errno.EIO, errno.ESTALE, errno.ENOTCONN)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code, see `errors`. An expected failure prints one sentence."""
    if is_asked():
        answer(_parser())
    words = sys.argv[1:] if arguments is None else arguments
    command = next((word for word in words if not word.startswith("-")), "")
    args = _parser([command]).parse_args(words)
    warnings.formatwarning = _format_warning
    try:
        code = _run(args)
        if arguments is None:
            gc.freeze()  # or Python looks through all objects as it ends, seconds if PyTorch is loaded
        return code
    except Exception as error:  # a bug: if other processes wait for this one, it must exit at once, see _fail
        if "RANK" not in os.environ:
            raise
        sys.excepthook(type(error), error, error.__traceback__)
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


def _parser(declared: Container[str] = _PURPOSES) -> argparse.ArgumentParser:
    """declared: the commands whose arguments are declared, which loads their modules. All others have only a name."""
    parser = Parser(prog="fastvit", description="Pretrain Vision Transformers at scale.")
    parser.add_argument("--version", action="version", version=f"fastvit-engine {__version__}")
    parser.add_argument("--install-completion", action=InstallCompletion, nargs="?", choices=SHELLS, help="complete "
                        "words of this command with the Tab key in bash or zsh (default: your $SHELL)")  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, purpose in _PURPOSES.items():
        if name in declared:
            importlib.import_module(f"fastvit_engine.commands.{name}").add(commands, purpose)
        else:
            commands.add_parser(name, help=purpose)
    return parser
