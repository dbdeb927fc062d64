"""What the listing of a source may ask for."""

import contextlib
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO

from fastvit_engine.data.build.parallel import Workers
from fastvit_engine.data.shards.image_files import has_image_suffix
from fastvit_engine.data.shards.remote_path import AnyPath, any_path, new_file
from fastvit_engine.data.shards.sample import is_macos_resource
from fastvit_engine.data.shards.splits import Splits, pattern_of
from fastvit_engine.errors import UserError
from fastvit_engine.observe.progress import WorkProgress
from fastvit_engine.shown import public_url


@dataclass
class Context:
    """What every source may use while it lists its images."""

    scratch: AnyPath  # a folder for what must be unpacked to be read by offset; kept until the shards are made
    workers: Workers
    progress: WorkProgress
    say: Callable[[str], None]
    classes: list[str] | None = None  # class names in label order, if they are given
    labels: str | None = None  # a file of labels, or the name of the column that holds them
    leave_out: list[str] = field(default_factory=list)  # patterns of what is not taken: paths of folders, names of tars
    source: str = "SOURCE"  # as the command line names it
    out: str = "DIR"
    certain: bool = False  # the format was given: nothing is left to guess
    heeded_leave_out: bool = False
    descriptions: list[str] = field(default_factory=list)  # what sources were taken for
    counts: Counter[str] = field(default_factory=Counter)  # of what is left out, by kind and reason, in the singular
    left_out: list[str] = field(default_factory=list)  # clauses about what else is left out

    def describe(self, what: str) -> None:
        """Says what the source was taken for."""
        self.descriptions.append(what)

    def command(self, *options: str, source: str | None = None) -> str:
        """A command line to offer, with these options."""
        return Context.offer(source or self.source, self.out)(*options)

    @staticmethod
    def offer(given: str, out: str = "DIR") -> Callable[..., str]:
        """What makes command lines to offer: from the source that is given, or another one, to the folder `out`."""

        def command(*options: str, source: str | None = None) -> str:
            return shlex.join(["fastvit", "data", "make", source or given, *options, "--out", out])

        return command

    def choose_by_name(self, names: list[str], where: AnyPath, kind: str) -> Splits:
        """The files of a folder by their splits, without those of --leave-out; says which files are which split.

        Files that name no split are for training if none names one. Raises UserError, with both commands, if only some
        do.
        """
        kept = self.take(names, where, kind)
        splits = Splits.of(kept)
        if splits.mixed:
            raise UserError(self._about_mixed(splits, kept, where, kind))
        named = splits.named()
        if len(named) < 2:
            if splits.val or splits.test:
                self.describe(f"all named {splits.held_out}")
            return Splits(kept, [], [])
        if "train" not in named:
            val, test = (f"{where}/{pattern_of(group, kept)}" for group in (splits.val, splits.test))
            raise UserError(
                f"the {kind}s in {where} are named val and test, and none is named train: name those to train on, "
                f"`{self.command('--eval-source', test, source=val)}` or `{self.command(source=val)}`"
            )
        held_out = splits.val or splits.test
        self.describe(f"{len(splits.train):,} named train, {len(held_out):,} named {splits.held_out} (eval)")
        if splits.val and splits.test:
            self.counts[f"{kind} named test (there is a validation split)"] += len(splits.test)
        return Splits(splits.train, held_out, [])

    def kept(self, names: list[str]) -> list[str]:
        """Those that no pattern of --leave-out matches."""
        return [name for name in names if not any(fnmatchcase(name, pattern) for pattern in self.leave_out)]

    def take(self, names: list[str], where: AnyPath, kind: str) -> list[str]:
        """The files of a folder without those of --leave-out. Raises UserError if one of its patterns matches none."""
        self.heeded_leave_out = True
        kept = self.kept(names)
        for pattern in self.leave_out:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise UserError(f"--leave-out is {pattern!r}, which is no {kind} in {where}: correct it")
        if len(kept) < len(names):
            self.counts[f"{kind} of --leave-out"] += len(names) - len(kept)
        return kept

    def _about_mixed(self, splits: Splits, names: list[str], where: AnyPath, kind: str) -> str:
        held_out = splits.val or splits.test
        evaluation = ["--eval-source", f"{where}/{pattern_of(held_out, names)}"] if held_out else []
        rest = [name for name in names if name not in splits.val and name not in splits.test]
        commands = [self.command(*evaluation, source=f"{where}/{pattern_of(rest, names)}")]
        if splits.train:
            commands.insert(0, self.command(*evaluation, source=f"{where}/{pattern_of(splits.train, names)}"))
        else:
            commands.append(self.command(source=f"{where}/{pattern_of(names, names)}"))
        return (
            f"some {kind}s in {where} are named by a split, and others, such as {splits.unnamed[0]}, are not: name "
            f"those to train on, `{commands[0]}` or `{commands[1]}`"
        )

    image_column: str | None = None  # of a table
    label_column: str | None = None
    split_column: str | None = None  # that the table has
    column_options: set[str] = field(default_factory=set)  # options about columns that a table has heeded

    def scratch_file(self, source: AnyPath, suffix: str) -> AnyPath:
        """A path in the scratch folder that belongs to `source` alone."""
        name = re.sub(r"[^A-Za-z0-9.-]+", "_", public_url(str(source.resolve()))).strip("_")[-200:]
        return any_path(f"{self.scratch}/{name}{suffix}")

    @staticmethod
    @contextlib.contextmanager
    def writing(path: AnyPath) -> Iterator[BinaryIO]:
        """Writes a scratch file that exists whole or not at all, also when several processes write it at once."""
        if isinstance(path, Path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as file:
            yield file


def is_image(name: str) -> bool:
    return why_left_out(name) is None


def why_left_out(name: str) -> str | None:
    """The kind of file that is left out for its name, such as "hidden file"; None for an image."""
    base = name.rpartition("/")[2]
    if is_macos_resource(name):
        return "macOS resource file"
    if base.startswith("."):
        return "hidden file"
    if has_image_suffix(base):
        return None
    suffix = base.rpartition(".")[2].lower() if "." in base else ""
    if not suffix:
        return "file without a suffix"
    return f".{suffix} file" if _SUFFIX.fullmatch(suffix) else "file with an unusual suffix"


_SUFFIX = re.compile("[a-z][a-z0-9]{0,7}|7z")
