"""timm's models by name: which one a configuration means, with which arguments, and how it is built."""

import importlib
import importlib.util
import inspect
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from fastvit_engine.config import ModelConfig
from fastvit_engine.config.near import near_names, or_list
from fastvit_engine.config.timm_model import TimmName, timm_name
from fastvit_engine.errors import UserError
from fastvit_engine.own_module import import_own
from fastvit_engine.shown import brief
from fastvit_engine.torchvision_operators import declare_torchvision_operators

# What a constructor is told only if it knows the word: its argument, and the key that says it.
_OPTIONAL = {"img_size": "image_size", "drop_rate": "dropout", "drop_path_rate": "drop_path"}


def import_timm() -> Any:
    """The package timm. Raises UserError, with the command that installs it, if it is missing or cannot be imported."""
    if importlib.util.find_spec("timm") is None:
        raise UserError(
            "model.name = timm/... needs the package timm, which is not installed: pip install "
            "'fastvit-engine[integrations]'"
        )
    declare_torchvision_operators()
    try:
        return importlib.import_module("timm")
    except Exception as error:
        raise UserError(
            f"timm is installed and cannot be imported ({type(error).__name__}: {brief(error)}): `fastvit doctor` says "
            "what does not fit together"
        ) from error


def insist_on_import(name: str, where: str, given: str | None = None) -> None:
    """Raises UserError if weights name a module to import that nobody else has named: a file runs nothing.

    name: as the weights in `where` say it. given: what the user says that it is.
    """
    module = timm_name(name).module
    if module is not None and module not in sys.modules and given != name:
        raise UserError(
            f"{where} is of {name}, and a module that weights name is not imported for that: if you trust {module}, "
            f"give --name {name}, from Python name=, or import it first"
        )


def find_architecture(name: str) -> TimmName:
    """Imports what registers the model that `model.name` names, and checks that it is there.

    Raises UserError if there is no such model.
    """
    timm, named = import_timm(), timm_name(name)
    if named.module is not None:
        import_own(named.module, f"model.name is {name}")
    architecture = named.architecture.partition(".")[0]
    if not timm.is_model(architecture):
        if named.module is not None:
            raise UserError(
                f"model.name is {name}, and importing {named.module} registers no model called {architecture}: put "
                "@timm.models.register_model above a function of this name"
            )
        near = near_names(architecture, timm.list_models())
        meant = f": did you mean {or_list([f'timm/{one}' for one in near])}?" if near else ": see timm.list_models()"
        raise UserError(f"model.name is {name}, and timm {timm.__version__} has no model {architecture}{meant}")
    return named


def create(config: ModelConfig, **more: Any) -> nn.Module:
    """timm's own model, as timm initialises it; under torch.device("meta"), one of shapes only.

    more: further arguments of `create_model`. Raises UserError, with what timm says, if there is no such model.
    """
    named = find_architecture(config.name)
    return _create(named, config, {**arguments(config), **more})


@lru_cache
def arguments(config: ModelConfig) -> Mapping[str, Any]:
    """The arguments of `create_model` that a configuration says and that this model knows.

    Which of `_OPTIONAL` a model knows is tried, since timm's constructors pass on what they are not looking at. Raises
    UserError for a setting that the model has no argument for.
    """
    named = find_architecture(config.name)
    given = {"num_classes": config.num_classes, **{word: getattr(config, key) for word, key in _OPTIONAL.items()}}
    given |= config.timm
    with kept_random_state():
        while True:
            try:
                _skeleton(named, config, given)
            except TypeError as error:
                word = next((word for word in _OPTIONAL if word in given and f"'{word}'" in str(error)), None)
                if word is None:
                    raise _refused(config, error) from error
                del given[word]
                if word != "img_size" and getattr(config, _OPTIONAL[word]):
                    raise UserError(
                        f"model.{_OPTIONAL[word]} = {getattr(config, _OPTIONAL[word])}, and {config.name} has no "
                        f"argument {word}: leave model.{_OPTIONAL[word]} out"
                    ) from None
            else:
                return given


def skeleton(config: ModelConfig) -> nn.Module:
    """timm's model with shapes and no memory, on the device "meta", in training mode."""
    with kept_random_state():
        return _skeleton(find_architecture(config.name), config, arguments(config))


def _skeleton(named: TimmName, config: ModelConfig, given: Mapping[str, Any]) -> nn.Module:
    try:
        with torch.device("meta"):
            return _create(named, config, given)
    except (UserError, TypeError):
        raise
    except Exception:  # a constructor that reads numbers from tensors, which there are none of
        return _create(named, config, given).to("meta")


def _create(named: TimmName, config: ModelConfig, given: Mapping[str, Any]) -> nn.Module:
    timm = import_timm()
    try:
        with quiet_timm():
            model: nn.Module = timm.create_model(named.architecture, **{"pretrained": False, **given})
    except TypeError as error:
        if "unexpected keyword argument" in str(error):
            raise
        raise _refused(config, error) from error
    except Exception as error:
        if "meta" in str(error) or isinstance(error, NotImplementedError):  # of a skeleton
            raise
        raise _refused(config, error) from error
    if not isinstance(model, nn.Module) or next(model.parameters(), None) is None:
        raise UserError(f"{config.name} makes {brief(repr(model))}, which is no model with parameters: correct it")
    return model


def _refused(config: ModelConfig, error: Exception) -> UserError:
    said = f"{type(error).__name__}: {brief(error)}" if str(error) else type(error).__name__
    return UserError(
        f"timm does not make {config.name} with model.image_size = {config.image_size}, model.num_classes = "
        f"{config.num_classes:,} and model.timm = {config.timm} ({said}): change the one that it names"
    )


@contextmanager
def kept_random_state() -> Iterator[None]:
    """What is drawn in the block changes nothing for what is drawn after it, on the CPU."""
    before = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(before)


@contextmanager
def quiet_timm() -> Iterator[None]:
    """Keeps timm from logging what it does with weights."""
    logger = logging.getLogger("timm")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def classifier_parameters(model: Any) -> frozenset[str]:
    """The names of what timm calls the classifier: `model.get_classifier()`, one module or several."""
    get = getattr(model, "get_classifier", None)
    if not callable(get):
        return frozenset()
    found = get()
    modules = [part for part in (found if isinstance(found, tuple | list) else [found]) if isinstance(part, nn.Module)]
    ours = {id(parameter) for module in modules for parameter in module.parameters()}
    return frozenset(name for name, parameter in model.named_parameters() if id(parameter) in ours)


def can_represent(model: Any) -> bool:
    """Whether a model has timm's two halves, of which the second can stop before the classifier."""
    head = getattr(model, "forward_head", None)
    if not callable(getattr(model, "forward_features", None)) or not callable(head):
        return False
    return "pre_logits" in inspect.signature(head).parameters
