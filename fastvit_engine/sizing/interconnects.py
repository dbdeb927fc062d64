"""What connects the processes of a job, by name or by figures: bandwidth and latency. Needs no PyTorch.

Bandwidths are those of datasheets, in one direction. What a collective operation gets of them, and how long a message
takes, library included, are assumptions until somebody measures them: give `--bandwidth` and `--latency` if you have.
"""

from dataclasses import dataclass

from fastvit_engine.errors import UserError

REACHED = 0.8  # of a datasheet's bandwidth, by a collective operation: an assumption


@dataclass(frozen=True)
class Link:
    """What a process sends its messages over."""

    bandwidth: float  # bytes per second in one direction: of one process, or of its node if it is shared
    latency: float  # seconds from the call to the arrival of an empty message
    shared: bool = False  # by all processes of a node


@dataclass(frozen=True)
class Interconnect:
    """The links of a job: within a node, and between nodes."""

    titles: tuple[str, str]
    within: Link
    between: Link
    assumed: bool  # whether its figures come from the tables below

    def describe(self, nodes: int) -> str:
        """What a job on so many nodes uses."""
        within, between = self.titles
        return f"{within} within a node" + (f", {between} between nodes" if nodes > 1 else "")

    def ring_bandwidth(self, processes: int, per_node: int) -> float:
        """Bytes per second that a ring through all processes carries in one direction.

        Within a node, it is as fast as a process's link. It leaves a node by all adapters at once, as NCCL's does.
        """
        if processes <= per_node:
            return self.within.bandwidth
        between = self.between.bandwidth * (1 if self.between.shared else per_node)
        return between if per_node == 1 else min(self.within.bandwidth, between)


def _gb(bandwidth: float, microseconds: float, *, shared: bool = False) -> Link:
    return Link(REACHED * bandwidth * 1e9, 1e-6 * microseconds, shared)


# GB/s of one GPU in one direction, and microseconds of a message.
WITHIN = {
    "nvlink5": _gb(900, 2),
    "nvlink4": _gb(450, 2),
    "nvlink3": _gb(300, 2),
    "infinity-fabric3": _gb(448, 3),  # MI300X: seven links of 64 GB/s
    "pcie5": _gb(64, 5),
    "pcie4": _gb(32, 5),
}
# An InfiniBand adapter for each GPU, an Ethernet one for each node.
BETWEEN = {
    "infiniband-xdr800": _gb(100, 8),
    "infiniband-ndr400": _gb(50, 8),
    "infiniband-hdr200": _gb(25, 8),
    "ethernet-400": _gb(50, 30, shared=True),
    "ethernet-100": _gb(12.5, 30, shared=True),
    "ethernet-25": _gb(3.125, 40, shared=True),
    "ethernet-10": _gb(1.25, 50, shared=True),
}
# What the usual server with such GPUs has inside.
USUAL_WITHIN = {
    "B200": "nvlink5",
    "H200": "nvlink4",
    "H100": "nvlink4",
    "H100 PCIe": "pcie5",
    "H100 NVL": "pcie5",
    "A100": "nvlink3",
    "L40S": "pcie4",
    "MI300X": "infinity-fabric3",
}
USUAL_BETWEEN = "infiniband-ndr400"


def usual(gpu: str) -> Interconnect:
    """What is assumed if nobody says it."""
    return named(f"{USUAL_WITHIN[gpu]}+{USUAL_BETWEEN}")


def named(name: str, gpu: str | None = None) -> Interconnect:
    """WITHIN+BETWEEN, or one of both, the other being the usual one of `gpu`. Raises UserError for an unknown name."""
    parts = name.split("+")
    within = [part for part in parts if part in WITHIN]
    between = [part for part in parts if part in BETWEEN]
    if len(parts) > 2 or len(within) > 1 or len(between) > 1 or len(within) + len(between) != len(parts):
        raise UserError(
            f"--interconnect {name}: name what is within a node ({', '.join(WITHIN)}), between nodes "
            f"({', '.join(BETWEEN)}), or both, as in nvlink4+infiniband-ndr400"
        )
    if not within and gpu is None:
        raise UserError(f"--interconnect {name}: processes on CPUs have no usual link within a node; give --bandwidth")
    inside = within[0] if within else USUAL_WITHIN[str(gpu)]
    outside = between[0] if between else USUAL_BETWEEN
    return Interconnect((inside, outside), WITHIN[inside], BETWEEN[outside], assumed=True)


def of_figures(bandwidths: tuple[float, float], latencies: tuple[float, float]) -> Interconnect:
    """Of GB/s per process in one direction, and microseconds: within a node, and between nodes."""
    for option, pair in (("--bandwidth", bandwidths), ("--latency", latencies)):
        if not all(0 <= value < 1e9 for value in pair) or (option == "--bandwidth" and 0 in pair):
            raise UserError(f"{option} is {pair[0]:g} {pair[1]:g}: two positive figures, within and between nodes")
    links = [Link(1e9 * bandwidth, 1e-6 * latency) for bandwidth, latency in zip(bandwidths, latencies, strict=True)]
    titles = [
        f"{bandwidth:g} GB/s and {latency:g} µs" for bandwidth, latency in zip(bandwidths, latencies, strict=True)
    ]
    return Interconnect((titles[0], titles[1]), links[0], links[1], assumed=False)
