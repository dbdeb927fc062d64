"""`launch` runs the kernel that Triton would run, with the same arguments, and leaves to Triton what it must.

Nothing is compiled here: a compiled kernel is a stand-in that notes how it is run. What is compared is which of them
Triton's own way, `kernel[grid](...)`, takes for the same arguments.
"""

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="does not apply: there are no launches without Triton")

import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.launches import launched_by
from fastvit_kernels import dispatch
from fastvit_kernels import launch as module
from fastvit_kernels.tuning import codegen

launch = module.launch
FACTOR = tl.constexpr(2)


def scale_kernel(x_ptr, out_ptr, sizes, rows, factor, BLOCK: tl.constexpr, MASKED: tl.constexpr = True):  # type: ignore[no-untyped-def]
    tl.store(out_ptr, tl.load(x_ptr) * FACTOR)


class Launches:
    """A GPU that is not there: which compiled kernel ran, and with what."""

    def __init__(self, target: GPUTarget) -> None:
        self.target, self.device, self.stream = target, 0, 7
        self.ran: list[tuple[Any, ...]] = []
        self.compiled = 0
        self.bound = 0  # launches that went through Triton

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> tuple[int, int]:
        return device, self.stream

    def compile(self, kernel: Any, key: str, signature: Any, device: int, *others: Any) -> CompiledKernel:
        compiled = CompiledKernel.__new__(CompiledKernel)
        compiled.module, compiled.name, compiled.src = object(), key, None
        compiled.function, compiled.packed_metadata = object(), object()
        compiled._run = lambda *arguments: self.ran.append((compiled, *arguments))
        self.compiled += 1
        assert kernel.cache_key  # finds the globals that are checked at each launch
        kernel.device_caches[device][0][key] = compiled
        return compiled


@pytest.fixture(params=["cuda", "hip"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Launches:
    target = GPUTarget("cuda", 90, 32) if request.param == "cuda" else GPUTarget("hip", "gfx942", 64)
    launches, get_item = Launches(target), JITFunction.__getitem__

    def counted(kernel: Any, grid: Any) -> Any:
        launches.bound += 1
        return get_item(kernel, grid)

    monkeypatch.setattr(JITFunction, "__getitem__", counted)
    monkeypatch.setattr(driver, "_active", launches)
    monkeypatch.setattr(JITFunction, "_do_compile", lambda kernel, *arguments: launches.compile(kernel, *arguments))
    return launches


@pytest.fixture
def kernel() -> Any:
    return JITFunction(scale_kernel)


def kinds_of_arguments() -> tuple[list[Any], ...]:
    """For each argument, values of every kind that Triton tells apart, and some that it does not."""
    dtypes = torch.float32, torch.bfloat16, torch.float16, torch.int64
    tensors = [torch.zeros(64, dtype=dtype)[offset:] for dtype in dtypes for offset in (0, 1, 8, 16)]
    x, misaligned = tensors[:2]
    sizes: list[Any] = [None, 3, (16, 5), (1, 16), (x, (2, 1)), (x, (16, 1)), (misaligned, (2, 1))]
    sizes += [TensorDescriptor.from_tensor(torch.zeros(64, 64), block) for block in ([16, 16], [32, 16])]
    rows = [0, 1, 2, 15, 16, 17, 4096, 2**31 - 1, 2**31, 2**40, -16, True, False]
    return tensors, [x, misaligned, None], sizes, rows, [1.0, 0.5, 1, 2, 2**33]


def kinds_of_options() -> list[dict[str, Any]]:
    more: list[dict[str, Any]] = [{}, {"num_warps": 4}, {"num_warps": 8}, {"num_warps": 4, "num_stages": 2}]
    return [{"BLOCK": block, "MASKED": masked} | own for own in more for block in (16, 32) for masked in (True, False)]


def test_runs_the_kernel_that_triton_runs(gpu: Launches, kernel: Any) -> None:
    draw, kinds, options_of_all = random.Random(0), kinds_of_arguments(), kinds_of_options()
    cases = []
    for _ in range(4):  # neighbours of a random launch: all that differ from it in one argument, or in an option
        base, options = [draw.choice(values) for values in kinds], draw.choice(options_of_all)
        for position, values in enumerate(kinds):
            cases += [([*base[:position], value, *base[position + 1 :]], options) for value in values]
        cases += [(base, other) for other in options_of_all]
    draw.shuffle(cases)
    ran = set()
    for arguments, options in cases:
        gpu.device, gpu.stream = draw.choice([(0, 7), (0, 8), (1, 7)])
        grid = draw.choice([(3,), (3, 4), (3, 4, 5)])
        gpu.ran.clear()
        for _ in range(3):
            launch(kernel, grid, *arguments, **options)
        kernel[grid](*arguments, **options)
        *by_us, by_triton = gpu.ran
        assert len(by_us) == 3
        for found in by_us:
            assert found[:7] == by_triton[:7], (arguments, options)  # kernel, grid, stream, function, metadata
            assert [id(value) for value in found[10:15]] == [id(value) for value in arguments]
            assert found[15:] == by_triton[15:] == (options["BLOCK"], options["MASKED"])
        ran.add(by_triton[0])
    assert len(ran) > 100


def test_a_repeated_launch_goes_past_triton(gpu: Launches, kernel: Any) -> None:
    x = torch.zeros(64)
    for _ in range(5):
        launch(kernel, (3,), x, x, None, 16, 0.5, BLOCK=16, MASKED=True)
    assert (gpu.compiled, len(gpu.ran)) == (1, 5)
    assert gpu.bound == 2  # the first makes Triton's caches, the second is noted


def test_the_order_of_constants_is_not_mistaken(gpu: Launches, kernel: Any) -> None:
    x = torch.zeros(64)
    for _ in range(3):
        launch(kernel, (3,), x, x, None, 16, 0.5, BLOCK=1, MASKED=0)
        launch(kernel, (3,), x, x, None, 16, 0.5, MASKED=1, BLOCK=0)
        assert gpu.ran[-2][0] is not gpu.ran[-1][0]
        assert (gpu.ran[-2][15:], gpu.ran[-1][15:]) == ((1, 0), (0, 1))


class TestIsLeftToTriton:
    @pytest.fixture(autouse=True)
    def launched(self, gpu: Launches, kernel: Any) -> Iterator[None]:
        """Launches that go past Triton, before and after."""
        self.gpu, self.kernel, self.x = gpu, kernel, torch.zeros(64)
        for _ in range(3):
            self.launch()
        yield
        gpu.bound = 0
        self.launch()
        assert gpu.bound == 0

    def launch(self) -> None:
        launch(self.kernel, (3,), self.x, self.x, None, 16, 0.5, BLOCK=16, MASKED=True)

    @pytest.mark.parametrize("when", ["enter", "exit"])
    def test_a_hook_around_launches(self, when: str) -> None:
        hooks: Any = knobs.runtime.launch_enter_hook if when == "enter" else knobs.runtime.launch_exit_hook
        assert self.gpu.ran[-1][8:10] == (None, None)
        hooks.add(print)
        try:
            self.launch()
        finally:
            hooks.remove(print)
        assert self.gpu.ran[-1][8:10] == (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)

    def test_a_hook_in_the_place_of_those(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as context:
            context.setattr(knobs.runtime, "launch_enter_hook", print)
            self.launch()
        assert self.gpu.ran[-1][8] is print

    def test_a_hook_of_the_kernel(self) -> None:
        seen: list[Any] = []
        self.kernel.add_pre_run_hook(lambda *arguments, **options: seen.append(arguments))
        self.launch()
        self.kernel.pre_run_hooks.clear()
        assert len(seen) == 1

    @pytest.mark.parametrize(
        ("where", "knob", "value"), [("runtime", "debug", True), ("compilation", "instrumentation_mode", "consan")]
    )
    def test_a_knob_that_changes_the_kernel(
        self, where: str, knob: str, value: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as context:
            context.setattr(getattr(knobs, where), knob, value)
            self.launch()
        assert self.gpu.ran[-1][0] is not self.gpu.ran[-2][0]

    def test_a_replaced_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[Any] = []
        with monkeypatch.context() as context:
            context.setattr(JITFunction, "run", lambda kernel, *arguments, **options: seen.append(kernel))
            self.launch()
        assert seen == [self.kernel]

    @pytest.mark.parametrize("how", ["replaced", "in place"])
    def test_a_changed_global(self, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as context:
            if how == "replaced":
                context.setitem(globals(), "FACTOR", tl.constexpr(3))
            else:
                context.setattr(FACTOR, "value", 3)
            with pytest.raises(RuntimeError, match="FACTOR has changed"):
                self.launch()

    def test_a_version_that_is_not_known(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as context:
            context.setattr(module, "DIRECT", False)
            self.gpu.bound = 0
            self.launch()
            assert self.gpu.bound == 1


@pytest.mark.parametrize("forget", ["kernels", "devices"])
def test_what_triton_forgot_is_compiled_again(gpu: Launches, kernel: Any, forget: str) -> None:
    x = torch.zeros(64)
    for _ in range(3):
        launch(kernel, (3,), x, x, None, 16, 0.5, BLOCK=16, MASKED=True)
    if forget == "kernels":
        kernel.device_caches[0][0].clear()
    else:
        kernel.device_caches.clear()
    launch(kernel, (3,), x, x, None, 16, 0.5, BLOCK=16, MASKED=True)
    assert gpu.compiled == 2


@pytest.mark.parametrize(
    "unusual",
    [{"do_not_specialize": ["rows"]}, {"do_not_specialize_on_alignment": ["rows"]}, {"annotation": "fp32"}],
    ids=str,
)
def test_what_triton_does_not_specialise_for_is_left_to_it(gpu: Launches, unusual: dict[str, Any]) -> None:
    def own_kernel(x_ptr, rows, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        tl.store(x_ptr, rows)

    if "annotation" in unusual:
        own_kernel.__annotations__["rows"] = unusual["annotation"]
        unusual = {}
    kernel, x = JITFunction(own_kernel, **unusual), torch.zeros(64)
    for rows in (16, 17, 1, 16):
        kernel[3,](x, rows, BLOCK=16)
        launch(kernel, (3,), x, rows, BLOCK=16)
        assert gpu.ran[-1][0] is gpu.ran[-2][0]


def test_a_constant_by_position_is_not_mistaken_for_an_argument(gpu: Launches, kernel: Any) -> None:
    x = torch.zeros(64)
    for block in (16, 32, 16, 32):
        kernel[3,](x, x, None, 16, 0.5, block, MASKED=True)
        launch(kernel, (3,), x, x, None, 16, 0.5, block, MASKED=True)
        assert gpu.ran[-1][0] is gpu.ran[-2][0]


def test_this_triton_is_known() -> None:
    """If it fails: read `JITFunction.run` of the new version, then add it to `READ`."""
    assert module.DIRECT


def test_every_launch_of_the_package_can_go_past_triton() -> None:
    """Arguments come by position and constants by name, and Triton specialises for all arguments in its usual way."""
    kernels: dict[str, Any] = {}

    def check(run: Any, kernel: Any, *arguments: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        name = kernel.fn.__name__
        if name not in kernels:
            kernels[name] = JITFunction(kernel.fn)
        parameters = kernels[name].params
        given, last = parameters[: len(arguments)], parameters[len(arguments) :]
        assert all(module.is_usual(parameter) for parameter in given), name
        assert all(parameter.is_constexpr and parameter.name in constants for parameter in last), name

    target = codegen.TARGETS["sm_90"]
    with launched_by(check), dispatch.compiling_for(target.gpu):
        for op in codegen.op_names():
            for case in codegen.cases(op):
                case.launch()
    assert len(kernels) > 20
