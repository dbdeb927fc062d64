"""Accelerated models and the package's modules with parts frozen, sharded by DeepSpeed ZeRO-3 and by FSDP2."""

import importlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastvit_kernels import FusedBlock, FusedLayerNorm, FusedLayerNormMLP, FusedPatchEmbed, accelerate
from fastvit_kernels.gathered import GatheredWhole
from tests.in_full import IN_FULL, in_full
from tests.kernels.integrations.conftest import TORCHVISION  # noqa: F401 - a rank imports this file alone
from tests.kernels.integrations.equality import randomised

vision_transformer = pytest.importorskip("timm.models.vision_transformer", reason="timm is not installed")

eva = pytest.importorskip("timm.models.eva", reason="timm is not installed")

WORLD = 2
IMAGES = torch.randn(2 * WORLD, 3, 8, 8, generator=torch.Generator().manual_seed(5))
LEARNS: dict[str, Callable[[str], bool]] = {
    "all": lambda name: True,
    "head": lambda name: name.startswith("head"),
    "norms": lambda name: "norm" in name,
    "last block": lambda name: name.startswith("blocks.1"),
    "first block": lambda name: name.startswith("blocks.0"),
    "attention": lambda name: "attn" in name,
    "MLPs": lambda name: ".mlp" in name,
    "biases": lambda name: name.endswith("bias"),
    "layer scales": lambda name: "gamma" in name,
    "position": lambda name: name == "pos_embed",
    "patches": lambda name: name.startswith("patch_embed"),
}


class Own(nn.Module):
    """Modules of the package, of which DeepSpeed gathers some whole."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = FusedPatchEmbed(4, 16, (0.5,) * 3, (0.5,) * 3)
        self.pos_embed = nn.Parameter(torch.randn(1, 4, 16))
        self.blocks = nn.Sequential(FusedBlock(16, 2, 24, layer_scale=0.5), FusedLayerNormMLP(16, 24))
        self.norm = FusedLayerNorm(16)
        self.head = nn.Linear(16, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.patch_embed(images, self.pos_embed))).mean(dim=1))


def timm_vit() -> nn.Module:
    return vision_transformer.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3, init_values=0.5
    )


def rotary() -> nn.Module:
    """With all that EVA-02 and DINOv3 have, and QK norm."""
    return eva.Eva(
        img_size=8,
        patch_size=4,
        embed_dim=16,
        depth=2,
        num_heads=2,
        num_classes=3,
        init_values=0.5,
        use_rot_pos_emb=True,
        num_reg_tokens=2,
        swiglu_mlp=True,
        qk_norm=True,
    )


MODELS: dict[str, Callable[[], nn.Module]] = {"timm": timm_vit, "rotary": rotary, "own": Own}


def build(model: str, learns: str) -> nn.Module:
    torch.manual_seed(0)
    built = randomised(MODELS[model]())
    for name, parameter in built.named_parameters():
        parameter.requires_grad_(LEARNS[learns](name))
    return built


def zero3(model: nn.Module, images: Tensor) -> Iterator[Tensor | None]:
    import deepspeed

    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # a minute of C++ for inference alone
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(learned, lr=0.1),
        config={
            "train_micro_batch_size_per_gpu": len(images),
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    engine.backward(engine(images).square().sum())
    for parameter in model.parameters():
        yield deepspeed.utils.safe_get_full_grad(parameter) if parameter.requires_grad else None
    engine.destroy()


def fsdp2(model: nn.Module, images: Tensor) -> Iterator[Tensor | None]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    blocks: Any = model.get_submodule("blocks")
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model(images).square().sum().backward()
    for parameter in model.parameters():
        gradient: Any = parameter.grad
        yield None if gradient is None else gradient.full_tensor()


STRATEGIES = {"ZeRO-3": zero3, "FSDP2": fsdp2}
CASES = [("ZeRO-3", "timm", "norms"), ("ZeRO-3", "timm", "last block"), ("ZeRO-3", "own", "patches")]
CASES += [
    ("ZeRO-3", "rotary", "norms"),
    ("FSDP2", "rotary", "all"),
    ("ZeRO-3", "own", "norms"),
    ("FSDP2", "timm", "last block"),
    ("FSDP2", "own", "norms"),
]
REST = [
    (strategy, model, learns)
    for strategy in STRATEGIES
    for model in MODELS
    for learns in LEARNS
    if (strategy, model, learns) not in CASES
]


def farthest(strategy: str, model: str, learns: str) -> float:
    """How far the gradient of any parameter is from the untouched model's, relative to that."""
    rank, whole, ours = dist.get_rank(), build(model, learns), build(model, learns)
    accelerate(ours)
    (whole(IMAGES).square().sum() / WORLD).backward()  # ranks average
    distances = [0.0]
    gradients = STRATEGIES[strategy](ours, IMAGES[2 * rank : 2 * rank + 2])
    for (name, parameter), gradient in zip(whole.named_parameters(), gradients, strict=True):
        if (parameter.grad is None) != (gradient is None or not gradient.any()):
            raise AssertionError(f"{name}: {gradient} where {parameter.grad} was expected")
        if parameter.grad is not None and gradient is not None:
            distances.append(((gradient - parameter.grad).norm() / parameter.grad.norm()).item())
    return max(distances)


def work(rank: int, folder: Path, cases: list[tuple[str, str, str]]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    for case in cases:
        try:
            found: float | str = farthest(*case)
        except Exception as error:  # one case that fails hides no other
            found = f"{type(error).__name__}: {error}"
        if rank == 0:
            with open(folder / "found", "a") as file:
                file.write(json.dumps([case, found]) + "\n")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], float | str]:
    """What `farthest` says of each case, from one start of two processes: DeepSpeed takes seconds to import."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    folder = tmp_path_factory.mktemp("ranks")
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["tests.kernels.integrations.conftest", "deepspeed", __name__])
    ranks = [forks.Process(target=work, args=(rank, folder, CASES + REST * IN_FULL)) for rank in range(WORLD)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=600)
        rank.kill()
    lines = (folder / "found").read_text().splitlines()
    return {tuple(case): result for case, result in map(json.loads, lines)}


@pytest.mark.parametrize(("strategy", "model", "learns"), [*CASES, *(in_full(*case) for case in REST)])
def test_gradients_are_those_of_the_untouched_model(
    found: dict[tuple[str, ...], float | str], strategy: str, model: str, learns: str
) -> None:
    result = found.get((strategy, model, learns), "it did not end")
    assert isinstance(result, float) and result < 1e-5, result


@pytest.mark.parametrize("kind", ["FusedBlock", "FusedLayerNormMLP", "timm"])
def test_a_backward_hook_finds_the_gradients(kind: str) -> None:
    """DeepSpeed reduces gradients in such a hook, which PyTorch would call too early when no input needs a gradient."""
    made = {"FusedBlock": lambda: FusedBlock(8, 2, 12), "FusedLayerNormMLP": lambda: FusedLayerNormMLP(8, 12)}
    module = made[kind]() if kind in made else vision_transformer.Block(8, 2)
    accelerate(module)
    assert isinstance(module, GatheredWhole)
    seen = []
    module.register_full_backward_hook(lambda own, *_: seen.append(all(p.grad is not None for p in own.parameters())))
    x = torch.randn(2, 3, 8)
    module(x).sum().backward()
    assert seen == [True] and not x.requires_grad and x.grad is None
    with torch.no_grad():
        assert not module(x).requires_grad
    module.requires_grad_(False)
    assert not module(x).requires_grad
