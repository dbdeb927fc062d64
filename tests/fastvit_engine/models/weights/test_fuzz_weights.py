"""Any bytes in a file of weights are read or refused in one sentence, in bounded time and memory."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from safetensors.torch import save as to_bytes

from fastvit_engine.checkpoint.load import load_model
from fastvit_engine.models.weights.safetensors_file import model_metadata
from tests.fastvit_engine.fuzzing import fuzz, mutated, read_or_refuse
from tests.fastvit_engine.models.official_resnets import hybrid_arrays
from tests.fastvit_engine.models.test_vit import MEAN, STD, small
from tests.fastvit_engine.models.weights import test_huggingface
from tests.fastvit_engine.models.weights.official import big_vision, random_arrays, save

pytestmark = [pytest.mark.timeout(3600), pytest.mark.filterwarnings("ignore:.*(does not say mean|has no prepro)")]
TINY = {"patch": 2, "width": 4, "depth": 1, "heads": 2, "hidden": 3, "grid": 1, "classes": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def _npz_seeds() -> list[bytes]:

    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "x.npz"
        arrays = random_arrays(**TINY)
        # a hybrid, and what is of BiT only by its names
        hybrid = hybrid_arrays(cells=8, stages=(), **{key: value for key, value in TINY.items() if key != "patch"})
        root = {"resnet/root_block/standardized_conv2d/kernel": np.zeros((1, 1, 1, 64), np.float32)}
        units = {f"resnet/block{n}/unit0{m}/a/group_norm/gamma": np.zeros(1) for n in (1, 2, 3, 4) for m in (1, 2, 3)}
        layouts = (arrays, big_vision(arrays, stacked=True), hybrid, root | units)
        return [save(path, layout).read_bytes() for layout in layouts]


NPZ = _npz_seeds()
WORDS = [
    b"PK\x03\x04",
    b"PK\x05\x06",
    b"\x93NUMPY",
    b"(9999999999,)",
    b"'|O'",
    b"'<f8'",
    b"encoderblock_7",
    b"'V2'",
    b"/unit9999/",
    b"block3/unit02",
]


@fuzz
@given(mutated(NPZ, WORDS))
def test_any_npz(folder, content):
    (folder / "x.npz").write_bytes(content)
    read_or_refuse(lambda: load_model(folder / "x.npz"))


MODEL = small(depth=1)
METADATA = model_metadata(MODEL.config.model_dump(mode="json"), {"mean": MEAN, "std": STD}, ["a", "b"], "here")
SAFETENSORS = [to_bytes(MODEL.state_dict(), METADATA), to_bytes({"cls_token": torch.zeros(1, 1, 3)})]
KEYS = [b'"BF16"', b'"I64"', b'\\"depth\\": 9999', b'\\"width\\": 65536', b'\\"image_size\\": 65536', b"[0,0]", b"null"]


@fuzz
@given(mutated(SAFETENSORS, KEYS))
def test_any_safetensors(folder, content):
    (folder / "x.safetensors").write_bytes(content)
    read_or_refuse(lambda: load_model(folder / "x.safetensors"))
    for name in ("Ti/4", "R+Ti/16"):
        read_or_refuse(lambda name=name: load_model(folder / "x.safetensors", name=name))


CONFIGS = [
    json.dumps(test_huggingface.CONFIG | {"id2label": {str(n): f"class {n}" for n in range(7)}}).encode(),
    json.dumps({"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {}, "model_args": {"depth": 1}}).encode(),
]
TEXTS = [b'"dinov2"', b'"architecture"', b"NaN", b"1e999", b"-3", b"[48,48]", b"true", b"null", b'"hidden_size":65536,']


@fuzz
@given(mutated(CONFIGS, TEXTS))
def test_any_configuration(folder, content):
    test_huggingface.save(folder / "vit", test_huggingface.TENSORS)
    (folder / "vit" / "config.json").write_bytes(content)
    read_or_refuse(lambda: load_model(folder / "vit"))


SAID = [b'"do_center_crop": true,', b'"rescale_factor": "x",', b"NaN", b"1e999", b"null", b"{}"]
PREPROCESSORS = [json.dumps(test_huggingface.PREPROCESSOR | {"size": {"shortest_edge": 60}, "crop_size": 48}).encode()]


@fuzz
@given(mutated(PREPROCESSORS, SAID))
def test_any_image_processor(folder, content):
    test_huggingface.save(folder / "vit", test_huggingface.TENSORS)
    (folder / "vit" / "preprocessor_config.json").write_bytes(content)
    read_or_refuse(lambda: load_model(folder / "vit"))
