"""A block whose result has its first tokens alone is the whole block, as far as these are concerned."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastvit_kernels import FusedBlock, attention_block, transformer_block
from tests.in_full import IN_FULL, in_full
from tests.kernels.numerics import assert_accurate
from tests.kernels.test_attention_block import block_inputs
from tests.kernels.test_block import BLOCK, inputs, leaves, plain, run

pytestmark = pytest.mark.usefixtures("implementation")


@pytest.mark.parametrize(
    ("scaled", "dtype"),
    [
        (True, torch.bfloat16),
        in_full(True, torch.float32),
        in_full(False, torch.float32),
        in_full(False, torch.bfloat16),
        in_full(True, torch.float16),
    ],
)
def test_first_tokens_of_the_independent_formulation(scaled: bool, dtype: torch.dtype, device: torch.device) -> None:
    ours = partial(transformer_block, **BLOCK, outputs=2)
    assert_accurate(ours, lambda **tensors: plain(**tensors)[:, :2], inputs(3, 5, 80, 100, scaled), dtype, device)


@pytest.mark.parametrize("mode", ["mask", "subset"])
def test_module_drops_the_paths_that_it_drops_in_the_whole_block(mode: str, device: torch.device) -> None:
    torch.manual_seed(0)
    block = FusedBlock(16, 2, 24, drop_path=0.5, layer_scale=0.5, drop_path_mode=mode).to(device)
    x = torch.randn(6, 5, 16, device=device, requires_grad=True)
    cotangent = torch.randn(6, 1, 16, device=device)

    def outcome(first: Callable[[], Tensor]) -> list[Tensor]:
        torch.manual_seed(3)
        y = first()
        return [y, *torch.autograd.grad(y, [x, *block.parameters()], cotangent)]

    whole = outcome(lambda: block(x)[:, :1])
    for result, expected in zip(outcome(lambda: block(x, outputs=1)), whole, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_dropout_drops_features_of_the_first_tokens(implementation: str, device: torch.device) -> None:
    if implementation == "triton" and not IN_FULL:
        pytest.skip("does not apply: dropout is PyTorch's")
    block = FusedBlock(16, 2, 24, dropout=0.5).to(device)
    x = torch.zeros(64, 3, 16, device=device)
    with torch.no_grad():
        for linear, bias in ((block.attn.proj, 1.0), (block.mlp.fc2, 4.0)):
            linear.weight.zero_()
            linear.bias.fill_(bias)
    y = block(x, outputs=1)
    assert y.shape == (64, 1, 16) and set(y.unique().tolist()) == {0.0, 2.0, 8.0, 10.0}
    assert block.eval()(x, outputs=1).unique().tolist() == [5.0]


@pytest.mark.parametrize("recompute", ["none", "all"])
def test_autocast(recompute: str, device: torch.device) -> None:
    arguments = leaves(device, torch.float32, 3, 5, 40, 72)
    full = run(arguments, outputs=1)
    with torch.autocast(device.type, torch.bfloat16):
        results = run(arguments, outputs=1, recompute=recompute)
    assert [tensor.dtype for tensor in results] == [torch.float32] * len(full)
    for result, expected in zip(results, full, strict=True):
        error = (result - expected).abs().max() / expected.abs().max()
        assert 0 < error < 12 * torch.finfo(torch.bfloat16).eps


def test_all_tokens_are_the_whole_block(device: torch.device) -> None:
    arguments = leaves(device, torch.float32, 2, 3, 16, 24)
    assert all(map(torch.equal, run(arguments, outputs=3), run(arguments)))


def test_compiles_without_graph_break(implementation: str, device: torch.device) -> None:
    if implementation == "reference" and not IN_FULL:
        pytest.skip("does not apply: PyTorch's operations alone")
    arguments = leaves(device, torch.float32, 2, 3, 16, 24)
    compiled = torch.compile(partial(transformer_block, **BLOCK, outputs=1), fullgraph=True, backend="aot_eager")
    y = compiled(**arguments)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    results = [y, *torch.autograd.grad(y, list(arguments.values()), cotangent)]
    for result, expected in zip(results, run(arguments, outputs=1), strict=True):
        torch.testing.assert_close(result, expected)


def test_products_of_other_tokens_are_keys_and_values_alone(implementation: str, device: torch.device) -> None:
    batch, tokens, width, hidden, outputs = 2, 7, 16, 24, 1
    arguments = leaves(device, torch.float32, batch, tokens, width, hidden)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        y = transformer_block(**arguments, **BLOCK, outputs=outputs)
        forward = counter.get_total_flops()
    keys_and_values, scores = tokens * 2 * width**2, outputs * tokens * width
    of_outputs = outputs * (2 * width**2 + 2 * width * hidden)
    assert forward == 2 * batch * (keys_and_values + 2 * scores + of_outputs)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    scores *= 4 if implementation == "reference" else 5  # the kernels compute q k^T again
    assert counter.get_total_flops() == 2 * batch * (2 * keys_and_values + scores + 2 * of_outputs)


def test_causal(device: torch.device) -> None:
    arguments = {name: tensor.to(device) for name, tensor in block_inputs(2, 5, 16).items()}
    whole = attention_block(**arguments, **BLOCK, causal=True)
    torch.testing.assert_close(attention_block(**arguments, **BLOCK, causal=True, outputs=2), whole[:, :2])
    arguments = leaves(device, torch.float32, 2, 5, 16, 24)
    whole = transformer_block(**arguments, **BLOCK, causal=True)
    torch.testing.assert_close(transformer_block(**arguments, **BLOCK, causal=True, outputs=2), whole[:, :2])


@pytest.mark.parametrize("outputs", [0, 4, -1])
def test_number_is_checked(outputs: int) -> None:
    message = f"outputs must be at least 1 and at most the 3 tokens of x, got {outputs}"
    with pytest.raises(ValueError, match=message):
        transformer_block(**inputs(2, 3, 8, 16), **BLOCK, outputs=outputs)
    with pytest.raises(ValueError, match=message):
        attention_block(**block_inputs(2, 3, 8), **BLOCK, outputs=outputs)
