import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastvit_kernels import dispatch, patch_embed
from fastvit_kernels.patch_embed import op
from tests.in_full import IN_FULL, in_full
from tests.kernels.numerics import assert_accurate

pytestmark = pytest.mark.usefixtures("implementation")

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OURS = partial(patch_embed, mean=MEAN, std=STD)


def plain_patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos_embed: Tensor | None = None,
    cls_token: Tensor | None = None,
    register_tokens: Tensor | None = None,
    keep_indices: Tensor | None = None,
) -> Tensor:
    """A convolution of the whole image, then what is added, then what is kept."""
    batch = len(images)
    tokens = F.conv2d(images.to(weight.dtype), weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    if cls_token is not None:
        tokens = torch.cat([cls_token.repeat(batch, 1, 1), tokens], dim=1)
    if pos_embed is not None:
        tokens = tokens + pos_embed
    first = tokens.shape[1] - (images.shape[2] // weight.shape[-1]) * (images.shape[3] // weight.shape[-1])
    cls, patches = tokens[:, :first], tokens[:, first:]
    if keep_indices is not None:
        patches = torch.stack([patches[image, indices] for image, indices in enumerate(keep_indices)])
    registers = [] if register_tokens is None else [register_tokens.repeat(batch, 1, 1)]
    return torch.cat([cls, *registers, patches], dim=1)


def inputs(
    batch: int, height: int, width: int, patch: int, embed_dim: int, cls: bool = True, registers: int = 0
) -> dict[str, Tensor]:
    """Parameters, and images that are left out of what gets a gradient."""
    tokens = (height // patch) * (width // patch)
    arguments = {
        "images": torch.randn(batch, 3, height, width),
        "weight": torch.randn(embed_dim, 3, patch, patch) / (3 * patch**2) ** 0.5,
        "bias": 0.1 * torch.randn(embed_dim),
        "pos_embed": 0.2 * torch.randn(1, tokens + cls, embed_dim),
    }
    if registers:
        arguments["register_tokens"] = torch.randn(1, registers, embed_dim)
    return arguments | ({"cls_token": torch.randn(1, 1, embed_dim)} if cls else {})


def some_patches(batch: int, patches: int, kept: int) -> Tensor:
    return torch.stack([torch.randperm(patches)[:kept] for _ in range(batch)])


def assert_equals_convolution(
    arguments: dict[str, Tensor], dtype: torch.dtype, device: torch.device, keep_indices: Tensor | None = None
) -> None:
    """Output and the gradients of all but the images, which are rounded to `dtype`, as they are multiplied."""
    images = arguments["images"].to(device, dtype)
    keep = None if keep_indices is None else keep_indices.to(device)
    assert_accurate(
        lambda **parameters: OURS(images, **parameters, keep_indices=keep),
        lambda **parameters: plain_patch_embed(images, **parameters, keep_indices=keep),
        {name: tensor for name, tensor in arguments.items() if name != "images"},
        dtype,
        device,
    )


SHAPES = [(1, 14, 14, 14, 80), (2, 56, 28, 14, 33), (3, 16, 24, 4, 65), (3, 32, 48, 16, 130), (2, 3, 2, 1, 5)]
QUICK = [  # each shape with and without a class token, each dtype with more than one shape
    (SHAPES[0], True, torch.bfloat16),
    (SHAPES[0], False, torch.float32),
    (SHAPES[1], True, torch.float16),
    (SHAPES[1], False, torch.bfloat16),
    (SHAPES[2], True, torch.float32),
    (SHAPES[2], False, torch.bfloat16),
    (SHAPES[3], True, torch.bfloat16),
    (SHAPES[3], False, torch.float16),
    (SHAPES[4], True, torch.float32),
    (SHAPES[4], False, torch.float16),
]
FULL = itertools.product(SHAPES, [True, False], [torch.float32, torch.bfloat16, torch.float16])


@pytest.mark.parametrize(("shape", "cls", "dtype"), QUICK + [in_full(*case) for case in FULL if case not in QUICK])
def test_equals_convolution(
    shape: tuple[int, int, int, int, int], cls: bool, dtype: torch.dtype, device: torch.device
) -> None:
    assert_equals_convolution(inputs(*shape, cls=cls), dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("cls", "registers", "kept"), [(True, 4, None), (False, 1, None), (True, 0, 3), (False, 2, 1)])
def test_registers_and_kept_patches(
    cls: bool, registers: int, kept: int | None, dtype: torch.dtype, device: torch.device
) -> None:
    arguments = inputs(3, 12, 16, 4, 40, cls=cls, registers=registers)
    assert_equals_convolution(arguments, dtype, device, None if kept is None else some_patches(3, 12, kept))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("patch", "embed_dim"), [(16, 768), (16, 1024), (14, 1280)])
@pytest.mark.parametrize("kept", [None, 64])
def test_production_sizes(
    patch: int, embed_dim: int, kept: int | None, dtype: torch.dtype, device: torch.device
) -> None:
    if device.type == "cpu":
        pytest.skip("too slow without a GPU")
    arguments = inputs(64, 224, 224, patch, embed_dim, registers=4)
    keep_indices = None if kept is None else some_patches(64, (224 // patch) ** 2, kept)
    assert_equals_convolution(arguments, dtype, device, keep_indices)


@settings(
    max_examples=15 if IN_FULL else 6,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    batch=st.integers(1, 4),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    patch=st.integers(1, 9),
    embed_dim=st.integers(8, 140),
    cls=st.booleans(),
    registers=st.integers(0, 2),
    share=st.floats(0.01, 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_shape(
    batch: int,
    grid: tuple[int, int],
    patch: int,
    embed_dim: int,
    cls: bool,
    registers: int,
    share: float,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    patches = grid[0] * grid[1]
    arguments = inputs(batch, grid[0] * patch, grid[1] * patch, patch, embed_dim, cls=cls, registers=registers)
    kept = None if share > 0.7 else some_patches(batch, patches, max(1, int(share * patches)))
    assert_equals_convolution(arguments, dtype, device, kept)


def test_no_position_and_no_class_token(device: torch.device) -> None:
    arguments = inputs(2, 8, 8, 4, 16, cls=False)
    del arguments["pos_embed"]
    assert_equals_convolution(arguments, torch.float32, device)


def test_class_token_without_position(device: torch.device) -> None:
    arguments = inputs(2, 8, 8, 4, 16, registers=2)
    del arguments["pos_embed"]
    assert_equals_convolution(arguments, torch.float32, device, some_patches(2, 4, 2))


def test_gradient_of_images(implementation: str, device: torch.device) -> None:
    arguments = {name: tensor.to(device) for name, tensor in inputs(2, 8, 8, 4, 16).items()}
    arguments["images"].requires_grad_()
    if implementation == "triton":
        with pytest.raises(RuntimeError, match="triton was asked for, but patch_embed has no gradient for images"):
            OURS(**arguments)
        with torch.no_grad():
            OURS(**arguments)
    with dispatch.using("auto"):
        assert_accurate(OURS, plain_patch_embed, arguments, torch.float32, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("patch", [14, 2])
def test_pixels_in_either_layout_equal_normalised_images(
    implementation: str, patch: int, dtype: torch.dtype, device: torch.device
) -> None:
    shape = (2, 2 * patch, 3 * patch, patch, 48)
    arguments = {name: tensor.to(device, dtype).requires_grad_() for name, tensor in inputs(*shape).items()}
    del arguments["images"]
    pixels = torch.randint(0, 256, (2, 2 * patch, 3 * patch, 3), dtype=torch.uint8, device=device)
    channels_first = pixels.permute(0, 3, 1, 2).contiguous()
    mean, std = torch.tensor([MEAN, STD], device=device)[:, :, None, None]
    normalised = (channels_first.float() / 255 - mean) / std
    cotangent = torch.randn(2, 7, 48, device=device, dtype=dtype)

    def run(images: Tensor) -> tuple[Tensor, ...]:
        tokens = OURS(images, **arguments)
        return tokens.detach(), *torch.autograd.grad(tokens, list(arguments.values()), cotangent)

    tokens, *gradients = run(normalised)
    for images in (pixels, channels_first):
        results = run(images)
        assert results[0].dtype == dtype
        for ours, expected in zip(results, (tokens, *gradients), strict=True):
            if implementation == "reference":
                assert torch.equal(ours, expected)
            else:  # Triton multiplies by 1 / (255 std), and adds in the order of memory: one rounding apart
                tolerance = 1e-5 if dtype == torch.float32 else 0.02
                torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def test_normalisation_by_hand(device: torch.device) -> None:
    pixels = torch.tensor([10, 20, 30], dtype=torch.uint8, device=device).expand(1, 1, 1, 3)
    weight = torch.eye(3, device=device)[:, :, None, None]
    tokens = OURS(pixels.expand(1, 2, 1, 3), weight, torch.zeros(3, device=device))
    expected = [(value / 255 - m) / s for value, m, s in zip((10, 20, 30), MEAN, STD, strict=True)]
    assert tokens[0, 1].tolist() == pytest.approx(expected, rel=1e-5)


def test_class_token_is_first_and_takes_the_first_position(device: torch.device) -> None:
    arguments = {name: tensor.to(device) for name, tensor in inputs(2, 8, 8, 4, 16).items()}
    first = OURS(**arguments)[:, 0]
    assert torch.equal(first, (arguments["cls_token"] + arguments["pos_embed"][:, :1])[:, 0].expand(2, -1))


@pytest.mark.parametrize("layout", ["channels last", "flipped and cropped", "repeated"])
def test_non_contiguous_images(layout: str, device: torch.device) -> None:
    arguments = inputs(2, 8, 8, 4, 16)
    arguments["images"] = {
        "channels last": torch.randn(2, 8, 8, 3).permute(0, 3, 1, 2),
        "flipped and cropped": torch.randn(2, 3, 16, 16).transpose(2, 3)[:, :, 3:11, ::2],
        "repeated": torch.randn(8, 8).expand(2, 3, 8, 8),
    }[layout]
    assert_equals_convolution(arguments, torch.float32, device)


def test_non_contiguous_gradient_and_parameters(device: torch.device) -> None:
    arguments = {name: tensor.to(device) for name, tensor in inputs(2, 8, 8, 4, 16, registers=2).items()}
    arguments["weight"] = torch.randn(4, 3, 4, 16, device=device).permute(3, 1, 0, 2)
    arguments["pos_embed"] = torch.randn(1, 16, 5, device=device).transpose(1, 2)
    arguments["bias"] = torch.randn(32, device=device)[::2]
    images = arguments.pop("images")
    for tensor in arguments.values():
        tensor.requires_grad_()
    for gradient in (
        torch.randn(2, 16, 7, device=device).transpose(1, 2),
        torch.randn(7, 2, 16, device=device).transpose(0, 1),
        torch.randn(16, device=device).expand(2, 7, 16),
    ):
        ours, expected = (
            torch.autograd.grad(function(images, **arguments), list(arguments.values()), gradient)
            for function in (OURS, plain_patch_embed)
        )
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("images_dtype", [torch.float32, torch.float16])
def test_images_of_another_dtype_than_the_weight(images_dtype: torch.dtype, device: torch.device) -> None:
    arguments = {name: tensor.to(device, torch.bfloat16) for name, tensor in inputs(2, 8, 8, 4, 16).items()}
    # exact in every dtype: what differs is not the rounding
    images = torch.randint(-8, 8, (2, 3, 8, 8), device=device).float() / 4
    expected = OURS(**arguments | {"images": images.bfloat16()})
    tokens = OURS(**arguments | {"images": images.to(images_dtype)})
    assert tokens.dtype == torch.bfloat16 and torch.equal(tokens, expected)


def test_nan_stays_in_its_patch(device: torch.device) -> None:
    arguments = {name: tensor.to(device) for name, tensor in inputs(2, 8, 8, 4, 16).items()}
    arguments["images"][1, 2, 7, 1] = torch.nan  # third patch of the second image
    wrong = OURS(**arguments).isnan().any(dim=-1)
    assert wrong.nonzero().tolist() == [[1, 3]]


def test_patch_that_does_not_exist_gives_nan(implementation: str, device: torch.device) -> None:
    if implementation == "reference":
        pytest.skip("does not apply: the operator is Triton's")
    a = {name: tensor.to(device) for name, tensor in inputs(2, 8, 8, 4, 16).items()}
    keep_indices = torch.tensor([[0, 4], [-1, 3]], device=device)
    tokens = op.patch_embed_op(
        a["images"], a["weight"], a["bias"], a["pos_embed"], a["cls_token"], None, keep_indices, MEAN, STD
    )
    expected = OURS(**a)
    assert tokens[0, 2].isnan().all() and tokens[1, 1].isnan().all()
    torch.testing.assert_close(tokens[0, :2], expected[0, :2])
    torch.testing.assert_close(tokens[1, 2], expected[1, 4])


def test_frozen_weight_gets_no_gradient(device: torch.device) -> None:
    arguments = {name: tensor.to(device).requires_grad_() for name, tensor in inputs(2, 8, 8, 4, 16).items()}
    arguments["images"] = arguments["images"].detach()
    arguments["weight"] = arguments["weight"].detach()
    OURS(**arguments).sum().backward()
    assert arguments["weight"].grad is None and arguments["bias"].grad.tolist() == [8.0] * 16


def test_empty_batch(device: torch.device) -> None:
    arguments = {name: tensor.to(device).requires_grad_() for name, tensor in inputs(0, 8, 8, 4, 16).items()}
    arguments["images"] = arguments["images"].detach()
    tokens = OURS(**arguments)
    tokens.sum().backward()
    assert tokens.shape == (0, 5, 16) and not arguments["weight"].grad.any()


@pytest.mark.parametrize(
    ("shape", "kept"),
    [
        ((3, 28, 56, 14, 40), None),
        ((3, 28, 56, 14, 40), 3),
        pytest.param((64, 224, 224, 14, 1280), 64, marks=pytest.mark.gpu),
    ],
)
def test_gradients_are_the_same_bits_in_every_run(
    shape: tuple[int, int, int, int, int], kept: int | None, device: torch.device
) -> None:
    if device.type == "cpu" and shape[0] > 3:
        pytest.skip("too slow without a GPU")
    arguments = {name: t.to(device, torch.bfloat16).requires_grad_() for name, t in inputs(*shape).items()}
    images = arguments.pop("images").detach()
    patches = shape[1] * shape[2] // shape[3] ** 2
    keep_indices = None if kept is None else some_patches(shape[0], patches, kept).to(device)
    cotangent = torch.randn(shape[0], 1 + (kept or patches), shape[4], device=device, dtype=torch.bfloat16)

    def run() -> tuple[Tensor, ...]:
        tokens = OURS(images, **arguments, keep_indices=keep_indices)
        return torch.autograd.grad(tokens, list(arguments.values()), cotangent)

    assert all(torch.equal(first, second) for first, second in zip(run(), run(), strict=True))


def test_compiles_without_graph_break(device: torch.device) -> None:
    arguments = {name: tensor.to(device).requires_grad_() for name, tensor in inputs(3, 8, 8, 4, 16).items()}
    del arguments["images"]
    compiled = torch.compile(
        lambda images, keep, **parameters: OURS(images, **parameters, keep_indices=keep).sin(),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    for batch in (3, 2):
        images = torch.randint(0, 256, (batch, 8, 8, 3), dtype=torch.uint8, device=device)
        keep_indices = some_patches(batch, 4, 2).to(device)
        result = compiled(images, keep_indices, **arguments)
        expected = OURS(images, **arguments, keep_indices=keep_indices).sin()
        torch.testing.assert_close(result, expected)
        both = [torch.autograd.grad(output.sum(), list(arguments.values())) for output in (result, expected)]
        for actual, gradient in zip(*both, strict=True):
            torch.testing.assert_close(actual, gradient)


@pytest.mark.parametrize("full", [False, True])
def test_registered_operators(implementation: str, full: bool, device: torch.device) -> None:
    if implementation == "reference":
        pytest.skip("does not apply: the operator is Triton's")
    a = {name: tensor.to(device).requires_grad_() for name, tensor in inputs(2, 8, 8, 4, 16, registers=3).items()}
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
    if full:
        optional = (a["pos_embed"], a["cls_token"], a["register_tokens"], some_patches(2, 4, 2).to(device))
    else:
        images, optional = a["images"].detach(), (None, None, None, None)
    arguments = (images, a["weight"], a["bias"], *optional, MEAN, STD)
    torch.library.opcheck(op.patch_embed_op, arguments)
    grad = torch.randn_like(op.patch_embed_op(*arguments)).detach()
    weight = a["weight"].detach()
    backward = (grad, images, weight, optional[3], full, 3 if full else 0, MEAN, STD)
    for with_weight in (True, False):
        torch.library.opcheck(op.patch_embed_backward_op, (*backward, with_weight, torch.float32))


@pytest.mark.parametrize("bare", [False, True])
def test_autocast_multiplies_in_its_dtype(bare: bool, device: torch.device) -> None:
    """Tokens and gradients stay in the dtype of the parameters; what is only added is not rounded."""
    a = {n: t.to(device).requires_grad_() for n, t in inputs(2, 8, 8, 4, 16, cls=not bare, registers=2).items()}
    if bare:
        del a["pos_embed"], a["register_tokens"]
    images = a.pop("images").detach()
    results = []
    for autocast in (False, True):
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            tokens = OURS(images, **a)
        cotangent = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1)).to(tokens)
        results.append([tokens, *torch.autograd.grad(tokens, list(a.values()), cotangent)])
    assert [tensor.dtype for tensor in results[1]] == [torch.float32] * (1 + len(a))
    full, low = (dict(zip(("tokens", *a), tensors, strict=True)) for tensors in results)
    eps = torch.finfo(torch.bfloat16).eps
    for name in ("tokens", "weight"):
        error = (low[name] - full[name]).abs().max() / full[name].abs().max()
        assert 0 < error < 4 * eps, name
    if not bare:
        assert torch.equal(low["tokens"][:, :3], full["tokens"][:, :3])  # class token and registers
        torch.testing.assert_close(low["pos_embed"], full["pos_embed"])


def test_second_derivative(implementation: str, device: torch.device) -> None:
    arguments = {name: tensor.to(device).requires_grad_() for name, tensor in inputs(2, 8, 8, 4, 16).items()}
    arguments["images"] = arguments["images"].detach()
    gradient = torch.autograd.grad(OURS(**arguments).sin().sum(), arguments["weight"], create_graph=True)[0]
    if implementation == "triton":
        with pytest.raises(NotImplementedError, match="patch_embed has no second derivative"):
            gradient.sum().backward()
    else:
        gradient.square().sum().backward()
        assert arguments["weight"].grad.abs().sum() > 0


KEEP = torch.tensor([[0, 1], [3, 2]])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.zeros(2, 3, 9, 8)}, ValueError, "images of 9 x 8 pixels cannot be cut into patches of 4 x 4"),
        ({"images": torch.zeros(2, 8, 8, 3)}, ValueError, r"images must have shape \[B, 3, H, W\]"),
        ({"images": torch.zeros(2, 8, 8, 4, dtype=torch.uint8)}, ValueError, r"images must have shape \[B, H, W, 3\]"),
        ({"images": torch.zeros(8, 8, 3, dtype=torch.uint8)}, ValueError, "images must have shape"),
        (
            {"images": torch.zeros(2, 3, 8, 8, dtype=torch.int64)},
            TypeError,
            r"images \(unless uint8\) must be floating",
        ),
        ({"weight": torch.zeros(16, 1, 4, 4)}, ValueError, r"weight must have shape \[D, 3, P, P\]"),
        ({"weight": torch.zeros(16, 3, 4, 2)}, ValueError, r"weight must have shape \[D, 3, P, P\]"),
        ({"bias": torch.zeros(1)}, ValueError, "bias must have shape"),
        ({"pos_embed": torch.zeros(1, 4, 16)}, ValueError, r"pos_embed must have shape \[1, 5, 16\], got \[1, 4, 16\]"),
        ({"cls_token": torch.zeros(16)}, ValueError, r"cls_token must have shape \[1, 1, 16\]"),
        ({"cls_token": torch.zeros(1, 1, 16).half()}, TypeError, "cls_token must be torch.float32"),
        ({"register_tokens": torch.zeros(2, 16)}, ValueError, r"register_tokens must have shape \[1, R, 16\]"),
        ({"register_tokens": torch.zeros(2, 1, 16)}, ValueError, r"register_tokens must have shape \[1, 1, 16\]"),
        ({"keep_indices": torch.zeros(2, 1)}, TypeError, "keep_indices must be int64"),
        ({"keep_indices": KEEP[:1]}, ValueError, r"keep_indices must have shape \[2, K\], got \[1, 2\]"),
        ({"keep_indices": KEEP + 2}, ValueError, r"keep_indices must lie in 0..3, got values from 2 to 5"),
        ({"keep_indices": KEEP - 1}, ValueError, r"keep_indices must lie in 0..3, got values from -1 to 2"),
        ({"keep_indices": KEEP // 2}, ValueError, "keep_indices must name each patch of an image once"),
        ({"mean": (0.5,)}, ValueError, "mean and std must have one number for each of 3 channels"),
    ],
)
def test_errors_name_the_argument(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        patch_embed(**({**inputs(2, 8, 8, 4, 16), "mean": MEAN, "std": STD} | change))
