"""Draws results: bars per operation, a roofline, and the breakdown of a training step's time."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.report import number, title_of

OURS, PEER, INK, SOFT, PAGE, HAIR = "#2a6fdb", "#b9b4aa", "#1b1d21", "#62666e", "#fbfaf8", "#e5e2dc"
KINDS = {  # of the time of a step
    "matrix products": "#2a6fdb",
    "attention": "#0f8a68",
    "normalisation": "#c8590b",
    "loss": "#8a4fbf",
    "optimizer": "#c62f3b",
    "communication": "#d9a514",
    "copies": "#7d828b",
    "elementwise and rest": "#c9c4ba",
}
FORMATS = ("svg", "png")


def draw_kernels(record: Mapping[str, Any], folder: Path, name: str) -> list[Path]:
    """`NAME-bars-MODEL-BATCH` for every size, and `NAME-roofline`; the files written."""
    cases = [case for case in record["cases"] if any(row["status"] == "ok" for row in case.get("providers", ()))]
    paths = []
    size_of = lambda case: (case["model"] or "any model", case["batch"])  # noqa: E731
    for (model, batch), own in groupby(sorted(cases, key=size_of), key=size_of):
        figure = bars(list(own), f"{model}, {batch} images", machine(record))
        label = "".join(letter if letter.isalnum() else "-" for letter in f"{model}-{batch}".lower())
        paths += save(figure, folder, f"{name}-bars-{label}")
    if cases:
        paths += save(roofline(cases, record["ceilings"][0], machine(record)), folder, f"{name}-roofline")
    return paths


def draw_train(record: Mapping[str, Any], folder: Path, name: str) -> list[Path]:
    """`NAME-breakdown`: a stacked bar per variant."""
    drawn = [case for case in record["cases"] if any(row["status"] == "ok" for row in case["variants"])]
    return save(breakdown(drawn, machine(record)), folder, f"{name}-breakdown") if drawn else []


def machine(record: Mapping[str, Any]) -> str:
    environment = record["environment"]
    note = "" if environment["gpu"] else " (plain PyTorch: no GPU)"
    return f"{environment['gpu'] or environment['cpu']}{note}, {environment['started'][:10]}"


def bars(cases: Sequence[Mapping[str, Any]], title: str, subtitle: str) -> Any:
    """Forward (dark) and backward (light) milliseconds of every provider, the fastest first, with quartiles of both."""
    plt = pyplot()
    heights = [sum(row["status"] == "ok" for row in case["providers"]) for case in cases]
    figure, axes = plt.subplots(
        len(cases),
        1,
        figsize=(9, 1.3 + sum(0.27 * height + 0.72 for height in heights)),
        height_ratios=[height + 1.2 for height in heights],
        squeeze=False,
        layout="constrained",
    )
    head(figure, title, f"{subtitle}; medians of the rounds")
    for axis, case in zip(axes[:, 0], cases, strict=True):
        whole = "both" if "both" in case["work"] else next(iter(case["work"]))
        rows = [row for row in case["providers"] if row["status"] == "ok"]
        rows.sort(key=lambda row: row["passes"][whole]["ms"][1])
        longest = max(row["passes"][whole]["ms"][2] for row in rows)
        for place, row in enumerate(rows):
            colour = OURS if row["provider"] == "fastvit" else "#8d887e"
            low, middle, high = row["passes"][whole]["ms"]
            axis.barh(place, middle, color=colour, alpha=0.45, height=0.72)
            axis.barh(place, row["passes"]["forward"]["ms"][1], color=colour, height=0.72)
            axis.plot([low, high], [place, place], color=INK, linewidth=1)
            axis.text(
                max(high, middle) + 0.01 * longest, place, f" {number(middle)}", va="center", fontsize=8, color=INK
            )
        axis.set_yticks(range(len(rows)), [title_of(row) for row in rows], fontsize=8)
        for label, row in zip(axis.get_yticklabels(), rows, strict=True):
            label.set_fontweight("bold" if row["provider"] == "fastvit" else "normal")
        axis.invert_yaxis()
        axis.set_xlim(0, 1.12 * longest)
        axis.set_title(f"{case['title']} ({case['dtype']})", loc="left", fontsize=9.5)
        axis.set_xlabel("ms", fontsize=8)
    shades = [("fastvit, forward", OURS, 1.0), ("fastvit, backward", OURS, 0.45)]
    shades += [("peer, forward", "#8d887e", 1.0), ("peer, backward", "#8d887e", 0.45)]
    patches = [plt.Rectangle((0, 0), 1, 1, color=colour, alpha=alpha, label=name) for name, colour, alpha in shades]
    quartiles = plt.Line2D([], [], color=INK, linewidth=1, label="quartiles of both")
    figure.legend(handles=[*patches, quartiles], loc="outside right upper", fontsize=8, frameon=False)
    return figure


def roofline(cases: Sequence[Mapping[str, Any]], ceiling: Mapping[str, Any], subtitle: str) -> Any:
    """Left, what multiplies matrices, under this machine's own roof; right, what only moves memory, under its copy."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.2), width_ratios=(1.35, 1), layout="constrained")
    head(figure, "Share of what this machine can do", f"{subtitle}; forward and backward together")
    copy, products = ceiling["copy_bytes_per_second"], ceiling["matmul_flops"]
    points = []
    for case in cases:
        whole = "both" if "both" in case["work"] else "forward"
        best = case["best_peer"].get(whole)
        for row in case["providers"]:
            if row["status"] == "ok" and row["provider"] in ("fastvit", best):
                points.append((case, row["provider"], case["work"][whole], 1e-3 * row["passes"][whole]["ms"][1]))
    draw_products(left, [point for point in points if point[2]["flops"]], copy, products)
    draw_moves(right, [point for point in points if not point[2]["flops"]], copy)
    return figure


Point = tuple[Mapping[str, Any], str, Mapping[str, int], float]  # case, provider, work, seconds


def draw_products(axis: Any, points: Sequence[Point], copy: float, products: Mapping[str, float]) -> None:
    unit, letter = (1e12, "T") if max(products.values()) >= 1e12 else (1e9, "G")
    intensities = [work["flops"] / work["bytes"] for _, _, work, _ in points] or [max(products.values()) / copy]
    ridges = [flops / copy for flops in products.values()]
    ends = min(*intensities, *ridges) / 2, max(*intensities, *ridges) * 2
    for name, flops in products.items():
        xs = [ends[0], flops / copy, ends[1]]
        axis.plot(xs, [min(flops, copy * x) / unit for x in xs], color=INK, linewidth=1.2)
        axis.text(ends[1], flops / unit, f"{name} {number(flops / unit)} {letter}FLOP/s ", ha="right", va="bottom",
                  fontsize=8)  # fmt: skip
    axis.text(ends[0], copy * ends[0] / unit, f"  copy {number(copy / 1e9)} GB/s", fontsize=8, va="top")
    for index, op in enumerate(dict.fromkeys(case["op"] for case, *_ in points)):
        for case, provider, work, seconds in points:
            if case["op"] == op:
                ours = provider == "fastvit"
                axis.scatter(
                    work["flops"] / work["bytes"],
                    work["flops"] / seconds / unit,
                    marker="osD^vPX*"[index % 8],
                    s=42,
                    color=OURS if ours else PEER,
                    edgecolor=INK,
                    linewidth=0.5,
                    zorder=3 if ours else 2,
                )
        axis.scatter([], [], marker="osD^vPX*"[index % 8], color=OURS, edgecolor=INK, linewidth=0.5, label=op)
    axis.set_xscale("log")
    axis.set_yscale("log")
    if points:
        title = "blue: fastvit, grey: best peer"
        axis.legend(fontsize=8, frameon=False, loc="lower right", title=title, title_fontsize=8)
    axis.set_xlabel("FLOPs per byte that must be moved")
    axis.set_ylabel(f"{letter}FLOP/s")


def draw_moves(axis: Any, points: Sequence[Point], copy: float) -> None:
    points = sorted(points, key=lambda point: point[0]["case"])  # a case and its best peer stay together
    labels, before = [], None
    for place, (case, provider, work, seconds) in enumerate(points):
        axis.barh(place, work["bytes"] / seconds / 1e9, color=OURS if provider == "fastvit" else PEER, height=0.75)
        title = "" if case["case"] == before else f"{case['case'].rpartition('/')[0]}: "
        labels.append(title + provider)
        before = case["case"]
    line = axis.axvline(copy / 1e9, color=INK, linewidth=1.2, label="copy on this machine")
    patches = [pyplot().Rectangle((0, 0), 1, 1, color=colour, label=name)
               for name, colour in (("fastvit", OURS), ("best peer", PEER))]  # fmt: skip
    axis.legend(handles=[*patches, line], fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    axis.set_yticks(range(len(labels)), labels, fontsize=7.5)
    axis.invert_yaxis()
    axis.set_xlabel("GB/s")


def breakdown(cases: Sequence[Mapping[str, Any]], subtitle: str) -> Any:
    plt = pyplot()
    rows = [
        (f"{row['variant']}{'' if row['data'] == 'memory' else ', ' + row['data']}", case, row)
        for case in cases
        for row in case["variants"]
        if row["status"] == "ok"
    ]
    figure, axis = plt.subplots(figsize=(10, 1.7 + 0.36 * len(rows)), layout="constrained")
    note = f"{subtitle}; the line is the time of a step by the clock"
    head(figure, "Where the time of a training step goes", note)
    for place, (_, _, row) in enumerate(rows):
        start = 0.0
        for kind, colour in KINDS.items():
            taken = row["breakdown_ms"].get(kind, 0.0)
            axis.barh(place, taken, left=start, color=colour, height=0.72, label=kind if place == 0 else None)
            start += taken
        middle = row["ms"][1]
        axis.plot([middle, middle], [place - 0.42, place + 0.42], color=INK, linewidth=1.6)
        axis.text(max(start, middle), place, f"  {row['images_per_second']:,.0f} images/s", va="center", fontsize=8)
    models = len({case["model"] for _, case, _ in rows}) > 1
    names = [f"{case['model']}: {name}" if models else name for name, case, _ in rows]
    axis.set_yticks(range(len(rows)), names, fontsize=8.5)
    for label, (_, _, row) in zip(axis.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row["ours"] else "normal")
    axis.invert_yaxis()
    axis.margins(x=0.16)
    axis.set_xlim(left=0)
    axis.set_xlabel("ms per step")
    axis.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=4, fontsize=8, frameon=False)
    return figure


def head(figure: Any, title: str, subtitle: str) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold")
    figure.supxlabel(subtitle, x=0.01, ha="left", fontsize=8.5, color=SOFT)


def pyplot() -> Any:
    """matplotlib without a window, in the report's colours."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "figure.facecolor": PAGE,
            "axes.facecolor": PAGE,
            "axes.edgecolor": HAIR,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "text.color": INK,
            "axes.labelcolor": SOFT,
            "xtick.color": SOFT,
            "ytick.color": INK,
            "svg.hashsalt": "fastvit",  # the same picture for the same figures
        }
    )
    return plt


def save(figure: Any, folder: Path, name: str) -> list[Path]:
    paths = [folder / f"{name}.{form}" for form in FORMATS]
    for path in paths:
        figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot().close(figure)
    return paths
