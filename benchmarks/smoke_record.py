"""What became of the checks of `benchmarks.smoke`, by assembler; read without PyTorch."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastvit_engine.files import atomic_write

SKIPPED = "skipped: "
IN_QUACK = " QuACK"  # how the names of checks end whose products QuACK compiles itself
BUNDLED = "bundled ptxas"
KERNELS = "kernels: "  # how the line begins that names what a check launched
TRAININGS = {f"train ZeRO-{stage}": stage for stage in (1, 3)}


@dataclass(frozen=True)
class Outcome:
    """How one check ended."""

    name: str
    exit_code: int | None  # None: it ran out of time
    seconds: float
    log: str

    @property
    def said(self) -> str:
        """The last line."""
        return next((line for line in reversed(self.log.splitlines()) if line.strip()), "nothing")

    @property
    def word(self) -> str:
        if self.exit_code is None:
            return "**not done**"
        if self.exit_code == 0 and self.said.startswith(SKIPPED):
            return "skipped"
        return "ok" if self.exit_code == 0 else f"**exit code {self.exit_code}**"


def save(folder: Path, assembler: str, outcomes: Sequence[Outcome]) -> None:
    """`smoke-ASSEMBLER.json`, and `smoke.md` of this and every other assembler in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [asdict(outcome) | {"word": outcome.word, "said": outcome.said} for outcome in outcomes]
    label = re.sub(r"[^a-z0-9.]+", "-", assembler.lower())
    atomic_write(folder / f"smoke-{label}.json", json.dumps({"assembler": assembler, "checks": rows}, indent=1) + "\n")
    atomic_write(folder / "smoke.md", markdown(saved(folder)))


Saved = dict[str, list[dict[str, Any]]]


def saved(folder: Path) -> Saved:
    """The checks by assembler."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("smoke-*.json"))]
    return {record["assembler"]: record["checks"] for record in records}


def kernels_of(check: dict[str, Any]) -> list[str]:
    line = next((line for line in check["log"].splitlines() if line.startswith(KERNELS)), KERNELS)
    return [name for name in line.removeprefix(KERNELS).split(", ") if name]


def kernel_verdicts(by_assembler: Saved) -> dict[str, dict[str, str]]:
    """By kernel and assembler: "ok", or which checks that launched it failed. A check that died names no kernels."""
    found: dict[str, dict[str, str]] = {}
    for assembler, rows in by_assembler.items():
        failed: dict[str, list[str]] = {}
        for check in rows:
            for kernel in kernels_of(check):
                failed.setdefault(kernel, []).extend([check["name"]] if check["exit_code"] != 0 else [])
        for kernel, names in failed.items():
            found.setdefault(kernel, {})[assembler] = f"**in question**: {', '.join(names)}" if names else "ok"
    return found


def broken(by_assembler: Saved, assembler: str) -> set[str]:
    """The checks of operations that ran with this assembler and failed."""
    rows = by_assembler.get(assembler, [])
    failed = {row["name"] for row in rows if row["exit_code"] not in (0, None)}
    return {name for name in failed if name not in TRAININGS and not name.endswith(IN_QUACK)}


def passed(by_assembler: Saved, assembler: str) -> set[str]:
    return {row["name"] for row in by_assembler.get(assembler, []) if row["exit_code"] == 0}


def markdown(by_assembler: Saved) -> str:
    assemblers = list(by_assembler)
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for assembler, made in by_assembler.items():
        for check in made:
            rows.setdefault(check["name"], {})[assembler] = check
    lines = ["# Does it run?", "", f"| what | {' | '.join(assemblers)} | s | last line |"]
    lines += ["|---|" + "---|" * len(assemblers) + "---:|---|"]
    for name, own in rows.items():
        words = " | ".join(own[assembler]["word"] if assembler in own else "" for assembler in assemblers)
        shown = next((check for check in own.values() if check["exit_code"] != 0), next(iter(own.values())))
        lines.append(f"| {name} | {words} | {shown['seconds']:.0f} | {shown['said'].replace('|', chr(92) + '|')} |")
    verdicts = kernel_verdicts(by_assembler)
    if verdicts:
        lines += ["", "## By kernel", "", f"| kernel | {' | '.join(assemblers)} |", "|---|" + "---|" * len(assemblers)]
        lines += [f"| {k} | {' | '.join(of.get(a, '') for a in assemblers)} |" for k, of in sorted(verdicts.items())]
    for name, own in rows.items():
        for assembler, check in own.items():
            if check["exit_code"] != 0:
                lines += ["", f"## {name}, {assembler}", "", "```", check["log"].strip()[-20_000:], "```"]
    return "\n".join(lines) + "\n"
