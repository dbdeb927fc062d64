"""Linear layers in FP8 by other libraries, at the versions that are installed."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from torch import nn

from benchmarks.peers import need, version
from benchmarks.registry import Unusable

_PADDED_TO = 16  # the inner size of a product in FP8
_ROWS = 8  # TransformerEngine's rows, and it does not pad


def torchao_layers(
    module: nn.Module, recipe: str, *, rows: int, wanted: Callable[[str], bool] = lambda name: True
) -> nn.Module:
    """The module with its `wanted` linear layers, by name, in FP8; emulated on a CPU.

    recipe: tensorwise or rowwise. rows: that the layers multiply, which are padded if they are no multiple of 16.
    """
    config_of: Any = getattr(need("torchao.float8"), "Float8LinearConfig", None)
    if not hasattr(config_of, "from_recipe_name"):
        raise Unusable(f"torchao {version('torchao')} has no recipes by name: a newer one has")
    emulate = all(parameter.device.type == "cpu" for parameter in module.parameters())
    config = replace(config_of.from_recipe_name(recipe), pad_inner_dim=rows % _PADDED_TO != 0, emulate=emulate)
    convert = need("torchao.float8").convert_to_float8_training
    converted: nn.Module = convert(module, module_filter_fn=lambda layer, name: wanted(name), config=config)
    return converted


def transformer_engine(rows: int) -> tuple[Any, Callable[[], AbstractContextManager[Any]]]:
    """(the library, what to call its layers in for FP8 with current scaling). rows: that the layers multiply."""
    engine, recipes = need("transformer_engine.pytorch"), need("transformer_engine.common.recipe")
    if rows % _ROWS:
        raise Unusable(f"takes rows in multiples of {_ROWS}, and there are {rows:,}")
    if not hasattr(recipes, "Float8CurrentScaling"):
        raise Unusable(f"TransformerEngine {version('transformer-engine')} has no current scaling: a newer one has")
    recipe = recipes.Float8CurrentScaling()
    if hasattr(engine, "autocast"):
        return engine, lambda: engine.autocast(enabled=True, recipe=recipe)
    return engine, lambda: engine.fp8_autocast(enabled=True, fp8_recipe=recipe)  # before 2.9
