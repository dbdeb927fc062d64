"""What the listing of a source may ask for."""

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from fastvit_engine.data.shards.image_files import has_image_suffix
from fastvit_engine.data.shards.sample import is_macos_resource
from fastvit_engine.files import atomic_writer
from fastvit_engine.observe.progress import WorkProgress


@dataclass
class Context:
    """What every source may use while it lists its images."""

    scratch: Path  # a folder for what must be unpacked to be read by offset; kept until the shards are made
    workers: int
    progress: WorkProgress
    say: Callable[[str], None]
    classes: list[str] | None = None  # class names in label order, if they are given
    labels: str | None = None  # a file of labels, or the name of the column that holds them
    image_column: str | None = None  # of a table
    label_column: str | None = None
    column_options: set[str] = field(default_factory=set)  # options about columns that a table has heeded

    def scratch_file(self, source: Path, suffix: str) -> Path:
        """A path in the scratch folder that belongs to `source` alone."""
        return self.scratch / (re.sub(r"[^A-Za-z0-9.-]+", "_", str(source.resolve())).strip("_")[-200:] + suffix)

    @contextlib.contextmanager
    def writing(self, path: Path) -> Iterator[BinaryIO]:
        """Writes a scratch file that exists whole or not at all, also when several processes write it at once."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_writer(path) as file:
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


_EVAL_NAMES = (("validation", "valid", "val", "eval", "dev"), ("test", "t10k"))


def split_of_names(names: list[str]) -> tuple[list[str], list[str], list[str]]:
    """(train, held out, left out): by the words that names begin with, such as train-000.tar and val-000.tar.

    If there is no "train", all names are for training. A "test" split is held out if there is no "validation".
    """

    def begins(name: str, words: tuple[str, ...]) -> bool:
        return re.match(rf"({'|'.join(words)})(?![A-Za-z])", name, re.IGNORECASE) is not None

    train = [name for name in names if begins(name, ("train", "training"))]
    if not train:
        return names, [], []
    for words in _EVAL_NAMES:
        held_out = [name for name in names if begins(name, words)]
        if held_out:
            break
    return train, held_out, [name for name in names if name not in train and name not in held_out]
