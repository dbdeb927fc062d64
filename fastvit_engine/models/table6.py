"""Table 6 of the ViT paper (Dosovitskiy et al. 2021): what it costs to pretrain each of its models on JFT-300M."""

from typing import NamedTuple

from fastvit_engine.config import ModelConfig
from fastvit_engine.models.flops import forward_macs, training_flops
from fastvit_engine.models.pretraining import parameter_count

JFT_IMAGES = 303_000_000  # section 4.1

# Name, epochs, and exaFLOPs as printed.
_PRINTED = (
    ("B/32", 7, 55),
    ("B/16", 7, 224),
    ("L/32", 7, 196),
    ("L/16", 7, 783),
    ("L/16", 14, 1567),
    ("H/14", 14, 4262),
    ("R50x1", 7, 50),
    ("R50x2", 7, 199),
    ("R101x1", 7, 96),
    ("R152x1", 7, 141),
    ("R152x2", 7, 563),
    ("R152x2", 14, 1126),
    ("R200x3", 14, 3306),
    ("R50+B/32", 7, 106),
    ("R50+B/16", 7, 274),
    ("R50+L/32", 7, 246),
    ("R50+L/16", 7, 859),
    ("R50+L/16", 14, 1668),
)


class Row(NamedTuple):
    """A model of the table, with a head for 1,000 classes at 224 pixels.

    exaflops: 6 x MACs x epochs x images, in 10^18 operations; paper: as printed.
    """

    name: str
    epochs: int
    exaflops: float
    paper: int
    parameters: int
    macs: int

    @property
    def difference(self) -> float:
        """Of what is counted from what is printed, as a share of that."""
        return self.exaflops / self.paper - 1


def table6() -> list[Row]:
    """The rows in the order of the paper. Models hold no memory."""
    rows = []
    for name, epochs, printed in _PRINTED:
        config = ModelConfig(name=name)
        exaflops = training_flops(config) * epochs * JFT_IMAGES / 1e18
        rows.append(Row(name, epochs, exaflops, printed, parameter_count(config), forward_macs(config)))
    return rows
