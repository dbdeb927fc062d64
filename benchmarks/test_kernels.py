"""The cases of the registry under pytest-benchmark, for `--benchmark-compare` between two states of the code.

    pytest benchmarks --benchmark-only -k "attention and fastvit" --benchmark-autosave

Each is checked first, and timed with the device in step: a round is one call, from an idle GPU to an idle GPU. So what
the host takes is in these times; `fastvit bench kernels` is the one to compare providers with.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch

from benchmarks.apex_detection import first_line
from benchmarks.judge import Judge
from benchmarks.kernels import Selection, select
from benchmarks.machine import pick_device
from benchmarks.registry import Case, Provider, Unusable
from benchmarks.timing import device_timer

# One size: --benchmark-compare is for following the code, not for covering shapes.
CASES = {case.id: case for case in select(Selection(quick=True), pick_device())}
FIRST = next(iter(CASES.values())).shape
PARAMETERS = [
    pytest.param(case, provider, pass_, id=f"{case.id}-{provider.name}-{pass_}")
    for case in CASES.values()
    if case.shape == FIRST and case.batch == FIRST.batches[0]
    for provider in case.op.providers
    for pass_ in case.op.passes
]


@lru_cache(maxsize=1)
def judge(case: Case) -> Judge:
    return Judge(case, case.inputs(seed=0))


@pytest.mark.parametrize(("case", "provider", "pass_"), PARAMETERS)
def test_operation(benchmark: Any, case: Case, provider: Provider, pass_: str) -> None:
    if provider.slow and case.device.type == "cpu":
        pytest.skip("compiles for long")
    try:
        bound = provider.make(case)(judge(case).inputs)
        verdict = judge(case).judge(provider, bound)
    except Unusable as error:
        pytest.skip(str(error))
    except Exception as error:
        if provider.name == "fastvit":
            raise
        pytest.skip(first_line(error))
    assert verdict.passes, str(verdict)
    leaves, cotangents = list(bound.leaves.values()), judge(case).cotangents

    def forward() -> Any:
        return bound.forward()

    def gradients(outputs: Any) -> Any:
        return torch.autograd.grad(outputs, leaves, cotangents)

    def prepare() -> tuple[tuple[Any, ...], dict[str, Any]]:
        bound.before()
        return ((forward(),) if pass_ == "backward" else ()), {}

    calls: dict[str, Callable[..., Any]] = {
        "forward": forward,
        "backward": gradients,
        "both": lambda: gradients(forward()),
    }
    benchmark._timer = device_timer
    benchmark.group = f"{case.id} {pass_}"
    benchmark.pedantic(calls[pass_], setup=prepare, rounds=20, warmup_rounds=3)
