from functools import partial

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_accurate
from torch import Tensor

from fastvit_kernels import patch_embed

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OURS = partial(patch_embed, mean=MEAN, std=STD)


def plain_patch_embed(
    images: Tensor, weight: Tensor, bias: Tensor, pos_embed: Tensor | None = None, cls_token: Tensor | None = None
) -> Tensor:
    tokens = F.conv2d(images, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    if cls_token is not None:
        tokens = torch.cat([cls_token.repeat(len(images), 1, 1), tokens], dim=1)
    return tokens if pos_embed is None else tokens + pos_embed


def inputs(batch: int, height: int, width: int, patch: int, embed_dim: int, cls: bool = True) -> dict[str, Tensor]:
    tokens = (height // patch) * (width // patch)
    arguments = {
        "images": torch.randn(batch, 3, height, width),
        "weight": torch.randn(embed_dim, 3, patch, patch) / (3 * patch**2) ** 0.5,
        "bias": 0.1 * torch.randn(embed_dim),
        "pos_embed": 0.2 * torch.randn(1, tokens + cls, embed_dim),
    }
    return arguments | ({"cls_token": torch.randn(1, 1, embed_dim)} if cls else {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize("shape", [(1, 14, 14, 14, 80), (2, 56, 28, 14, 33), (3, 16, 24, 4, 65)])
def test_equals_convolution(
    shape: tuple[int, int, int, int, int], cls: bool, dtype: torch.dtype, device: torch.device
) -> None:
    assert_accurate(OURS, plain_patch_embed, inputs(*shape, cls=cls), dtype, device)


def test_no_position_and_no_class_token(device: torch.device) -> None:
    arguments = inputs(2, 8, 8, 4, 16, cls=False)
    del arguments["pos_embed"]
    assert_accurate(OURS, plain_patch_embed, arguments, torch.float32, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixels_in_either_layout_equal_normalised_images(dtype: torch.dtype, device: torch.device) -> None:
    arguments = {name: tensor.to(device, dtype) for name, tensor in inputs(2, 28, 42, 14, 48).items()}
    del arguments["images"]
    pixels = torch.randint(0, 256, (2, 28, 42, 3), dtype=torch.uint8, device=device)
    channels_first = pixels.permute(0, 3, 1, 2).contiguous()
    mean, std = torch.tensor([MEAN, STD], device=device)[:, :, None, None]
    normalised = (channels_first.float() / 255 - mean) / std
    from_bytes = OURS(pixels, **arguments)
    assert from_bytes.dtype == dtype
    assert torch.equal(from_bytes, OURS(channels_first, **arguments))
    assert torch.equal(from_bytes, OURS(normalised, **arguments))


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


def test_non_contiguous_images(device: torch.device) -> None:
    arguments = inputs(2, 8, 8, 4, 16)
    arguments["images"] = torch.randn(2, 8, 8, 3).permute(0, 3, 1, 2)
    assert_accurate(OURS, plain_patch_embed, arguments, torch.float32, device)


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
        ({"mean": (0.5,)}, ValueError, "mean and std must have one number for each of 3 channels"),
    ],
)
def test_errors_name_the_argument(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        patch_embed(**({**inputs(2, 8, 8, 4, 16), "mean": MEAN, "std": STD} | change))
