"""Decides what the folders of a tree of images mean: classes, or splits that hold classes."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from fastvit_engine.data.shards.splits import PARTS, Part, may_name_split, split_of, without_split
from fastvit_engine.errors import UserError
from fastvit_engine.observe.units import counted

Reading = Literal["folder", "class-folders", "split-folders"]

# Folders that operating systems, file servers and editors leave behind; hidden ones are left out as well.
NOT_CLASSES = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information", "#recycle", "@Recycle"}
NOT_CLASSES |= {"@Recently-Snapshot", "#snapshot", "__pycache__"}


# Folders beside or around the classes, which are no class themselves.
NAMELESS = {"images", "image", "imgs", "img", "jpegimages", "jpg", "jpeg", "png", "annotations", "annotation"}
NAMELESS |= {"labels", "label", "trimaps", "masks", "segmim"}


@dataclass
class Tree:
    """The images below a folder, or in a tar: for each sub-folder (by its path, "" for the top) what is in it."""

    images: dict[str, list[str]] = field(default_factory=lambda: {"": []})  # their file names
    dangling: dict[str, list[str]] = field(default_factory=dict)  # links in each folder that lead nowhere
    left_out: Counter[str] = field(default_factory=Counter)  # what is no image, by kind: "hidden file"
    folders_left_out: set[str] = field(default_factory=set)  # that cannot hold classes, or that --leave-out names

    def leave_out(self, path: str, *, is_folder: bool) -> None:
        """Leaves out a folder with all that is in it, or a file that --leave-out names."""
        if is_folder:
            self.folders_left_out.add(path)
        else:
            self.left_out["file of --leave-out"] += 1

    def below(self) -> dict[str, int]:
        """The number of images in each folder and in the folders in it."""
        totals: Counter[str] = Counter()
        for folder, names in self.images.items():
            totals[folder] += len(names)
            parent = folder
            while parent:
                parent = parent.rpartition("/")[0]
                totals[parent] += len(names)
        return dict(totals)

    def folders_in(self) -> dict[str, list[str]]:
        """The paths of the folders directly in each folder, sorted."""
        inside: dict[str, list[str]] = {folder: [] for folder in self.images}
        for folder in sorted(self.images):
            if folder:
                inside[folder.rpartition("/")[0]].append(folder)
        return inside


def images_of(tree: Tree, inside: dict[str, list[str]], folder: str) -> list[tuple[str, bool]]:
    """The images below a folder of the tree, by sorted path relative to it, each with whether it is a dangling link."""
    images: list[tuple[str, bool]] = []
    stack = [folder]
    while stack:
        current = stack.pop()
        below = f"{current[len(folder) + 1 :]}/".lstrip("/")
        images += [(f"{below}{name}", False) for name in tree.images[current]]
        images += [(f"{below}{name}", True) for name in tree.dangling.get(current, ())]
        stack += inside[current]
    return sorted(images)


class ClassFolder(NamedTuple):
    """A folder with the images of one class."""

    base: str  # the folder of its split, "" if there are no splits
    name: str  # of the class
    held_out: bool

    @property
    def path(self) -> str:
        return f"{self.base}/{self.name}" if self.base else self.name


@dataclass(frozen=True)
class Layout:
    """What the folders of a tree mean."""

    classes: list[ClassFolder]  # in sorted order, those of the eval split last
    splits: str  # a clause that says which folders are which split, "" if there are none
    counts: Counter[str]  # of what is left out, by kind and reason, in the singular: "image beside the class folders"
    left_out: list[str]  # clauses about what else is left out


def arrange(tree: Tree, reading: Reading, where: str, command: Callable[..., str]) -> Layout:
    """The layout of `where`, by the given reading; "folder" is the one that is possible.

    `command(*options, source=...)` is a command line to offer. Raises UserError with both commands if two readings are
    possible, and if what is there fits none.
    """
    return _Arrangement(tree, reading, where, command).layout()


class _Arrangement:
    def __init__(self, tree: Tree, reading: Reading, where: str, command: Callable[..., str]) -> None:
        self.tree, self.reading, self.where, self.command = tree, reading, where.rstrip("/"), command
        self.total, self.inside = tree.below(), tree.folders_in()
        self.top = self.inside[""]
        self.filled = [folder for folder in self.top if self.total[folder]]
        self.parts = {folder: split_of(folder, folder=reading != "split-folders") for folder in self.top}

    def layout(self) -> Layout:
        if self.reading == "class-folders":
            return self._classes()
        named = [folder for folder in self.filled if self.parts[folder]]
        if named:
            return self._splits(named)
        if self.reading == "split-folders":
            raise UserError(f"{self.where} has no folder that is named train: name one so")
        self._refuse_what_may_be_splits()
        self._refuse_what_is_nameless()
        self._refuse_one_folder_beside_a_list()
        self._refuse_what_may_be_nested()
        return self._classes()

    # ---- classes

    def _classes(self) -> Layout:
        if not self.top:
            self._refuse_what_has_no_folders()
        classes = [ClassFolder("", folder, held_out=False) for folder in self.top]
        self._check_filled(classes)
        return Layout(classes, "", self._counts([""]), [])

    def _refuse_what_has_no_folders(self) -> None:
        beside = (
            f" ({counted(len(self.tree.images['']), 'image')} in {self.where} itself)" if self.tree.images[""] else ""
        )
        raise UserError(
            f"folder {self.where} has no sub-folders{beside}: put the images of each class into a folder of its own"
        )

    def _check_filled(self, classes: Iterable[ClassFolder]) -> None:
        for entry in classes:
            if not self.total[entry.path]:
                raise UserError(
                    f"class folder {self.where}/{entry.path} holds no image (.jpg, .png and others that Pillow reads): "
                    "fill it or remove it"
                )

    # ---- splits

    def _splits(self, named: list[str]) -> Layout:
        by_part: dict[Part, list[str]] = {part: [f for f in named if self.parts[f] == part] for part in PARTS}
        others = [folder for folder in self.filled if folder not in named]
        train = by_part["train"]
        if others and self.reading != "split-folders":
            self._refuse_splits_among_classes(named, others, by_part)
        if not train:
            first = named[0]
            self._two_readings(
                f"'{first}' as a folder of classes", self.command(source=f"{self.where}/{first}"),
                f"{_listed(named)} as classes", self.command("--format", "class-folders"),
            )  # fmt: skip
        bases = {folder: self._descend(folder) for folder in named}
        flat = next((folder for folder in train if not self._holds_classes(bases[folder])), None)
        if flat is not None:
            raise UserError(
                f"the {counted(self.total[flat], 'image')} in {self.where}/{flat} are in no class folders: put those "
                f"of each class into {flat}/CLASS, or name their labels in a list: "
                f"`{self.command(source='LIST.csv')}`; if {_listed(named)} are classes: "
                f"`{self.command('--format', 'class-folders')}`"
            )
        self._refuse_one_nested_class(train, bases)
        self._refuse_splits_in_train([bases[folder] for folder in train])
        usable: dict[Part, list[str]] = {
            part: [folder for folder in by_part[part] if self._holds_named_classes(bases[folder])] for part in PARTS
        }
        held_out: Part = "val" if usable["val"] or not usable["test"] else "test"
        classes = [entry for folder in train for entry in self._classes_in(bases[folder], held_out=False)]
        evaluation = [entry for folder in usable[held_out] for entry in self._classes_in(bases[folder], held_out=True)]
        self._check_filled([*classes, *evaluation])
        missing = self._check_same_classes(classes, evaluation)
        counts = self._counts([bases[folder] for folder in [*train, *usable[held_out]]])
        for part in ("val", "test"):
            for folder in by_part[part]:
                if folder not in usable[part]:
                    counts[f"image in {folder}/ (no class folders)"] += self.total[folder]
                elif part != held_out:
                    counts[f"image in {folder}/ (there is a validation split)"] += self.total[folder]
        counts.update({f"image in {folder}/ (no split)": self.total[folder] for folder in others})
        eval_split = f"{_listed(usable[held_out])} (eval)" if evaluation else "no eval split"
        return Layout(
            sorted(classes, key=lambda entry: entry.name) + sorted(evaluation, key=lambda entry: entry.name),
            f"{_listed(train)} (train) and {eval_split}",
            counts,
            missing,
        )

    def _classes_in(self, base: str, *, held_out: bool) -> list[ClassFolder]:
        return [ClassFolder(base, path.removeprefix(f"{base}/"), held_out) for path in self.inside[base]]

    def _holds_classes(self, folder: str) -> bool:
        return any(self.total[inner] for inner in self.inside[folder])

    def _holds_named_classes(self, folder: str) -> bool:
        """Whether there are classes in a split, and not only a folder around all images, as in val/images/."""
        names = [_name(path).lower() for path in self.inside[folder] if self.total[path]]
        return bool(names) and not (len(names) == 1 and names[0] in NAMELESS | {_name(folder).lower()})

    def _only_folders(self, folder: str) -> bool:
        return self._holds_classes(folder) and not self.tree.images[folder]

    def _descend(self, folder: str) -> str:
        """The folder itself, or the only one in it if that bears such a name too, as in training_set/training_set/."""
        while True:
            inner = [path for path in self.inside[folder] if self.total[path]]
            if len(inner) != 1 or not self._only_folders(folder) or not self._only_folders(inner[0]):
                return folder
            same = _name(inner[0]) == _name(folder) or _name(inner[0]) in ("images", "data")
            if not same and split_of(inner[0], folder=self.reading != "split-folders") is None:
                return folder
            folder = inner[0]

    def _check_same_classes(self, train: list[ClassFolder], evaluation: list[ClassFolder]) -> list[str]:
        """Clauses about classes that are not evaluated. Raises UserError if one is evaluated only."""
        known = {entry.name for entry in train}
        for entry in evaluation:
            if entry.name not in known:
                raise UserError(
                    f"the class '{entry.name}' is in {self.where}/{entry.base} and not among the "
                    f"{counted(len(known), 'class', 'classes')} to train: add images of it there, or leave it out: "
                    f"`{self.command('--leave-out', entry.path)}`"
                )
        without = sorted(known - {entry.name for entry in evaluation})
        if not evaluation or not without:
            return []
        more = f" and {len(without) - 3} others" if len(without) > 3 else ""
        return [f"no eval image of {_listed(without[:3])}{more}"]

    # ---- what can be read in two ways

    def _two_readings(self, first: str, first_command: str, second: str, second_command: str) -> None:
        raise UserError(
            f"{self.where} can be read in two ways, with {first}: `{first_command}`; or with {second}: "
            f"`{second_command}`"
        )

    def _refuse_splits_among_classes(
        self, named: list[str], others: list[str], by_part: Mapping[Part, list[str]]
    ) -> None:
        every = self.command("--format", "class-folders")
        train = by_part["train"] or [folder for folder in others if split_of(folder) == "train"]
        if train and all(self._holds_classes(folder) for folder in train):
            splits = self.command("--format", "split-folders")
            self._two_readings(
                f"{_listed(named)} as splits of class folders", splits,
                f"all of them as classes, {_listed(others[:3])} too", every,
            )  # fmt: skip
        leave_out = [word for folder in named for word in ("--leave-out", folder)]
        self._two_readings(
            f"{_listed(named)} as classes like {_listed(others[:3])}", every,
            f"{_listed(named)} as splits, to be left out", self.command(*leave_out),
        )  # fmt: skip

    def _refuse_what_may_be_splits(self) -> None:
        """Names such as "birds-train" that hold classes, or train_cat beside test_cat."""
        loose = [folder for folder in self.filled if may_name_split(folder)]
        every = self.command("--format", "class-folders")
        nested = [folder for folder in loose if self._only_folders(folder)]
        if nested:
            self._two_readings(
                f"{_listed(nested)} as splits of class folders", self.command("--format", "split-folders"),
                f"{_listed(nested)} as classes", every,
            )  # fmt: skip
        trained = {without_split(folder) for folder in loose if split_of(folder) == "train"}
        held_out = [f for f in loose if split_of(f) in ("val", "test") and without_split(f) in trained]
        if held_out:
            leave_out = [word for folder in held_out for word in ("--leave-out", folder)]
            self._two_readings(
                f"{_listed(held_out[:3])} as classes", every,
                f"{_listed(held_out[:3])} as images that are not to be trained on", self.command(*leave_out),
            )  # fmt: skip

    def _refuse_what_is_nameless(self) -> None:
        """Folders such as images/ beside annotations/, which may hold the classes but are none."""
        folder = next((folder for folder in self.filled if folder.lower() in NAMELESS), None)
        if folder is None:
            return
        holder = next((f for f in self.filled if f.lower() in NAMELESS and self._holds_classes(f)), None)
        source = f"{self.where}/{holder}" if holder else "LIST.csv"
        self._two_readings(
            f"the folders of '{holder}' as classes" if holder else "a list of the images and their labels",
            self.command(source=source),
            f"'{folder}' as a class", self.command("--format", "class-folders"),
        )  # fmt: skip

    def _refuse_one_folder_beside_a_list(self) -> None:
        """One folder of images beside a table, as competitions have them, which is hardly one class."""
        kind = next((kind for kind in ("csv", "tsv", "jsonl") if self.tree.left_out[f".{kind} file"]), None)
        if len(self.filled) == 1 and kind is not None:
            self._two_readings(
                "a list of the images and their labels", self.command(source=f"{self.where}/LIST.{kind}"),
                f"'{self.filled[0]}' as the only class", self.command("--format", "class-folders"),
            )  # fmt: skip

    def _refuse_what_may_be_nested(self) -> None:
        """A folder around the classes, the same classes in several folders, and splits inside of classes."""
        every = self.command("--format", "class-folders")
        inner = {
            folder: sorted(path.rpartition("/")[2] for path in self.inside[folder] if self.total[path])
            for folder in self.filled
        }
        only_folders = all(self._only_folders(folder) for folder in self.filled)
        if only_folders and len(self.filled) == 1:
            self._refuse_folders_around(inner, every)
        within = sorted(
            folder
            for folder, names in self.tree.images.items()
            if names and any(split_of(part, folder=True) in ("val", "test") for part in folder.split("/")[1:])
        )
        if within:
            held_out = {
                part for f in within for part in f.split("/")[1:] if split_of(part, folder=True) not in (None, "train")
            }
            leave_out = [word for part in sorted(held_out) for word in ("--leave-out", f"*/{part}")]
            self._two_readings(
                f"'{within[0]}' as images of the class '{within[0].partition('/')[0]}'", every,
                "it as a split", self.command(*(leave_out or ["--leave-out", within[0]])),
            )  # fmt: skip

        if only_folders and len({tuple(names) for names in inner.values()}) == 1 and len(inner[self.filled[0]]) > 1:
            self._refuse_folders_around(inner, every)

    def _refuse_folders_around(self, inner: Mapping[str, list[str]], every: str) -> None:
        first = self.filled[0]
        names = inner[first]
        self._two_readings(
            f"{_listed(self.filled[:3])} as {'a class' if len(self.filled) == 1 else 'classes'}", every,
            f"{_listed(names[:3])} as {_what_they_are(names)}", self.command(source=f"{self.where}/{first}"),
        )  # fmt: skip

    def _refuse_splits_in_train(self, bases: list[str]) -> None:
        """Folders such as train/val/CLASS or train/CLASS/test; train/test/1.jpg is an image of the class test."""
        for base in bases:
            for folder, names in sorted(self.tree.images.items()):
                parts = folder.removeprefix(f"{base}/").split("/")
                if folder == base or not names or not folder.startswith(f"{base}/") or len(parts) < 2:
                    continue
                depth = next(
                    (n for n, part in enumerate(parts) if split_of(part, folder=True) in ("val", "test")), None
                )
                if depth is not None and self.reading != "split-folders":
                    held_out = "/".join([base, *parts[: depth + 1]])
                    self._two_readings(
                        f"'{held_out}' as images to train on", self.command("--format", "split-folders"),
                        "it as a split, to be left out", self.command("--leave-out", held_out),
                    )  # fmt: skip

    def _refuse_one_nested_class(self, train: list[str], bases: Mapping[str, str]) -> None:
        """A folder around the classes of each split."""
        paths = {path for folder in train for path in self.inside[bases[folder]] if self.total[path]}
        if self.reading == "split-folders" or len({path.rpartition("/")[2] for path in paths}) != 1:
            return
        path = min(paths)
        inner = [each.rpartition("/")[2] for each in self.inside[path] if self.total[each]]
        if self._only_folders(path):
            self._two_readings(
                f"'{path.rpartition('/')[2]}' as the only class", self.command("--format", "split-folders"),
                f"{_listed(inner[:3])} as classes", self.command(source=f"{self.where}/{path}"),
            )  # fmt: skip

    # ---- what is left out

    def _counts(self, bases: list[str]) -> Counter[str]:
        counts = Counter(self.tree.left_out)
        for base in bases:
            if self.tree.images[base]:
                counts[f"image {f'in {base}/ ' if base else ''}beside the class folders"] += len(self.tree.images[base])
        counts.update(f"folder called '{_name(folder)}'" for folder in self.tree.folders_left_out)
        return counts


def _what_they_are(names: list[str]) -> str:
    if any(split_of(name, folder=True) for name in names):
        return "splits"
    return "a class" if len(names) == 1 else "classes"


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _listed(names: list[str]) -> str:
    """'a', 'b' and 'c'."""
    quoted = [f"'{name}'" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"
