"""Relative position embeddings: a bias of attention that depends on the query and its distance from the key."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fastvit_kernels import FusedAttention, FusedBlock, attention, attention_block, transformer_block
from fastvit_kernels.attention import relative_bias
from tests.in_full import in_full
from tests.kernels.numerics import assert_accurate
from tests.kernels.test_attention_block import EPS
from tests.kernels.test_block import BLOCK, halves, inputs
from tests.kernels.test_mlp import plain_mlp

pytestmark = pytest.mark.usefixtures("implementation")


def plain_relative_block(rel_pos_embed: Tensor, heads: int = 2, **tensors: Tensor) -> Tensor:
    """A whole block whose scores are (q · k + q · r) / sqrt(d), r looked up for each query and key."""
    first, second = halves(tensors)
    x, width = first["x"], first["x"].shape[-1]
    tokens, head_dim = x.shape[1], width // heads
    wide = x if x.dtype == torch.float64 else x.float()
    centred = wide - wide.mean(dim=-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + EPS)
    normed = (normed * first["norm_weight"] + first["norm_bias"]).to(x.dtype)
    projected = normed @ first["qkv_weight"].T + first["qkv_bias"]
    q, k, v = (part.unflatten(-1, (heads, head_dim)) for part in projected.chunk(3, dim=-1))  # [B, N, H, d]
    places = torch.arange(tokens, device=x.device)
    vectors = rel_pos_embed[places[:, None] - places + tokens - 1]  # [N, N, d]
    scores = torch.einsum("bihd,bjhd->bhij", q, k) + torch.einsum("bihd,ijd->bhij", q, vectors)
    probabilities = (scores / head_dim**0.5).softmax(dim=-1)
    attended = torch.einsum("bhij,bjhd->bihd", probabilities, v).flatten(-2)
    branch = attended @ first["proj_weight"].T + first["proj_bias"]
    return plain_mlp(x + branch * first.get("layer_scale", 1), **second)


def relative_inputs(batch: int, tokens: int, width: int, hidden: int) -> dict[str, Tensor]:
    table = {"rel_pos_embed": torch.randn(2 * tokens - 1, width // 2)}
    return table | inputs(batch, tokens, width, hidden)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 5, 40, 24), torch.bfloat16),
        ((1, 17, 34, 24), torch.float32),
        in_full((2, 3, 32, 24), torch.float32),
        in_full((3, 2, 34, 24), torch.float16),
    ],
)
@pytest.mark.parametrize("outputs", [None, 1, 2], ids=lambda n: f"outputs {n}")
def test_equals_the_independent_formulation(
    shape: tuple[int, ...], dtype: torch.dtype, outputs: int | None, device: torch.device
) -> None:
    if outputs is not None and outputs > shape[1]:
        pytest.skip("does not apply: fewer tokens")

    def plain(**tensors: Tensor) -> Tensor:
        return plain_relative_block(**tensors)[:, :outputs]

    ours = partial(transformer_block, **BLOCK, outputs=outputs)
    assert_accurate(ours, plain, relative_inputs(*shape), dtype, device)


@pytest.mark.parametrize("outputs", [None, 1])
def test_one_token_has_no_distance_from_others(outputs: int | None, device: torch.device) -> None:
    arguments = {name: t.to(device) for name, t in relative_inputs(2, 1, 32, 24).items()}
    with_table = transformer_block(**arguments, **BLOCK, outputs=outputs)
    del arguments["rel_pos_embed"]
    torch.testing.assert_close(with_table, transformer_block(**arguments, **BLOCK), rtol=1e-5, atol=1e-5)


def test_row_of_the_table_is_query_minus_key(device: torch.device) -> None:
    table, queries = torch.zeros(7, 2, device=device), torch.ones(1, 4, 1, 2, device=device)
    table[:, 0] = torch.arange(7)
    expected = [[3, 2, 1, 0], [4, 3, 2, 1], [5, 4, 3, 2], [6, 5, 4, 3]]
    for count in (4, 2, 1):
        bias = relative_bias(queries[:, :count], table)
        assert bias.shape == (1, 1, count, 4)
        torch.testing.assert_close(bias[0, 0].cpu() * 2**0.5, torch.tensor(expected[:count]).float())


@pytest.mark.parametrize("mode", ["mask", "subset"])
def test_module_has_a_table_for_all_heads(mode: str, device: torch.device) -> None:
    block = FusedBlock(16, 2, 24, drop_path=0.5, drop_path_mode=mode, relative_tokens=5).to(device).eval()
    assert block.state_dict()["attn.rel_pos_embed"].shape == (9, 8)
    x, plain = torch.randn(4, 5, 16, device=device), FusedBlock(16, 2, 24).to(device).eval()
    plain.load_state_dict({name: t for name, t in block.state_dict().items() if "rel_pos" not in name})
    torch.testing.assert_close(block(x), plain(x))  # a table of zeros
    nn.init.normal_(block.attn.rel_pos_embed)
    assert (block(x) - plain(x)).abs().max() > 1e-3
    y = block.train()(x)  # each half drops images of its own
    (gradient,) = torch.autograd.grad(y.square().sum(), [block.attn.rel_pos_embed])
    assert gradient.shape == (9, 8) and gradient.abs().sum() > 0


def test_attention_module_is_the_function(device: torch.device) -> None:
    module, x = FusedAttention(16, 2, relative_tokens=5).to(device), torch.randn(2, 5, 16, device=device)
    nn.init.normal_(module.rel_pos_embed)
    qkv = module.qkv(x).unflatten(-1, (3, 2, 8))
    bias = relative_bias(qkv[:, :, 0], module.rel_pos_embed)
    torch.testing.assert_close(module(x), module.proj(attention(qkv, bias=bias)))


def test_gradients_are_the_same_bits_each_time(device: torch.device) -> None:
    arguments = {n: t.to(device, torch.bfloat16).requires_grad_() for n, t in relative_inputs(2, 5, 40, 24).items()}

    def run() -> list[Tensor]:
        return list(torch.autograd.grad(transformer_block(**arguments, **BLOCK).sum(), list(arguments.values())))

    assert all(map(torch.equal, run(), run()))


def test_autocast(device: torch.device) -> None:
    arguments = {name: t.to(device) for name, t in relative_inputs(2, 5, 40, 24).items()}
    full = transformer_block(**arguments, **BLOCK)
    with torch.autocast(device.type, torch.bfloat16):
        result = transformer_block(**arguments, **BLOCK)
    error = (result - full).abs().max() / full.abs().max()
    assert result.dtype == torch.float32 and 0 < error < 12 * torch.finfo(torch.bfloat16).eps


def test_compiles_without_graph_break(device: torch.device) -> None:
    block, x = FusedBlock(16, 2, 24, relative_tokens=5).to(device), torch.randn(2, 5, 16, device=device)
    nn.init.normal_(block.attn.rel_pos_embed)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), block(x))
    torch.testing.assert_close(compiled(x, outputs=1), block(x, outputs=1))


@pytest.mark.parametrize("half", [False, True])
def test_what_does_not_fit_is_refused(half: bool, device: torch.device) -> None:
    arguments = {name: t.to(device) for name, t in relative_inputs(2, 5, 40, 24).items()}
    table = arguments.pop("rel_pos_embed")
    call = partial(attention_block, **halves(arguments)[0], **BLOCK)
    if not half:
        call = partial(transformer_block, **arguments, **BLOCK)
    with pytest.raises(ValueError, match=r"rel_pos_embed must have shape \[9, 20\], got \[8, 20\]"):
        call(rel_pos_embed=table[1:])
    with pytest.raises(TypeError, match="rel_pos_embed"):
        call(rel_pos_embed=table.double())
    with pytest.raises(ValueError, match="rel_pos_embed cannot be combined with causal"):
        call(rel_pos_embed=table, causal=True)
