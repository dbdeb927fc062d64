import importlib
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from tests.in_full import in_full
from tests.kernels.integrations.equality import GATED, WHOLE, accelerated, assert_equal, randomised, relative, rows

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

IMAGES = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(5))
SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 24, "patch_size": 8}


def build(model: str, config: str, **options: Any) -> nn.Module:
    settings = SIZES | {"intermediate_size": 40} | options
    return randomised(getattr(transformers, model)(getattr(transformers, config)(**settings)))


def vit(**options: Any) -> nn.Module:
    return build("ViTModel", "ViTConfig", **options)


def run(model: nn.Module, **options: Any) -> torch.Tensor:
    outputs = model(IMAGES, **options)
    return outputs.logits if "logits" in outputs else outputs.last_hidden_state


@pytest.mark.parametrize(
    ("model", "config", "options", "block"),
    [
        ("ViTModel", "ViTConfig", {}, "layers.1"),
        ("ViTModel", "ViTConfig", {"qkv_bias": False, "hidden_act": "gelu_pytorch_tanh"}, "layers.1"),
        ("ViTForImageClassification", "ViTConfig", {"num_labels": 5}, "vit.layers.1"),
        ("DeiTModel", "DeiTConfig", {}, "layers.1"),
        ("ViTMSNModel", "ViTMSNConfig", {}, "layers.1"),
        ("IJepaModel", "IJepaConfig", {}, "layers.1"),
        ("ViTMAEModel", "ViTMAEConfig", {}, "layers.1"),
        ("Dinov2Model", "Dinov2Config", {"mlp_ratio": 2, "layerscale_value": 0.5}, "encoder.layer.1"),
        ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", {"mlp_ratio": 2}, "encoder.layer.1"),
        ("CLIPVisionModel", "CLIPVisionConfig", {"hidden_act": "gelu"}, "encoder.layers.1"),
        ("MetaClip2VisionModel", "MetaClip2VisionConfig", {"hidden_act": "gelu"}, "encoder.layers.1"),
        ("SiglipVisionModel", "SiglipVisionConfig", {"vision_use_head": False}, "encoder.layers.1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_models_are_fused_and_equal(
    calls: Counter[str], model: str, config: str, options: dict[str, Any], block: str
) -> None:
    plain = build(model, config, **options).train()
    ours, acceleration = accelerated(plain)
    assert {path for path, found in rows(acceleration).items() if found == WHOLE} >= {block}, str(acceleration)
    assert_equal(ours, plain, run)
    assert calls["patch_embed"] == 1 and calls["transformer_block"] == 2
    assert_equal(ours.eval(), plain.eval(), run)


def test_siglip2_with_and_without_padding(calls: Counter[str]) -> None:
    settings = {name: size for name, size in SIZES.items() if name != "image_size"}
    config = transformers.Siglip2VisionConfig(**settings, intermediate_size=40, num_patches=9)
    model = randomised(transformers.Siglip2VisionModel(config))
    ours, acceleration = accelerated(model)
    assert rows(acceleration)["encoder.layers.0"] == WHOLE
    assert rows(acceleration)["head.attention"] == ("", "no fused form of MultiheadAttention")
    patches = torch.randn(2, 9, 192, generator=torch.Generator().manual_seed(6))
    for present, shape, expected in (9, [3, 3], {"transformer_block": 2}), (6, [2, 3], {"layer_norm_mlp": 2}):
        calls.clear()
        inputs = {
            "pixel_values": patches,
            "pixel_attention_mask": (torch.arange(9) < present).long().expand(2, -1),
            "spatial_shapes": torch.tensor([shape, shape]),
        }
        assert_equal(ours, model, lambda m, inputs=inputs: m(**inputs).pooler_output)
        assert {name: calls[name] for name in calls if name != "layer_norm"} == expected


def test_quick_gelu_of_clip_stays(calls: Counter[str]) -> None:
    model = build("CLIPVisionModel", "CLIPVisionConfig")
    ours, acceleration = accelerated(model)
    found = ("attention_block", "no layer_norm_mlp: activation QuickGELUActivation")
    assert rows(acceleration)["encoder.layers.0"] == found
    assert_equal(ours, model, run)
    assert calls["attention_block"] == 2 and not calls["layer_norm_mlp"]


@pytest.mark.parametrize("kind", ["Dinov2", "Dinov2WithRegisters"])
def test_swiglu_of_dinov2(calls: Counter[str], kind: str) -> None:
    model = build(f"{kind}Model", f"{kind}Config", use_swiglu_ffn=True, layerscale_value=0.5)
    ours, acceleration = accelerated(model)
    assert rows(acceleration)["encoder.layer.1"] == GATED
    assert_equal(ours, model, run)
    assert calls["attention_block"] == calls["layer_norm_swiglu"] == 2
    layer = ours.get_submodule("encoder.layer.1")
    layer.mlp.act_fn = nn.ReLU()
    reason = "no layer_norm_mlp: the activation of the gate is ReLU"
    assert rows(acceleration)["encoder.layer.1"] == ("attention_block", reason)


@pytest.mark.parametrize("gated", [False, True])
def test_dinov3(calls: Counter[str], gated: bool) -> None:
    options = {"use_gated_mlp": gated, "hidden_act": "silu" if gated else "gelu", "layerscale_value": 0.5}
    model = build("DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=2, **options).train()
    ours, acceleration = accelerated(model)
    half = "layer_norm_swiglu" if gated else "layer_norm_mlp"
    assert rows(acceleration)["model.layer.1"] == (f"layer_norm + rotary + attention + {half}", "")
    assert_equal(ours, model, run)
    assert calls["rotary_qk_norm"] == calls[half] == 2
    assert_equal(ours.eval(), model.eval(), run)
    calls.clear()
    layer, x = ours.get_submodule("model.layer.0"), torch.randn(2, 7, 24)
    angles = torch.randn(2, 2, 1, 4, 8)  # of each sample
    expected = model.get_submodule("model.layer.0")(x, position_embeddings=tuple(angles))
    assert relative(layer(x, position_embeddings=tuple(angles)), expected) <= 1e-5
    mask = torch.zeros(2, 1, 7, 7)
    expected = model.get_submodule("model.layer.0")(x, mask, tuple(angles[:, 0, 0]))
    assert relative(layer(x, mask, tuple(angles[:, 0, 0])), expected) <= 1e-5
    assert not calls["rotary_qk_norm"] and calls[half] == 2
    acceleration.undo()
    assert torch.equal(run(ours), run(model)) and list(ours.state_dict()) == list(model.state_dict())


def test_drop_path_of_dinov2_in_the_mean(calls: Counter[str]) -> None:
    """Its random numbers are drawn another way, so only the distribution is the same."""
    model = build("Dinov2Model", "Dinov2Config", drop_path_rate=0.25, num_hidden_layers=1, mlp_ratio=2).train()
    ours, _ = accelerated(model)
    path = next(name for name, m in ours.named_modules() if hasattr(m, "layer_scale1"))
    blocks = ours.get_submodule(path), model.get_submodule(path)
    x = torch.randn(1, 7, 24).expand(4000, -1, -1)
    means = []
    with torch.no_grad():
        for block in blocks:
            outcomes = block(x)
            values, counts = outcomes[:, 0, 0].round(decimals=4).unique(return_counts=True)
            assert len(values) == 4  # each half kept or dropped
            means.append(counts.sort().values / len(x))
    assert torch.allclose(*means, atol=0.04)
    assert calls["transformer_block"] == 1


def test_dropout_in_training_keeps_what_it_must(calls: Counter[str]) -> None:
    model = vit(hidden_dropout_prob=0.3).train()
    ours, acceleration = accelerated(model)
    assert "no layer_norm_mlp in training: dropout 0.3 on the output" in rows(acceleration)["layers.0"][1]
    assert_equal(ours, model, run)
    assert calls["attention_block"] == 2 and not calls.keys() & {"transformer_block", "layer_norm_mlp"}
    assert_equal(ours.eval(), model.eval(), run)
    assert calls["transformer_block"] == 2


def test_attention_dropout_in_training(calls: Counter[str]) -> None:
    model = vit(attention_probs_dropout_prob=0.3).train()
    ours, acceleration = accelerated(model)
    assert "no attention_block in training: attention dropout 0.3" in rows(acceleration)["layers.0"][1]
    assert_equal(ours, model, run)
    assert not calls.keys() & {"transformer_block", "attention_block"} and calls["layer_norm_mlp"] == 2


def test_attention_masks_are_honoured(calls: Counter[str]) -> None:
    model = vit().eval()
    ours, _ = accelerated(model)
    mask = torch.ones(3, 10)
    mask[:, 6:] = 0
    assert_equal(ours, model, lambda m: run(m, attention_mask=mask))
    assert not calls.keys() & {"transformer_block", "attention_block"} and calls["layer_norm_mlp"] == 2
    assert not torch.allclose(run(ours), run(ours, attention_mask=mask), atol=1e-3)


@pytest.mark.parametrize("by", ["argument", "config"])
def test_attentions_are_returned_when_asked_for(calls: Counter[str], by: str) -> None:
    model = vit(attn_implementation="eager").eval()
    ours, _ = accelerated(model)
    asked: dict[str, Any] = {"output_attentions": True} if by == "argument" else {}
    if by == "config":
        model.config.output_attentions = ours.config.output_attentions = True
    outputs, expected = ours(IMAGES, **asked), model(IMAGES, **asked)
    assert len(outputs.attentions) == len(expected.attentions) == 2
    assert all(relative(*pair) <= 1e-5 for pair in zip(outputs.attentions, expected.attentions, strict=True))
    assert not calls.keys() & {"transformer_block", "attention_block"}
    model.config.output_attentions = ours.config.output_attentions = False
    assert_equal(ours, model, run)
    assert calls["transformer_block"] == 2  # the recorders that the first call left do not stand in the way


def test_hidden_states_are_recorded(calls: Counter[str]) -> None:
    model = vit().eval()
    ours, _ = accelerated(model)
    outputs, expected = (m(IMAGES, output_hidden_states=True).hidden_states for m in (ours, model))
    assert len(outputs) == len(expected) == 3
    assert all(relative(*pair) <= 1e-5 for pair in zip(outputs, expected, strict=True))
    assert calls["transformer_block"] == 2


def test_a_hook_of_the_user_fires() -> None:
    model = vit().eval()
    acceleration = accelerated(model)[1]
    ours = acceleration.model
    ours(IMAGES, output_attentions=True)  # leaves recorders on attention
    seen = []
    ours.layers[0].attention.register_forward_hook(lambda *_: seen.append("attention"))
    ours.layers[1].mlp.fc1.register_forward_hook(lambda *_: seen.append("fc1"))
    run(ours)
    assert seen == ["attention", "fc1"]
    assert rows(acceleration)["layers.0"] == ("layer_norm_mlp", "no attention_block: attention has a hook")


def test_other_attention_functions_are_left_alone(calls: Counter[str]) -> None:
    def zero(module: nn.Module, query: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(query.transpose(1, 2)), None

    transformers.AttentionInterface.register("zero", zero)
    model = vit().eval()
    ours, acceleration = accelerated(model)
    for m in (ours, model):
        m.set_attn_implementation("zero")
    assert "attention implementation 'zero'" in rows(acceleration)["layers.0"][1]
    assert_equal(ours, model, run)


def test_a_whole_siglip_and_clip(calls: Counter[str]) -> None:
    for name, tokens in (("Siglip", {}), ("CLIP", {"hidden_act": "gelu", "eos_token_id": 2})):
        config, text, vision = (getattr(transformers, f"{name}{kind}Config") for kind in ("", "Text", "Vision"))
        words = {"vocab_size": 50, "max_position_embeddings": 9, "pad_token_id": 1, "bos_token_id": 0}
        sizes = SIZES | {"intermediate_size": 40, "num_hidden_layers": 1}
        model = randomised(
            getattr(transformers, f"{name}Model")(
                config(
                    text_config=text(**(sizes | words | tokens)).to_dict(),
                    vision_config=vision(**(sizes | tokens)).to_dict(),
                )
            )
        )
        ours, _ = accelerated(model)
        ids = torch.randint(3, 50, (3, 9), generator=torch.Generator().manual_seed(6))
        calls.clear()
        assert_equal(ours, model, lambda m, ids=ids: m(input_ids=ids, pixel_values=IMAGES).logits_per_image)
        causal = name == "CLIP"  # a mask, with which attention runs as the library wrote it
        assert calls["transformer_block"] == 2 - causal and calls["layer_norm_mlp"] == causal


def test_gradient_checkpointing(calls: Counter[str]) -> None:
    model = vit().train()
    model.activation_checkpointing_enable()
    ours, _ = accelerated(model)
    assert_equal(ours, model, run)
    assert calls["transformer_block"] == 4  # each layer once more in the backward pass


def test_state_and_undo_and_optimizer() -> None:
    plain, ours = vit(), vit()
    ours.load_state_dict(plain.state_dict())
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (plain, ours)]
    acceleration = accelerated(plain)[1]
    kinds = [type(m) for m in ours.modules()]
    own = importlib.import_module("fastvit_kernels").accelerate(ours)
    assert list(plain.state_dict()) == list(ours.state_dict()) == list(acceleration.model.state_dict())
    for model, optimizer in zip((plain, ours), optimizers, strict=True):
        run(model).square().mean().backward()
        optimizer.step()
    for name, tensor in plain.state_dict().items():
        assert torch.allclose(tensor, ours.state_dict()[name], atol=1e-5), name
    own.undo()
    assert [type(m) for m in ours.modules()] == kinds
    acceleration.model.load_state_dict(ours.state_dict())
    assert relative(run(acceleration.model), run(ours)) <= 1e-5


def test_saved_and_loaded(tmp_path: Any) -> None:
    model = vit().eval()
    ours, _ = accelerated(model)
    ours.save_pretrained(tmp_path)
    again = transformers.ViTModel.from_pretrained(tmp_path)
    assert torch.equal(run(again.eval()), run(model))


@pytest.mark.parametrize(
    ("model", "config"), [("ViTForImageClassification", "ViTConfig"), in_full("DINOv3ViTModel", "DINOv3ViTConfig")]
)
def test_compiled(model: str, config: str) -> None:
    plain = build(model, config, num_hidden_layers=1).eval()
    ours, _ = accelerated(plain)
    ours.compile(backend="eager", fullgraph=True)
    assert_equal(ours, plain, run)
