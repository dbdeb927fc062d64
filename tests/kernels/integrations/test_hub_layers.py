"""The layers of a kernel as `kernels` of Hugging Face puts them into models of transformers."""

import collections
import copy
import re
import socket
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import fastvit_kernels
from fastvit_kernels.hub.build import BACKENDS, build
from tests.kernels.integrations.equality import WHOLE, assert_equal, randomised, rows

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip(
    "kernels.layer", reason="kernels is not installed"
)  # `kernels` alone could be a folder of that name
kernels = import_module("kernels")

IMAGES = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(5))
SIZES = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "image_size": 24, "patch_size": 8}
FAMILIES = {  # model, options, layer of the kernel for each class
    "vit": ("ViT", {"intermediate_size": 40}, {"ViTAttention": "ViTAttention", "ViTMLP": "MLP"}),
    "dinov2": ("Dinov2", {"mlp_ratio": 2}, {"Dinov2Attention": "ViTAttention", "Dinov2MLP": "MLP"}),
    "siglip": ("SiglipVision", {"intermediate_size": 40}, {"SiglipAttention": "SiglipAttention", "SiglipMLP": "MLP"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "fastvit-kernels"
    build(out)
    return out


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def kernel(folder: Path) -> ModuleType:
    return kernels.get_local_kernel(folder)


@pytest.fixture
def calls(kernel: ModuleType, monkeypatch: pytest.MonkeyPatch) -> collections.Counter[str]:
    """How often each operation of the kernel has run."""
    counter: collections.Counter[str] = collections.Counter()

    def counted(name: str) -> Callable[..., Any]:
        operation = getattr(kernel.layers, name)

        def call(*args: Any, **options: Any) -> Any:
            counter[name] += 1
            return operation(*args, **options)

        return call

    for name in ("layer_norm", "mlp", "attention_qkv"):
        monkeypatch.setattr(kernel.layers, name, counted(name))
    return counter


@pytest.fixture
def extended() -> Iterator[None]:
    """Prepares the classes of transformers, which has no names of its own for these layers."""
    layers = {nn.LayerNorm: "LayerNorm"}
    for family, (_, _, names) in FAMILIES.items():
        modeling = import_module(f"transformers.models.{family}.modeling_{family}")
        layers |= {getattr(modeling, name): name for name in names}
    for layer, name in layers.items():
        kernels.replace_kernel_forward_from_hub(layer, name)
    yield
    for layer in layers:
        del layer.kernel_layer_name, layer.kernel_condition


def plain(family: str, **changes: Any) -> nn.Module:
    name, options, _ = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**SIZES | options | changes)
    return randomised(getattr(transformers, f"{name}Model")(config))


def kernelized(model: nn.Module, family: str, folder: Path) -> nn.Module:
    names = {"LayerNorm": "LayerNorm"} | FAMILIES[family][2]
    mapping = {name: {"cpu": kernels.LocalLayerRepository(folder, layer_name=layer)} for name, layer in names.items()}
    ours = copy.deepcopy(model)
    with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
        kernels.kernelize(ours, mode=kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE, use_fallback=False)
    return ours


def run(model: nn.Module, **options: Any) -> torch.Tensor:
    return model(IMAGES, **options).last_hidden_state


@pytest.mark.usefixtures("extended")
@pytest.mark.parametrize(
    ("family", "implementation"),
    [("vit", "reference"), ("vit", "triton"), ("dinov2", "reference"), ("siglip", "reference")],
)
def test_models_are_kernelized_and_equal(
    family: str, implementation: str, folder: Path, kernel: ModuleType, calls: collections.Counter[str]
) -> None:
    if implementation == "triton" and not kernel.dispatch.INTERPRETED:
        pytest.skip("does not apply: kernels need a GPU or Triton's interpreter")
    model = plain(family).train()
    ours = kernelized(model, family, folder)
    norms = sum(isinstance(module, nn.LayerNorm) for module in model.modules())
    with kernel.dispatch.using(implementation):
        assert_equal(ours, model, run)
    head = family == "siglip"  # its attention pooling has an MLP and torch's own attention
    assert calls == {"layer_norm": norms, "mlp": 1 + head, "attention_qkv": 1}
    assert ours.state_dict().keys() == model.state_dict().keys()


@pytest.mark.usefixtures("extended")
def test_compiles_without_graph_break_and_under_autocast(folder: Path, calls: collections.Counter[str]) -> None:
    model = plain("vit").train()
    ours = kernelized(model, "vit", folder)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled), run(ours))
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        result, expected = run(ours), run(model)
    assert calls == {"layer_norm": 3, "mlp": 1, "attention_qkv": 1}
    assert result.dtype == expected.dtype
    torch.testing.assert_close(result, expected, rtol=0.02, atol=0.02)


@pytest.mark.usefixtures("extended")
def test_other_calls_run_the_forward_of_the_class(folder: Path, calls: collections.Counter[str]) -> None:
    model = plain("vit").eval()
    ours = kernelized(model, "vit", folder)
    mask = torch.ones(2, 10)
    mask[:, 6:] = 0
    assert_equal(ours, model, lambda m: run(m, attention_mask=mask))
    assert calls.pop("attention_qkv", 0) == 0 and calls == {"layer_norm": 3, "mlp": 1}
    hidden = torch.randn(2, 10, 24)
    attention, untouched = (m.layers[0].attention for m in (ours, model))
    assert torch.equal(attention(hidden, is_causal=True)[0], untouched(hidden, is_causal=True)[0])
    attention.config._attn_implementation = "eager"
    assert attention(hidden)[1].shape == (2, 3, 10, 10)  # the weights
    attention.config._attn_implementation = "sdpa"
    assert not calls["attention_qkv"]

    calls.clear()
    seen: list[torch.Size] = []
    ours.layers[0].mlp.fc2.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    assert_equal(ours, model, run)
    assert seen == [(2, 10, 40)] and not calls["mlp"]
    quick = plain("vit", hidden_act="quick_gelu")
    assert_equal(kernelized(quick, "vit", folder), quick, run)
    half = kernelized(model, "vit", folder).layers[0].layernorm_before
    with torch.autocast("cpu", torch.bfloat16):
        assert half(hidden.bfloat16()).dtype == model.layers[0].layernorm_before(hidden.bfloat16()).dtype
    assert not calls["mlp"]


@pytest.mark.usefixtures("extended")
def test_tanh_gelu_and_attention_dropout(folder: Path, calls: collections.Counter[str]) -> None:
    model = plain("siglip", hidden_act="gelu_pytorch_tanh", attention_dropout=0.5).train()
    ours = kernelized(model, "siglip", folder)
    hidden = torch.randn(2, 10, 24)
    layer = ours.encoder.layers[0]
    assert not torch.equal(layer.self_attn(hidden)[0], layer.self_attn(hidden)[0])
    assert_equal(ours.eval(), model.eval(), run)
    assert calls["mlp"] == 2 and calls["attention_qkv"] == 3


def test_accelerate_of_a_kernel_fuses_whole_blocks(kernel: ModuleType) -> None:
    model = plain("vit").train()
    ours = copy.deepcopy(model)
    acceleration = kernel.accelerate(ours)
    assert rows(acceleration)["layers.0"] == WHOLE
    assert type(ours.layers[0]).__mro__[1].__module__ == f"{kernel.__name__}.integrations.transformers"
    assert_equal(ours, model, run)


def test_builds_live_beside_each_other_and_beside_the_package(folder: Path, kernel: ModuleType, tmp_path: Path) -> None:
    build(tmp_path / "other", "other")
    other = kernels.get_local_kernel(tmp_path / "other")
    assert len({kernel.__name__, other.__name__, fastvit_kernels.__name__}) == 3
    x, weight, bias = torch.randn(3, 24), torch.rand(24), torch.rand(24)
    with kernel.dispatch.using("reference"):  # the choice of one is not that of another
        said = [package.explain().splitlines()[0] for package in (kernel, other, fastvit_kernels)]
        assert ["FASTVIT_KERNELS=reference" in line for line in said] == [True, False, False]
    operators = {package.registration.library.ns for package in (kernel, other, fastvit_kernels)}
    assert operators == {kernel.__name__, other.__name__, "fastvit"}
    results = [package.layer_norm(x, weight, bias) for package in (kernel, other, fastvit_kernels)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_kernels_reads_the_metadata_of_every_variant(folder: Path) -> None:
    for backend in BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        read = kernels.Metadata.read_from_file(variant / "metadata.json")
        assert (str(read.name), read.version, str(read.backend.backend_type)) == ("fastvit-kernels", 1, backend)
        digest = kernels._rust.Digest.hash_variant(read.digest.algorithm, variant)
        without_bytecode = {path: hash for path, hash in digest.files.items() if "__pycache__" not in path}
        assert without_bytecode == read.digest.files


@pytest.mark.usefixtures("extended")
def test_the_card_shows_code_that_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernelize, everything_else = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "ViTConfig()" in kernelize
    names: dict[str, Any] = {}
    exec(
        kernelize.replace("ViTConfig()", "ViTConfig(hidden_size=24, num_attention_heads=3, num_hidden_layers=1)"), names
    )
    layer = names["model"].layers[0]
    assert [m.forward.__func__.__qualname__ for m in (layer.layernorm_before, layer.attention, layer.mlp)] == [
        "LayerNorm.forward",
        "ViTAttention.forward",
        "MLP.forward",
    ]
    exec(everything_else, names)
    assert names["kernel"].__name__.startswith("_fastvit_kernels_")
