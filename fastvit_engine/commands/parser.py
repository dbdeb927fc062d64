"""How the command line reads its arguments: each error is one sentence, and a command without its action shows help."""

import argparse
import re
import sys
from pathlib import Path
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


_URL = re.compile(r"(?!file:)[A-Za-z][A-Za-z0-9+.-]+:/|pipe:")


def local_path(text: str) -> Path:
    """The type of an argument that is a file or folder of this machine. Raises ArgumentTypeError for a URL."""
    return Path(local_text(text))


def local_text(text: str) -> str:
    """As `local_path`, for what may also be a pattern or a word. A file:// URL becomes its path."""
    if _URL.match(text):
        raise argparse.ArgumentTypeError(
            f"'{text}' is a URL, and this must be on this machine: name a local path, and copy it from or to the URL "
            "with your store's own tool"
        )
    return re.sub(r"^file:(//)?(?=/)", "", text)


def path_or_url(text: str) -> str:
    """The type of an argument that is on this machine or on a server. A file:// URL becomes its path."""
    if _URL.match(text) and "://" not in text:
        fix = f": write {text.replace(':/', '://', 1)}" if ":/" in text else ", and this must be a path or a URL"
        raise argparse.ArgumentTypeError(f"'{text}' is no URL{fix}")
    return re.sub(r"^file:(//)?(?=/)", "", text)


def output_path_or_url(text: str) -> str:
    """As `path_or_url`, for what is written. Raises ArgumentTypeError for a web server, which is only read."""
    if re.match(r"https?:/", text):
        raise argparse.ArgumentTypeError(
            f"'{text}' is on a web server, which is only read: name a local path or an object store (s3://, gs://, "
            "az://), or write to a local path and copy it there"
        )
    return path_or_url(text)


def positive(text: str) -> int:
    """An integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number
