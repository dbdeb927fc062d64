"""How a module becomes fused: its class is exchanged for a subclass with another forward.

The object stays the same, with its parameters, children, hooks and training mode; so do its name and its state dict.
"""

from typing import Any, ClassVar, NamedTuple

from torch import nn

from fastvit_kernels import dispatch

OPERATION_OF = {
    "layer_norm_mlp": "mlp",
    "layer_norm_swiglu": "swiglu",
}  # the function that a module runs as -> its name in FASTVIT_KERNELS
HALVES = ("attention_block", "layer_norm_mlp")  # of a block


class Reading(NamedTuple):
    """What of a module runs fused, and why the rest does not."""

    fused: tuple[str, ...]
    left_alone: tuple[str, ...]


class Fused(nn.Module):
    """Comes before the module's own class in the subclass that `fused_class` makes."""

    original: ClassVar[type[nn.Module]]

    @classmethod
    def reading(cls, module: nn.Module) -> Reading:
        raise NotImplementedError

    @classmethod
    def within(cls, module: nn.Module, model: nn.Module) -> type["Fused"]:
        """This class, or the one for a module that is used in another way by `model`."""
        return cls

    @classmethod
    def plans(cls, module: nn.Module) -> list[dispatch.Plan]:
        """Who runs each of the operations that `reading` says the module consists of, with the weights it has now."""
        weight, fused = next(module.parameters()), cls.reading(module).fused
        if fused == ("block",) and dispatch.plan_for("block", weight).runs == "reference":
            fused = HALVES  # each of them chooses for itself
        return list(dispatch.plans_for(weight, [OPERATION_OF.get(name, name) for name in fused]).values())

    def extra_repr(self) -> str:
        runs = " + ".join(dict.fromkeys(plan.runs for plan in self.plans(self)))
        return ", ".join(filter(None, (super().extra_repr(), f"runs={runs}" if runs else "")))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # the subclass exists in this process only: copies and pickles name the two classes it is made of
        return _empty, (_mixin(type(self)), self.original), self.__getstate__()


_made: dict[tuple[type, type], type[Fused]] = {}


def fused_class(mixin: type[Fused], original: type[nn.Module]) -> type[Fused]:
    """The subclass of `original` with the forward of `mixin`; it bears the name of `original`.

    Libraries find modules by class name (device maps, sharding policies). The printed model gains `runs=...` only.
    """
    if (mixin, original) not in _made:
        names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
        _made[mixin, original] = type(original.__name__, (mixin, original), {"original": original, **names})
    return _made[mixin, original]


def base_class(module: nn.Module) -> type[nn.Module]:
    """The class of the module as its library made it."""
    return module.original if isinstance(module, Fused) else type(module)


def _mixin(fused: type[Fused]) -> type[Fused]:
    # of the class made here, whatever has been derived from it since
    return next(cls.__bases__[0] for cls in fused.__mro__ if "original" in vars(cls))


def _empty(mixin: type[Fused], original: type[nn.Module]) -> Fused:
    cls = fused_class(mixin, original)
    return cls.__new__(cls)
