"""GPUs by name: how much memory and which peak their datasheets give. Needs no PyTorch."""

GPU_MEMORY_GIB = {  # of the usual variant
    "B200": 180,
    "H200": 141,
    "H100": 80,
    "H100 PCIe": 80,
    "H100 NVL": 94,
    "A100": 80,
    "L40S": 48,
    "MI300X": 192,
}

# Dense bf16 and fp16 matrix products without sparsity, FLOP/s. A more precise name comes before one that it contains.
DATASHEET_PEAK = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "MI300X": 1307e12,
}

# Of FP8 products, likewise. A GPU that is not here has none that training can use.
DATASHEET_FP8_PEAK = {
    "B200": 4500e12,
    "H200": 1979e12,
    "H100 PCIe": 1513e12,
    "H100 NVL": 1671e12,
    "H100": 1979e12,
}

# Of fp32 without TF32, which PyTorch leaves off.
DATASHEET_FP32_PEAK = {
    "B200": 75e12,
    "H200": 67e12,
    "H100 PCIe": 51e12,
    "H100 NVL": 60e12,
    "H100": 67e12,
    "A100": 19.5e12,
    "L40S": 91.6e12,
    "MI300X": 163.4e12,
}

USUAL_MFU = 0.4  # of these peaks, in training: an assumption


def matrix_peak(gpu: str, precision: str) -> float:
    """FLOP/s of the datasheet; with FP8, of what stays in bf16."""
    return (DATASHEET_FP32_PEAK if precision == "fp32" else DATASHEET_PEAK)[gpu]


def known_gpu(name: str) -> str | None:
    """The GPU whose name is in what a driver calls it; None if there is none."""
    return next((known for known in DATASHEET_PEAK if known in name), None)
