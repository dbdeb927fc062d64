import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastvit_kernels import dispatch
from fastvit_kernels.column_sums import ColumnSums
from fastvit_kernels.gemm import config, products
from tests.in_full import IN_FULL, in_full

FORM = {False: "none", True: "tanh"}


@pytest.fixture(params=["triton", "cuBLAS"])
def route(request: pytest.FixtureRequest, device: torch.device) -> Iterator[str]:
    """Runs a test with the Triton product and with PyTorch's, memory of outputs filled with NaN beforehand."""
    if device.type == "cpu" and not dispatch.INTERPRETED:
        pytest.skip("does not apply: kernels need a GPU or Triton's interpreter")
    with config.triton_for(*config.PRODUCTS if request.param == "triton" else ()):
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield request.param
        torch.use_deterministic_algorithms(False)


def assert_close(ours: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """`exact` float64; the error allowed is two roundings to `dtype` and a float32 sum, relative to the largest."""
    assert ours.shape == exact.shape
    bound = (2 * torch.finfo(dtype).eps + 64 * torch.finfo(torch.float32).eps) * exact.abs().max()
    error = (ours.double() - exact).abs().max()
    assert error <= bound, f"error {error:.3e}, bound {bound:.3e}"


def normal(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def exact_gelu(pre: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    """GELU and its derivative in float64."""
    leaf = pre.double().requires_grad_()
    post = F.gelu(leaf, approximate=FORM[tanh])
    return post.detach(), torch.autograd.grad(post.sum(), leaf)[0]


def check_all(rows: int, width: int, out: int, tanh: bool, dtype: torch.dtype, device: torch.device) -> None:
    """Every product of a linear layer [rows, width] -> [rows, out] against float64."""
    x, weight = normal(rows, width, dtype=dtype, device=device), normal(out, width, dtype=dtype, device=device) * 0.1
    bias, grad = normal(out, dtype=dtype, device=device), normal(rows, out, dtype=dtype, device=device)
    x64, weight64, bias64, grad64 = (tensor.double() for tensor in (x, weight, bias, grad))
    linear = x64 @ weight64.T + bias64

    assert_close(products.linear(x, weight, bias), linear, dtype)
    pre, post = products.linear_gelu(x, weight, bias, tanh)
    assert_close(pre, linear, dtype)
    none, alone = products.linear_gelu(x, weight, bias, tanh, keep_pre=False)
    assert none.numel() == 0 and torch.equal(alone, post)
    assert_close(post, exact_gelu(pre, tanh)[0], dtype)  # of the rounded input

    assert_close(products.input_gradient(grad, weight), grad64 @ weight64, dtype)
    assert_close(products.weight_gradient(grad, x), grad64.T @ x64, dtype)
    post, slope = exact_gelu(x, tanh)
    grad_x, partial, again = products.gelu_gradient(grad, weight, x, tanh, recompute=True)
    assert_close(grad_x, grad64 @ weight64 * slope, dtype)
    # the terms of a sum over rows are rounded one by one where cuBLAS hands them over
    column_sums = partial.double().sum(0)
    assert_close(column_sums / rows**0.5, (grad64 @ weight64 * slope).sum(0) / rows**0.5, dtype)
    assert_close(again, post, dtype)
    alone, *others = products.gelu_gradient(grad, weight, x, tanh, recompute=False, column_sum=False)
    assert torch.equal(alone, grad_x) and all(other.numel() == 0 for other in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "tanh"),
    [((5, 40, 72), False), ((33, 7, 65), True)]
    + [in_full(shape, tanh) for shape in [(1, 16, 16), (70, 33, 1)] for tanh in (False, True)],
)
def test_products(
    shape: tuple[int, int, int], tanh: bool, dtype: torch.dtype, route: str, device: torch.device
) -> None:
    check_all(*shape, tanh, dtype, device)


@settings(
    max_examples=10 if IN_FULL else 4,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(rows=st.integers(1, 80), width=st.integers(1, 70), out=st.integers(1, 70), tanh=st.booleans())
def test_any_shape(rows: int, width: int, out: int, tanh: bool, route: str, device: torch.device) -> None:
    torch.manual_seed(0)
    check_all(rows, width, out, tanh, torch.float32, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "width"), [(197, 768), (197, 1024), (257, 1280)])
def test_production_sizes(tokens: int, width: int, dtype: torch.dtype, route: str, device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("too slow without a GPU")
    for tanh in (False, True):
        check_all(64 * tokens, width, 4 * width, tanh, dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "scaled"),
    [
        ((3, 5, 40, 72), True),
        ((2, 17, 9, 33), False),
        in_full((3, 5, 40, 72), False),
        in_full((2, 17, 9, 33), True),
    ],
)
def test_residual(
    shape: tuple[int, int, int, int], scaled: bool, dtype: torch.dtype, route: str, device: torch.device
) -> None:
    samples, tokens, width, out = shape
    x, residual = (normal(samples * tokens, size, dtype=dtype, device=device) for size in (width, 2 * out))
    residual = residual[:, :out]  # rows apart
    weight, bias = normal(out, width, dtype=dtype, device=device), normal(out, dtype=dtype, device=device)
    layer_scale = normal(out, dtype=torch.float32, device=device) if scaled else None
    path_scale = torch.tensor([0, 1.5, 1.5], device=device)[:samples] if scaled else None
    branch = x.double() @ weight.double().T + bias.double()
    if layer_scale is not None and path_scale is not None:
        branch *= layer_scale.double() * path_scale.double().repeat_interleave(tokens)[:, None]
    for wide in (residual, residual.float()):  # the residual stream may be wider than the branch
        result = products.linear_residual(x, weight, bias, wide, layer_scale, path_scale)
        assert result.dtype == wide.dtype
        assert_close(result, wide.double() + branch, dtype)
    if scaled:
        assert torch.equal(result[:tokens], residual[:tokens].float())  # the first sample is dropped


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_layer_scale(dtype: torch.dtype, device: torch.device) -> None:
    x, grad = normal(15, 20, dtype=dtype, device=device), normal(15, 33, dtype=dtype, device=device)
    weight, bias = normal(33, 20, dtype=dtype, device=device), normal(33, dtype=dtype, device=device)
    layer_scale, path_scale = torch.rand(33, device=device), torch.tensor([0, 1.5, 1.5], device=device)
    leaves = [tensor.double().requires_grad_() for tensor in (weight, bias, layer_scale)]
    scaled = grad.double() * path_scale.double().repeat_interleave(5)[:, None]
    expected = torch.autograd.grad(leaves[2] * (x.double() @ leaves[0].T + leaves[1]), leaves, scaled)

    branch, scaled_branch, partial = products.branch_gradient(grad, layer_scale, path_scale, dtype)
    assert_close(branch, scaled, dtype)
    assert_close(scaled_branch, scaled * layer_scale.double(), dtype)
    column_sum = partial.sum(0)
    results = products.layer_scale_gradients(branch.T @ x, weight, bias, layer_scale, column_sum)
    for result, exact in zip(results, expected, strict=True):
        assert_close(result, exact, dtype)


def test_branch_gradient_is_the_gradient_where_nothing_changes(device: torch.device) -> None:
    grad = torch.randn(6, 5, device=device)
    assert all(result is grad for result in products.branch_gradient(grad, None, None, torch.float32)[:2])
    cast, scaled, partial = products.branch_gradient(grad, None, None, torch.bfloat16)
    assert cast.dtype == torch.bfloat16 and scaled is cast
    torch.testing.assert_close(partial.sum(0), grad.sum(0))


def test_branch_gradient_computes_what_is_needed(device: torch.device) -> None:
    grad, layer_scale, path_scale = (
        torch.randn(6, 5, device=device),
        torch.rand(5, device=device),
        torch.ones(6, device=device),
    )
    for scale in (None, layer_scale):
        everything = products.branch_gradient(grad, scale, path_scale, torch.float32)
        for wanted in itertools.product([False, True], repeat=3):
            names = ("unscaled", "scaled", "column_sum")
            some = products.branch_gradient(
                grad, scale, path_scale, torch.float32, **dict(zip(names, wanted, strict=True))
            )
            for name, want, ours, full in zip(names, wanted, some, everything, strict=True):
                if want:
                    assert torch.equal(ours, full)
                elif scale is not None or name == "column_sum" or not any(wanted[:2]):
                    assert ours.numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tanh", [False, True])
def test_gelu_over_its_whole_range(tanh: bool, dtype: torch.dtype, device: torch.device) -> None:
    """The exact form is evaluated by polynomials: their error must vanish in float32, or in the rounding to 16 bits."""
    x = torch.cat([torch.linspace(-14, 14, 8001), torch.logspace(-12, 4, 200), -torch.logspace(-12, 4, 200)]).to(dtype)
    post, slope = exact_gelu(x, tanh)
    rounding = torch.finfo(dtype).eps / 2
    ours = products.gelu(x.to(device), tanh).cpu().double()
    least = torch.finfo(dtype).tiny  # below it digits are lost
    assert ((ours - post).abs() <= rounding * post.abs() + 4e-7 * x.abs().double() + least).all()
    # the slope, through a product that is 1 everywhere
    pre = x.view(31, -1).to(device)
    grad, weight = (torch.ones(shape, device=device, dtype=dtype) for shape in ((len(pre), 1), (1, pre.shape[1])))
    ours = products.gelu_gradient(grad, weight, pre, tanh, recompute=False)[0]
    bound = 3e-6 if tanh or dtype != torch.float32 else 1e-6  # tanh: 1 - tanh(u)^2 cancels, times u'
    assert ((ours.flatten().cpu().double() - slope).abs() <= rounding * slope.abs() + bound).all()


def test_gelu_runs_in_place_where_its_input_is_not_kept(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type == "cpu" and not dispatch.INTERPRETED:
        pytest.skip("does not apply: kernels need a GPU or Triton's interpreter")
    results, addmm = [], torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *operands: results.append(addmm(*operands)) or results[-1])
    x, weight = torch.randn(3, 5, device=device), torch.randn(4, 5, device=device)
    for keep_pre in (False, True):
        _, post = products.linear_gelu(x, weight, weight[:, 0].contiguous(), False, keep_pre)
        assert (post.data_ptr() == results[-1].data_ptr()) is not keep_pre


def test_gelu_of_nan_and_infinity(device: torch.device) -> None:
    x = torch.tensor([torch.nan, torch.inf, 0.0], device=device)
    for tanh in (False, True):
        result = products.gelu(x, tanh)
        assert result[0].isnan() and result[1] == torch.inf and result[2] == 0


def test_column_sums_of_several_matrices_in_one_launch(device: torch.device) -> None:
    if device.type == "cpu" and not dispatch.INTERPRETED:
        pytest.skip("does not apply: kernels need a GPU or Triton's interpreter")
    sums = ColumnSums()
    shapes = ((1, 5, torch.float32), (130, 70, torch.bfloat16), (3, 64, torch.float16), (65, 33, torch.float32))
    partials = [torch.randn(rows, width, device=device) for rows, width, _ in shapes]
    outs = [torch.full((width,), torch.nan, dtype=dtype, device=device) for _, width, dtype in shapes]
    stack, of_stack = torch.randn(2, 9, 40, device=device), torch.full((2, 40), torch.nan, device=device)
    for partial, out in zip(partials, outs, strict=True):
        sums.add(partial, out)
    sums.add(stack, *of_stack)
    assert all(out.isnan().all() for out in outs)  # nothing is written before
    sums.launch()
    for partial, out in zip(partials, outs, strict=True):
        assert_close(out, partial.double().sum(0), out.dtype)
    assert_close(of_stack, stack.double().sum(1), torch.float32)
    outs[0].fill_(-1)
    sums.launch()  # has nothing left to write
    assert (outs[0] == -1).all()


def test_nan_stays_in_its_row(route: str, device: torch.device) -> None:
    x, weight = torch.randn(40, 33, device=device), torch.randn(36, 33, device=device)
    x[7, 5] = torch.nan
    for result in products.linear_gelu(x, weight, weight[:, 0].contiguous(), tanh=False):
        assert result.isnan().all(1).tolist() == result.isnan().any(1).tolist() == [row == 7 for row in range(40)]


def test_same_bits_in_every_run(route: str, device: torch.device) -> None:
    grad, weight, pre = (torch.randn(shape, device=device) for shape in ((70, 33), (33, 40), (70, 40)))
    first, second = (products.gelu_gradient(grad, weight, pre, False, recompute=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_descriptors_need_aligned_rows() -> None:
    assert products.describable(torch.zeros(4, 8))
    assert not products.describable(torch.zeros(4, 9))  # rows 36 bytes apart
    assert not products.describable(torch.zeros(4, 9)[:, 1:])
    assert not products.describable(torch.zeros(0, 8))
    assert not products.describable(torch.zeros(8).expand(4, 8))


def test_cublas_runs_what_no_gpu_has_measured(device: torch.device) -> None:
    for product in config.PRODUCTS:
        assert not config.runs_triton(product, torch.bfloat16, device, 8, 8, 8)
        with config.triton_for(product):
            assert [config.runs_triton(p, torch.bfloat16, device, 8, 8, 8) for p in config.PRODUCTS].count(True) == 1
            assert config.runs_triton(product, torch.bfloat16, device, 8, 8, 8)
