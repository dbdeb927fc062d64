"""Training and evaluation images from WebDataset shards."""

from fastvit_engine.data.batch import Batch
from fastvit_engine.data.data_plan import DataPlan
from fastvit_engine.data.loader import build_eval_data, build_train_data
from fastvit_engine.data.prepare import prepare_data

__all__ = ["Batch", "DataPlan", "build_eval_data", "build_train_data", "prepare_data"]
