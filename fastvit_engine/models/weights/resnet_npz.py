"""ResNets in official `.npz` files: those of BiT, and what is before the Transformer in files of hybrids."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fastvit_engine.config import ModelConfig
from fastvit_engine.config.model_shape import resolve_shape
from fastvit_engine.config.resnet_shape import Convolution, ResNetShape, bit_name
from fastvit_engine.errors import UserError
from fastvit_engine.models.weights.entries import Dimensions, Entry
from fastvit_engine.shown import brief

_OURS = re.compile(r"(?:stages\.(\d+)\.blocks\.(\d+)\.)?(.+)")
_UNIT = re.compile(r"(?:resnet/)?block(\d{1,4})/unit(\d{1,4})/.+")
_NUMBERED = re.compile(r"/standardized_conv2d_\d+/")  # in some files of BiT
# Where the first convolution is: in files of the first code of BiT, in those of big_vision, and in hybrids.
_FIRST_CODE = "resnet/root_block/standardized_conv2d/kernel"
_BIG_VISION = "root_block/conv_root/kernel"
_HYBRID = "conv_root/kernel"
_PARTS = {"conv1": "a", "conv2": "b", "conv3": "c", "downsample.conv": "a/proj"}  # of a block, in the first code


# ---- BiT


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """The names of a file, by the names that they are known by: some files number their convolutions."""
    return {_NUMBERED.sub("/standardized_conv2d/", name): name for name in names}


def is_bit(names: Iterable[str]) -> bool:
    """Whether a file with these arrays, under their plain names, is of a ResNet of BiT."""
    return not {_FIRST_CODE, _BIG_VISION}.isdisjoint(names)


def bit_config(shapes: Mapping[str, Dimensions], where: str) -> dict[str, Any]:
    """The section `model` of a file of BiT; images are of 224 pixels, as no array says it. Raises UserError."""
    root = _FIRST_CODE if _FIRST_CODE in shapes else _BIG_VISION
    resnet = ResNetShape(_stages(shapes, where), _outputs(shapes, root, where), preactivation=True)
    name = bit_name(resnet)
    if name is None:
        raise UserError(
            f"{where} has {', '.join(map(str, resnet.stages)) or 'no'} blocks and {resnet.width} channels after the "
            "first convolution, and is no ResNet of BiT that this version knows, as R50x1"
        )
    head = "resnet/head/conv2d/kernel" if root == _FIRST_CODE else "head/kernel"
    return {"name": name, "num_classes": _outputs(shapes, head, where) if head in shapes else 0}


def bit_entries(config: ModelConfig, names: Iterable[str] = (_FIRST_CODE,)) -> Iterator[Entry]:
    """One entry per parameter of a ResNet, as the first code of BiT names them; or as a file with these arrays does."""
    shape = resolve_shape(config)
    assert shape.resnet is not None
    first = _FIRST_CODE in names
    scale, shift = ("gamma", "beta") if first else ("scale", "bias")
    norm_of = (lambda channels: (channels,)) if first else (lambda channels: (1, 1, 1, channels))

    def norm(ours: str, theirs: str, channels: int) -> Iterator[Entry]:
        yield Entry(f"{ours}.weight", (channels,), {f"{theirs}/{scale}": norm_of(channels)})
        yield Entry(f"{ours}.bias", (channels,), {f"{theirs}/{shift}": norm_of(channels)})

    for one in shape.resnet.convolutions():
        unit, part = _unit(one.name, padded=True)
        if not unit:
            theirs = _FIRST_CODE if first else _BIG_VISION
        elif first:
            theirs = f"resnet/{unit}/{_PARTS[part]}/standardized_conv2d/kernel"
        else:
            theirs = f"{unit}/{part.replace('downsample.conv', 'conv_proj')}/kernel"
        yield _kernel(one, theirs)
        if unit and part != "downsample.conv":  # the norm before it
            group = f"resnet/{unit}/{_PARTS[part]}/group_norm" if first else f"{unit}/gn{part[-1]}"
            yield from norm(one.name.replace("conv", "norm"), group, one.inputs)
    yield from norm("norm", "resnet/group_norm" if first else "norm-pre-head", shape.width)
    if classes := config.num_classes:
        kernel = (1, 1, shape.width, classes) if first else (shape.width, classes)
        head = "resnet/head/conv2d" if first else "head"
        axes = (2, 3, 1, 0)
        yield Entry("head.fc.weight", (classes, shape.width, 1, 1), {f"{head}/kernel": kernel}, axes=axes)
        yield Entry("head.fc.bias", (classes,), {f"{head}/bias": (classes,)})


# ---- hybrids


def hybrid_resnet(shapes: Mapping[str, Dimensions], where: str) -> ResNetShape | None:
    """The ResNet before the Transformer; None if there is none. Raises UserError if it is damaged."""
    if _HYBRID not in shapes:
        return None
    return ResNetShape(_stages(shapes, where), _outputs(shapes, _HYBRID, where))


def hybrid_entries(resnet: ResNetShape, shapes: Mapping[str, Dimensions] | None = None) -> Iterator[Entry]:
    """One entry per parameter of a hybrid's ResNet.

    shapes: of the arrays of a file, if there is one. Scales and shifts of published files are [1, 1, 1, C], those of
    later code [C]; without a file they are as in the former.
    """
    for one in resnet.convolutions():
        unit, part = _unit(one.name)
        before = f"{unit}/" if unit else ""
        number = {"downsample.conv": "_proj"}.get(part, part[-1]) if unit else "_root"
        ours = f"patch_embed.backbone.{one.name}"
        yield _kernel(one._replace(name=ours), f"{before}conv{number}/kernel")
        for inner, their_inner in (("weight", "scale"), ("bias", "bias")):
            theirs, squeezed = f"{before}gn{number}/{their_inner}", (one.outputs,)
            flat = shapes is not None and shapes.get(theirs) == squeezed
            name = f"{ours.rpartition('conv')[0]}norm{ours.rpartition('conv')[2]}.{inner}"
            yield Entry(name, squeezed, {theirs: squeezed if flat else (1, 1, 1, one.outputs)})


# ---- both


def _kernel(one: Convolution, theirs: str) -> Entry:
    shape = {theirs: (one.kernel, one.kernel, one.inputs, one.outputs)}
    return Entry(f"{one.name}.weight", one.shape, shape, axes=(2, 3, 1, 0))


def _unit(ours: str, *, padded: bool = False) -> tuple[str, str]:
    """Their block and unit of a convolution of ours, and its name within it. padded: units have two digits."""
    match = _OURS.fullmatch(ours)
    assert match is not None
    if match[1] is None:
        return "", match[3]
    unit = f"{int(match[2]) + 1:02d}" if padded else f"{int(match[2]) + 1}"
    return f"block{int(match[1]) + 1}/unit{unit}", match[3]


def _stages(shapes: Mapping[str, Dimensions], where: str) -> tuple[int, ...]:
    """How many blocks each stage has, of the names of the arrays."""
    found = {(int(match[1]), int(match[2])) for name in shapes if (match := _UNIT.fullmatch(name))}
    stages = max((stage for stage, _ in found), default=0)
    counts = tuple(sum(stage == number for stage, _ in found) for number in range(1, min(stages, 99) + 1))
    if found != {(stage, unit) for stage, blocks in enumerate(counts, start=1) for unit in range(1, blocks + 1)}:
        raise UserError(f"{where}: blocks of its ResNet are missing: it has {brief(sorted(found))}")
    return counts


def _outputs(shapes: Mapping[str, Dimensions], kernel: str, where: str) -> int:
    shape = shapes[kernel]
    if len(shape) not in (2, 4) or shape[-1] == 0:
        raise UserError(f"{where}: array '{kernel}' has shape {list(shape)}, and must be that of a convolution")
    return shape[-1]
