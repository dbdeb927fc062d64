"""The layers of a model that compute in FP8, and the numbers that say which of them met scales out of range."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from fastvit_engine.config import Config
from fastvit_engine.config.fp8 import blocks_in_fp8, layers_in_fp8
from fastvit_engine.errors import UserError
from fastvit_engine.models.vit import VisionTransformer
from fastvit_engine.observe.units import counted
from fastvit_kernels import Fp8, FusedBlock
from fastvit_kernels.fp8.setting import LAYERS, obstacle


class Fp8Layers:
    """Puts linear layers of a Transformer's blocks into FP8, and takes single ones out again.

    names: of all of them, as "blocks.3.fc1", in the order of the model.
    """

    def __init__(self, model: VisionTransformer, config: Config, device: torch.device) -> None:
        settings = config.train.fp8
        blocks = [module for module in model.blocks if isinstance(module, FusedBlock)]
        fitting = layers_in_fp8(config, model.shape)
        self._left_out = tuple(name for name in settings.layers if name not in fitting)
        self._scaling, self._depth = settings.scaling, len(blocks)
        self._blocks: dict[str, tuple[FusedBlock, Fp8]] = {}
        chosen = blocks_in_fp8(settings, len(blocks))
        self._counts = torch.zeros(len(chosen), len(LAYERS), dtype=torch.int32, device=device)
        for row, number in enumerate(chosen):
            block = blocks[number]
            block.compute_in_fp8(settings.scaling, fitting)
            assert block.fp8 is not None
            block.fp8.overflows = self._counts[row]  # of all blocks at once, as they are read
            self._blocks[f"blocks.{number}"] = block, block.fp8
        self._layers = [name for name in LAYERS if name in fitting]
        self.names = tuple(f"{block}.{name}" for block in self._blocks for name in self._layers)

    def take_overflows(self) -> Tensor:
        """1.0 for each layer that met a scale out of range since the last call, else 0.0: float64, on the device.

        Of all layers of the blocks, in FP8 or not; see `named`.
        """
        found = (self._counts > 0).double().flatten()
        self._counts.zero_()
        return found

    def named(self, overflows: Sequence[float]) -> frozenset[str]:
        """Those of `names` for which this, a sum over processes of what `take_overflows` gave, is above 0."""
        every = [f"{block}.{name}" for block in self._blocks for name in LAYERS]
        return frozenset(name for name, found in zip(every, overflows, strict=True) if found > 0).intersection(
            self.names
        )

    @property
    def layers_in_use(self) -> tuple[frozenset[str], ...]:
        """Of each block, those that compute in FP8 now."""
        return tuple(fp8.layers for _, fp8 in self._blocks.values())

    def leave(self, fallen: Collection[str]) -> None:
        """From now on these compute in bf16, and all others of `names` in FP8."""
        for path, (block, fp8) in self._blocks.items():
            fp8.layers = frozenset(name for name in self._layers if f"{path}.{name}" not in fallen)
            block.fp8 = fp8 if fp8.layers else None

    def describe(self) -> str:
        """What is in FP8 and what is not, as a run says it at its start."""
        scales = {"tensor": "matrix", "row": "row"}[self._scaling]
        numbers = [path.removeprefix("blocks.") for path in self._blocks]
        of_all = "" if len(self._blocks) == self._depth else f" ({numbers[0]} to {numbers[-1]})"
        said = (
            f"FP8: {', '.join(self._layers)} of {counted(len(self._blocks), 'block')}{of_all}, a scale per {scales}; "
            "all else in bf16"
        )
        if self._left_out:
            said += f", also {', '.join(self._left_out)}, whose sizes are no multiples of 16"
        return said


def check_fp8_device(config: Config) -> None:
    """Raises UserError if this machine's GPU has no FP8 products. That there is a GPU at all is checked elsewhere."""
    if config.train.precision != "fp8" or config.train.fp8.emulate or not torch.cuda.is_available():
        return
    reason = obstacle(torch.device("cuda", torch.cuda.current_device()))
    if reason is not None:
        raise UserError(f"train.precision = fp8 cannot run here: {reason}; set train.precision=bf16")
