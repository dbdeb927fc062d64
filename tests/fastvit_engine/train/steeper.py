"""An objective of one's own."""

import torch


class Steeper:
    """Twice the cross-entropy, and a draw from the sample's seed."""

    def __init__(self, config, device):
        torch.rand(7)  # which must not change the first weights

    def losses(self, model, batch):
        losses = torch.nn.functional.cross_entropy(model(batch.images).float(), batch.labels, reduction="none")
        return (2 * losses + torch.from_numpy(batch.seeds % 100) / 100) * batch.weights
