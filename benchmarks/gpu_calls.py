"""What the six calls of `benchmarks.gpu_run` do: their parts, in order of importance, and the commands of each.

A part knows the least time in which it is worth starting, and the most that it may take. Its commands run at the same
time. On a dry run the same programs measure next to nothing on a CPU.
"""

import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.smoke_record import BUNDLED, broken, kernel_verdicts, passed, saved

PYTHON = [sys.executable, "-m"]
STARTING = 20  # seconds until a program looks at its clock
GPU_LOST = 3  # the tuner's exit code if another process can continue
CURRENT = "ptxas 13.3"  # of `launch/wheels.txt`
VARIANTS = ("fastvit ZeRO-1", "fastvit", "timm compile cudnn", "timm", "fastvit CUDA graph")
POLICIES = (  # beside keeping all
    "recompute gelu",
    "recompute all",
    "checkpoint half",
    "checkpoint all",
    "offload activations",
    "memory budget",
)
ATTENTION_SHAPES = ("H/14 gap", "H/14", "B/16", "H/14@336")  # 256, 257, 197 and 577 tokens
ATTENTION_PROVIDERS = ("fastvit", "sdpa cudnn", "sdpa flash")

# What FASTVIT_KERNELS calls the operations that `benchmarks.smoke` checks.
OPERATIONS = {
    "attention": ("attention",),
    "layer_norm": ("layer_norm",),
    "add_layer_norm": ("layer_norm",),
    "layer_norm_mlp": ("mlp",),
    "layer_norm_mlp_tanh": ("mlp",),
    "attention_block": ("attention_block",),
    "block": ("attention_block", "mlp"),
    "fp8_linear": ("fp8",),
    "patch_embed": ("patch_embed",),
    "cross_entropy": ("cross_entropy",),
    "soft_cross_entropy": ("cross_entropy",),
}


@dataclass(frozen=True)
class Command:
    """One program, with variables of its environment; `name` is that of its log."""

    name: str
    words: list[str]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """Programs that run at the same time, for so many seconds."""

    name: str
    least: float  # with fewer seconds left it is not begun
    most: float
    commands: Callable[[float], list[Command]]
    again_on: int | None = None  # the exit code that asks for the same command once more


@dataclass(frozen=True)
class Place:
    """Where the calls of one machine leave their results, and what the next ones take from there."""

    folder: Path
    dry: bool
    ptxas: Path | None  # a current assembler beside Triton's own

    @property
    def tuning(self) -> Path:
        return self.folder / "tuning.json"

    def assembler(self) -> tuple[dict[str, str], str]:
        """Variables for the programs to come, and a sentence on which assembler they use, by the checks of call 1."""
        checks = saved(self.folder / "smoke")
        if BUNDLED not in checks:
            return {}, "No check of call 1 is here: kernels are assembled by Triton's own ptxas, unchecked."
        wrong = broken(checks, BUNDLED)
        if not wrong:
            return {}, "No check failed with Triton's own ptxas, which assembles the kernels."
        names = ", ".join(sorted(wrong))
        if self.ptxas is not None and self.is_mended():
            return ptxas(self.ptxas), f"{CURRENT} assembles the kernels: with Triton's own, these failed: {names}."
        return {}, f"WARNING: these checks failed, and no other assembler mends them all: {names}."

    def is_mended(self) -> bool:
        """Whether the current assembler gets right all that failed with Triton's own, and fails nowhere."""
        checks = saved(self.folder / "smoke")
        wrong = broken(checks, BUNDLED)
        return self.ptxas is not None and wrong <= passed(checks, CURRENT) and not broken(checks, CURRENT)

    def fallback(self) -> tuple[dict[str, str], str]:
        """The variable that has training run plain PyTorch for what no assembler gets right, and a sentence on it."""
        wrong = set() if self.is_mended() else broken(saved(self.folder / "smoke"), BUNDLED)
        # training is in bf16: what fails in float32 alone is no part of it
        trained = {name.partition("/")[0] for name in wrong if name.endswith(("/bf16", " autocast"))}
        operations = sorted({operation for name in trained for operation in OPERATIONS.get(name, ())})
        if not operations:
            return {}, ""
        setting = ",".join(["auto", *(f"{operation}=reference" for operation in operations)])
        return {"FASTVIT_KERNELS": setting}, f"Training runs with FASTVIT_KERNELS={setting}."

    def tuned(self) -> dict[str, str]:
        """The variable that has kernels use the table of call 3, if there is one."""
        return {"FASTVIT_TUNING": str(self.tuning)} if self.tuning.exists() else {}


def ptxas(path: Path) -> dict[str, str]:
    return {"TRITON_PTXAS_PATH": str(path)}


def parts(call: int, place: Place) -> list[Part]:
    return {1: first, 2: second, 3: third, 4: fourth, 5: fifth, 6: sixth}[call](place)


def first(place: Place) -> list[Part]:
    """Ceilings; is everything right, with both assemblers; attention against flash and cuDNN."""
    ceilings = [*PYTHON, "benchmarks.ceilings", "--out", str(place.folder / "ceilings")]
    attention = bench(place, "kernels", "attention", "--ops", "attention")
    attention += ["--shape", *(["tiny/14@56"] if place.dry else ATTENTION_SHAPES)]
    attention += ["--providers", *(["fastvit", "sdpa"] if place.dry else ATTENTION_PROVIDERS)]
    # a process needs up to 16 GB of the GPU, most far less, and there are two programs
    smoke = [*PYTHON, "benchmarks.smoke", "--out", str(place.folder / "smoke"), "--at-once", "1" if place.dry else "6"]
    smoke += ["--only", "layer_norm", "--repetitions", "3"] if place.dry else []

    def both(seconds: float) -> list[Command]:
        until = ["--seconds", f"{seconds - STARTING:.0f}"]
        commands = [Command("smoke-bundled", [*smoke, *until], own_cache(place, "bundled"))]
        if place.ptxas is not None:
            named = [*smoke, "--assembler", CURRENT, "--operations", *until]
            commands.append(Command("smoke-current", named, ptxas(place.ptxas) | own_cache(place, "current")))
        return commands

    def alone(seconds: float) -> list[Command]:
        variables = place.assembler()[0]  # whose kernels are compiled already
        variables |= own_cache(place, "current" if variables else "bundled")
        return [Command("attention", [*attention, *minutes(seconds - 30)], variables)]

    return [
        Part("ceilings", 20, 45, one("ceilings", lambda seconds: [*ceilings, *(["--quick"] if place.dry else [])])),
        Part("smoke", 60, 210, both),
        Part("attention", 45, math.inf, alone),
    ]


def second(place: Place) -> list[Part]:
    """Training steps at both batch sizes against timm, with a table of each one's kernels."""
    return [training(place, 256, VARIANTS, most=285), training(place, 64, VARIANTS)]


def third(place: Place) -> list[Part]:
    """For H/14: launch parameters of attention and LayerNorm, whether QuACK multiplies; then training with all that."""
    tuning = [*PYTHON, "fastvit_kernels.tuning", "--out", str(place.tuning)]
    if place.dry:
        tuning += ["--untuned", "H200"]
    else:
        tuning += ["--quick", "--ops", "attention", "layer_norm", "--shapes", "H/14"]
    search: Callable[[float], list[str]] = lambda seconds: [  # noqa: E731
        *tuning,
        *([] if place.dry else minutes(seconds - 15)),
    ]
    products = [*PYTHON, "fastvit_kernels.tuning", "--out", str(place.tuning), "--quick"]
    products += ["--ops", "gemm", "--cases", "QuACK", "--shapes", "H/14"]
    in_quack: Callable[[float], list[str]] = lambda seconds: [*products, *minutes(seconds - 15)]  # noqa: E731
    compared = Part("tuning-quack", 45, 90, one("tuning-quack", in_quack, place.assembler()[0]), GPU_LOST)
    return [
        Part("tuning", 60, 160, one("tuning", search, place.assembler()[0]), GPU_LOST),
        *([] if place.dry or importlib.util.find_spec("quack") is None else [compared]),
        training(place, 256, VARIANTS[:2], tuned=True),
    ]


def fourth(place: Place) -> list[Part]:
    """The kernel suite, and the tests that need a GPU."""
    suite = bench(place, "kernels", "kernels")
    suite += ["--ops", "layer_norm", "--shape", "tiny/14@56"] if place.dry else []
    tests = [
        *PYTHON,
        "pytest",
        "tests/kernels",
        "-m",
        "gpu",
        "-o",
        "addopts=-ra",
        "--continue-on-collection-errors",
        "-q",
    ]
    if place.dry:
        tests += ["--collect-only"]
    else:
        tests += [f"--junit-xml={place.folder / 'tests.xml'}", *processes(14)]
    variables = place.assembler()[0]
    return [
        Part(
            "kernels",
            60,
            250,
            one("kernels", lambda seconds: [*suite, *minutes(seconds - 30)], variables | place.tuned()),
        ),
        Part("tests", 30, math.inf, one("tests", lambda seconds: tests, variables)),
    ]


def fifth(place: Place) -> list[Part]:
    """FP8: is it right on the GPU; one layer against other libraries; steps of ViT-H/14 beside those in bf16."""
    tests = [*PYTHON, "pytest", "tests/kernels/test_fp8.py", "-o", "addopts=-ra", "-q"]
    tests += ["--collect-only"] if place.dry else ["-m", "gpu", f"--junit-xml={place.folder / 'tests-fp8.xml'}"]
    layer = bench(place, "kernels", "kernels-fp8", "--ops", "fp8_linear")
    layer += ["--shape", *(["tiny/14@56"] if place.dry else ["H/14"])]
    steps = [*PYTHON, "benchmarks.fp8_steps", "--out", str(place.folder / "fp8")]
    steps += ["--steps", "7", "--only", "bf16", "fp8 tensor"] if place.dry else ["--steps", "2000"]
    variables = place.assembler()[0]
    trained = variables | place.fallback()[0]
    return [
        Part("tests-fp8", 30, 100, one("tests-fp8", lambda seconds: tests, variables)),
        Part("kernels-fp8", 45, 80, one("kernels-fp8", lambda seconds: [*layer, *minutes(seconds - 30)], variables)),
        Part("fp8", 60, math.inf, one("fp8", lambda seconds: [*steps, *minutes(seconds - 30)], trained)),
    ]


def sixth(place: Place) -> list[Part]:
    """Is training right that needs a GPU; then its steps under each memory policy, and of few images in CUDA graphs.

    The tests come first: figures of what computes the wrong thing mean nothing. Then memory, which decides what fits.
    """
    variables = place.assembler()[0]

    def tests(name: str, at_once: int, *paths: str) -> Command:
        words = [*PYTHON, "pytest", *paths, "-o", "addopts=-ra", "--continue-on-collection-errors", "-q"]
        if place.dry:
            words += ["--collect-only"]
        else:
            words += ["-m", "gpu", f"--junit-xml={place.folder / name}.xml", *processes(at_once)]
        return Command(name, words, variables)

    engine = "tests/fastvit_engine"
    tested = [
        tests("tests-graph", 6, "tests/gpu"),
        tests("tests-trial", 2, f"{engine}/train/trial/test_step.py", f"{engine}/data/stream/test_gpu_decode.py"),
    ]
    program = [*PYTHON, "benchmarks.memory_policies", "--steps", "7" if place.dry else "60"]

    def measured(name: str, least: float, most: float, *options: str) -> Part:
        words = [*program, "--out", str(place.folder / name), *options]
        environment = variables | place.fallback()[0]
        return Part(name, least, most, one(name, lambda seconds: [*words, *minutes(seconds - 30)], environment))

    return [
        Part("tests-training", 30, 100, lambda seconds: tested),
        measured("policies", 60, 125, "--only", *(["recompute gelu"] if place.dry else POLICIES)),
        measured("policies-8", 45, 60, "--batch", "8", "--only", "CUDA graph"),
        measured("policies-8-B", 45, math.inf, "--model", "B/16", "--batch", "8", "--only", "CUDA graph", "compile"),
    ]


def training(place: Place, batch: int, variants: Sequence[str], *, most: float = math.inf, tuned: bool = False) -> Part:
    name = f"train-{batch}{'-tuned' if tuned else ''}"
    words = bench(
        place, "train", name, "--no-shards", "--no-control", "--variants", *(["fastvit"] if place.dry else variants)
    )
    words += [] if place.dry else ["--models", "H/14", "--batch", str(batch)]

    def commands(seconds: float) -> list[Command]:
        # what the parts before have found is asked for when this one begins
        variables = place.assembler()[0] | place.fallback()[0] | (place.tuned() if tuned else {})
        return [Command(name, [*words, *minutes(seconds - 30)], variables)]

    return Part(name, 60, most, commands)


def bench(place: Place, suite: str, name: str, *options: str) -> list[str]:
    """`fastvit bench`, into a folder of its own: two runs of a suite on one day have files of the same name."""
    return [*PYTHON, "fastvit_engine", "bench", suite, "--quick", "--out", str(place.folder / name), *options]


def one(
    name: str, words: Callable[[float], list[str]], environment: dict[str, str] | None = None
) -> Callable[[float], list[Command]]:
    return lambda seconds: [Command(name, words(seconds), environment or {})]


def own_cache(place: Place, name: str) -> dict[str, str]:
    """Triton keeps what it has compiled by source, whichever assembler did it."""
    return {"TRITON_CACHE_DIR": str(place.folder.parent / f"cache-{name}")}


def processes(most: int) -> list[str]:
    """Tests in so many processes: most of their time goes into compiling."""
    return ["-n", str(min(most, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []


def minutes(seconds: float) -> list[str]:
    """The limit after which a program starts nothing new."""
    return ["--minutes", f"{max(seconds, 1) / 60:.2f}"]


# ---- what the calls come to


def conclusions(place: Place) -> list[str]:
    """What all calls so far say, in a few lines."""
    of = (of_ceilings, of_checks, of_kernels, of_training, of_targets)
    return [line for those in of for line in those(place.folder)]


def of_ceilings(folder: Path) -> Iterator[str]:
    path = folder / "ceilings" / "ceilings.json"
    if not path.exists():
        return
    record = json.loads(path.read_text())
    yield f"copy: {record['copy_bytes_per_second'] / 1e12:.2f} TB/s"
    for case in record["batches"]:
        rows = case["products"]
        total = sum(row["ms"] for row in rows)
        mean = sum(row["flops_per_second"] * row["ms"] for row in rows) / total
        yield f"products of a block, batch {case['batch']}: {mean / 1e12:.0f} TFLOP/s, {total:.2f} ms"


def of_checks(folder: Path) -> Iterator[str]:
    checks = saved(folder / "smoke")
    for assembler, rows in checks.items():
        failed = [row for row in rows if row["exit_code"] != 0]
        yield f"smoke, {assembler}: {len(rows) - len(failed)} of {len(rows)} checks passed"
        for row in failed:
            yield f"  {row['name']}: {row['word'].strip('*')}: {row['said'][:200]}"
    for kernel, verdicts in kernel_verdicts(checks).items():
        for assembler, verdict in verdicts.items():
            if verdict != "ok":
                yield f"  {kernel}, {assembler}: {verdict.replace('**', '')}"


def of_kernels(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("*/*/kernels-*.json")):
        for case in json.loads(path.read_text())["cases"]:
            own = next((row for row in case.get("providers", ()) if row["provider"] == "fastvit"), None)
            if own is None or own["status"] != "ok":
                yield f"{case['case']}: {case.get('failed') or (own and own['status'] + ': ' + own['reason'])}"
                continue
            ratios = [
                f"{of_pass['times_as_fast'][1]:.2f} times as fast as {of_pass['as']} ({name})"
                for name, of_pass in own["passes"].items()
                if "times_as_fast" in of_pass
            ]
            yield f"{case['case']}: {', '.join(ratios) or 'no peer'}"


def of_training(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("train-*/*/train-*.json")):
        part = path.parts[-3]
        for case in json.loads(path.read_text())["cases"]:
            for row in case["variants"]:
                if row["status"] != "ok":
                    yield f"{part}: {row['variant']}: {row['status']}: {row['reason']}"
                    continue
                memory = f"{row['memory_bytes'] / 2**30:.0f} GiB, " if row["memory_bytes"] else ""
                yield (
                    f"{part}: {row['variant']}: {row['images_per_second']:,.0f} images/s, "
                    f"MFU {100 * row['mfu']:.0f} %, {memory}host {row['host_ms']:.0f} ms"
                )


def of_targets(folder: Path) -> Iterator[str]:
    """What `benchmarks.fp8_steps` and `benchmarks.memory_policies` say of their targets."""
    for path in sorted([*folder.glob("*/fp8.json"), *folder.glob("*/policies.json")]):
        for verdict in json.loads(path.read_text())["verdicts"]:
            yield f"{path.parent.name}: {verdict}"
