from collections.abc import Iterator

import pytest
import torch

from fastvit_kernels import dispatch

if dispatch.INTERPRETED:
    import tests.kernels.interpreter  # noqa: F401 - it changes the interpreter


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return torch.device(request.param)


@pytest.fixture(params=["reference", "triton"])
def implementation(request: pytest.FixtureRequest, device: torch.device) -> Iterator[str]:
    """Runs a test with plain PyTorch and with the Triton kernels: on a GPU, or on the CPU by the interpreter.

    Memory of Triton outputs is filled with NaN beforehand, so that what a kernel leaves out does not go unnoticed.
    """
    if request.param == "triton" and device.type == "cpu" and not dispatch.INTERPRETED:
        pytest.skip("does not apply: kernels need a GPU or Triton's interpreter")
    with dispatch.using(request.param):
        torch.use_deterministic_algorithms(request.param == "triton", warn_only=True)
        yield request.param
        torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
