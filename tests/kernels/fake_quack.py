"""QuACK 0.6.5 as far as this package calls it, on tensors of the CPU: the same names, signatures and demands.

Epilogues run as they are written, on whole matrices of float32 instead of on one number at a time.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastvit_kernels import dispatch, libraries
from fastvit_kernels.gemm import quack

VERSION = "0.6.5"
FAKED = "fastvit_kernels.gemm.quack_kernels"


class F2(NamedTuple):
    lo: Any
    hi: Any


def sigmoid(x: Tensor, *, loc: Any = None, ip: Any = None) -> Tensor:
    return torch.sigmoid(x)


def pexp2(v: Tensor) -> Tensor:
    return torch.exp2(v)


def erf(number: Tensor, fastmath: bool = False, *, loc: Any = None, ip: Any = None) -> Tensor:
    return torch.erf(number)


class RowVecLoad:
    def __init__(self, name: str) -> None:
        self.name = name


class RowVecReduce:
    def __init__(self, name: str, combine: str = "add", scaled: bool = False, check_oob: bool | None = None) -> None:
        assert (combine, scaled) == ("add", False)
        self.name = name


@dataclass(frozen=True)
class GemmConfig:
    tile_m: int = 128
    tile_n: int = 192
    tile_k: int | None = None
    num_warps: int | None = None
    pingpong: bool = True
    is_dynamic_persistent: bool = True
    cluster_m: int = 2
    cluster_n: int = 1
    cluster_k: int = 1
    split_k: int = 1
    swap_ab: bool = False
    max_swizzle_size: int = 8
    device_capacity: int = 9
    use_tma_gather: bool = False


class EpiMod:
    def __init__(self, fn: Any, outputs: Any, ops: Any, reduces: Any) -> None:
        self.fn, self.outputs, self.ops, self.reduces = fn, tuple(outputs), ops or {}, reduces or {}
        names = fn.__code__.co_varnames[: fn.__code__.co_argcount]
        assert names[0] == "acc" and set(names[1:]) == {*self.ops, *(("c",) if "c" in names else ())}
        self.takes_c = "c" in names

    def __call__(
        self,
        A: Tensor,
        B: Tensor,
        C: Tensor | None = None,
        *,
        out: dict[str, Tensor] | None = None,
        out_dtype: Any = None,
        store_d: bool = True,
        config: Any = None,
        tuned: bool = True,
        dynamic_scheduler: bool = False,
        cu_seqlens_m: Any = None,
        A_idx: Any = None,
        SFA: Any = None,
        SFB: Any = None,
        bs_format_a: Any = None,
        bs_format_b: Any = None,
        rounding_mode: Any = None,
        epi_key_overrides: Any = None,
        concat_layout: Any = None,
        transform_a: Any = None,
        transform_sf: Any = None,
        transform_operands: Any = None,
        add_to_output: bool = False,
        **operands: Tensor,
    ) -> dict[str, Tensor]:
        calls.append(SimpleNamespace(epilogue=self.fn.__name__, config=config, out=out, operands=operands))
        assert config is not None and not tuned, "it would search by itself"
        (m, k), (k_of_b, n) = A.shape, B.shape
        assert k == k_of_b and A.dtype == B.dtype and A.dtype in (torch.bfloat16, torch.float16)
        for matrix in (A, B, *(out or {}).values(), *([] if C is None else [C])):
            major, minor = sorted(matrix.stride(), reverse=True)
            assert minor == 1 and major * matrix.element_size() % 16 == 0 and matrix.data_ptr() % 16 == 0
        assert (C is not None) == self.takes_c and (C is None or C.shape == (m, n))
        assert out is not None and set(out) == {*self.outputs, *(["D"] if store_d else [])}
        assert all(tensor.shape == (m, n) and tensor.dtype == A.dtype for tensor in out.values())
        assert set(operands) == {*self.ops, *self.reduces}
        given = {name: value.float() for name, value in operands.items() if name in self.ops}
        assert all(vector.shape == (1, n) for vector in given.values())
        result = self.fn(A.float() @ B.float(), **given, **({} if C is None else {"c": C.float()}))
        assert set(result) == {"D", *self.outputs, *self.reduces}
        for name, tensor in out.items():
            tensor.copy_(result[name])
        for name in self.reduces:
            sums = operands[name]
            assert sums.shape == (math.ceil(m / config.tile_m), n) and sums.dtype == torch.float32
            for tile, rows in enumerate(result[name].split(config.tile_m)):
                sums[tile] = rows.sum(0)
        return out


def gemm_epilogue(
    outputs: Any = (),
    ops: Any = None,
    reduces: Any = None,
    mode: Any = None,
    paired: Any = (),
    outs: Any = None,
    prepass: Any = None,
    prepass_outs: Any = (),
    extra_ops: Any = (),
    vectorize: Any = None,
) -> Callable[[Any], EpiMod]:
    return lambda fn: EpiMod(fn, outputs, ops, reduces)


calls: list[Any] = []  # since the last `install`

MODULES: dict[str, dict[str, Any]] = {
    "cutlass": {
        "BFloat16": torch.bfloat16,
        "Float16": torch.float16,
        "Float32": torch.float32,
        "cute": SimpleNamespace(math=SimpleNamespace(erf=erf)),
    },
    "quack": {"__version__": VERSION},
    "quack.activation": {"sigmoid": sigmoid},
    "quack.epilogue": {"F2": F2, "EpiMod": EpiMod, "gemm_epilogue": gemm_epilogue},
    "quack.epilogue.math": {"pexp2": pexp2},
    "quack.epilogue.ops": {"RowVecLoad": RowVecLoad, "RowVecReduce": RowVecReduce},
    "quack.gemm_config": {"GemmConfig": GemmConfig},
}


def install(monkeypatch: pytest.MonkeyPatch, version: str = VERSION) -> None:
    """Makes it the QuACK of this process until the end of the test; what is on the CPU counts as on a GPU."""
    calls.clear()
    for name, members in MODULES.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, FAKED, None)  # the one that imports it is imported anew
    monkeypatch.delitem(sys.modules, FAKED)
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: version if name == libraries.QUACK else real(name))
    monkeypatch.setattr(dispatch, "is_on_gpu", lambda tensor: True)
    libraries.unusable.cache_clear()
    quack.warn.cache_clear()
