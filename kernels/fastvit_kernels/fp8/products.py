"""The three products of a linear layer in FP8, and what decides who multiplies.

The forward product is of E4M3, with the tensor cores' own sums; those of gradients are added up in float32 after
every few of them, as `torch._scaled_mm` does without `use_fast_accum`: tensor cores of Hopper keep 14 bits of a sum.
"""

import torch
from torch import Tensor

from fastvit_kernels.dispatch import HAS_TRITON, Gpu, asked_for, compiles_only, gpu
from fastvit_kernels.fp8 import reference
from fastvit_kernels.fp8.config import tile
from fastvit_kernels.fp8.quantise import Quantised, quantise, runs_kernels
from fastvit_kernels.fp8.setting import LAYERS, Fp8, fits, obstacle
from fastvit_kernels.fp8_scales.handoff import NOTHING, Handoff, Maxima, empty_handoff, empty_maxima
from fastvit_kernels.fp8_scales.scales import E4M3
from fastvit_kernels.layer_norm.op import as_rows
from fastvit_kernels.registration import cdiv

if HAS_TRITON:
    from triton.tools.tensor_descriptor import TensorDescriptor

    from fastvit_kernels.fp8 import kernels
    from fastvit_kernels.launch import launch


class Layer:
    """One linear layer of a block within one call: quantises operands, and multiplies them.

    Matrices are [tokens, columns] with adjacent columns, the weight [out, in].
    """

    def __init__(
        self,
        fp8: Fp8,
        name: str,
        weight: Tensor,
        *,
        learns: bool = False,
        passes_on: bool = False,
        one_gradient: bool = True,
    ) -> None:
        """learns, passes_on: whether the gradients of the weight, and of what it multiplies, are needed.

        one_gradient: whether both follow from the same gradient of the result; not with LayerScale.
        """
        if not fits(weight.shape):
            raise ValueError(f"{name} cannot compute in FP8: its weight {list(weight.shape)} is not of multiples of 16")
        self.fp8, self.weight = fp8, weight
        self.by_rows = fp8.scaling == "row"
        self.learns, self.passes_on = learns, passes_on
        self.both = learns and passes_on and one_gradient
        index = LAYERS.index(name)
        self.overflows = fp8.overflows_on(weight.device)[index : index + 1]
        self._gradient: tuple[Tensor, Quantised] | None = None  # the last one that was quantised

    def handoff(self, like: Tensor) -> Handoff:
        """What the pass that computes the operand of `forward`, with the shape of `like`, is to leave of it."""
        return empty_handoff(like, E4M3, self.by_rows, self.overflows)

    def gradient_maxima(self, like: Tensor) -> Maxima:
        """What the pass that computes the gradient of the result, with the shape of `like`, is to leave of it."""
        return empty_maxima(like, self.by_rows, rows=self.passes_on, columns=self.learns)

    def forward(self, x: Tensor, bias: Tensor | None, handoff: Handoff = NOTHING) -> Tensor:
        """x w^T + bias. handoff: what a pass has left of x; if that is x in FP8, x itself is not read."""
        weight, rows = self.quantise(self.weight, rows=True), handoff.rows
        if rows is not None:
            return multiply(rows.values, rows.inverse, weight.rows, weight.row_inverse, bias, self.weight.dtype)
        left = self.quantise(x, rows=True, maxima=handoff.maxima)
        return multiply(left.rows, left.row_inverse, weight.rows, weight.row_inverse, bias, self.weight.dtype)

    def input_gradient(self, grad: Tensor, *, maxima: Maxima | None = None) -> Tensor:
        """grad w, for grad [tokens, out]. maxima: those of grad, of rows and columns, if known."""
        weight = self.quantise(self.weight, columns=True)
        left = self._quantised_gradient(grad, maxima, rows=True)
        return multiply(
            left.rows, left.row_inverse, weight.columns, weight.column_inverse, None, self.weight.dtype, exact=True
        )

    def weight_gradient(self, grad: Tensor, x: Tensor, *, maxima: Maxima | None = None) -> Tensor:
        """grad^T x, for grad [tokens, out] and x [tokens, in]. maxima: as above."""
        left, right = self._quantised_gradient(grad, maxima, columns=True), self.quantise(x, columns=True)
        return multiply(
            left.columns, left.column_inverse, right.columns, right.column_inverse, None, self.weight.dtype, exact=True
        )

    def quantise(
        self, x: Tensor, *, rows: bool = False, columns: bool = False, maxima: Maxima | None = None
    ) -> Quantised:
        return quantise(x, E4M3, self.by_rows, self.overflows, rows=rows, columns=columns, maxima=maxima)

    def _quantised_gradient(
        self, grad: Tensor, maxima: Maxima | None, *, rows: bool = False, columns: bool = False
    ) -> Quantised:
        """Both layouts at the first of the two products, if both are needed: one pass makes them."""
        if self._gradient is not None and self._gradient[0] is grad:
            found, self._gradient = self._gradient[1], None
            return found
        found = quantise(
            grad,
            self.fp8.gradient_format,
            self.by_rows,
            self.overflows,
            rows=rows or self.both,
            columns=columns or self.both,
            maxima=maxima,
        )
        self._gradient = (grad, found) if self.both else None
        return found


def layer_of(fp8: Fp8 | None, name: str, weight: Tensor, **gradients: bool) -> Layer | None:
    """The layer, if it computes in FP8. gradients: see `Layer`."""
    if fp8 is None or name not in fp8.layers:
        return None
    return Layer(fp8, name, as_rows(weight), **gradients)


def handoff_to(layer: Layer | None, like: Tensor) -> Handoff:
    """What a pass is to leave of its result, with the shape of `like`, for the product of `layer`."""
    return NOTHING if layer is None else layer.handoff(like)


def multiply(
    a: Tensor | None,
    a_inverse: Tensor | None,
    b: Tensor | None,
    b_inverse: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    exact: bool = False,
) -> Tensor:
    """a b^T in `dtype`, plus bias [N], for FP8 a [M, K] and b [N, K], and the inverses of their scales.

    exact: added up in float32, see above. Raises RuntimeError on a GPU that has no such products.
    """
    assert a is not None and a_inverse is not None and b is not None and b_inverse is not None
    if not runs_kernels(a_inverse):
        return reference.multiply(a, a_inverse, b, b_inverse, bias, dtype)
    by_rows, (m, k), n, on = len(a_inverse) > 1 or len(b_inverse) > 1, a.shape, b.shape[0], gpu(a.device)
    if on.arch == "interpreter" or runs_triton(by_rows, exact, m, n, k, on):
        return triton_product(a, a_inverse, b, b_inverse, bias, dtype, by_rows, exact)
    if m == 0 or k == 0:
        return a.new_zeros(m, n, dtype=dtype)
    reason = None if compiles_only() else obstacle(a.device)
    if reason is not None:
        raise RuntimeError(
            f"FP8 products cannot run: {reason}; leave fp8 out, or set FASTVIT_KERNELS=auto,fp8=reference"
        )
    scales = (a_inverse[:, None], b_inverse[None, :]) if by_rows else (a_inverse.view(()), b_inverse.view(()))
    return torch._scaled_mm(
        a, b.T, scale_a=scales[0], scale_b=scales[1], bias=bias, out_dtype=dtype, use_fast_accum=not exact
    )


def runs_triton(by_rows: bool, exact: bool, m: int, n: int, k: int, on: Gpu) -> bool:
    """Whether the product [m, k] x [k, n] runs in the Triton kernel rather than in torch._scaled_mm."""
    if (asked := asked_for("gemm")) != "auto":
        return asked == "triton"
    return tile(by_rows, exact, m, n, k, on).beats_cublas


def triton_product(
    a: Tensor,
    a_inverse: Tensor,
    b: Tensor,
    b_inverse: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    by_rows: bool,
    exact: bool,
) -> Tensor:
    (m, k), n, on = a.shape, b.shape[0], gpu(a.device)
    t = tile(by_rows, exact, m, n, k, on)
    out = a.new_empty(m, n, dtype=dtype)
    descriptors = t.descriptors and min(m, n, k) > 0 and k % 16 == 0
    launch(
        kernels.fp8_gemm_kernel,
        (max(1, min(cdiv(m, t.block_m) * cdiv(n, t.block_n), on.multiprocessors)),),
        TensorDescriptor.from_tensor(a, [t.block_m, t.block_k]) if descriptors else a,
        TensorDescriptor.from_tensor(b, [t.block_n, t.block_k]) if descriptors else b,
        out,
        a_inverse,
        b_inverse,
        bias,
        m,
        n,
        k,
        BY_ROWS=by_rows,
        DESCRIPTORS=descriptors,
        EXACT=exact,
        BLOCK_M=t.block_m,
        BLOCK_N=t.block_n,
        BLOCK_K=t.block_k,
        GROUP_M=t.group_m,
        STAGES=t.stages,
        num_warps=t.warps,
    )
    return out
