import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastvit_kernels import add_layer_norm, dispatch, layer_norm
from fastvit_kernels.layer_norm import op
from fastvit_kernels.residual import draw_path_scale
from tests.in_full import IN_FULL, in_full
from tests.kernels.numerics import assert_accurate

pytestmark = pytest.mark.usefixtures("implementation")

EPS = 1e-6


def plain_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    centred = wide - wide.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    return (centred / torch.sqrt(variance + EPS) * weight + bias).to(x.dtype)


def plain_add_layer_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, layer_scale: Tensor | None = None
) -> Tensor:
    y = x + (branch if layer_scale is None else branch * layer_scale)
    return torch.stack([y, plain_layer_norm(y, weight, bias)])


def add_layer_norm_stacked(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, **options: object) -> Tensor:
    return torch.stack(add_layer_norm(x, branch, weight, bias, **options))


def inputs(*shape: int) -> dict[str, Tensor]:
    width = shape[-1]
    return {"x": torch.randn(shape), "weight": 1 + 0.2 * torch.randn(width), "bias": 0.1 * torch.randn(width)}


def add_inputs(*shape: int, scaled: bool) -> dict[str, Tensor]:
    branch = {"branch": 2 * torch.randn(shape)}
    return inputs(*shape) | branch | ({"layer_scale": 0.3 + 0.1 * torch.randn(shape[-1])} if scaled else {})


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 192), (3, 5, 769), (2, 33, 1280), (1, 1664), (7,), (300, 6)]
# The interpreter takes its time for each row: where there are many, one dtype.
QUICK = [(shape, dtype) for shape in SHAPES for dtype in DTYPES if shape not in ((2, 33, 1280), (300, 6))]
QUICK += [((2, 33, 1280), torch.bfloat16), ((300, 6), torch.float32)]
FULL = [(shape, dtype) for shape in SHAPES for dtype in DTYPES]


@pytest.mark.parametrize(("shape", "dtype"), QUICK + [in_full(*case) for case in FULL if case not in QUICK])
def test_matches_independent_formulation(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    assert_accurate(layer_norm, plain_layer_norm, inputs(*shape), dtype, device)


QUICK_SUMS = [((3, 5, 769), True, torch.float32), ((1, 2, 1280), False, torch.bfloat16)]
QUICK_SUMS += [((17, 9), True, torch.bfloat16), ((2, 2, 3, 64), False, torch.float32)]
FULL_SUMS = itertools.product(
    [(3, 5, 769), (1, 2, 1280), (17, 9), (2, 2, 3, 64)], [False, True], [torch.float32, torch.bfloat16]
)


@pytest.mark.parametrize(
    ("shape", "scaled", "dtype"), QUICK_SUMS + [in_full(*case) for case in FULL_SUMS if case not in QUICK_SUMS]
)
def test_sum_matches_independent_formulation(
    shape: tuple[int, ...], scaled: bool, dtype: torch.dtype, device: torch.device
) -> None:
    assert_accurate(add_layer_norm_stacked, plain_add_layer_norm, add_inputs(*shape, scaled=scaled), dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [192, 768, 1024, 1280, 1664])
def test_production_sizes(width: int, dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("too slow without a GPU")
    assert_accurate(layer_norm, plain_layer_norm, inputs(64, 257, width), dtype, device)
    arguments = add_inputs(64, 257, width, scaled=True)
    assert_accurate(add_layer_norm_stacked, plain_add_layer_norm, arguments, dtype, device)


@pytest.mark.parametrize("hostile", ["offset", "one huge", "constant rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hostile_rows(hostile: str, dtype: torch.dtype, device: torch.device) -> None:
    arguments = inputs(1, 3, 769)
    if hostile == "offset":
        arguments["x"] += 1000
    elif hostile == "one huge":
        arguments["x"][..., 3] = 3e4
    else:
        arguments["x"] = torch.full_like(arguments["x"], 0.5)
    condition = 100 if hostile == "offset" else 1  # a mean of 1000 is rounded, then taken from values of size 1
    assert_accurate(layer_norm, plain_layer_norm, arguments, dtype, device, condition=condition)


@settings(
    max_examples=25 if IN_FULL else 8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    shape=st.lists(st.integers(1, 9 if IN_FULL else 4), min_size=1, max_size=3),
    width=st.integers(8, 300),
    scaled=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_shape(shape: list[int], width: int, scaled: bool, dtype: torch.dtype, device: torch.device) -> None:
    arguments = add_inputs(*shape, width, scaled=scaled)
    assert_accurate(add_layer_norm_stacked, plain_add_layer_norm, arguments, dtype, device)


@pytest.mark.parametrize("layout", ["transposed", "rows apart", "columns apart", "repeated rows"])
def test_non_contiguous_input(layout: str, device: torch.device) -> None:
    arguments = add_inputs(3, 5, 66, scaled=True)
    for name in ("x", "branch"):
        wide = torch.randn(5, 3, 132)
        arguments[name] = {
            "transposed": wide[..., :66].transpose(0, 1),
            "rows apart": wide.view(3, 5, 132)[..., 7:73],
            "columns apart": wide.view(3, 5, 132)[..., ::2],
            "repeated rows": wide[0, 0, :66].expand(3, 5, 66),
        }[layout]
        assert not arguments[name].is_contiguous()
    assert_accurate(add_layer_norm_stacked, plain_add_layer_norm, arguments, torch.float32, device)
    x = {name: arguments[name] for name in ("x", "weight", "bias")}
    assert_accurate(layer_norm, plain_layer_norm, x, torch.float32, device)


def test_non_contiguous_gradient_and_parameters(device: torch.device) -> None:
    x = torch.randn(4, 6, 33, device=device, requires_grad=True)
    weight, bias = torch.randn(33, 2, device=device).unbind(1)
    gradient = torch.randn(6, 4, 33, device=device).transpose(0, 1)
    ours = torch.autograd.grad(layer_norm(x, weight, bias), x, gradient)[0]
    expected = torch.autograd.grad(plain_layer_norm(x, weight, bias), x, gradient)[0]
    torch.testing.assert_close(ours, expected)


def test_empty_batch(device: torch.device) -> None:
    arguments = {name: tensor.to(device).requires_grad_() for name, tensor in inputs(0, 5, 8).items()}
    y = layer_norm(**arguments)
    y.sum().backward()
    assert y.shape == arguments["x"].grad.shape == (0, 5, 8)
    assert arguments["weight"].grad.tolist() == [0.0] * 8


def test_width_one_gives_the_bias(device: torch.device) -> None:
    arguments = {name: tensor.to(device) for name, tensor in inputs(4, 1).items()}
    assert torch.equal(layer_norm(**arguments), arguments["bias"].expand(4, 1))


def test_nan_stays_in_its_row(device: torch.device) -> None:
    arguments = {name: tensor.to(device) for name, tensor in inputs(4, 33).items()}
    arguments["x"][2, 5] = torch.nan
    assert layer_norm(**arguments).isnan().any(dim=-1).tolist() == [False, False, True, False]


def test_statistics_are_float32_and_parameters_may_be(device: torch.device) -> None:
    arguments = {name: tensor.to(device).requires_grad_() for name, tensor in inputs(8, 768).items()}
    x = arguments.pop("x").detach().bfloat16()
    y, wide = layer_norm(x, **arguments), layer_norm(x.float(), **arguments)
    assert y.dtype == torch.bfloat16
    # one rounding to bfloat16 apart
    assert ((y.float() - wide).abs() <= 2**-7 * wide.abs() + 1e-6).all()
    y.float().square().sum().backward()
    assert arguments["weight"].grad.dtype == arguments["bias"].grad.dtype == torch.float32


def test_parameters_of_different_dtypes_get_their_own(device: torch.device) -> None:
    x = torch.randn(5, 24, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(24, device=device, requires_grad=True)
    bias = torch.randn(24, device=device, dtype=torch.bfloat16, requires_grad=True)
    layer_norm(x, weight, bias).sum().backward()
    assert (x.grad.dtype, weight.grad.dtype, bias.grad.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    assert bias.grad.tolist() == [5.0] * 24


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_residual_stream_may_be_wider_than_the_branch(low: torch.dtype, device: torch.device) -> None:
    arguments = {name: t.to(device).requires_grad_() for name, t in add_inputs(2, 5, 40, scaled=True).items()}
    arguments["branch"] = arguments["branch"].detach().to(low).requires_grad_()
    for options in ({}, {"layer_scale": None}):  # the gradient of the branch is that of x, but in another dtype
        y, normed = add_layer_norm(**arguments | options)
        assert y.dtype == normed.dtype == torch.float32
        gradient = torch.autograd.grad((y * normed).sum(), arguments["branch"])[0]
        wide = {n: t.detach().double() for n, t in (arguments | options).items() if t is not None}
        wide["branch"].requires_grad_()
        y, normed = plain_add_layer_norm(**wide)
        expected = torch.autograd.grad((y * normed).sum(), wide["branch"])[0]
        assert gradient.dtype == low
        torch.testing.assert_close(gradient.double(), expected, rtol=0.02, atol=0.02)


def test_drop_path_keeps_or_drops_whole_samples(implementation: str, device: torch.device) -> None:
    # interpreted, each row takes its time; chance is not the kernels' matter
    batch = 200 if implementation == "reference" or device.type == "cuda" else 25
    arguments = {name: tensor.to(device) for name, tensor in add_inputs(batch, 2, 8, scaled=True).items()}
    arguments["branch"].requires_grad_()
    y, normed = add_layer_norm(**arguments, drop_path=0.2)
    gradient = torch.autograd.grad(y.sum(), arguments["branch"])[0]
    scale = (y - arguments["x"]) / (arguments["branch"] * arguments["layer_scale"])  # [B, N, D]
    kept = scale[:, 0, 0] > 0.5  # [B]
    assert torch.allclose(scale[kept], torch.tensor(1.25, device=device), atol=1e-2)
    assert (y[~kept] == arguments["x"][~kept]).all() and (gradient[~kept] == 0).all()
    assert torch.allclose(gradient[kept], (1.25 * arguments["layer_scale"]).expand_as(gradient[kept]))
    assert kept.float().mean().item() == pytest.approx(0.8, abs=2 / batch**0.5)  # 5 standard deviations
    assert torch.allclose(normed, plain_layer_norm(y, arguments["weight"], arguments["bias"]), atol=1e-5)


@pytest.mark.parametrize("scaled", [False, True])
def test_gradients_with_drop_path(scaled: bool, device: torch.device) -> None:
    arguments = add_inputs(6, 3, 40, scaled=scaled)

    def redrawn(**tensors: Tensor) -> Tensor:
        torch.manual_seed(7)
        return add_layer_norm_stacked(**tensors, drop_path=0.4)

    def plain(branch: Tensor, **tensors: Tensor) -> Tensor:
        torch.manual_seed(7)
        scale = draw_path_scale(torch.empty(6, device=device), 0.4).to(branch.dtype)
        return plain_add_layer_norm(branch=scale[:, None, None] * branch, **tensors)

    assert_accurate(redrawn, plain, arguments, torch.float32, device)


@pytest.mark.parametrize("used", [0, 1])
def test_only_one_result_is_used(used: int, device: torch.device) -> None:
    arguments = add_inputs(3, 5, 40, scaled=True)
    if used == 0:  # no gradient reaches the parameters of the normalisation
        arguments |= {"weight": torch.ones(40), "bias": torch.zeros(40)}
    ours = lambda **tensors: add_layer_norm(**tensors)[used] + 0 * tensors["weight"] + 0 * tensors["bias"]  # noqa: E731
    plain = lambda **tensors: plain_add_layer_norm(**tensors)[used] + 0 * tensors["weight"]  # noqa: E731
    assert_accurate(ours, plain, arguments, torch.float32, device)


@pytest.mark.parametrize("shape", [(2, 9, 1280), pytest.param((64, 257, 1280), marks=pytest.mark.gpu)])
def test_gradients_are_the_same_bits_in_every_run(shape: tuple[int, ...], device: torch.device) -> None:
    if device.type == "cpu" and shape[0] > 2:
        pytest.skip("too slow without a GPU")
    arguments = {n: t.to(device, torch.bfloat16).requires_grad_() for n, t in add_inputs(*shape, scaled=True).items()}
    cotangent = torch.randn(2, *shape, device=device, dtype=torch.bfloat16)

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(add_layer_norm_stacked(**arguments), list(arguments.values()), cotangent)

    assert all(torch.equal(first, second) for first, second in zip(run(), run(), strict=True))


def test_autocast_leaves_the_dtype_of_x(device: torch.device) -> None:
    arguments = {name: tensor.to(device) for name, tensor in inputs(3, 40).items()}
    expected = layer_norm(**arguments)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(layer_norm(**arguments), expected)
        half = layer_norm(**{name: tensor.bfloat16() for name, tensor in arguments.items()})
    assert half.dtype == torch.bfloat16


def test_compiles_without_graph_break(device: torch.device) -> None:
    arguments = {name: t.to(device).requires_grad_() for name, t in add_inputs(3, 5, 40, scaled=True).items()}
    compiled = torch.compile(
        lambda **tensors: add_layer_norm_stacked(**tensors).sin(), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for batch in (3, 2):
        tensors = arguments | {n: arguments[n][:batch].detach().requires_grad_() for n in ("x", "branch")}
        result = compiled(**tensors)
        expected = add_layer_norm_stacked(**tensors).sin()
        assert torch.equal(result, expected)
        actual_gradients = torch.autograd.grad(result.sum(), list(tensors.values()))
        gradients = torch.autograd.grad(expected.sum(), list(tensors.values()))
        assert all(torch.equal(a, b) for a, b in zip(actual_gradients, gradients, strict=True))


def test_registered_operator(implementation: str, device: torch.device) -> None:
    if implementation == "reference":
        pytest.skip("does not apply: the operator is Triton's")
    tensors = {n: t.to(device).requires_grad_() for n, t in add_inputs(3, 5, 40, scaled=True).items()}
    x, weight, bias, branch, layer_scale = tensors.values()
    path_scale = torch.tensor([0.0, 1.5, 1.5], device=device)
    torch.library.opcheck(op.layer_norm_op, (x, None, None, None, weight, bias, EPS))
    torch.library.opcheck(op.layer_norm_op, (x, branch, None, None, weight, bias, EPS))
    torch.library.opcheck(op.layer_norm_op, (x, branch, layer_scale, path_scale, weight, bias, EPS))


def test_second_derivative(implementation: str, device: torch.device) -> None:
    arguments = {name: t.to(device).requires_grad_() for name, t in inputs(3, 40).items()}
    gradient = torch.autograd.grad(layer_norm(**arguments).sin().sum(), arguments["x"], create_graph=True)[0]
    if implementation == "triton":
        with pytest.raises(NotImplementedError, match="layer_norm has no second derivative"):
            gradient.sum().backward()
    else:
        gradient.square().sum().backward()
        assert arguments["x"].grad.abs().sum() > 0


def test_float64_is_for_the_reference(implementation: str, device: torch.device) -> None:
    arguments = {name: tensor.double().to(device) for name, tensor in inputs(3, 40).items()}
    if implementation == "triton":
        with pytest.raises(RuntimeError, match=r"the kernels take .* not torch.float64"):
            layer_norm(**arguments)
    with dispatch.using("auto"):
        torch.testing.assert_close(layer_norm(**arguments), plain_layer_norm(**arguments), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 8, dtype=torch.int64)}, TypeError, "x must be floating point"),
        ({"x": torch.tensor(1.0)}, ValueError, "x must have a last dimension"),
        ({"weight": torch.ones(7)}, ValueError, r"weight must have shape \[8\], got \[7\]"),
        ({"bias": torch.ones(1)}, ValueError, r"bias must have shape \[8\], got \[1\]"),
        ({"bias": torch.ones(8, dtype=torch.float16)}, TypeError, "bias must be torch.float32"),
        ({"weight": torch.ones(8, device="meta")}, ValueError, "weight must be on cpu"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        layer_norm(**(inputs(2, 8) | change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(8)}, ValueError, r"x must have shape \[B, ..., D\], got \[8\]"),
        ({"x": torch.zeros(2, 8).bfloat16()}, TypeError, "branch must be torch.bfloat16 like x, got torch.float32"),
        ({"branch": torch.zeros(1, 8)}, ValueError, r"branch must have the shape of x, \[2, 8\], got \[1, 8\]"),
        ({"branch": torch.zeros(2, 8, dtype=torch.int8)}, TypeError, "branch must be floating point"),
        ({"branch": torch.zeros(2, 8, device="meta")}, ValueError, "branch must be on cpu"),
        ({"weight": torch.ones(7)}, ValueError, r"weight must have shape \[8\]"),
        ({"layer_scale": torch.ones(1)}, ValueError, r"layer_scale must have shape \[8\]"),
        ({"drop_path": 1.0}, ValueError, "drop_path must be at least 0 and below 1"),
    ],
)
def test_errors_of_the_sum_name_the_argument(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        add_layer_norm(**(add_inputs(2, 8, scaled=True) | change))
