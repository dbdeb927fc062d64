"""The weights that a run starts from (`init.from`): what its recipe leaves open comes from there, and so do they.

They are read once, before the first step. A resumed run takes all that from its checkpoint, and needs the file no more.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastvit_engine.checkpoint import TrainerState, store_of, usable_checkpoints
from fastvit_engine.checkpoint.export import find_checkpoint
from fastvit_engine.checkpoint.format import MANIFEST
from fastvit_engine.checkpoint.load import open_model
from fastvit_engine.config import Config, InitConfig, ModelConfig, Resolved
from fastvit_engine.config.checks import check_config
from fastvit_engine.config.model_shape import Shape, resolve_shape, smallest_image
from fastvit_engine.config.timm_model import PREFIX, is_timm
from fastvit_engine.engine.protocol import ParameterSlice
from fastvit_engine.errors import UserError
from fastvit_engine.models import is_for_pretraining
from fastvit_engine.models.timm_library import insist_on_import
from fastvit_engine.models.weights.pretrained import Pretrained
from fastvit_engine.models.weights.safetensors_file import read_header
from fastvit_engine.models.weights.timm_weights import open_timm_file
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.shown import public_url
from fastvit_engine.train.job import Job
from fastvit_engine.train.start import newest_readable

_SIZES = ("width", "depth", "heads", "mlp_dim")
# What a run decides by itself: the images and classes that it trains on, and how it is regularised.
_OWN = {"image_size", "num_classes", "dropout", "drop_path", "drop_path_mode", "head_bias"}
_PIXELS = ("mean", "std")
_EVALUATION = ("eval_crop", "eval_transform")
_WEIGHTS = "model.safetensors"  # in a folder with config.json


@dataclass(frozen=True)
class Filled:
    """The values that a configuration takes from weights, by section and key, and remarks on them.

    notes: what the run does otherwise than the weights say, as it should. class_names: what the outputs of a head that
    is kept mean, if known.
    """

    values: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    origin: str = "init.from"
    class_names: tuple[str, ...] | None = None

    def apply(self, resolved: Resolved) -> Resolved:
        """The configuration with these values. Raises UserError if that is none."""
        if not any(self.values.values()):
            return resolved
        config, origins = resolved.config, dict(resolved.origins)
        for section, values in self.values.items():
            changed = getattr(config, section).model_copy(update=dict(values))
            config = config.model_copy(update={section: changed})
            origins |= {f"{section}.{key}": self.origin for key in values}
        check_config(config)
        return Resolved(config, origins)

    def doubts(self, data: Sequence[str] | None) -> tuple[str, ...]:
        """The remarks, and one more if the head that is kept was trained for other classes than those of `data`."""
        for number, (theirs, ours) in enumerate(zip(self.class_names or (), data or (), strict=False)):
            if theirs != ours:
                return (
                    *self.warnings,
                    f"class {number} is '{theirs}' in the weights of init.from and '{ours}' in data.train, and "
                    "init.head = keep: the head begins with answers to other classes; set init.head=new unless only "
                    "the spelling differs",
                )
        return self.warnings


def fill_in(resolved: Resolved, run: RunFolder | None, *, resume: bool) -> Filled:
    """What the recipe leaves open: from the checkpoint that the run resumes from, else from `init.from`, if it is set.

    Raises UserError, naming both, if a value that is given contradicts the weights.
    """
    config = resolved.config
    if run is not None and resume and (state := _state_of(config, run)) is not None:
        return _from_checkpoint(config, state)
    if config.init.from_ is None:
        return Filled()
    return _from_weights(resolved, _open(config))


def _open(config: Config) -> Pretrained:
    settings = config.init
    assert settings.from_ is not None
    path = Path(settings.from_)
    if path.suffix == ".safetensors" and path.is_file() and "model" not in (header := read_header(path))[0]:
        if is_timm(config.model):
            return open_timm_file(str(path), config.model.name, *header[1:], arguments=config.model.timm)
        raise UserError(
            f"{path} does not say which model its weights are of; if it has the names of timm, `fastvit convert {path} "
            "NEW.safetensors --to timm --name B/16`, with its own name, makes a file to start from"
        )
    return open_model(settings.from_, head=settings.head == "keep")


def _state_of(config: Config, run: RunFolder) -> TrainerState | None:
    """The state that a run resumes from, if it began with weights of another, or is said to."""
    state = newest_readable(usable_checkpoints(store_of(config.checkpoint, run)))[1]
    return None if state is None or (state.init is None and config.init.from_ is None) else state


def _from_checkpoint(config: Config, state: TrainerState) -> Filled:
    then, given = dict(state.fingerprint["model"]), config.model.model_fields_set
    keys = (set(ModelConfig.model_fields) & then.keys()) - {"dropout", "drop_path", "drop_path_mode", "head_bias"}
    pixels = state.pixels or {}
    if "name" not in given and str(then.get("name")).startswith(PREFIX):
        insist_on_import(then["name"], "the run")
    values = {
        "model": {key: then[key] for key in sorted(keys - given)},
        "data": {
            key: tuple(pixels[key]) for key in _PIXELS if key in pixels and key not in config.data.model_fields_set
        },
    }
    return Filled(values, origin="checkpoint")


def _from_weights(resolved: Resolved, weights: Pretrained) -> Filled:
    config, there, where = resolved.config, weights.config, weights.where
    model, given, values = config.model, config.model.model_fields_set, dict[str, Any]()

    def refuse(key: str, has: str) -> UserError:
        value, origin = getattr(model, key), resolved.origins.get(f"model.{key}", "given")
        return UserError(
            f"model.{key} = {_shown(value)} ({origin}) contradicts the weights of init.from: {where} has {has}; leave "
            f"model.{key} out, or start from other weights"
        )

    if is_timm(there) or is_timm(model):
        return _of_timm(config, weights, refuse)
    _fill_sizes(model, there, values, refuse)
    for key in ModelConfig.model_fields:
        if key in _OWN or key in ("name", "head", "layer_scale", *_SIZES):
            continue
        if key not in given:
            values[key] = getattr(there, key)
        elif getattr(model, key) != getattr(there, key):
            raise refuse(key, f"{key} {_shown(getattr(there, key))}")
    if "layer_scale" not in given:
        values["layer_scale"] = there.layer_scale
    elif (model.layer_scale is None) != (there.layer_scale is None):
        raise refuse("layer_scale", "no LayerScale" if there.layer_scale is None else "LayerScale")
    if "image_size" not in given:
        values["image_size"] = there.image_size
    else:
        weights.changed(image_size=model.image_size)  # refused now if it cannot be
    if config.init.head == "keep":
        _keep_head(config, there, where, values, refuse)
    elif "head" not in given:
        values["head"] = "linear"
    elif model.head != "linear":
        origin = resolved.origins.get("model.head", "given")
        raise UserError(
            f"model.head = {model.head} ({origin}) contradicts init.head = new, which is one linear layer: set "
            "model.head=linear, or init.head=keep"
        )
    pixels, warnings = _fill_pixels(config, weights)
    names = weights.class_names if config.init.head == "keep" else None
    return Filled({"model": values, "data": pixels}, warnings, _other_evaluation(config, weights), class_names=names)


def _of_timm(config: Config, weights: Pretrained, refuse: Any) -> Filled:
    """As `_from_weights`, if the model of either is timm's, whose arguments shape it."""
    there, given, values = weights.config, config.model.model_fields_set, dict[str, Any]()
    for key in ("name", "timm"):
        if key not in given:
            values[key] = getattr(there, key)
        elif _untagged(getattr(config.model, key)) != _untagged(getattr(there, key)):
            raise refuse(key, f"{key} {_shown(getattr(there, key))}")
    if "image_size" not in given:
        values["image_size"] = there.image_size
    if config.init.head == "keep":
        _keep_head(config, there, weights.where, values, refuse)
        values.pop("head", None)
    pixels, warnings = _fill_pixels(config, weights)
    names = weights.class_names if config.init.head == "keep" else None
    return Filled({"model": values, "data": pixels}, warnings, _other_evaluation(config, weights), class_names=names)


def _untagged(value: Any) -> Any:
    """Without timm's tag of pretrained weights: the model is the same."""
    is_name = isinstance(value, str) and value.startswith(PREFIX) and ":" not in value
    return value.partition(".")[0] if is_name else value


def _fill_sizes(model: ModelConfig, there: ModelConfig, values: dict[str, Any], refuse: Any) -> None:
    """Name, width, depth, heads and MLP of the model, which are given when they make the same numbers."""
    given, shape = model.model_fields_set, resolve_shape(there)
    for key in _SIZES:
        if getattr(model, key) is not None and getattr(model, key) != getattr(shape, key):
            raise refuse(key, f"{key} {getattr(shape, key)}")
    if "name" in given:
        size = smallest_image(model.name)
        named = resolve_shape(ModelConfig(name=model.name, image_size=size, **{k: getattr(model, k) for k in _SIZES}))
        if differing := _differing(named, shape, there.name):
            raise refuse("name", differing)
        return
    values["name"] = there.name
    values |= {key: getattr(there, key) for key in _SIZES if getattr(model, key) is None}


def _differing(named: Shape, shape: Shape, name: str) -> str:
    """What of one shape is otherwise in another, of this name, in words; "" if nothing."""
    if named.resnet != shape.resnet:
        return f"name {name}"
    keys = ("patch_size", *_SIZES)
    return ", ".join(f"{key} {getattr(shape, key)}" for key in keys if getattr(named, key) != getattr(shape, key))


def _keep_head(config: Config, there: ModelConfig, where: str, values: dict[str, Any], refuse: Any) -> None:
    given = config.model.model_fields_set
    if there.num_classes == 0:
        raise UserError(f"init.head = keep, and {where} has no head to keep: set init.head=new")
    if "num_classes" not in given:
        values["num_classes"] = there.num_classes
    elif config.model.num_classes != there.num_classes:
        raise UserError(
            f"init.head = keep, and {where} has a head for {there.num_classes:,} classes, where model.num_classes is "
            f"{config.model.num_classes:,}: set init.head=new, or model.num_classes={there.num_classes}"
        )
    if "head" not in given:
        values["head"] = there.head
    elif config.model.head != there.head:
        raise refuse("head", f"head {there.head}")


def _fill_pixels(config: Config, weights: Pretrained) -> tuple[dict[str, Any], tuple[str, ...]]:
    """data.mean and data.std, and a warning if they are not those that the weights know."""
    given, values, warnings = config.data.model_fields_set, dict[str, Any](), []
    if weights.pixels is None:
        if not given.issuperset(_PIXELS):
            warnings.append(
                f"{weights.where} does not say mean and std of its pixels: data.mean is {list(config.data.mean)} and "
                f"data.std {list(config.data.std)}; set those that the model was trained with"
            )
        return values, tuple(warnings)
    for key in _PIXELS:
        there, here = tuple(weights.pixels[key]), getattr(config.data, key)
        if key not in given:
            values[key] = there
        elif any(abs(a - b) > 1e-3 for a, b in zip(here, there, strict=True)):
            warnings.append(
                f"data.{key} is {list(here)}, and {weights.where} was trained with {list(there)}: leave data.{key} out "
                "to take that"
            )
    return values, tuple(warnings)


def _other_evaluation(config: Config, weights: Pretrained) -> tuple[str, ...]:
    """What evaluation does otherwise than the weights say they are evaluated: it follows the recipe."""
    known = {key: value for key in _EVALUATION if (value := (weights.pixels or {}).get(key)) is not None}
    here = {key: getattr(config.data, key) for key in known}
    if all(_same(here[key], known[key]) for key in known):
        return ()
    ours, theirs = (", ".join(f"data.{key}={value}" for key, value in said.items()) for said in (here, known))
    return (f"evaluating with {ours}, as the recipe says; {weights.where} itself is evaluated with {theirs}",)


def _same(one: Any, other: Any) -> bool:
    return abs(one - other) < 1e-3 if isinstance(one, float) else bool(one == other)


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


# ---- reading


def describe_weights(settings: InitConfig) -> dict[str, str]:
    """What a run remembers of the weights that it starts from: where from, of which kind, and the SHA-256 of a file.

    Of a checkpoint, that file is its manifest, which has the checksums of all its tensors.
    """
    assert settings.from_ is not None
    described, path = {"from": public_url(settings.from_), "head": settings.head}, Path(settings.from_)
    if path.suffix in (".npz", ".safetensors"):
        return {**described, "kind": path.suffix[1:], "file": str(path), "sha256": _sha256_of(path)}
    if "://" not in settings.from_ and (path / "config.json").is_file():
        return {**described, "kind": "folder", "file": str(path / _WEIGHTS), "sha256": _sha256_of(path / _WEIGHTS)}
    checkpoint = find_checkpoint(settings.from_)
    content = checkpoint.store.read(checkpoint.name, MANIFEST)
    described |= {"kind": "checkpoint", "file": f"{checkpoint}/{MANIFEST}"}
    return {**described, "sha256": hashlib.sha256(content).hexdigest()}


def _sha256_of(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): make it readable") from error


@torch.no_grad()
def load_first_weights(job: Job) -> None:
    """Gives the engine the weights of `init.from`, if that is set; collective.

    Rank 0 reads them and sends them to the others, one parameter at a time. Each process keeps what it holds of the
    fp32 master weights, to the bit. What is for pretraining alone stays as initialised. Raises UserError on every
    process if they cannot be read.
    """
    settings, world, engine = job.config.init, job.world, job.engine
    if settings.from_ is None:
        return
    shapes = {name: shape for name, shape in engine.shapes.items() if not is_for_pretraining(name)}
    weights = dict[str, torch.Tensor]()
    world.on_main(lambda: weights.update(_read(job.config, shapes)))
    slices: dict[str, list[ParameterSlice]] = {}
    for part in engine.master_weights():
        slices.setdefault(part.name, []).append(part)
    for name, shape in shapes.items():
        whole = weights.pop(name).to(world.device) if world.is_main else torch.empty(shape, device=world.device)
        world.broadcast(whole)
        for part in slices.get(name, []):
            part.values.copy_(whole.reshape(-1)[part.start : part.stop])
    for part in engine.buffers() if is_timm(job.config.model) else []:
        if world.is_main:
            part.values.copy_(weights.pop(part.name).reshape(-1))
        world.broadcast(part.values)
    engine.publish()
    if job.ema is not None:
        job.ema.restart()


def _read(config: Config, shapes: Mapping[str, list[int]]) -> dict[str, torch.Tensor]:
    settings, model = config.init, config.model
    keeps = settings.head == "keep"
    weights = _open(config).changed(
        image_size=model.image_size,
        num_classes=None if keeps else model.num_classes,
        interpolation=settings.interpolation,
    )
    found = {name: list(shape) for name, shape in weights.shapes.items() if name not in weights.buffers}
    if found != shapes:
        name = next(name for name in [*shapes, *found] if shapes.get(name) != found.get(name))
        raise UserError(
            f"{weights.where} has changed since the run was started: '{name}' is {found.get(name, 'absent')} there and "
            f"{shapes.get(name, 'absent')} in the model; start again"
        )
    read = weights.load(list(weights.shapes))
    if not keeps and model.head_bias:
        for name in weights.head_biases:
            read[name].fill_(model.head_bias)
    return read
