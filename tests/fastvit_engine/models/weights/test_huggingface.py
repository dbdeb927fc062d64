"""Folders of transformers: what they compute, what of them is refused, and what transformers reads of ours."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastvit_engine import load_model
from fastvit_engine.checkpoint.load import open_model
from fastvit_engine.errors import UserError
from fastvit_engine.models.weights.huggingface import write_folder
from tests.fastvit_engine.models.weights.official import forward, random_arrays
from tests.kernels.integrations.conftest import TORCHVISION  # lets transformers be imported

assert TORCHVISION is None or TORCHVISION.ns == "torchvision"

CONFIG = {
    "model_type": "vit",
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 48,
    "patch_size": 16,
}
PREPROCESSOR = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "do_normalize": True}
BLOCK = {
    "LayerNorm_0": "layernorm_before",
    "LayerNorm_2": "layernorm_after",
    "MlpBlock_3/Dense_0": "intermediate.dense",
    "MlpBlock_3/Dense_1": "output.dense",
}


def vit_tensors(arrays):
    """The arrays of an official file under the names of a ViTForImageClassification on the disk."""
    w = {name: torch.from_numpy(array) for name, array in arrays.items()}
    width = w["embedding/bias"].shape[0]
    found = {
        "vit.embeddings.cls_token": w["cls"],
        "vit.embeddings.position_embeddings": w["Transformer/posembed_input/pos_embedding"],
        "vit.embeddings.patch_embeddings.projection.weight": w["embedding/kernel"].permute(3, 2, 0, 1),
        "vit.embeddings.patch_embeddings.projection.bias": w["embedding/bias"],
        "vit.layernorm.weight": w["Transformer/encoder_norm/scale"],
        "vit.layernorm.bias": w["Transformer/encoder_norm/bias"],
        "classifier.weight": w["head/kernel"].T,
        "classifier.bias": w["head/bias"],
    }
    for index in range(2):
        ours, theirs = f"Transformer/encoderblock_{index}", f"vit.encoder.layer.{index}"
        for part in ("query", "key", "value"):
            before = f"{ours}/MultiHeadDotProductAttention_1/{part}"
            found[f"{theirs}.attention.attention.{part}.weight"] = w[f"{before}/kernel"].reshape(width, width).T
            found[f"{theirs}.attention.attention.{part}.bias"] = w[f"{before}/bias"].flatten()
        out = f"{ours}/MultiHeadDotProductAttention_1/out"
        found[f"{theirs}.attention.output.dense.weight"] = w[f"{out}/kernel"].reshape(width, width).T
        found[f"{theirs}.attention.output.dense.bias"] = w[f"{out}/bias"]
        for before, after in BLOCK.items():
            kernel = w.get(f"{ours}/{before}/kernel")
            found[f"{theirs}.{after}.weight"] = w[f"{ours}/{before}/scale"] if kernel is None else kernel.T
            found[f"{theirs}.{after}.bias"] = w[f"{ours}/{before}/bias"]
    return {name: tensor.contiguous() for name, tensor in found.items()}


def save(folder, tensors, config=None, preprocessor=PREPROCESSOR):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG | (config or {})))
    if preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


@pytest.mark.parametrize(
    ("config", "eps", "exact"),
    [
        ({}, 1e-12, True),  # their defaults
        ({"layer_norm_eps": 1e-2}, 1e-2, True),
        ({"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}, 1e-6, False),
        ({"hidden_act": "gelu_new", "layer_norm_eps": 1e-6}, 1e-6, False),
    ],
)
def test_a_folder_computes_what_its_configuration_says(tmp_path, config, eps, exact):
    arrays = random_arrays()
    for name in ("cls", "embedding/kernel", "embedding/bias", "Transformer/posembed_input/pos_embedding"):
        arrays[name] *= 1e-3  # so that eps matters in the first block
    model = load_model(save(tmp_path / "vit", vit_tensors(arrays), config))
    images = np.random.default_rng(1).uniform(-1, 1, (2, 48, 48, 3)).astype(np.float32)
    expected = forward(arrays, images, eps=eps, exact_gelu=exact)
    theirs = torch.from_numpy(images).permute(0, 3, 1, 2)
    with torch.no_grad():
        np.testing.assert_allclose(model.forward_features(theirs), expected["tokens"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(model(theirs), expected["logits"], rtol=0, atol=1e-5)
    assert model.config.layer_norm_eps == eps
    assert model.patch_embed.mean == (0.1, 0.2, 0.3) and model.patch_embed.std == (0.4, 0.5, 0.6)


def test_half_precision_is_read_exactly(tmp_path):
    tensors = {name: tensor.bfloat16() for name, tensor in vit_tensors(random_arrays()).items()}
    model = load_model(save(tmp_path / "vit", tensors))
    assert torch.equal(model.head.weight, tensors["classifier.weight"].float())


def test_names_of_classes_and_the_crop_are_read(tmp_path):
    names = [f"class {number}" for number in range(7)]
    config = {"id2label": {str(number): name for number, name in enumerate(names)}}
    crop = {"size": {"shortest_edge": 60}, "crop_size": {"height": 48, "width": 48}, "do_center_crop": True}
    folder = save(tmp_path / "vit", vit_tensors(random_arrays()), config, PREPROCESSOR | crop | {"resample": 3})
    model = open_model(folder)
    assert model.class_names == tuple(names)
    assert (model.pixels["eval_crop"], model.pixels["eval_transform"]) == (0.8, "timm")
    usual = {"id2label": {str(number): f"LABEL_{number}" for number in range(7)}}
    assert open_model(save(tmp_path / "vit", vit_tensors(random_arrays()), usual)).class_names is None


def test_pixels_that_are_not_said_are_the_defaults_of_the_type_with_a_warning(tmp_path):
    folder = save(tmp_path / "vit", vit_tensors(random_arrays()), preprocessor=None)
    with pytest.warns(UserWarning, match=r"has no preprocessor_config.json: taking mean \[0.5, 0.5, 0.5\] and std"):
        assert load_model(folder).patch_embed.mean == (0.5, 0.5, 0.5)
    folder = save(tmp_path / "plain", vit_tensors(random_arrays()), preprocessor={"do_normalize": False})
    assert load_model(folder).patch_embed.std == (1, 1, 1)


TENSORS = vit_tensors(random_arrays())
DENSE = {"vit.pooler.dense.weight": torch.zeros(48, 48), "vit.pooler.dense.bias": torch.zeros(48)}


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"model_type": "swin"}, TENSORS, "holds a model of type 'swin': there are vit, dinov2, dinov2_with_registers"),
        ({"qkv_bias": False}, TENSORS, "'qkv_bias' is False in config.json, and only True can be read"),
        ({"num_channels": 1}, TENSORS, "'num_channels' is 1 in config.json, and only 3 can be read"),
        ({"hidden_act": "relu"}, TENSORS, "has the activation 'relu': there are gelu, gelu_pytorch_tanh, gelu_new"),
        ({"hidden_size": "48"}, TENSORS, "'hidden_size' is '48' in config.json, and must be a number"),
        ({"image_size": [48, 64]}, TENSORS, r"'image_size' is \[48, 64\] in config.json, and must be a number"),
        ({"num_hidden_layers": 0}, TENSORS, "has a number that is not positive"),
        ({"num_attention_heads": 5}, TENSORS, "model.heads 5 does not divide model.width 48"),
        (
            {"num_hidden_layers": 3},
            TENSORS,
            "'vit.encoder.layer.2.layernorm_before.weight' is absent there and",
        ),
        ({"num_hidden_layers": 1}, TENSORS, "tensor 'vit.encoder.layer.1.* there and absent in the model"),
        ({"num_hidden_layers": 10**9}, TENSORS, "model that this version does not know .*depth"),
        (
            {"hidden_size": 60_000, "num_attention_heads": 1},
            TENSORS,
            r"cls_token' is \[1, 1, 48\] there and \[1, 1, 6",
        ),
        ({"image_size": 64}, TENSORS, r"position_embeddings' is \[1, 10, 48\] there and \[1, 17, 48\] in the model"),
        ({"id2label": {"0": "a", "1": "b"}}, TENSORS, "has 7 classes, and 'id2label' in config.json names 2"),
        ({}, TENSORS | {"decoder.weight": torch.zeros(3)}, r"tensor 'decoder.weight' is \[3\] there and absent"),
        ({}, {**TENSORS, "classifier.bias": torch.zeros(8)}, r"'classifier.bias' is \[8\] there and \[7\] in the"),
        ({}, TENSORS | DENSE, "has a pooler .* and a classifier .*: remove one of them"),
        ({}, TENSORS | {"vit.step": torch.tensor([3])}, "tensor 'vit.step' holds I64, and weights are floating-point"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, config, tensors, message):
    folder = save(tmp_path / "vit", tensors, config)
    with pytest.raises(UserError, match=message) as refused:
        load_model(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "\0", '"x"', "[" * 100_000])
def test_a_damaged_configuration_is_refused_in_a_sentence(tmp_path, text):
    folder = save(tmp_path / "vit", TENSORS)
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config.json (cannot be read|is not a JSON object)"):
        load_model(folder)


def test_a_folder_without_safetensors_is_refused(tmp_path):
    folder = save(tmp_path / "vit", TENSORS)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="has no model.safetensors: save the model again with transformers"):
        load_model(folder)
    (folder / "model.safetensors").write_bytes((folder / "pytorch_model.bin").read_bytes()[:-9])
    with pytest.raises(UserError, match="model.safetensors is not a complete safetensors file"):
        load_model(folder)


# ---- against transformers itself


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed")


def randomise(model, seed=0):
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
IMAGES = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(3))


@pytest.mark.filterwarnings("ignore:.*has no preprocessor_config.json")
@pytest.mark.parametrize("pooler", [True, False])
def test_a_vit_without_head_is_theirs_and_its_pooler_is_the_tanh_layer(transformers, tmp_path, pooler):
    theirs = randomise(transformers.ViTModel(transformers.ViTConfig(**SIZE, intermediate_size=70), pooler))
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    with torch.no_grad():
        expected = theirs(IMAGES)
        torch.testing.assert_close(ours.forward_features(IMAGES), expected.last_hidden_state, rtol=0, atol=1e-5)
        pooled = expected.pooler_output if pooler else expected.last_hidden_state[:, 0]
        torch.testing.assert_close(ours.represent(IMAGES), pooled, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours(IMAGES), pooled, rtol=0, atol=1e-5)
        dropped = load_model(tmp_path, num_classes=0).represent(IMAGES)
        torch.testing.assert_close(dropped, expected.last_hidden_state[:, 0], rtol=0, atol=1e-5)
    assert (ours.config.num_classes, ours.config.head) == (0, "mlp" if pooler else "linear")


@pytest.mark.filterwarnings("ignore:.*has no preprocessor_config.json")
def test_a_dinov2_is_theirs_also_for_larger_images(transformers, tmp_path):
    theirs = randomise(transformers.Dinov2Model(transformers.Dinov2Config(**SIZE)))
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert (ours.config.layer_scale, ours.config.layer_norm_eps) == (1.0, 1e-6)
    assert ours.patch_embed.mean == (0.485, 0.456, 0.406)
    larger = torch.randn(1, 3, 70, 70)
    with torch.no_grad():
        expected = theirs(IMAGES)
        torch.testing.assert_close(ours.forward_features(IMAGES), expected.last_hidden_state, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.represent(IMAGES), expected.pooler_output, rtol=0, atol=1e-5)
        ours = load_model(tmp_path, image_size=70, interpolation="bicubic")
        expected = theirs(larger).last_hidden_state
        torch.testing.assert_close(ours.forward_features(larger), expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*has no preprocessor_config.json")
def test_dinov2_with_registers(transformers, tmp_path):
    """Their class token has a position, ours has the sum; registers have none in either."""
    config = transformers.Dinov2WithRegistersConfig(**SIZE, num_register_tokens=3)
    theirs = randomise(transformers.Dinov2WithRegistersModel(config))
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert (ours.config.registers, ours.reg_token.shape[1], ours.config.layer_scale) == (3, 3, 1.0)
    assert load_model(tmp_path, image_size=2 * ours.config.image_size).pos_embed.shape[1] == 4 * ours.shape.patches
    with torch.no_grad():
        expected = theirs(IMAGES)
        torch.testing.assert_close(ours.forward_features(IMAGES), expected.last_hidden_state, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.represent(IMAGES), expected.pooler_output, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*has no preprocessor_config.json")
def test_a_classifier_of_dinov2_is_refused_unless_it_is_left_out(transformers, tmp_path):
    theirs = randomise(transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**SIZE, num_labels=3)))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"'classifier.weight' is \[3, 64\] there and \[3, 32\] .*leave the head"):
        load_model(tmp_path)
    ours = load_model(tmp_path, num_classes=5)
    with torch.no_grad():
        expected = theirs.dinov2(IMAGES).pooler_output
        torch.testing.assert_close(ours.represent(IMAGES), expected, rtol=0, atol=1e-5)
    assert not ours(IMAGES).any()


KINDS = {
    "classifier": ("ViTForImageClassification", {}),
    "pooler": ("ViTModel", {"num_classes": 0, "head": "mlp"}),
    "no head": ("ViTModel", {"num_classes": 0}),
    "dinov2": ("Dinov2Model", {"num_classes": 0, "layer_scale": 0.1}),
    "tanh GELU": ("ViTForImageClassification", {"activation": "gelu_tanh", "layer_norm_eps": 1e-12}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_ours_without_a_missing_or_unexpected_key(transformers, tmp_path, kind):
    from fastvit_engine.config import ModelConfig
    from fastvit_engine.models import VisionTransformer
    from fastvit_engine.models.weights.pretrained import Pretrained, parameter_shapes

    name, settings = KINDS[kind]
    config = ModelConfig(
        **{"name": "Ti/14", "image_size": 28, "num_classes": 3, "width": 32, "depth": 2, "heads": 2} | settings
    )
    ours = randomise(VisionTransformer(config, mean=(0.5,) * 3, std=(0.5,) * 3))
    state = {parameter: tensor.detach() for parameter, tensor in ours.state_dict().items()}
    names = ("a", "b", "c") if config.num_classes else None
    pixels = {"mean": (0.1, 0.2, 0.3), "std": (0.2, 0.3, 0.4), "eval_crop": 0.7, "eval_transform": "timm"}
    model = Pretrained("here", config, parameter_shapes(config), lambda n: {k: state[k] for k in n}, pixels, names)
    code = write_folder(model, tmp_path / "out")
    scope = {}
    exec(code[0], scope)
    arguments = {"add_pooling_layer": False} if kind == "no head" else {}
    theirs, info = getattr(transformers, name).from_pretrained(tmp_path / "out", output_loading_info=True, **arguments)
    assert not any(info[key] for key in info), info
    exec(code[1], scope)  # the line that is printed does the same
    with torch.no_grad():
        for loaded in (theirs.eval(), scope["model"].eval()):
            found = loaded(IMAGES)
            if config.num_classes:
                torch.testing.assert_close(found.logits, ours(IMAGES), rtol=0, atol=1e-5)
            else:
                expected = ours.forward_features(IMAGES)
                torch.testing.assert_close(found.last_hidden_state, expected, rtol=0, atol=1e-5)
            if kind == "pooler":
                torch.testing.assert_close(found.pooler_output, ours(IMAGES), rtol=0, atol=1e-5)
    if config.num_classes:
        assert theirs.config.id2label == {0: "a", 1: "b", 2: "c"} and theirs.config.label2id["c"] == 2
    again = open_model(tmp_path / "out")
    assert (again.pixels, again.class_names) == (pixels, names)
    same = {"layer_scale": again.config.layer_scale, "head_bias": 0.0}  # initial values, which a folder does not have
    assert again.config == config.model_copy(update=same)
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    theirs.save_pretrained(tmp_path / "theirs")
    saved = load_file(tmp_path / "theirs" / "model.safetensors")
    assert {key: tensor.shape for key, tensor in loaded.items()} == {key: tensor.shape for key, tensor in saved.items()}
    assert all(torch.equal(loaded[key], saved[key]) for key in saved)


def test_the_image_processor_resizes_and_crops_as_the_evaluation_does(transformers, tmp_path):
    pytest.importorskip("torchvision")
    from PIL import Image

    folder = save(tmp_path / "vit", TENSORS)
    model = open_model(folder)
    pixels = {"mean": (0.1, 0.2, 0.3), "std": (0.2, 0.3, 0.4), "eval_crop": 0.75, "eval_transform": "timm"}
    write_folder(model.__class__(model.where, model.config, model.shapes, model.load, pixels), tmp_path / "out")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    image = Image.new("RGB", (100, 80), (255, 0, 128))
    found = processor(image, return_tensors="pt")["pixel_values"]
    assert found.shape == (1, 3, 48, 48)
    expected = (torch.tensor([1, 0, 128 / 255]) - torch.tensor(pixels["mean"])) / torch.tensor(pixels["std"])
    torch.testing.assert_close(found[0, :, 20, 20], expected)
