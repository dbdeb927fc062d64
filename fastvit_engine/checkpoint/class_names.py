"""What a trained model calls its classes, from wherever the model is."""

import contextlib
import json

from safetensors import SafetensorError, safe_open

from fastvit_engine.checkpoint.export import find_checkpoint
from fastvit_engine.checkpoint.format import DamagedCheckpoint
from fastvit_engine.errors import UserError


def class_names_of(source: str) -> tuple[str, ...] | None:
    """The names in the order of the outputs, from a file of weights or a checkpoint; None if they are unknown.

    source: as `load_model` takes it, which has loaded it before.
    """
    names = None
    with contextlib.suppress(UserError, DamagedCheckpoint, SafetensorError, OSError, ValueError):
        if source.endswith(".safetensors"):
            with safe_open(source, framework="pt") as file:
                names = json.loads((file.metadata() or {}).get("class_names", "null"))
        else:
            names = find_checkpoint(source).read_manifest().state.class_names
    return None if names is None else tuple(map(str, names))
