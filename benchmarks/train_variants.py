"""The training steps to compare: same weights, same batches, same optimizer."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import step_overhead
from benchmarks.cuda_graph import Captured
from benchmarks.fp8_peers import torchao_layers, transformer_engine
from benchmarks.peers import MAX_AUTOTUNE, need, need_vision
from benchmarks.registry import Unusable
from benchmarks.shapes import Shape
from fastvit_engine.config import Config, ModelConfig
from fastvit_engine.data import Batch
from fastvit_engine.data.stream.batch_split import split_batch
from fastvit_engine.distributed.world import World
from fastvit_engine.engine.build import build_engine
from fastvit_engine.engine.optimizers.groups import parameter_groups
from fastvit_engine.models import VisionTransformer, build_vit, computed_flops, training_flops
from fastvit_engine.train.prepared_model import prepare_model
from fastvit_kernels import FusedCrossEntropy, accelerate, dispatch
from fastvit_kernels.fp8.setting import Scaling, obstacle

CLASSES = 1000
MEAN = STD = (0.5, 0.5, 0.5)
LEARNING_RATE = 1e-4

Step = Callable[[Tensor, Tensor], Tensor]  # (images uint8 [B, H, W, 3], labels int64 [B]) on the device -> loss


@dataclass(frozen=True)
class Setup:
    """What all variants have in common."""

    shape: Shape
    batch: int
    precision: str  # fp32 or bf16
    world: World

    def config(self, *, train: Mapping[str, Any] | None = None, **sections: Any) -> Config:
        """train: settings of that section beside those of all variants, or in their place."""
        shape = self.shape
        trained = {"global_batch_size": self.batch, "precision": self.precision, "grad_clip": 1.0}
        model = {
            "name": f"B/{shape.patch}",  # every number that the size implies is given
            "image_size": shape.image,
            "num_classes": CLASSES,
            "width": shape.width,
            "depth": shape.depth,
            "heads": shape.heads,
            "mlp_dim": shape.mlp_dim,
        }
        return Config.model_validate(
            {
                "model": model,
                "train": trained | dict(train or {}),
                "optimizer": {"learning_rate": LEARNING_RATE},
                **sections,
            }
        )

    def our_model(self) -> VisionTransformer:
        """The weights that all variants start from. The head is not zero, or the first steps would train it alone."""
        torch.manual_seed(0)
        with torch.device(self.world.device):
            model = build_vit(self.config().model, mean=MEAN, std=STD)
            assert isinstance(model.head, nn.Linear)
            nn.init.normal_(model.head.weight, std=0.02)
        return model

    def autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.world.device.type, torch.bfloat16)


@dataclass(frozen=True)
class Variant:
    """One way to do a training step."""

    name: str
    title: str
    build: Callable[[Setup], Step]
    ours: bool = False
    flops: Callable[[ModelConfig], int] = training_flops  # that it computes for an image
    slow: str | None = None  # why a quick run on a CPU leaves it out


def bare_loop(
    setup: Setup, model: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor], *, capturable: bool = False
) -> Step:
    """Autocast, backward pass, clipping, AdamW: what a training script without an engine does.

    A `capturable` step keeps all that changes from step to step on the device, and may be captured in a CUDA graph.
    """
    config = setup.config()
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.optimizer),
        lr=LEARNING_RATE,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        fused=capturable or setup.world.device.type == "cuda",
        capturable=capturable,
    )
    parameters = list(model.parameters())

    def step(images: Tensor, labels: Tensor) -> Tensor:
        with setup.autocast():
            loss = loss_of(images, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def fastvit(setup: Setup) -> Step:
    model, criterion = setup.our_model().train(), FusedCrossEntropy()
    return bare_loop(setup, model, lambda images, labels: criterion(model(images), labels))


def fastvit_graph(setup: Setup) -> Step:
    if setup.world.device.type != "cuda":
        raise Unusable("a CUDA graph needs a GPU")
    return Captured(graph_step(setup))


def graph_step(setup: Setup) -> Step:
    """The step of `fastvit`, ready to be captured."""
    model, criterion = setup.our_model().train(), FusedCrossEntropy()
    return bare_loop(setup, model, lambda images, labels: criterion(model(images), labels), capturable=True)


def fastvit_deepspeed(stage: int, *, fp8: Scaling | None = None) -> Callable[[Setup], Step]:
    """Through the engine that `fastvit train` builds, with products in FP8 if their scaling is given."""

    def build(setup: Setup) -> Step:
        how: dict[str, Any] = {}
        if fp8 is not None:
            emulate = setup.world.device.type != "cuda"
            if not emulate and (reason := obstacle(setup.world.device)) is not None:
                raise Unusable(reason)
            how = {"precision": "fp8", "fp8": {"scaling": fp8, "emulate": emulate}}
        return engine_step(setup, setup.config(zero={"stage": stage}, train=how))

    return build


def engine_step(setup: Setup, config: Config) -> Step:
    """Through the engine that `fastvit train` builds, as `config` says, which leaves nothing open."""
    need("deepspeed")
    model = setup.our_model()
    prepare_model(model, config, setup.world.device)
    engine = build_engine(model, config, split_batch(config, 1), setup.world)
    criterion = FusedCrossEntropy()
    engine.model.train()

    def step(images: Tensor, labels: Tensor) -> Tensor:
        loss = criterion(engine.model(images), labels)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step


def timm_model(setup: Setup) -> nn.Module:
    vit, shape = need_vision("timm.models.vision_transformer"), setup.shape
    with torch.device(setup.world.device):
        model = vit.VisionTransformer(
            img_size=shape.image,
            patch_size=shape.patch,
            num_classes=CLASSES,
            embed_dim=shape.width,
            depth=shape.depth,
            num_heads=shape.heads,
            mlp_ratio=shape.mlp_dim / shape.width,
        )
    model.load_state_dict(setup.our_model().state_dict())
    return model.train()


def timm(compile_mode: str | None = None, *, cudnn: bool = False, fused: bool = False) -> Callable[[Setup], Step]:
    def build(setup: Setup) -> Step:
        model = timm_model(setup)
        if cudnn and setup.world.device.type != "cuda":
            raise Unusable("cuDNN needs an NVIDIA GPU")
        if fused:
            accelerate(model)
        if compile_mode is not None:
            model.compile(dynamic=False, mode=compile_mode)
        order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]

        def loss_of(images: Tensor, labels: Tensor) -> Tensor:
            with sdpa_kernel(order, set_priority=True) if cudnn else nullcontext():
                return F.cross_entropy(model(normalised(images)).float(), labels)

        return bare_loop(setup, model, loss_of)

    return build


def timm_in_fp8(library: Literal["torchao", "transformer_engine"]) -> Callable[[Setup], Step]:
    """timm's model with the linear layers of its blocks in FP8, by one scale per tensor."""

    def build(setup: Setup) -> Step:
        on_gpu, rows = setup.world.device.type == "cuda", setup.batch * setup.shape.tokens
        reason = obstacle(setup.world.device)
        if reason is not None and (on_gpu or library != "torchao"):  # torchao is emulated on a CPU
            raise Unusable(reason)
        model = timm_model(setup)
        context: Callable[[], AbstractContextManager[Any]] = nullcontext
        if library == "torchao":
            torchao_layers(model, "tensorwise", rows=rows, wanted=lambda name: name.startswith("blocks."))
            model.compile(dynamic=False)
        else:
            engine, context = transformer_engine(rows)
            exchange_linear_layers(model.get_submodule("blocks"), engine.Linear)

        def loss_of(images: Tensor, labels: Tensor) -> Tensor:
            with context():
                return F.cross_entropy(model(normalised(images)).float(), labels)

        return bare_loop(setup, model, loss_of)

    return build


def exchange_linear_layers(module: nn.Module, linear: Callable[..., nn.Module]) -> None:
    """Puts a library's own linear layers in the place of those of `module`, with their weights."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear):
            path, _, last = name.rpartition(".")
            made = linear(layer.in_features, layer.out_features, params_dtype=layer.weight.dtype)
            made.load_state_dict(layer.state_dict(), strict=False)  # it has states of its own besides
            setattr(module.get_submodule(path), last, made)


def transformers(setup: Setup) -> Step:
    library, shape = need_vision("transformers"), setup.shape
    config = library.ViTConfig(
        hidden_size=shape.width,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        intermediate_size=shape.mlp_dim,
        image_size=shape.image,
        patch_size=shape.patch,
        num_labels=CLASSES,
        layer_norm_eps=1e-6,
        attn_implementation="sdpa",
    )
    with torch.device(setup.world.device):
        model = library.ViTForImageClassification(config)
    model.load_state_dict(dict(as_transformers(setup.our_model().state_dict())))
    model.train()
    return bare_loop(
        setup, model, lambda images, labels: F.cross_entropy(model(normalised(images)).logits.float(), labels)
    )


def as_transformers(weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Our weights under the names of transformers' ViT, where q, k and v are layers of their own."""
    renamed = (
        ("patch_embed.proj", "vit.embeddings.patch_embeddings.projection"),
        ("cls_token", "vit.embeddings.cls_token"),
        ("pos_embed", "vit.embeddings.position_embeddings"),
        ("blocks.", "vit.layers."),
        ("attn.proj", "attention.o_proj"),
        ("norm1", "layernorm_before"),
        ("norm2", "layernorm_after"),
        ("head.", "classifier."),
    )
    for name, tensor in weights.items():
        if name.startswith("norm."):
            name = f"vit.layernorm.{name.removeprefix('norm.')}"
        for ours, theirs in renamed:
            name = name.replace(ours, theirs)
        if "attn.qkv" in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                yield name.replace("attn.qkv", f"attention.{letter}_proj"), part
        else:
            yield name, tensor


def normalised(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] as float32 [B, 3, H, W]: done on the device, as timm's prefetcher does."""
    return images.permute(0, 3, 1, 2).float().div_(255).sub_(0.5).div_(0.5)


def reference(setup: Setup) -> Step:
    """Plain timm in float32 without autocast, a few images at a time; without timm, our plain PyTorch path.

    On a GPU products are in TF32: eight times as fast, and a hundredth of the distance that bf16 may have.
    """
    if setup.world.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        model = timm_model(setup)
        run: Callable[[Tensor], Tensor] = lambda images: model(normalised(images))  # noqa: E731
    except Unusable:
        dispatch.use("reference")
        model = setup.our_model().train()
        run = model
    groups = parameter_groups(model, setup.config().optimizer)
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=setup.config().optimizer.betas)
    at_once = 8

    def step(images: Tensor, labels: Tensor) -> Tensor:
        total = torch.zeros((), device=images.device)
        for part, given in zip(images.split(at_once), labels.split(at_once), strict=True):
            loss = F.cross_entropy(run(part), given, reduction="sum") / len(labels)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


REFERENCE = Variant("reference", "the losses that all others must follow", reference)
COMPILES = "compiles for long"
BETWEEN = "what it runs is in ZeRO-1, ZeRO-3 and the suite `overhead`"
# The most informative come first, since time may be limited.
VARIANTS = (
    Variant("fastvit", "this package's model in a bare loop", fastvit, ours=True, flops=computed_flops),
    Variant(
        "fastvit ZeRO-1",
        "through the engine's DeepSpeed at ZeRO 1",
        fastvit_deepspeed(1),
        ours=True,
        flops=computed_flops,
    ),
    Variant("timm", "timm, eager", timm()),
    Variant("timm compile", "timm, torch.compile", timm("default"), slow=COMPILES),
    Variant(
        "fastvit CUDA graph",
        "the bare loop, each step one CUDA graph",
        fastvit_graph,
        ours=True,
        flops=computed_flops,
    ),
    Variant("fastvit ZeRO-3", "at ZeRO 3", fastvit_deepspeed(3), ours=True, flops=computed_flops),
    Variant(
        "timm compile cudnn", "timm, torch.compile, cuDNN attention first", timm("default", cudnn=True), slow=COMPILES
    ),
    Variant(
        "fastvit ZeRO-0",
        "through the engine's DeepSpeed without ZeRO",
        fastvit_deepspeed(0),
        ours=True,
        flops=computed_flops,
        slow=BETWEEN,
    ),
    Variant("fastvit ZeRO-2", "at ZeRO 2", fastvit_deepspeed(2), ours=True, flops=computed_flops, slow=BETWEEN),
    Variant("timm + fastvit", "timm's model after `fastvit_kernels.accelerate`", timm(fused=True), ours=True),
    Variant("transformers", "Hugging Face transformers, SDPA", transformers),
    Variant(
        "timm compile max-autotune",
        "timm, max-autotune, cuDNN attention first",
        timm(MAX_AUTOTUNE, cudnn=True),
        slow=COMPILES,
    ),
)


def resident_batches(setup: Setup) -> list[Batch]:
    """Random images and labels in memory."""
    return step_overhead.resident_batches(setup.config())
