"""Accelerated models, modules and functions under what PyTorch offers to do with a model besides training it.

Whatever is tried gives what the untouched model gives, on the reference path and on that of the kernels, or raises.
"""

import copy
import io
import pickle
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import fastvit_kernels as fk
from fastvit_kernels import accelerate, dispatch, flops, restore
from tests.in_full import in_full
from tests.kernels.integrations.equality import accelerated, randomised, relative

vision_transformer = pytest.importorskip("timm.models.vision_transformer", reason="timm is not installed")

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
SOME = ("cls_token", "patch_embed.proj.weight", "blocks.0.norm1.bias", "blocks.0.attn.qkv.weight", "norm.weight")


def vit(**options: Any) -> nn.Module:
    settings = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 3}
    return randomised(vision_transformer.VisionTransformer(**(settings | options))).eval()


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters() if name in SOME}


def directions(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(6)
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}


def forward(model: nn.Module) -> Callable[..., Tensor]:
    return lambda own, images=IMAGES: functional_call(model, own, (images,))


def loss(model: nn.Module) -> Callable[..., Tensor]:
    return lambda own, images=IMAGES: forward(model)(own, images).sin().sum()


def by_vjp(model: nn.Module) -> Any:
    output, pull = vjp(forward(model), parameters(model))
    return output, pull(output.cos())[0]


def by_jvp(model: nn.Module) -> Any:
    own = parameters(model)
    return jvp(forward(model), (own,), (directions(own),))


def per_image_gradients(model: nn.Module) -> Any:
    return vmap(lambda image: grad(loss(model))(parameters(model), image[None]))(IMAGES)


def by_dual_numbers(model: nn.Module) -> Any:
    own = parameters(model)
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(own[name], way) for name, way in directions(own).items()}
        return tuple(forward_ad.unpack_dual(forward(model)(duals)))


def forward_over_reverse(model: nn.Module) -> Any:
    own = parameters(model)
    return jvp(grad(loss(model)), (own,), (directions(own),))[1]


def of_images(model: nn.Module) -> Any:
    return jvp(model, (IMAGES,), (IMAGES.flip(0),))[1], grad(lambda images: model(images).sin().sum())(IMAGES)


def one_jacobian(by: Callable[..., Any]) -> Callable[[nn.Module], Any]:
    def of(model: nn.Module) -> Any:
        own = parameters(model)["blocks.0.norm1.bias"]
        return by(lambda bias: functional_call(model, {"blocks.0.norm1.bias": bias}, (IMAGES,)))(own)

    return of


def batched_backward(model: nn.Module) -> Any:
    """The forward pass is an ordinary one, the backward pass is vectorised."""
    wanted = [model.get_parameter(name) for name in SOME]
    return torch.autograd.grad(model(IMAGES)[0, :2], wanted, torch.eye(2), is_grads_batched=True)


def compiled(model: nn.Module) -> Any:
    own = parameters(model)
    return torch.compile(grad(loss(model)), backend="aot_eager", fullgraph=True)(own)


TRANSFORMS: dict[str, Callable[[nn.Module], Any]] = {
    "grad": lambda model: grad(loss(model))(parameters(model)),
    "vjp": by_vjp,
    "jvp": by_jvp,
    "jacrev": one_jacobian(jacrev),
    "jacfwd": one_jacobian(jacfwd),
    "vmap": lambda model: vmap(lambda image: model(image[None])[0])(IMAGES),
    "per-image gradients": per_image_gradients,
    "dual numbers": by_dual_numbers,
    "forward over reverse": forward_over_reverse,
    "of images": of_images,
    "batched backward": batched_backward,
    "compiled": compiled,
}


def leaves(result: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("name", [in_full(name) if name == "compiled" else name for name in TRANSFORMS])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_of_models(name: str, implementation: str) -> None:
    plain = vit(init_values=0.5)
    ours, _ = accelerated(plain)
    with sdpa_kernel(SDPBackend.MATH):  # the others have no forward mode
        found, expected = (leaves(TRANSFORMS[name](model)) for model in (ours, plain))
    for ours_, theirs in zip(found, expected, strict=True):
        assert theirs.norm() > 0 and relative(ours_, theirs) <= 1e-5


def tensors(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(0.5 * torch.randn(shape, dtype=torch.float64) for shape in shapes)


NORM, ATTENTION, MLP = ((4,), (4,)), ((12, 4), (12,), (4, 4), (4,)), ((6, 4), (6,), (4, 6), (4,))
ANGLES = torch.outer(torch.arange(3.0), torch.tensor([1.0, 0.1, 1.0, 0.1]))
GATED = ((12, 4), (12,), (4, 6), (4,))
LABELS = torch.tensor([2, 0, 1])
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "layer_norm": (fk.layer_norm, ((2, 4), *NORM)),
    "add_layer_norm": (lambda *x: torch.cat(fk.add_layer_norm(*x)), ((2, 4), (2, 4), *NORM)),
    "attention": (fk.attention, ((1, 3, 3, 2, 2),)),
    "attention_qkv": (fk.attention_qkv, ((1, 3, 2, 2), (1, 2, 2, 2), (1, 2, 2, 2))),
    "attention_block": (lambda *x: fk.attention_block(*x, heads=2, eps=1e-5), ((1, 3, 4), *NORM, *ATTENTION)),
    "layer_norm_mlp": (lambda *x: fk.layer_norm_mlp(*x, eps=1e-5), ((1, 3, 4), *NORM, *MLP)),
    "mlp": (fk.mlp, ((3, 4), *MLP)),
    "layer_norm_swiglu": (lambda *x: fk.layer_norm_swiglu(*x, eps=1e-5), ((1, 3, 4), *NORM, *GATED)),
    "rotary_qk_norm": (
        lambda qkv, weight: fk.rotary_qk_norm(
            qkv, ANGLES.to(qkv.dtype).sin(), ANGLES.to(qkv.dtype).cos(), q_norm_weight=weight
        ),
        ((1, 3, 3, 2, 4), (4,)),
    ),
    "drop_path_subset": (
        lambda x, weight, bias: fk.drop_path_subset(
            lambda own, layer_scale: own + layer_scale * fk.layer_norm(own, weight, bias), x, drop_path=0.5
        ),
        ((4, 2, 4), *NORM),
    ),
    "patch_embed": (
        lambda weight, bias, pos: fk.patch_embed(
            IMAGES[:, :, :4, :8].double(), weight, bias, pos_embed=pos, mean=(0.5,) * 3, std=(0.5,) * 3
        ),
        ((4, 3, 4, 4), (4,), (1, 2, 4)),
    ),
    "cross_entropy": (lambda logits: fk.cross_entropy(logits, LABELS, z_loss=0.1), ((3, 5),)),
    "sigmoid_cross_entropy": (lambda logits: fk.sigmoid_cross_entropy(logits, LABELS), ((3, 5),)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_transforms_of_functions(name: str, implementation: str) -> None:
    """Forward mode, torch.func and an ordinary backward pass agree: u (J v) = (u J) v. Kernels refuse the first two."""
    function, shapes = FUNCTIONS[name]
    inputs, ways = tensors(*shapes), tensors(*shapes)
    if implementation == "triton":
        inputs, ways = (tuple(tensor.float() for tensor in group) for group in (inputs, ways))
        for kind, refused in (("torch.func", lambda: vjp(function, *inputs)), ("forward-mode", push)):
            with pytest.raises(RuntimeError, match=f"FASTVIT_KERNELS=triton was asked for, but the kernels .*{kind}"):
                refused() if kind == "torch.func" else refused(function, inputs, ways)
        return
    with sdpa_kernel(SDPBackend.MATH):
        results = []
        for by in (lambda: jvp(function, inputs, ways), lambda: push(function, inputs, ways)):
            torch.manual_seed(1)
            results.append(by())
        torch.manual_seed(1)
        output, pull = vjp(function, *inputs)
        pulled = pull(output.cos())
    torch.manual_seed(1)
    learned = [tensor.requires_grad_() for tensor in inputs]
    backward = torch.autograd.grad(function(*learned), learned, output.cos())
    for primal, tangent in results:
        assert torch.allclose(primal, output)
        expected = sum((gradient * way).sum() for gradient, way in zip(backward, ways, strict=True))
        assert torch.allclose((output.cos() * tangent).sum(), expected) and tangent.norm() > 0
    assert all(torch.allclose(a, b) for a, b in zip(pulled, backward, strict=True))


def push(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], ways: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(function(*map(forward_ad.make_dual, inputs, ways))))


def test_auto_runs_the_reference_under_transforms() -> None:
    on_gpu: Any = SimpleNamespace(dtype=torch.bfloat16, is_cuda=True, device=torch.device("cuda"))
    seen = []
    with dispatch.using("auto"):
        outside = dispatch.uses_triton("attention", on_gpu)
        vmap(lambda x: seen.append(dispatch.uses_triton("attention", on_gpu)) or x)(torch.ones(2))
        with forward_ad.dual_level():
            seen.append(dispatch.uses_triton("attention", on_gpu))
    assert outside == dispatch.HAS_TRITON and seen == [False, False]


def test_an_operator_refuses_tangents() -> None:
    """A graph compiled beforehand, and who calls operators directly, ask `uses_triton` nothing."""
    x = torch.ones(2, 4)
    if not dispatch.INTERPRETED:
        pytest.skip("does not apply: kernels need a GPU or Triton's interpreter")
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative: .*reference"):
        torch.ops.fastvit.layer_norm(forward_ad.make_dual(x, x), None, None, None, x[0], x[0], 1e-6)


def second_derivative(model: nn.Module, forward: AbstractContextManager[None] | None = None) -> Tensor:
    """`forward` is entered for the forward pass alone."""
    weight = model.get_parameter("blocks.0.attn.qkv.weight")
    with forward or nullcontext():
        y = model(IMAGES).sin().sum()
    (first,) = torch.autograd.grad(y, weight, create_graph=True)
    return torch.autograd.grad(first.square().sum(), weight)[0]


def test_second_derivatives(calls: Counter[str], implementation: str) -> None:
    plain = vit()
    ours, acceleration = accelerated(plain)
    if implementation == "triton":
        with pytest.raises(NotImplementedError, match=r"block has no second derivative: .*FASTVIT_KERNELS=reference"):
            second_derivative(ours)
    with sdpa_kernel(SDPBackend.MATH):
        expected = second_derivative(plain)
        assert relative(second_derivative(ours, dispatch.using("reference")), expected) <= 1e-4
        for model in (plain, ours):
            model.blocks[0].attn.fused_attn = False
        calls.clear()
        assert "attn.fused_attn is off" in str(acceleration)
        if implementation == "triton":  # the norm behind the blocks is fused still
            with pytest.raises(NotImplementedError, match="fastvit::layer_norm has no second derivative: .*reference"):
                second_derivative(ours)
        only_norms = dispatch.using(f"{implementation},layer_norm=reference")
        assert relative(second_derivative(ours, only_norms), expected) <= 1e-4
        assert not calls.keys() & {"transformer_block", "attention_block", "layer_norm_mlp"}


def bottom_up(model: nn.Module, learned: tuple[str, ...]) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in learned))
    return model


@pytest.mark.parametrize(
    "learned",
    [("",), in_full(("blocks.1",)), ("norm",), in_full(("qkv",)), in_full(("fc1.bias",)), in_full(("cls_token",))],
)
def test_flops_are_those_of_the_untouched_model(learned: tuple[str, ...], implementation: str) -> None:
    plain = bottom_up(vit(depth=2), learned)
    ours, _ = accelerated(plain)
    totals = []
    for model in (ours, plain):
        with FlopCounterMode(display=False) as counter:
            model(IMAGES).sum().backward()
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


def test_every_operator_has_its_flops() -> None:
    names = {name.removeprefix("fastvit::") for name in torch._C._dispatch_get_all_op_names() if "fastvit::" in name}
    counted = {name for name in names if getattr(torch.ops.fastvit, name) in flop_registry}
    assert "attention_backward" in counted
    assert {name.removesuffix("_backward").removesuffix("_correct") for name in names - counted} == set(
        flops.WITHOUT_PRODUCTS
    )


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_traced_and_exported(calls: Counter[str], implementation: str) -> None:
    plain = vit()
    ours, _ = accelerated(plain)
    with torch.no_grad():
        traced = torch.jit.trace(ours, (IMAGES,), check_trace=False)
        exported = torch.export.export(ours, (IMAGES,), strict=False)
        images = IMAGES.flip(0)
        for found in (traced(images), exported.module()(images)):
            assert relative(found, plain(images)) <= 1e-5
    assert calls["transformer_block"] == 1  # of the trace; what is exported runs where this package is not installed
    assert not any("fastvit" in str(node.target) for node in exported.graph.nodes)
    assert ("fastvit::transformer_block" in str(traced.inlined_graph)) == (implementation == "triton")


def loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("by", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), loaded])
def test_copies_are_restored(calls: Counter[str], by: Callable[[nn.Module], nn.Module]) -> None:
    plain = vit()
    ours, acceleration = accelerated(plain)
    copied = by(ours)
    restore(copied)
    assert [type(m) for m in copied.modules()] == [type(m) for m in plain.modules()]
    assert torch.equal(copied(IMAGES), plain(IMAGES)) and not calls
    restore(copied)  # a second time does nothing
    assert type(ours.norm) is not type(plain.norm)
    restore(ours)
    acceleration.undo()
    assert [type(m) for m in ours.modules()] == [type(m) for m in plain.modules()]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_restored_model_is_scripted() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2))
    accelerate(model)
    copied = copy.deepcopy(model)
    restore(copied)
    x = torch.randn(3, 4)
    assert torch.equal(torch.jit.script(copied)(x), copied(x))


def test_restore_refuses_what_it_cannot_restore() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4))
    accelerate(model)
    model[1].__class__ = type("Sharded", (type(model[1]),), {})
    with pytest.raises(RuntimeError, match="a module changed its class after accelerate: it is Sharded now"):
        restore(model)
    assert type(model[0]) is not nn.LayerNorm  # all or none
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        restore([])  # type: ignore[arg-type]


@pytest.mark.parametrize("channels_last", [False, True])
def test_patches_have_the_strides_of_the_convolution(channels_last: bool, implementation: str) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    plain = nn.Conv2d(3, 8, 16, stride=16)
    ours, _ = accelerated(nn.Sequential(plain))
    images = IMAGES.to(memory_format=layout)
    found, expected = ours(images), plain(images)
    assert found.stride() == expected.stride() and relative(found, expected) <= 1e-5
    if not channels_last:
        assert found.view(2, 8, -1).shape == (2, 8, 4)
