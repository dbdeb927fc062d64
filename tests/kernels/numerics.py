"""How an operation is judged: its error may be at most twice that of plain PyTorch in the same dtype, plus rounding.

Both are measured against an independent formulation evaluated in float64 on the same (rounded) inputs.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def assert_accurate(
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    inputs: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: torch.device,
    *,
    condition: float = 1.0,
) -> None:
    """Checks the output of `ours(**inputs)` and its gradient for every floating input.

    `plain` is the independent formulation: in float64 it is the exact answer, in `dtype` the error to compare with.
    The rounding floor, relative to the size of the exact result, is one rounding of the result in `dtype` and the
    float32 sum of some thousand terms in an order of its own, times `condition` where the problem amplifies it.
    """
    floor = torch.finfo(dtype).eps + 32 * torch.finfo(torch.float32).eps * condition
    rounded = {name: _cast(tensor, dtype, device) for name, tensor in inputs.items()}
    exact_inputs = {name: _cast(tensor, torch.float64, device) for name, tensor in rounded.items()}
    exact = _output_and_gradients(plain, exact_inputs)
    plain_results = _output_and_gradients(plain, rounded)
    for name, result in _output_and_gradients(ours, rounded).items():
        _assert_close(name, result, exact[name], plain_results[name], floor)


def _cast(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    return tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)


def _output_and_gradients(function: Callable[..., Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # detach keeps strides: a non-contiguous input reaches the function as one
    leaves = {name: t.detach().requires_grad_(t.is_floating_point()) for name, t in inputs.items()}
    output = function(**leaves)
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    floating = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    gradients = torch.autograd.grad(output, list(floating.values()), cotangent.to(output))
    return {"output": output.detach()} | {
        f"gradient of {name}": gradient for name, gradient in zip(floating, gradients, strict=True)
    }


def _assert_close(name: str, ours: Tensor, exact: Tensor, plain: Tensor, floor: float) -> None:
    assert ours.shape == exact.shape, f"{name}: shape {list(ours.shape)}, expected {list(exact.shape)}"
    for measure, size in (("largest", _largest), ("RMS", _rms)):
        error, plain_error = size(ours.double() - exact), size(plain.double() - exact)
        bound = 2 * plain_error + floor * size(exact)
        # written so that NaN fails
        assert error <= bound, (
            f"{name}: {measure} error {error:.3e}, plain PyTorch {plain_error:.3e}, bound {bound:.3e}"
        )


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()


def _rms(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()
