"""Random arrays of BiT and of hybrids in the official layouts, and what the authors' code computes: float64, numpy."""

import math

import numpy as np

from tests.fastvit_engine.models.weights.official import Arrays, forward, random_arrays


def pad_same(x, kernel, stride, value=0.0):
    """TensorFlow's padding of [B, H, W, C]."""
    pads = [(0, 0)]
    for size in x.shape[1:3]:
        missing = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        pads.append((missing // 2, missing - missing // 2))
    return np.pad(x, [*pads, (0, 0)], constant_values=value)


def windows(x, kernel, stride):
    """[B, h, w, C, kernel, kernel] of what is padded already."""
    view = np.lib.stride_tricks.sliding_window_view(x, (kernel, kernel), axis=(1, 2))
    return view[:, ::stride, ::stride]


def convolve(x, kernel, stride):
    return np.einsum("bhwcij,ijco->bhwo", windows(x, kernel.shape[0], stride), kernel, optimize=True)


def group_norm(x, scale, shift, eps):
    grouped = x.reshape(*x.shape[:3], 32, -1)
    mean = grouped.mean(axis=(1, 2, 4), keepdims=True)
    variance = grouped.var(axis=(1, 2, 4), keepdims=True)
    return ((grouped - mean) / np.sqrt(variance + eps)).reshape(x.shape) * scale.ravel() + shift.ravel()


# ---- hybrids: google-research/vision_transformer


def hybrid_arrays(*, stages, cells, grid=2, flat=False, seed=0, **of_transformer) -> Arrays:
    """As `random_arrays`, with a ResNet of these stages and width 64. flat: GroupNorm arrays [C], not [1, 1, 1, C]."""
    rng = np.random.default_rng(seed + 1)
    channels = 64 * 4 * 2 ** (len(stages) - 1) if stages else 64
    arrays = random_arrays(patch=cells, grid=grid, seed=seed, **of_transformer)
    width = arrays["embedding/bias"].shape[0]
    arrays["embedding/kernel"] = (
        rng.standard_normal((cells, cells, channels, width)) / math.sqrt(cells * cells * channels)
    ).astype(np.float32)

    def add(conv, norm, kernel, inputs, outputs):
        weights = rng.standard_normal((kernel, kernel, inputs, outputs)) * 0.05 + 0.02
        arrays[f"{conv}/kernel"] = weights.astype(np.float32)
        shape = (outputs,) if flat else (1, 1, 1, outputs)
        arrays[f"{norm}/scale"] = (1 + 0.3 * rng.standard_normal(shape)).astype(np.float32)
        arrays[f"{norm}/bias"] = (0.3 * rng.standard_normal(shape)).astype(np.float32)

    add("conv_root", "gn_root", 7, 3, 64)
    inputs = 64
    for stage, blocks in enumerate(stages):
        middle = 64 * 2**stage
        for block in range(blocks):
            unit = f"block{stage + 1}/unit{block + 1}"
            if block == 0:
                add(f"{unit}/conv_proj", f"{unit}/gn_proj", 1, inputs, 4 * middle)
            add(f"{unit}/conv1", f"{unit}/gn1", 1, inputs, middle)
            add(f"{unit}/conv2", f"{unit}/gn2", 3, middle, middle)
            add(f"{unit}/conv3", f"{unit}/gn3", 1, middle, 4 * middle)
            inputs = 4 * middle
    return arrays


def hybrid_forward(arrays: Arrays, images, stages):
    """As `forward`, of a hybrid: images [B, H, W, 3]."""
    w = {name: array.astype(np.float64) for name, array in arrays.items()}

    def layer(x, name, number, stride):
        kernel = w[f"{name}conv{number}/kernel"]
        centred = kernel - kernel.mean(axis=(0, 1, 2))
        standardised = centred / (kernel.std(axis=(0, 1, 2)) + 1e-5)
        x = convolve(pad_same(x, kernel.shape[0], stride), standardised, stride)
        return group_norm(x, w[f"{name}gn{number}/scale"], w[f"{name}gn{number}/bias"], 1e-6)

    def relu(x):
        return np.maximum(x, 0)

    x = relu(layer(images.astype(np.float64), "", "_root", 2))
    x = windows(pad_same(x, 3, 2, -np.inf), 3, 2).max(axis=(4, 5))
    for stage, blocks in enumerate(stages):
        for block in range(blocks):
            name, stride = f"block{stage + 1}/unit{block + 1}/", 2 if stage and not block else 1
            shortcut = x if block else layer(x, name, "_proj", stride)
            x = relu(layer(x, name, 1, 1))
            x = relu(layer(x, name, 2, stride))
            x = relu(layer(x, name, 3, 1) + shortcut)
    # the Transformer is `forward`, whose patches may have any number of channels
    return forward(arrays, x)


# ---- BiT: the first code


def bit_arrays(*, stages=(3, 4, 6, 3), width=64, classes=7, seed=0, numbered=False) -> Arrays:
    """Under the names of the first code of BiT. numbered: convolutions have numbers in their names, as in some files.

    Of another number of blocks, no ResNet that has a name.
    """
    rng = np.random.default_rng(seed)
    arrays: Arrays = {}

    def kernel(name, size, inputs, outputs):
        number = f"_{len(arrays)}" if numbered and arrays else ""
        weights = rng.standard_normal((size, size, inputs, outputs), np.float32) * 0.05 + 0.02
        arrays[f"resnet/{name}/standardized_conv2d{number}/kernel"] = weights

    def norm(name, channels):
        arrays[f"resnet/{name}/gamma"] = 1 + 0.3 * rng.standard_normal(channels, np.float32)
        arrays[f"resnet/{name}/beta"] = 0.3 * rng.standard_normal(channels, np.float32)

    kernel("root_block", 7, 3, width)
    inputs = width
    for stage, blocks in enumerate(stages):
        middle = width * 2**stage
        for block in range(blocks):
            unit = f"block{stage + 1}/unit{block + 1:02d}"
            if block == 0:
                kernel(f"{unit}/a/proj", 1, inputs, 4 * middle)
            sizes = {"a": (1, inputs, middle), "b": (3, middle, middle), "c": (1, middle, 4 * middle)}
            for part, (size, before, after) in sizes.items():
                kernel(f"{unit}/{part}", size, before, after)
                norm(f"{unit}/{part}/group_norm", before)
            inputs = 4 * middle
    norm("group_norm", inputs)
    if classes:
        arrays["resnet/head/conv2d/kernel"] = rng.standard_normal((1, 1, inputs, classes), np.float32) / math.sqrt(
            inputs
        )
        arrays["resnet/head/conv2d/bias"] = rng.standard_normal(classes, np.float32)
    return arrays


def bit_big_vision(arrays: Arrays) -> Arrays:
    """The same weights under the names of big_vision."""
    renamed = {}
    for name, array in arrays.items():
        new = name.removeprefix("resnet/")
        for number, part in enumerate("abc", start=1):
            new = new.replace(f"/{part}/standardized_conv2d/", f"/conv{number}/")
            new = new.replace(f"/{part}/group_norm/", f"/gn{number}/")
        new = new.replace("a/proj/standardized_conv2d", "conv_proj").replace("head/conv2d", "head")
        new = new.replace("root_block/standardized_conv2d", "root_block/conv_root")
        new = new.replace("gamma", "scale").replace("beta", "bias")
        new = f"norm-pre-head/{new.split('/')[1]}" if new.startswith("group_norm") else new
        if new.startswith("norm-pre-head") or "/gn" in new:
            array = array[None, None, None]
        renamed[new] = array[0, 0] if new == "head/kernel" else array
    return renamed


def bit_forward(arrays: Arrays, images, stages=(3, 4, 6, 3)):
    """Representation and logits of images [B, H, W, 3]."""
    w = {name: array.astype(np.float64) for name, array in arrays.items()}

    def conv(x, name, stride=1):
        kernel = w[f"resnet/{name}/standardized_conv2d/kernel"]
        centred = kernel - kernel.mean(axis=(0, 1, 2))
        standardised = centred / np.sqrt((centred**2).mean(axis=(0, 1, 2)) + 1e-10)
        edge = kernel.shape[0] // 2
        return convolve(np.pad(x, [(0, 0), (edge, edge), (edge, edge), (0, 0)]), standardised, stride)

    def norm(x, name):
        return np.maximum(group_norm(x, w[f"resnet/{name}/gamma"], w[f"resnet/{name}/beta"], 1e-5), 0)

    x = conv(images.astype(np.float64), "root_block", 2)
    x = windows(np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)]), 3, 2).max(axis=(4, 5))
    for stage, blocks in enumerate(stages):
        for block in range(blocks):
            name, stride = f"block{stage + 1}/unit{block + 1:02d}", 2 if stage and not block else 1
            normalised = norm(x, f"{name}/a/group_norm")
            shortcut = x if block else conv(normalised, f"{name}/a/proj", stride)
            x = conv(normalised, f"{name}/a")
            x = conv(norm(x, f"{name}/b/group_norm"), f"{name}/b", stride)
            x = conv(norm(x, f"{name}/c/group_norm"), f"{name}/c") + shortcut
    pooled = norm(x, "group_norm").mean(axis=(1, 2))
    logits = pooled
    if "resnet/head/conv2d/kernel" in w:
        logits = pooled @ w["resnet/head/conv2d/kernel"][0, 0] + w["resnet/head/conv2d/bias"]
    return {"representation": pooled, "logits": logits}
