"""Training and evaluation images from WebDataset shards."""

from fastvit_engine.data.batch import Batch
from fastvit_engine.data.check import check_data
from fastvit_engine.data.loader import build_eval_data, build_train_data
from fastvit_engine.data.shards import class_names, train_samples

__all__ = ["Batch", "build_eval_data", "build_train_data", "check_data", "class_names", "train_samples"]
