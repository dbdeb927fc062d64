from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastvit_kernels import FusedLayerNormSwiGLU, FusedSwiGLU, layer_norm_swiglu, swiglu_mlp
from fastvit_kernels.residual import draw_path_scale
from fastvit_kernels.swiglu import op
from tests.in_full import in_full
from tests.kernels.numerics import assert_accurate

pytestmark = pytest.mark.usefixtures("implementation")

EPS = 1e-6


def plain_mlp(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor) -> Tensor:
    gate, value = (x @ fc1_weight.T + fc1_bias).chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * value) @ fc2_weight.T + fc2_bias


def plain_half(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, *fc: Tensor, layer_scale: Tensor | None = None, **named: Tensor
) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    normed = F.layer_norm(wide, x.shape[-1:], norm_weight.to(wide.dtype), norm_bias.to(wide.dtype), EPS).to(x.dtype)
    branch = plain_mlp(normed, *fc, **named)
    return x + (branch if layer_scale is None else branch * layer_scale)


def inputs(batch: int, tokens: int, width: int, hidden: int, norm: bool = True, scaled: bool = False):
    tensors = {"x": torch.randn(batch, tokens, width)}
    if norm:
        tensors |= {"norm_weight": 1 + 0.2 * torch.randn(width), "norm_bias": 0.1 * torch.randn(width)}
    tensors |= {
        "fc1_weight": torch.randn(2 * hidden, width) / width**0.5,
        "fc1_bias": 0.1 * torch.randn(2 * hidden),
        "fc2_weight": torch.randn(width, hidden) / hidden**0.5,
        "fc2_bias": 0.1 * torch.randn(width),
    }
    return tensors | ({"layer_scale": 0.3 + 0.1 * torch.randn(width)} if scaled else {})


@pytest.mark.parametrize(
    ("shape", "scaled", "dtype"),
    [
        ((3, 5, 80, 100), True, torch.float32),
        ((3, 5, 80, 100), False, torch.bfloat16),
        ((2, 17, 33, 65), True, torch.float16),
        ((1, 1, 64, 256), True, torch.bfloat16),
        in_full((2, 17, 33, 65), False, torch.float32),
        in_full((3, 257, 33, 65), True, torch.bfloat16),
    ],
)
def test_half_block(shape: tuple[int, int, int, int], scaled: bool, dtype: torch.dtype, device: torch.device) -> None:
    assert_accurate(partial(layer_norm_swiglu, eps=EPS), plain_half, inputs(*shape, scaled=scaled), dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mlp_alone(dtype: torch.dtype, device: torch.device) -> None:
    assert_accurate(swiglu_mlp, plain_mlp, inputs(3, 7, 40, 72, norm=False), dtype, device)
    arguments = inputs(3, 7, 40, 72, norm=False) | {"x": torch.randn(5, 2, 3, 80)[..., ::2]}  # strided, four dimensions
    assert_accurate(swiglu_mlp, plain_mlp, arguments, dtype, device)


def test_each_program_sums_many_rows(device: torch.device) -> None:
    assert_accurate(swiglu_mlp, plain_mlp, inputs(1, 300, 4, 20, norm=False), torch.float32, device)


@pytest.mark.parametrize("hostile", ["offset", "one huge", "saturated"])
def test_hostile_rows(hostile: str, device: torch.device) -> None:
    arguments = inputs(3, 5, 80, 100, scaled=True)
    if hostile == "offset":
        arguments["x"] += 1000
    elif hostile == "one huge":
        arguments["x"][..., 3] = 3e4
    else:
        arguments["fc1_bias"][:100] = torch.linspace(-200, 200, 100)
    ours = partial(layer_norm_swiglu, eps=EPS)
    assert_accurate(ours, plain_half, arguments, torch.float32, device, condition=100 if hostile == "offset" else 1)


def test_nan_stays_in_its_row(device: torch.device) -> None:
    arguments = {name: tensor.to(device) for name, tensor in inputs(2, 3, 40, 72).items()}
    clean = layer_norm_swiglu(**arguments, eps=EPS)
    arguments["x"][1, 2, 5] = torch.nan
    y = layer_norm_swiglu(**arguments, eps=EPS)
    assert y[1, 2].isnan().all()
    assert torch.equal(y.flatten(0, 1)[:5], clean.flatten(0, 1)[:5])


def test_drop_path(device: torch.device) -> None:
    def redrawn(**tensors: Tensor) -> Tensor:
        torch.manual_seed(7)
        return layer_norm_swiglu(**tensors, eps=EPS, drop_path=0.4)

    def plain(**tensors: Tensor) -> Tensor:
        torch.manual_seed(7)
        scale = draw_path_scale(torch.empty(6, device=device), 0.4).to(tensors["x"].dtype)
        return tensors["x"] + scale[:, None, None] * (plain_half(**tensors) - tensors["x"])

    assert_accurate(redrawn, plain, inputs(6, 3, 40, 72, scaled=True), torch.float32, device)


def test_weights_in_pairs(device: torch.device) -> None:
    """timm's SwiGLU has two layers where SwiGLUPacked has one; biases may be missing."""
    tensors = {name: t.to(device).requires_grad_() for name, t in inputs(3, 5, 40, 72, norm=False).items()}
    pairs = {name: tuple(t.detach().chunk(2)) for name, t in tensors.items() if name.startswith("fc1")}
    leaves = [part.requires_grad_() for pair in pairs.values() for part in pair]
    packed, separate = swiglu_mlp(**tensors), swiglu_mlp(**tensors | pairs)
    assert torch.equal(packed, separate)
    gradients = torch.autograd.grad(packed.sum(), [tensors["fc1_weight"], tensors["fc1_bias"]])
    for gradient, expected in zip(torch.autograd.grad(separate.sum(), leaves), leaves_of(gradients), strict=True):
        assert torch.equal(gradient, expected)
    without = swiglu_mlp(tensors["x"], tensors["fc1_weight"], None, tensors["fc2_weight"], None)
    zeros = {name: torch.zeros_like(tensors[name]) for name in ("fc1_bias", "fc2_bias")}
    assert torch.equal(without, swiglu_mlp(**tensors | zeros))


def leaves_of(gradients: tuple[Tensor, ...]) -> list[Tensor]:
    return [part for gradient in gradients for part in gradient.chunk(2)]


def run(arguments: dict[str, Tensor], **options: object) -> list[Tensor]:
    y = layer_norm_swiglu(**arguments, eps=EPS, **options)
    leaves = [tensor for tensor in arguments.values() if tensor.requires_grad]
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y, *torch.autograd.grad(y, leaves, cotangent)]


def test_recomputation_and_repetition_change_no_bit(device: torch.device) -> None:
    arguments = {n: t.to(device).requires_grad_() for n, t in inputs(2, 3, 40, 72, scaled=True).items()}
    first = run(arguments, recompute="none")
    for recompute in ("none", "gate", "all"):
        assert all(torch.equal(a, b) for a, b in zip(first, run(arguments, recompute=recompute), strict=True))


def test_gradients_of_one_input_alone(implementation: str, device: torch.device) -> None:
    """What is frozen is neither kept for nor computed, and changes no other gradient."""
    tensors = {n: t.to(device) for n, t in inputs(2, 3, 40, 72, scaled=True).items()}
    everything = run({name: tensor.clone().requires_grad_() for name, tensor in tensors.items()})[1:]
    for (name, tensor), expected in zip(tensors.items(), everything, strict=True):
        recompute = "gate" if name == "fc2_weight" else "none"
        gradient = run(tensors | {name: tensor.clone().requires_grad_()}, recompute=recompute)[1]
        if implementation == "triton":
            assert torch.equal(gradient, expected), name
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    ("recompute", "frozen", "numbers"),
    [("none", "", 11), ("gate", "", 8), ("all", "", 7), ("gate", "fc1_weight fc2_weight layer_scale", 7)],
)
def test_bytes_kept_for_the_backward_pass(
    recompute: str, frozen: str, numbers: int, implementation: str, device: torch.device
) -> None:
    """`numbers` times the width for each token of a hidden width of three times that, and two float32 statistics."""
    if implementation == "reference":
        pytest.skip("does not apply: a promise of the kernels alone")
    arguments = {
        n: t.to(device, torch.bfloat16).requires_grad_() for n, t in inputs(3, 5, 40, 120, scaled=True).items()
    }
    for name in frozen.split():
        arguments[name].requires_grad_(False)
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        layer_norm_swiglu(**arguments, eps=EPS, recompute=recompute)
    given = {t.data_ptr() for name, t in arguments.items() if name != "x"}
    size = sum(t.numel() * t.element_size() for pointer, t in kept.items() if pointer not in given)
    assert size == 3 * 5 * (numbers * 40 * 2 + 2 * 4)


def test_autocast_acts_as_on_linear(device: torch.device) -> None:
    tensors = {n: t.to(device).requires_grad_() for n, t in inputs(3, 5, 40, 72).items()}
    with torch.autocast(device.type, torch.bfloat16):
        y = layer_norm_swiglu(**tensors, eps=EPS)
        mlp = swiglu_mlp(*(tensors[n] for n in ("x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")))
    assert y.dtype == torch.float32 and mlp.dtype == torch.bfloat16
    torch.testing.assert_close(y, layer_norm_swiglu(**tensors, eps=EPS), atol=0.05, rtol=0.05)
    gradients = torch.autograd.grad(y.sum() + mlp.float().sum(), list(tensors.values()))
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


@pytest.mark.parametrize("norm", [True, in_full(False)])
def test_operators_are_registered_right(norm: bool, implementation: str, device: torch.device) -> None:
    if implementation == "reference":
        pytest.skip("does not apply: a promise of the kernels alone")
    tensors = {n: t.to(device).requires_grad_() for n, t in inputs(1, 3, 16, 24, norm=norm, scaled=norm).items()}
    call = op.Inputs(**{name: tensors.get(name) for name in op.Inputs._fields})
    torch.library.opcheck(op.swiglu_mlp_op, (*call, EPS, norm, True, True))
    y, *kept = (tensor.detach() for tensor in op.swiglu_mlp_op(*call, EPS, norm, True, True))
    detached = [None if tensor is None else tensor.detach() for tensor in call]
    needed = [tensor is not None for tensor in call.learned]
    torch.library.opcheck(op.swiglu_mlp_backward_op, (torch.randn_like(y), *detached, *kept, EPS, needed))


def test_compiles_without_a_graph_break(device: torch.device) -> None:
    tensors = {n: t.to(device).requires_grad_() for n, t in inputs(2, 3, 16, 24).items()}
    compiled = torch.compile(partial(layer_norm_swiglu, eps=EPS), backend="aot_eager", fullgraph=True)
    y, expected = compiled(**tensors), layer_norm_swiglu(**tensors, eps=EPS)
    torch.testing.assert_close(y, expected)
    ours, theirs = (torch.autograd.grad(result.sum(), list(tensors.values())) for result in (y, expected))
    torch.testing.assert_close(ours, theirs)


def test_no_second_derivative(implementation: str, device: torch.device) -> None:
    if implementation == "reference":
        pytest.skip("does not apply: the reference has one")
    tensors = {n: t.to(device).requires_grad_() for n, t in inputs(2, 3, 16, 24).items()}
    (gradient,) = torch.autograd.grad(layer_norm_swiglu(**tensors, eps=EPS).sum(), tensors["x"], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"x": torch.zeros(3, 40)}, ValueError, r"x must have shape \[B, N, D\]"),
        ({"fc1_weight": torch.zeros(72, 40)}, ValueError, r"fc1_weight must have shape \[144, 40\], got \[72, 40\]"),
        ({"fc1_weight": (torch.zeros(72, 40), torch.zeros(71, 40))}, ValueError, "fc1_weight of the value must"),
        ({"fc1_weight": 3 * (torch.zeros(48, 40),)}, ValueError, "fc1_weight must be a tensor, or a pair of tensors"),
        ({"fc1_bias": (torch.zeros(72), None)}, ValueError, "fc1_bias must be a tensor, or a pair of tensors"),
        ({"fc2_weight": torch.zeros(40, 0)}, ValueError, r"fc2_weight must have shape \[40, M\], got \[40, 0\]"),
        ({"fc2_bias": torch.zeros(40, dtype=torch.float64)}, TypeError, "fc2_bias must be torch.float32"),
        ({"norm_weight": torch.ones(41)}, ValueError, "norm_weight must have shape"),
        ({"norm_bias": torch.ones(40, dtype=torch.float64)}, TypeError, "norm_bias must be"),
        ({"layer_scale": torch.ones(1)}, ValueError, "layer_scale must have shape"),
        ({"fc1_weight": torch.zeros(144, 40, dtype=torch.float64)}, TypeError, "fc1_weight must be torch.float32"),
        ({"fc1_bias": torch.zeros(72)}, ValueError, r"fc1_bias must have shape \[144\], got \[72\]"),
        ({"fc2_weight": torch.zeros(72)}, ValueError, r"fc2_weight must have shape \[40, M\], got \[72\]"),
        ({"fc2_weight": torch.zeros(41, 72)}, ValueError, r"fc2_weight must have shape \[40, 72\], got \[41, 72\]"),
        ({"fc2_bias": torch.zeros(41)}, ValueError, "fc2_bias must have shape"),
        ({"recompute": "gelu"}, ValueError, "recompute must be one of none, gate, all, got 'gelu'"),
        ({"drop_path": 1.0}, ValueError, "drop_path must be at least 0 and below 1"),
    ],
)
def test_wrong_arguments(change: dict[str, object], error: type[Exception], said: str, device: torch.device) -> None:
    moved = {n: t.to(device) if isinstance(t, Tensor) else t for n, t in (inputs(3, 5, 40, 72) | change).items()}
    for name, given in moved.items():
        if isinstance(given, tuple):
            moved[name] = tuple(part if part is None else part.to(device) for part in given)
    with pytest.raises(error, match=said):
        layer_norm_swiglu(**moved, eps=EPS)


@pytest.mark.parametrize(
    ("x", "error", "said"),
    [
        (torch.tensor(1.0), ValueError, r"x must have shape \[\.\.\., D\], got \[\]"),
        (torch.zeros(3, 0), ValueError, r"x must have shape \[\.\.\., D\], got \[3, 0\]"),
        (torch.zeros(3, 40, dtype=torch.int64), TypeError, "x must be floating point"),
    ],
)
def test_wrong_input_of_the_mlp_alone(x: Tensor, error: type[Exception], said: str, device: torch.device) -> None:
    weights = {name: t.to(device) for name, t in inputs(1, 1, 40, 72, norm=False).items() if name != "x"}
    with pytest.raises(error, match=said):
        swiglu_mlp(x.to(device), **weights)


LEARNED = ("x", "norm_weight", "norm_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "layer_scale")


@pytest.mark.parametrize(
    ("learned", "recompute", "kept"),
    [
        (LEARNED, "none", "normed pre post"),
        (LEARNED, "gate", "normed pre"),
        (LEARNED, "all", "pre"),
        ((), "none", ""),
        (("fc2_bias",), "none", ""),
        (("fc2_weight",), "none", "post"),
        (("fc2_weight",), "gate", "pre"),
        (("layer_scale",), "none", "post"),
        (("layer_scale",), "all", "pre"),
        (("fc1_weight",), "none", "normed pre"),
        (("x",), "none", "pre"),
        (("norm_weight",), "gate", "pre"),
        (("norm_bias",), "all", "pre"),
        (("fc1_bias",), "none", "pre"),
    ],
)
def test_what_no_gradient_will_need_is_not_kept(learned: tuple[str, ...], recompute: str, kept: str) -> None:
    tensors = inputs(1, 1, 4, 8, scaled=True)
    given = op.Inputs(**{n: t.requires_grad_(n in learned) for n, t in tensors.items()}, path_scale=None)
    names = ("normed", "pre", "post")
    assert [name for name, keep in zip(names, op.kept(given, recompute), strict=True) if keep] == kept.split()
    without_norm = given._replace(norm_weight=None, norm_bias=None)
    assert not op.kept(without_norm, recompute)[0]  # it is x itself
    with torch.no_grad():
        assert op.kept(given, recompute) == (False, False, False)


def test_modules_have_the_names_of_timm(device: torch.device) -> None:
    half = FusedLayerNormSwiGLU(40, 72, layer_scale=0.3, drop_path=0.5).to(device).eval()
    assert list(half.state_dict()) == [f"{layer}.{part}" for layer in ("norm", "fc1", "fc2") for part in WB] + [
        "ls.gamma"
    ]
    mlp = FusedSwiGLU(40, 72).to(device)
    mlp.load_state_dict({name: t for name, t in half.state_dict().items() if name.startswith("fc")})
    x = torch.randn(3, 5, 40, device=device)
    torch.testing.assert_close(half(x), x + 0.3 * mlp(half.norm(x)))
    half.train()
    torch.manual_seed(1)
    kept = (half(x) != x).flatten(1).any(dim=1)
    torch.manual_seed(1)
    assert torch.equal(kept, draw_path_scale(x, 0.5) > 0)


WB = ("weight", "bias")
