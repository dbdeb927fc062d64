"""The evaluations of a run, and the rows that they write."""

import json
from collections.abc import Iterator, Sequence

from fastvit_engine.checkpoint.trainer_state import Figures
from fastvit_engine.data import Batch, TrainingData
from fastvit_engine.evaluate.classification import Classification, Example
from fastvit_engine.evaluate.protocol import Evaluator
from fastvit_engine.files import atomic_write
from fastvit_engine.observe.disk import if_possible
from fastvit_engine.observe.recorder import Recorder
from fastvit_engine.train.health.bad_samples import BadSamples
from fastvit_engine.train.job import Job
from fastvit_kernels import FusedCrossEntropy

SHOWN_SAMPLES = 48  # images of the evaluation set whose predictions the report shows


def build_evaluators(job: Job, data: TrainingData, recorder: Recorder | None) -> list[Evaluator]:
    """What the configuration asks to be measured while the model trains."""
    config, world = job.config, job.world
    if config.data.eval is None:
        return []

    def batches() -> Iterator[Batch]:
        bad_samples = BadSamples(job.run.bad_samples, config.data.max_bad_share)
        loaded = data.eval_batches(
            config,
            rank=world.rank,
            world_size=world.size,
            batch_size=config.evaluate.batch_size or job.split.micro_batch_size,
            pin_memory=world.device.type == "cuda",
        )
        yield from job.processes.watchdog.marked(bad_samples.watch(loaded), "evaluating")
        bad_samples.settle(world, recorder)

    def show(step: int, examples: list[Example]) -> None:
        shown = {"step": step, "class_names": data.class_names, "samples": examples}
        if_possible(lambda: atomic_write(job.run.samples, json.dumps(shown)), str(job.run.samples))

    return [
        Classification(
            batches,
            FusedCrossEntropy(config.loss.kind),
            world,
            every_steps=job.schedule.evaluate_every,
            shown=SHOWN_SAMPLES if world.is_main else 0,
            on_examples=show if world.is_main else None,
        )
    ]


def run_evaluators(
    evaluators: Sequence[Evaluator], job: Job, step: int, recorder: Recorder | None
) -> dict[str, Figures]:
    """Runs them on the weights and on their average, if there is one; returns the figures of each row by its name."""
    figures: dict[str, Figures] = {}

    def run_all(suffix: str) -> None:
        for evaluator in evaluators:
            for row in evaluator.run(job.engine.model, step=step, name=evaluator.name + suffix):
                if recorder:
                    recorder.evaluation(row)
                measured = {"top1": row["top1"], "top5": row["top5"], "loss": row["loss"], "samples": row["samples"]}
                figures[row["eval"]] = measured

    run_all("")
    if job.ema is not None:
        with job.ema.applied():
            run_all("_ema")
    return figures
