"""Products with GELU in QuACK. On the CPU, `fake_quack` takes its place; its kernels were only ever compiled."""

import importlib
import inspect
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastvit_kernels
from fastvit_kernels import FusedBlock, FusedLayerNormMLP, dispatch, layer_norm_mlp, libraries, mlp, table
from fastvit_kernels.dispatch import Gpu
from fastvit_kernels.gemm import config, products, quack
from fastvit_kernels.gemm.quack import Pinned
from fastvit_kernels.mlp.op import layer_norm_mlp_op
from fastvit_kernels.table import Entry, Provenance, Table
from fastvit_kernels.tuning import search
from tests.in_full import in_full
from tests.kernels import fake_quack
from tests.kernels.numerics import assert_accurate
from tests.kernels.test_gemm import check_all
from tests.kernels.test_mlp import EPS, inputs, leaves, plain_mlp, run

HERE = Gpu("sm_90", 2, "X90")
MEASURED = Provenance("X90", True, "measured in a test", "2026-01-01", "3.6", "2.11", table.TOOL)
HOW = Pinned(16, 32, True, 2, 1)
interpreted = pytest.mark.skipif(not dispatch.INTERPRETED, reason="does not apply: needs Triton's interpreter")


@pytest.fixture(autouse=True)
def faked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels of one tile for tiny matrices, and memory of outputs filled with NaN beforehand."""
    fake_quack.install(monkeypatch)
    torch.use_deterministic_algorithms(True, warn_only=True)
    with dispatch.compiling_for(HERE), quack.pinned.forcing(HOW):
        yield
    torch.use_deterministic_algorithms(False)
    libraries.unusable.cache_clear()


@pytest.fixture
def asked() -> Iterator[None]:
    with dispatch.using("triton,gemm=quack"):
        yield


def launched() -> list[str]:
    """The epilogues since the last call of this."""
    names = [call.epilogue for call in fake_quack.calls]
    fake_quack.calls.clear()
    return names


BOTH = ["linear_gelu", "gelu_gradient"]


# ---- numbers


@interpreted
@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize("column_sums", [True, False], ids=["sums in the epilogue", "sums apart"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tanh", [False, True])
def test_products(tanh: bool, dtype: torch.dtype, column_sums: bool) -> None:
    with quack.pinned.forcing(HOW._replace(column_sums=column_sums)):
        check_all(33, 40, 72, tanh, dtype, torch.device("cpu"))
    assert launched() == ["linear_gelu"] * 2 + ["gelu_gradient"] * 2


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tanh", [False, True])
def test_the_gelu_of_the_backward_pass_is_that_of_the_forward_pass(tanh: bool, dtype: torch.dtype) -> None:
    """GELU takes what is stored, the sum in 16 bits: else recomputation would change results."""
    x, weight, bias = torch.randn(24, 32).to(dtype), torch.randn(16, 32).to(dtype), torch.randn(16).to(dtype)
    pre, post = products.linear_gelu(x, weight, bias, tanh)
    assert torch.equal(pre, (x.float() @ weight.float().T + bias.float()).to(dtype))
    _, _, again = products.gelu_gradient(x, torch.randn(32, 16).to(dtype), pre, tanh, recompute=True)
    assert torch.equal(again, post)


@interpreted
@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize(
    ("activation", "dtype"),
    [("gelu", torch.bfloat16), ("gelu_tanh", torch.float16)]
    + [in_full("gelu", torch.float16), in_full("gelu_tanh", torch.bfloat16)],
)
def test_half_block_is_accurate(activation: str, dtype: torch.dtype) -> None:
    assert_accurate(
        lambda **given: layer_norm_mlp(**given, eps=EPS, activation=activation),
        lambda **given: plain_mlp(**given, activation=activation),
        inputs(2, 5, 40, 72, scaled=True),
        dtype,
        torch.device("cpu"),
    )
    assert launched() == BOTH


@interpreted
@pytest.mark.usefixtures("asked")
def test_recomputation_changes_no_bit() -> None:
    arguments = leaves(torch.device("cpu"), torch.bfloat16, 1, 5, 40, 72)
    kept = run(arguments, recompute="none")
    assert "post" not in fake_quack.calls[-1].out  # what is kept is not computed again
    for recompute in ("gelu", "all"):
        again = run(arguments, recompute=recompute)
        assert "post" in fake_quack.calls[-1].out
        assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


@interpreted
@pytest.mark.parametrize("kind", [FusedLayerNormMLP, in_full(FusedBlock)])
def test_stochastic_depth_and_layer_scale_train_as_with_cublas(kind: Any) -> None:
    sizes = (32, 64) if kind is FusedLayerNormMLP else (32, 2, 64)
    block = kind(*sizes, layer_scale=0.5, drop_path=0.5).bfloat16()
    x = torch.randn(4, 7, 32).bfloat16().requires_grad_()
    results = []
    for setting in ("triton,gemm=quack", "triton,gemm=cublas"):
        torch.manual_seed(1)
        with dispatch.using(setting):
            y = block(x)
            results.append((y, *torch.autograd.grad(y.float().square().sum(), [x, *block.parameters()])))
    assert launched() == BOTH
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05 * theirs.abs().max().item())


@interpreted
@pytest.mark.usefixtures("asked")
def test_autocast_runs_it_on_float32_parameters() -> None:
    layer, x = FusedLayerNormMLP(32, 64), torch.randn(2, 5, 32, requires_grad=True)
    expected = plain_mlp(
        x, layer.norm.weight, layer.norm.bias, layer.fc1.weight, layer.fc1.bias, layer.fc2.weight, layer.fc2.bias
    )
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.sum().backward()
    assert launched() == BOTH
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)
    assert layer.fc1.bias.grad is not None and layer.fc1.bias.grad.dtype == torch.float32


@interpreted
@pytest.mark.usefixtures("asked")
def test_frozen_parameters_and_mlp_without_norm() -> None:
    given = leaves(torch.device("cpu"), torch.bfloat16, 1, 5, 32, 64)
    x, fc1, fc2 = given["x"], (given["fc1_weight"], given["fc1_bias"]), (given["fc2_weight"], given["fc2_bias"])
    fc1[1].requires_grad_(False)
    torch.autograd.grad(mlp(x, *fc1, *fc2).sum(), [x, fc1[0], *fc2])
    assert set(fake_quack.calls[-1].operands) == set()  # no column sums
    with torch.no_grad():
        mlp(x, *fc1, *fc2)
    assert set(fake_quack.calls[-1].out) == {"post"}  # nothing is kept


@interpreted
@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize("checked", [False, in_full(True)])
def test_operator_is_one_that_pytorch_accepts_and_compiles(checked: bool) -> None:
    given = leaves(torch.device("cpu"), torch.bfloat16, 1, 5, 32, 64)
    if checked:
        call = (*given.values(), None, EPS, False, True, True, True)
        torch.library.opcheck(layer_norm_mlp_op, call, raise_exception=True)
    expected = layer_norm_mlp(**given, eps=EPS).sin()
    compiled = torch.compile(
        lambda **given: layer_norm_mlp(**given, eps=EPS).sin(), fullgraph=True, backend="aot_eager"
    )
    fake_quack.calls.clear()
    assert torch.equal(compiled(**given), expected)
    assert launched() == ["linear_gelu"]


@interpreted
def test_transforms_run_plain_pytorch() -> None:
    given = {name: tensor.bfloat16() for name, tensor in inputs(2, 5, 32, 64).items()}
    with dispatch.using("gemm=quack"):
        torch.func.grad(lambda x: layer_norm_mlp(**given | {"x": x}, eps=EPS).float().sum())(given["x"])
    assert launched() == []


# ---- who runs


def by_table(*, rows: int = 24, hidden: int = 16, width: int = 32) -> Table:
    where = {"dtype": "bfloat16", "m": rows, "n": hidden, "k": width}
    use = HOW._replace(runs=True)._asdict()
    return Table(
        MEASURED,
        tuple(Entry("quack_gemm", {"product": p} | where, use, 2.0, 1.0, 0.01, "source") for p in quack.PRODUCTS),
    )


@pytest.fixture
def unforced() -> Iterator[None]:
    with quack.pinned.forcing(HOW):
        quack.pinned.forced = None
        yield


def linear_gelu(width: int = 32, hidden: int = 16, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x, weight = torch.randn(24, width).to(dtype), torch.randn(hidden, width).to(dtype)
    return products.linear_gelu(x, weight, torch.zeros(hidden, dtype=dtype), False)


@interpreted
@pytest.mark.usefixtures("unforced")
def test_the_table_decides_and_without_one_cublas_runs() -> None:
    with dispatch.using("auto"):
        expected = linear_gelu()
        with table.using(by_table()):
            found = linear_gelu()
            assert launched() == ["linear_gelu"]
            for forced in (config.triton_for(), config.tile.forcing(config.Tile(32, 32, 32, 2, 1, 4)._replace())):
                with forced:  # a measurement of something else
                    linear_gelu()
        with table.using(by_table()), dispatch.using("gemm=cublas"):
            linear_gelu()
    assert launched() == []
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@interpreted
@pytest.mark.usefixtures("unforced")
@pytest.mark.parametrize(
    ("width", "hidden", "dtype", "reason"),
    [
        (36, 16, torch.bfloat16, "QuACK takes no empty matrices, and only rows that start at multiples of 16 bytes"),
        (32, 16, torch.float32, "QuACK takes bfloat16 and float16, not torch.float32"),
    ],
)
def test_what_it_cannot_take_is_an_error_if_asked_for_and_else_told(
    width: int, hidden: int, dtype: torch.dtype, reason: str
) -> None:
    with dispatch.using("gemm=quack"), pytest.raises(RuntimeError, match=f"gemm=quack was asked for, but {reason}"):
        linear_gelu(width, hidden, dtype)
    named = by_table(width=width, hidden=hidden).entries
    named = tuple(Entry(e.kernel, {**e.where, "dtype": str(dtype)[6:]}, e.use, 2.0, 1.0, 0.01, "") for e in named)
    with dispatch.using("auto"), table.using(Table(MEASURED, named)):
        with pytest.warns(UserWarning, match=f"the table of X90 has QuACK run .*, but {reason}: cuBLAS runs them"):
            found = linear_gelu(width, hidden, dtype)
        with warnings.catch_warnings(action="error"):  # once
            linear_gelu(width, hidden, dtype)
        with quack.pinned.forcing(HOW._replace(runs=True)), pytest.raises(RuntimeError, match=f"^{reason}"):
            linear_gelu(width, hidden, dtype)  # a measurement must not measure something else
    with dispatch.using("gemm=cublas"):
        assert all(torch.equal(a, b) for a, b in zip(found, linear_gelu(width, hidden, dtype), strict=True))
    assert launched() == []


def test_it_takes_a_bias_at_any_address() -> None:
    x, weight = torch.randn(24, 32).bfloat16(), torch.randn(16, 32).bfloat16()
    bias = torch.randn(17).bfloat16()[1:]
    with dispatch.using("gemm=quack"):
        assert torch.equal(
            products.linear_gelu(x, weight, bias, False)[0], products.linear_gelu(x, weight, bias.clone(), False)[0]
        )


def test_a_pair_of_multiprocessors_adds_up_half_a_tile_each() -> None:
    assert quack.rows_of_tile(Pinned(256, 256, False, 2, 1), Gpu("sm_100", 148)) == 128
    assert quack.rows_of_tile(Pinned(256, 256, False, 1, 1), Gpu("sm_100", 148)) == 256
    assert quack.rows_of_tile(Pinned(256, 128, False, 2, 1), Gpu("sm_90", 132)) == 256


@interpreted
@pytest.mark.usefixtures("unforced")
def test_tuning_finds_it_right_and_writes_what_the_table_then_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Machine:
        gpu, device, cache_bytes = HERE, torch.device("cpu"), 0

        def obstacle(self, case: Any, option: Any) -> None:
            return None

        def measure(self, launches: Any, rounds: int) -> list[list[float]]:
            for launch in launches:
                launch()
            return [[1.0, *[0.5] * (len(launches) - 2), 1.0]] * rounds

        def check_alive(self) -> None:
            pass

    monkeypatch.setattr(search, "CONFIRMATIONS", 2)
    monkeypatch.setitem(search.MODELS, "tiny", search.Model("tiny", 4, 32, 2, batch=1, image=8))
    cases = [
        replace(case, candidates=case.candidates[:2]) for case in search.cases(["gemm"], ["tiny"], HERE, ["QuACK"])
    ]
    outcomes: list[Any] = []
    found = search.tune(
        cases, Machine(), Table(MEASURED), tmp_path / "t.json", rounds=2, report=lambda o, *_: outcomes.append(o)
    )
    assert [(outcome.case, outcome.discarded) for outcome in outcomes] == [
        ("tiny fc1, GELU in QuACK", {}),
        ("tiny fc2, GELU gradient in QuACK", {}),
    ]
    fake_quack.calls.clear()
    with dispatch.using("auto"), table.using(found):
        layer_norm_mlp(**leaves(torch.device("cpu"), torch.bfloat16, 1, 5, 32, 128), eps=EPS).sum().backward()
    assert launched() == BOTH
    fake_quack.install(monkeypatch, "0.6.9")  # what was measured with another version is measured again
    assert not any(search.known(found, case) for case in cases)


# ---- what it can do


def test_a_usable_library_has_no_obstacle() -> None:
    assert libraries.quack_obstacle("sm_90") is None and libraries.quack_obstacle("sm_100") is None
    assert libraries.quack_obstacle("gfx942") == "QuACK runs on sm_90 and sm_100 here, not on gfx942"


@pytest.mark.parametrize("version", ["0.6.4", "0.5.9", "0.7.0", "1.0"])
def test_other_versions_are_not_used(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_quack.install(monkeypatch, version)
    assert f"quack-kernels {version} is installed, and this package knows 0.6.5 up to" in str(libraries.unusable())


def test_a_library_that_is_not_installed_or_broken_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(distribution: str) -> str:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.import_module("quack.gemm_config"), "GemmConfig", lambda tile_m: None)
    assert "GemmConfig has no cluster_m, cluster_n, device_capacity, is_" in str(libraries.unusable())
    libraries.unusable.cache_clear()
    monkeypatch.delattr(importlib.import_module("quack.activation"), "sigmoid")
    assert "cannot be used: quack.activation.sigmoid: AttributeError" in str(libraries.unusable())
    libraries.unusable.cache_clear()
    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert libraries.unusable() == "quack-kernels is not installed"
    with dispatch.using("gemm=quack"), pytest.raises(RuntimeError, match="but quack-kernels is not installed"):
        linear_gelu()


def test_explain_and_modules_say_who_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    block = FusedBlock(32, 2, 64).bfloat16()
    other = fastvit_kernels.FusedLayerNorm(32).bfloat16()
    with dispatch.using("triton,gemm=quack"):
        assert "runs=triton, gemm=quack\n" in repr(block) and "gemm" not in repr(other)
        assert "quack with GELU, cublas without (asked for)" in fastvit_kernels.explain()
        assert "gemm=error (needs bf16 or fp16 on a GPU)" in repr(FusedBlock(32, 2, 64))
    with dispatch.using("triton"):
        assert "gemm" not in repr(block)
    fake_quack.install(monkeypatch, "0.9")
    with dispatch.using("triton,gemm=quack"):
        assert "gemm=error (quack-kernels 0.9 is installed, and this package knows" in repr(block)
        assert "(asked for; error: quack-kernels 0.9 is installed" in fastvit_kernels.explain()
    with dispatch.using("gemm=quack,*=reference"):
        assert "runs=reference\n" in repr(block)


def test_explain_says_what_runs_in_place_of_what_the_table_has(monkeypatch: pytest.MonkeyPatch) -> None:
    with table.using(by_table()):
        said = "quack_gemm: the table has 2 products with GELU for QuACK, which run in "
        assert dispatch.line_on_quack("X90") == [said + "quack"]
        fake_quack.install(monkeypatch, "0.9")
        (line,) = dispatch.line_on_quack("X90")
        assert line.startswith(said + "cublas, as quack-kernels 0.9 is installed")
    assert dispatch.line_on_quack("X90") == []


def test_the_fake_has_the_signatures_of_the_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    faked = {(module, name): found(module, name) for module, name, _ in libraries.USED}
    monkeypatch.undo()
    if libraries.unusable() == "quack-kernels is not installed":
        pytest.skip("quack is not installed")
    for (module, name), function in faked.items():
        assert list(inspect.signature(found(module, name)).parameters) == list(inspect.signature(function).parameters)


def found(module: str, name: str) -> Any:
    function = importlib.import_module(module)
    for part in name.split("."):
        function = getattr(function, part)
    return function
