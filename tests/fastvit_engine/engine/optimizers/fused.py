"""In place of NVIDIA's apex: optimizers that compute what its kernels do, on any device, and count steps per group."""

import torch


class _Fused(torch.optim.Optimizer):
    built = 0

    def __init__(self, groups, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, **fixed):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        assert self.param_groups[0]["params"], "the device is that of the first tensor"
        assert fixed.pop("adam_w_mode")
        self.fixed = fixed
        type(self).built += 1

    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for tensor in group["params"]:
                assert tensor.dtype == tensor.grad.dtype == torch.float32
                state = self.state[tensor]
                if len(state) == 0:
                    state.update(exp_avg=torch.zeros_like(tensor), exp_avg_sq=torch.zeros_like(tensor))
                tensor -= self.update(group, tensor, state)

    def adam(self, group, tensor, state):
        first, second = group["betas"]
        state["exp_avg"].copy_(first * state["exp_avg"] + (1 - first) * tensor.grad)
        state["exp_avg_sq"].copy_(second * state["exp_avg_sq"] + (1 - second) * tensor.grad**2)
        averages = state["exp_avg"] / (1 - first ** group["step"])
        squares = state["exp_avg_sq"] / (1 - second ** group["step"])
        return averages / (squares.sqrt() + group["eps"]) + group["weight_decay"] * tensor


class FusedAdam(_Fused):
    def update(self, group, tensor, state):
        return group["lr"] * self.adam(group, tensor, state)


class FusedLAMB(_Fused):
    """Clips the gradients of all groups together, and leaves updates in place of the gradients."""

    def step(self):
        gradients = [tensor.grad for group in self.param_groups for tensor in group["params"]]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        limit = self.fixed.get("max_grad_norm", 1.0)
        for gradient in gradients:
            gradient.div_(norm / limit if norm > limit else 1.0)
        super().step()

    def update(self, group, tensor, state):
        update = self.adam(group, tensor, state)
        tensor.grad.copy_(update)
        lengths = tensor.norm(), update.norm()
        scale = lengths[0] / lengths[1] if group["weight_decay"] != 0 and min(lengths) > 0 else 1.0
        return group["lr"] * scale * update
