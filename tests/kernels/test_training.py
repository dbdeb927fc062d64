"""A Vision Transformer trained by the kernels follows the same loss curve as one trained by plain PyTorch.

The optimiser is SGD: its steps are proportional to the gradient, so a gradient that is off by a factor shows.
"""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit_kernels import FusedBlock, FusedCrossEntropy, FusedLayerNorm, FusedPatchEmbed, dispatch

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
STEPS = 200
Logits = Callable[[nn.Module, Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


class SmallViT(nn.Module):
    def __init__(self, image: int, patch: int, width: int, depth: int, heads: int, classes: int) -> None:
        super().__init__()
        self.heads = heads
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + (image // patch) ** 2, width))
        self.patch_embed = FusedPatchEmbed(patch, width, MEAN, STD)
        self.blocks = nn.Sequential(*(FusedBlock(width, heads, 4 * width) for _ in range(depth)))
        self.norm = FusedLayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.blocks(self.patch_embed(images, self.pos_embed, self.cls_token))
        return self.head(self.norm(tokens)[:, 0])


def plain_logits(model: SmallViT, images: Tensor) -> Tensor:
    """The forward of SmallViT, written with PyTorch's own functions on the same parameters."""
    p = dict(model.named_parameters())
    width = p["norm.weight"].shape[0]

    def layer(name: str, x: Tensor) -> Tensor:
        return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (width,), p[f"{name}.weight"], p[f"{name}.bias"], 1e-6)

    mean, std = (torch.tensor(values, device=images.device) for values in (MEAN, STD))
    pixels = ((images / 255 - mean) / std).permute(0, 3, 1, 2)  # [B, 3, H, W]
    weight = p["patch_embed.proj.weight"]
    patches = F.conv2d(pixels, weight, p["patch_embed.proj.bias"], stride=weight.shape[-1]).flatten(2).mT
    x = torch.cat([p["cls_token"].expand(len(images), -1, -1), patches], dim=1) + p["pos_embed"]
    for i in range(len(model.blocks)):
        name = f"blocks.{i}"
        qkv = layer(f"{name}.attn.qkv", norm(f"{name}.norm1", x)).unflatten(-1, (3, model.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, H, N, d] each
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + layer(f"{name}.attn.proj", attended)
        x = x + layer(f"{name}.mlp.fc2", F.gelu(layer(f"{name}.mlp.fc1", norm(f"{name}.norm2", x))))
    return layer("head", norm("norm", x)[:, 0])


def batches(image: int, classes: int, batch: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Noisy copies of one random image a class: uint8 [B, H, W, 3] and labels, the same ones at each call."""
    generator = torch.Generator().manual_seed(2)
    prototypes = torch.randint(0, 256, (classes, image, image, 3), generator=generator)
    for _ in range(STEPS):
        labels = torch.randint(0, classes, (batch,), generator=generator)
        noise = torch.randint(0, 256, (batch, image, image, 3), generator=generator)
        yield ((2 * prototypes[labels] + noise) // 3).to(device, torch.uint8), labels.to(device)


def train(
    model: nn.Module,
    logits: Logits,
    loss: Loss,
    data: Iterator[tuple[Tensor, Tensor]],
    lr: float,
    autocast: torch.dtype | None = None,
) -> Tensor:
    """Trains in place and returns the loss of each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    losses = []
    for images, labels in data:
        with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
            step_loss = loss(logits(model, images), labels)
        step_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(step_loss.detach())
    return torch.stack(losses).cpu()


def by_kernels(model: nn.Module, images: Tensor) -> Tensor:
    return model(images)


@pytest.mark.slow
def test_kernels_follow_the_loss_curve_of_plain_pytorch() -> None:
    if not dispatch.INTERPRETED:
        pytest.skip("on the CPU the kernels run by the interpreter only, which is off")
    start = SmallViT(image=8, patch=4, width=16, depth=2, heads=1, classes=4)
    ours, plain = copy.deepcopy(start), copy.deepcopy(start)
    settings = {"image": 8, "classes": 4, "batch": 2, "device": torch.device("cpu")}
    expected = train(plain, plain_logits, F.cross_entropy, batches(**settings), lr=0.05)
    with dispatch.using("triton"):
        losses = train(ours, by_kernels, FusedCrossEntropy(), batches(**settings), lr=0.05)

    assert expected[-20:].mean() < 0.1 * expected[:20].mean()
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    # a gradient off by one per cent moves its parameter about one per cent too far
    first = dict(start.named_parameters())
    for (name, result), wanted in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert (result - wanted).norm() <= 0.002 * (wanted - first[name]).norm(), name


@pytest.mark.gpu
@pytest.mark.slow
def test_vit_ti_in_bfloat16_is_as_close_to_float32_as_plain_pytorch() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    start = SmallViT(image=224, patch=16, width=192, depth=12, heads=3, classes=16).cuda()
    settings = {"image": 224, "classes": 16, "batch": 64, "device": torch.device("cuda")}
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        exact, plain = (
            train(copy.deepcopy(start), plain_logits, F.cross_entropy, batches(**settings), lr=0.02, autocast=autocast)
            for autocast in (None, torch.bfloat16)
        )
        with dispatch.using("triton"):
            ours = train(start, by_kernels, FusedCrossEntropy(), batches(**settings), lr=0.02, autocast=torch.bfloat16)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    assert_follows(ours, plain, exact)


def assert_follows(ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    """The error of a curve, smoothed over ten steps, is at most twice that of plain PyTorch in the same dtype.

    Or, where that happens to be near none, one per cent of the first loss.
    """
    ours, plain, exact = (curve.double().unfold(0, 10, 1).mean(1) for curve in (ours, plain, exact))
    assert exact[-1] < 0.1 * exact[0]
    bound = 2 * (plain - exact).abs().max() + 0.01 * exact[0]
    assert (ours - exact).abs().max() <= bound
