"""The official files of ImageNet-1k (ILSVRC2012)."""

from pathlib import Path

from fastvit_engine.data.build.sources.context import Context
from fastvit_engine.data.build.sources.devkit import DEVKIT
from fastvit_engine.data.build.sources.listing import Listing, join
from fastvit_engine.data.build.sources.tars import list_class_tars, list_flat_tar
from fastvit_engine.errors import UserError

TRAIN, VALIDATION = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"


def list_imagenet(path: Path, context: Context) -> Listing:
    """A folder with the official training tar and, for the eval split, validation tar and devkit (or --labels)."""
    train = list_class_tars(path / TRAIN, context)
    if not (path / VALIDATION).exists():
        return train
    if context.labels is None:
        if not (path / DEVKIT).exists():
            raise UserError(
                f"{path} has {VALIDATION} but not its labels: put {DEVKIT} there or name a file of labels with --labels"
            )
        context.labels = str(path / DEVKIT)
    context.classes = train.classes
    return join(train, list_flat_tar(path / VALIDATION, context))
