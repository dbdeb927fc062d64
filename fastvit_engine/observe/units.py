"""Formats numbers for people."""


def counted(count: int, one: str, many: str | None = None) -> str:
    """A count with its noun: "1 shard", "1,438 samples", "2 classes"; `many` is the plural, by default `one` + s."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def format_duration(seconds: float) -> str:
    """A duration in its two largest units: "0.4 s", "42 s", "1 min 12 s", "3 h 5 min", "2 d 4 h"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for large, small, size, part in (("d", "h", 86400, 3600), ("h", "min", 3600, 60), ("min", "s", 60, 1)):
        if whole >= size:
            return f"{whole // size} {large} {whole % size // part} {small}"
    return f"{whole} s"


def format_count(count: float) -> str:
    """A rounded count: "950", "45 k", "0.4 M", "86.6 M", "1.8 B"."""
    for size, letter, smallest in ((1e9, "B", 1e9), (1e6, "M", 1e5), (1e3, "k", 1e4)):
        if count >= smallest:
            scaled = count / size
            return f"{scaled:.1f}".removesuffix(".0") + f" {letter}" if scaled < 100 else f"{scaled:,.0f} {letter}"
    return f"{count:,.0f}"


def format_flops(flops: float) -> str:
    """Floating-point operations, or a rate of them, without the trailing "/s": "334.6 GFLOP"."""
    for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if flops >= size:
            return f"{flops / size:.4g} {letter}FLOP"
    return f"{flops:.0f} FLOP"


def format_bytes(count: float) -> str:
    """Bytes in binary units: "1.4 GiB"."""
    for size, letter in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= size:
            return f"{count / size:.1f} {letter}"
    return f"{count:.0f} B"


def format_share(share: float) -> str:
    """A fraction as a percentage: "97.2 %"."""
    return f"{100 * share:.1f} %"
