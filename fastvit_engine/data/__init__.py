"""Training and evaluation images from WebDataset shards."""

from fastvit_engine.data.stream.batch import Batch
from fastvit_engine.data.stream.loader import build_eval_data, build_train_data
from fastvit_engine.data.stream.plan import DataPlan
from fastvit_engine.data.stream.prepare import prepare_data

__all__ = ["Batch", "DataPlan", "build_eval_data", "build_train_data", "prepare_data"]
