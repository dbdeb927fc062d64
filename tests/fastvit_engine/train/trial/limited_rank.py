"""A rank on CPUs that tries micro-batches all the same: its memory ends, as far as it knows, with LIMIT images."""

import os

import torch

from fastvit_engine.sizing.candidates import with_train
from fastvit_engine.sizing.defaults import Chosen, choose
from fastvit_engine.train import loop
from fastvit_engine.train.trial.step import StepTrial

LIMIT = "FASTVIT_TEST_LIMIT"  # a variable of the environment


def limit_memory() -> None:
    """Steps are real; those of more images than LIMIT then say that memory was short."""
    limit, run_steps = int(os.environ[LIMIT]), StepTrial.run_steps

    def choose_as_on_gpus(config, machine) -> Chosen:
        chosen = choose(with_train(config, micro_batch_trial=False), machine)
        wanted = with_train(chosen.config, micro_batch_trial=config.train.micro_batch_trial)
        return Chosen(wanted, chosen.choices, chosen.memory, chosen.machine)

    def run_limited_steps(trial: StepTrial, micro_batch_size: int) -> None:
        run_steps(trial, micro_batch_size)
        if micro_batch_size > limit:
            raise torch.OutOfMemoryError(f"more than {limit} images")

    loop.choose = choose_as_on_gpus
    StepTrial.run_steps = run_limited_steps
