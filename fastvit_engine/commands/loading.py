"""Says on a terminal that PyTorch is being loaded, which can take many seconds."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastvit_engine.observe.startup import StartUp


def loading_pytorch() -> "StartUp":
    """For `with`, around the imports: silent in a log, whose reader does not wait, and on ranks other than 0."""
    from fastvit_engine.observe.startup import StartUp

    return StartUp("loading PyTorch", quiet=None if sys.stderr.isatty() else True)
