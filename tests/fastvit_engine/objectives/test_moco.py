"""The loss of MoCo v3, against its definition in NumPy, and its batch normalisation, against PyTorch's."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from fastvit_engine.config import load_config
from fastvit_engine.data import Batch
from fastvit_engine.data.pixels.views import distort_views, images_shape, training_views, unpack_views
from fastvit_engine.models.batch_norm import BatchNorm
from fastvit_engine.models.pretraining import build_for_training
from fastvit_engine.objectives import Taught, build_objective
from tests.fastvit_engine.objectives.test_dino import Twins

CPU = torch.device("cpu")
MOCO = ["train.objective=moco", "model.name=Ti/4", "model.image_size=16", "model.num_classes=0", "model.width=32",
        "model.depth=2", "model.heads=2", "ema.decay=0.9", "moco.hidden_width=24", "moco.outputs=8",
        "train.global_batch_size=6"]  # fmt: skip


class Alone(Twins):
    """The average of one process, beside keys of another that are given."""

    others = torch.zeros(0, 0)

    def gather(self, rows):
        if not len(self.others):
            return rows, 0
        return torch.cat([self.others, rows]), len(self.others)


@pytest.fixture
def world():
    """Configuration, student, teacher, batch, whose third image does not count."""
    config = load_config(None, MOCO).config
    torch.manual_seed(0)
    student, teacher = build_for_training(config), build_for_training(config)
    for model in (student, teacher):
        for norm in (*model.projection.norms, *model.predictor.norms):
            if norm.weight is not None:
                torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    images = torch.randint(0, 256, (6, *images_shape(training_views(config))), dtype=torch.uint8)
    weights = torch.tensor([1.0, 1, 0, 1, 1, 1])
    batch = Batch(images, torch.zeros(6, dtype=torch.int64), weights, list("abcdef"), np.arange(6))
    return config, student, teacher, batch


def mlp(model, x, counted):
    """Linear layers, batch normalisation by the rows that count, ReLU: of NumPy, [B, D] float64."""
    layers = [layer.weight.detach().double().numpy() for layer in model.layers]
    for number, (weight, norm) in enumerate(zip(layers, model.norms, strict=True)):
        x = x @ weight.T
        x = (x - x[counted].mean(0)) / np.sqrt(x[counted].var(0) + 1e-5)
        if number < len(layers) - 1:
            x = x * norm.weight.detach().double().numpy() + norm.bias.detach().double().numpy()
            x = np.maximum(x, 0)
    return x


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def expected(config, student, teacher, batch, others=None):
    """For each image, over both views, 2 t (log sum exp(q k / t) - q k+ / t) with the keys k of images that count."""
    views, counted, t = training_views(config), batch.weights.numpy() > 0, config.moco.temperature
    seen = distort_views(unpack_views(batch.images, views), views, batch.seeds)
    with torch.no_grad():
        of_student, of_teacher = ([m.eval().represent(v).double().numpy() for v in seen] for m in (student, teacher))
    queries = [unit(mlp(student.predictor, mlp(student.projection, x, counted), counted)) for x in of_student]
    keys = [unit(mlp(teacher.projection, x, counted)) for x in of_teacher]
    total = np.zeros(len(counted))
    for query, key, more in zip(queries, keys[::-1], others or (keys[0][:0],) * 2, strict=True):
        similar = query @ np.concatenate([more, key[counted]]).T / t
        own = (query * key).sum(1) / t
        total += 2 * t * (np.log(np.exp(similar).sum(1)) - own)
    return total * counted


def test_the_loss_is_that_of_its_definition(world):
    config, student, teacher, batch = world
    objective = build_objective(config, CPU)
    assert isinstance(objective, Taught)
    objective.learn_from(Alone(student, teacher))
    losses = objective.losses(student.train(), batch)
    assert student.training and losses[2] == 0 and (losses[batch.weights > 0] > 0).all()
    np.testing.assert_allclose(losses.detach(), expected(config, student, teacher, batch), rtol=1e-4, atol=1e-5)


def test_keys_of_other_processes_are_told_apart_too_but_for_their_padding(world):
    """A key of weight 0 changes nothing."""
    config, student, teacher, batch = world
    objective, average = build_objective(config, CPU), Alone(student, teacher)
    objective.learn_from(average)
    alone = objective.losses(student, batch)
    first, second = (torch.nn.functional.normalize(torch.randn(4, 8), dim=1) for _ in range(2))
    average.others = torch.cat([first, second, torch.zeros(4, 1)], dim=1)
    torch.testing.assert_close(objective.losses(student, batch), alone)
    average.others[:, -1] = 1
    more = expected(config, student, teacher, batch, [second.double().numpy(), first.double().numpy()])
    np.testing.assert_allclose(objective.losses(student, batch).detach(), more, rtol=1e-4, atol=1e-5)


def test_the_student_learns_but_for_its_patches_and_its_teacher_does_not(world):
    config, student, teacher, batch = world
    objective = build_objective(config, CPU)
    objective.learn_from(Alone(student, teacher))
    objective.losses(student, batch).sum().backward()
    without = {name for name, parameter in student.named_parameters() if parameter.grad is None}
    assert without == {"patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert all(parameter.grad.isfinite().all() for parameter in student.parameters() if parameter.grad is not None)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_patches_learn_if_they_are_to(world):
    config, *_ = world
    thawed = config.model_copy(update={"moco": config.moco.model_copy(update={"frozen_patches": False})})
    assert all(parameter.requires_grad for parameter in build_for_training(thawed).parameters())


def test_images_that_are_alike_cost_the_logarithm_of_how_many_they_are(world):
    config, student, teacher, batch = world
    objective = build_objective(config, CPU)
    objective.learn_from(Alone(student, teacher))
    same = batch._replace(images=batch.images[:1].expand(6, -1), seeds=np.zeros(6, dtype=np.int64))
    losses = objective.losses(student, same)[batch.weights > 0]
    chance = 2 * 2 * config.moco.temperature * np.log(5)  # of two views
    assert losses.tolist() == pytest.approx([chance] * 5, rel=1e-4)


def plain(weight, bias):
    norm = torch.nn.BatchNorm1d(5).train()
    with torch.no_grad():
        norm.weight.copy_(weight), norm.bias.copy_(bias)
    return norm


def test_batch_normalisation_is_pytorchs_of_each_view_by_the_rows_that_count():
    torch.manual_seed(1)
    x, gradient = torch.randn(2, 7, 5) * 3 + 100, torch.randn(2, 7, 5)
    counted = torch.tensor([1.0, 1, 0, 1, 1, 0, 1])
    ours = BatchNorm(5)
    torch.nn.init.normal_(ours.weight), torch.nn.init.normal_(ours.bias)
    theirs = plain(ours.weight, ours.bias)
    mine, other = (x.clone().requires_grad_() for _ in range(2))
    found = ours(mine, counted[:, None], lambda values: values)
    (found * gradient * counted[:, None]).sum().backward()
    rows = counted > 0
    for view in range(2):
        wanted = theirs(other[view, rows])
        torch.testing.assert_close(found[view, rows], wanted, rtol=1e-4, atol=1e-4)
        (wanted * gradient[view, rows]).sum().backward()
    torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-4, atol=1e-3)


@contextmanager
def threads_of_two():
    """add_up of two 'processes' that are threads of this one, for a forward and a backward pass."""
    from threading import Barrier

    barrier, given = Barrier(2, timeout=30), [None, None]

    def of(rank):
        def add_up(values):
            given[rank] = values.clone()
            barrier.wait()
            total = given[0] + given[1]
            barrier.wait()
            return values.copy_(total)

        return add_up

    yield [of(0), of(1)]


def test_batch_normalisation_over_two_processes_is_that_of_all_rows():
    """Forward and backward, with rows split unequally."""
    from concurrent.futures import ThreadPoolExecutor

    torch.manual_seed(2)
    x, gradient = torch.randn(1, 9, 5), torch.randn(1, 9, 5)
    whole, norm = x.clone().requires_grad_(), BatchNorm(5, affine=False)
    expected = norm(whole, torch.ones(9, 1), lambda values: values)
    (expected * gradient).sum().backward()
    parts = [x[:, :3].clone().requires_grad_(), x[:, 3:].clone().requires_grad_()]
    gradients = [gradient[:, :3], gradient[:, 3:]]

    with threads_of_two() as sums, ThreadPoolExecutor(2) as pool:

        def run(rank):
            found = norm(parts[rank], torch.ones(parts[rank].shape[1], 1), sums[rank])
            (found * gradients[rank]).sum().backward()
            return found.detach()

        found = list(pool.map(run, range(2)))
    torch.testing.assert_close(torch.cat(found, dim=1), expected)
    torch.testing.assert_close(torch.cat([part.grad for part in parts], dim=1), whole.grad, rtol=1e-4, atol=1e-6)
