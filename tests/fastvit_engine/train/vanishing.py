"""An objective whose gradients are nearly nothing. Adam makes them steps as usual if its eps is smaller still."""

import torch


class Vanishing:
    """1e-17 of the cross-entropy."""

    def __init__(self, config, device):
        pass

    def losses(self, model, batch):
        losses = torch.nn.functional.cross_entropy(model(batch.images).float(), batch.labels, reduction="none")
        return 1e-17 * losses * batch.weights
