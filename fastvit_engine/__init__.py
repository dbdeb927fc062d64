"""FastViT Engine: pretrain Vision Transformers at scale with PyTorch, Triton, DeepSpeed and WebDataset.

    >>> import fastvit_engine as fastvit
    >>> config = fastvit.load_config("quickstart", ["data.train=data/digits"])
    >>> fastvit.train(config, "runs/digits")
    >>> model = fastvit.load_model("runs/digits")
    >>> fastvit.evaluate(model, "data/digits").top1

Importing the package is cheap: each name is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastvit_engine.api import evaluate, train
    from fastvit_engine.checkpoint.load import load_model
    from fastvit_engine.config import load_config
    from fastvit_engine.models.from_config import build_model

__version__ = "0.1.0"
__all__ = ["build_model", "evaluate", "load_config", "load_model", "train"]

_MODULES = {
    "build_model": "fastvit_engine.models.from_config",
    "load_config": "fastvit_engine.config",
    "load_model": "fastvit_engine.checkpoint.load",
}
# Functions that share their name with a package: Python binds that name to the package once it is imported, so the
# package itself can be called (see `callable_package`).
_CALLABLE_PACKAGES = ("evaluate", "train")


def __getattr__(name: str) -> Any:
    if name in _CALLABLE_PACKAGES:
        return import_module(f"fastvit_engine.{name}")
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'fastvit_engine' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
