import itertools
from functools import partial
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastvit_kernels import FusedLayerNormMLP, dispatch, explain, layer_norm_mlp
from fastvit_kernels.gemm import config, products
from fastvit_kernels.mlp import op
from fastvit_kernels.residual import draw_path_scale
from tests.in_full import IN_FULL, in_full
from tests.kernels.numerics import assert_accurate

pytestmark = pytest.mark.usefixtures("implementation")

EPS = 1e-6


def plain_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    layer_scale: Tensor | None = None,
    activation: str = "gelu",
) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    centred = wide - wide.mean(dim=-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + EPS)
    normed = (normed * norm_weight + norm_bias).to(x.dtype)
    hidden = normed @ fc1_weight.T + fc1_bias
    if activation == "gelu":
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    else:
        hidden = hidden * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden**3))) / 2
    branch = hidden @ fc2_weight.T + fc2_bias
    return x + (branch if layer_scale is None else branch * layer_scale)


def inputs(batch: int, tokens: int, width: int, hidden: int, scaled: bool = False) -> dict[str, Tensor]:
    tensors = {
        "x": torch.randn(batch, tokens, width),
        "norm_weight": 1 + 0.2 * torch.randn(width),
        "norm_bias": 0.1 * torch.randn(width),
        "fc1_weight": torch.randn(hidden, width) / width**0.5,
        "fc1_bias": 0.1 * torch.randn(hidden),
        "fc2_weight": torch.randn(width, hidden) / hidden**0.5,
        "fc2_bias": 0.1 * torch.randn(width),
    }
    return tensors | ({"layer_scale": 0.3 + 0.1 * torch.randn(width)} if scaled else {})


SHAPES = [(1, 1, 64, 256), (3, 5, 80, 100), (2, 17, 33, 65)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
QUICK = [  # each shape, dtype, activation and LayerScale at least once
    ((1, 1, 64, 256), "gelu", False, torch.bfloat16),
    ((3, 5, 80, 100), "gelu_tanh", True, torch.bfloat16),
    ((2, 17, 33, 65), "gelu", True, torch.float32),
    ((3, 5, 80, 100), "gelu", False, torch.float16),
]
FULL = list(itertools.product(SHAPES, ["gelu", "gelu_tanh"], [False, True], DTYPES))


@pytest.mark.parametrize(
    ("shape", "activation", "scaled", "dtype"), QUICK + [in_full(*case) for case in FULL if case not in QUICK]
)
def test_matches_independent_formulation(
    shape: tuple[int, int, int, int], activation: str, scaled: bool, dtype: torch.dtype, device: torch.device
) -> None:
    ours = partial(layer_norm_mlp, eps=EPS, activation=activation)
    assert_accurate(ours, partial(plain_mlp, activation=activation), inputs(*shape, scaled=scaled), dtype, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, in_full(torch.float32)])
@pytest.mark.parametrize("product", config.PRODUCTS)
def test_each_product_may_run_in_triton(product: config.Product, dtype: torch.dtype, device: torch.device) -> None:
    with config.triton_for(product):
        assert_accurate(partial(layer_norm_mlp, eps=EPS), plain_mlp, inputs(3, 5, 40, 72, scaled=True), dtype, device)


@pytest.mark.parametrize("tokens", [257, in_full(197)])
def test_tokens_of_vision_transformers(tokens: int, device: torch.device) -> None:
    ours = partial(layer_norm_mlp, eps=EPS)
    assert_accurate(ours, plain_mlp, inputs(1, tokens, 33, 65, scaled=True), torch.bfloat16, device)


@pytest.mark.gpu
@pytest.mark.parametrize("products", [(), config.PRODUCTS], ids=["cuBLAS", "triton products"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "width"), [(197, 768), (197, 1024), (257, 1280)])
def test_production_sizes(
    tokens: int, width: int, dtype: torch.dtype, products: tuple[config.Product, ...], device: torch.device
) -> None:
    if device.type == "cpu":
        pytest.skip("too slow without a GPU")
    arguments = inputs(64, tokens, width, 4 * width, scaled=True)
    with config.triton_for(*products):
        assert_accurate(partial(layer_norm_mlp, eps=EPS), plain_mlp, arguments, dtype, device)


@settings(
    max_examples=12 if IN_FULL else 5,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(8, 50), st.integers(1, 90)),
    scaled=st.booleans(),
    recompute=st.sampled_from(["none", "gelu", "all"]),
    in_triton=st.booleans(),
)
def test_any_shape(
    shape: tuple[int, int, int, int], scaled: bool, recompute: str, in_triton: bool, device: torch.device
) -> None:
    torch.manual_seed(0)
    ours = partial(layer_norm_mlp, eps=EPS, recompute=recompute)
    with config.triton_for(*config.PRODUCTS if in_triton else ()):
        assert_accurate(ours, plain_mlp, inputs(*shape, scaled=scaled), torch.float32, device)


@pytest.mark.parametrize("hostile", ["offset", "one huge", "constant rows"])
def test_hostile_rows(hostile: str, device: torch.device) -> None:
    arguments = inputs(1, 5, 80, 100, scaled=True)
    if hostile == "offset":
        arguments["x"] += 1000
    elif hostile == "one huge":
        arguments["x"][..., 3] = 3e4
    else:
        arguments["x"] = torch.full_like(arguments["x"], 0.5)
    condition = 100 if hostile == "offset" else 1
    ours = partial(layer_norm_mlp, eps=EPS)
    for dtype in (torch.float32, torch.bfloat16):
        assert_accurate(ours, plain_mlp, arguments, dtype, device, condition=condition)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("products", [(), in_full(config.PRODUCTS)], ids=["cuBLAS", "triton products"])
def test_gradients_with_drop_path(scaled: bool, products: tuple[config.Product, ...], device: torch.device) -> None:
    def redrawn(**tensors: Tensor) -> Tensor:
        torch.manual_seed(7)
        return layer_norm_mlp(**tensors, eps=EPS, drop_path=0.4)

    def plain(**tensors: Tensor) -> Tensor:
        torch.manual_seed(7)
        x = tensors["x"]
        scale = draw_path_scale(torch.empty(6, device=device), 0.4).to(x.dtype)
        return x + scale[:, None, None] * (plain_mlp(**tensors) - x)

    with config.triton_for(*products):
        assert_accurate(redrawn, plain, inputs(6, 3, 40, 72, scaled=scaled), torch.float32, device)


def test_layer_scale_of_zero_has_a_gradient(device: torch.device) -> None:
    arguments = inputs(3, 5, 40, 72) | {"layer_scale": torch.zeros(40)}
    assert_accurate(partial(layer_norm_mlp, eps=EPS), plain_mlp, arguments, torch.float32, device)


def test_small_layer_scale_does_not_vanish_in_float16(device: torch.device) -> None:
    """Its product with a weight would be below what float16 has; that with a gradient scaled for float16 is not."""
    arguments = inputs(3, 5, 40, 72) | {"layer_scale": torch.full((40,), 1e-5)}
    arguments["x"] = arguments["x"] / 16
    ours = lambda **tensors: layer_norm_mlp(**tensors, eps=EPS) * 4096  # noqa: E731
    plain = lambda **tensors: plain_mlp(**tensors) * 4096  # noqa: E731
    assert_accurate(ours, plain, arguments, torch.float16, device)


def run(arguments: dict[str, Tensor], **options: object) -> list[Tensor]:
    """Output and gradients."""
    y = layer_norm_mlp(**arguments, eps=EPS, **options)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y, *torch.autograd.grad(y, list(arguments.values()), cotangent)]


def leaves(device: torch.device, dtype: torch.dtype, *shape: int) -> dict[str, Tensor]:
    return {n: t.to(device, dtype).requires_grad_() for n, t in inputs(*shape, scaled=True).items()}


@pytest.mark.parametrize("products", [(), in_full(config.PRODUCTS)], ids=["cuBLAS", "triton products"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, in_full(torch.float32)])
def test_recomputation_changes_no_bit(
    dtype: torch.dtype, products: tuple[config.Product, ...], device: torch.device
) -> None:
    arguments = leaves(device, dtype, 3, 5, 40, 72)
    with config.triton_for(*products):
        kept = run(arguments, recompute="none")
        for recompute in ("gelu", "all"):
            again = run(arguments, recompute=recompute)
            assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


@pytest.mark.parametrize(
    ("recompute", "frozen", "numbers"),
    [
        ("none", "", 10),
        ("gelu", "", 6),
        ("all", "", 5),
        ("none", "fc1_weight", 9),
        ("none", "fc2_weight layer_scale", 6),
        ("gelu", "fc1_weight fc2_weight layer_scale", 5),
        ("none", "x norm_weight norm_bias fc1_weight fc1_bias", 5),
        ("gelu", "x norm_weight norm_bias fc1_weight fc1_bias", 5),
        ("gelu", "x norm_weight norm_bias fc1_weight fc1_bias fc2_weight layer_scale", 1),
    ],
)
def test_bytes_kept_for_the_backward_pass(
    recompute: str,
    frozen: str,
    numbers: int,
    implementation: str,
    device: torch.device,
) -> None:
    """`numbers` times the width for each token, and two float32 statistics; parameters are kept by the model."""
    if implementation == "reference":
        pytest.skip("does not apply: a promise of the kernels alone")
    arguments = leaves(device, torch.bfloat16, 3, 5, 40, 160)
    for name in frozen.split():
        arguments[name].requires_grad_(False)
    kept: dict[int, Tensor] = {}
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t)
    with hooks:
        layer_norm_mlp(**arguments, eps=EPS, recompute=recompute)
    given = {t.data_ptr() for name, t in arguments.items() if name != "x"}
    size = sum(t.numel() * t.element_size() for pointer, t in kept.items() if pointer not in given)
    assert size == 3 * 5 * (numbers * 40 * 2 + 2 * 4)


WORK = {  # launches that the gradient of one input needs
    "x": {"gelu_gradient", "input_gradient", "norm_gradients"},
    "norm_weight": {"gelu_gradient", "input_gradient", "norm_gradients"},
    "norm_bias": {"gelu_gradient", "input_gradient", "norm_gradients"},
    "fc1_weight": {"gelu_gradient", "weight_gradient"},
    "fc1_bias": {"gelu_gradient"},
    "fc2_weight": {"gelu", "weight_gradient"},
    "fc2_bias": set(),
    "layer_scale": {"gelu", "weight_gradient"},
}


@pytest.mark.parametrize("scaled", [False, True])
def test_gradients_of_frozen_parameters_are_not_computed(
    scaled: bool, implementation: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One input after the other learns alone: its gradient is the same bits as if all did, and little is launched.

    Only the sum for the bias of fc2 may be added up elsewhere: in the normalisation's gradient, where that is computed.
    """
    if implementation == "reference":
        pytest.skip("does not apply: a promise of the kernels alone")
    tensors = {n: t.to(device) for n, t in inputs(3, 5, 40, 72, scaled=scaled).items()}
    everything = run({name: tensor.clone().requires_grad_() for name, tensor in tensors.items()})[1:]
    calls: list[str] = []

    def recorded(owner: ModuleType | type, name: str, known_as: str) -> None:
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **options: calls.append(known_as) or function(*args, **options))

    for name in ("gelu_gradient", "input_gradient", "weight_gradient", "gelu"):
        recorded(products, name, name)
    recorded(op.Norm, "gradients", "norm_gradients")
    for (name, tensor), expected in zip(tensors.items(), everything, strict=True):
        leaf = tensor.clone().requires_grad_()
        y = layer_norm_mlp(**tensors | {name: leaf}, eps=EPS)
        calls.clear()
        cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        exact = {"rtol": 1e-6, "atol": 1e-6} if name == "fc2_bias" else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(torch.autograd.grad(y, leaf, cotangent)[0], expected, **exact, msg=name)
        assert sorted(calls) == sorted(WORK[name]), name


def test_nothing_is_kept_without_a_gradient(
    implementation: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if implementation == "reference":
        pytest.skip("does not apply: a promise of the kernels alone")
    outputs: list[tuple[Tensor, ...]] = []
    registered = op.layer_norm_mlp_op
    monkeypatch.setattr(op, "call_operator", lambda *args: outputs.append(registered(*args)) or outputs[-1][0])
    arguments = leaves(device, torch.bfloat16, 3, 5, 40, 72)
    frozen = {name: tensor.detach() for name, tensor in arguments.items()}
    for in_triton in ((), config.PRODUCTS):
        with config.triton_for(*in_triton):
            y = layer_norm_mlp(**arguments, eps=EPS, recompute="none")
            with torch.no_grad():
                assert torch.equal(layer_norm_mlp(**arguments, eps=EPS, recompute="none"), y)
            assert torch.equal(layer_norm_mlp(**frozen, eps=EPS, recompute="none"), y)
        kept, *others = ([tensor.numel() for tensor in result[3:]] for result in outputs[-3:])
        assert sum(kept) > 0 and others == [[0, 0, 0]] * 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool, device: torch.device) -> None:
    arguments = leaves(device, torch.float32, 3, 5, 40, 72)
    expected = run(arguments)
    y = checkpoint(lambda *tensors: layer_norm_mlp(*tensors[:7], layer_scale=tensors[7], eps=EPS),
                   *arguments.values(), use_reentrant=reentrant)  # fmt: skip
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    y.backward(cotangent)
    for result, wanted in zip([y, *(leaf.grad for leaf in arguments.values())], expected, strict=True):
        assert torch.equal(result, wanted)


def test_compiles_with_frozen_parameters_and_without_gradients(device: torch.device) -> None:
    arguments = leaves(device, torch.float32, 3, 5, 40, 72)
    for name in ("norm_weight", "fc1_weight", "fc2_bias"):
        arguments[name].requires_grad_(False)
    compiled = torch.compile(lambda **tensors: layer_norm_mlp(**tensors, eps=EPS), fullgraph=True, backend="aot_eager")
    y, expected = compiled(**arguments), layer_norm_mlp(**arguments, eps=EPS)
    learned = [tensor for tensor in arguments.values() if tensor.requires_grad]
    for result, wanted in zip(*(torch.autograd.grad(t.sum(), learned) for t in (y, expected)), strict=True):
        torch.testing.assert_close(result, wanted)
    with torch.no_grad():
        assert torch.equal(compiled(**arguments), expected)


@pytest.mark.parametrize("shape", [(2, 33, 40, 72), pytest.param((64, 257, 1280, 5120), marks=pytest.mark.gpu)])
def test_gradients_are_the_same_bits_in_every_run(shape: tuple[int, ...], device: torch.device) -> None:
    if device.type == "cpu" and shape[2] > 40:
        pytest.skip("too slow without a GPU")
    arguments = leaves(device, torch.bfloat16, *shape)
    for in_triton in ((), config.PRODUCTS):
        with config.triton_for(*in_triton):
            assert all(torch.equal(a, b) for a, b in zip(run(arguments), run(arguments), strict=True))


@pytest.mark.parametrize("low", [torch.bfloat16, in_full(torch.float16)])
def test_autocast_computes_products_in_its_dtype(low: torch.dtype, device: torch.device) -> None:
    arguments = leaves(device, torch.float32, 3, 5, 40, 72)
    full = run(arguments)
    with torch.autocast(device.type, low):
        autocast = run(arguments)
    assert [t.dtype for t in autocast] == [torch.float32] * len(full)
    for result, expected in zip(autocast, full, strict=True):
        error = (result - expected).abs().max() / expected.abs().max()
        assert 0 < error < 8 * torch.finfo(low).eps
    # the residual stream stays float32
    arguments["fc2_weight"], arguments["fc2_bias"] = (
        torch.zeros_like(arguments[n]) for n in ("fc2_weight", "fc2_bias")
    )
    with torch.autocast(device.type, low):
        assert torch.equal(layer_norm_mlp(**arguments, eps=EPS), arguments["x"])


def test_backward_under_autocast_of_a_forward_without(implementation: str, device: torch.device) -> None:
    if implementation == "reference":
        pytest.skip("does not apply: autocast reaches into the backward pass of plain PyTorch")
    arguments = leaves(device, torch.float32, 3, 5, 40, 72)
    gradients = []
    for autocast in (False, True):
        y = layer_norm_mlp(**arguments, eps=EPS)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            gradients.append(torch.autograd.grad(y, list(arguments.values()), torch.ones_like(y)))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_compiles_without_graph_break(device: torch.device) -> None:
    arguments = leaves(device, torch.float32, 3, 5, 40, 72)
    compiled = torch.compile(
        lambda **tensors: layer_norm_mlp(**tensors, eps=EPS).sin(), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for batch, autocasts in ((3, (False, True)), (2, (False,))):
        tensors = arguments | {"x": arguments["x"][:batch].detach().requires_grad_()}
        for autocast in autocasts:
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                result = compiled(**tensors)
                expected = layer_norm_mlp(**tensors, eps=EPS).sin()
            torch.testing.assert_close(result, expected, rtol=0, atol=0)
            gradients, expected_gradients = (
                torch.autograd.grad(y.sum(), list(tensors.values())) for y in (result, expected)
            )
            for actual, wanted in zip(gradients, expected_gradients, strict=True):
                torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("kept", [(True, True, False), in_full((True, True, True)), in_full((False, True, False))])
def test_registered_operator(kept: tuple[bool, bool, bool], implementation: str, device: torch.device) -> None:
    if implementation == "reference":
        pytest.skip("does not apply: the operator is Triton's")
    *tensors, layer_scale = leaves(device, torch.float32, 3, 5, 40, 72).values()
    path_scale = torch.tensor([0.0, 1.5, 1.5], device=device)
    torch.library.opcheck(op.layer_norm_mlp_op, (*tensors, layer_scale, path_scale, EPS, False, *kept))
    with config.triton_for(*config.PRODUCTS):
        torch.library.opcheck(op.layer_norm_mlp_op, (*tensors, None, None, EPS, True, *kept))


def test_second_derivative(implementation: str, device: torch.device) -> None:
    arguments = leaves(device, torch.float32, 3, 5, 40, 72)
    y = layer_norm_mlp(**arguments, eps=EPS).sin()
    gradient = torch.autograd.grad(y.sum(), arguments["x"], create_graph=True)[0]
    if implementation == "triton":
        with pytest.raises(NotImplementedError, match="layer_norm_mlp has no second derivative"):
            gradient.sum().backward()
    else:
        gradient.square().sum().backward()
        assert arguments["x"].grad.abs().sum() > 0


def test_nan_stays_in_its_row(device: torch.device) -> None:
    arguments = {name: tensor.to(device) for name, tensor in inputs(2, 4, 40, 72).items()}
    arguments["x"][1, 2, 5] = torch.nan
    nan = layer_norm_mlp(**arguments, eps=EPS).isnan()
    assert nan.all(-1).tolist() == nan.any(-1).tolist() == [[False] * 4, [False, False, True, False]]


def test_empty_batch(device: torch.device) -> None:
    arguments = leaves(device, torch.float32, 0, 5, 40, 72)
    y, *gradients = run(arguments)
    assert y.shape == (0, 5, 40)
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("layout", ["transposed", "expanded"])
def test_non_contiguous_gradient_and_parameters(layout: str, device: torch.device) -> None:
    arguments = leaves(device, torch.float32, 4, 6, 40, 72)
    strided = {n: t.detach() for n, t in arguments.items()}
    strided = {
        n: t.T.contiguous().T if t.ndim == 2 else t.repeat_interleave(2, -1)[..., ::2] for n, t in strided.items()
    }
    strided = {name: tensor.requires_grad_() for name, tensor in strided.items()}
    if layout == "transposed":
        gradient = torch.randn(6, 4, 40, device=device).transpose(0, 1)
    else:
        gradient = torch.randn(40, device=device).expand(4, 6, 40)
    expected = torch.autograd.grad(plain_mlp(**arguments), list(arguments.values()), gradient)
    for in_triton in ((), config.PRODUCTS):
        with config.triton_for(*in_triton):
            ours = torch.autograd.grad(layer_norm_mlp(**strided, eps=EPS), list(strided.values()), gradient)
        for result, wanted in zip(ours, expected, strict=True):
            torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-4)


def test_explain_says_that_there_are_kernels() -> None:
    line = next(line for line in explain().splitlines() if line.startswith("mlp"))
    assert "no Triton kernel" not in line


def test_module_uses_the_kernels(implementation: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    registered = op.call_operator
    monkeypatch.setattr(op, "call_operator", lambda *arguments: calls.append(1) or registered(*arguments))
    x, module = torch.randn(2, 5, 8, device=device), FusedLayerNormMLP(8, 20, layer_scale=0.1).to(device)
    result = module(x)
    with dispatch.using("reference"):
        torch.testing.assert_close(result, module(x))
    assert len(calls) == (implementation == "triton")


def test_the_two_activations_differ(device: torch.device) -> None:
    arguments = {name: tensor.to(device) for name, tensor in inputs(2, 5, 16, 64).items()}
    erf = layer_norm_mlp(**arguments, eps=EPS, activation="gelu")
    tanh = layer_norm_mlp(**arguments, eps=EPS, activation="gelu_tanh")
    assert 1e-5 < (erf - tanh).abs().max().item() < 1e-2


def test_non_contiguous_input(device: torch.device) -> None:
    arguments = inputs(3, 5, 16, 40)
    arguments["x"] = torch.randn(5, 3, 16).transpose(0, 1)
    arguments["fc1_weight"] = arguments["fc1_weight"].T.contiguous().T
    assert_accurate(partial(layer_norm_mlp, eps=EPS), plain_mlp, arguments, torch.float32, device)


def test_drop_path_keeps_or_drops_whole_samples(device: torch.device) -> None:
    batch = 300
    arguments = {name: tensor.to(device) for name, tensor in inputs(batch, 2, 8, 16).items()}
    x = arguments["x"]
    branch = layer_norm_mlp(**arguments, eps=EPS) - x
    dropped = layer_norm_mlp(**arguments, eps=EPS, drop_path=0.2) - x
    kept = dropped.flatten(1).abs().amax(dim=1) > 0  # [B]
    assert torch.allclose(dropped[kept], branch[kept] / 0.8, atol=1e-5)
    assert kept.float().mean().item() == pytest.approx(0.8, abs=2 / batch**0.5)  # 5 standard deviations


def test_dropout_acts_on_activations_and_output(device: torch.device) -> None:
    batch = 60
    arguments = {name: tensor.to(device) for name, tensor in inputs(batch, 5, 8, 8).items()}
    # an identity fc2: an output survives when its activation and it are both kept, scaled by 1 / 0.6 twice
    arguments |= {"fc2_weight": torch.eye(8, device=device), "fc2_bias": torch.zeros(8, device=device)}
    x = arguments["x"]
    branch = layer_norm_mlp(**arguments, eps=EPS) - x
    out = layer_norm_mlp(**arguments, eps=EPS, dropout=0.4) - x
    kept = out != 0
    assert torch.allclose(out[kept], branch[kept] / 0.36, atol=1e-5)
    assert kept.float().mean().item() == pytest.approx(
        0.36, abs=5 * (0.2304 / out.numel()) ** 0.5
    )  # 5 standard deviations


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 8)}, ValueError, r"x must have shape \[B, N, D\]"),
        ({"x": torch.zeros(2, 3, 8, dtype=torch.int8)}, TypeError, "x must be floating point"),
        ({"norm_weight": torch.ones(1)}, ValueError, "norm_weight must have shape"),
        ({"norm_bias": torch.ones(9)}, ValueError, "norm_bias must have shape"),
        ({"fc1_weight": torch.zeros(16, 9)}, ValueError, r"fc1_weight must have shape \[16, 8\]"),
        ({"fc1_bias": torch.zeros(8)}, ValueError, r"fc1_bias must have shape \[16\]"),
        ({"fc2_weight": torch.zeros(16, 8)}, ValueError, r"fc2_weight must have shape \[8, 16\]"),
        ({"fc2_bias": torch.zeros(8, dtype=torch.bfloat16)}, TypeError, "fc2_bias must be torch.float32"),
        ({"layer_scale": torch.zeros(1)}, ValueError, "layer_scale must have shape"),
        ({"activation": "relu"}, ValueError, "activation must be one of gelu, gelu_tanh, got 'relu'"),
        ({"recompute": "some"}, ValueError, "recompute must be one of none, gelu, all, got 'some'"),
        ({"dropout": 1.0}, ValueError, "dropout must be at least 0 and below 1"),
        ({"drop_path": -1.0}, ValueError, "drop_path must be at least 0"),
    ],
)
def test_errors_name_the_argument(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        layer_norm_mlp(**({**inputs(2, 3, 8, 16), "eps": EPS} | change))
