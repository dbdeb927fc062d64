"""What the engine's own optimizers do to weights: what timm's and PyTorch's do, on whole and on flat parameters."""

import pytest
import torch

from fastvit_engine.config import ModelConfig, OptimizerConfig
from fastvit_engine.engine.optimizers import adafactor, batches, muon
from fastvit_engine.engine.optimizers.exchange import Matrix, owners_of
from fastvit_engine.models import build_vit
from tests.fastvit_engine.engine.optimizers.flat import RATES, gradient, trained, use_threads
from tests.kernels.integrations.conftest import TORCHVISION  # lets timm be imported

assert TORCHVISION is None or TORCHVISION.ns == "torchvision"

SECTION = {"name": "Ti/4", "image_size": 16, "width": 24, "depth": 2, "heads": 2, "mlp_dim": 40, "num_classes": 5}
DECAY = 0.1
NOT_ELEMENTWISE = ("muon", "lamb", "adafactor")
OWN = ("lion", *NOT_ELEMENTWISE)


def make_model():
    torch.manual_seed(0)
    model = build_vit(ModelConfig.model_validate(SECTION), mean=(0.5,) * 3, std=(0.5,) * 3)
    torch.nn.init.normal_(model.head.weight, std=0.2)
    return model


def settings(kind, **changes):
    return OptimizerConfig.model_validate({"kind": kind, "weight_decay": DECAY, **changes})


def by_decay(model):
    matrices = [p for name, p in model.named_parameters() if name.endswith(".weight") and p.ndim >= 2]
    rest = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    return [{"params": matrices, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]


def stepped(model, optimizers, before=lambda: None):
    """The weights after the steps that `trained` makes."""
    for step, rate in enumerate(RATES):
        for name, parameter in model.named_parameters():
            parameter.grad = gradient(name, parameter.shape, step)
        before()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def by_timm(kind):
    optim = pytest.importorskip("timm.optim", reason="needs timm: pip install 'fastvit-engine[integrations]'")
    model = make_model()
    made = {
        "lion": lambda groups: optim.Lion(groups, lr=1, betas=(0.9, 0.99)),
        "lamb": lambda groups: optim.Lamb(groups, lr=1, eps=1e-6, max_grad_norm=None),
        "adafactor": lambda groups: optim.AdafactorBigVision(groups, lr=1),
    }[kind]
    return stepped(model, [made(by_decay(model))])


def by_pytorch():
    """Its Muon on the matrices of the blocks, of which query, key and value are three, and its AdamW on the rest."""
    model, parts = make_model(), {}
    for name, parameter in model.blocks.named_parameters():
        if name.endswith(".weight") and parameter.ndim == 2:
            chunks = parameter.detach().chunk(3 if name.endswith("qkv.weight") else 1)
            parts[parameter] = [torch.nn.Parameter(chunk) for chunk in chunks]  # of the same memory

    def give_gradients():
        for parameter, leaves in parts.items():
            for leaf, chunk in zip(leaves, parameter.grad.chunk(len(leaves)), strict=True):
                leaf.grad = chunk.clone()
            parameter.grad = None  # which AdamW passes over

    leaves = [leaf for of_parameter in parts.values() for leaf in of_parameter]
    hidden = torch.optim.Muon(leaves, lr=1, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
    return stepped(model, [hidden, torch.optim.AdamW(by_decay(model), lr=1)], give_gradients)


def assert_near(found, expected, kind):
    """Within 1e-5; but Muon multiplies in bf16, and Adafactor's momentum is rounded to it, now and then elsewhere."""
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        off = (found[name] - values).abs()
        assert off.max() <= {"muon": 5e-3, "adafactor": 2e-3}.get(kind, 1e-5), name
        if kind == "adafactor":
            assert (off > 1e-5).float().mean() <= 2 / 24, name


@pytest.mark.parametrize("kind", OWN)
def test_an_optimizer_does_what_that_of_timm_or_pytorch_does(kind, monkeypatch):
    use_threads(monkeypatch)
    (found,) = trained(make_model, settings(kind), processes=1, sharded=False)
    before = dict(make_model().named_parameters())
    assert all((found[name] - parameter).abs().max() > 1e-4 for name, parameter in before.items())
    assert_near(found, by_pytorch() if kind == "muon" else by_timm(kind), kind)


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("kind", OWN)
def test_parts_of_a_flat_tensor_are_updated_as_whole_parameters(kind, processes, monkeypatch):
    use_threads(monkeypatch)
    (whole,) = trained(make_model, settings(kind), processes=1, sharded=False)
    for found in trained(make_model, settings(kind), processes=processes, sharded=True):
        assert_near(found, whole, kind)


@pytest.mark.parametrize("kind", NOT_ELEMENTWISE)
def test_processes_that_hold_everything_stay_alike(kind, monkeypatch):
    use_threads(monkeypatch)
    (alone,) = trained(make_model, settings(kind), processes=1, sharded=False)
    one, other = trained(make_model, settings(kind), processes=2, sharded=False)
    assert all(torch.equal(one[name], values) for name, values in other.items())
    assert_near(one, alone, kind)


@pytest.mark.parametrize("kind", OWN)
def test_batches_change_nothing(kind, monkeypatch):
    """Pieces that begin and end inside parameters, rows and spans; and more than one round of matrices."""
    use_threads(monkeypatch)
    (expected,) = trained(make_model, settings(kind), processes=1, sharded=True)
    monkeypatch.setattr(batches.in_batches, "__kwdefaults__", {"size": 101})
    monkeypatch.setattr(adafactor, "BATCH", 101)
    monkeypatch.setattr(muon, "ROUND", 2000)
    monkeypatch.setattr(muon.rounds, "__defaults__", (2000,))
    for processes in (1, 2):
        for found in trained(make_model, settings(kind), processes=processes, sharded=True):
            assert_near(found, expected, kind)


def test_every_layer_has_its_rate(monkeypatch):
    use_threads(monkeypatch)
    kind = "muon"
    given = settings(kind, layer_decay=0.5)
    (whole,) = trained(make_model, given, processes=1, sharded=False)
    for found in trained(make_model, given, processes=2, sharded=True):
        assert_near(found, whole, kind)


@pytest.mark.parametrize("shape", [(16, 24), (24, 16), (20, 20)])
def test_orthogonalizing_gives_singular_values_near_one(shape):
    scales = torch.tensor([1e-3, 1, 1e3])[:, None, None]
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)) * scales
    found = muon.orthogonalize(matrices)
    assert found.shape == matrices.shape and found.dtype == torch.bfloat16
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    along = (u.mT @ found.float() @ v.mT).diagonal(dim1=-2, dim2=-1)  # the same directions
    assert (along.mean() - 1).abs() < 0.15
    assert torch.linalg.svdvals(found.float()).max() < 1.3
    assert torch.equal(muon.orthogonalize(torch.zeros(1, *shape)), torch.zeros(1, *shape, dtype=torch.bfloat16))


def test_query_key_and_value_are_three_matrices():
    assert muon.matrices_of("blocks.0.attn.qkv.weight", (6, 2)) == [
        Matrix("blocks.0.attn.qkv.weight", start, 2, 2) for start in (0, 4, 8)
    ]
    assert muon.matrices_of("blocks.0.mlp.fc1.weight", (6, 2)) == [Matrix("blocks.0.mlp.fc1.weight", 0, 6, 2)]


def test_matrices_are_shared_out_by_the_work_they_make():
    sizes = [(10, 10), (10, 40), (10, 10), (40, 10), (10, 10), (10, 10)]
    matrices = [Matrix(str(number), 0, *size) for number, size in enumerate(sizes)]
    owners = owners_of(matrices, 3)
    assert {owners[1], owners[3]} == {0, 1} and [owners[n] for n in (0, 2, 4, 5)] == [2] * 4
