"""Measures this engine against its peers on a GPU, in one call of under nine minutes.

    python -m benchmarks.gpu_run --out results

Leaves three files in the folder: `summary.json` (versions, what ran, how it ended), `report.md` (the tables) and
`results.tar.gz` (everything: raw figures, pictures, logs), which unpacks in `benchmarks/results/`. A suite that fails
or outlasts its time leaves what it has, and does not stop the others. Needs torch, triton and numpy; with pydantic,
PyYAML and DeepSpeed training steps are measured too, and every peer that is installed takes part.
"""

import argparse
import importlib.util
import json
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.first_gpu_run import PYTHON, Outcome, Step, run, versions

NEEDED = {"torch": "everything", "triton": "the kernels", "numpy": "everything"}
# What is measured less without a package.
WANTED = {
    "pydantic": "no training steps",
    "yaml": "no training steps (PyYAML)",
    "deepspeed": "no ZeRO, no FusedAdam of DeepSpeed",
    "timm": "no timm among the peers",
    "transformers": "no transformers among the peers",
    "matplotlib": "no pictures",
    "flash_attn": "no flash-attn 2",
    "flash_attn_interface": "no flash-attn 3",
    "quack": "no QuACK",
    "liger_kernel": "no Liger-Kernel",
    "transformer_engine": "no TransformerEngine",
    "xformers": "no xformers",
    "torchao": "no float8",
    "apex": "no apex (NVIDIA's, built from source)",
}
KERNEL_MINUTES, TRAIN_MINUTES = 4.0, 2.0  # no case is begun after them


def steps(folder: Path, dry: bool) -> list[Step]:
    """A dry run is the same on a CPU, with next to nothing to measure."""
    bench, out = [*PYTHON, "fastvit_engine", "bench"], ["--quick", "--out", str(folder)]
    kernels = ["--ops", "layer_norm", "--models", "tiny/14@56"] if dry else ["--minutes", str(KERNEL_MINUTES)]
    train = ["--variants", "fastvit"] if dry else ["--minutes", str(TRAIN_MINUTES)]
    return [
        Step("nvidia-smi", ["nvidia-smi"], 10),
        Step("kernels", [*bench, "kernels", *out, *kernels], 300),
        Step("train", [*bench, "train", *out, *train], 180),
    ]


def dependencies() -> tuple[list[str], list[str]]:
    """(what is missing without which nothing runs, what is missing and what that costs)."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    return missing, [f"{name}: {cost}" for name, cost in WANTED.items() if importlib.util.find_spec(name) is None]


def pack(folder: Path, out: Path) -> None:
    """report.md and results.tar.gz of whatever there is by now."""
    reports = sorted(folder.glob("*/*.md"))
    (out / "report.md").write_text("\n\n".join(path.read_text() for path in reports))
    with tarfile.open(out / "results.tar.gz", "w:gz") as archive:
        archive.add(folder, arcname=".")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--dry-run", action="store_true", help="the same for a minute on a CPU")
    parsed = parser.parse_args(arguments)
    out = parsed.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    missing, poorer = dependencies()
    if missing:
        print(f"not installed, and nothing runs without: {', '.join(missing)}")
        return 2
    print("\n".join(["not installed, and therefore:", *(f"  {line}" for line in poorer)]), flush=True)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for step in steps(folder, parsed.dry_run):
            print(f"{step.name}: {' '.join(step.command)}", flush=True)
            outcomes.append(run(step, folder))
            print(f"{step.name}: exit code {outcomes[-1].exit_code} after {outcomes[-1].seconds} s", flush=True)
            found = {"versions": versions(), "not_installed": poorer, "steps": [asdict(o) for o in outcomes]}
            (out / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
            pack(folder, out)
        for outcome in outcomes:
            lines = (folder / f"{outcome.step}.log").read_text().splitlines()
            print("\n".join([f"--- {outcome.step}", *lines[-40:]]))
    return int(any(outcome.exit_code != 0 for outcome in outcomes if outcome.step != "nvidia-smi"))


if __name__ == "__main__":
    sys.exit(main())
