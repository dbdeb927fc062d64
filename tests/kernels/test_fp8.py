"""FP8 products of linear layers: what is rounded, how large the errors are, and that kernels and reference agree."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastvit_kernels import Fp8, FusedBlock, dispatch, fp8_linear, transformer_block
from fastvit_kernels.fp8 import op, passes, products
from fastvit_kernels.fp8.quantise import Quantised, find_maxima, quantise
from fastvit_kernels.fp8.setting import LAYERS, fits, obstacle
from fastvit_kernels.fp8_scales.handoff import Handoff, empty_handoff, empty_maxima
from fastvit_kernels.fp8_scales.scales import E4M3, E5M2, LARGEST, TOP, magnitude_bits, scales
from fastvit_kernels.gemm.products import scale_gradient
from fastvit_kernels.layer_norm.op import normalise
from tests.in_full import IN_FULL, in_full
from tests.kernels.test_training import SmallViT

needs_kernels = pytest.mark.skipif(
    not (dispatch.INTERPRETED or torch.cuda.is_available()), reason="kernels need a GPU or Triton's interpreter"
)
FORMATS = [E4M3, E5M2]
SCALINGS = ["tensor", "row"]
HALF_SPACING = {E4M3: 2.0**-4, E5M2: 2.0**-3}  # of a number, relative to it


def quantised(x: Tensor, dtype: torch.dtype, by_rows: bool, how: str = "reference") -> tuple[Quantised, int]:
    """Both layouts, and whether a scale was out of range."""
    overflows = torch.zeros(1, dtype=torch.int32)
    with dispatch.using(how):
        return quantise(x, dtype, by_rows, overflows, rows=True, columns=True), int(overflows)


def spread(tokens: int, width: int) -> Tensor:
    """Numbers over twenty powers of two."""
    return (torch.randn(tokens, width) * 2.0 ** torch.randint(-12, 8, (tokens, width))).bfloat16()


# ---- scales


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_scale_is_the_largest_power_of_two_that_keeps_the_largest_magnitude_in_range(dtype: torch.dtype) -> None:
    largest = torch.cat([torch.rand(500) * 2.0 ** torch.randint(-40, 100, (500,)), torch.tensor([1.75, 1.7500001])])
    scale, inverse, overflows = scales(magnitude_bits(largest), TOP[dtype])
    assert (largest * scale <= LARGEST[dtype]).all() and (2 * largest * scale > LARGEST[dtype]).all()
    assert torch.equal(scale.log2(), scale.log2().round()) and torch.equal(scale * inverse, torch.ones_like(scale))
    assert not overflows.any()


@pytest.mark.parametrize("dtype", FORMATS)
def test_what_is_no_overflow_and_what_is(dtype: torch.dtype) -> None:
    smallest = LARGEST[dtype] / 2.0**63
    magnitudes = torch.tensor([0.0, smallest, smallest / 2, 1e-45, 3e38, math.inf, math.nan])
    scale, inverse, overflows = scales(magnitude_bits(magnitudes), TOP[dtype])
    assert overflows.tolist() == [False, False, True, True, False, True, True]
    assert scale[0] == inverse[0] == 1
    assert scale[1:4].tolist() == [2.0**63] * 3
    assert scale[-2:].isnan().all() and inverse[-2:].isnan().all()
    assert (inverse[:5].square() > 0).all()


# ---- operands


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("dtype", FORMATS)
def test_numbers_are_rounded_to_the_nearest(dtype: torch.dtype, by_rows: bool) -> None:
    x = spread(37, 80)
    (rows, row_inverse, columns, column_inverse), overflows = quantised(x, dtype, by_rows)
    assert rows is not None and row_inverse is not None and columns is not None and column_inverse is not None
    assert (
        overflows == 0 and len(row_inverse) == (37 if by_rows else 1) and len(column_inverse) == (80 if by_rows else 1)
    )
    for values, inverse, exact in (
        (rows, row_inverse, x.double()),
        (columns[:, :37], column_inverse, x.T.double()),
    ):
        error = (values.double() * inverse.double()[:, None] - exact).abs()
        smallest = torch.finfo(dtype).smallest_normal * inverse.double()[:, None]
        assert (error <= HALF_SPACING[dtype] * torch.maximum(exact.abs(), smallest)).all()
    if not by_rows:
        assert torch.equal(rows.float(), columns[:, :37].float().T)


def test_tokens_are_padded_to_what_products_read() -> None:
    for tokens in (1, 15, 16, 17, 257):
        given, _ = quantised(torch.randn(tokens, 32).bfloat16(), E4M3, True)
        assert given.columns is not None and given.columns.shape == (32, -(-tokens // 16) * 16)
        assert given.columns[:, tokens:].float().count_nonzero() == 0


@needs_kernels
@pytest.mark.parametrize(
    "hostile", ["", "nan", "infinite", "zeros", "tiny", "huge", "strided", "one token", "no token"]
)
@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("dtype", FORMATS)
def test_kernels_give_the_operands_of_the_reference_to_the_bit(dtype: torch.dtype, by_rows: bool, hostile: str) -> None:
    x = spread(70, 144)
    if hostile in ("nan", "infinite"):
        x[3, 5] = math.nan if hostile == "nan" else -math.inf
    elif hostile == "zeros":
        x[:, 7], x[4] = 0, 0
    elif hostile in ("tiny", "huge"):
        x = x * (1e-30 if hostile == "tiny" else 1e35)
    elif hostile == "strided":
        x = x[:, :80]
    elif hostile == "one token":
        x = x[:1]
    elif hostile == "no token":
        x = x[:0]
    reference, found = quantised(x, dtype, by_rows)
    kernels, found_by_kernels = quantised(x, dtype, by_rows, "triton")
    for ours, expected in zip(kernels, reference, strict=True):
        assert ours is not None and expected is not None
        assert torch.equal(ours.isnan(), expected.isnan())
        assert torch.equal(ours.float().nan_to_num(), expected.float().nan_to_num())
    assert found == found_by_kernels == (hostile in ("nan", "infinite", "tiny"))


# ---- a linear layer


def layer_inputs(tokens: int, inner: int, outer: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    tensors = {
        "x": torch.randn(tokens, inner),
        "weight": torch.randn(outer, inner) / inner**0.5,
        "bias": 0.1 * torch.randn(outer),
    }
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def with_gradients(function: Callable[..., Tensor], inputs: dict[str, Tensor], like: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients for the cotangent `like`."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    output = function(**leaves)
    gradients = torch.autograd.grad(output, list(leaves.values()), like.to(output.dtype))
    return {"output": output.detach()} | dict(zip(leaves, gradients, strict=True))


def by_hand(inputs: dict[str, Tensor], cotangent: Tensor, fp8: Fp8) -> dict[str, Tensor]:
    """The three products of operands that are rounded to FP8, in float64."""
    x, weight, bias = (inputs[name].double() for name in ("x", "weight", "bias"))

    def rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """By rows: of the operand as it is read, along what is summed up."""
        given, _ = quantised(tensor.to(cotangent.dtype), dtype, fp8.scaling == "row")
        assert given.rows is not None and given.row_inverse is not None
        return given.rows.double() * given.row_inverse.double()[:, None]

    return {
        "output": rounded(x, E4M3) @ rounded(weight, E4M3).T + bias,
        "x": rounded(cotangent, fp8.gradient_format) @ rounded(weight.T.contiguous(), E4M3).T,
        "weight": rounded(cotangent.T.contiguous(), fp8.gradient_format) @ rounded(x.T.contiguous(), E4M3).T,
        "bias": cotangent.double().sum(dim=0),
    }


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(
    "sizes", [(19, 96, 48), (1, 16, 16), in_full((257, 192, 576)), in_full((5, 64, 256)), (33, 80, 112)], ids=str
)
def test_products_are_those_of_rounded_operands(
    scaling: str, sizes: tuple[int, int, int], device: torch.device
) -> None:
    inputs = layer_inputs(*sizes)
    cotangent = torch.randn(sizes[0], sizes[2]).bfloat16()
    fp8 = Fp8(scaling)
    expected = by_hand(inputs, cotangent, fp8)
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    ours = with_gradients(partial(fp8_linear, fp8=fp8, layer="fc1"), inputs, cotangent.to(device))
    for name, exact in expected.items():
        error, size = (ours[name].double().cpu() - exact).abs(), exact.abs().max()
        assert (error <= 2.0**-8 * exact.abs() + 1e-5 * size).all(), name  # one rounding to bfloat16
    assert fp8.overflows is not None and fp8.overflows.tolist() == [0, 0, 0, 0]


ERRORS = {  # of a product of two rounded operands with independent errors, relative to what it should be, at most
    "tensor": {"output": 0.04, "x": 0.065, "weight": 0.065},
    "row": {"output": 0.04, "x": 0.04, "weight": 0.04},
}


@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_error_is_that_of_eight_bits(scaling: str) -> None:
    """E4M3 rounds by 2.6 % on average (RMS), E5M2 by 5 %; bfloat16 by 0.2 %."""
    inputs = layer_inputs(128, 256, 192)
    cotangent = torch.randn(128, 192).bfloat16()
    exact = with_gradients(F.linear, {name: t.double() for name, t in inputs.items()}, cotangent.double())
    ours = with_gradients(partial(fp8_linear, fp8=Fp8(scaling), layer="qkv"), inputs, cotangent)
    for name, most in ERRORS[scaling].items():
        error = ((ours[name].double() - exact[name]).norm() / exact[name].norm()).item()
        assert 0.5 * most < error <= most, name


def test_a_scale_per_row_keeps_small_rows_that_one_scale_loses() -> None:
    inputs = layer_inputs(64, 96, 48)
    inputs["x"][0] *= 2.0**24
    errors = {}
    for scaling in SCALINGS:
        exact = F.linear(inputs["x"].double(), inputs["weight"].double())[1:]
        ours = fp8_linear(**inputs, fp8=Fp8(scaling), layer="fc1") - inputs["bias"]
        errors[scaling] = ((ours[1:].double() - exact).norm() / exact.norm()).item()
    assert errors["row"] < 0.05 and errors["tensor"] > 0.9


@needs_kernels
@settings(max_examples=12 if IN_FULL else 4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 40), st.integers(1, 6), st.integers(1, 6), st.sampled_from(SCALINGS), st.integers(0, 2**16))
def test_any_sizes(tokens: int, inner: int, outer: int, scaling: str, seed: int) -> None:
    torch.manual_seed(seed)
    inputs = layer_inputs(tokens, 16 * inner, 16 * outer)
    cotangent = torch.randn(tokens, 16 * outer).bfloat16()
    expected = with_gradients(partial(fp8_linear, fp8=Fp8(scaling), layer="fc1"), inputs, cotangent)
    with dispatch.using("triton"):
        ours = with_gradients(partial(fp8_linear, fp8=Fp8(scaling), layer="fc1"), inputs, cotangent)
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=2.0**-7, atol=1e-5, msg=name)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_so_and_is_counted(scaling: str, value: float, device: torch.device) -> None:
    inputs = {name: tensor.to(device) for name, tensor in layer_inputs(17, 32, 48).items()}
    inputs["x"][3, 4] = value
    fp8 = Fp8(scaling)
    y = fp8_linear(**inputs, fp8=fp8, layer="fc2")
    assert not y[3].isfinite().any()
    assert y[:3].isfinite().all() == (scaling == "row")
    assert fp8.overflows is not None and fp8.overflows.tolist() == [0, 0, 0, 1]


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("scaling", SCALINGS)
def test_vanishing_gradients_are_counted_for_their_layer(scaling: str, device: torch.device) -> None:
    inputs = {name: tensor.to(device) for name, tensor in layer_inputs(17, 32, 48).items()}
    fp8 = Fp8(scaling)
    cotangent = torch.randn(17, 48, device=device).bfloat16()
    with_gradients(partial(fp8_linear, fp8=fp8, layer="proj"), inputs, cotangent)
    assert fp8.overflows is not None and fp8.overflows.tolist() == [0, 0, 0, 0]
    with_gradients(partial(fp8_linear, fp8=fp8, layer="proj"), inputs, 0 * cotangent)
    assert fp8.overflows.tolist() == [0, 0, 0, 0], "zeros, as behind a head of zeros, are no overflow"
    with_gradients(partial(fp8_linear, fp8=fp8, layer="proj"), inputs, 1e-25 * cotangent)
    assert fp8.overflows.tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_only_what_is_needed_is_computed(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(op, "Layer", counted(made))
    inputs = {name: t.requires_grad_(name != frozen) for name, t in layer_inputs(5, 32, 48).items()}
    fp8_linear(**inputs, fp8=Fp8(), layer="fc1").sum().backward()
    assert made == [product for product, of in (("x", "x"), ("weight", "weight")) if of != frozen]
    assert [name for name, tensor in inputs.items() if tensor.grad is None] == [frozen]


def counted(made: list[str]) -> type[products.Layer]:
    class Counting(products.Layer):
        def input_gradient(self, *args: Tensor) -> Tensor:
            made.append("x")
            return super().input_gradient(*args)

        def weight_gradient(self, *args: Tensor) -> Tensor:
            made.append("weight")
            return super().weight_gradient(*args)

    return Counting


def test_a_gradient_is_quantised_once_for_both_products(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(products, "quantise", lambda x, *args, **how: calls.append(how) or quantise(x, *args, **how))
    inputs = {name: tensor.requires_grad_() for name, tensor in layer_inputs(5, 32, 48).items()}
    y = fp8_linear(**inputs, fp8=Fp8(), layer="fc1")
    assert len(calls) == 2
    y.sum().backward()
    assert [(how["rows"], how["columns"]) for how in calls[2:]].count((True, True)) == 1 and len(calls) == 5


# ---- blocks


def block_of(fp8: Callable[[FusedBlock], object] | None = None, dtype: torch.dtype = torch.bfloat16, **how: object):
    torch.manual_seed(0)
    block = FusedBlock(48, 3, 112, **how)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    if fp8 is not None:
        fp8(block)
    return block.to(torch.bfloat16).to(dtype)


def results(block: FusedBlock, **how: object) -> list[Tensor]:
    """Output and gradients of a block, of inputs that are the same in every dtype."""
    dtype = block.mlp.fc1.weight.dtype
    torch.manual_seed(1)
    x = torch.randn(3, 7, 48).bfloat16().to(dtype).requires_grad_()
    torch.manual_seed(2)
    y = block(x, **how)
    torch.manual_seed(3)
    cotangent = torch.randn(y.shape).bfloat16().to(dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *block.parameters()], cotangent)]


def exact_results(**options: object) -> list[Tensor]:
    """In float64, which kernels do not take."""
    with dispatch.using("reference"):
        return results(block_of(dtype=torch.float64, **options))


def errors(ours: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [((a.double() - b).norm() / b.norm().clamp(min=1e-9)).item() for a, b in zip(ours, exact, strict=True)]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "LayerScale and drop path, all kept": {"layer_scale": 0.3, "drop_path": 0.3, "recompute": "none"},
    "LayerScale, all computed again": {"layer_scale": 0.3, "recompute": "all"},
    "tanh": {"activation": "gelu_tanh"},
    "subset": {"drop_path": 0.4, "drop_path_mode": "subset"},
    "dropout": {"dropout": 0.3},
}


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("options", [n if n not in ("tanh", "dropout", "plain") else in_full(n) for n in OPTIONS])
def test_a_block_and_its_gradients_are_as_near_as_eight_bits_allow(options: str, scaling: str) -> None:
    exact = exact_results(**OPTIONS[options])
    plain = errors(results(block_of(**OPTIONS[options])), exact)
    ours = errors(results(block_of(lambda block: block.compute_in_fp8(scaling), **OPTIONS[options])), exact)
    assert all(error < 0.16 + 2 * of_bf16 for error, of_bf16 in zip(ours, plain, strict=True)), (ours, plain)
    assert max(ours[1:]) > 2 * max(plain[1:]), "nothing was rounded to 8 bits"


@needs_kernels
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(
    "layers", [LAYERS, ("fc1",), in_full(("fc2",)), ("proj", "fc2"), in_full(("qkv",))], ids="+".join
)
@pytest.mark.parametrize("options", ["plain", "LayerScale and drop path, all kept", "LayerScale, all computed again"])
def test_fused_passes_give_what_layers_one_by_one_do(options: str, layers: tuple[str, ...], scaling: str) -> None:
    """Up to other roundings to bfloat16 in between, and numbers that these push over to another side in FP8."""
    block = block_of(lambda block: block.compute_in_fp8(scaling, layers), **OPTIONS[options])
    with dispatch.using("triton"):
        fused = results(block)
    with dispatch.using("block=reference,attention_block=reference,mlp=reference,*=triton"):
        one_by_one = results(block)
    exact = exact_results(**OPTIONS[options])
    for ours, theirs in zip(errors(fused, exact), errors(one_by_one, exact), strict=True):
        assert ours < 2.6 * theirs + 0.005  # twice for LayerScale's, which follows from that of the weight


@needs_kernels
@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("width", [48, 336, in_full(1280)])
def test_passes_leave_what_a_pass_of_its_own_would_find(width: int, by_rows: bool) -> None:
    """LayerNorm, GELU, and its gradient, to the bit."""
    tokens, overflows = 19, torch.zeros(1, dtype=torch.int32)
    x, weight, bias = spread(tokens, width), torch.randn(width).bfloat16(), torch.randn(width).bfloat16()
    with dispatch.using("triton"):
        handoff = empty_handoff(x, E4M3, by_rows, overflows)
        normed = normalise(x, weight, bias, 1e-6, x.dtype, handoff=handoff)[1]
        assert_handed_off(handoff, normed, by_rows)
        handoff = empty_handoff(x, E4M3, by_rows, overflows)
        assert_handed_off(handoff, passes.gelu(x, False, handoff, keep=True), by_rows)
        handoff = empty_handoff(x, E4M3, by_rows, overflows)
        post = passes.gelu(x, False, handoff, keep=False)
        assert post.numel() == (0 if by_rows else x.numel())
        maxima = empty_maxima(x, by_rows, rows=True, columns=True)
        grad = spread(tokens, width)
        scale_gradient(grad, grad, pre=x, maxima=maxima)
        for found, expected in zip(maxima, find_maxima(grad, by_rows, rows=True, columns=True), strict=True):
            assert (found is None) == (expected is None)
            if found is not None and expected is not None:
                assert torch.equal(found, expected) if by_rows else found.max() == expected.max()
    assert int(overflows) == 0


def assert_handed_off(handoff: Handoff, matrix: Tensor, by_rows: bool) -> None:
    alone = quantised(matrix, E4M3, by_rows, "triton")[0]
    assert alone.rows is not None and alone.row_inverse is not None
    if handoff.rows is not None:
        assert by_rows and torch.equal(handoff.rows.values.float(), alone.rows.float())
        assert torch.equal(handoff.rows.inverse, alone.row_inverse)
    else:
        assert handoff.maxima is not None and handoff.maxima.whole is not None
        assert handoff.maxima.whole.max() == magnitude_bits(matrix).max()


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("scaling", SCALINGS)
def test_first_tokens_alone_and_packed_sequences(scaling: str) -> None:
    whole = block_of(lambda block: block.compute_in_fp8(scaling))
    assert errors(results(whole, outputs=2)[:1], [results(whole)[0][:, :2].double()])[0] < 0.03
    lengths = {"cu_seqlens": torch.tensor([0, 3, 7], dtype=torch.int32), "max_seqlen": 4}
    x = torch.randn(1, 7, 48).bfloat16()
    packed = whole(x, **lengths)
    apart = torch.cat([whole(x[:, :3]), whole(x[:, 3:])], dim=1)
    assert errors([packed], [apart.double()])[0] < 0.03


def test_evaluation_is_in_the_dtype_of_the_weights() -> None:
    plain, in_fp8 = block_of().eval(), block_of(lambda block: block.compute_in_fp8("tensor")).eval()
    x = torch.randn(3, 7, 48).bfloat16()
    assert torch.equal(plain(x), in_fp8(x))
    assert not torch.equal(plain.train()(x), in_fp8.train()(x))


@pytest.mark.usefixtures("implementation")
def test_activation_checkpointing_gives_the_same_bits() -> None:
    from torch.utils.checkpoint import checkpoint

    block = block_of(lambda block: block.compute_in_fp8("tensor"))
    x, cotangent = torch.randn(3, 7, 48).bfloat16().requires_grad_(), torch.randn(3, 7, 48).bfloat16()
    runs = [lambda: block(x), lambda: checkpoint(block, x, use_reentrant=True)]
    found = []
    for run in runs:
        block.zero_grad()
        x.grad = None
        run().backward(cotangent)
        found.append([x.grad, *(parameter.grad for parameter in block.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_layers_that_do_not_fit_stay_as_they_are_and_are_named() -> None:
    block = FusedBlock(48, 3, 100)
    assert block.compute_in_fp8("row") == ("fc1", "fc2")
    assert block.fp8 is not None and block.fp8.layers == {"qkv", "proj"}
    assert FusedBlock(40, 2, 100).compute_in_fp8("row") == LAYERS
    assert "fp8=Fp8(row, qkv+proj)" in repr(block) and "fp8" not in repr(FusedBlock(48, 3, 96))
    assert fits((16, 48)) and not fits((48, 20)) and not fits((0, 16))


def test_a_copy_counts_for_itself() -> None:
    block = block_of(lambda block: block.compute_in_fp8("tensor"))
    block(torch.full((1, 2, 48), math.nan, dtype=torch.bfloat16))
    assert block.fp8 is not None and block.fp8.overflows is not None and block.fp8.overflows.tolist() == [1, 1, 1, 1]
    twin = copy.deepcopy(block)
    assert twin.fp8 is not None and twin.fp8.overflows is None and twin.fp8.layers == block.fp8.layers


# ---- training


LOSSES: dict[str, Tensor] = {}


def losses_of(scaling: str) -> Tensor:
    """The loss of 100 steps of AdamW on images of 16 classes: much noise around a picture each. "": in bf16."""
    if scaling not in LOSSES:
        torch.manual_seed(0)
        model = SmallViT(image=16, patch=4, width=48, depth=2, heads=3, classes=16).bfloat16().train()
        for block in model.blocks if scaling else ():
            assert isinstance(block, FusedBlock) and block.compute_in_fp8(scaling) == ()
        masters = [parameter.detach().float().requires_grad_() for parameter in model.parameters()]
        optimizer, losses = torch.optim.AdamW(masters, lr=2e-3), []
        pictures = torch.randint(0, 256, (16, 16, 16, 3))
        for _ in range(100):
            labels = torch.randint(0, 16, (64,))
            images = (pictures[labels] // 6 + torch.randint(0, 213, (64, 16, 16, 3))).to(torch.uint8)
            loss = F.cross_entropy(model(images).float(), labels)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            for master, gradient in zip(masters, gradients, strict=True):
                master.grad = gradient.float()
            optimizer.step()
            with torch.no_grad():
                for parameter, master in zip(model.parameters(), masters, strict=True):
                    parameter.copy_(master)
            losses.append(loss.detach())
        LOSSES[scaling] = torch.stack(losses)
    return LOSSES[scaling]


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_hundred_steps_follow_the_losses_in_bf16(scaling: str) -> None:
    plain, ours = losses_of(""), losses_of(scaling)
    assert plain[-20:].mean() < 0.9 * plain[:20].mean(), "nothing was learned"
    for of_fp8, of_bf16 in zip(ours.view(5, 20).mean(dim=1), plain.view(5, 20).mean(dim=1), strict=True):
        assert of_fp8.item() == pytest.approx(of_bf16.item(), rel=0.03)
    assert not torch.equal(ours, plain)


# ---- what is refused


def test_wrong_arguments() -> None:
    inputs = layer_inputs(5, 32, 48)
    with pytest.raises(ValueError, match="scaling must be one of tensor, row, got 'block'"):
        Fp8("block")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layers must be of qkv, proj, fc1, fc2, got head"):
        Fp8("row", ["head", "qkv"])
    with pytest.raises(ValueError, match="layer must be one of qkv, proj, fc1, fc2, got 'head'"):
        fp8_linear(**inputs, fp8=Fp8(), layer="head")
    with pytest.raises(ValueError, match="not of multiples of 16"):
        fp8_linear(**layer_inputs(5, 32, 40), fp8=Fp8(), layer="fc1")
    with pytest.raises(TypeError, match="weight must be torch.bfloat16"):
        fp8_linear(**{**inputs, "weight": inputs["weight"].float()}, fp8=Fp8(), layer="fc1")


def test_what_has_no_second_derivative_says_so() -> None:
    inputs = {name: tensor.float().requires_grad_() for name, tensor in layer_inputs(5, 32, 48).items()}
    y = fp8_linear(**inputs, fp8=Fp8(), layer="fc1")
    (gradient,) = torch.autograd.grad(y.square().sum(), inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


@contextmanager
def gpu_of(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        patch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
        yield


def test_which_devices_have_products(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "cpu has no FP8" in (obstacle(torch.device("cpu")) or "")
    for capability, said in (((8, 0), "older than Hopper"), ((8, 9), "older than Hopper"), ((9, 0), None)):
        with gpu_of(capability, monkeypatch):
            found = obstacle(torch.device("cuda", 0))
            assert found is None if said is None else said in (found or "")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "AMD" in (obstacle(torch.device("cuda", 0)) or "")


def test_transformer_block_takes_the_setting() -> None:
    block = block_of()
    names = ("norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias")
    names += ("norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias")
    parameters = dict(block.named_parameters())
    x = torch.randn(3, 7, 48).bfloat16()
    call = partial(transformer_block, x, *(parameters[name] for name in names), heads=3, eps=1e-6)
    block.compute_in_fp8("row", ["fc1"])
    assert torch.equal(call(fp8=Fp8("row", ["fc1"])), block(x))
    assert not torch.equal(call(), block(x))
