"""Whole runs of two processes that try micro-batches, on CPUs whose memory seems to be small."""

import json

import pytest

from fastvit_engine.observe.metrics import read_metrics
from tests.fastvit_engine.train.trial.limited_rank import LIMIT, limit_memory
from tests.fastvit_engine.warm_ranks import exit_codes_of

SETTINGS = ["train.duration=4 steps", "train.precision=fp32", "checkpoint.every=2 steps", "zero.stage=2"]


@pytest.mark.distributed
def test_a_run_trains_with_what_it_has_tried_and_keeps_that_when_it_resumes(train, train_arguments, tmp_path):
    out, log, cache = tmp_path / "run", tmp_path / "log", tmp_path / "cache"

    def run(limit, *settings, resume="never"):
        log.write_text("")
        variables = {LIMIT: str(limit), "XDG_CACHE_HOME": str(cache)}
        arguments = train_arguments(out, *SETTINGS, "train.micro_batch_trial=true", *settings, resume=resume)
        codes = exit_codes_of(arguments, 2, log, lambda rank: variables, before=limit_memory)
        assert codes == [0, 0], log.read_text()
        choices = json.loads((out / "environment.json").read_text())["defaults"]["choices"]
        return {choice["key"]: choice["value"] for choice in choices}["train.micro_batch_size"]

    assert run(limit=4) == 4  # of 16 images of each process
    (file,) = (cache / "fastvit" / "micro_batches").iterdir()
    assert "tried micro-batches: 16 does not fit, 2 fits" in log.read_text() and str(file) in log.read_text()

    file.unlink()
    assert run(16, "train.duration=6 steps", resume="auto") == 4
    assert "tried micro-batches" not in log.read_text() and not file.exists()

    given = train(tmp_path / "given", *SETTINGS, "train.micro_batch_size=4", processes=2)
    losses, of_given = ([row["loss"] for row in read_metrics(folder / "metrics.jsonl")[0]] for folder in (out, given))
    assert losses[:4] == of_given and len(losses) == 6
