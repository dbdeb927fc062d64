"""FastViT Engine: pretrain Vision Transformers at scale with PyTorch, Triton, DeepSpeed and WebDataset."""

__version__ = "0.1.0"
