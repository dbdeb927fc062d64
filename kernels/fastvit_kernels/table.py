"""Looks up the launch parameters of a kernel; nothing is searched while a model runs.

A function that chooses launch parameters, or who runs an operation, is marked `@tunable`. It states the default; a
table, one JSON file per GPU in `tuning/configs/`, may say better for the sizes that `python -m fastvit_kernels.tuning`
measured there. `FASTVIT_TUNING=<file>` puts a file of your own in the place of the shipped one. The choice is a pure
function of the file, the GPU and the sizes, hence the same on every rank.
"""

import inspect
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar

CONFIGS = Path(__file__).parent / "tuning" / "configs"
TOOL = 1  # version of this format and of the way of measuring
FARTHEST = 2.0  # an entry serves sizes up to twice, and down to half, of what was measured
AGAIN = "remove it, unset FASTVIT_TUNING, and measure again with `python -m fastvit_kernels.tuning`"
NOTES = {
    False: "defaults chosen from the compiler's tables; no GPU has measured them",
    True: "the fastest of the candidates that were measured on this GPU",
}

Parameters = TypeVar("Parameters")


class Runs(NamedTuple):
    """Who runs an operation: "triton", "reference", or a library that the operation knows."""

    provider: str


@dataclass(frozen=True)
class Entry:
    """One choice that was measured: `kernel` should `use` these launch parameters `where` its arguments are these."""

    kernel: str
    where: Mapping[str, Any]
    use: Mapping[str, Any]
    default_ms: float
    ms: float
    noise: float  # relative: by how much two measurements of the same thing differ
    source: str  # a hash of the kernels that were measured


@dataclass(frozen=True)
class Provenance:
    """Where the entries of a table come from: GPU, versions, and the rounds of the tool that measured them."""

    gpu: str  # as `gpu_name` says
    measured: bool
    note: str
    date: str
    triton: str
    torch: str
    tool: int
    quick: bool = False  # fewer rounds


@dataclass(frozen=True)
class Table:
    """Launch parameters for one GPU, as its JSON file holds them."""

    provenance: Provenance
    entries: tuple[Entry, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)  # cases that broke the GPU -> how
    path: Path | None = None

    def nearest(self, kernel: str, where: Mapping[str, Any], sizes: Sequence[str]) -> Entry | None:
        """The entry whose sizes are nearest by ratio, among those that are equal in all else; None if none is near."""
        found, least = None, math.inf
        for entry in self.entries:
            if entry.kernel != kernel or any(entry.where[name] != where[name] for name in where if name not in sizes):
                continue
            ratios = [ratio(entry.where[name], where[name]) for name in sizes]
            if max(ratios) <= FARTHEST and math.prod(ratios) < least:
                found, least = entry, math.prod(ratios)
        return found


def ratio(a: int, b: int) -> float:
    small, large = sorted((max(a, 1), max(b, 1)))
    return large / small


def gpu_name(device_name: str) -> str:
    """The name of a GPU's file: the first word of letters followed by digits.

    H200 for "NVIDIA H200", H100 for "NVIDIA H100 80GB HBM3", MI300X for "AMD Instinct MI300X". A name without such a
    word stays as it is: "NVIDIA-GeForce-RTX-4090".
    """
    model = re.search(r"\b[A-Z]+\d+[A-Z]*\b", device_name)
    return model[0] if model else re.sub(r"\W+", "-", device_name)


def load(path: Path) -> Table:
    """Reads a table. Raises ValueError, with one sentence, if the file is not one."""
    try:
        content = json.loads(path.read_text())
        entries, failed = tuple(Entry(**entry) for entry in content.pop("entries")), content.pop("failed")
        return Table(Provenance(**content), entries, failed, path)
    except OSError as error:
        raise ValueError(f"tuning file {path} cannot be read: {error.strerror}: correct the path") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"tuning file {path} is not one that fastvit_kernels.tuning wrote: {error}: {AGAIN}") from None


def save(table: Table, path: Path) -> None:
    """Writes a table, whole or not at all."""
    content = asdict(table.provenance) | {"failed": table.failed, "entries": [asdict(e) for e in table.entries]}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w") as file:
        file.write(json.dumps(content, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def refuse_variable(sentence: str) -> NoReturn:
    """For a wrong variable of the environment, at import. Raises ValueError; commands end with the sentence and 2."""
    if sys.argv[:1] == ["-m"]:  # Python is still locating the command `python -m fastvit_kernels...`
        print(f"fastvit_kernels: {sentence}", file=sys.stderr)
        raise SystemExit(2)
    raise ValueError(sentence)


_in_use: Table | None = None  # by `using`
_own = os.environ.get("FASTVIT_TUNING")
_own_table: Table | None = None
if _own:
    try:
        _own_table = load(Path(_own))
    except ValueError as error:
        refuse_variable(str(error))


@lru_cache
def table_for(gpu: str) -> Table | None:
    """The table of the GPU with this name, or None, for defaults. A file that does not fit is a ValueError."""
    table = _in_use
    if table is None and _own_table is not None:
        table = _own_table
        if gpu and table.provenance.gpu != gpu:
            raise ValueError(
                f"FASTVIT_TUNING={_own} is for {table.provenance.gpu}, but this GPU is {gpu}: unset it, or measure this"
                " GPU with `python -m fastvit_kernels.tuning`"
            )
    elif table is None and (path := CONFIGS / f"{gpu}.json").exists():
        table = load(path)
    if table is None or table.provenance.gpu != gpu:
        return None
    for entry in table.entries:
        check(entry, table.path)
    return table


def check(entry: Entry, path: Path | None) -> None:
    """Raises ValueError unless the entry belongs to a kernel of this version."""
    tunable = TUNABLES.get(entry.kernel)
    if tunable is None or set(entry.where) != set(tunable.names):
        raise ValueError(
            f"tuning file {path} has {entry.kernel!r} for {', '.join(entry.where)}, which this version of"
            f" fastvit_kernels does not have: {AGAIN}"
        )
    try:
        for name in tunable.sizes:
            if not isinstance(entry.where[name], int):
                raise TypeError(f"{name} must be a whole number, got {entry.where[name]!r}")
        tunable.read(entry.use)
    except (TypeError, ValueError) as error:
        raise ValueError(f"tuning file {path}, {entry.kernel!r} for {dict(entry.where)}: {error}: {AGAIN}") from None


@contextmanager
def using(table: Table | None) -> Iterator[None]:
    """Uses this table inside the `with` block, on the GPU that it is for."""
    global _in_use
    before, _in_use = _in_use, table
    forget()
    try:
        yield
    finally:
        _in_use = before
        forget()


def forget() -> None:
    table_for.cache_clear()
    for tunable in TUNABLES.values():
        tunable.chosen.cache_clear()


class Tunable(Generic[Parameters]):
    """A function that chooses launch parameters, called as (*key, gpu); made by `tunable`."""

    def __init__(
        self,
        default: Callable[..., Parameters],
        kind: type[Parameters],
        kernel: str,
        sizes: tuple[str, ...],
        providers: tuple[str, ...],
        library: str,
    ) -> None:
        self.default, self.kind, self.kernel, self.sizes, self.providers = default, kind, kernel, sizes, providers
        self.library = library
        self.names = tuple(inspect.signature(default).parameters)[:-1]
        self.chosen = lru_cache(maxsize=None)(self.choose)
        self.forced: tuple[Parameters] | None = None
        self.__doc__ = default.__doc__

    def __call__(self, *key: Any) -> Parameters:
        return self.chosen(*key) if self.forced is None else self.forced[0]

    def choose(self, *key: Any) -> Parameters:
        gpu = key[-1]
        table = table_for(gpu.name) if gpu.name else None
        entry = table and table.nearest(self.kernel, self.where(key[:-1]), self.sizes)
        return self.read(entry.use) if entry else self.default(*key)

    def where(self, key: Sequence[Any]) -> dict[str, Any]:
        """A key as it is written in a file."""
        plain = [value if isinstance(value, int | str) else str(value).removeprefix("torch.") for value in key]
        return dict(zip(self.names, plain, strict=True))

    def read(self, use: Mapping[str, Any]) -> Parameters:
        """Launch parameters as they are written in a file."""
        fields = self.kind._fields  # type: ignore[attr-defined]  # a NamedTuple
        if set(use) != set(fields):
            raise ValueError(f"launch parameters must be {', '.join(fields)}, got {', '.join(use)}")
        for name, value in use.items():
            if name == "provider":
                if value not in self.providers:
                    raise ValueError(f"provider must be one of {', '.join(self.providers)}, got {value!r}")
            elif value is not None and not isinstance(value, int):
                raise TypeError(f"{name} must be a whole number, got {value!r}")
        return self.kind(**use)

    @contextmanager
    def forcing(self, parameters: Parameters) -> Iterator[None]:
        """Gives these parameters to every call inside: for measurement and tests."""
        before, self.forced = self.forced, (parameters,)
        try:
            yield
        finally:
            self.forced = before


TUNABLES: dict[str, Tunable] = {}


def tunable(
    kind: type[Parameters], kernel: str, *, sizes: tuple[str, ...], providers: tuple[str, ...] = (), library: str = ""
) -> Callable[[Callable[..., Parameters]], Tunable[Parameters]]:
    """Makes a function of (*key, gpu) the default for the launch parameters of `kernel`.

    Args:
        kind: the NamedTuple that the function returns, of whole numbers, truth values and None; or `Runs`.
        kernel: the name in tables.
        sizes: arguments that need not be those that were measured: the nearest entry by ratio is taken, at most a
            factor of 2 away in each. All others must be equal.
        providers: for `Runs`, those that a table may choose.
        library: the distribution whose kernel it is, if it is not this package's.
    """

    def mark(default: Callable[..., Parameters]) -> Tunable[Parameters]:
        TUNABLES[kernel] = Tunable(default, kind, kernel, sizes, providers, library)
        return TUNABLES[kernel]

    return mark


def describe(gpu: str | None) -> str:
    """Which table is in force on the GPU of this name, in one line."""
    if not gpu:
        return "launch parameters: defaults (no GPU)"
    table = table_for(gpu)
    if table is None:
        return (
            f"launch parameters: defaults, unmeasured (no file for {gpu}; python -m fastvit_kernels.tuning makes one)"
        )
    made = table.provenance
    source = "FASTVIT_TUNING" if table is _own_table else "shipped"
    measured = f"measured {made.date} with Triton {made.triton}" if made.measured else "not measured"
    return f"launch parameters: {table.path} ({source}, {measured}: {made.note})"


def choices_of_providers(gpu: str) -> list[str]:
    """Who runs what by the table of this GPU, a line for each size that was measured."""
    table = table_for(gpu)
    lines = []
    for entry in table.entries if table else ():
        if "provider" in entry.use:
            where = ", ".join(f"{name} {value}" for name, value in entry.where.items())
            lines.append(f"{entry.kernel} ({where}): {entry.use['provider']}")
    return lines
