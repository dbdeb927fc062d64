"""Training data: which samples each step has, and the loaders that turn them into batches."""
