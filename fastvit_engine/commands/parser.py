"""How the command line reads its arguments: each error is one sentence, and a command without its action shows help."""

import argparse
import re
import sys
from typing import NoReturn

from fastvit_engine.shown import shown

_CHOICE = re.compile(r"argument (\S+): invalid choice: '(.*)' \(choose from (.*)\)", re.DOTALL)


class Parser(argparse.ArgumentParser):
    """argparse's parser, whose errors say in one sentence what is wrong and what was probably meant (exit code 2)."""

    def error(self, message: str) -> NoReturn:
        if re.fullmatch(r"the following arguments are required: (COMMAND|ACTION|WHAT)", message):
            self.print_help(sys.stderr)
            self.exit(2)
        if wrong := _CHOICE.fullmatch(message):
            message = _unknown(*wrong.groups())
        self.exit(2, f"fastvit: error: {shown(message)} (see `{self.prog} --help`)\n")


def _unknown(argument: str, given: str, listed: str) -> str:
    """The sentence about a value that is none of the choices."""
    import difflib  # only for an error

    choices = [choice.strip(" '") for choice in listed.split(",")]
    near = difflib.get_close_matches(given, choices, n=1)
    what = argument if argument.startswith("-") else f"fastvit {argument.lower()}"
    hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(choices)}"
    return f"unknown {what} '{given}': {hint}"


def setting(text: str) -> str:
    """The type of --set. Raises ArgumentTypeError unless `text` has the form KEY=VALUE."""
    key, separator, _ = text.partition("=")
    if not separator or not key.strip():
        raise argparse.ArgumentTypeError(f"'{text}' has no '=': write --set KEY=VALUE, as --set train.precision=fp32")
    return text
