import torch

from fastvit_engine.engine.optimizers.lion import Lion


def test_a_step_computes_its_closure_with_gradients_and_returns_the_loss():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = Lion([{"params": [weight]}], lr=0.5, betas=(0.9, 0.99))

    def closure():
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step() is None and torch.equal(weight.data, torch.ones(3))  # no gradient yet
    assert optimizer.step(closure).item() == 3.0
    assert torch.equal(weight.data, torch.full((3,), 0.5))
