"""What needs no other library: LayerNorm, patch convolutions, the object that accelerate returns."""

import copy
import io
import pickle
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch import nn

import fastvit_kernels
from fastvit_kernels import accelerate, dispatch
from tests.kernels.integrations.equality import accelerated, assert_equal, randomised, rows


class Embedder(nn.Module):
    """Patches, a norm, a linear layer: the smallest model with something to fuse and something not."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, kernel_size=4, stride=4, bias=bias)
        self.norm = nn.LayerNorm(12, eps=1e-3)
        self.head = nn.Linear(12, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.patches(images).flatten(2).transpose(1, 2)))


IMAGES = torch.randn(2, 3, 8, 20)


def run(model: nn.Module) -> torch.Tensor:
    return model(IMAGES)


@pytest.mark.parametrize("bias", [True, False])
def test_layers_give_the_same(calls: Counter[str], bias: bool) -> None:
    model = randomised(Embedder(bias))
    ours, acceleration = accelerated(model)
    assert_equal(ours, model, run)
    assert calls == {"patch_embed": 1, "layer_norm": 1}
    assert rows(acceleration) == {
        "patches": ("patch_embed", ""),
        "norm": ("layer_norm", ""),
        "head": ("", "no fused form of Linear"),
    }


def test_table_is_readable() -> None:
    with dispatch.using("auto"):
        table = str(accelerate(Embedder())).splitlines()
    assert table == [
        "module   type       runs as      by         left alone",
        "patches  Conv2d     patch_embed  reference",
        "norm     LayerNorm  layer_norm   reference",
        "head     Linear     -                       no fused form of Linear",
        "2 of 3 modules fused: 2 reference (on the CPU)",
    ]


def test_table_and_repr_say_who_runs_what_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "is_on_gpu", lambda tensor: True)
    model = Embedder()
    with dispatch.using("auto"), accelerate(model) as acceleration:
        assert [row.plans for row in acceleration.rows[:2]] == [(("reference", "fp32 products"),), (("triton", ""),)]
        assert str(acceleration).endswith("2 of 3 modules fused: 1 reference (fp32 products), 1 triton")
        assert "stride=(4, 4), runs=reference)" in repr(model.patches) and "runs=triton)" in repr(model.norm)
        model.bfloat16()
        assert str(acceleration).endswith("2 of 3 modules fused: 2 triton")
        with dispatch.using("patch_embed=reference"):
            assert str(acceleration).endswith("2 of 3 modules fused: 1 reference (asked for), 1 triton")
            assert "runs=reference)" in repr(model.patches)
    assert "runs=" not in repr(model)
    assert str(acceleration).endswith("0 of 3 modules fused")


def test_everything_but_forward_stays() -> None:
    model = Embedder().eval().requires_grad_(False)
    printed, state, parameters = str(model), model.state_dict(), list(model.parameters())
    modules = list(model.modules())
    seen = []
    model.norm.register_forward_hook(lambda *_: seen.append("norm"))
    with accelerate(model):
        assert re.sub(", runs=[a-z]+", "", str(model)) == printed
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
        assert isinstance(model.norm, nn.LayerNorm) and type(model.norm) is not nn.LayerNorm
        assert not model.norm.training and not model.norm.weight.requires_grad
        assert {name: id(t.untyped_storage()) for name, t in model.state_dict().items()}.keys() == state.keys()
        run(model)
    assert seen == ["norm"]


def test_undo_restores_the_classes(calls: Counter[str]) -> None:
    model = Embedder()
    acceleration = accelerate(model)
    acceleration.undo()
    assert [type(m) for m in model.modules()] == [Embedder, nn.Conv2d, nn.LayerNorm, nn.Linear]
    run(model)
    assert not calls
    assert rows(acceleration)["norm"] == ("", "not accelerated")
    acceleration.undo()  # a second time does nothing


def test_undo_restores_after_an_error_in_a_with_block() -> None:
    model = Embedder()
    with pytest.raises(RuntimeError, match="stop"), accelerate(model):
        raise RuntimeError("stop")
    assert type(model.norm) is nn.LayerNorm


def test_undo_refuses_a_class_that_is_not_its_own() -> None:
    model = Embedder()
    acceleration = accelerate(model)
    model.norm.__class__ = type("Sharded", (type(model.norm),), {})
    with pytest.raises(RuntimeError, match="Sharded"):
        acceleration.undo()
    assert type(model.patches) is not nn.Conv2d  # all or none


def test_twice_is_harmless() -> None:
    model = Embedder()
    first = accelerate(model)
    kinds = [type(m) for m in model.modules()]
    second = accelerate(model)
    assert [type(m) for m in model.modules()] == kinds and rows(second) == rows(first)
    second.undo()  # it changed nothing
    assert [type(m) for m in model.modules()] == kinds
    first.undo()
    assert type(model.norm) is nn.LayerNorm


def test_copies_and_pickles_stay_fused(calls: Counter[str]) -> None:
    model = randomised(Embedder())
    accelerate(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    for number, copied in enumerate(copies, 1):
        assert torch.equal(run(copied), Embedder.forward(copied, IMAGES))
        assert type(copied.norm) is type(model.norm) and copied.norm.weight is not model.norm.weight
        assert calls["layer_norm"] == 2 * number


def test_state_goes_both_ways() -> None:
    plain, fused = randomised(Embedder()), Embedder()
    accelerate(fused)
    fused.load_state_dict(plain.state_dict())
    assert torch.allclose(run(fused), run(plain), atol=1e-6)
    again = Embedder()
    again.load_state_dict(fused.state_dict())
    assert torch.equal(run(again), run(plain))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(3, 8, 4, stride=2), "kernel and stride are not those of square patches"),
        (nn.Conv2d(3, 8, (4, 2), stride=(4, 2)), "kernel and stride are not those of square patches"),
        (nn.Conv2d(1, 8, 4, stride=4), "1 input channels, patch_embed takes 3"),
        (nn.Conv2d(3, 8, 4, stride=4, padding=1), "padded, dilated or grouped"),
        (nn.Conv2d(3, 9, 4, stride=4, groups=3), "padded, dilated or grouped"),
        (nn.LayerNorm((2, 8)), "the layer normalises over more than the last dimension"),
        (nn.LayerNorm(8, elementwise_affine=False), "the layer lacks a weight or a bias"),
        (nn.LayerNorm(8, bias=False), "the layer lacks a weight or a bias"),
        (type("MyNorm", (nn.LayerNorm,), {})(8), "a subclass of LayerNorm, whose forward may differ"),
    ],
)
def test_other_layers_are_left_alone(layer: nn.Module, reason: str) -> None:
    own = type(layer)
    acceleration = accelerate(nn.Sequential(layer))
    assert type(layer) is own and rows(acceleration) == {"0": ("", reason)}


def test_calls_that_only_the_library_can_answer(calls: Counter[str]) -> None:
    model = Embedder()
    accelerate(model)
    assert model.patches(torch.randn(1, 3, 9, 8)).shape == (1, 12, 2, 2)  # a convolution crops
    assert model.patches(torch.randn(1, 3, 8, 11)).shape == (1, 12, 2, 2)
    images = IMAGES.clone().requires_grad_()
    model(images).sum().backward()
    assert images.grad is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.patches(IMAGES).dtype == torch.bfloat16
        assert (
            model.norm(torch.randn(2, 12, dtype=torch.bfloat16)).dtype
            == nn.LayerNorm(12)(torch.randn(2, 12, dtype=torch.bfloat16)).dtype
        )
    with pytest.raises(RuntimeError):
        model.patches(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))  # as before; patch_embed alone would normalise it
    assert torch.equal(model.norm(input=torch.ones(2, 12)), model.norm.bias.expand(2, -1))
    assert calls == {"layer_norm": 1}  # of the call with gradients of images


def test_the_meta_device_works() -> None:
    model = Embedder().to("meta")
    accelerate(model)
    assert model(IMAGES.to("meta")).shape == (2, 10, 5)


def test_only_modules() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        accelerate([])


def test_no_library_is_imported() -> None:
    script = (
        "import sys, torch, fastvit_kernels as k\n"
        "k.accelerate(torch.nn.LayerNorm(3))\n"
        "assert not {'timm', 'transformers', 'open_clip'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_it_is_public() -> None:
    assert "accelerate" in fastvit_kernels.__all__
