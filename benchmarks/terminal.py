"""Results for a terminal: a table for each operation, what can be measured, and at the end what it comes to."""

import io
import shlex
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from benchmarks import custom
from benchmarks.registry import DTYPES, Op
from benchmarks.report import is_ours, megabytes, number, percent, size_of, times, title_of, without_gpu
from benchmarks.shapes import Shape

Row = Mapping[str, Any]
BAR = "compile"  # its ratio has a column of its own in the summary
SHORT = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}
WIDTH = 80  # columns, where the output is no terminal
NAMES_WIDTH = 30  # columns of the names of providers in the list
NO_BREAK = "\N{NO-BREAK SPACE}"


def kernels_text(record: Row) -> str:
    """Every provider at every size by operation, and a summary, as wide as this terminal."""
    measured = [case for case in record["cases"] if "providers" in case]
    parts: list[Any] = []
    for _, cases in groupby(sorted(measured, key=lambda case: case["op"]), key=lambda case: case["op"]):
        parts += [operation(list(cases)), ""]
    failed = [f"{case['case']}: {case['failed']}" for case in record["cases"] if "providers" not in case]
    failed += [f"{name}: no time was left for it" for name in record["unmeasured"]]
    if failed:
        parts += [Text("Not measured", style="bold"), *(Text(f"  {line}") for line in failed), ""]
    if record.get("error"):
        parts += [Text(f"The run ended early: {record['error']}", style="bold red"), ""]
    for sentence in without_gpu(record):
        parts += [Text(sentence.replace("`", "")), ""]
    return rendered(Group(*parts, summary(measured)))


def operation(cases: Sequence[Row]) -> Any:
    """A row per provider under each size, the fastest first."""
    table = plain_table(f"{cases[0]['op']}: {cases[0]['title']}", "milliseconds of")
    names = list(cases[0]["work"])
    on_gpu = any(row.get("peak_bytes") is not None for case in cases for row in case["providers"])
    heads = [*names, "fastvit ×", "of ceiling", "host_ms", *(["memory"] if on_gpu else [])]
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    whole = names[-1]
    notes: dict[str, list[str]] = {}
    for case in cases:
        table.add_row(Text(f"{size_of(case)} images, {SHORT.get(case['dtype'], case['dtype'])}", style="italic"))
        ran = [row for row in case["providers"] if row["status"] == "ok"]
        for row in sorted(ran, key=lambda row: row["passes"][whole]["ms"][1]):
            passes = row["passes"]
            cells = [number(passes[name]["ms"][1]) for name in names]
            ratio = passes[whole].get("fastvit_times_as_fast")
            cells += [f"{ratio[1]:.2f}" if ratio else "", percent(passes[whole]["share_of_ceiling"])]
            cells += [number(row["host_ms"]), *([megabytes(row["peak_bytes"])] if on_gpu else [])]
            table.add_row(Text(f"  {title_of(row)}", style="bold" if is_ours(row) else ""), *cells)
        for row in case["providers"]:
            if row["status"] in ("wrong", "failed"):
                table.add_row(Text(f"  {title_of(row)}", style="red"), Text(row["status"], style="bold red"))
                notes.setdefault(f"{row['status']}: {row['reason']}", []).append(row["provider"])
            elif row["status"] == "skipped":
                notes.setdefault(row["reason"], []).append(row["provider"])
    lines = [Text(f"{', '.join(dict.fromkeys(who))}: {why}", style="dim") for why, who in notes.items()]
    return Group(table, *lines)


def summary(cases: Sequence[Row]) -> Any:
    """One row per case: ours, the best peer by name, and how many times as fast as that and as torch.compile it is."""
    table = plain_table("Summary: with 2.00 ×, fastvit is twice as fast as the peer")
    table.add_column("operation", min_width=max((len(case["op"]) for case in cases), default=0), overflow="fold")
    table.add_column("size", min_width=max((len(size_of(case)) for case in cases), default=0), overflow="fold")
    table.add_column("ms", justify="right", no_wrap=True)
    table.add_column("best peer", overflow="fold")
    has_bar = any(row["provider"] == BAR and row["status"] == "ok" for case in cases for row in case["providers"])
    for head in ("fwd ×", "bwd ×", "both ×", *([f"{BAR} ×"] if has_bar else [])):
        table.add_column(head, justify="right", min_width=max(map(len, head.split())))
    for case in cases:
        own = next((row for row in case["providers"] if row["provider"] == "fastvit"), None)
        if own is None:
            continue
        name = f"{case['op']} ({own['path']})" if own.get("path") else case["op"]
        if own["status"] != "ok":
            table.add_row(name, size_of(case), Text(own["status"], style="bold red"))
            continue
        passes, best = own["passes"], case["best_peer"]
        compiled = next((row for row in case["providers"] if row["provider"] == BAR and row["status"] == "ok"), None)
        over = compiled["passes"][list(case["work"])[-1]].get("fastvit_times_as_fast") if compiled else None
        ratios = [times(passes[name]) if name in passes else "" for name in ("forward", "backward", "both")]
        whole = passes[list(case["work"])[-1]]
        table.add_row(
            name,
            size_of(case),
            number(whole["ms"][1]),
            best.get("both", best.get("forward", "none")),
            *ratios,
            *([f"{over[1]:.2f}" if over else ""] if has_bar else []),
        )
    return table


def listing(ops: Sequence[Op], shapes: Sequence[Shape], chosen: Sequence[str] = ()) -> str:
    """What `fastvit bench kernels` can measure here; of chosen operations also the sizes of their tensors."""
    operations = plain_table("Operations (--ops)", "name")
    operations.add_column("providers (--providers)", no_wrap=True)
    operations.add_column("what a function of yours takes (--provider)", overflow="fold")
    for op in ops:
        if not chosen or op.name in chosen:
            tensors = custom.signature(op, sizes=bool(chosen))
            operations.add_row(op.name, shell_words([provider.name for provider in op.providers]), tensors)
    sizes = plain_table("Sizes (--shape)", "name", "tokens")
    for head in ("width", "heads", "head dim", "MLP", "images"):
        sizes.add_column(head, justify="right")
    sizes.add_column("only for", overflow="fold")
    for shape in shapes:
        numbers = (shape.tokens, shape.width, shape.heads, shape.head_dim, shape.mlp_dim)
        batches = ", ".join(map(str, shape.batches))
        sizes.add_row(shape.name, *map(str, numbers), batches, ", ".join(shape.only))
    formula = "What an operation must compute is its function `plain` in benchmarks/ops/."
    return rendered(Group(operations, Text(formula, style="dim"), "", sizes))


def shell_words(names: Sequence[str]) -> str:
    """Names as a shell takes them, in lines that never break inside a name."""
    joined = " ".join(shlex.quote(name).replace(" ", NO_BREAK) for name in names)
    return textwrap.fill(joined, NAMES_WIDTH, break_long_words=False, break_on_hyphens=False).replace(NO_BREAK, " ")


def plain_table(title: str, *texts: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))
    for text in texts:
        table.add_column(text, overflow="fold")
    return table


def rendered(content: Any) -> str:
    """With colours only on a terminal."""
    console = Console(width=shutil.get_terminal_size((WIDTH, 24)).columns, highlight=False)
    if sys.stdout.isatty():
        with console.capture() as capture:
            console.print(content)
        return capture.get()
    text = io.StringIO()
    Console(file=text, width=console.width, highlight=False, color_system=None).print(content)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"
