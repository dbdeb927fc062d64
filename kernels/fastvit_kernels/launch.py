"""Launches a Triton kernel with little CPU time: what Triton finds out at every launch is found out once.

Triton binds the arguments of a launch, asks what the kernel is to be specialised for, writes that down as text and
looks the text up among its compiled kernels. `launch` asks for the same specialisation, in one call, and looks that up.
What it finds is Triton's own compiled kernel, which Triton has launched before. All else is left to Triton: the first
launch, one that somebody watches or changes (hooks, profilers, debugging, a replaced `JITFunction.run`), the
interpreter, and versions whose way of launching nobody has read.
"""

from typing import Any, NamedTuple

import triton
from triton import knobs
from triton._C import libtriton
from triton.compiler import CompiledKernel
from triton.knobs import HookChain
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

# Versions whose `JITFunction.run` does what `launch` does. Another is slower, not wrong: read its `run` and add it.
READ = ("3.6", "3.7")
RUN = JITFunction.run
specialise: Any = getattr(libtriton, "native_specialize_impl", None)
DIRECT = (
    triton.__version__.startswith(tuple(f"{version}." for version in READ))
    and specialise is not None
    and RUN.__module__ == JITFunction.__module__  # else somebody has replaced it already
)
ONES = (1, 1, 1)
MISSING = object()


class Ready(NamedTuple):
    """A compiled kernel that Triton has launched, and how to launch it again."""

    kernel: Any  # kept, so that its id is not given to another
    caches: Any  # of the kernel on this device
    key: str  # of `compiled` among them
    compiled: Any
    run: Any
    function: Any
    metadata: Any
    constants: tuple[Any, ...]  # the last arguments of the kernel

    def is_current(self, caches: Any) -> bool:
        """Whether Triton would find the same kernel."""
        return self.caches is caches and caches[0].get(self.key) is self.compiled


_ready: dict[Any, Ready] = {}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """`kernel[grid](*arguments, **constants)`, in less CPU time.

    Args:
        arguments: those of the kernel that are no `tl.constexpr`, in its order.
        constants: the others, and options of the compiler such as `num_warps`, by name.
    """
    if not DIRECT or type(kernel) is not JITFunction or is_watched(kernel):
        kernel[grid](*arguments, **constants)
        return
    active = driver.active
    device = active.get_current_device()
    key: Any = None
    caches = kernel.device_caches.get(device)
    if caches is not None:
        specialisation = specialise(caches[3], arguments, False, True, True)
        key = id(kernel), device, specialisation, tuple(constants), tuple(constants.values())
        found = _ready.get(key)
        if found is not None and found.is_current(caches):
            found.run(
                *grid,
                *ONES[len(grid) :],
                active.get_current_stream(device),
                found.function,
                found.metadata,
                None,
                None,
                None,
                *arguments,
                *found.constants,
            )
            return
    compiled = kernel[grid](*arguments, **constants)
    if key is not None:
        remember(key, kernel, caches, compiled, arguments, constants)


def is_watched(kernel: Any) -> bool:
    """Whether Triton has more to do at a launch than to launch, or may refuse it."""
    runtime = knobs.runtime
    if runtime.debug or kernel.debug or knobs.compilation.instrumentation_mode or kernel.pre_run_hooks:
        return True
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if hook is not None and (type(hook) is not HookChain or hook.calls):
            return True
    for (name, _), (value, scope) in kernel.used_global_vals.items():  # globals that the kernel was compiled with
        if scope.get(name, MISSING) != value:
            return True
    return runtime.add_stages_inspection_hook is not None or JITFunction.run is not RUN


def remember(
    key: Any, kernel: Any, caches: Any, compiled: Any, arguments: tuple[Any, ...], constants: dict[str, Any]
) -> None:
    """Notes what Triton has launched, if the next launch of the same kind can do without Triton."""
    if type(compiled) is not CompiledKernel:  # not compiled, or not yet
        return
    given, last = kernel.params[: len(arguments)], kernel.params[len(arguments) :]
    if not all(is_usual(parameter) for parameter in given) or not all(
        p.is_constexpr and p.name in constants for p in last
    ):
        return
    name = next((name for name, one in list(caches[0].items()) if one is compiled), None)
    if name is None:
        return
    _ready[key] = Ready(
        kernel,
        caches,
        name,
        compiled,
        compiled.run,
        compiled.function,
        compiled.packed_metadata,
        tuple(constants[parameter.name] for parameter in last),
    )


def is_usual(parameter: Any) -> bool:
    """Whether Triton specialises for this parameter as `launch` asks it to."""
    unusual = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
    return not (unusual or parameter.is_constexpr or parameter.is_const or parameter.annotation_type)
