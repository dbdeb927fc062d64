"""One call that gives a model from timm, transformers or open_clip the operations of this package."""

import importlib
import sys
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import TracebackType
from typing import NamedTuple, cast

from torch import nn

from fastvit_kernels.dispatch import Plan
from fastvit_kernels.integrations.fused import Fused, base_class, fused_class
from fastvit_kernels.integrations.layers import FusedLayerNorm, FusedPatchConv

LIBRARIES = {  # the file here, and the module whose import says that a model of the library may be at hand
    "timm": "timm.models.vision_transformer",
    "timm_eva": "timm.models.eva",
    "transformers": "transformers.utils.output_capturing",
    "open_clip": "open_clip.transformer",
}
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

Registry = Mapping[type[nn.Module], type[Fused]]


class Row(NamedTuple):
    """A module, the operations it runs as, why it, or a part of it, was left alone, and who runs each operation."""

    path: str
    type: str
    fused: tuple[str, ...]
    left_alone: str
    plans: tuple[Plan, ...] = ()


def count(rows: Sequence[Row]) -> str:
    """How many modules are fused, and who runs them, with the reason: "3 of 4 modules fused: 2 triton, 1 reference"."""
    runs: Counter[str] = Counter()
    for row in rows:
        if row.fused:
            runs[" + ".join(dict.fromkeys(f"{by} ({why})" if why else by for by, why in row.plans))] += 1
    fused = f"{runs.total()} of {len(rows)} modules fused"
    return ": ".join(filter(None, (fused, ", ".join(f"{number} {by}" for by, number in runs.most_common()))))


class Acceleration:
    """What `accelerate` did to a model. Prints as a table; `undo()`, or the end of a `with` block, takes it back."""

    def __init__(self, model: nn.Module, registry: Registry, changed: dict[nn.Module, type[Fused]]) -> None:
        self.model, self._registry, self._changed = model, registry, changed

    @property
    def rows(self) -> list[Row]:
        """The model as it is now: a hook or a layer that came later shows."""
        return list(survey(self.model, self._registry))

    def __str__(self) -> str:
        rows = self.rows
        table = [("module", "type", "runs as", "by", "left alone")]
        for row in rows:
            runs = [plan.runs for plan in row.plans]
            by = runs[0] if len(set(runs)) == 1 else " + ".join(runs)
            table.append((row.path, row.type, " + ".join(row.fused) or "-", by, row.left_alone))
        widths = [max(len(line[column]) for line in table) for column in range(4)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[4]]).rstrip()
            for line in table
        ]
        return "\n".join([*lines, count(rows)])

    def undo(self) -> None:
        """Gives every module that this call changed its class back. Weights, hooks and modes stay as they are now.

        For a copy of the model, or one that was loaded from a pickle, see `restore`.
        """
        give_back([module for module, fused in self._changed.items() if type(module) is not fused.original])
        self._changed.clear()

    def __enter__(self) -> "Acceleration":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def accelerate(model: nn.Module) -> Acceleration:
    """Runs the blocks, LayerNorms and patch embeddings of `model` as fused operations, in place.

    Parameters stay the same objects under the same names: optimizers, state dicts, hooks and copies keep working.
    A module is changed only if the result stays the same; the table of the returned object says what was left alone,
    and why. Calls that ask for more than the fused path gives (an attention mask, attention weights) run as the library
    wrote them. Accelerate before wrapping the model (DeepSpeed, FSDP) and before compiling it.

    Args:
        model: any module; what is not known is left alone.

    Raises TypeError when `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    classes = registry()
    changed: dict[nn.Module, type[Fused]] = {}
    for module in model.modules():
        mixin = classes.get(type(module))  # a fused module's class is in no registry: twice does no harm
        if mixin is not None and mixin.reading(module).fused:
            changed[module] = fused_class(mixin.within(module, model), type(module))
    for module, fused in changed.items():
        module.__class__ = fused
    return Acceleration(model, classes, changed)


def restore(model: nn.Module) -> None:
    """Takes back what `accelerate` did to `model`, or to the model that it is a copy of, in place.

    Raises RuntimeError, and restores nothing, if a module has been given another class since, as FSDP2 does.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    give_back([module for module in model.modules() if isinstance(module, Fused)])


def give_back(modules: Collection[nn.Module]) -> None:
    """All of them, or none."""
    for module in modules:
        if not isinstance(module, Fused) or "original" not in vars(type(module)):
            raise RuntimeError(f"a module changed its class after accelerate: it is {type(module).__name__} now")
    for module in modules:
        module.__class__ = cast(Fused, module).original


def registry() -> Registry:
    """The classes that can be fused. Imports no library: a model of one implies that it is imported."""
    known: dict[type[nn.Module], type[Fused]] = {nn.LayerNorm: FusedLayerNorm, nn.Conv2d: FusedPatchConv}
    for name, needed in LIBRARIES.items():
        if needed in sys.modules:
            try:
                known |= importlib.import_module(f"{__package__}.{name}").classes()
            except (ImportError, AttributeError) as error:
                library = needed.partition(".")[0]
                version = getattr(sys.modules[library], "__version__", "of unknown version")
                warnings.warn(
                    f"{library} {version} is not known here, its blocks are left alone: {error}", stacklevel=3
                )
    return known


def survey(
    module: nn.Module, registry: Registry, path: str = "", item: bool = False, told: bool = False
) -> Iterator[Row]:
    """A row for each module that is fused, could have been, or holds parameters and is not known.

    `item` is a member of a list of modules, as blocks are; inside a module already told of, only known ones get a row.
    """
    own = base_class(module)
    mixin = type(module) if isinstance(module, Fused) else registry.get(own)
    if mixin is not None:
        fused, reasons = mixin.reading(module)
        if not isinstance(module, Fused):
            fused, reasons = (), reasons or ("not accelerated",)
        yield Row(path, own.__name__, fused, "; ".join(reasons), tuple(mixin.plans(module)) if fused else ())
        if not reasons:
            return
        told = True
    elif not told and (reason := unknown(module, registry, item)):
        yield Row(path, own.__name__, (), reason)
        told = True
    inside = isinstance(module, CONTAINERS)
    for name, child in module.named_children():
        yield from survey(child, registry, f"{path}.{name}" if path else name, inside, told)


def unknown(module: nn.Module, registry: Registry, item: bool) -> str:
    """Why a module of no known class is left alone, "" when only its children matter."""
    own = base_class(module)
    if parent := next((known for known in registry if issubclass(own, known)), None):
        return f"a subclass of {parent.__name__}, whose forward may differ"
    if isinstance(module, CONTAINERS) or next(module.parameters(), None) is None:
        return ""
    leaf = next(module.children(), None) is None or own.__module__.startswith("torch.nn.")  # as MultiheadAttention
    return f"no fused form of {own.__name__}" if leaf or item else ""
