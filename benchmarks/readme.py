"""Writes the table of results in docs/verification.md, from the newest result files of each machine."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.report import percent
from fastvit_engine.files import atomic_write

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "verification.md"
BEGIN = "<!-- results: written by `fastvit bench readme` -->"
END = "<!-- end of results -->"
NONE_OF_A_GPU = "There is no GPU figure yet, so none is shown."

Record = Mapping[str, Any]


def update(*, check: bool = False, page: Path = PAGE, results: Path | None = None) -> int:
    """Writes the table into the page, or with `check` only says whether it is up to date: exit code 0 or 1."""
    text = page.read_text()
    new = with_results(text, render(results or ROOT / "benchmarks" / "results"))
    if new == text:
        return 0
    if check:
        print(f"{page.name} does not show the newest results: run fastvit bench readme", file=sys.stderr)
        return 1
    atomic_write(page, new)
    return 0


def with_results(text: str, table: str) -> str:
    """The page with the text between the two marks replaced."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page has no lines '{BEGIN}' and '{END}' to write results between")
    return f"{before}{BEGIN}\n{table}{END}{after}"


def render(results: Path) -> str:
    lines = ["| what | machine | figure | from |", "|---|---|---|---|"]
    machines = sorted(path for path in results.iterdir() if path.is_dir())
    gpus = 0
    for folder in machines:
        for suite, rows in ROWS.items():
            path = newest(folder, suite)
            if path is None:
                continue
            record = json.loads(path.read_text())
            environment = record["environment"]
            gpus += environment.get("gpu") is not None
            machine = environment.get("gpu") or f"{environment['cpu']}, {environment['cpu_count']} cores"
            file = f"../benchmarks/results/{folder.name}/{path.stem}"  # relative to docs/
            links = f"[table]({file}.md), [raw]({file}.json)"
            lines += [f"| {what} | {machine} | {figure} | {links} |" for what, figure in rows(record)]
    return "\n".join(["", *lines, "", *([] if gpus else [NONE_OF_A_GPU, ""])])


def newest(folder: Path, suite: str) -> Path | None:
    """The last full run of a suite, by the date in its name; quick runs are for trying things out."""
    paths = sorted(folder.glob(f"{suite}-????-??-??.json"), reverse=True)
    return next((path for path in paths if not json.loads(path.read_text()).get("quick")), None)


def kernel_rows(record: Record) -> Iterator[tuple[str, str]]:
    if record["environment"]["gpu"] is None:
        return  # there its plain PyTorch path ran, which is nothing to show
    for case in record["cases"]:
        own = next((row for row in case.get("providers", ()) if row["provider"] == "fastvit"), None)
        if own is None:
            continue
        size = f"{case['model']}, {case['batch']} images" if case["model"] else f"{case['batch']} images"
        what = f"{case['title']}, {size}, {case['dtype']}"
        if own["status"] != "ok":
            yield what, f"**{own['status']}**: {own['reason']}"
            continue
        ratios = [
            f"{name} {of_pass['times_as_fast'][1]:.2f} times as fast as {of_pass['as']}"
            for name, of_pass in own["passes"].items()
            if "times_as_fast" in of_pass and name != "both"
        ]
        share = percent(own["passes"]["both"]["share_of_ceiling"])
        yield what, "; ".join([*ratios, f"{share} of this machine's own ceiling"])


def train_rows(record: Record) -> Iterator[tuple[str, str]]:
    for case in record["cases"]:
        done = [row for row in case["variants"] if row["status"] == "ok" and row["data"] == "memory"]
        ours = [row for row in done if row["ours"]]
        if not ours:
            continue
        best = max(ours, key=lambda row: row["images_per_second"])
        figure = f"{best['images_per_second']:,.0f} images/s, MFU {percent(best['mfu'])} ({best['variant']})"
        peer = next((row for row in done if row["variant"] == case["best_peer"]), None)
        if peer:
            figure += f"; {peer['ms'][1] / best['ms'][1]:.2f} times as fast as {peer['variant']}"
        yield f"training step of {case['model']}, {case['batch']} images, {case['precision']}", figure


def data_rows(record: Record) -> Iterator[tuple[str, str]]:
    workers = str(record["workers"])
    for data in record["datasets"]:
        rows = {row["variant"]: row for row in record["results"] if row["dataset"] == data["name"]}
        own, recipe, fast = (rows.get(name) for name in ("fastvit", "wds + PIL", "wds + simplejpeg"))
        if not own or own["skipped"] or not recipe or recipe["skipped"]:
            continue
        rates = [row["images_per_cpu_second"][workers] for row in (own, recipe)]
        against = f"({rates[0]:,.0f} against {rates[1]:,.0f})"
        figure = f"{own['over_recipe']:.1f} times the usual WebDataset + Pillow recipe {against}"
        smoothed = ["The recipe"]  # those that antialias
        for name, title in (("timm", "timm's loader"), ("dali", "DALI on the CPU"), ("spdl", "SPDL's pipeline")):
            if name in rows and not rows[name]["skipped"]:
                rate = rows[name]["images_per_cpu_second"][workers]
                figure += f", {rates[0] / rate:.1f} times {title} ({rate:,.0f})"
                smoothed.append(title.split()[0].removesuffix("'s"))
        if fast and not fast["skipped"]:
            ratio = rates[0] / fast["images_per_cpu_second"][workers]
            figure += f", {ratio:.1f} times WebDataset with the same decoder"
        listed = " and ".join(filter(None, (", ".join(smoothed[:-1]), smoothed[-1])))
        verb = "antialias their" if smoothed[1:] else "antialiases its"
        figure += f". {listed} {verb} crops, this loader does not"
        kind = "images of noise" if record.get("noise") else "photos"
        yield f"loading {data['samples']} {kind}, {data['name']}, {workers} workers, images per CPU-second", figure


def overhead_rows(record: Record) -> Iterator[tuple[str, str]]:
    for case in record["cases"]:
        times = case["milliseconds"]
        own = differences(times["loop-0"], times["deepspeed-0"])
        engines = {f"ZeRO-{stage}": f"deepspeed-{stage}" for stage in range(4)} | {"DistributedDataParallel": "ddp"}
        shares = {title: median(differences(times[name], times["bare"])) for title, name in engines.items()}
        low, _, high = quantiles(own, n=4, method="inclusive")
        yield (
            f"the loop's own cost over a plain loop around the same DeepSpeed engine; {case['name']}, "
            f"{median(times['loop-0']):.1f} ms per step",
            f"{median(own):+.1f} ms per step (quartiles {low:+.1f} to {high:+.1f}); over plain PyTorch's: "
            + ", ".join(f"{title} {share:+.1f}" for title, share in shares.items()),
        )


def differences(these: Sequence[float], those: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(these, those, strict=True)]


ROWS = {"kernels": kernel_rows, "train": train_rows, "data": data_rows, "overhead": overhead_rows}
