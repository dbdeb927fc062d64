"""The command line itself: what is loaded to show help or to name a typing error, and what `config` prints."""

import argparse
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastvit_engine import cli
from fastvit_engine.cli import _parser, main

HEAVY = ("torch", "deepspeed", "numpy", "pydantic", "yaml", "webdataset", "email", "importlib.metadata")
SLOW = ("random", "tempfile", "traceback", "uuid")  # what a command may need, but not the list of commands


def modules_after(code):
    """Names of the modules that a process has loaded after running `code`."""
    script = f"import contextlib, io, json, sys\nwith contextlib.redirect_stdout(io.StringIO()):\n{code}\n"
    script += "print(json.dumps(sorted(sys.modules)))"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def after_command(*words):
    return modules_after(
        f"    from fastvit_engine.cli import main\n    try: main({words})\n    except SystemExit: pass"
    )


def commands_in(modules):
    """The commands whose modules are among these."""
    return {name for name in cli._PURPOSES if f"fastvit_engine.commands.{name}" in modules}


def test_help_loads_no_command_and_none_of_the_large_packages():
    loaded = after_command("--help")
    assert loaded.isdisjoint((*HEAVY, *SLOW)) and not commands_in(loaded)


@pytest.mark.parametrize("words", [("stacks", "--help"), ("report",), ("data", "mkae"), ("--", "plan")])
def test_a_command_loads_its_own_module_alone(words):
    loaded = after_command(*words)
    assert loaded.isdisjoint(HEAVY) and len(commands_in(loaded)) == 1


def test_garbage_is_left_lying_if_the_process_ends_with_the_command(monkeypatch, capsys):
    """And in no process of somebody else that calls it."""
    frozen = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(True))
    assert cli.main(["config", "list"]) == 0 and not frozen
    monkeypatch.setattr(sys, "argv", ["fastvit", "config", "list"])
    assert cli.main() == 0 and frozen


def test_every_command_declares_itself_under_its_name_and_purpose():
    [commands] = [action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)]
    assert {action.dest: action.help for action in commands._choices_actions} == cli._PURPOSES
    assert list(commands.choices) == list(cli._PURPOSES)
    folder = Path(cli.__file__).parent / "commands"
    modules = [*folder.glob("*.py"), *folder.glob("*/__init__.py")]
    declaring = [path.relative_to(folder).parts[0] for path in modules if "\ndef add(commands" in path.read_text()]
    assert {name.removesuffix(".py") for name in declaring} == set(cli._PURPOSES)


def test_the_configuration_loads_without_pytorch():
    code = "    from fastvit_engine.config import load_config\n    load_config('vit_h14_jft')"
    loaded = modules_after(code)
    assert "pydantic" in loaded and loaded.isdisjoint({"torch", "deepspeed", "numpy"})


@pytest.mark.parametrize("command", [["train"], ["plan", "--gpus", "8"]])
def test_a_typing_error_is_told_before_pytorch_is_loaded(command):
    name, *options = command
    for wrong in (["quikstart"], ["quickstart", "--set", "lr=1"]):
        code = f"    from fastvit_engine.cli import main\n    assert main({[name, *wrong, *options]}) == 2"
        assert modules_after(code).isdisjoint({"torch", "deepspeed", "numpy"})


@pytest.mark.parametrize("wrong", [["vit_h14_jfk"], ["quickstart", "--set", "train.durration=1 epoch"]])
def test_a_typing_error_suggests_the_word_that_was_meant(capfd, wrong):
    assert main(["train", *wrong]) == 2
    assert "did you mean" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["trian"], "unknown fastvit command 'trian': did you mean 'train'? (see `fastvit --help`)"),
        (["data", "mkae"], "unknown fastvit action 'mkae': did you mean 'make'? (see `fastvit data --help`)"),
        (
            ["zzz"],
            "unknown fastvit command 'zzz': there are train, evaluate, predict, fewshot",
        ),
        (["plan", "photos", "--gpus", "1", "--gpu", "H10"], "unknown --gpu 'H10': did you mean 'H100'?"),
        (["train", "photos", "--set", "train.grad_clip", "0.1"], "'train.grad_clip' has no '=': write --set KEY=VALUE"),
        (["data", "bench", "x", "--set", "k", "1"], "'k' has no '=': write --set KEY=VALUE"),
        (["report"], "the following arguments are required: RUN"),
    ],
)
def test_a_wrong_argument_is_one_sentence(capsys, arguments, sentence):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    errors = capsys.readouterr().err
    assert stop.value.code == 2
    assert errors.startswith("fastvit: error: ") and errors.count("\n") == 1
    assert sentence in errors


@pytest.mark.parametrize(
    ("words", "shown"),
    [([], "train a model"), (["data"], "draw training images"), (["config"], "every value of a recipe")],
)
def test_a_command_without_its_action_shows_the_help(capsys, words, shown):
    with pytest.raises(SystemExit) as stop:
        main(words)
    errors = capsys.readouterr().err
    assert stop.value.code == 2 and errors.startswith("usage: fastvit") and shown in errors


def commands_of(parser, words=()):
    """The words of every command, and what its --help prints."""
    chosen = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if words:
        yield " ".join(words), parser.format_help()
    for action in chosen:
        for name, inner in action.choices.items():
            yield from commands_of(inner, (*words, name))


def test_the_help_of_every_command_ends_with_an_example():
    found = dict(commands_of(_parser()))
    assert {
        "train",
        "convert",
        "evaluate",
        "predict",
        "features",
        "fewshot",
        "data index",
        "config show",
    } <= found.keys()
    for words, text in found.items():
        last = text.rstrip().splitlines()[-1]
        assert last.startswith(f"  fastvit {words}"), f"{words}: {last}"


def test_resume_alone_means_auto():
    def resume(*words):
        return _parser().parse_args(["train", "photos", *words]).resume

    assert (resume(), resume("--resume"), resume("--resume", "--out", "runs/x")) == ("never", "auto", "auto")
    assert (resume("--resume", "never"), resume("--resume", "auto")) == ("never", "auto")


def test_a_folder_of_shards_in_place_of_a_recipe_is_told_where_it_belongs(capsys, tmp_path):
    assert main(["data", "show", str(tmp_path), "--sheet", "x.png"]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path} is a folder, not a recipe: `photos --set data.train={tmp_path}` reads shards there" in error


def test_config_list_names_every_recipe_with_its_purpose_in_whole_sentences(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["config", "list"]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert any(line.split()[:2] == ["vit_h14_jft", "ViT-H/14"] for line in lines)
    assert not any(line.split()[0].startswith("_") for line in lines if line)
    assert max(map(len, lines)) <= 80
    for name, purpose in re.findall(r"^  (\w+) +(\S.*\n(?: {10,}.*\n)*)", printed, re.MULTILINE):
        assert purpose.rstrip().endswith("."), f"{name}: {purpose}"
    assert "2022, arXiv:2205.01580), which states 76.5 % top-1." in " ".join(printed.split())


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        (["data.subset=0.1", "data.train_samples=50000"], "subset: 0.1 # --set: 5,000 samples"),
        (["data.subset=700"], "subset: 700 # --set: 700 samples"),
        (["data.subset=0.1"], "subset: 0.1 # --set: of the samples in the shards"),
    ],
)
def test_config_show_says_how_many_samples_a_subset_has(capsys, settings, note):
    words = [word for setting in settings for word in ("--set", setting)]
    assert main(["config", "show", "quickstart", *words]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  subset:")]
    assert " ".join(line.split()) == note


def test_config_show_names_the_file_of_base_and_recipe(capsys):
    assert main(["config", "show", "vit_b16_jft", "--set", "zero.stage=2"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["name:", "B/16", "#", "vit_b16_jft.yaml:5"] in lines
    assert ["num_classes:", "18291", "#", "_jft.yaml:4"] in lines
    assert ["stage:", "2", "#", "--set"] in lines


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.name=R51x1"], "model.name 'R51x1'"),
        (["deepspeed.optimizer={}"], "deepspeed.optimizer is written by the engine"),
        (["train.duration=100 steps"], "is longer than the whole run of 100 steps"),
        (["deepspeed.zero_optimization.stage=1"], "set zero.stage instead"),
        (["data.mean=[127.5, 127.5, 127.5]"], "pixels are in [0, 1]"),
        (["data.order=stream", "data.train=[{shards: a}, {shards: b}]"], "data.order is stream, which reads one"),
        (["schedule.warmup=9 epochs", "train.duration=7 epochs"], "is longer than train.duration = '7 epochs'"),
        (
            [
                "data.eval=x",
                "checkpoint.keep_best=eval.top1",
                "checkpoint.every=5 steps",
                "evaluate.every=2 steps",
                "train.duration=20k steps",
            ],
            "let evaluate.every divide checkpoint.every",
        ),
        (["train.duration=1 sample"], "is less than one step of the global batch"),
    ],
)
def test_config_show_refuses_what_training_would_refuse(capsys, overrides, message):
    words = [word for override in overrides for word in ("--set", override)]
    assert main(["config", "show", "vit_b16_jft", *words]) == 2
    assert message in capsys.readouterr().err


def test_config_explain_in_three_forms(capsys):
    assert main(["config", "explain", "data.window"]) == 0
    assert "data.window: integer, > 0; default 1024" in capsys.readouterr().out
    assert main(["config", "explain", "evaluate.every"]) == 0
    assert "A duration: a number with a unit, such as 90 epochs, 10k steps" in capsys.readouterr().out
    assert main(["config", "explain", "zero", "--json"]) == 0
    assert [key["key"] for key in json.loads(capsys.readouterr().out)["sections"][0]["keys"]] == [
        "zero.stage",
        "zero.offload",
    ]
    assert main(["config", "explain", "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("# Configuration\n")
    assert main(["config", "explain", "optimizer.lr"]) == 2
    assert "did you mean 'optimizer.learning_rate'" in capsys.readouterr().err


def test_a_warning_of_ours_is_a_line_without_source_code():
    text = "h says no mean: taking 0.5"
    ours = os.path.join(os.path.dirname(cli.__file__), "train", "first_weights.py")
    assert cli._format_warning(UserWarning(text), UserWarning, ours, 95) == f"warning: {text}\n"
    for category, filename in [(UserWarning, json.__file__), (DeprecationWarning, ours), (UserWarning, "/x.py")]:
        assert f"{filename}:7: {category.__name__}: {text}\n" in cli._format_warning(text, category, filename, 7)
