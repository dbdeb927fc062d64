"""The loss of DINO, against its definition."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from fastvit_engine.config import load_config
from fastvit_engine.data import Batch
from fastvit_engine.data.pixels.views import distort_views, images_shape, training_views, unpack_views
from fastvit_engine.models.pretraining import build_for_training
from fastvit_engine.objectives import Taught, build_objective

CPU = torch.device("cpu")


class Twins:
    """An average that is other weights of the same model, of one process."""

    def __init__(self, model, teacher):
        self.model, self.teacher = model, teacher

    @contextmanager
    def applied(self):
        own = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        self.load(dict(self.teacher.named_parameters()))
        yield
        self.load(own)

    @torch.no_grad()
    def load(self, weights):
        for name, parameter in self.model.named_parameters():
            parameter.copy_(weights[name])

    def add_up(self, values):
        return values


@pytest.fixture(params=[0, 3])
def world(request):
    """Configuration, student, teacher, batch; with small views and without."""
    config = load_config(
        None,
        ["train.objective=dino", "model.name=Ti/4", "model.image_size=16", "model.num_classes=0", "model.width=32",
         "model.depth=2", "model.heads=2", "ema.decay=0.9", f"dino.local_views={request.param}", "dino.local_size=8",
         "dino.prototypes=12", "dino.projection_width=16", "dino.bottleneck=8"],
    ).config  # fmt: skip
    torch.manual_seed(0)
    student, teacher = build_for_training(config), build_for_training(config)
    for model in (student, teacher):  # else all scores are alike
        for parameter in model.projection.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    images = torch.randint(0, 256, (4, *images_shape(training_views(config))), dtype=torch.uint8)
    batch = Batch(images, torch.zeros(4, dtype=torch.int64), torch.tensor([1.0, 1, 0, 1]), list("abcd"), np.arange(4))
    return config, student, teacher, batch


def expected(config, student, teacher, batch, centre):
    """For each sample the mean of -sum p_t log p_s over views t that the teacher sees and other views s."""
    views = training_views(config)
    seen = distort_views(unpack_views(batch.images, views), views, batch.seeds)
    found, teachings = [], []
    with torch.no_grad():
        for images in seen[:2]:
            scores = teacher(images, project=True)
            teachings.append(scores)
        for taught, scores in enumerate(teachings):
            target = ((scores - centre) / config.dino.teacher_temperature).softmax(1)
            for number, images in enumerate(seen):
                if number != taught:
                    logs = (student(images, project=True) / config.dino.student_temperature).log_softmax(1)
                    found.append(-(target * logs).sum(1))
    return torch.stack(found).mean(0), torch.cat(teachings)


def test_each_view_learns_the_teachers_answer_to_another(world):
    config, student, teacher, batch = world
    objective = build_objective(config, CPU)
    assert isinstance(objective, Taught)
    objective.learn_from(Twins(student, teacher))
    student.centre.uniform_(-0.1, 0.1)
    losses, _ = expected(config, student, teacher, batch, student.centre)
    torch.testing.assert_close(objective.losses(student, batch), losses * batch.weights, rtol=1e-4, atol=1e-5)
    assert student.training


def test_the_centre_follows_the_teachers_scores_of_usable_images(world):
    config, student, teacher, batch = world
    objective = build_objective(config, CPU)
    objective.learn_from(Twins(student, teacher))
    objective.losses(student, batch), objective.losses(student, batch)  # two micro-batches, of the same images
    assert student.centre.abs().sum() == 0
    objective.step_done(student)
    _, scores = expected(config, student, teacher, batch, student.centre)
    usable = batch.weights.bool().repeat(2)
    torch.testing.assert_close(student.centre, 0.1 * scores[usable].mean(0), rtol=1e-4, atol=1e-6)
    objective.losses(student, batch)
    before = student.centre.clone()
    objective.learn_from(Twins(student, teacher))  # after going back to a checkpoint
    objective.step_done(student)
    torch.testing.assert_close(student.centre, 0.9 * before)


def test_the_student_learns_and_its_teacher_does_not(world):
    config, student, teacher, batch = world
    objective = build_objective(config, CPU)
    objective.learn_from(Twins(student, teacher))
    objective.losses(student, batch).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_centre_is_the_same_in_16_bits(world):
    _, student, _, _ = world
    student.centre.copy_(torch.linspace(-1, 1, 12) / 3)
    before = student.centre.clone()
    assert torch.equal(student.bfloat16().centre, before) and "centre_bits" in student.state_dict()


def projection(config, **settings):
    """A new one, of a model of width 32."""
    torch.manual_seed(0)
    wide = config.dino.model_copy(update={"prototypes": 512, "bottleneck": 64} | settings)
    return build_for_training(config.model_copy(update={"dino": wide})).projection


def test_a_new_projection_is_drawn_as_the_authors_code_draws_it(world):
    """Layers of deviation 0.02 without biases, at the authors' width, and prototypes as torch.nn.Linear has them."""
    config, *_ = world
    drawn = projection(config, projection_width=2048)
    for name, parameter in drawn.mlp.named_parameters():
        deviation = 0 if name.endswith("bias") else 0.0176  # what 0.02 is when cut off at two
        assert parameter.std().item() == pytest.approx(deviation, rel=0.05)
    prototypes, layer = drawn.prototypes.weight, torch.nn.Linear(64, 512, bias=False).weight
    assert prototypes.std().item() == pytest.approx(layer.std().item(), rel=0.03)
    assert 0.12 < prototypes.abs().max() <= 64**-0.5


def test_a_narrow_projection_begins_with_an_output_that_the_first_updates_do_not_outweigh(world):
    """Their deviation of 0.02 would make it 0.004 long, and Adam moves each bias by the learning rate per update."""
    config, *_ = world
    images = torch.randn(64, 32)
    lengths = [projection(config, projection_width=width).mlp(images).norm(dim=1).mean() for width in (64, 2048)]
    assert all(0.1 < length < 1 for length in lengths)
