import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastvit_kernels import FusedBlock, attention_block, dispatch, explain, layer_norm_mlp, transformer_block
from fastvit_kernels.block import op
from fastvit_kernels.gemm import config
from fastvit_kernels.residual import draw_path_scale
from tests.in_full import IN_FULL, in_full
from tests.kernels.numerics import assert_accurate
from tests.kernels.test_attention_block import block_inputs, plain_block
from tests.kernels.test_mlp import inputs as mlp_inputs
from tests.kernels.test_mlp import plain_mlp

pytestmark = pytest.mark.usefixtures("implementation")

BLOCK = {"heads": 2, "eps": 1e-6}
only_kernels = "does not apply: a promise of the kernels alone"


def inputs(batch: int, tokens: int, width: int, hidden: int, scaled: bool = True) -> dict[str, Tensor]:
    first, second = block_inputs(batch, tokens, width, scaled), mlp_inputs(batch, tokens, width, hidden, scaled)
    del second["x"]
    names = {"norm_weight": "norm{}_weight", "norm_bias": "norm{}_bias", "layer_scale": "layer_scale{}"}
    renamed = {names.get(name, name).format(1): tensor for name, tensor in first.items()}
    return renamed | {names.get(name, name).format(2): tensor for name, tensor in second.items()}


def halves(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The arguments of the two half-blocks; the second without its x."""
    mine = {name: tensor for name, tensor in tensors.items() if not name.startswith("fc") and not name.endswith("2")}
    mine = {n.replace("norm1", "norm").replace("scale1", "scale"): t for n, t in mine.items() if "norm2" not in n}
    others = {n: t for n, t in tensors.items() if n.startswith(("fc", "norm2")) or n == "layer_scale2"}
    return mine, {n.replace("norm2", "norm").replace("scale2", "scale"): t for n, t in others.items()}


def plain(path_scales: tuple[Tensor, Tensor] | None = None, causal: bool = False, **tensors: Tensor) -> Tensor:
    first, second = halves(tensors)
    x = first["x"]
    y = plain_block(**first, causal=causal)
    if path_scales is not None:
        y = x + path_scales[0].to(x.dtype)[:, None, None] * (y - x)
    z = plain_mlp(y, **second)
    return z if path_scales is None else y + path_scales[1].to(x.dtype)[:, None, None] * (z - y)


def leaves(device: torch.device, dtype: torch.dtype, *shape: int, scaled: bool = True) -> dict[str, Tensor]:
    return {name: t.to(device, dtype).requires_grad_() for name, t in inputs(*shape, scaled=scaled).items()}


def run(arguments: dict[str, Tensor], **options: object) -> list[Tensor]:
    """Output, and gradients of what requires one."""
    y = transformer_block(**arguments, **BLOCK, **options)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y, *torch.autograd.grad(y, [t for t in arguments.values() if t.requires_grad], cotangent)]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


QUICK = [((3, 5, 80, 100), True, torch.bfloat16), ((2, 17, 34, 65), False, torch.bfloat16),
         ((3, 5, 80, 100), False, torch.float32)]  # fmt: skip
FULL = list(
    itertools.product([(1, 1, 64, 256), (3, 5, 80, 100), (2, 17, 34, 65)], [False, True],
                      [torch.float32, torch.bfloat16, torch.float16])
)  # fmt: skip


@pytest.mark.parametrize(("shape", "scaled", "dtype"), QUICK + [in_full(*case) for case in FULL if case not in QUICK])
def test_matches_independent_formulation(
    shape: tuple[int, ...], scaled: bool, dtype: torch.dtype, device: torch.device
) -> None:
    assert_accurate(partial(transformer_block, **BLOCK), plain, inputs(*shape, scaled=scaled), dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "width"), [(197, 768), (257, 1280)])
def test_production_sizes(tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("too slow without a GPU")
    arguments = inputs(16, tokens, width, 4 * width)
    ours = partial(transformer_block, heads=16, eps=1e-6)

    def plain_16(**tensors: Tensor) -> Tensor:
        first, second = halves(tensors)
        return plain_mlp(plain_block(**first, heads=16), **second)

    assert_accurate(ours, plain_16, arguments, dtype, device)


def test_causal(device: torch.device) -> None:
    ours = partial(transformer_block, **BLOCK, causal=True)
    assert_accurate(ours, partial(plain, causal=True), inputs(2, 5, 16, 24), torch.float32, device)


def test_products_may_run_in_triton(device: torch.device) -> None:
    with config.triton_for(*config.PRODUCTS):
        assert_accurate(partial(transformer_block, **BLOCK), plain, inputs(3, 5, 40, 72), torch.bfloat16, device)


@pytest.mark.parametrize("scaled", [False, True])
def test_gradients_with_drop_path(scaled: bool, device: torch.device) -> None:
    def scales() -> tuple[Tensor, Tensor]:
        torch.manual_seed(7)
        drawn = tuple(draw_path_scale(torch.empty(6, device=device), 0.4) for _ in range(2))
        assert not torch.equal(*drawn)
        return drawn

    def redrawn(**tensors: Tensor) -> Tensor:
        torch.manual_seed(7)
        return transformer_block(**tensors, **BLOCK, drop_path=0.4)

    arguments = inputs(6, 3, 40, 72, scaled=scaled)
    assert_accurate(redrawn, partial(plain, scales()), arguments, torch.float32, device)


def test_recomputation_changes_no_bit(device: torch.device) -> None:
    arguments = leaves(device, torch.bfloat16, 3, 5, 40, 72)
    kept = run(arguments, recompute="none")
    for recompute in ("gelu", "all"):
        assert equal(kept, run(arguments, recompute=recompute))
    assert equal(kept, run(arguments, recompute="none"))  # and no run differs from another


@pytest.mark.parametrize(
    ("recompute", "frozen", "numbers"),
    [
        ("none", "", 6 + 1 + 9),  # of the width 40 with a hidden width of 160
        ("gelu", "", 6 + 1 + 5),
        ("all", "", 5 + 1 + 4),
        ("gelu", "qkv_weight fc1_weight", 5 + 1 + 4),
    ],
)
def test_bytes_kept_for_the_backward_pass(
    recompute: str, frozen: str, numbers: int, implementation: str, device: torch.device
) -> None:
    """`numbers` times the width for each token, a float32 for each head and four statistics."""
    if implementation == "reference":
        pytest.skip(only_kernels)
    arguments = leaves(device, torch.bfloat16, 3, 5, 40, 160)
    for name in frozen.split():
        arguments[name].requires_grad_(False)
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        transformer_block(**arguments, **BLOCK, recompute=recompute)
    given = {t.untyped_storage().data_ptr() for name, t in arguments.items() if name != "x"}
    size = sum(size for pointer, size in kept.items() if pointer not in given)
    assert size == 3 * 5 * (numbers * 40 * 2 + 2 * 4 + 4 * 4)


def test_nothing_is_kept_without_a_gradient(
    implementation: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if implementation == "reference":
        pytest.skip(only_kernels)
    outputs: list[tuple[Tensor, ...]] = []
    launch = op.transformer_block_op
    monkeypatch.setattr(op, "call_operator", lambda *args: outputs.append(launch(*args)) or outputs[-1][0])
    arguments = leaves(device, torch.float32, 1, 3, 16, 24)
    expected = transformer_block(**arguments, **BLOCK)
    with torch.no_grad():
        y = transformer_block(**arguments, **BLOCK)
    frozen = transformer_block(**{name: tensor.detach() for name, tensor in arguments.items()}, **BLOCK)
    assert torch.equal(y, expected) and torch.equal(frozen, expected)
    assert [[output.numel() for output in op_outputs[1:]] for op_outputs in outputs[1:]] == [[0] * 12] * 2


GROUPS = [
    "x",
    "norm1_weight",
    "qkv_bias",
    "qkv_weight proj_bias",
    "proj_weight",
    "proj_bias",
    "layer_scale1",
    "norm2_weight norm2_bias",
    "fc1_weight",
    "fc1_bias fc2_bias",
    "fc2_weight",
    "fc2_bias",
    "layer_scale2",
    "proj_bias fc2_bias",
]


@pytest.mark.parametrize("scaled", [False, True])
def test_some_learn_alone(scaled: bool, implementation: str, device: torch.device) -> None:
    """Whatever is frozen, the gradients of the others are as if nothing were."""
    if implementation == "reference":
        pytest.skip(only_kernels)
    arguments = leaves(device, torch.float32, 1, 3, 16, 24, scaled=scaled)
    every = dict(zip(arguments, run(arguments)[1:], strict=True))
    for group in GROUPS:
        trained = set(group.split()) & set(arguments)
        some = {name: tensor.detach().requires_grad_(name in trained) for name, tensor in arguments.items()}
        if not trained:
            continue
        gradients = run(some)[1:]
        wanted = [every[name] for name in some if name in trained]
        for gradient, expected in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6, msg=group)


class Calls(TorchDispatchMode):
    """Counts products, and the numbers that PyTorch's own operators copy."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[str] = []
        self.copied: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = function.name()
        launch = {
            "fastvit::transformer_block": op.launch_forward,
            "fastvit::transformer_block_backward": op.launch_backward,
        }
        if name in launch:  # below it, no mode is asked
            with self:
                return launch[name](*args)
        if name in ("aten::mm", "aten::addmm"):
            self.products.append(name)
        elif name in ("aten::_to_copy", "aten::clone", "aten::copy_", "aten::add.Tensor", "aten::sum.dim_IntList"):
            self.copied.append(args[0].numel())
        return function(*args, **(kwargs or {}))


@contextmanager
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Inside, kernels are not run by the interpreter, but their names are noted."""
    from triton.runtime.interpreter import GridExecutor

    names: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", lambda self, *args, **options: names.append(self.fn.__name__))
        yield names


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_launches_and_copies(
    scaled: bool, autocast: bool, implementation: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve products and eleven kernels; nothing of the size of an activation is copied, under autocast neither."""
    if implementation == "reference" or not dispatch.INTERPRETED:
        pytest.skip(only_kernels)
    arguments = leaves(device, torch.float32 if autocast else torch.bfloat16, 64, 40, 16, 24, scaled=scaled)
    with launches(monkeypatch) as names, Calls() as calls, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = transformer_block(**arguments, **BLOCK)
        forward = len(names)
        torch.autograd.grad(y, list(arguments.values()), torch.ones_like(y))
    assert forward == 5 and calls.products.count("aten::mm") + calls.products.count("aten::addmm") == 12
    assert names.count("layer_norm_bwd_kernel") == names.count("layer_norm_fwd_kernel") == 2
    # LayerScale: its gradient and its sums, twice; else, with autocast, the gradient in the dtype of the products
    expected = {(False, False): 11, (True, False): 16, (False, True): 12, (True, True): 16}
    assert len(names) == expected[scaled, autocast], names
    assert max(calls.copied, default=0) < 64 * 40 * 16


@pytest.mark.parametrize("low", [torch.bfloat16, in_full(torch.float16)])
def test_autocast_computes_products_in_its_dtype(low: torch.dtype, device: torch.device) -> None:
    arguments = leaves(device, torch.float32, 3, 5, 40, 72)
    full = run(arguments)
    with torch.autocast(device.type, low):
        autocast = run(arguments)
    assert [t.dtype for t in autocast] == [torch.float32] * len(full)
    for result, expected in zip(autocast, full, strict=True):
        error = (result - expected).abs().max() / expected.abs().max()
        assert 0 < error < 12 * torch.finfo(low).eps
    zeros = {name: torch.zeros_like(arguments[name]) for name in ("proj_weight", "proj_bias", "fc2_weight", "fc2_bias")}
    with torch.autocast(device.type, low):  # the residual stream stays float32
        assert torch.equal(transformer_block(**arguments | zeros, **BLOCK), arguments["x"])


def test_equals_its_halves(device: torch.device, implementation: str) -> None:
    arguments = leaves(device, torch.float32, 2, 5, 16, 24)
    ours = run(arguments)
    first, second = halves(arguments)
    y = layer_norm_mlp(attention_block(**first, **BLOCK), **second, eps=1e-6)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    theirs = [y, *torch.autograd.grad(y, list(arguments.values()), cotangent)]
    for result, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_dropout_runs_the_halves(device: torch.device) -> None:
    arguments = leaves(device, torch.float32, 2, 3, 16, 24)
    torch.manual_seed(3)
    y = transformer_block(**arguments, **BLOCK, dropout=0.3)
    first, second = halves(arguments)
    torch.manual_seed(3)
    expected = layer_norm_mlp(attention_block(**first, **BLOCK, dropout=0.3), **second, eps=1e-6, dropout=0.3)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("more", [{}, {"outputs": 2}], ids=["block", "halves"])
def test_activation_checkpointing(reentrant: bool, more: dict[str, int], device: torch.device) -> None:
    """As one operator and, with `outputs`, as several, between which PyTorch's own run."""
    arguments = leaves(device, torch.float32, 2, 3, 16, 24)
    expected = run(arguments, **more)
    others = {name: tensor for name, tensor in arguments.items() if name != "x"}
    y = checkpoint(lambda x: transformer_block(x, **others, **BLOCK, **more), arguments["x"], use_reentrant=reentrant)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y))
    assert equal([y, *(tensor.grad for tensor in arguments.values())], expected)


def test_compiles_without_graph_break(implementation: str, device: torch.device) -> None:
    if implementation == "reference" and not IN_FULL:
        pytest.skip("does not apply: the tests of the halves compile them")
    arguments = leaves(device, torch.float32, 3, 3, 16, 24)
    compiled = torch.compile(
        lambda **tensors: transformer_block(**tensors, **BLOCK).sin(), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for batch, frozen, autocast in ((3, "", False), (2, "qkv_weight", False), (2, "", True)):
        tensors = arguments | {"x": arguments["x"][:batch].detach().requires_grad_()}
        tensors = {name: tensor.detach() if name == frozen else tensor for name, tensor in tensors.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            result, expected = compiled(**tensors), transformer_block(**tensors, **BLOCK).sin()
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
        trained = [tensor for tensor in tensors.values() if tensor.requires_grad]
        for actual, wanted in zip(*(torch.autograd.grad(y.sum(), trained) for y in (result, expected)), strict=True):
            torch.testing.assert_close(actual, wanted)


def test_registered_operator(implementation: str, device: torch.device) -> None:
    if implementation == "reference":
        pytest.skip("does not apply: the operator is Triton's")
    tensors = leaves(device, torch.float32, 2, 3, 16, 24)
    ordered = [tensors[name] for name in op.LEARNED]
    scales = [torch.tensor([0.0, 1.5], device=device)] * 2
    rest = 2, 1e-6, False, True
    torch.library.opcheck(op.transformer_block_op, (*ordered, *scales, *rest, True, True, True, True, True, False))
    ordered[op.LEARNED.index("layer_scale1")] = ordered[op.LEARNED.index("layer_scale2")] = None
    frozen = [None if tensor is None else tensor.detach() for tensor in ordered]
    torch.library.opcheck(op.transformer_block_op, (*frozen, None, None, *rest, *[False] * 6))


def test_second_derivative_is_refused(implementation: str, device: torch.device) -> None:
    if implementation == "reference":
        pytest.skip("does not apply: PyTorch's attention decides")
    arguments = leaves(device, torch.float32, 2, 3, 16, 24)
    y = transformer_block(**arguments, **BLOCK).sin()
    gradient = torch.autograd.grad(y.sum(), arguments["x"], create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="transformer_block has no second derivative"):
        gradient.sum().backward()


def test_empty_batch(device: torch.device) -> None:
    y, *gradients = run(leaves(device, torch.float32, 0, 5, 16, 24))
    assert y.shape == (0, 5, 16)
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("layout", ["transposed", "expanded"])
def test_non_contiguous_gradient_and_parameters(layout: str, device: torch.device) -> None:
    arguments = leaves(device, torch.float32, 2, 3, 16, 24, scaled=layout == "expanded")
    strided = {n: t.detach() for n, t in arguments.items()}
    strided = {
        n: t.T.contiguous().T if t.ndim == 2 else t.repeat_interleave(2, -1)[..., ::2] for n, t in strided.items()
    }
    strided = {name: tensor.requires_grad_() for name, tensor in strided.items()}
    if layout == "transposed":
        gradient = torch.randn(3, 2, 16, device=device).transpose(0, 1)
    else:
        gradient = torch.randn(16, device=device).expand(2, 3, 16)
    expected = torch.autograd.grad(plain(**arguments), list(arguments.values()), gradient)
    ours = torch.autograd.grad(transformer_block(**strided, **BLOCK), list(strided.values()), gradient)
    for result, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-4)


def test_module_uses_the_operator(implementation: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    registered = op.call_operator
    monkeypatch.setattr(op, "call_operator", lambda *arguments: calls.append(1) or registered(*arguments))
    x, module = torch.randn(1, 3, 8, device=device), FusedBlock(8, 2, 20, layer_scale=0.1).to(device)
    result = module(x)
    with dispatch.using("reference"):
        torch.testing.assert_close(result, module(x))
    assert len(calls) == (implementation == "triton")


def test_explain_says_that_there_are_kernels() -> None:
    line = next(line for line in explain().splitlines() if line.startswith("block"))
    assert "no Triton kernel" not in line


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 8)}, ValueError, r"x must have shape \[B, N, D\]"),
        ({"heads": 3}, ValueError, "heads must divide the width 8"),
        ({"norm1_weight": torch.ones(1)}, ValueError, "norm1_weight must have shape"),
        ({"norm2_bias": torch.ones(9)}, ValueError, "norm2_bias must have shape"),
        ({"qkv_weight": torch.zeros(8, 24)}, ValueError, r"qkv_weight must have shape \[24, 8\]"),
        ({"proj_weight": torch.zeros(8, 8, dtype=torch.bfloat16)}, TypeError, "proj_weight must be torch.float32"),
        ({"fc1_weight": torch.zeros(16, 9)}, ValueError, r"fc1_weight must have shape \[16, 8\]"),
        ({"fc2_weight": torch.zeros(16, 8)}, ValueError, r"fc2_weight must have shape \[8, 16\]"),
        ({"layer_scale2": torch.zeros(1)}, ValueError, "layer_scale2 must have shape"),
        ({"activation": "relu"}, ValueError, "activation must be one of gelu, gelu_tanh, got 'relu'"),
        ({"recompute": "some"}, ValueError, "recompute must be one of none, gelu, all, got 'some'"),
        ({"dropout": 1.0}, ValueError, "dropout must be at least 0 and below 1"),
        ({"drop_path": -1.0}, ValueError, "drop_path must be at least 0"),
    ],
)
def test_errors_name_the_argument(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        transformer_block(**(inputs(2, 3, 8, 16) | BLOCK | change))
