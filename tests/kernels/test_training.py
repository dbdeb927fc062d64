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
from tests.in_full import in_full

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
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


def batches(
    image: int, classes: int, batch: int, device: torch.device, steps: int = 200
) -> Iterator[tuple[Tensor, Tensor]]:
    """Noisy copies of one random image a class: uint8 [B, H, W, 3] and labels, the same ones at each call."""
    generator = torch.Generator().manual_seed(2)
    prototypes = torch.randint(0, 256, (classes, image, image, 3), generator=generator)
    for _ in range(steps):
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
@pytest.mark.parametrize(("classes", "steps", "lr"), [(2, 16, 0.1), in_full(4, 200, 0.05)])
def test_kernels_follow_the_loss_curve_of_plain_pytorch(classes: int, steps: int, lr: float) -> None:
    if not dispatch.INTERPRETED:
        pytest.skip("does not apply: kernels need a GPU or Triton's interpreter")
    start = SmallViT(image=8, patch=4, width=16, depth=2, heads=1, classes=classes)
    ours, plain = copy.deepcopy(start), copy.deepcopy(start)
    settings = {"image": 8, "classes": classes, "batch": 2, "device": torch.device("cpu"), "steps": steps}
    expected = train(plain, plain_logits, F.cross_entropy, batches(**settings), lr=lr)
    with dispatch.using("triton"):
        losses = train(ours, by_kernels, FusedCrossEntropy(), batches(**settings), lr=lr)

    assert expected[-4:].mean() < 0.1 * expected[:8].mean()
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    for name, error in deviations(ours, plain, start).items():
        assert error <= 0.002, name


@pytest.mark.gpu
@pytest.mark.slow
def test_vit_ti_in_bfloat16_is_as_close_to_float32_as_plain_pytorch() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    start = SmallViT(image=224, patch=16, width=192, depth=12, heads=3, classes=16).cuda()
    models, losses = {}, {}
    for name, logits, loss, dtype in (
        ("float32", plain_logits, F.cross_entropy, None),
        ("plain", plain_logits, F.cross_entropy, torch.bfloat16),
        ("kernels", by_kernels, FusedCrossEntropy(), torch.bfloat16),
    ):
        models[name] = copy.deepcopy(start)
        data = batches(image=224, classes=16, batch=64, device=torch.device("cuda"))
        with dispatch.using("triton"), torch.backends.cudnn.flags(allow_tf32=False):
            curve = train(models[name], logits, loss, data, lr=0.02, autocast=dtype)
        losses[name] = curve.double().unfold(0, 10, 1).mean(1)  # [191]

    exact = losses["float32"]
    assert exact[-1] < 0.1 * exact[0]
    error, plain_error = ((losses[name] - exact).abs().max() for name in ("kernels", "plain"))
    assert error <= 2 * plain_error + 0.002 * exact[0]
    plain = deviations(models["plain"], models["float32"], start)
    for name, error in deviations(models["kernels"], models["float32"], start).items():
        assert error <= 2 * plain[name] + 0.005, name


def deviations(model: nn.Module, exact: nn.Module, start: nn.Module) -> dict[str, float]:
    """How far each parameter ended from where it should, as a share of the way it went.

    A gradient that is off by one per cent moves its parameter about one per cent too far.
    """
    first, wanted = dict(start.named_parameters()), dict(exact.named_parameters())
    with torch.no_grad():
        return {
            name: ((result - wanted[name]).norm() / (wanted[name] - first[name]).norm()).item()
            for name, result in model.named_parameters()
        }
