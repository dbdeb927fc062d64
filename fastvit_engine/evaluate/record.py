"""What a model says of each image of a labelled set, and the figures that follow from it."""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastvit_engine.data import Batch
from fastvit_engine.data.stream.batch import targets
from fastvit_engine.errors import UserError
from fastvit_kernels import FusedCrossEntropy

Integers = NDArray[np.int64]
_RANKED = 5


class Right(NamedTuple):
    """Which outputs of a model count, and which of them are right for a label."""

    outputs: Integers  # [K], those that count
    of_label: Integers  # [labels, G] right outputs of each label, filled up with -1; all -1: images of it do not count

    @classmethod
    def all(cls, count: int) -> "Right":
        """Every output counts, and a label is its number."""
        return cls(np.arange(count), np.arange(count)[:, None])

    @classmethod
    def among(cls, outputs: Sequence[int], count: int) -> "Right":
        """Only some of `count` outputs count; a label is the number of an output, and others do not count."""
        of_label = np.full((count, 1), -1)
        of_label[list(outputs), 0] = list(outputs)
        return cls(np.array(sorted(outputs)), of_label)

    @classmethod
    def numbered(cls, groups: Sequence[Sequence[int]]) -> "Right":
        """Label n has the outputs of `groups[n]`, and all of them count."""
        of_label = np.full((len(groups), max(map(len, groups))), -1)
        for label, outputs in enumerate(groups):
            of_label[label, : len(outputs)] = outputs
        return cls(np.unique(of_label[of_label >= 0]), of_label)


class Record(NamedTuple):
    """A model's answers for the usable images of some shards, in the order of the shards."""

    positions: Integers  # [N] of the images among all samples
    keys: list[str]  # N
    right: Integers  # [N, G] right outputs, filled up with -1; all -1: the image does not count
    ranked: Integers  # [N, up to 5] outputs by score
    losses: NDArray[np.float64]  # [N]; 0 where the image does not count
    outputs: int  # that count


class Figures(NamedTuple):
    """What a model's answers amount to."""

    samples: int  # images that count
    top1: float  # share of them, 0 to 1
    top5: float | None  # likewise; None if five outputs or fewer count
    loss: float  # mean over them


@torch.no_grad()
def record_answers(
    model: nn.Module, batches: Iterable[Batch], right: Right, loss: Literal["softmax", "sigmoid"]
) -> Record:
    """Ranks the outputs that count for every usable image. loss: as loss.kind.

    With a softmax, the loss of an image with several right outputs is that of their joint probability. Raises UserError
    for labels that `right` does not know, for scores that are not finite, and if no image is usable.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    outputs = torch.from_numpy(right.outputs).to(device)
    columns = np.full(int(right.outputs.max()) + 1, -1)
    columns[right.outputs] = np.arange(len(right.outputs))
    criterion = FusedCrossEntropy(loss)
    parts: list[tuple[Integers, list[str], Integers, Integers, NDArray[np.float64]]] = []
    try:
        for batch in batches:
            kept = np.flatnonzero(batch.weights.numpy() > 0)
            if not len(kept):
                continue
            wanted = _right_outputs(batch, kept, right)
            scores = model(batch.images.to(device, non_blocking=True)).float()[torch.from_numpy(kept).to(device)]
            check_scores(scores, [batch.keys[row] for row in kept])
            scores = scores[:, outputs]
            ranked = outputs[scores.topk(min(_RANKED, len(outputs)), dim=1).indices].cpu().numpy()
            answers = torch.from_numpy(np.where(wanted >= 0, columns[wanted], -1)).to(device)
            losses = _losses(scores, answers, criterion, loss).double().cpu().numpy()
            losses[(wanted < 0).all(axis=1)] = 0.0
            parts.append((batch.seeds[kept], [batch.keys[row] for row in kept], wanted, ranked, losses))
    finally:
        model.train(was_training)
    if not parts:
        raise UserError("no sample has a usable image: see what `fastvit data verify` says of the shards")
    positions = np.concatenate([part[0] for part in parts])
    order = np.argsort(positions, kind="stable")
    keys = [key for part in parts for key in part[1]]
    return Record(
        positions[order],
        [keys[row] for row in order],
        np.concatenate([part[2] for part in parts])[order],
        np.concatenate([part[3] for part in parts])[order],
        np.concatenate([part[4] for part in parts])[order],
        len(right.outputs),
    )


def check_scores(scores: Tensor, keys: Sequence[object]) -> None:
    """Raises UserError, naming the first image, if scores [N, K] of the images `keys` are not finite."""
    bad = ~scores.isfinite().all(dim=1)
    if bad.any():
        raise UserError(
            f"the scores of '{keys[int(bad.int().argmax())]}' are not finite: the model's weights are broken, or it "
            "overflows in this precision"
        )


def _right_outputs(batch: Batch, kept: Integers, right: Right) -> Integers:
    """[n, G] right outputs of the images `kept`, filled up with -1. Raises UserError for labels out of range."""
    labels = batch.labels.numpy()[kept].reshape(len(kept), -1)
    known = len(right.of_label)
    if labels.size and labels.max() >= known:
        row = int(labels.max(axis=1).argmax())
        raise UserError(
            f"sample '{batch.keys[kept[row]]}' has label {labels[row].max()}, outside 0..{known - 1}: evaluate with a "
            "model of as many classes as the data, or name the outputs that count with --classes"
        )
    found = np.where(labels[:, :, None] >= 0, right.of_label[labels], -1)
    return found.reshape(len(kept), labels.shape[1] * right.of_label.shape[1])


def _losses(scores: Tensor, answers: Tensor, criterion: nn.Module, kind: str) -> Tensor:
    """[n] losses of scores [n, K] for right columns [n, G], filled up with -1."""
    if kind == "sigmoid":
        found: Tensor = criterion(scores, targets(answers, scores.shape[1]), reduction="none")
        return found
    if answers.shape[1] == 1:
        found = criterion(scores, answers[:, 0].clamp(min=0), reduction="none")
        return found
    chosen = scores.gather(1, answers.clamp(min=0)).masked_fill(answers < 0, -torch.inf)
    return scores.logsumexp(dim=1) - chosen.logsumexp(dim=1)


def hits(ranked: Integers, right: Integers) -> NDArray[np.bool_]:
    """[N, K]: whether each of the ranked outputs [N, K] is among the right ones [N, G]."""
    return np.stack([(right == ranked[:, k : k + 1]).any(axis=1) for k in range(ranked.shape[1])], axis=1)


def figures_of(record: Record) -> Figures:
    """Accuracy and loss over the images that count. Raises UserError if none does."""
    counts = (record.right >= 0).any(axis=1)
    if not counts.any():
        raise UserError("no image has a class that counts: name the classes of the data with --classes")
    found = hits(record.ranked[counts], record.right[counts])
    top5 = float(found.any(axis=1).mean()) if record.outputs > _RANKED else None
    return Figures(int(counts.sum()), float(found[:, 0].mean()), top5, float(record.losses[counts].mean()))


def real_accuracy(record: Record, lists: Sequence[Sequence[int]], numbers: Integers) -> tuple[float, int]:
    """Share of images whose first answer is in their list, and the number of images whose list is not empty.

    numbers: [N], which list belongs to each image. Raises UserError if every list is empty.
    """
    right = [
        first in lists[number] for first, number in zip(record.ranked[:, 0], numbers, strict=True) if lists[number]
    ]
    if not right:
        raise UserError("no image has a label in --real: give the lists of the images of --data, in their order")
    return float(np.mean(right)), len(right)
