"""Random files in the official layouts, and what the paper computes with them: float64, in numpy alone."""

import math
import re
from pathlib import Path

import numpy as np
from scipy.special import erf

Arrays = dict[str, np.ndarray]
_BIG_VISION = {"Attention_1": "Attention_0", "LayerNorm_2": "LayerNorm_1", "MlpBlock_3": "MlpBlock_0"}


def random_arrays(
    *,
    patch=16,
    width=48,
    depth=2,
    heads=3,
    hidden=96,
    grid=3,
    classes=7,
    token=True,
    tanh=False,
    seed=0,
    attention_pool=False,
) -> Arrays:
    """Arrays under the names of google-research/vision_transformer, on the scale that trained ones have.

    attention_pool: of big_vision's MAPHead, and no class token.
    """
    token = token and not attention_pool
    rng = np.random.default_rng(seed)

    def dense(*shape, fan_in):
        return rng.standard_normal(shape, np.float32) / math.sqrt(fan_in)

    def some(*shape):
        return rng.standard_normal(shape, np.float32) * 0.2

    def attention_and_mlp(attention, mlp):
        for part in ("query", "key", "value"):
            arrays[f"{attention}/{part}/kernel"] = dense(width, heads, width // heads, fan_in=width) * 1.5
            arrays[f"{attention}/{part}/bias"] = some(heads, width // heads)
        arrays[f"{attention}/out/kernel"] = dense(heads, width // heads, width, fan_in=width)
        arrays[f"{attention}/out/bias"] = some(width)
        for name, (inputs, outputs) in {"Dense_0": (width, hidden), "Dense_1": (hidden, width)}.items():
            arrays[f"{mlp}/{name}/kernel"] = dense(inputs, outputs, fan_in=inputs)
            arrays[f"{mlp}/{name}/bias"] = some(outputs)

    arrays = {
        "embedding/kernel": dense(patch, patch, 3, width, fan_in=patch * patch * 3),
        "embedding/bias": some(width),
        "Transformer/posembed_input/pos_embedding": some(1, grid * grid + token, width),
        "Transformer/encoder_norm/scale": 1 + some(width),
        "Transformer/encoder_norm/bias": some(width),
    }
    if token:
        arrays["cls"] = some(1, 1, width)
    for index in range(depth):
        block = f"Transformer/encoderblock_{index}"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            arrays |= {f"{block}/{norm}/scale": 1 + some(width), f"{block}/{norm}/bias": some(width)}
        attention_and_mlp(f"{block}/MultiHeadDotProductAttention_1", f"{block}/MlpBlock_3")
    if attention_pool:
        arrays["MAPHead_0/probe"] = some(1, 1, width) * 5
        arrays |= {"MAPHead_0/LayerNorm_0/scale": 1 + some(width), "MAPHead_0/LayerNorm_0/bias": some(width)}
        attention_and_mlp("MAPHead_0/MultiHeadDotProductAttention_0", "MAPHead_0/MlpBlock_0")
    if tanh:
        arrays |= {"pre_logits/kernel": dense(width, width, fan_in=width), "pre_logits/bias": some(width)}
    if classes:
        arrays |= {"head/kernel": dense(width, classes, fan_in=width), "head/bias": some(classes)}
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def big_vision(arrays: Arrays, *, stacked: bool) -> Arrays:
    """The same weights under the names of big_vision; the class token has no position there."""
    renamed: Arrays = {}
    for name, array in arrays.items():
        for before, after in _BIG_VISION.items():
            name = name.replace(before, after)
        if name == "Transformer/posembed_input/pos_embedding":
            name, array = "pos_embedding", array[:, int("cls" in arrays) :]
        renamed[name] = array
    if not stacked:
        return renamed
    depth = len({name.split("/")[1] for name in renamed if "encoderblock_" in name})
    result = {name: array for name, array in renamed.items() if "encoderblock_" not in name}
    for name in renamed:
        if "encoderblock_0/" in name:
            layers = [renamed[name.replace("encoderblock_0", f"encoderblock_{index}")] for index in range(depth)]
            result[name.replace("encoderblock_0", "encoderblock")] = np.stack(layers)
    return result


def save(path: Path, arrays: Arrays, prefix: str = "") -> Path:
    np.savez(path, **{prefix + name: array for name, array in arrays.items()})
    return path


def forward(arrays: Arrays, images: np.ndarray, *, eps=1e-6, exact_gelu=False) -> dict[str, np.ndarray]:
    """Tokens after the last LayerNorm, representation and logits of images [B, H, W, 3], or maps of C channels.

    Equations 1 to 4 of Dosovitskiy et al. 2021; the position table fits the images.
    """
    w = {name: array.astype(np.float64) for name, array in arrays.items()}
    kernel = w["embedding/kernel"]
    patch, width = kernel.shape[0], kernel.shape[-1]
    batch, height, _, _ = images.shape
    rows = height // patch
    patches = images.astype(np.float64).reshape(batch, rows, patch, rows, patch, -1).transpose(0, 1, 3, 2, 4, 5)
    x = patches.reshape(batch, rows * rows, -1) @ kernel.reshape(-1, width) + w["embedding/bias"]
    if "cls" in w:
        x = np.concatenate([np.broadcast_to(w["cls"], (batch, 1, width)), x], axis=1)
    x = x + w["Transformer/posembed_input/pos_embedding"]

    def norm(x, name):
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(variance + eps) * w[f"{name}/scale"] + w[f"{name}/bias"]

    def gelu(x):
        if exact_gelu:
            return x * (1 + erf(x / math.sqrt(2))) / 2
        return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def attend(queries, tokens, name):
        query, key, value = (
            np.einsum("bnd,dhe->bhne", y, w[f"{name}/{part}/kernel"]) + w[f"{name}/{part}/bias"][:, None]
            for part, y in (("query", queries), ("key", tokens), ("value", tokens))
        )
        scores = query @ key.swapaxes(-1, -2) / math.sqrt(query.shape[-1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        attended = weights / weights.sum(-1, keepdims=True) @ value
        return np.einsum("bhne,hed->bnd", attended, w[f"{name}/out/kernel"]) + w[f"{name}/out/bias"]

    def mlp(x, name):
        hidden = gelu(x @ w[f"{name}/Dense_0/kernel"] + w[f"{name}/Dense_0/bias"])
        return hidden @ w[f"{name}/Dense_1/kernel"] + w[f"{name}/Dense_1/bias"]

    for index in range(len([name for name in w if re.fullmatch(r".*block_\d+/LayerNorm_0/scale", name)])):
        block = f"Transformer/encoderblock_{index}"
        y = norm(x, f"{block}/LayerNorm_0")
        x = x + attend(y, y, f"{block}/MultiHeadDotProductAttention_1")
        x = x + mlp(norm(x, f"{block}/LayerNorm_2"), f"{block}/MlpBlock_3")
    tokens = norm(x, "Transformer/encoder_norm")
    if "MAPHead_0/probe" in w:  # Zhai et al. 2022, section 3.2
        probe = np.broadcast_to(w["MAPHead_0/probe"], (batch, 1, width))
        pooled = attend(probe, tokens, "MAPHead_0/MultiHeadDotProductAttention_0")
        pooled = (pooled + mlp(norm(pooled, "MAPHead_0/LayerNorm_0"), "MAPHead_0/MlpBlock_0"))[:, 0]
    else:
        pooled = tokens[:, 0] if "cls" in w else tokens.mean(axis=1)
    if "pre_logits/kernel" in w:
        pooled = np.tanh(pooled @ w["pre_logits/kernel"] + w["pre_logits/bias"])
    logits = pooled @ w["head/kernel"] + w["head/bias"] if "head/kernel" in w else pooled
    return {"tokens": tokens, "representation": pooled, "logits": logits}
