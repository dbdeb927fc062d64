"""Results as Markdown: what a reader sees first, then every figure."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import groupby, zip_longest
from typing import Any

Row = Mapping[str, Any]
INTERPRETED = (
    "This machine has no GPU, so Triton's interpreter ran the kernels, in Python: their results were checked; "
    "their times say nothing about the kernels."
)
NO_KERNELS = (
    "This machine has no GPU, so `fastvit` ran its plain PyTorch path, not its kernels: these figures show that the "
    "suite works, and what the package costs where it has nothing faster to offer. They say nothing about the kernels."
)


def kernels_markdown(record: Row) -> str:
    lines = ["# Operations", "", *header(record)]
    lines += ["", ceilings_sentence(record["ceilings"])]
    lines += [
        "",
        "Milliseconds are medians over the rounds, with quartiles in brackets; `both` is a forward and a backward pass "
        "together. `fastvit ×` is how many times as fast as that provider `fastvit` is, over the whole; `host` is what "
        "Python takes to start the work. `of the ceiling` is the least time that this machine's copy and matrix "
        "product allow for the work (whichever is longer), over the time taken; above 100 % the data stayed in a "
        "cache, or the machine was slower while the ceiling was measured. A provider whose results are wrong has no "
        "time. "
        "What the compiler makes of the kernels, without a GPU: [tables](../codegen).",
    ]
    measured = [case for case in record["cases"] if "providers" in case]
    lines += [
        "",
        "## Against the best peer",
        "",
        "The size is a model and a number of images; milliseconds are of both passes. The columns with × say how many "
        "times as fast as the best peer in that pass `fastvit` is, compared round by round: above 1 it is faster.",
        "",
        *summary_table(measured),
    ]
    for case in measured:
        lines += ["", f"## {case_title(case)}", "", *case_table(case), *case_notes(case)]
    failed = [case for case in record["cases"] if "providers" not in case]
    if failed or record["unmeasured"]:
        lines += ["", "## Not measured", ""]
        lines += [f"* {case['case']}: {case['failed']}" for case in failed]
        lines += [f"* {name}: no time was left for it" for name in record["unmeasured"]]
    if record.get("error"):
        lines += ["", f"The run ended early: {record['error']}"]
    return "\n".join(lines) + "\n"


def train_markdown(record: Row) -> str:
    lines = [
        "# Training steps",
        "",
        *header(record),
        "",
        "One step is forward, backward, clipping and AdamW, on one device; milliseconds are medians over the steps, "
        "quartiles in brackets. `images/s` and MFU follow from the median; MFU counts the model's own matrix products "
        "against the peak named under each table. `host` is at most what Python takes to start a step: part of it may "
        "be waiting for room in the driver's queue. `loss off by` is how far the first losses are from those of plain "
        "timm in float32; × says how many times as fast as the best peer one of ours is. "
        "Each variant runs in a process of its own, one after the other; `control`, where there is one, is "
        "the first again, at the end.",
    ]
    for case in record["cases"]:
        lines += ["", f"## {case['model']}, {case['batch']} images, {case['precision']}", "", *train_table(case)]
    return "\n".join(lines) + "\n"


def header(record: Row) -> list[str]:
    e = record["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in e["versions"].items() if version)
    device = f"{e['gpu']} (driver {e['driver']}, CUDA {e['cuda']}, cuDNN {e['cudnn']})" if e["gpu"] else "no GPU"
    lines = [
        f"`{e['command']}`, {e['started']}, commit {e['commit'] or 'unknown'}: {device}; {e['cpu']}, {e['cpu_count']} "
        f"cores, {e['threads']} threads, load average {e['load_average']:.2f} at the start. {versions}."
    ]
    if record["quick"]:
        lines += ["", "A quick run: few rounds, and nothing that compiles for long. Not for comparing."]
    for sentence in without_gpu(record):
        lines += ["", sentence]
    return lines


def without_gpu(record: Row) -> list[str]:
    """What ran in place of compiled kernels, if there is no GPU."""
    if record["environment"]["gpu"]:
        return []
    if record.get("suite") == "train":
        return [NO_KERNELS]
    rows = [row for case in record["cases"] for row in case.get("providers", ()) if is_ours(row)]
    paths = {row.get("path") for row in rows}
    return [sentence for path, sentence in (("interpreted", INTERPRETED), ("reference", NO_KERNELS)) if path in paths]


def ceilings_sentence(ceilings: Sequence[Row]) -> str:
    def one(ceiling: Row) -> str:
        products = ", ".join(f"{name} {rate(value, 'flops')}" for name, value in ceiling["matmul_flops"].items())
        side = ceiling["matmul_side"]
        return f"copy {rate(ceiling['copy_bytes_per_second'], 'bytes')}, {side} x {side} matrix product {products}"

    return "Ceilings, measured in the same run: " + "; at its end ".join(one(c) for c in ceilings) + "."


def case_title(case: Row) -> str:
    at = f"{case['model']}, " if case["model"] else ""
    return f"{case['op']}: {at}{case['batch']} images, {case['dtype']}"


def size_of(case: Row) -> str:
    return f"{case['model']}, {case['batch']}" if case["model"] else str(case["batch"])


def is_ours(row: Row) -> bool:
    return bool(row["provider"] == "fastvit")


def title_of(row: Row) -> str:
    """A provider's name, with what else must be known of it."""
    notes = [row["path"]] if row.get("path") else []
    notes += ["coarser numbers"] if "precision" in row else []
    return f"{row['provider']} ({', '.join(notes)})" if notes else str(row["provider"])


def summary_table(cases: Sequence[Row]) -> list[str]:
    lines = [
        "| operation | size | `fastvit`, ms | best peer | its ms | forward × | backward × | both × | of the ceiling |",
        "|---|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for case in cases:
        own = next((row for row in case["providers"] if row["provider"] == "fastvit"), None)
        if own is None:
            continue
        size = size_of(case)
        name = f"{case['op']} ({own['path']})" if own.get("path") else case["op"]
        if own["status"] != "ok":
            lines.append(f"| {name} | {size} | {own['status']} | | | | | | |")
            continue
        passes, best = own["passes"], case["best_peer"].get("both")
        peer = next((row for row in case["providers"] if row["provider"] == best), None)
        ratios = [times(passes[name]) if name in passes else "" for name in ("forward", "backward", "both")]
        lines.append(
            f"| {name} | {size} | {number(passes['both']['ms'][1])} | {best or 'none'} | "
            f"{number(peer['passes']['both']['ms'][1]) if peer else ''} | {' | '.join(ratios)} | "
            f"{percent(passes['both']['share_of_ceiling'])} |"
        )
    return lines


def times(of_pass: Row) -> str:
    return f"{of_pass['times_as_fast'][1]:.2f}" if "times_as_fast" in of_pass else ""


def case_table(case: Row) -> list[str]:
    names = list(case["work"])
    whole = "both" if "both" in names else names[0]
    ran = [row for row in case["providers"] if row["status"] == "ok"]
    on_gpu = any(row["peak_bytes"] is not None for row in ran)  # elsewhere memory is unknown
    memory = ["memory"] if on_gpu else []
    heads = [*(f"{name}, ms" for name in names), "fastvit ×", "rate", "of the ceiling", *memory, "host, ms"]
    lines = [
        "| provider | " + " | ".join(heads) + " | what ran longest |",
        "|---|" + "---:|" * len(heads) + "---|",
    ]
    for row in sorted(ran, key=lambda row: row["passes"][whole]["ms"][1]):
        title = f"**{title_of(row)}**" if is_ours(row) else title_of(row)
        version = f" {row['version']}" if row["version"] else ""
        cells = [milliseconds(row["passes"][name]["ms"]) for name in names]
        of_whole = row["passes"][whole]
        ratio = of_whole.get("fastvit_times_as_fast")
        cells += [f"{ratio[1]:.2f}" if ratio else ""]
        cells += [rate(of_whole["per_second"], of_whole["scarce"]), percent(of_whole["share_of_ceiling"])]
        cells += [megabytes(row["peak_bytes"])] if on_gpu else []
        cells += [number(row["host_ms"]), f"`{row['backend'][0][:60]}`"]
        lines.append(f"| {title}{version} | " + " | ".join(cells) + " |")
    for row in case["providers"]:
        if row["status"] in ("wrong", "failed"):
            lines.append(f"| {row['provider']} | **{row['status']}** |" + " |" * len(heads))
    return lines


def case_notes(case: Row) -> list[str]:
    notes = []
    own = next((row for row in case["providers"] if row["provider"] == "fastvit"), None)
    if own and own["status"] == "ok":
        parts = [
            f"{name} {of_pass['times_as_fast'][1]:.2f} ({of_pass['times_as_fast'][0]:.2f} to "
            f"{of_pass['times_as_fast'][2]:.2f}) times as fast as {of_pass['as']}"
            for name, of_pass in own["passes"].items()
            if "times_as_fast" in of_pass
        ]
        notes += ["", "`fastvit`: " + "; ".join(parts) + "."] if parts else []
    reasons: dict[str, list[str]] = defaultdict(list)
    for row in case["providers"]:
        if row["status"] != "ok":
            reasons[f"{row['status']}, {row['reason']}"].append(row["provider"])
    if reasons:
        notes += ["", "Without a time: " + "; ".join(f"{', '.join(n)} ({r})" for r, n in reasons.items()) + "."]
    before, after = case["sensors"]
    if before and after:
        notes += ["", f"Clocks: before {sensor(before)}; after {sensor(after)}."]
    return notes


def train_table(case: Row) -> list[str]:
    searched = any("largest_batch" in row for row in case["variants"])
    heads = [
        "ms per step",
        "images/s",
        "MFU",
        "memory",
        "host, ms",
        *(["largest batch"] if searched else []),
        "loss off by",
        "×",
    ]
    lines = ["| variant | data | " + " | ".join(heads) + " |", "|---|---|" + "---:|" * len(heads)]
    rows = {(row["variant"], row["data"]): row for row in case["variants"]}
    best = rows.get((case["best_peer"], "memory"))
    left_out = defaultdict(list)
    for row in case["variants"]:
        if row["status"] == "skipped":
            title = {"memory": row["variant"], "control": "control"}.get(row["data"], f"{row['variant']} from shards")
            left_out[row["reason"]].append(title)
            continue
        name = f"**{row['variant']}**" if row["ours"] else row["variant"]
        if row["status"] != "ok":
            lines.append(f"| {name} | {row['data']} | {row['status']}: {row['reason']} |" + " |" * (len(heads) - 1))
            continue
        cells = [milliseconds(row["ms"]), f"{row['images_per_second']:,.0f}", percent(row["mfu"])]
        cells += [megabytes(row["memory_bytes"]), number(row["host_ms"])]
        cells += [str(row.get("largest_batch", ""))] if searched else []
        cells += [f"{100 * row['loss_distance']:.2g} %"]
        compared = best if row["ours"] and row["data"] == "memory" else None
        cells += [f"{compared['ms'][1] / row['ms'][1]:.2f}" if compared else ""]
        lines.append(f"| {name} | {row['data']} | " + " | ".join(cells) + " |")
    if left_out:
        named = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in left_out.items())
        lines += ["", f"Left out: {named}."]
    done = [row for row in case["variants"] if row["status"] == "ok"]
    if done:
        peak = done[0]
        lines += ["", f"Peak for MFU: {rate(peak['peak_flops'], 'flops')} ({peak['peak_source']})."]
        if case["best_peer"]:
            lines[-1] += f" Best peer: {case['best_peer']}."
        lines += ["", *breakdown_table(done)]
        for row in done:
            if row["data"] == "memory":
                lines += ["", *slowest_table(row)]
    return lines


def slowest_table(row: Row) -> list[str]:
    lines = [
        f"The slowest kernels of {row['variant']} (on a CPU, operators):",
        "",
        "| ms per step | share | calls | for | kernel |",
        "|---:|---:|---:|---|---|",
    ]
    total = sum(row["breakdown_ms"].values())
    for kernel in row["slowest"]:
        name = kernel["name"][:100].replace("|", "\\|")
        share = percent(kernel["ms"] / total) if total else ""
        lines.append(f"| {number(kernel['ms'])} | {share} | {kernel['calls']:g} | {kernel['kind']} | `{name}` |")
    return lines


def breakdown_table(rows: Sequence[Row]) -> list[str]:
    kinds = sorted(
        {kind for row in rows for kind in row["breakdown_ms"]},
        key=lambda kind: -max(row["breakdown_ms"].get(kind, 0) for row in rows),
    )
    lines = [
        "Where the time of a step goes, by the names of kernels (on a CPU, of operators), in ms:",
        "",
        "| variant | data | " + " | ".join(kinds) + " |",
        "|---|---|" + "---:|" * len(kinds),
    ]
    for row in rows:
        cells = [number(row["breakdown_ms"].get(kind, 0)) for kind in kinds]
        lines.append(f"| {row['variant']} | {row['data']} | " + " | ".join(cells) + " |")
    return lines


def aligned(text: str) -> str:
    """The same Markdown with the columns of its tables under each other, for a terminal."""
    lines: list[str] = []
    for is_table, group in groupby(text.split("\n"), lambda line: line.startswith("|")):
        part = list(group)
        lines += align(part) if is_table else part
    return "\n".join(lines)


def align(table: Sequence[str]) -> list[str]:
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in table]
    widths = [max(map(len, column)) for column in zip_longest(*(rows[:1] + rows[2:]), fillvalue="")]
    right = [rule.endswith(":") for rule in rows[1]]
    rows[1] = ["-" * (width - end) + ":" * end for width, end in zip(widths, right, strict=True)]
    return [
        "| "
        + " | ".join(c.rjust(w) if end else c.ljust(w) for c, w, end in zip(row, widths, right, strict=False))
        + " |"
        for row in rows
    ]


# ---- figures


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def milliseconds(spread: Sequence[float]) -> str:
    low, middle, high = spread
    return f"{number(middle)} ({number(low)} to {number(high)})"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.095 else f"{100 * share:.1f} %"


def megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:,.0f} MiB"


def rate(value: float, kind: str) -> str:
    unit, prefix = ("FLOP/s", "T" if value >= 1e12 else "G") if kind == "flops" else ("B/s", "G")
    return f"{number(value / (1e12 if prefix == 'T' else 1e9))} {prefix}{unit}"


def sensor(values: Row) -> str:
    units = {"sm_mhz": "MHz", "memory_mhz": "MHz memory", "celsius": "°C", "watts": "W"}
    known = [f"{values[name]:g} {unit}" for name, unit in units.items() if isinstance(values.get(name), float)]
    return ", ".join(known)
