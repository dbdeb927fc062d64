"""Trained weights of somebody else: the same features from their own graph, from ours, and after every conversion."""

import numpy as np
import pytest
import torch

from fastvit_engine import load_model
from fastvit_engine.cli import main
from fastvit_engine.models import parameter_count
from tests.fastvit_engine.models.weights.dinov2_weights import onnx_model, write_dinov2
from tests.kernels.integrations.conftest import TORCHVISION  # lets timm and transformers be imported

assert TORCHVISION is None or TORCHVISION.ns == "torchvision"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def graph():
    return onnx_model()


@pytest.fixture(scope="module")
def folder(graph, tmp_path_factory):
    return write_dinov2(graph, tmp_path_factory.mktemp("dinov2") / "hf")


def images_of(size):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_tokens_equal_those_of_the_onnx_graph(graph, folder, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install onnxruntime")
    import onnx

    last = next(node for node in graph.graph.node if "backbone.layernorm.bias" in node.input)
    graph.graph.output.append(onnx.ValueInfoProto(name=last.output[0]))
    session = runtime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    images = images_of(224)
    expected = session.run([last.output[0]], {"input_image": images.numpy()})[0]
    model = load_model(folder, image_size=224, interpolation="bicubic")
    with torch.no_grad():
        found = model.forward_features(images).numpy()
    assert np.abs(expected).max() > 3
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    assert parameter_count(load_model(folder).config) == 22_056_192


def test_conversions_keep_the_tokens(folder, tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    words = ["--image-size", "112", "--interpolation", "bicubic"]
    assert main(["convert", str(folder), str(tmp_path / "x.safetensors"), "--to", "timm", *words]) == 0
    assert main(["convert", str(folder), str(tmp_path / "page"), "--to", "hub-folder", *words]) == 0
    assert main(["convert", str(tmp_path / "page"), str(tmp_path / "hf"), "--to", "hf"]) == 0
    images = images_of(112)
    with torch.no_grad():
        expected = transformers.Dinov2Model.from_pretrained(folder).eval()(images).last_hidden_state
        resized = transformers.Dinov2Model.from_pretrained(tmp_path / "hf").eval()(images).last_hidden_state
        page = timm.create_model(f"local-dir:{tmp_path / 'page'}", pretrained=True).eval().forward_features(images)
        found = [load_model(tmp_path / name).forward_features(images) for name in ("x.safetensors", "page", "hf")]
    for tokens in (resized, page, *found):
        torch.testing.assert_close(tokens, expected, rtol=0, atol=2e-5)
