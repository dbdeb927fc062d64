from functools import partial

import pytest
import torch
from torch import Tensor

from fastvit_kernels import attention, rotary_qk_norm, rotary_qk_norm_separate
from fastvit_kernels.rotary import op
from tests.in_full import in_full
from tests.kernels.numerics import assert_accurate

pytestmark = pytest.mark.usefixtures("implementation")

EPS = 1e-6


def plain_one(
    x: Tensor,
    sin: Tensor | None,
    cos: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    layout: str,
    norm: str,
) -> Tensor:
    """By complex numbers: a pair (a, b) is a + ib, multiplied by cos + i sin of its own."""
    wide = x if x.dtype == torch.float64 else x.float()
    if weight is not None:
        mean = wide.mean(dim=-1, keepdim=True) if norm == "layer" else 0
        wide = (wide - mean) / ((wide - mean).square().mean(dim=-1, keepdim=True) + EPS).sqrt() * weight
        wide = wide if bias is None else wide + bias
    if sin is not None and cos is not None:
        kept, rest = wide.split([x.shape[1] - len(sin), len(sin)], dim=1)
        pairs = rest.unflatten(-1, (-1, 2)) if layout == "interleaved" else rest.unflatten(-1, (2, -1)).mT
        once = slice(None, None, 2) if layout == "interleaved" else slice(0, x.shape[-1] // 2)
        angles = torch.complex(cos[:, once].to(wide.dtype), sin[:, once].to(wide.dtype))[:, None]
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * angles)
        wide = torch.cat([kept, (turned if layout == "interleaved" else turned.mT).flatten(-2)], dim=1)
    return wide.to(x.dtype)


def plain(qkv: Tensor, sin=None, cos=None, layout: str = "half", norm: str = "layer", **weights: Tensor) -> Tensor:
    of = {part: [weights.get(f"{part}_norm_{name}") for name in ("weight", "bias")] for part in ("q", "k")}
    q, k, v = qkv.unbind(2)
    return torch.stack(
        [plain_one(q, sin, cos, *of["q"], layout, norm), plain_one(k, sin, cos, *of["k"], layout, norm), v], dim=2
    )


def angles(tokens: int, head_dim: int, layout: str) -> dict[str, Tensor]:
    """What rotates each pair by an angle of its own, at the first token too."""
    angle = torch.arange(1, tokens + 1)[:, None] * torch.rand(head_dim // 2)[None]
    angle = angle.repeat_interleave(2, dim=1) if layout == "interleaved" else angle.repeat(1, 2)
    return {"sin": angle.sin(), "cos": angle.cos()}


def weights(head_dim: int, bias: bool = True) -> dict[str, Tensor]:
    names = ("q_norm_weight", "k_norm_weight", *(("q_norm_bias", "k_norm_bias") if bias else ()))
    return {name: 1 + 0.2 * torch.randn(head_dim) for name in names}


def accurate(qkv: Tensor, rotation: dict[str, Tensor], learned: dict[str, Tensor], dtype, device, **options) -> None:
    """sin and cos stay in float32, as models keep them."""
    fixed = {name: angle.to(device) for name, angle in rotation.items()}
    prefix = {"prefix": qkv.shape[1] - len(fixed["sin"])} if fixed else {}
    assert_accurate(
        partial(rotary_qk_norm, **fixed, **prefix, **options),
        partial(plain, **fixed, **options),
        {"qkv": qkv, **learned},
        dtype,
        device,
    )


@pytest.mark.parametrize(
    ("shape", "prefix", "layout", "dtype"),
    [
        ((2, 7, 3, 64), 5, "half", torch.float32),
        ((3, 5, 2, 80), 1, "interleaved", torch.bfloat16),
        ((1, 5, 1, 6), 0, "half", torch.float16),
        in_full((3, 197, 2, 72), 1, "half", torch.bfloat16),
        in_full((1, 1, 2, 10), 0, "interleaved", torch.float32),
    ],
)
@pytest.mark.parametrize("norm", ["", "layer", in_full("rms")])
def test_matches_independent_formulation(
    shape: tuple[int, int, int, int], prefix: int, layout: str, norm: str, dtype: torch.dtype, device: torch.device
) -> None:
    batch, tokens, heads, head_dim = shape
    learned = weights(head_dim, bias=norm == "layer") if norm else {}
    options = {"layout": layout, **({"norm": norm} if norm else {})}
    qkv = torch.randn(batch, tokens, 3, heads, head_dim)
    accurate(qkv, angles(tokens - prefix, head_dim, layout), learned, dtype, device, **options)


def test_norms_alone_and_in_part(device: torch.device) -> None:
    qkv = torch.randn(2, 3, 3, 2, 40)
    accurate(qkv, {}, weights(40), torch.float32, device)
    accurate(qkv, {}, weights(40, bias=False), torch.bfloat16, device, norm="rms")
    accurate(qkv, angles(2, 40, "half"), {"k_norm_weight": torch.randn(40)}, torch.float32, device)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_the_gradient_is_the_transpose_whatever_the_numbers_of_each_channel(layout: str, device: torch.device) -> None:
    qkv, cotangent = torch.randn(2, 1, 3, 3, 1, 8, device=device).unbind()
    sin, cos = torch.randn(2, 3, 8, device=device).unbind()
    out = rotary_qk_norm(qkv.requires_grad_(), sin, cos, layout=layout)
    (gradient,) = torch.autograd.grad(out, qkv, cotangent)
    torch.testing.assert_close((out * cotangent).sum(), (qkv * gradient).sum())


def test_each_program_sums_many_rows(device: torch.device) -> None:
    accurate(torch.randn(2, 35, 3, 2, 128), {}, weights(128), torch.float32, device)


@pytest.mark.parametrize("hostile", ["offset", "one huge", "constant rows"])
def test_hostile_rows(hostile: str, device: torch.device) -> None:
    qkv = torch.randn(2, 3, 3, 2, 40)
    if hostile == "offset":
        qkv += 1000
    elif hostile == "one huge":
        qkv[..., 3] = 3e4
    else:
        qkv = torch.full_like(qkv, 0.5)
    condition = 100 if hostile == "offset" else 1
    accurate_at = partial(assert_accurate, dtype=torch.float32, device=device, condition=condition)
    accurate_at(rotary_qk_norm, plain, {"qkv": qkv, **weights(40)})


def test_nan_stays_in_its_head(device: torch.device) -> None:
    qkv, rotation = torch.randn(2, 3, 3, 2, 16, device=device), angles(3, 16, "half")
    rotation = {name: angle.to(device) for name, angle in rotation.items()}
    clean, qkv[1, 2, 0, 1, 5] = rotary_qk_norm(qkv, **rotation), torch.nan
    out = rotary_qk_norm(qkv, **rotation)
    assert out[1, 2, 0, 1].isnan().any()
    out[1, 2, 0, 1] = clean[1, 2, 0, 1]
    assert torch.equal(out, clean)


def test_separate_queries_and_keys_with_any_strides(device: torch.device) -> None:
    fixed = {name: angle.to(device) for name, angle in angles(4, 16, "half").items()}
    learned = {name: weight.to(device).requires_grad_() for name, weight in weights(16).items()}
    wide = torch.randn(2, 5, 4, 3, 16, device=device)
    q, k = wide[:, :, 0].requires_grad_(), torch.randn(2, 3, 5, 16, device=device).transpose(1, 2).requires_grad_()
    ours = rotary_qk_norm_separate(q, k, **fixed, prefix=1, **learned)
    packed = rotary_qk_norm(torch.stack([q, k, q], dim=2), **fixed, prefix=1, **learned)
    assert torch.equal(ours[0], packed[:, :, 0]) and torch.equal(ours[1], packed[:, :, 1])
    inputs = [q, k, *learned.values()]
    cotangents = torch.randn(2, 5, 16, 3, device=device).permute(0, 1, 3, 2), torch.randn(2, 5, 3, 16, device=device)
    theirs = torch.autograd.grad([packed[:, :, 0], packed[:, :, 1]], inputs, cotangents)
    torch.testing.assert_close(torch.autograd.grad(ours, inputs, cotangents), theirs)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_gradients_of_a_norm_whose_gradient_has_a_mean(norm: str, device: torch.device) -> None:
    """Layer normalisation takes the mean of a row's gradient away, the root mean square does not."""
    qkv, weight = 3 + torch.randn(1, 2, 3, 1, 8), torch.full((8,), 2.0)
    learned = {"q_norm_weight": weight, "k_norm_weight": weight / 2}
    found, expected = [], []
    for function, results in ((partial(rotary_qk_norm, eps=EPS), found), (plain, expected)):
        given = qkv.to(device).requires_grad_()
        out = function(given, norm=norm, **{name: tensor.to(device) for name, tensor in learned.items()})
        results += torch.autograd.grad(out, given, torch.ones_like(out))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert (expected[0][:, :, :2].abs().max() > 0.1) == (norm == "rms")


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_the_bias_of_each_channel_turns_with_its_partner(layout: str, device: torch.device) -> None:
    """A quarter turn of constant rows, which normalisation makes 0, leaves the biases, exchanged and signed."""
    bias = torch.arange(1.0, 9.0, device=device)
    turn = {"sin": torch.ones(2, 8, device=device), "cos": torch.zeros(2, 8, device=device)}
    learned = {f"{part}_norm_weight": torch.ones(8, device=device) for part in "qk"}
    qkv = torch.ones(1, 2, 3, 1, 8, device=device)
    out = rotary_qk_norm(qkv, **turn, **learned, q_norm_bias=bias, k_norm_bias=-bias, layout=layout)
    expected = [-5, -6, -7, -8, 1, 2, 3, 4] if layout == "half" else [-2, 1, -4, 3, -6, 5, -8, 7]
    expected = torch.tensor(expected, dtype=torch.float32, device=device)
    assert torch.equal(out[0, 1, 0, 0], expected) and torch.equal(out[0, 0, 1, 0], -expected)


def test_queries_and_keys_have_strides_of_their_own_in_every_tensor(device: torch.device) -> None:
    """Heads are adjacent everywhere, so nothing is copied first; tokens and images of each tensor are as far apart."""

    def spaced(extra: int) -> Tensor:
        return torch.randn(2, 3 + extra, 1 + extra, 2, 8, device=device)[:, :3, 0]

    learned = {f"{part}_norm_weight": torch.rand(8, device=device) for part in "qk"}
    q, k, grad_q, grad_k = (spaced(extra) for extra in range(4))
    results = []
    for shape in (lambda t: t, lambda t: t.contiguous()):
        given = shape(q).detach().requires_grad_(), shape(k).detach().requires_grad_()
        out = rotary_qk_norm_separate(*given, **learned)
        results.append([*out, *torch.autograd.grad(out, given, (shape(grad_q), shape(grad_k)))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_feeds_attention(device: torch.device) -> None:
    """A query and a key rotated by their positions see each other by their distance alone."""
    fixed = {name: angle.to(device) for name, angle in angles(6, 16, "half").items()}
    qkv = torch.randn(1, 1, 3, 2, 16, device=device).expand(1, 6, 3, 2, 16).clone()
    q, k, _ = rotary_qk_norm(qkv, **fixed).unbind(2)
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k)[0, 0]
    for distance in range(-5, 6):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=1e-4)
    assert attention(rotary_qk_norm(qkv, **fixed)).shape == (1, 6, 32)


def test_two_runs_are_the_same_bits(device: torch.device) -> None:
    qkv = torch.randn(3, 9, 3, 2, 64, device=device, requires_grad=True)
    learned = {name: weight.to(device).requires_grad_() for name, weight in weights(64).items()}
    runs = []
    for _ in range(2):
        out = rotary_qk_norm(qkv, **learned)
        runs.append([out, *torch.autograd.grad(out.square().sum(), [qkv, *learned.values()])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_rotation_keeps_no_input(implementation: str, device: torch.device) -> None:
    if implementation == "reference":
        pytest.skip("does not apply: a promise of the kernels alone")
    qkv = torch.randn(2, 3, 3, 2, 16, device=device, requires_grad=True)
    fixed = {name: angle.to(device) for name, angle in angles(3, 16, "half").items()}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rotary_qk_norm(qkv, **fixed)
    assert sum(tensor.numel() for tensor in kept) == 2 * 3 * 16


@pytest.mark.parametrize("packed", [True, in_full(False)])
def test_operators_are_registered_right(packed: bool, implementation: str, device: torch.device) -> None:
    if implementation == "reference":
        pytest.skip("does not apply: a promise of the kernels alone")
    q = torch.randn(1, 3, *((3,) if packed else ()), 1, 16, device=device, requires_grad=True)
    k = None if packed else torch.randn_like(q).requires_grad_()
    vectors = [angle.to(device) for angle in angles(2, 16, "half").values()]
    vectors += [weights(16)[n].to(device).requires_grad_() for n in ("q_norm_weight", "q_norm_bias", "k_norm_weight")]
    call = (*vectors, None, 1, False, False, EPS)
    torch.library.opcheck(op.rotary_op, (q, k, *call))
    detached = [t.detach() if isinstance(t, Tensor) else t for t in (q, k, *call)]
    grad_k = None if packed else torch.randn_like(q)
    torch.library.opcheck(op.rotary_backward_op, (torch.randn_like(q), grad_k, *detached))


def test_compiles_without_a_graph_break(device: torch.device) -> None:
    qkv = torch.randn(1, 3, 3, 2, 16, device=device, requires_grad=True)
    learned = {name: weight.to(device) for name, weight in weights(16).items()}
    compiled = torch.compile(partial(rotary_qk_norm, **learned), backend="aot_eager", fullgraph=True)
    ours, theirs = compiled(qkv), rotary_qk_norm(qkv, **learned)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(out.square().sum(), qkv)[0] for out in (ours, theirs)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"qkv": torch.zeros(2, 3, 2, 16)}, ValueError, r"qkv must have shape \[B, N, 3, H, d\]"),
        ({"cos": None}, ValueError, "sin and cos must be given together"),
        ({"prefix": 1}, ValueError, r"sin must have shape \[N - prefix, d\] = \[2, 16\], got \[3, 16\]"),
        ({"sin": torch.zeros(3, 16).requires_grad_()}, ValueError, "sin requires a gradient, which is not computed"),
        ({"layout": "halves"}, ValueError, "layout must be one of half, interleaved, got 'halves'"),
        ({"q_norm_bias": torch.zeros(16)}, ValueError, "q_norm_bias needs q_norm_weight"),
        ({"k_norm_weight": torch.zeros(2, 16)}, ValueError, r"k_norm_weight must have shape \[16\]"),
        ({"sin": None, "cos": None}, ValueError, "there is nothing to do"),
    ],
)
def test_wrong_arguments(change: dict[str, object], error: type[Exception], said: str, device: torch.device) -> None:
    arguments = {"qkv": torch.zeros(2, 3, 3, 2, 16), "sin": torch.zeros(3, 16), "cos": torch.zeros(3, 16)} | change
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    with pytest.raises(error, match=said):
        rotary_qk_norm(**moved)
