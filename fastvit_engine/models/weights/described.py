"""What a file of weights may say of itself beside the model: how images are prepared, and the names of the classes."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from fastvit_engine.config import DataConfig
from fastvit_engine.errors import UserError
from fastvit_engine.shown import brief

PIXELS = ("mean", "std", "eval_crop", "eval_transform")  # keys of section `data`


def described(said: Mapping[str, Any], where: str) -> tuple[dict[str, Any] | None, tuple[str, ...] | None]:
    """Pixels and class names as `Pretrained` has them, of what a file says. Raises UserError if that makes no sense."""
    pixels = {key: said[key] for key in PIXELS if said.get(key) is not None}
    names = said.get("class_names")
    try:
        if ("mean" in pixels) != ("std" in pixels):
            raise ValueError("of mean and std, one is missing")
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError("class_names is not a list of texts")
        if "mean" not in pixels:
            return None, None if names is None else tuple(names)
        checked = DataConfig.model_validate(pixels).model_dump(include=set(pixels))
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(
            f"{where} has damaged metadata ({problem['loc'][0]}: {problem['msg']}): make the file again"
        ) from error
    except ValueError as error:
        raise UserError(f"{where} has damaged metadata ({brief(error)}): make the file again") from error
    return checked, None if names is None else tuple(names)
