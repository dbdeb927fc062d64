"""Advice of error sentences: the options, keys and commands that it names exist, and what it says to do helps."""

import argparse
import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest

from fastvit_engine.cli import _parser, main
from fastvit_engine.config import load_config
from fastvit_engine.config.deepspeed_section import OWNED
from fastvit_engine.config.keys import fields, sections
from fastvit_engine.data.pixels.decode import decode_image
from fastvit_engine.data.shards.index import _HEADER, open_index, write_index
from fastvit_engine.data.shards.usable import SampleKeys, Unusable, read_image, read_labels
from fastvit_engine.data.stream.indexed import IndexedData
from fastvit_engine.data.stream.prepare import prepare_data
from fastvit_engine.errors import UserError

ROOT = Path(__file__).parents[2]
GAP = "\0"  # in place of what is only known when the sentence is made
# Which commands show the sentences of a package; of others, any.
SHOWN_BY = {
    "fastvit_engine/data/build/label.py": ["data label"],
    "fastvit_engine/data/build/": ["data make"],
    "fastvit_engine/train/": ["train"],
    "fastvit_engine/distributed/": ["train"],
    "fastvit_engine/checkpoint/": ["train", "export"],
    "fastvit_engine/commands/plan.py": ["plan"],
    "fastvit_engine/commands/train.py": ["train"],
    "fastvit_engine/commands/export.py": ["export"],
    "fastvit_engine/commands/data/make.py": ["data make"],
    "fastvit_engine/commands/data/index.py": ["data index"],
    "fastvit_engine/commands/data/label.py": ["data label"],
    "fastvit_engine/commands/data/verify.py": ["data verify"],
    "fastvit_engine/commands/data/bench.py": ["data bench"],
}
# Of pip, srun, sbatch and ray; torchrun, docker and nvidia-smi.
OTHER_PROGRAMS = {
    "--editable",
    "--force-reinstall",
    "--index-url",
    "--ntasks",
    "--cpus-per-task",
    "--mem",
    "--array",
    "--head",
}
OTHER_PROGRAMS |= {"--address", "--nproc-per-node", "--shm-size", "--ulimit", "--status"}


@cache
def sentences() -> list[tuple[str, int, str]]:
    """What `_sentences` finds, in the process that looks at them and not wherever tests are collected."""
    return list(_sentences())


def _sentences() -> Iterator[tuple[str, int, str]]:
    """(file, line, text) of every literal text with a space that is no docstring; f-strings have GAP for each value."""
    for path in sorted((ROOT / "fastvit_engine").rglob("*.py")):
        tree = ast.parse(path.read_text())
        skipped = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and node.value is not None}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                skipped |= {id(value) for value in node.values}
                parts = [str(v.value) if isinstance(v, ast.Constant) else GAP for v in node.values]
                text = "".join(parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
                text = node.value
            else:
                continue
            if " " in text.strip():
                yield str(path.relative_to(ROOT)), node.lineno, text


@cache
def _commands() -> dict[str, set[str]]:
    """The options of each command, such as "data make"."""
    found: dict[str, set[str]] = {}

    def walk(parser: argparse.ArgumentParser, name: str) -> None:
        found[name] = {option for action in parser._actions for option in action.option_strings}
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for word, inner in action.choices.items():
                    walk(inner, f"{name} {word}".strip())

    walk(_parser(), "")
    return found


def test_options_that_sentences_name_are_options_of_the_commands_that_show_them():
    unknown, checked = [], 0
    for path, line, text in sentences():
        names = next((names for start, names in SHOWN_BY.items() if path.startswith(start)), list(_commands()))
        options = set[str]().union(*(_commands()[name] for name in names))
        # A sentence may name another command with its options, which another test parses.
        text = re.sub(r"fastvit [a-z]+[^`\n]*", "", text)
        for option in [] if text.startswith("<") else re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text):
            checked += 1
            if option not in options | OTHER_PROGRAMS:
                unknown.append(f"{path}:{line}: {option}")
    assert unknown == [] and checked > 60


def test_keys_that_sentences_name_are_keys_of_the_configuration():
    known, inner = fields(), sections()
    others = {"model.safetensors", "model.save_pretrained", "model.class_names", "train.npz", "train.sbatch", *inner}
    unknown, checked = [], 0
    pattern = rf"(?<![\w./-])({'|'.join(name for name in inner if '.' not in name)})\.([a-z_]\w*)"
    for path, line, text in sentences():
        if path.endswith(
            ("timm_code.py", "timm_files.py", "timm_resnets.py")
        ):  # code for people to run, whose `model` is timm's
            continue
        for section, name in re.findall(pattern, text):
            key = f"{section}.{name}"
            checked += 1
            if section != "deepspeed" and key not in known and key not in others and text[text.find(key) :] != key:
                unknown.append(f"{path}:{line}: {key}")
    assert unknown == [] and checked > 120


def test_commands_that_sentences_name_are_accepted():
    """Those that are to be run, with all of their arguments; others are at least commands."""
    checked, wrong = 0, []
    for path, line, text in sentences():
        for given, command in re.findall(r"(\w* ?\w* ?)`fastvit ([a-z][^`]*)`", text):
            words = shlex.split(command.replace(GAP, "1").replace("FILE", "x"))
            name = " ".join(words[:2]) if words[0] in ("data", "config") else words[0]
            assert name in _commands(), f"{path}:{line}: {command}"
            to_be_run = re.search(r"(^|\W)(run|with) $", given) or len(words) > len(name.split())
            if to_be_run:
                checked += 1
                try:
                    _parser().parse_args([*words, "x"] if words == ["config", "explain"] else words)
                except SystemExit:
                    wrong.append(f"{path}:{line}: fastvit {command}")
    assert wrong == [] and checked >= 7  # more is made by `index_command`, and followed below


def test_packages_that_sentences_tell_to_install_are_extras():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {name for _, _, text in sentences() for name in re.findall(r"fastvit-engine\[(\w+)\]", text)}
    assert named and named <= extras.keys()


def test_owners_of_deepspeeds_keys_exist():
    for named in OWNED.values():
        for key in re.findall(r"[a-z]+\.[a-z_]+", named):
            assert key in fields(), key
        for section in re.findall(r"'(\w+)' section", named):
            assert section in sections(), section


# ---- the advice is followed, and helps


@pytest.mark.parametrize(
    ("settings", "advice", "followed"),
    [
        (["data.max_labels=2"], "set loss.kind=sigmoid", ["loss.kind=sigmoid"]),
        (["model.num_classes=1"], "set loss.kind=sigmoid", ["loss.kind=sigmoid"]),
        (
            ["data.max_labels=12", "loss.kind=sigmoid"],
            "more than model.num_classes = 10: lower the one or raise the other",
            ["model.num_classes=12"],
        ),
        (["checkpoint.keep_best=eval.top1", "data.eval=null"], "set data.eval", ["data.eval=x"]),
        (["checkpoint.keep_best=eval_ema.top1", "ema.decay=null"], "set ema.decay", ["ema.decay=0.99"]),
        (["train.duration=50%"], "use steps, epochs or samples", ["train.duration=5 epochs"]),
        (["schedule.warmup=100 epochs"], "shorten the one or lengthen the other", ["train.duration=200 epochs"]),
        (["schedule.final_learning_rate=1"], "lower the one or raise the other", ["schedule.final_learning_rate=0"]),
        (["zero.offload=optimizer", "zero.stage=0"], "set zero.stage to 1, 2 or 3", ["zero.stage=1"]),
        (["zero.offload=all", "zero.stage=2"], "needs zero.stage = 3", ["zero.stage=3"]),
        (["evaluate.every=0 steps"], "lengthen it, or set it to null", ["evaluate.every=null"]),
        (["model.heads=3"], "set one of them to fit the other", ["model.width=96"]),
        (["deepspeed.bf16.enabled=true"], "set train.precision instead", "train.precision=bf16"),
        (["deepspeed.gradient_clipping=1"], "set train.grad_clip instead", "train.grad_clip=1"),
        (["deepspeed.zero_optimization.stage=2"], "set zero.stage instead", "zero.stage=2"),
        (["deepspeed.compile={}"], "set train.compile instead", "train.compile=true"),
        (["deepspeed.autotuning={}"], "remove it", ""),
        (["data.mean=[127.5,127.5,127.5]"], "divide a mean of 0 to 255 by 255", "data.mean=[0.5,0.5,0.5]"),
        (["data.std=[0,0,0]"], "give the deviation of pixels in [0, 1]", "data.std=[0.2,0.2,0.2]"),
        (["train.precision=fp8", "train.compile=true"], "set train.compile=false", "train.precision=fp8"),
        (["train.precision=fp8", "model.width=40", "model.mlp_dim=100"], "set train.precision=bf16",
         ["train.precision=bf16"]),
        (["train.fp8.scaling=row"], "set train.precision=fp8", ["train.precision=fp8"]),
        (["train.batch_size=8"], "did you mean 'train.global_batch_size'", "train.global_batch_size=8"),
        (["data.mixup=0.1"], "augment.mixup", "augment.mixup=0.1"),
        (["data.train=[a.tar]"], "[{shards: a.tar, weight: 2}]", "data.train=[{shards: a.tar, weight: 2}]"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_a_setting_that_is_advised_is_taken(settings, advice, followed):
    """`followed`: settings that are added, or the one that takes the place of what was refused."""
    with pytest.raises(UserError) as refused:
        load_config("quickstart", settings)
    assert advice in str(refused.value)
    now = [*settings, *followed] if isinstance(followed, list) else [followed] if followed else []
    load_config("quickstart", now)


@pytest.mark.parametrize(
    ("label", "followed"),
    [
        ("12", ["model.num_classes=13"]),
        ("[1, 2]", ["data.max_labels=2", "loss.kind=sigmoid"]),
        ("cat", ["data.label_key=json.label"]),
        ("[]", ["data.label_key=json.label"]),
        ("-1", None),
    ],
)
def test_what_is_advised_about_a_label_helps(label, followed, tmp_path):
    """Nothing but another shard helps against a negative index."""
    sample = {"cls": label.encode(), "json": b'{"label": 3}'}

    def read(*settings: str) -> list[int]:
        config = load_config("quickstart", settings).config
        return read_labels(sample, SampleKeys.of(config.data), config.model.num_classes)

    with pytest.raises(Unusable) as refused:
        read()
    if followed is None:
        assert refused.value.remedy == "correct the shard"
        return
    for setting in followed:
        assert setting.partition("=")[0] in refused.value.remedy
        assert setting in refused.value.remedy or setting.startswith("data.label_key")
    assert read(*followed)


def test_what_is_advised_about_a_large_image_helps(tmp_path, photo):
    sample = {"jpg": photo(1)}

    def read(*settings: str) -> np.ndarray:
        keys = SampleKeys.of(load_config("quickstart", settings).config.data)
        return read_image(sample, keys, partial(decode_image, max_pixels=keys.max_pixels))

    with pytest.raises(Unusable) as refused:
        read("data.max_pixels=100")
    assert refused.value.remedy.startswith("raise data.max_pixels")
    assert read("data.max_pixels=1000000").ndim == 3


@pytest.mark.parametrize(
    ("refused", "advice", "followed"),
    [
        ("export RUN --out FOLDER", "holds no checkpoint: give a run folder", None),
        ("data index SHARDS --out FOLDER/x", "let its name end in .index", "data index SHARDS --out FOLDER/x.index"),
        ("data make PHOTOS --out FILE/out", "choose another --out", "data make PHOTOS --out FOLDER/out"),
        (
            "data make PHOTOS --out FOLDER/few --eval-fraction 0.01",
            "too few for --eval-fraction 0.01: set --eval-fraction 0.5",
            "data make PHOTOS --out FOLDER/few --eval-fraction 0.5",
        ),
        ("data verify SHARDS --skew 1", "it must be above 1", "data verify SHARDS --skew 2"),
        ("data verify PHOTOS", "run `fastvit data make PHOTOS --out data/", "data make PHOTOS --out FOLDER/made"),
        ("config show quikstart", "quickstart", "config show quickstart"),
        ("plan quickstart --gpus 3 --gpus-per-node 2", "does not divide", "plan quickstart --gpus 4 --gpus-per-node 2"),
    ],
)
def test_a_command_that_is_advised_works(refused, advice, followed, tmp_path, write_tar, sample_members, photo, capsys):
    write_tar(tmp_path / "a.tar", sample_members(range(4)))
    (tmp_path / "file").touch()
    (tmp_path / "run").mkdir()
    for number in range(8):
        (tmp_path / "photos" / f"class{number % 2}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / f"class{number % 2}" / f"{number}.jpg").write_bytes(photo(number))
    names = {
        "SHARDS": tmp_path / "a.tar", "FOLDER": tmp_path, "FILE": tmp_path / "file", "PHOTOS": tmp_path / "photos",
        "RUN": tmp_path / "run",
    }  # fmt: skip

    def filled(text: str) -> str:
        return re.sub("|".join(names), lambda found: str(names[found[0]]), text)

    assert main(shlex.split(filled(refused))) == 2
    assert filled(advice) in capsys.readouterr().err
    if followed:
        assert main(shlex.split(filled(followed))) == 0


def _index_command(sentence: str, shards: Path) -> list[str]:
    (command,) = re.findall(r"`fastvit (data index SHARDS [^`]*)`", sentence)
    return shlex.split(command.replace("SHARDS", shlex.quote(str(shards))))


@pytest.mark.parametrize("labels", ["cls", "json.label"])
@pytest.mark.parametrize("problem", ["missing", "no index", "another version", "damaged", "changed", "added", "cut"])
def test_an_index_that_is_made_as_advised_serves_the_run(problem, labels, tmp_path, write_tar, photo, monkeypatch):
    """Wherever the labels are: an index that took them from another member would say that there are none."""
    folder, index = tmp_path / "my shards", tmp_path / "my index" / "all.index"

    def write(name: str, numbers: range) -> None:
        members = [(f"{n}.{ext}", data) for n in numbers for ext, data in (("jpg", photo(n)), _label(labels, n))]
        write_tar(folder / name, members)

    folder.mkdir()
    write("a.tar", range(6))
    config = load_config(
        "quickstart",
        [f"data.train={folder}", "data.eval=null", f"data.index={index}", f"data.label_key={labels}"],
    ).config

    def prepare() -> IndexedData:
        data = prepare_data(config, world_size=1, index_folder=tmp_path / "run")
        assert isinstance(data, IndexedData)
        return data

    if problem != "missing":
        index.parent.mkdir()
        write_index([str(folder / "a.tar")], index, label_key=labels)
    content = bytearray(index.read_bytes()) if index.exists() else bytearray()
    if problem == "no index":
        index.write_text("something else")
    elif problem == "another version":
        content[8] = 9
        index.write_bytes(content)
    elif problem == "damaged":
        content[_HEADER.size] ^= 1
        index.write_bytes(content)
    elif problem == "changed":
        write("a.tar", range(9))
    elif problem == "added":
        write("b.tar", range(6, 9))
    elif problem == "cut":  # found only when samples are read
        monkeypatch.setattr("fastvit_engine.data.stream.prepare._unchanged_in_size", lambda index: index)
        write("a.tar", range(9))
    with pytest.raises(UserError) as refused:
        prepare()
    command = _index_command(str(refused.value), folder)
    assert ("--label-key" in command) == (labels != "cls")
    assert main(command) == 0
    expected = 9 if problem in ("changed", "added", "cut") else 6
    data = prepare()
    assert data.samples_per_epoch == expected
    made = open_index(index)
    assert made.label_key == labels and made.class_counts() == dict.fromkeys(range(expected), 1)


def _label(key: str, number: int) -> tuple[str, bytes]:
    return ("cls", b"%d" % number) if key == "cls" else ("json", b'{"label": %d}' % number)


def test_a_benchmark_of_bad_shards_names_the_shards_that_can_be_repaired(tmp_path, write_tar, photo, capsys):
    """It measures on links to them, in a folder that is gone when people read of it."""
    members = [(f"{n}.{ext}", data) for n in range(4) for ext, data in (("jpg", photo(n)), ("cls", b"cat"))]
    write_tar(tmp_path / "a.tar", members)
    arguments = ["data", "bench", str(tmp_path), "--quick", "--rounds", "1", "--workers", "0"]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert f"shard {tmp_path}/a.tar" in said and "as-they-are" not in said
    assert "with data.label_key" in said
    write_tar(tmp_path / "a.tar", [member for member in members if member[0].endswith("jpg")])
    assert main(arguments) == 2
    assert f"shard {tmp_path}/a.tar" in capsys.readouterr().err
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:700])
    for words in ([], ["--repack", "16"]):
        assert main([*arguments, *words]) == 2
        assert f"shard {tmp_path}/a.tar" in capsys.readouterr().err
