import dataclasses
import importlib.metadata
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import ceilings, fp8_steps, gpu_calls, gpu_run, memory_policies, slim_wheel, smoke, train
from benchmarks.gpu_calls import GPU_LOST, Command, Part, Place
from benchmarks.gpu_run import MINUTES, PATIENCE, ROOT
from benchmarks.kernels import Selection, pick_known, select
from benchmarks.side_by_side import Measured
from benchmarks.smoke_record import BUNDLED, Outcome, save
from benchmarks.train_variants import VARIANTS
from fastvit_engine.cli import _parser
from fastvit_kernels import choices
from fastvit_kernels.tuning import __main__ as tuning
from tests.in_full import only_in_full

FILES = ["report.md", "results.tar.gz", "summary.json"]
UNPREDICTED = {"recompute": "none", "checkpointed_blocks": 0, "memory_gib": None, "predicted_bytes": 0}
CALLS = (1, 2, 3, 4, 5, 6)


def part(name: str, *texts: str, least: float = 1, most: float = 60, again_on: int | None = None) -> Part:
    commands = [
        Command(f"{name}{number or ''}", [sys.executable, "-c", text], {"GIVEN": "1"})
        for number, text in enumerate(texts)
    ]
    return Part(name, least, most, lambda seconds: commands, again_on)


def place(folder: Path, *, dry: bool = False, ptxas: Path | None = Path("/x/ptxas")) -> Place:
    return Place(folder, dry, ptxas)


def test_every_part_has_its_turn_and_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    once, out = tmp_path / "once", tmp_path / "out"
    again = f"import pathlib, sys; p = pathlib.Path({str(once)!r}); e = p.exists(); p.touch(); sys.exit(0 if e else 3)"
    handler = (
        "import signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)"  # jobs of a shell ignore it
    )
    sleeper = f"{handler}\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('interrupted', flush=True)"

    def parts(call: int, place: Place) -> list[Part]:
        table = (  # what the part before it has left is there already
            f"import pathlib; assert 'smoke' in pathlib.Path({str(out)!r}, 'summary.json').read_text();"
            f"p = pathlib.Path({str(place.folder)!r}, 'gpu'); p.mkdir(); (p / 'a.md').write_text('# Seen')"
        )
        return [
            part("smoke", "import os; print('said', os.environ['GIVEN']); raise SystemExit(1)", "print('beside')"),
            part("kernels", table),
            part("train", sleeper, most=2),
            part("tuning", again, again_on=GPU_LOST),
            part("long", "print('never')", least=500),
        ]

    monkeypatch.setattr(gpu_run, "parts", parts)
    monkeypatch.setattr(gpu_run, "PATIENCE", 1)
    assert gpu_run.main(["--call", "1", "--out", str(out), "--minutes", "1"]) == 1
    assert sorted(path.name for path in out.iterdir()) == FILES
    summary = json.loads((out / "summary.json").read_text())
    codes = {outcome["name"]: outcome["exit_code"] for outcome in summary["parts"]}
    assert codes == {"smoke": 1, "smoke1": 0, "kernels": 0, "train": None, "tuning": 0, "long": None}
    assert summary["versions"]["torch"]
    printed, report = capsys.readouterr().out, (out / "report.md").read_text()
    assert "long: no time was left for it: it needs 500 s, and there were " in printed
    assert "| 1 | train | not done |" in report and "| 1 | long | no time was left for it" in report
    assert "# Seen" in report and "interrupted" in report
    assert "## call1-smoke\n\n```\nsaid 1" in printed
    with tarfile.open(out / "results.tar.gz") as archive:
        assert {"./gpu/a.md", "./call1-smoke.log", "./call1-train.log"} <= set(archive.getnames())

    # the same call again repeats what did not succeed; the next one takes everything over
    monkeypatch.setattr(gpu_run, "parts", lambda call, place: [part("kernels", "1/0"), part("smoke", "print('well')")])
    second, third = tmp_path / "second", tmp_path / "third"
    assert gpu_run.main(["--call", "1", "--out", str(second), "--previous", str(out)]) == 0
    assert "kernels: done in an earlier call" in capsys.readouterr().out
    monkeypatch.setattr(gpu_run, "parts", lambda call, place: [part("new", "print('new')")])
    assert gpu_run.main(["--call", "2", "--out", str(third), "--previous", str(second)]) == 0
    summary = json.loads((third / "summary.json").read_text())
    assert [(outcome["call"], outcome["name"]) for outcome in summary["parts"]] == [
        (1, "kernels"), (1, "smoke"), (2, "new"),
    ]  # fmt: skip
    with tarfile.open(third / "results.tar.gz") as archive:
        assert {"./gpu/a.md", "./call1-smoke.log", "./call2-new.log"} <= set(archive.getnames())


def test_a_program_that_is_not_there_and_one_that_never_ends_well(tmp_path: Path) -> None:
    absent = Part("absent", 1, 9, lambda seconds: [Command("absent", [str(tmp_path / "no-such-program")])])
    assert [outcome.exit_code for outcome in gpu_run.run(absent, 1, 30, tmp_path)] == [127]
    (lost,) = gpu_run.run(part("lost", "raise SystemExit(3)", again_on=GPU_LOST), 1, 1, tmp_path)
    assert lost.exit_code is None
    assert tuning.GPU_LOST == GPU_LOST


@pytest.mark.parametrize("dry", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_what_a_call_starts_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, dry: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every program's own parser takes the options, and every name is one that there is to measure."""
    device = torch.device("cpu" if dry else "cuda")
    monkeypatch.setattr(smoke, "pick_device", lambda: device)
    monkeypatch.setattr(smoke, "run_all", lambda names, deadline, **options: iter(()))
    monkeypatch.setattr(
        ceilings, "measure", lambda **options: {"copy_bytes_per_second": 1, "batches": [], "left_out": []}
    )

    def measured(builds: Iterable[str], *options: object) -> dict[str, Any]:
        variants = {name: vars(Measured([1.0], [1.0], [1.0])) for name in builds}
        return {"environment": {"gpu": None}, "model": "H/14", "batch": 64, "variants": variants}

    monkeypatch.setattr(fp8_steps, "measure", measured)
    monkeypatch.setattr(memory_policies, "measure", measured)
    monkeypatch.setattr(memory_policies.Policy, "record", lambda policy: UNPREDICTED)
    names = []
    for part in gpu_calls.parts(call, place(tmp_path, dry=dry)):
        assert part.least <= part.most
        for command in part.commands(120):
            names.append(command.name)
            module, options = command.words[2], command.words[3:]
            if module == "fastvit_engine":
                parsed = _parser().parse_args(options)
                if parsed.action == "train":
                    pick_known("variant", parsed.variants, [variant.name for variant in VARIANTS])
                    models = [shape.name for shape in train.shapes(device, quick=True)]
                    pick_known("model", parsed.models or (), models)
                else:
                    providers = tuple(parsed.providers or ())
                    chosen = Selection(ops=tuple(parsed.ops or ()), models=tuple(parsed.models or ()), quick=True)
                    cases = select(dataclasses.replace(chosen, providers=providers), device)
                    assert {case.shape.name for case in cases} >= set(chosen.models)
            elif module == "fastvit_kernels.tuning":
                monkeypatch.setattr(sys, "argv", ["tuning", *options])
                assert tuning.parse().out == tmp_path / "tuning.json"
            elif module == "pytest":
                paths = [ROOT / option for option in options if option.startswith("tests/")]
                assert paths and all(path.exists() for path in paths)
            else:
                programs = {"benchmarks.smoke": smoke.main, "benchmarks.ceilings": ceilings.main}
                programs["benchmarks.fp8_steps"] = fp8_steps.main
                programs["benchmarks.memory_policies"] = memory_policies.main
                assert programs[module](options) == 0
    assert (
        names
        == {
            1: ["ceilings", "smoke-bundled", "smoke-current", "attention"],
            2: ["train-256", "train-64"],
            3: ["tuning", "train-256-tuned"],
            4: ["kernels", "tests"],
            5: ["tests-fp8", "kernels-fp8", "fp8"],
            6: ["tests-graph", "tests-trial", "policies", "policies-8", "policies-8-B"],
        }[call]
    )


@pytest.mark.parametrize("call", CALLS)
def test_a_call_ends_within_its_time_and_gives_each_part_enough(tmp_path: Path, call: int) -> None:
    left = 60 * MINUTES - PATIENCE
    for part in gpu_calls.parts(call, place(tmp_path)):
        assert left >= part.least, part.name  # if every part before it takes all that it may
        left -= min(left, part.most) + (PATIENCE if part.most < left else 0)
    assert left > -PATIENCE - 1


def test_the_assembler_that_gives_right_results_is_taken(tmp_path: Path) -> None:
    def ended(name: str, code: int | None) -> Outcome:
        return Outcome(name, code, 1.0, "")

    found = place(tmp_path)
    assert found.assembler()[0] == {} and "unchecked" in found.assembler()[1]
    folder = tmp_path / "smoke"
    save(folder, BUNDLED, [ended("mlp", 0), ended("block", None), ended("train ZeRO-1", 1)])
    assert found.assembler() == ({}, "No check failed with Triton's own ptxas, which assembles the kernels.")
    save(folder, BUNDLED, [ended("mlp", 0), ended("attention", 1)])
    assert found.assembler()[1].startswith("WARNING: ") and found.assembler()[0] == {}
    save(folder, gpu_calls.CURRENT, [ended("mlp", 0), ended("attention", None)])  # which proves nothing
    assert found.assembler()[0] == {}
    save(folder, gpu_calls.CURRENT, [ended("mlp", 0), ended("attention", 0)])
    variables, sentence = found.assembler()
    assert variables == {"TRITON_PTXAS_PATH": "/x/ptxas"} and "these failed: attention" in sentence
    (command,) = gpu_calls.parts(2, found)[0].commands(100)
    assert command.environment == variables
    assert place(tmp_path, ptxas=None).assembler()[0] == {}


def test_training_does_without_the_kernels_that_no_assembler_gets_right(tmp_path: Path) -> None:
    assert {name for names in gpu_calls.OPERATIONS.values() for name in names} <= choices.OPERATIONS.keys()
    assert gpu_calls.OPERATIONS.keys() == {check.case.op.name for check in smoke.checks().values()}
    failed = ["attention/H/14/64/bf16", "layer_norm/H/14/64/fp32", "block/H/14/64/fp32 autocast"]
    save(tmp_path / "smoke", BUNDLED, [Outcome(name, 1, 1.0, "") for name in failed])
    found = place(tmp_path)
    setting = "auto,attention=reference,attention_block=reference,mlp=reference"
    assert found.fallback() == ({"FASTVIT_KERNELS": setting}, f"Training runs with FASTVIT_KERNELS={setting}.")
    choices.parse(setting, "FASTVIT_KERNELS")
    (command,) = gpu_calls.parts(2, found)[0].commands(100)
    assert command.environment == {"FASTVIT_KERNELS": setting}
    save(tmp_path / "smoke", BUNDLED, [Outcome(failed[1], 1, 1.0, "")])
    assert found.fallback() == ({}, "")


def test_training_after_tuning_uses_the_table(tmp_path: Path) -> None:
    (command,) = gpu_calls.parts(3, place(tmp_path))[1].commands(100)
    assert "FASTVIT_TUNING" not in command.environment
    (tmp_path / "tuning.json").touch()
    (command,) = gpu_calls.parts(3, place(tmp_path))[1].commands(100)
    assert command.environment["FASTVIT_TUNING"] == str(tmp_path / "tuning.json")


def test_conclusions_are_a_line_each(tmp_path: Path) -> None:
    rows = [
        {"variant": "fastvit", "status": "ok", "images_per_second": 500.4, "mfu": 0.5, "host_ms": 90,
         "memory_bytes": 86 << 30},
        {"variant": "timm", "status": "failed", "reason": "no timm"},
    ]  # fmt: skip
    own = {
        "provider": "fastvit",
        "status": "ok",
        "passes": {"forward": {"times_as_fast": [1, 1.5, 2], "as": "sdpa cudnn"}},
    }
    cases = [
        {"case": "attention/H/14/64/bf16", "providers": [own]},
        {"case": "block/H/14/64/bf16", "providers": [{"provider": "fastvit", "status": "wrong", "reason": "by much"}]},
        {"case": "mlp/H/14/64/bf16", "failed": "no memory"},
    ]
    products = [{"ms": 1.0, "flops_per_second": 6e14}, {"ms": 3.0, "flops_per_second": 8e14}]
    records = {
        "train-256/h200/train-2026-01-02.json": {"cases": [{"variants": rows}]},
        "attention/h200/kernels-2026-01-02.json": {"cases": cases},
        "fp8/fp8.json": {"verdicts": ["fp8 tensor: 1.40 times as fast as bf16, target 1.35: met"]},
        "policies/policies.json": {"verdicts": ["recompute all: WRONG"]},
        "ceilings/ceilings.json": {"copy_bytes_per_second": 4.3e12, "batches": [{"batch": 256, "products": products}]},
    }
    for name, record in records.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(json.dumps(record))
    save(
        tmp_path / "smoke",
        BUNDLED,
        [Outcome("mlp", 0, 1.0, ""), Outcome("block", 1, 1.0, "kernels: a_kernel\nwrong: x")],
    )
    assert gpu_calls.conclusions(place(tmp_path)) == [
        "copy: 4.30 TB/s",
        "products of a block, batch 256: 750 TFLOP/s, 4.00 ms",
        "smoke, bundled ptxas: 1 of 2 checks passed",
        "  block: exit code 1: wrong: x",
        "  a_kernel, bundled ptxas: in question: block",
        "attention/H/14/64/bf16: 1.50 times as fast as sdpa cudnn (forward)",
        "block/H/14/64/bf16: wrong: by much",
        "mlp/H/14/64/bf16: no memory",
        "train-256: fastvit: 500 images/s, MFU 50 %, 86 GiB, host 90 ms",
        "train-256: timm: failed: no timm",
        "fp8: fp8 tensor: 1.40 times as fast as bf16, target 1.35: met",
        "policies: recompute all: WRONG",
    ]


def test_what_cannot_be_continued_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu_run.main(["--call", "2", "--out", str(tmp_path / "out"), "--previous", str(tmp_path)])
    assert f"--previous {tmp_path}: there is no results.tar.gz" in capsys.readouterr().err


def test_the_assembler_is_found_where_wheels_are_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert gpu_run.assembler() is None
    ptxas = tmp_path / "nvidia" / "cu13" / "bin" / "ptxas"
    ptxas.parent.mkdir(parents=True)
    ptxas.touch(mode=0o755)
    assert gpu_run.assembler() == ptxas


def test_it_says_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_run, "NEEDED", ("torch", "no_such_package"))
    assert gpu_run.main(["--call", "1", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().out == "not installed, and nothing runs without: no_such_package\n"
    with pytest.raises(SystemExit, match="2"):
        gpu_run.main(["--call", "1", "--out", str(tmp_path), "--wheels", str(tmp_path)])
    assert f"there are no wheels in {tmp_path}" in capsys.readouterr().err
    monkeypatch.setattr(gpu_run, "WANTED", {"no_such_package": "no miracles"})
    assert gpu_run.dependencies()[1] == ["no_such_package: no miracles"]


def wheel(folder: Path, name: str, tag: str) -> None:
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-{tag}.whl", "w") as archive:
        archive.writestr(f"{name}.py", "answer = 42\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", "")


def test_wheels_are_installed_where_something_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    wheel(wheels, "of_a_wheel", "py3-none-any")
    wheel(wheels, "elsewhere", "cp39-cp39-win_amd64")
    wheel(wheels, "numpy", "py3-none-any")  # installed here: stays as it is
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "")
    assert gpu_run.install(wheels, site) == ["elsewhere-1.0-cp39-cp39-win_amd64.whl"]
    assert {path.name for path in site.glob("*.py")} == {"of_a_wheel.py"}
    assert gpu_run.version("of_a_wheel") == "1.0"
    (outcome,) = gpu_run.run(part("wheel", "import of_a_wheel; print(of_a_wheel.answer)"), 1, 30, tmp_path)
    assert outcome.exit_code == 0 and (tmp_path / "call1-wheel.log").read_text() == "42\n"


def test_a_wheel_can_be_made_smaller(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wheel(tmp_path, "large", "py3-none-any")
    (path,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("tools/ptxas", "x")
        archive.writestr("tools/nvlink", "y" * 1000)
    assert slim_wheel.main([str(path), "*/ptxas"]) == 0
    with zipfile.ZipFile(path) as archive:
        assert {name for name in archive.namelist() if "dist-info" not in name} == {"tools/ptxas"}
    assert slim_wheel.main([str(path), "*/nvlink"]) == 1
    assert "has no file like */nvlink" in capsys.readouterr().err


def test_wheels_have_the_versions_of_the_constraints() -> None:
    """pydantic takes one version of its core alone, which the constraints do not name."""
    listed = [line.split("#")[0].strip() for line in (ROOT / "launch" / "wheels.txt").read_text().splitlines()]
    (core,) = [line for line in listed if line.startswith("pydantic_core==")]
    wanted = re.escape(core.replace("_", "-"))
    assert any(re.match(wanted, need) for need in importlib.metadata.requires("pydantic") or ())


@only_in_full
@pytest.mark.slow
@pytest.mark.distributed
def test_a_dry_run_of_all_calls(tmp_path: Path) -> None:
    before: list[str] = []
    for call in CALLS:
        out = tmp_path / str(call)
        words = ["--call", str(call), "--out", str(out), "--dry-run", "--minutes", "8", *before]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.gpu_run", *words], cwd=ROOT, capture_output=True, text=True, timeout=540
        )
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
        assert sorted(path.name for path in out.iterdir()) == FILES
        before = ["--previous", str(out)]
    report = (out / "report.md").read_text()
    assert all(title in report for title in ("# Ceilings", "# Does it run?", "# Operations", "# Training steps"))
    with tarfile.open(out / "results.tar.gz") as archive:
        logs = {Path(name).stem for name in archive.getnames() if name.endswith(".log")}
    assert logs >= {"call1-ceilings", "call1-smoke-bundled", "call1-attention", "call2-train-256", "call2-train-64"}
    assert logs >= {"call3-tuning", "call3-train-256-tuned", "call4-kernels", "call4-tests"}
    assert logs >= {
        "call5-tests-fp8",
        "call5-kernels-fp8",
        "call5-fp8",
        "call6-tests-graph",
        "call6-tests-trial",
        "call6-policies",
        "call6-policies-8-B",
    }
