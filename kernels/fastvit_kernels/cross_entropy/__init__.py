"""Softmax and sigmoid cross-entropy of class indices, soft labels and mixup pairs."""

from fastvit_kernels.cross_entropy.op import cross_entropy, sigmoid_cross_entropy

__all__ = ["cross_entropy", "sigmoid_cross_entropy"]
