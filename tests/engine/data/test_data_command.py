import argparse
import json
import subprocess
import sys

import pytest

from fastvit_engine.commands import data as data_command
from fastvit_engine.data import build_eval_data, prepare_data


def _run(*words: str) -> int:
    parser = argparse.ArgumentParser(prog="fastvit")
    data_command.add(parser.add_subparsers())
    args = parser.parse_args(words)
    return args.run(args)


def test_make_digits_end_to_end(tmp_path, capsys, make_config):
    pytest.importorskip("sklearn")
    out = tmp_path / "digits"
    assert _run("data", "make", "digits", "--out", str(out), "--samples-per-shard", "400") == 0
    assert "1,617 train samples in 5 shards, 180 eval samples in 1 shards" in capsys.readouterr().out
    assert json.loads((out / "dataset.json").read_text())["source"] == "digits"
    config = make_config(out, eval=out)
    config = config.model_copy(update={"model": config.model.model_copy(update={"num_classes": 10})})
    plan = prepare_data(config, world_size=1, index_folder=tmp_path)
    assert plan.samples_per_epoch == 1617 and plan.class_names == list("0123456789")
    batches = list(build_eval_data(config, plan, rank=0, world_size=1, batch_size=64, pin_memory=False))
    assert sum(int(batch.weights.sum()) for batch in batches) == 180


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        _run("data", "make", "--help")
    assert stop.value.code == 0
    assert "fastvit data make photos/ --out" in capsys.readouterr().out


def test_importing_the_data_package_does_not_import_deepspeed():
    code = "import sys, fastvit_engine.data; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
