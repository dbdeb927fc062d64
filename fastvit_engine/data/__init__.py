"""Training and evaluation images from WebDataset shards, or from an iterable of the user's own."""

from fastvit_engine.data.stream.batch import Batch
from fastvit_engine.data.stream.iterable import IterableData, Share
from fastvit_engine.data.stream.prepare import prepare_data
from fastvit_engine.data.stream.source import TrainingData

__all__ = ["Batch", "IterableData", "Share", "TrainingData", "prepare_data"]
