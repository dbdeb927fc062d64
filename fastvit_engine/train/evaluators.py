"""The evaluations of a run, and the rows that they write."""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from fastvit_engine.checkpoint.trainer_state import Figures
from fastvit_engine.config import AugmentConfig, Config
from fastvit_engine.data import Batch, TrainingData
from fastvit_engine.data.stream.prepare import FewShotData
from fastvit_engine.data.stream.source import EvaluationData
from fastvit_engine.evaluate.classification import Answers, Classification
from fastvit_engine.evaluate.confusion import Confusion
from fastvit_engine.evaluate.fewshot_evaluator import FewShot
from fastvit_engine.evaluate.held_out_loss import HeldOutLoss, Picture
from fastvit_engine.evaluate.own import Own
from fastvit_engine.evaluate.protocol import Evaluator
from fastvit_engine.files import atomic_write
from fastvit_engine.objectives import build_objective
from fastvit_engine.observe.disk import if_possible
from fastvit_engine.observe.recorder import Recorder
from fastvit_engine.train.health.bad_samples import BadSamples
from fastvit_engine.train.job import Job
from fastvit_kernels import FusedCrossEntropy

SHOWN_SAMPLES = 48  # images of the evaluation set whose predictions the report shows
_CONFUSED = 100  # pairs of classes that are confused most, for the report


def build_evaluators(
    job: Job, data: TrainingData, few_shot: FewShotData | None, recorder: Recorder | None
) -> list[Evaluator]:
    """What the configuration asks to be measured while the model trains, and the evaluators that `train` was given."""
    found: list[Evaluator] = []
    if job.config.data.eval is not None and job.config.pretraining is None:
        found.append(_classification(job, data, recorder))
    elif job.config.data.eval is not None:
        found.append(_held_out_loss(job, data, recorder))
    if few_shot is not None:
        watchdog = job.processes.watchdog
        found.append(
            FewShot(
                partial(_one_pass, job, few_shot.train, few_shot.config, recorder),
                partial(_one_pass, job, few_shot.eval, few_shot.config, recorder),
                job.config.evaluate.fewshot.shots,
                job.world,
                every_steps=job.schedule.few_shot_every,
                marked=lambda classifiers: watchdog.marked(classifiers, "fitting few-shot classifiers"),
            )
        )
    found += [Own(name, measure, every_steps=job.schedule.own_every) for name, measure in job.evaluators.items()]
    return found


def _one_pass(job: Job, shards: EvaluationData, config: Config, recorder: Recorder | None) -> Iterator[Batch]:
    """This process's share of the images of some shards; collective at its end."""
    world = job.world
    bad_samples = BadSamples(job.run.bad_samples, config.data.max_bad_share)
    loaded = shards.eval_batches(
        config,
        rank=world.rank,
        world_size=world.size,
        batch_size=config.evaluate.batch_size or job.split.micro_batch_size,
        pin_memory=world.device.type == "cuda",
    )
    yield from job.processes.watchdog.marked(bad_samples.watch(loaded), "evaluating")
    bad_samples.settle(world, recorder)


def _held_out_loss(job: Job, data: TrainingData, recorder: Recorder | None) -> HeldOutLoss:
    """The evaluator of data.eval in training without labels; images are not augmented."""
    plain = job.config.model_copy(update={"augment": AugmentConfig()})

    def show(step: int, name: str, pictures: list[Picture]) -> None:
        shown = json.dumps({"step": step, "eval": name, "pictures": pictures})
        if_possible(lambda: atomic_write(job.run.reconstructions, shown), str(job.run.reconstructions))

    return HeldOutLoss(
        partial(_one_pass, job, data, job.config, recorder),
        build_objective(plain, job.world.device),
        job.world,
        every_steps=job.schedule.evaluate_every,
        on_pictures=show if job.world.is_main else None,
    )


def _classification(job: Job, data: TrainingData, recorder: Recorder | None) -> Classification:
    """The evaluator of data.eval."""

    def show(step: int, name: str, answers: Answers) -> None:
        about = {"step": step, "eval": name, "class_names": data.class_names}
        shown = json.dumps({**about, "samples": answers.examples})
        if_possible(lambda: atomic_write(job.run.samples, shown), str(job.run.samples))
        classes = json.dumps({**about, **_by_class(Confusion(answers.right, answers.ranked))})
        if_possible(lambda: atomic_write(job.run.classes, classes), str(job.run.classes))

    is_main = job.world.is_main
    return Classification(
        partial(_one_pass, job, data, job.config, recorder),
        FusedCrossEntropy(job.config.loss.kind),
        job.world,
        every_steps=job.schedule.evaluate_every,
        shown=SHOWN_SAMPLES if is_main else 0,
        on_answers=show if is_main else None,
    )


def _by_class(confusion: Confusion) -> dict[str, list[list[int]]]:
    """What `classes.json` has besides its origin.

    "classes": number, images, and how many of them are right, per class. "confused": right class, wrong answer, times.
    """
    return {
        "classes": [[row.number, row.samples, round(row.top1 * row.samples)] for row in confusion.table(None)],
        "confused": [list(pair) for pair in confusion.pairs()[:_CONFUSED]],
    }


def run_evaluators(
    evaluators: Sequence[Evaluator], job: Job, step: int, recorder: Recorder | None
) -> dict[str, Figures]:
    """Runs them on the weights and on their average, if there is one; returns the accuracy and loss of each by name."""
    figures: dict[str, Figures] = {}

    def run_all(suffix: str) -> None:
        for evaluator in evaluators:
            for row in evaluator.run(job.engine.model, step=step, name=evaluator.name + suffix):
                if recorder:
                    recorder.evaluation(row)
                if "loss" in row:  # of an evaluation of the held-out images
                    one: Mapping[str, Any] = row
                    figures[row["eval"]] = {key: one.get(key) for key in ("top1", "top5", "loss", "samples")}

    run_all("")
    if job.ema is not None:
        with job.ema.applied():
            run_all("_ema")
    return figures
