import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastvit_kernels
from fastvit_kernels import choices, dispatch, table
from fastvit_kernels.dispatch import Gpu
from fastvit_kernels.table import Entry, Provenance, Runs, Table
from tests.in_full import in_full

PRODUCTS = ("attention", "attention_block", "mlp", "patch_embed")
OTHERS = ("cross_entropy", "layer_norm")


def runs(operation: str, dtype: torch.dtype = torch.bfloat16, on_gpu: bool = True) -> str:
    return dispatch.plan(operation, dtype, on_gpu).runs


def test_auto_is_triton_on_a_gpu_and_the_reference_on_the_cpu(device: torch.device) -> None:
    with dispatch.using("auto"):
        for dtype in (torch.bfloat16, torch.float16):
            for operation in (*PRODUCTS, *OTHERS):
                tensor = torch.empty(2, dtype=dtype, device=device)
                assert dispatch.uses_triton(operation, tensor) == (device.type == "cuda")
        assert not dispatch.uses_triton("layer_norm", torch.empty(2, dtype=torch.float64, device=device))


def test_float32_products_are_those_of_pytorch_in_auto_only() -> None:
    for setting, expected in [("auto", "reference"), ("triton", "triton"), ("reference", "reference")]:
        with dispatch.using(setting):
            assert {runs(operation, torch.float32) for operation in PRODUCTS} == {expected}
    with dispatch.using("auto"):
        assert {runs(operation, torch.float32) for operation in OTHERS} == {"triton"}


def test_blocks_under_autocast_compute_in_its_dtype() -> None:
    x = torch.empty(2)
    with torch.autocast("cpu", torch.bfloat16):
        assert dispatch.computed_dtype("mlp", x) == dispatch.computed_dtype("attention_block", x) == torch.bfloat16
        assert dispatch.computed_dtype("attention", x) == torch.float32
        assert dispatch.computed_dtype("mlp", x.double()) == torch.float64  # as torch.nn.functional.linear
    assert dispatch.computed_dtype("mlp", x) == torch.float32
    assert dispatch.computed_dtype("mlp", torch.empty(2, device="meta")) == torch.float32


def test_reference_is_always_available(device: torch.device) -> None:
    with dispatch.using("reference"):
        assert not dispatch.uses_triton("layer_norm", torch.empty(2, device=device))


def test_triton_runs_on_the_cpu_only_by_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    with dispatch.using("triton"):
        monkeypatch.setattr(dispatch, "INTERPRETED", True)
        assert dispatch.uses_triton("attention", torch.empty(2))
        monkeypatch.setattr(dispatch, "INTERPRETED", False)
        with pytest.raises(RuntimeError, match="FASTVIT_KERNELS=triton was asked for, but Triton runs on a GPU"):
            dispatch.uses_triton("attention", torch.empty(2))
        monkeypatch.setattr(dispatch, "HAS_TRITON", False)
        with pytest.raises(RuntimeError, match="triton is not installed"):
            dispatch.uses_triton("attention", torch.empty(2))


def test_an_obstacle_is_passed_over_in_auto_and_an_error_where_triton_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    for setting in ("auto", "triton,layer_norm=auto", "layer_norm=reference"):
        with dispatch.using(setting):
            assert not dispatch.uses_triton("layer_norm", torch.empty(2), "it is too wide")
    with (
        dispatch.using("layer_norm=triton"),
        pytest.raises(RuntimeError, match="FASTVIT_KERNELS=layer_norm=triton was asked for, but it is too wide"),
    ):
        dispatch.uses_triton("layer_norm", torch.empty(2), "it is too wide")


MEASURED = Provenance("X90", True, "measured in a test", "2026-01-01", "3.6", "2.11", table.TOOL)


def test_the_table_of_a_gpu_says_who_runs_an_operation_in_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "is_on_gpu", lambda tensor: True)
    here = Gpu("interpreter", 2, "X90")
    norm = {"width": 8, "dtype": "bfloat16", "branch": False, "rows": 6}
    patches = {"patch": 2, "images": "uint8", "dtype": "float32", "width": 8, "patches": 16}
    loss = {"sigmoid": False, "classes": 4, "soft": False, "dtype": "bfloat16", "batch": 3}
    entries = [
        Entry("layer_norm", norm, {"provider": "reference"}, 2.0, 1.0, 0.01, "source"),
        Entry("cross_entropy_loss", loss, {"provider": "reference"}, 2.0, 1.0, 0.01, "source"),
        Entry("patch_embed", patches, {"provider": "triton"}, 2.0, 1.0, 0.01, "source"),
    ]
    ran: list[str] = []
    for name, operators in (("layer_norm", "layer_norm_op"), ("cross_entropy", "cross_entropy_op"),
                            ("patch_embed", "patch_embed_op")):  # fmt: skip
        module = sys.modules[f"fastvit_kernels.{name}.op"]

        def operator(*args: object, name: str = name) -> list[torch.Tensor]:
            ran.append(name)
            return [torch.zeros(())] * 3

        monkeypatch.setattr(module, operators, operator)

    def run(width: int) -> list[str]:
        ran.clear()
        x = torch.randn(2, 3, width).bfloat16()
        fastvit_kernels.layer_norm(x, torch.ones(width), torch.zeros(width))
        fastvit_kernels.cross_entropy(torch.randn(3, width // 2).bfloat16(), torch.zeros(3, dtype=torch.int64))
        images, weight = torch.zeros(4, 4, 4, 3, dtype=torch.uint8), torch.randn(width, 3, 2, 2)
        fastvit_kernels.patch_embed(images, weight, torch.zeros(width), mean=(0.5,) * 3, std=(0.5,) * 3)
        return list(ran)

    with table.using(Table(MEASURED, tuple(entries))), dispatch.compiling_for(here), dispatch.using("auto"):
        assert run(8) == ["patch_embed"]
        assert run(20) == ["layer_norm", "cross_entropy"]  # sizes that were not measured
        with dispatch.using("triton,patch_embed=reference"):
            monkeypatch.setattr(dispatch, "INTERPRETED", True)
            assert run(8) == ["layer_norm", "cross_entropy"]


def test_a_compiled_graph_does_not_follow_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sizes may be symbols."""
    monkeypatch.setattr(dispatch, "is_on_gpu", lambda tensor: True)
    with dispatch.using("auto"):
        assert dispatch.provider("layer_norm", torch.empty(2), measured=lambda: Runs("reference")) == "reference"
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert dispatch.provider("layer_norm", torch.empty(2), measured=lambda: Runs("reference")) == "triton"


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("triton", {"attention": "triton", "layer_norm": "triton", "gemm": "auto"}),
        ("*=reference", {"attention": "reference", "cross_entropy": "reference", "gemm": "auto"}),
        ("attention=reference", {"attention": "reference", "layer_norm": "auto", "mlp": "auto"}),
        ("attention=reference,*=triton", {"attention": "reference", "layer_norm": "triton"}),
        (" auto , mlp = reference, gemm=cublas", {"mlp": "reference", "attention": "auto", "gemm": "cublas"}),
        # block operators contain others
        ("attention=reference,*=triton", {"attention_block": "reference", "mlp": "triton"}),
        ("layer_norm=reference", {"attention_block": "reference", "mlp": "reference", "attention": "auto"}),
        ("*=reference,mlp=triton", {"mlp": "triton", "attention_block": "reference", "layer_norm": "reference"}),
        ("triton,layer_norm=auto", {"mlp": "triton", "layer_norm": "auto"}),
    ],
)  # fmt: skip
def test_a_setting_chooses_for_each_operation(setting: str, expected: dict[str, str]) -> None:
    with dispatch.using(setting):
        assert {operation: dispatch.asked_for(operation) for operation in expected} == expected


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("cuda", "implementation must be one of auto, triton, reference, got 'cuda'"),
        ("cublas", "implementation must be one of auto, triton, reference, got 'cublas': write gemm=cublas"),
        ("auto,", "implementation must be one of auto, triton, reference, got '' in 'auto,'"),
        ("swiglu", "implementation must be one of auto, triton, reference, got 'swiglu': write swiglu=reference, say"),
        ("layer_norm=cublas", "of auto, triton, reference, got 'cublas' in 'layer_norm=cublas' for layer_norm"),
        ("atention=triton", "implementation must name one of *, attention, attention_block, block, cross_entropy,"),
        ("mlp=auto,mlp=triton", "implementation must be one choice for mlp, got two in 'mlp=auto,mlp=triton'"),
        ("auto,*=triton", "implementation must be one choice for all operations, got two in 'auto,*=triton'"),
        (
            "mlp=triton,layer_norm=reference",
            "the kernels of mlp contain layer_norm, so set mlp to auto, or layer_norm to triton",
        ),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_a_sentence_that_says_what_is_possible(setting: str, said: str) -> None:
    before = [dispatch.asked_for(operation) for operation in choices.OPERATIONS]
    with pytest.raises(ValueError) as refused:
        dispatch.use(setting)
    assert said in str(refused.value)
    assert [dispatch.asked_for(operation) for operation in choices.OPERATIONS] == before


def test_using_restores_the_choice_after_an_error() -> None:
    before = dispatch.asked_for("mlp")
    with pytest.raises(KeyError), dispatch.using("mlp=reference"):
        raise KeyError
    assert dispatch.asked_for("mlp") == before


def test_each_folder_with_a_reference_is_an_operation() -> None:
    folders = {path.parent.name for path in Path(fastvit_kernels.__file__).parent.glob("*/reference.py")}
    assert folders == set(choices.OPERATIONS) - {"gemm"}


def test_a_block_without_one_of_its_kernels_is_a_composition_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which implementation each part runs, by what the parts are asked; and the result is that of plain PyTorch."""
    block = fastvit_kernels.FusedBlock(16, 2, 32)
    x = torch.randn(2, 3, 16)
    with dispatch.using("reference"):
        expected = block(x)
    called: dict[str, str] = {}

    def spy(operation: str, *args: Any, **kwargs: Any) -> str:
        called[operation] = original(operation, *args, **kwargs)
        return called[operation]

    original = dispatch.provider
    monkeypatch.setattr(dispatch, "provider", spy)
    monkeypatch.setattr(sys.modules["fastvit_kernels.attention.op"], "provider", spy)
    interpreted = dispatch.INTERPRETED
    for setting in ("attention=reference,layer_norm=triton,mlp=reference", "layer_norm=reference,attention=triton"):
        called.clear()
        with dispatch.using(setting if interpreted else "reference"):
            torch.testing.assert_close(block(x), expected)
        wanted = dict.fromkeys(("attention_block", "mlp", "attention", "layer_norm"), "reference")
        if interpreted:
            wanted["attention" if "attention=triton" in setting else "layer_norm"] = "triton"
        assert {operation: called[operation] for operation in wanted} == wanted


def test_modules_show_who_runs_them() -> None:
    block = fastvit_kernels.FusedBlock(16, 2, 32)
    with dispatch.using("reference"):
        assert repr(block).startswith("FusedBlock(\n  runs=reference\n")
    with dispatch.using("mlp=reference,attention=triton,attention_block=triton"):
        runs = "triton" if dispatch.INTERPRETED else "error"
        assert f"  block=reference, attention_block={runs}, mlp=reference\n" in repr(block)
        assert f"runs={runs}" in repr(block.attn)
    with dispatch.using("auto"), torch.device("meta"):
        for module in (
            fastvit_kernels.FusedLayerNorm(8),
            fastvit_kernels.FusedLayerNormMLP(8, 16),
            fastvit_kernels.FusedPatchEmbed(4, 8, (0.5,) * 3, (0.5,) * 3),
        ):
            assert "runs=reference" in repr(module)


def test_gemm_chooses_who_multiplies() -> None:
    from fastvit_kernels.gemm.config import runs_triton

    where = ("gelu", torch.float32, torch.device("cpu"), 64, 64, 64)
    for setting, expected in [("auto", False), ("gemm=triton", True), ("gemm=cublas", False)]:
        with dispatch.using(setting):
            assert runs_triton(*where) == expected


def test_explain_names_every_operation_and_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(operation: str) -> list[str]:
        lines = fastvit_kernels.explain().splitlines()
        cells = next(line for line in lines if line.startswith(f"{operation} ")).split(maxsplit=1)[1]
        return [cell.strip() for cell in cells.split("  ") if cell]

    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    plain = ["reference (asked for)"] * 3
    failing = ["triton (asked for)", "triton (asked for)", "error (needs a GPU)"]
    for setting, norm, attention in [
        ("auto", ["triton", "triton", "reference (on the CPU)"],
         ["triton", "reference (fp32 products)", "reference (on the CPU)"]),
        ("triton", failing, failing),
        ("reference", plain, plain),
        ("attention=reference", ["triton", "triton", "reference (on the CPU)"], plain),
    ]:  # fmt: skip
        with dispatch.using(setting):
            assert (row("layer_norm"), row("attention")) == (norm, attention)
            assert f"FASTVIT_KERNELS={setting}" in fastvit_kernels.explain()
    with dispatch.using("auto"):
        assert max(map(len, fastvit_kernels.explain().splitlines())) <= 80
    with dispatch.using("attention=reference"):
        assert row("attention_block") == ["reference (attention=reference)"] * 3


def test_explain_ends_with_a_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    count = len(choices.OPERATIONS) - 1  # all but the products inside others
    with dispatch.using("auto"):
        assert fastvit_kernels.explain().splitlines()[-1] == f"{count} operations on the CPU: {count} reference"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with dispatch.using("attention=reference"), dispatch.compiling_for(Gpu("sm_90", 132, "H200")):
        assert "\nassembler: ptxas " in fastvit_kernels.explain()
        last = f"{count} operations on this GPU, in bf16: {count - 3} triton, 3 reference"
        assert fastvit_kernels.explain().splitlines()[-1] == last


@pytest.mark.parametrize(
    ("value", "code", "said"),
    [
        in_full("", 0, "auto"),
        ("auto,layer_norm=triton", 0, "triton"),
        in_full("cuda", 1, "ValueError: FASTVIT_KERNELS must be one of auto, triton, reference"),
    ],
)
def test_environment_variable_chooses_and_is_checked(value: str, code: int, said: str) -> None:
    program = "import fastvit_kernels.dispatch as dispatch; print(dispatch.asked_for('layer_norm'))"
    environment = os.environ | {"FASTVIT_KERNELS": value}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == code
    assert said in (result.stdout + result.stderr).splitlines()[-1]


@pytest.mark.parametrize("module", [in_full("fastvit_kernels.tuning"), "fastvit_kernels.tuning.codegen"])
def test_commands_say_in_one_sentence_that_the_variable_is_wrong(module: str) -> None:
    environment = os.environ | {"FASTVIT_KERNELS": "cuda"}
    command = [sys.executable, "-m", module, "--help"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == ("fastvit_kernels: FASTVIT_KERNELS must be one of auto, triton, reference, got 'cuda'\n")
