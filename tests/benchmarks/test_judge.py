"""A benchmark that believes wrong results is worse than none."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.judge import Judge
from benchmarks.ops.layer_norm import EPS, torch_norm
from benchmarks.registry import Bound, Provider, functional


def verdict(case, function, **options):
    provider = Provider("someone", functional(lambda _: function), **options)
    inputs = case.inputs(0)
    return Judge(case, inputs).judge(provider, provider.make(case)(inputs))


def test_another_right_formulation_passes(case):
    assert verdict(case, torch_norm).passes


def wrong_eps(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-2)


def unwritten(x, weight, bias):
    out = torch_norm(x, weight, bias).clone()
    out[-1, -1, -1] = torch.nan
    return out


def infinite_gradient_of_the_bias(x, weight, bias):
    return torch_norm(x, weight, bias) + 0 * (bias - bias.detach()).sqrt()


def no_gradient_of_the_statistics(x, weight, bias):
    mean, var = x.detach().mean(-1, keepdim=True), x.detach().var(-1, keepdim=True, unbiased=False)
    return (x - mean) * torch.rsqrt(var + EPS) * weight + bias


def half_precision(x, weight, bias):
    return torch_norm(x.bfloat16(), weight.bfloat16(), bias.bfloat16()).float()


@pytest.mark.parametrize(
    "function", [wrong_eps, unwritten, infinite_gradient_of_the_bias, no_gradient_of_the_statistics, half_precision]
)
def test_wrong_results_do_not(case, function):
    assert not verdict(case, function).passes


def test_the_gradient_is_what_fails_where_only_that_is_wrong(case):
    assert verdict(case, no_gradient_of_the_statistics).result == "gradient of x"


def test_a_coarser_format_is_judged_by_its_own_rounding(case):
    assert verdict(case, half_precision, precision=2.0**-5).passes


def test_a_provider_that_leaves_out_gradients_is_not_compared(case):
    inputs = case.inputs(0)
    x = inputs["x"].requires_grad_()
    bound = Bound(lambda: (torch_norm(x, inputs["weight"], inputs["bias"]),), {"x": x})
    with pytest.raises(ValueError, match="takes gradients of 320 numbers, not of 384"):
        Judge(case, case.inputs(0)).judge(Provider("lazy", lambda _: lambda _: bound), bound)


def test_a_result_of_another_shape_is_not_compared(case):
    with pytest.raises(ValueError, match="output 0 has shape"):
        verdict(
            case, lambda x, weight, bias: torch_norm(x, weight, bias).flatten(0, 1)[None].expand(1, -1, -1)[0][None]
        )


def changing(x, weight, bias):
    with torch.no_grad():
        x.mul_(2)
    return torch_norm(x, weight, bias)


@pytest.mark.parametrize(
    "function, said",
    [
        (lambda **given: None, "gives NoneType, not tensors"),
        (lambda **given: 2 * (torch_norm(**given),), "gives 2 outputs, not 1"),
        (lambda **given: torch_norm(**given).detach(), "output 0 has no gradient"),
        (lambda x, weight, bias: torch_norm(x, weight, bias.detach()), "gives no gradient of bias"),
        (lambda **given: torch_norm(**given).double(), "the output 0 is torch.float64, not torch.float32"),
        (changing, "writes into its input x"),
    ],
)
def test_what_is_no_answer_is_named(case, function, said):
    with pytest.raises(ValueError, match=said):
        verdict(case, function, own=True)


def test_the_next_provider_gets_what_one_has_written_into(case):
    inputs = case.inputs(0)
    judge, expected = Judge(case, inputs), inputs["x"].clone()
    provider = Provider("someone", functional(lambda _: changing))
    with pytest.raises(ValueError, match="writes into its input x"):
        judge.judge(provider, provider.make(case)(inputs))
    assert torch.equal(inputs["x"], expected)
