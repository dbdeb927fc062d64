"""Weights that must be finite, and the same on every process that holds a copy of them.

Each process sums the bits of the weights it computes with, every element times an odd number for its position, modulo
2**64: whatever single element differs, the sum does, and an exchange of elements shows too. The sum runs on the device,
in chunks of bounded size: no copy of the model goes to the host. It moves about 40 bytes per parameter through the
device's memory (about 6 ms for the 632 million of H/14 at 4 TB/s) and waits for the device once, so every hundredth
step costs next to nothing.

Under ZeRO 0, 1 and 2 every process holds all weights, and all of them are compared. Under ZeRO 3 each weight lies in
shards that exist once: only small parameters that stay gathered, and buffers, have copies to compare. A flipped bit in
a shard cannot be seen unless it makes the weight infinite or not a number. Optimizer states exist once under ZeRO 1
to 3 as well. Under ZeRO 1 and 2 each update copies the weights anew from their fp32 masters: so the comparison
comes before the update, of the weights that the step has computed with.
"""

from collections import Counter

import numpy as np
import torch
from torch import Tensor

from fastvit_engine.distributed.world import World
from fastvit_engine.engine.protocol import TrainingEngine
from fastvit_engine.errors import UserError
from fastvit_engine.train.health.guard import Anomaly

_CHUNK = 2**22  # elements summed at a time: three temporary tensors of 8 bytes each
_FACTOR = 0x5851F42D4C957F2D  # odd; of the sum so far, at each further chunk
_AS_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes an element


class Replicas:
    """Compares the weights of one engine over all processes."""

    def __init__(self, engine: TrainingEngine, world: World) -> None:
        self.engine, self.world = engine, world
        self._multipliers: Tensor | None = None  # int64 [_CHUNK or fewer], odd

    def compare(self) -> Anomaly | None:
        """What is wrong with the weights, alike on every process; collective."""
        broken = nonfinite_weights(self.engine, self.world.device)
        found = self.world.gather((self._hash(), broken))
        ranks = tuple(rank for rank, (_, names) in enumerate(found) if names)
        if ranks:
            names = tuple(sorted({name for _, names in found for name in names}))
            return Anomaly("weights", "the check of the weights failed", ranks=ranks, parameters=names)
        counts = Counter(value for value, _ in found)
        if len(counts) == 1:
            return None
        value, most = counts.most_common(1)[0]
        if 2 * most <= self.world.size:
            message = "the weights of processes differ, and no majority says which are right"
            return Anomaly("replicas", message, ranks=tuple(range(self.world.size)))
        ranks = tuple(rank for rank, (other, _) in enumerate(found) if other != value)
        return Anomaly("replicas", f"weights differ from those of the other {most} processes", ranks=ranks)

    @torch.no_grad()
    def _hash(self) -> int:
        total = torch.zeros((), dtype=torch.int64, device=self.world.device)
        for tensor in self.engine.replicas():
            bits = tensor.contiguous().view(-1).view(_AS_INTEGERS[tensor.element_size()])
            for chunk in bits.split(_CHUNK):
                total = total * _FACTOR + (chunk.to(torch.int64) * self._odd(len(chunk))).sum()
        return int(total.item())

    def _odd(self, size: int) -> Tensor:
        if self._multipliers is None or len(self._multipliers) < size:
            draws = np.random.Philox(0).random_raw(size) | np.uint64(1)
            self._multipliers = torch.from_numpy(draws.view(np.int64)).to(self.world.device)
        return self._multipliers[:size]


def check_first_weights(engine: TrainingEngine, world: World) -> None:
    """Raises UserError, on every process, if a weight is not finite before the first update; collective."""
    found = world.gather(nonfinite_weights(engine, world.device))
    ranks = [rank for rank, names in enumerate(found) if names]
    if not ranks:
        return
    names = sorted({name for names in found for name in names})
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    if len(ranks) < world.size:
        named = ", ".join(map(str, ranks))
        raise UserError(
            f"before any update, weights are not finite ({shown}) on rank {named} only: leave out the host of that rank"
        )
    raise UserError(
        f"before any update, weights are not finite ({shown}): correct model.head_bias, model.layer_scale, "
        "train.precision or the weights of init.from, and start again in another run folder with --out"
    )


@torch.no_grad()
def nonfinite_weights(engine: TrainingEngine, device: torch.device) -> tuple[str, ...]:
    """Names of the parameters that this process holds, or holds a shard of, with an element that is not finite."""
    parameters = engine.held_parameters()
    if not parameters:
        return ()
    names, held = zip(*parameters, strict=True)
    # The largest magnitude is not finite if any element is not.
    norms = torch._foreach_norm(held, float("inf"))
    largest = torch.stack([norm.to(device, torch.float32) for norm in norms])  # offloaded shards are elsewhere
    return tuple(name for name, finite in zip(names, largest.isfinite().tolist(), strict=True) if not finite)
