import itertools
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastvit_kernels import attention_block, dispatch, explain
from fastvit_kernels.attention_block import op
from fastvit_kernels.gemm import config, products
from fastvit_kernels.residual import draw_path_scale
from tests.in_full import IN_FULL, in_full
from tests.kernels.numerics import assert_accurate

pytestmark = pytest.mark.usefixtures("implementation")

EPS = 1e-6
BLOCK = {"heads": 2, "eps": EPS}


def plain_attention(qkv: Tensor, causal: bool = False) -> Tensor:
    tokens, head_dim = qkv.shape[1], qkv.shape[-1]
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # [B, N, H, d]
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / head_dim**0.5
    if causal:
        scores = scores.masked_fill(torch.ones(tokens, tokens, dtype=torch.bool, device=qkv.device).triu(1), -torch.inf)
    exponents = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    probabilities = exponents / exponents.sum(dim=-1, keepdim=True)
    return torch.einsum("bhnm,bmhd->bnhd", probabilities, v).reshape(*qkv.shape[:2], -1)


def plain_block(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    layer_scale: Tensor | None = None,
    heads: int = 2,
    causal: bool = False,
) -> Tensor:
    batch, tokens, width = x.shape
    wide = x if x.dtype == torch.float64 else x.float()
    centred = wide - wide.mean(dim=-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + EPS)
    normed = (normed * norm_weight + norm_bias).to(x.dtype)
    q, k, v = (normed @ w.T + b for w, b in zip(qkv_weight.split(width), qkv_bias.split(width), strict=True))
    packed = torch.stack([t.reshape(batch, tokens, heads, -1) for t in (q, k, v)], dim=2)
    branch = plain_attention(packed, causal) @ proj_weight.T + proj_bias
    return x + (branch if layer_scale is None else branch * layer_scale)


def block_inputs(batch: int, tokens: int, width: int, scaled: bool = False) -> dict[str, Tensor]:
    tensors = {
        "x": torch.randn(batch, tokens, width),
        "norm_weight": 1 + 0.2 * torch.randn(width),
        "norm_bias": 0.1 * torch.randn(width),
        "qkv_weight": 1.5 * torch.randn(3 * width, width) / width**0.5,
        "qkv_bias": 0.1 * torch.randn(3 * width),
        "proj_weight": torch.randn(width, width) / width**0.5,
        "proj_bias": 0.1 * torch.randn(width),
    }
    return tensors | ({"layer_scale": 0.3 + 0.1 * torch.randn(width)} if scaled else {})


def leaves(device: torch.device, dtype: torch.dtype, *shape: int) -> dict[str, Tensor]:
    return {n: t.to(device, dtype).requires_grad_() for n, t in block_inputs(*shape, scaled=True).items()}


def run(arguments: dict[str, Tensor], **options: object) -> list[Tensor]:
    """Output, and gradients of what requires one."""
    y = attention_block(**arguments, **BLOCK, **options)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y, *torch.autograd.grad(y, [t for t in arguments.values() if t.requires_grad], cotangent)]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


SHAPES = [(1, 1, 128), (3, 5, 160), (1, 257, 160), (2, 33, 26)]
QUICK = [  # each shape, dtype and LayerScale at least once
    ((1, 1, 128), False, torch.bfloat16),
    ((3, 5, 160), True, torch.bfloat16),
    ((2, 33, 26), True, torch.float32),
]
FULL = list(itertools.product(SHAPES, [False, True], [torch.float32, torch.bfloat16]))


@pytest.mark.parametrize(("shape", "scaled", "dtype"), QUICK + [in_full(*case) for case in FULL if case not in QUICK])
def test_block_matches_independent_formulation(
    shape: tuple[int, int, int], scaled: bool, dtype: torch.dtype, device: torch.device
) -> None:
    assert_accurate(partial(attention_block, **BLOCK), plain_block, block_inputs(*shape, scaled), dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, in_full(torch.bfloat16)])
def test_causal(dtype: torch.dtype, device: torch.device) -> None:
    ours, plain = partial(attention_block, **BLOCK, causal=True), partial(plain_block, causal=True)
    assert_accurate(ours, plain, block_inputs(2, 37, 32, scaled=True), dtype, device)


@pytest.mark.parametrize("dtype", [torch.float16, in_full(torch.float32)])
def test_products_may_run_in_triton(dtype: torch.dtype, device: torch.device) -> None:
    with config.triton_for(*config.PRODUCTS):
        inputs = block_inputs(3, 5, 40, scaled=True)
        assert_accurate(partial(attention_block, **BLOCK), plain_block, inputs, dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("products", [(), config.PRODUCTS], ids=["cuBLAS", "triton products"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "width", "heads"), [(197, 768, 12), (197, 1024, 16), (257, 1280, 16)])
def test_production_sizes(
    tokens: int,
    width: int,
    heads: int,
    dtype: torch.dtype,
    products: tuple[config.Product, ...],
    device: torch.device,
) -> None:
    if device.type == "cpu":
        pytest.skip("too slow without a GPU")
    ours, plain = partial(attention_block, heads=heads, eps=EPS), partial(plain_block, heads=heads)
    with config.triton_for(*products):
        assert_accurate(ours, plain, block_inputs(16, tokens, width, scaled=True), dtype, device)


@settings(
    max_examples=6 if IN_FULL else 3,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(4, 20)),
    heads=st.integers(1, 2),
    scaled=st.booleans(),
    recompute=st.sampled_from(["none", "norm"]),
    in_triton=st.booleans(),
)
def test_any_shape(
    shape: tuple[int, int, int], heads: int, scaled: bool, recompute: str, in_triton: bool, device: torch.device
) -> None:
    torch.manual_seed(0)
    batch, tokens, head_dim = shape
    inputs = block_inputs(batch, tokens, heads * head_dim, scaled)
    ours = partial(attention_block, heads=heads, eps=EPS, recompute=recompute)
    with config.triton_for(*config.PRODUCTS if in_triton else ()):
        assert_accurate(ours, partial(plain_block, heads=heads), inputs, torch.float32, device)


@pytest.mark.parametrize("hostile", ["offset", "one huge", "constant rows"])
def test_hostile_rows(hostile: str, device: torch.device) -> None:
    inputs = block_inputs(1, 3, 40, scaled=True)
    if hostile == "offset":
        inputs["x"] += 1000
    elif hostile == "one huge":
        inputs["x"][..., 3] = 3e4
    else:
        inputs["x"] = torch.full_like(inputs["x"], 0.5)
    condition = 100 if hostile == "offset" else 1
    for dtype in (torch.float32, torch.float16):
        assert_accurate(partial(attention_block, **BLOCK), plain_block, inputs, dtype, device, condition=condition)


@pytest.mark.parametrize("scaled", [False, True])
def test_gradients_with_drop_path(scaled: bool, device: torch.device) -> None:
    def redrawn(**tensors: Tensor) -> Tensor:
        torch.manual_seed(7)
        return attention_block(**tensors, **BLOCK, drop_path=0.4)

    def plain(**tensors: Tensor) -> Tensor:
        torch.manual_seed(7)
        x = tensors["x"]
        scale = draw_path_scale(torch.empty(4, device=device), 0.4).to(x.dtype)
        assert 0 < scale.count_nonzero() < 4
        return x + scale[:, None, None] * (plain_block(**tensors) - x)

    assert_accurate(redrawn, plain, block_inputs(4, 3, 40, scaled), torch.float32, device)


def test_layer_scale_of_zero_has_a_gradient(device: torch.device) -> None:
    inputs = block_inputs(2, 5, 40) | {"layer_scale": torch.zeros(40)}
    assert_accurate(partial(attention_block, **BLOCK), plain_block, inputs, torch.float32, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, in_full(torch.float32)])
def test_recomputation_changes_no_bit(dtype: torch.dtype, device: torch.device) -> None:
    arguments = leaves(device, dtype, 2, 5, 40)
    assert equal(run(arguments, recompute="none"), run(arguments, recompute="norm"))


def saved(arguments: dict[str, Tensor], **options: object) -> int:
    """Bytes that the graph keeps, parameters excepted; a storage counts once."""
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        y = attention_block(**arguments, **BLOCK, **options)
    given = {t.untyped_storage().data_ptr() for name, t in arguments.items() if name != "x"}
    assert y.untyped_storage().data_ptr() not in kept
    return sum(size for pointer, size in kept.items() if pointer not in given)


@pytest.mark.parametrize(("recompute", "numbers"), [("none", 6), ("norm", 5)])
def test_bytes_kept_for_the_backward_pass(
    recompute: str, numbers: int, implementation: str, device: torch.device
) -> None:
    """`numbers` times the width for each token, a float32 for each head and two statistics."""
    if implementation == "reference":
        pytest.skip("does not apply: a promise of the kernels alone")
    arguments = leaves(device, torch.bfloat16, 3, 5, 40)
    assert saved(arguments, recompute=recompute) == 3 * 5 * (numbers * 40 * 2 + 2 * 4 + 2 * 4)
    arguments["qkv_weight"].requires_grad_(False)  # only its gradient reads the normalised rows
    assert saved(arguments, recompute=recompute) == 3 * 5 * (5 * 40 * 2 + 2 * 4 + 2 * 4)


def test_nothing_is_kept_without_a_gradient(
    implementation: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if implementation == "reference":
        pytest.skip("does not apply: a promise of the kernels alone")
    outputs = []
    registered = op.attention_block_op
    monkeypatch.setattr(op, "call_operator", lambda *args: outputs.append(registered(*args)) or outputs[-1][0])
    arguments = leaves(device, torch.float32, 1, 3, 16)
    expected = attention_block(**arguments, **BLOCK)
    assert all(output.numel() > 0 for output in outputs.pop())
    with torch.no_grad():
        y = attention_block(**arguments, **BLOCK)
    frozen = attention_block(**{name: tensor.detach() for name, tensor in arguments.items()}, **BLOCK)
    assert torch.equal(y, expected) and torch.equal(frozen, expected)
    assert [[output.numel() for output in op_outputs[1:]] for op_outputs in outputs] == [[0] * 6] * 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool, device: torch.device) -> None:
    arguments = leaves(device, torch.float32, 2, 3, 16)
    expected = run(arguments)
    others = {name: tensor for name, tensor in arguments.items() if name != "x"}
    y = checkpoint(lambda x: attention_block(x, **others, **BLOCK), arguments["x"], use_reentrant=reentrant)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y))
    assert equal([y, *(tensor.grad for tensor in arguments.values())], expected)


NORM, QKV, PROJ = ("norm_weight", "norm_bias"), ("qkv_weight", "qkv_bias"), ("proj_weight", "proj_bias", "layer_scale")


@pytest.mark.parametrize(
    ("trained", "weight_gradients", "input_gradients"),
    [
        (("x",), 0, 2),
        (("x", "qkv_weight"), 1, 2),
        (("qkv_bias",), 0, 1),
        ((*NORM, "qkv_bias", "proj_bias"), 0, 2),
        (PROJ, 1, 0),
        (("layer_scale",), 1, 0),
        (("proj_bias",), 0, 0),
        ((*QKV, *PROJ), 2, 1),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else None,
)
def test_frozen_parameters_cost_nothing(
    trained: tuple[str, ...],
    weight_gradients: int,
    input_gradients: int,
    implementation: str,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = leaves(device, torch.float32, 1, 3, 16)
    every = dict(zip(arguments, run(arguments)[1:], strict=True))
    calls = []
    for name in ("weight_gradient", "input_gradient"):
        function = getattr(products, name)
        monkeypatch.setattr(products, name, lambda *args, n=name, f=function: calls.append(n) or f(*args))
    some = {name: tensor.detach().requires_grad_(name in trained) for name, tensor in arguments.items()}
    gradients = run(some)[1:]
    wanted = [every[name] for name in some if name in trained]
    for gradient, expected in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, expected)
    if implementation == "triton":
        assert (calls.count("weight_gradient"), calls.count("input_gradient")) == (weight_gradients, input_gradients)


def test_gradients_without_layer_scale_of_some_parameters(device: torch.device) -> None:
    arguments = leaves(device, torch.float32, 2, 3, 16)
    del arguments["layer_scale"]
    every = dict(zip(arguments, run(arguments)[1:], strict=True))
    for trained in ("proj_weight", "proj_bias"):
        some = {name: tensor.detach().requires_grad_(name == trained) for name, tensor in arguments.items()}
        torch.testing.assert_close(run(some)[1], every[trained])


@pytest.mark.parametrize("shape", [(2, 33, 24), pytest.param((64, 257, 160), marks=pytest.mark.gpu)])
def test_gradients_are_the_same_bits_in_every_run(shape: tuple[int, ...], device: torch.device) -> None:
    if device.type == "cpu" and shape[0] > 2:
        pytest.skip("too slow without a GPU")
    arguments = leaves(device, torch.bfloat16, *shape)
    assert equal(run(arguments), run(arguments))


@pytest.mark.parametrize("low", [torch.bfloat16, in_full(torch.float16)])
def test_autocast_computes_products_in_its_dtype(low: torch.dtype, device: torch.device) -> None:
    arguments = leaves(device, torch.float32, 2, 5, 40)
    full = run(arguments)
    with torch.autocast(device.type, low):
        autocast = run(arguments)
    assert [t.dtype for t in autocast] == [torch.float32] * len(full)
    for result, expected in zip(autocast, full, strict=True):
        error = (result - expected).abs().max() / expected.abs().max()
        assert 0 < error < 8 * torch.finfo(low).eps
    # the residual stream stays float32
    zeros = {name: torch.zeros_like(arguments[name]) for name in ("proj_weight", "proj_bias")}
    with torch.autocast(device.type, low):
        assert torch.equal(attention_block(**(arguments | zeros), **BLOCK), arguments["x"])


def test_backward_under_autocast_of_a_forward_without(implementation: str, device: torch.device) -> None:
    if implementation == "reference":
        pytest.skip("does not apply: autocast reaches into the backward pass of plain PyTorch")
    arguments = leaves(device, torch.float32, 2, 3, 16)
    gradients = []
    for autocast in (False, True):
        y = attention_block(**arguments, **BLOCK)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            gradients.append(torch.autograd.grad(y, list(arguments.values()), torch.ones_like(y)))
    assert equal(*gradients)


def test_compiles_without_graph_break(implementation: str, device: torch.device) -> None:
    arguments = leaves(device, torch.float32, 3, 3, 16)
    compiled = torch.compile(
        lambda **tensors: attention_block(**tensors, **BLOCK).sin(), fullgraph=True, backend="aot_eager", dynamic=True
    )
    calls = ((2, "", True), (3, "", False), (2, "qkv_weight", False))
    for batch, frozen, autocast in calls if implementation == "triton" or IN_FULL else calls[:2]:
        tensors = arguments | {"x": arguments["x"][:batch].detach().requires_grad_()}
        tensors = {name: tensor.detach() if name == frozen else tensor for name, tensor in tensors.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            result, expected = compiled(**tensors), attention_block(**tensors, **BLOCK).sin()
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
        trained = [tensor for tensor in tensors.values() if tensor.requires_grad]
        for actual, wanted in zip(*(torch.autograd.grad(y.sum(), trained) for y in (result, expected)), strict=True):
            torch.testing.assert_close(actual, wanted)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**tensors), expected, rtol=0, atol=0)


def test_registered_operator(implementation: str, device: torch.device) -> None:
    if implementation == "reference":
        pytest.skip("does not apply: the operator is Triton's")
    *tensors, layer_scale = leaves(device, torch.float32, 2, 3, 16).values()
    path_scale = torch.tensor([0.0, 1.5], device=device)
    torch.library.opcheck(op.attention_block_op, (*tensors, layer_scale, path_scale, 2, EPS, True, True, True))
    with config.triton_for(*config.PRODUCTS):
        torch.library.opcheck(op.attention_block_op, (*tensors, None, None, 1, EPS, False, True, False))
    frozen = [tensor.detach() for tensor in tensors]
    torch.library.opcheck(op.attention_block_op, (*frozen, None, None, 2, EPS, False, False, False))
    frozen[4] = tensors[4]
    torch.library.opcheck(op.attention_block_op, (*frozen, None, None, 2, EPS, False, True, False))


def test_second_derivative_is_refused(implementation: str, device: torch.device) -> None:
    if implementation == "reference":
        pytest.skip("does not apply: PyTorch's attention decides")
    arguments = leaves(device, torch.float32, 2, 3, 16)
    y = attention_block(**arguments, **BLOCK).sin()
    gradient = torch.autograd.grad(y.sum(), arguments["x"], create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="attention_block has no second derivative"):
        gradient.sum().backward()


def test_nan_stays_in_its_sample(device: torch.device) -> None:
    inputs = {name: tensor.to(device) for name, tensor in block_inputs(2, 4, 16).items()}
    inputs["x"][1, 2, 5] = torch.nan
    nan = attention_block(**inputs, **BLOCK).isnan()
    assert nan.all(-1).tolist() == nan.any(-1).tolist() == [[False] * 4, [True] * 4]


def test_empty_batch(device: torch.device) -> None:
    y, *gradients = run(leaves(device, torch.float32, 0, 5, 16))
    assert y.shape == (0, 5, 16)
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("layout", ["transposed", "expanded"])
def test_non_contiguous_gradient_and_parameters(layout: str, device: torch.device) -> None:
    arguments = leaves(device, torch.float32, 2, 3, 16)
    strided = {n: t.detach() for n, t in arguments.items()}
    strided = {
        n: t.T.contiguous().T if t.ndim == 2 else t.repeat_interleave(2, -1)[..., ::2] for n, t in strided.items()
    }
    strided = {name: tensor.requires_grad_() for name, tensor in strided.items()}
    if layout == "transposed":
        gradient = torch.randn(3, 2, 16, device=device).transpose(0, 1)
    else:
        gradient = torch.randn(16, device=device).expand(2, 3, 16)
    expected = torch.autograd.grad(plain_block(**arguments), list(arguments.values()), gradient)
    ours = torch.autograd.grad(attention_block(**strided, **BLOCK), list(strided.values()), gradient)
    for result, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-4)


def test_a_head_that_the_kernels_do_not_take(device: torch.device, implementation: str) -> None:
    inputs = {name: tensor.to(device) for name, tensor in block_inputs(1, 2, 136).items()}
    with dispatch.using("reference"):
        expected = attention_block(**inputs, heads=1, eps=EPS)
    if implementation == "triton":
        with pytest.raises(RuntimeError, match="head dimensions up to 128, not 136"):
            attention_block(**inputs, heads=1, eps=EPS)
    with dispatch.using("auto"):
        torch.testing.assert_close(attention_block(**inputs, heads=1, eps=EPS), expected)


def test_explain_says_that_there_are_kernels() -> None:
    line = next(line for line in explain().splitlines() if line.startswith("attention_block"))
    assert "no Triton kernel" not in line


def test_block_with_non_contiguous_input(device: torch.device) -> None:
    inputs = block_inputs(3, 5, 32)
    inputs["x"] = torch.randn(5, 3, 32).transpose(0, 1)
    inputs["qkv_weight"] = inputs["qkv_weight"].T.contiguous().T
    assert_accurate(partial(attention_block, **BLOCK), plain_block, inputs, torch.float32, device)


def test_drop_path_keeps_or_drops_whole_samples(implementation: str, device: torch.device) -> None:
    # interpreted, 8000 programs would take a minute; chance is not the kernels' matter
    batch = 4000 if implementation == "reference" or device.type == "cuda" else 25
    inputs = {name: tensor.to(device) for name, tensor in block_inputs(batch, 2, 8).items()}
    x = inputs["x"]
    branch = attention_block(**inputs, **BLOCK) - x
    dropped = attention_block(**inputs, **BLOCK, drop_path=0.2) - x
    kept = dropped.flatten(1).abs().amax(dim=1) > 0  # [B]
    assert torch.allclose(dropped[kept], branch[kept] / 0.8, atol=1e-5)
    assert kept.float().mean().item() == pytest.approx(0.8, abs=2 / batch**0.5)  # 5 standard deviations


def test_dropout_acts_on_the_projected_output(implementation: str, device: torch.device) -> None:
    batch = 500 if implementation == "reference" or device.type == "cuda" else 12
    inputs = {name: tensor.to(device) for name, tensor in block_inputs(batch, 5, 8).items()}
    x = inputs["x"]
    branch = attention_block(**inputs, **BLOCK) - x
    out = attention_block(**inputs, **BLOCK, dropout=0.4) - x
    kept = out != 0
    assert torch.allclose(out[kept], branch[kept] / 0.6, atol=1e-5)
    assert kept.float().mean().item() == pytest.approx(0.6, abs=5 * (0.24 / out.numel()) ** 0.5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 8)}, ValueError, r"x must have shape \[B, N, D\]"),
        ({"heads": 3}, ValueError, "heads must divide the width 8"),
        ({"heads": 0}, ValueError, "heads must divide the width 8"),
        ({"norm_weight": torch.ones(1)}, ValueError, "norm_weight must have shape"),
        ({"norm_bias": torch.ones(9)}, ValueError, "norm_bias must have shape"),
        ({"qkv_weight": torch.zeros(8, 24)}, ValueError, r"qkv_weight must have shape \[24, 8\]"),
        ({"qkv_bias": torch.zeros(8)}, ValueError, "qkv_bias must have shape"),
        ({"proj_weight": torch.zeros(8, 8, dtype=torch.bfloat16)}, TypeError, "proj_weight must be torch.float32"),
        ({"proj_bias": torch.zeros(1)}, ValueError, "proj_bias must have shape"),
        ({"layer_scale": torch.zeros(1)}, ValueError, "layer_scale must have shape"),
        ({"recompute": "gelu"}, ValueError, "recompute must be one of none, norm, got 'gelu'"),
        ({"dropout": -0.1}, ValueError, "dropout must be at least 0"),
        ({"drop_path": 1.0}, ValueError, "drop_path must be at least 0 and below 1"),
    ],
)
def test_block_errors_name_the_argument(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attention_block(**(block_inputs(2, 3, 8) | BLOCK | change))
