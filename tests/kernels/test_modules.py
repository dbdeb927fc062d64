import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastvit_kernels
from fastvit_kernels import (
    FusedAttention,
    FusedBlock,
    FusedCrossEntropy,
    FusedLayerNorm,
    FusedLayerNormMLP,
    FusedPatchEmbed,
    attention_block,
    cross_entropy,
    layer_norm,
    layer_norm_mlp,
    patch_embed,
    sigmoid_cross_entropy,
    transforms,
)

HALF = (0.5, 0.5, 0.5)


def randomise(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def shapes(module: nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def test_public_names() -> None:
    assert set(fastvit_kernels.__all__) == {
        *("attention", "attention_block", "cross_entropy", "layer_norm", "layer_norm_mlp", "mlp", "patch_embed"),
        *("layer_norm_swiglu", "rotary_qk_norm", "rotary_qk_norm_separate", "swiglu_mlp"),
        *("sigmoid_cross_entropy", "FusedAttention", "FusedBlock", "FusedCrossEntropy", "FusedLayerNorm"),
        *(
            "FusedLayerNormMLP",
            "FusedLayerNormSwiGLU",
            "FusedPatchEmbed",
            "FusedSwiGLU",
            "accelerate",
            "add_layer_norm",
            "attention_qkv",
        ),
        *("drop_path_subset", "explain", "restore", "transformer_block", "fp8_linear", "Fp8"),
    }
    assert all(callable(getattr(fastvit_kernels, name)) for name in fastvit_kernels.__all__)


def test_block_has_the_state_of_a_timm_block() -> None:
    plain = {
        "norm1.weight": [8],
        "norm1.bias": [8],
        "attn.qkv.weight": [24, 8],
        "attn.qkv.bias": [24],
        "attn.proj.weight": [8, 8],
        "attn.proj.bias": [8],
        "norm2.weight": [8],
        "norm2.bias": [8],
        "mlp.fc1.weight": [20, 8],
        "mlp.fc1.bias": [20],
        "mlp.fc2.weight": [8, 20],
        "mlp.fc2.bias": [8],
    }
    assert shapes(FusedBlock(8, 2, 20)) == plain
    assert shapes(FusedBlock(8, 2, 20, layer_scale=0.1)) == plain | {"ls1.gamma": [8], "ls2.gamma": [8]}


def test_state_of_the_other_modules() -> None:
    norm = {"weight": [8], "bias": [8]}
    assert shapes(FusedLayerNorm(8)) == norm
    assert shapes(FusedPatchEmbed(4, 8, HALF, HALF)) == {"proj.weight": [8, 3, 4, 4], "proj.bias": [8]}
    attention = {"qkv.weight": [24, 8], "qkv.bias": [24], "proj.weight": [8, 8], "proj.bias": [8]}
    assert shapes(FusedAttention(8, 2)) == attention
    mlp = {"fc1.weight": [20, 8], "fc1.bias": [20], "fc2.weight": [8, 20], "fc2.bias": [8]}
    half_block = {f"norm.{name}": shape for name, shape in norm.items()} | mlp
    assert shapes(FusedLayerNormMLP(8, 20)) == half_block
    assert shapes(FusedLayerNormMLP(8, 20, layer_scale=0.1)) == half_block | {"ls.gamma": [8]}
    assert shapes(FusedCrossEntropy()) == {}


def test_layer_scale_starts_at_its_initial_value() -> None:
    block = FusedBlock(8, 2, 20, layer_scale=0.25)
    assert block.state_dict()["ls1.gamma"].tolist() == block.state_dict()["ls2.gamma"].tolist() == [0.25] * 8


def test_the_default_eps_is_that_of_vision_transformers() -> None:
    """1e-6, with which inputs as small as these differ from those under PyTorch's 1e-5 by half."""
    x = 1e-3 * torch.randn(2, 3, 8)
    expected = torch.nn.functional.layer_norm(x, (8,), eps=1e-6)
    torch.testing.assert_close(FusedLayerNorm(8)(x), expected)
    torch.testing.assert_close(layer_norm(x, torch.ones(8), torch.zeros(8)), expected)
    block, mlp = FusedBlock(8, 2, 20), FusedLayerNormMLP(8, 20)
    assert {norm.eps for norm in (block.norm1, block.norm2, mlp.norm)} == {block.eps, mlp.eps} == {1e-6}


def test_layer_norm_uses_its_parameters_and_eps() -> None:
    module, x = randomise(FusedLayerNorm(8, eps=0.5)), torch.randn(2, 3, 8)
    assert torch.equal(module(x), layer_norm(x, module.weight, module.bias, eps=0.5))


def test_patch_embed_uses_its_parameters() -> None:
    module = randomise(FusedPatchEmbed(4, 8, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    pixels = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    extra = {"pos_embed": torch.randn(1, 5, 8), "cls_token": torch.randn(1, 1, 8)}
    extra |= {"register_tokens": torch.randn(1, 3, 8), "keep_indices": torch.tensor([[2, 0], [3, 1]])}
    expected = patch_embed(
        pixels, module.proj.weight, module.proj.bias, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), **extra
    )
    assert torch.equal(module(pixels, **extra), expected)
    assert expected.shape == (2, 1 + 3 + 2, 8)
    assert module(pixels).shape == (2, 4, 8)


def test_attention_equals_pytorch_multihead_attention() -> None:
    module, x = randomise(FusedAttention(12, 3)).double(), torch.randn(2, 5, 12, dtype=torch.float64)
    state = module.state_dict()
    peer = nn.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64)
    names = {"in_proj_weight": "qkv.weight", "in_proj_bias": "qkv.bias"}
    names |= {"out_proj.weight": "proj.weight", "out_proj.bias": "proj.bias"}
    peer.load_state_dict({theirs: state[ours] for theirs, ours in names.items()})
    assert torch.allclose(module(x), peer(x, x, x)[0], atol=1e-10)


def test_attention_dropout_drops_probabilities() -> None:
    module, x = FusedAttention(4, 1, attention_dropout=0.5), torch.randn(64, 1, 4)
    with torch.no_grad():
        module.proj.weight.copy_(torch.eye(4))
        module.proj.bias.zero_()
    values = module.qkv(x)[..., 8:]  # with one token, the only probability is 1: its value is dropped or doubled
    y = module(x)
    kept = (y != 0).all(-1, keepdim=True)
    assert torch.allclose(y, torch.where(kept, 2 * values, 0.0))
    assert 16 < kept.sum() < 48


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("layer_scale", [None, 0.1])
def test_block_is_its_two_halves(activation: str, layer_scale: float | None) -> None:
    block = randomise(FusedBlock(8, 2, 20, activation=activation, layer_scale=layer_scale, eps=1e-3))
    x = torch.randn(2, 5, 8)
    state = block.state_dict()
    first = ["norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias"]
    second = ["norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"]
    expected = attention_block(x, *(state[n] for n in first), heads=2, eps=1e-3, layer_scale=state.get("ls1.gamma"))
    expected = layer_norm_mlp(
        expected,
        *(state[name] for name in second),
        eps=1e-3,
        activation=activation,
        layer_scale=state.get("ls2.gamma"),
    )
    assert torch.equal(block(x), expected)


def test_half_block_is_the_function() -> None:
    module = randomise(FusedLayerNormMLP(8, 20, activation="gelu_tanh", layer_scale=0.1, eps=1e-3))
    x, state = torch.randn(2, 5, 8), module.state_dict()
    names = ["norm.weight", "norm.bias", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    expected = layer_norm_mlp(
        x, *(state[name] for name in names), eps=1e-3, activation="gelu_tanh", layer_scale=state["ls.gamma"]
    )
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize(
    ("noisy", "quiet"),
    [
        (FusedBlock(8, 2, 20, dropout=0.5), FusedBlock(8, 2, 20)),
        (FusedBlock(8, 2, 20, drop_path=0.5), FusedBlock(8, 2, 20)),
        (FusedBlock(8, 2, 20, drop_path=0.5, drop_path_mode="subset"), FusedBlock(8, 2, 20)),
        (FusedLayerNormMLP(8, 20, dropout=0.5), FusedLayerNormMLP(8, 20)),
        (FusedLayerNormMLP(8, 20, drop_path=0.5), FusedLayerNormMLP(8, 20)),
        (FusedLayerNormMLP(8, 20, drop_path=0.5, drop_path_mode="subset"), FusedLayerNormMLP(8, 20)),
        (FusedAttention(8, 2, dropout=0.5), FusedAttention(8, 2)),
        (FusedAttention(8, 2, attention_dropout=0.5), FusedAttention(8, 2)),
    ],
    ids=[
        *("block dropout", "block drop_path", "block subset", "mlp dropout", "mlp drop_path", "mlp subset"),
        *("dropout after attention", "dropout in attention"),
    ],
)
def test_rates_are_active_in_training_only(noisy: nn.Module, quiet: nn.Module) -> None:
    quiet.load_state_dict(noisy.state_dict())
    x = torch.randn(64, 5, 8)
    assert not torch.allclose(noisy.train()(x), quiet(x))
    assert torch.equal(noisy.eval()(x), quiet(x))


@pytest.mark.parametrize("layer_scale", [None, 0.1])
def test_each_half_of_a_block_drops_a_subset_of_its_own(layer_scale: float | None) -> None:
    block = randomise(FusedBlock(8, 2, 20, drop_path=0.3, drop_path_mode="subset", layer_scale=layer_scale))
    x, state = torch.randn(10, 5, 8), block.state_dict()
    first = [state[f"{name}.{kind}"] for name in ("norm1", "attn.qkv", "attn.proj") for kind in ("weight", "bias")]
    second = [state[f"{name}.{kind}"] for name in ("norm2", "mlp.fc1", "mlp.fc2") for kind in ("weight", "bias")]
    torch.manual_seed(3)
    y = block(x)
    torch.manual_seed(3)
    expected = x.clone()
    kept = torch.randperm(10)[:7]
    branch = attention_block(x, *first, heads=2, eps=1e-6, layer_scale=state.get("ls1.gamma")) - x
    expected[kept] += branch[kept] * 10 / 7
    kept = torch.randperm(10)[:7]
    branch = layer_norm_mlp(expected, *second, eps=1e-6, layer_scale=state.get("ls2.gamma")) - expected
    expected[kept] += branch[kept] * 10 / 7
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def saved_bytes(block: nn.Module, x: Tensor) -> int:
    """What the graph of one call keeps, parameters excepted; a storage counts once."""
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        y = block(x)
    assert y.requires_grad
    own = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    return sum(size for pointer, size in kept.items() if pointer not in own)


@pytest.mark.parametrize(("recompute", "numbers"), [("none", 16), ("gelu", 12), ("all", 10)])
def test_bytes_that_a_block_keeps_for_the_backward_pass(
    recompute: str, numbers: int, implementation: str, device: torch.device
) -> None:
    """For each token, `numbers` times the width in bfloat16, a float32 a head, and four float32 statistics."""
    if implementation == "reference":
        pytest.skip("does not apply: a promise of the kernels alone")
    width, heads = 16, 2
    block = FusedBlock(width, heads, 4 * width, layer_scale=0.1, recompute=recompute).to(device, torch.bfloat16)
    x = torch.randn(5, 3, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    assert saved_bytes(block, x) == 5 * 3 * (numbers * width * 2 + heads * 4 + 4 * 4)


def test_a_subset_keeps_in_proportion(implementation: str, device: torch.device) -> None:
    if implementation == "reference":
        pytest.skip("does not apply: a promise of the kernels alone")
    block = FusedBlock(16, 2, 64, drop_path=0.4, drop_path_mode="subset", layer_scale=0.1).to(device)
    x = torch.randn(5, 3, 16, device=device, requires_grad=True)
    whole, subset = saved_bytes(block.eval(), x), saved_bytes(block.train(), x)
    assert subset - whole * 3 // 5 <= 2 * (5 * 8 + 2 * 16 * 4)  # the order of the samples and the layer scales


def test_every_parameter_gets_a_gradient() -> None:
    for module in (FusedBlock(8, 2, 20, layer_scale=0.1), FusedLayerNormMLP(8, 20, layer_scale=0.1)):
        randomise(module)(torch.randn(2, 5, 8)).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


@pytest.mark.usefixtures("implementation")
def test_block_compiles_without_graph_break(device: torch.device) -> None:
    block = randomise(FusedBlock(8, 2, 20, layer_scale=0.1)).to(device)
    x = torch.randn(2, 5, 8, device=device, requires_grad=True)
    result = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(result, block(x))
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (result, block(x))))


def test_cross_entropy_kinds() -> None:
    logits, labels, labels_b = torch.randn(4, 5), torch.randint(0, 5, (4,)), torch.randint(0, 5, (4,))
    share = torch.rand(4)
    for kind, function in (("softmax", cross_entropy), ("sigmoid", sigmoid_cross_entropy)):
        loss = FusedCrossEntropy(kind, label_smoothing=0.1)
        expected = function(logits, labels, labels_b=labels_b, mix_weight=share, label_smoothing=0.1)
        assert torch.equal(loss(logits, labels, labels_b, share), expected)
    expected = cross_entropy(logits, labels, z_loss=0.3)
    assert torch.equal(FusedCrossEntropy(z_loss=0.3)(logits, labels), expected)
    assert expected > cross_entropy(logits, labels)
    with pytest.raises(ValueError, match="z_loss belongs to the softmax"):
        FusedCrossEntropy("sigmoid", z_loss=0.3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FusedCrossEntropy("hinge"), "kind must be one of softmax, sigmoid, got 'hinge'"),
        (lambda: FusedBlock(8, 2, 20, drop_path_mode="half"), "drop_path_mode must be one of mask, subset, got 'half'"),
        (lambda: FusedBlock(8, 2, 20, recompute="norm"), "recompute must be one of none, gelu, all, got 'norm'"),
        (lambda: FusedLayerNormMLP(8, 20, drop_path_mode=""), "drop_path_mode must be one of mask, subset, got ''"),
        (lambda: FusedLayerNormMLP(8, 20, recompute=""), "recompute must be one of none, gelu, all, got ''"),
    ],
)
def test_unknown_choices(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_heads_must_divide_width() -> None:
    with pytest.raises(ValueError, match="heads must divide the width 8, got 3"):
        FusedBlock(8, 3, 20)


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (FusedLayerNorm(8), torch.randn(2, 5, 8)),
        (FusedPatchEmbed(4, 8, HALF, HALF), torch.randn(2, 3, 8, 8)),
        (FusedAttention(8, 2), torch.randn(2, 5, 8)),
        (FusedLayerNormMLP(8, 20, layer_scale=0.1), torch.randn(2, 5, 8)),
        (FusedBlock(8, 2, 20, layer_scale=0.1), torch.randn(2, 5, 8)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_zero3_gathers_every_parameter_that_is_read(module: nn.Module, x: Tensor) -> None:
    """ZeRO-3 gathers for each module that is called: its own parameters, with `_z3_leaf` its children's as well."""
    gathered: set[nn.Parameter] = set()
    for child in module.modules():
        child.register_forward_pre_hook(
            lambda called, _: gathered.update(called.parameters(recurse=getattr(called, "_z3_leaf", False)))
        )
    module(x)
    assert gathered == set(module.parameters())


def test_the_kernels_are_imported_without_the_compiler() -> None:
    code = "import sys, fastvit_kernels; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    marked = torch.compiler.assume_constant_result(lambda: None)  # what `transforms` does by hand for that
    assert vars(marked).items() <= vars(transforms.obstacle).items()
