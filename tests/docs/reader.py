"""Follows a page of the documentation as a newcomer would: runs its commands and its Python from top to bottom.

What a page shows as the output of a step is compared with what the step prints: the words, not the numbers.
"""

import contextlib
import io
import os
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fastvit_engine.cli import main
from tests.fastvit_engine.warm_ranks import exit_codes_of
from tests.test_docs import FENCE

_STUBS = {
    "fastvit": 'printf "%q " "$@" >> "$COMMANDS"; echo >> "$COMMANDS"',  # what bash makes of the line, to be run below
    "curl": "",  # the files are there already
    "pip": "",
}
_NUMBER = r"\d[\d,.]*(?: [KMG]iB)?"


@dataclass
class Reader:
    """Somebody with a folder who follows a page.

    folder: the working directory; what the page begins with lies there, under the names that the page uses.
    smaller: settings that every `fastvit train` gets besides, so that it takes seconds. instead: pieces of code on the
    page, and what is run in their place.
    """

    folder: Path
    smaller: Sequence[str] = ()
    instead: Mapping[str, str] = field(default_factory=dict)
    scope: dict[str, Any] = field(default_factory=dict)
    ran: list[list[str]] = field(default_factory=list)  # the commands, without what `smaller` adds
    printed: dict[str, str] = field(default_factory=dict)  # by the command, without `fastvit`
    spoken: str = ""  # what the Python of the page has printed

    def follow(self, page: Path, *, section: str | None = None) -> None:
        """Runs the whole page, or what is between a heading and the next one.

        An AssertionError quotes the step that does not do as the page says.
        """
        text = page.read_text()
        if section is not None:
            text = re.split(r"^#+ ", f"\n{text}".partition(f"\n{section}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
            assert text, f"{page.name} has no heading {section}"
        blocks, output = FENCE.findall(text), ""
        for number, (language, block) in enumerate(blocks):
            if language == "bash":
                shown = next(iter(blocks[number + 1 :]), ("", ""))
                code = 2 if shown[0] == "" and shown[1].startswith("fastvit: error: ") else 0
                output = "".join(self._command(words, code) for words in self._commands(self._instead(block)))
            elif language == "python":
                output = self._python(self._instead(block))
            elif language == "":
                self._compare(block, output)
        missing = [piece for piece in self.instead if piece not in text]
        assert not missing, f"{page.name} no longer has {missing}"

    def _instead(self, block: str) -> str:
        for before, after in self.instead.items():
            block = block.replace(before, after)
        return block

    def _commands(self, block: str) -> list[list[str]]:
        """The arguments of each `fastvit` that bash would run."""
        stubs, record = self.folder / ".stubs", self.folder / ".commands"
        stubs.mkdir(exist_ok=True)
        for name, body in _STUBS.items():
            (stubs / name).write_text(f"#!/bin/bash\n{body}\n")
            (stubs / name).chmod(0o755)
        record.write_text("")
        environment = os.environ | {"PATH": f"{stubs}:{os.environ['PATH']}", "COMMANDS": str(record)}
        subprocess.run(["bash", "-euc", block], cwd=self.folder, env=environment, check=True, timeout=60)
        return [shlex.split(line) for line in record.read_text().splitlines()]

    def _command(self, words: list[str], expected: int) -> str:
        self.ran.append(words)
        title = f"fastvit {shlex.join(words)}"
        if words[0] == "train":
            log = self.folder / ".log"
            log.write_text("")
            settings = [word for setting in self.smaller for word in ("--set", setting)]
            codes = exit_codes_of([*words, *settings], 1, log, before=partial(os.chdir, self.folder))
            assert codes == [expected], f"{title}\n{log.read_text()}"
            output = log.read_text()
        else:
            said, errors = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
                code = main(words)
            assert code == expected, f"{title}\n{errors.getvalue()}"
            output = said.getvalue() + errors.getvalue()
        self.printed[shlex.join(words)] = output
        return output

    def _python(self, block: str) -> str:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(block, "page", "exec"), self.scope)
        self.spoken += said.getvalue()
        return said.getvalue()

    def _compare(self, shown: str, output: str) -> None:
        """Finds each line of `shown` in `output`, in this order: numbers may be others, and "..." is any text."""
        rest = output.splitlines()
        for line in shown.splitlines():
            if line == "...":
                continue
            pattern = self._pattern(line)
            found = next((number for number, other in enumerate(rest) if re.fullmatch(pattern, other)), None)
            assert found is not None, f"the page shows\n    {line}\nand this is printed:\n{output}"
            rest = rest[found + 1 :]

    @staticmethod
    def _pattern(line: str) -> str:
        parts = [re.sub(_NUMBER, "\0", part) for part in line.split("...")]
        return ".*".join(re.escape(part).replace("\0", _NUMBER) for part in parts)
