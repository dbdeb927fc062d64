"""The GPU of this machine, for `search`: compiles for it in several processes and measures on it."""

import multiprocessing
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from triton.runtime.driver import driver

from fastvit_kernels import dispatch
from fastvit_kernels.tuning import codegen
from fastvit_kernels.tuning.codegen import Compiled, Target
from fastvit_kernels.tuning.search import Case, cases, describe, first_line, identity

COMPILE_SECONDS = 120  # a compiler that has not finished by then, or has crashed, never will


class Compiler:
    """Compiles every option of every case for one target, in other processes, from the beginning to the end.

    On the GPU itself this fills Triton's cache on disk, so that a launch finds its kernel there.
    """

    def __init__(
        self, ops: Sequence[str], models: Sequence[str], target: Target, jobs: int, words: Sequence[str] = ()
    ) -> None:
        self.pool = multiprocessing.get_context("spawn").Pool(jobs)  # forked processes could not use CUDA
        self.results = {}
        for index, case in enumerate(cases(ops, models, target.gpu, words)):
            for number, option in enumerate(case.options(target.gpu)):
                arguments = (tuple(ops), tuple(models), tuple(words), target, index, number)
                self.results[identity(case), option] = self.pool.apply_async(compile_option, arguments)
        self.target = target

    def compiled(self, case: Case, option: Any) -> list[Compiled] | str:
        """The kernels of the case that the option launches, or why there are none."""
        try:
            return self.results[identity(case), option].get(COMPILE_SECONDS)
        except multiprocessing.TimeoutError:
            return f"does not compile within {COMPILE_SECONDS} s"

    def obstacle(self, case: Case, option: Any) -> str | None:
        compiled = self.compiled(case, option)
        if isinstance(compiled, str):
            return compiled
        for kernel in compiled:
            if kernel.spill_stores + kernel.spill_loads > 0:
                return f"spills registers ({kernel.stack_bytes} bytes of stack)"
            if kernel.serialised:
                return "ptxas serialises its matrix products"
            if kernel.hazards:
                return f"{kernel.hazards} instructions overwrite registers that a matrix product still reads"
            if kernel.shared_bytes > self.target.shared_limit:
                return f"needs {kernel.shared_bytes} bytes of shared memory of {self.target.shared_limit}"
        return None

    def close(self) -> None:
        self.pool.terminate()


cases_of = lru_cache(cases)


def compile_option(
    ops: tuple[str, ...], models: tuple[str, ...], words: tuple[str, ...], target: Target, index: int, number: int
) -> list[Compiled] | str:
    case = cases_of(ops, models, target.gpu, words)[index]
    option = case.options(target.gpu)[number]

    def launch() -> None:
        inputs = case.inputs(device=torch.device("meta"))
        with case.tunable.forcing(option):
            case.launch(*inputs)

    try:
        kernels = codegen.compiled(case.name, codegen.Case(describe(option), launch), target)
    except Exception as error:  # whatever it is, this option is not one to choose
        return f"does not compile: {first_line(error)}"
    return [kernel for kernel in kernels if kernel.kernel in case.kernels]


class LocalGpu:
    """The current CUDA or ROCm device, as a `search.Machine`."""

    def __init__(self, ops: Sequence[str], models: Sequence[str], jobs: int, words: Sequence[str] = ()) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.gpu = dispatch.gpu(self.device)
        self.cache_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size
        shared_limit = driver.active.utils.get_device_properties(self.device.index)["max_shared_mem"]
        target = Target(self.gpu, driver.active.get_current_target(), shared_limit)
        self.compiler = Compiler(ops, models, target, jobs, words)

    def obstacle(self, case: Case, option: Any) -> str | None:
        return self.compiler.obstacle(case, option)

    def measure(self, launches: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
        """Each launch becomes a CUDA graph, so that Python's time is not measured; graphs take turns in each round."""
        graphs = []
        for launch in launches:
            launch()  # loads kernels, which a capture must not
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                launch()
            graphs.append(graph)
        warm_up = max(2, rounds // 5)
        times = []
        for turn in range(warm_up + rounds):
            order = [(turn + i) % len(graphs) for i in range(len(graphs))]
            events = {i: tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for i in order}
            for i in order:
                events[i][0].record()
                graphs[i].replay()
                events[i][1].record()
            torch.cuda.synchronize()
            times.append([events[i][0].elapsed_time(events[i][1]) for i in range(len(graphs))])
        del graphs, graph
        torch.cuda.empty_cache()  # of the memory that belonged to the graphs
        return times[warm_up:]

    def check_alive(self) -> None:
        torch.cuda.synchronize()
